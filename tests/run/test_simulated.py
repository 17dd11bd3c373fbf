"""The simulation: the real plan and schedule on paper; how near they come to what no schedule can beat."""

from __future__ import annotations

import random

import pytest
from paper_study import AYA, GB, ONE_GPU, machine_of, needs, off_by, paper_plan

from mixmerge.plan.graph import Plan, Step
from mixmerge.run.expected import length_by
from mixmerge.run.resources import Demand, Resources, usual_jobs
from mixmerge.run.runner import drive
from mixmerge.run.schedule import Schedule
from mixmerge.run.simulated import SimulatedBackend, simulate


@pytest.fixture(scope="module")
def paper(tmp_path_factory, tiny_base) -> Plan:
    return paper_plan(tmp_path_factory.mktemp("paper"), tiny_base)


def step(kind: str, name: str, *inputs: Step) -> Step:
    return Step(kind, name, {"name": name}, {f"in{at}": one.id for at, one in enumerate(inputs)})


def plan_of(*steps: Step) -> Plan:
    return Plan("s", steps, {})


def one_gpu(step: Step) -> Demand:
    return Demand(1)


def test_the_papers_study_has_every_way_to_mix_and_to_merge(paper):
    kinds = [step.kind for step in paper.steps]
    assert len(paper.models) == 56
    assert (kinds.count("train"), kinds.count("merge")) == (22, 33)
    assert {step.what["method"] for step in paper.steps if step.kind == "train"} == {"sft", "dpo"}


def on_paper(plan: Plan, gpus: int, expected=None):
    machine = machine_of(gpus)
    return simulate(plan, machine, AYA.seconds(plan), needs(machine), expected=expected)


# near the size where the longest way is as long as all work shared out, the larger of the two is no tight bound
@pytest.mark.parametrize(
    ("gpus", "ratio"), [(4, 1.1), (8, 1.1), (16, 1.1), (24, 1.25), (32, 1.25), (40, 1.1), (64, 1.1)]
)
def test_the_papers_study_ends_within_a_tenth_of_what_no_schedule_can_beat_but_near_its_longest_way(paper, gpus, ratio):
    found = on_paper(paper, gpus)
    assert found.bound <= found.makespan <= ratio * found.bound
    assert found.gpus == gpus
    assert 0 < found.utilisation <= 1


def test_one_gpu_holds_the_study_with_adapters_and_is_hardly_ever_idle(tmp_path, tiny_base):
    plan = paper_plan(tmp_path, tiny_base, ONE_GPU)
    trainings = [step for step in plan.steps if step.kind == "train"]
    assert {step.how["processes"] for step in trainings} == {1}
    found = on_paper(plan, 1)
    assert found.bound <= found.makespan <= 1.1 * found.bound
    assert found.utilisation > 0.9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gpus", [8, 64])
def test_lengths_that_are_told_wrong_by_up_to_a_half_cost_less_than_a_quarter(paper, gpus, seed):
    seconds = AYA.seconds(paper)
    told = off_by(1.5, seed, lambda step: seconds(step, int(step.how.get("processes", 1))))
    found = on_paper(paper, gpus, told)
    assert found.bound <= found.makespan <= 1.25 * found.bound
    assert found.bound == on_paper(paper, gpus).bound, "only the order differs"


def test_a_run_with_nothing_to_learn_from_orders_by_rough_lengths(paper):
    found = on_paper(paper, 8, length_by({}, paper.steps))
    assert found.bound <= found.makespan <= 1.25 * found.bound


def test_more_gpus_are_never_slower_and_cost_no_fewer_gpu_seconds(paper):
    runs = [on_paper(paper, gpus) for gpus in (4, 8, 16)]
    assert runs[0].makespan > runs[1].makespan > runs[2].makespan
    assert runs[0].gpu_seconds == pytest.approx(runs[2].gpu_seconds), "a training has four of them anyway"


def test_a_chain_takes_the_sum_of_its_steps_on_any_machine():
    first = step("train", "a")
    second = step("train", "b", first)
    for gpus in (1, 4):
        found = simulate(plan_of(first, second), machine_of(gpus), lambda *_: 10.0, one_gpu)
        assert (found.makespan, found.critical_path) == (20.0, 20.0)


def test_steps_that_need_nothing_of_each_other_share_the_gpus():
    steps = [step("train", str(at)) for at in range(6)]
    for gpus, seconds in ((1, 60.0), (2, 30.0), (4, 20.0), (6, 10.0), (9, 10.0)):
        found = simulate(plan_of(*steps), machine_of(gpus), lambda *_: 10.0, one_gpu)
        assert found.makespan == seconds
        assert found.gpu_seconds == 60.0


def test_a_training_on_more_gpus_is_as_much_shorter_as_its_model_says():
    found = simulate(plan_of(step("train", "a")), machine_of(2), lambda _, gpus: 12.0 / gpus, lambda _: Demand(4))
    assert (found.makespan, found.gpu_seconds, found.utilisation) == (6.0, 12.0, 1.0)


@pytest.mark.parametrize("seed", range(10))
def test_random_studies_keep_within_gpus_and_jobs_and_finish_every_step(seed):
    draw = random.Random(seed)
    steps: list[Step] = []
    for at in range(60):
        steps.append(
            step(draw.choice(["train", "merge", "judge"]), str(at), *draw.sample(steps, min(at, draw.randrange(3))))
        )
    length = {one.id: draw.uniform(1, 50) for one in steps}
    gpus = {one.id: draw.choice([0, 1, 1, 2]) for one in steps}
    machine = Resources(8, 64 * GB, ("0", "1", "2"))
    backend = SimulatedBackend(
        machine, lambda s, _: length[s.id], lambda s: Demand(gpus[s.id]), jobs=usual_jobs(machine)
    )
    plan, ends, now = plan_of(*steps), {}, 0.0
    for event in drive(Schedule(plan, steps, length=lambda s: length[s.id]), backend):
        assert backend.now >= now
        now = backend.now
        one = plan.by_id[event["step"]]
        began = now - length[one.id]
        assert all(ends[i] <= began + 1e-6 for i in one.inputs.values())
        ends[one.id] = now
    assert len(ends) == 60
    for moment in ends.values():
        at_work = [s for s in steps if ends[s.id] - length[s.id] < moment - 1e-6 <= ends[s.id]]
        assert sum(gpus[s.id] for s in at_work) <= 3
        assert len(at_work) <= 6
