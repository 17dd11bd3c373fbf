"""How the paper's whole study (recipes/paper-study.yaml, Aya 23 8B) would go on 1, 8 and 64 GPUs, by simulation.

    python benchmarks/simulate.py --price 2.5

The planner and the scheduler are the real ones; only the lengths of steps are modelled (see `seconds`). The plan is made
over a tiny base and synthetic rows, since neither changes which steps there are. Prints the makespan against the longest
way through the plan and against all work shared out evenly: no schedule is shorter than the larger of the two.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "run"))

from paper_study import AYA, machine_of, paper_plan

from mixmerge.run.simulated import simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU for an hour")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = paper_plan(Path(folder))
    print(f"{len(plan.models)} candidates, {len(plan.steps)} steps")
    print(
        f"{'GPUs':>4} {'hours':>8} {'bound':>8} {'ratio':>6} {'longest way':>12} {'in use':>7} {'GPU hours':>10} {'cost':>8}"
    )
    for gpus in arguments.gpus:
        found = simulate(plan, machine_of(gpus), AYA.seconds(plan), AYA.demand)
        print(
            f"{gpus:>4} {found.makespan / 3600:>8.1f} {found.bound / 3600:>8.1f} {found.makespan / found.bound:>6.3f} "
            f"{found.critical_path / 3600:>12.1f} {found.utilisation:>7.0%} {found.gpu_seconds / 3600:>10.0f} "
            f"{found.makespan * gpus / 3600 * arguments.price:>8.0f}"
        )


if __name__ == "__main__":
    main()
