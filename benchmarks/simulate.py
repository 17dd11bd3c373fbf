"""How the paper's whole study (recipes/paper-study.yaml, Aya 23 8B) would go on 1 to 64 GPUs, by simulation.

    python benchmarks/simulate.py --price 2.5

The planner, the scheduler and what it gives to steps are the real ones; only the lengths of steps are modelled (see
`seconds`), and the schedule is also tried with lengths that it is told wrong. Below four GPUs the trainings learn adapters.
The plan is made over a tiny base and synthetic rows, since neither changes which steps there are. Prints the makespan against the longest
way through the plan and against all work shared out evenly: no schedule is shorter than the larger of the two.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "run"))

from paper_study import AYA, ONE_GPU, machine_of, needs, off_by, paper_plan

from mixmerge.plan.graph import Step
from mixmerge.run.expected import length_by
from mixmerge.run.simulated import simulate

PROCESSES = 4  # of a training in the recipe
DRAWS = 20  # of wrong lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 64])
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU for an hour")
    arguments = parser.parse_args()
    plans = {}
    for one in sorted({gpus < PROCESSES for gpus in arguments.gpus}):
        with tempfile.TemporaryDirectory() as folder:
            plans[one] = paper_plan(Path(folder), None, ONE_GPU if one else ())
        told = "one GPU a training, adapters" if one else f"{PROCESSES} GPUs a training, all weights"
        print(f"{len(plans[one].models)} candidates, {len(plans[one].steps)} steps, {told}")
    print(f"ratio: by true lengths, by lengths wrong by up to 3 (the worst of {DRAWS}), by rough ones")
    print("GPUs    hours    bound  ratio  wrong  rough  longest way  in use  GPU hours     cost")
    for gpus in arguments.gpus:
        plan, machine = plans[gpus < PROCESSES], machine_of(gpus)
        seconds, demand = AYA.seconds(plan), needs(machine)

        def alone(step: Step) -> float:
            return seconds(step, int(step.how.get("processes", 1)))  # noqa: B023

        found = simulate(plan, machine, seconds, demand)
        wrong = [simulate(plan, machine, seconds, demand, expected=off_by(3.0, seed, alone)) for seed in range(DRAWS)]
        rough = simulate(plan, machine, seconds, demand, expected=length_by({}, plan.steps))
        worst = max(one.makespan for one in wrong)
        print(
            f"{gpus:>4} {found.makespan / 3600:>8.2f} {found.bound / 3600:>8.2f} {found.makespan / found.bound:>6.3f} "
            f"{worst / found.bound:>6.3f} {rough.makespan / found.bound:>6.3f} {found.critical_path / 3600:>12.2f} "
            f"{found.utilisation:>7.0%} {found.gpu_seconds / 3600:>10.0f} "
            f"{found.makespan * gpus / 3600 * arguments.price:>8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
