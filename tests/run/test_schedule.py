"""The schedule: what may start, in which order, and what a failure leaves; no processes."""

from __future__ import annotations

import random

import pytest

from mixmerge.errors import UserError
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.schedule import Schedule, chosen, matching, rough


def step(kind: str, name: str, *inputs: Step, group: str = "") -> Step:
    return Step(kind, name, {"name": name}, {f"in{at}": one.id for at, one in enumerate(inputs)}, group=group)


BASE = step("base", "base")
MIX_A, MIX_B = (step("mixture", name, BASE, group="mixture") for name in "ab")
A, B = step("train", "a", BASE, MIX_A), step("train", "b", BASE, MIX_B)
MERGE = step("merge", "m", A, B)
ANSWERS = [step("generate", f"{one.name}.p", one, group=f"generate {one.name}") for one in (BASE, A, B, MERGE)]
SCORE = step("score", "score", *ANSWERS)
STEPS = (BASE, MIX_A, MIX_B, A, B, MERGE, *ANSWERS, SCORE)
PLAN = Plan("study", STEPS, {})


def schedule(**how) -> Schedule:
    return Schedule(PLAN, STEPS, **how)


def ready(one: Schedule) -> list[list[str]]:
    return [[step.title for step in batch] for batch in one.ready()]


def carry_out(one: Schedule, *steps: Step) -> None:
    one.start(steps)
    for step in steps:
        one.done(step)


def test_base_and_mixtures_come_before_anything_else_starts():
    one = schedule()
    assert ready(one) == [["base/base"]]
    carry_out(one, BASE)
    assert ready(one) == [["mixture/a", "mixture/b"]]
    carry_out(one, MIX_A)
    assert ready(one) == [["mixture/b"]]


def test_what_the_longest_way_depends_on_is_first():
    one = schedule()
    carry_out(one, BASE, MIX_A, MIX_B)
    assert ready(one) == [["train/a"], ["train/b"], ["generate/base.p"]]


def test_a_length_that_is_known_changes_what_is_urgent():
    long = {"generate/base.p": 1e6}
    one = schedule(length=lambda step: long.get(step.title, rough(step)))
    carry_out(one, BASE, MIX_A, MIX_B)
    assert ready(one)[0] == ["generate/base.p"]


def test_what_runs_is_not_ready_and_what_needs_it_waits():
    one = schedule()
    carry_out(one, BASE, MIX_A, MIX_B)
    one.start([A])
    assert ready(one) == [["train/b"], ["generate/base.p"]]
    one.done(A)
    assert ready(one) == [["train/b"], ["generate/base.p"], ["generate/a.p"]]
    assert "merge/m" not in str(ready(one))


def test_groups_of_one_family_go_together_where_one_process_runs_at_a_time():
    one = schedule(families=True)
    carry_out(one, BASE, MIX_A, MIX_B, A, B, MERGE)
    assert [sorted(batch) for batch in ready(one)] == [
        ["generate/a.p", "generate/b.p", "generate/base.p", "generate/m.p"]
    ]


def test_steps_that_share_a_large_thing_follow_one_another_in_a_batch():
    groups = ["judge x", "judge y", "judge x", "judge y"]
    steps = tuple(step("judge", str(at), group=group) for at, group in enumerate(groups))
    one = Schedule(Plan("s", steps, {}), steps, families=True)
    assert [s.group for s in one.ready()[0]] == ["judge x", "judge x", "judge y", "judge y"]


def test_a_failure_blocks_only_what_depends_on_it():
    one = schedule()
    carry_out(one, BASE, MIX_A, MIX_B)
    one.start([A])
    one.fail(A)
    carry_out(one, B)
    assert ready(one) == [["generate/base.p"], ["generate/b.p"]]
    carry_out(one, ANSWERS[0], ANSWERS[2])
    assert ready(one) == []
    assert [PLAN.by_id[i].title for i in one.blocked] == ["merge/m", "generate/a.p", "generate/m.p", "score/score"]


def test_a_mixture_for_which_the_recipe_has_to_change_ends_the_run_unless_it_is_to_keep_going():
    for keep_going, left in ((False, []), (True, [["train/b"], ["generate/base.p"]])):
        one = schedule(keep_going=keep_going)
        carry_out(one, BASE, MIX_B)
        one.start([MIX_A])
        one.fail(MIX_A, recipe=True)
        assert one.ended is not keep_going
        assert ready(one) == left


def test_a_mixture_that_was_killed_stops_only_what_depends_on_it():
    one = schedule()
    carry_out(one, BASE, MIX_B)
    one.start([MIX_A])
    one.fail(MIX_A)
    assert not one.ended
    assert ready(one) == [["train/b"], ["generate/base.p"]]


def test_mixtures_that_wait_for_a_failed_base_hold_nothing_else_back():
    other = step("base", "other")
    drawn = step("mixture", "drawn", other)
    plan = Plan("two", (BASE, other, drawn, ANSWERS[0]), {})
    one = Schedule(plan, plan.steps)
    carry_out(one, BASE)
    one.start([other])
    assert ready(one) == [], "base and mixtures come first"
    one.fail(other)
    assert ready(one) == [["generate/base.p"]]
    assert one.blocked == [drawn.id, ANSWERS[0].id]


def test_a_training_that_fails_by_what_the_user_gave_stops_only_what_depends_on_it():
    one = schedule()
    carry_out(one, BASE, MIX_A, MIX_B)
    one.start([A])
    one.fail(A, recipe=True)
    assert not one.ended


def test_a_full_disk_ends_the_run_whatever_is_asked():
    one = schedule(keep_going=True)
    carry_out(one, BASE, MIX_A, MIX_B)
    one.fail(A, end=True)
    assert ready(one) == []


def test_steps_that_their_process_did_not_come_to_are_ready_again():
    one = schedule()
    carry_out(one, BASE)
    one.start([MIX_A, MIX_B])
    one.done(MIX_A)
    one.let_go([MIX_A, MIX_B])
    assert ready(one) == [["mixture/b"]]


def test_steps_that_are_done_before_the_run_are_no_part_of_it():
    one = Schedule(PLAN, (MERGE, *ANSWERS, SCORE))
    assert ready(one)[0] == ["merge/m"]
    assert len(ready(one)) == 4


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_order_every_step_starts_once_and_after_its_inputs(seed):
    draw = random.Random(seed)
    steps: list[Step] = []
    for at in range(40):
        inputs = draw.sample(steps, min(len(steps), draw.randrange(4)))
        kind = draw.choice(["train", "merge", "generate", "judge"])
        steps.append(step(kind, str(at), *inputs, group=draw.choice(["", "", "judge x"])))
    one, running, done = Schedule(Plan("s", tuple(steps), {}), steps), [], set()
    while one.todo:
        for batch in one.ready():
            if len(running) < 3:
                assert all(done.issuperset(step.inputs.values()) for step in batch)
                one.start(batch)
                running.append(list(batch))
        batch = running.pop(draw.randrange(len(running)))
        for finished in batch:
            assert finished.id not in done
            one.done(finished)
            done.add(finished.id)
    assert len(done) == 40
    assert one.blocked == []


@pytest.mark.parametrize(
    ("only", "titles"),
    [
        (["train/a"], {"base/base", "mixture/a", "train/a"}),
        (["mixture/*"], {"base/base", "mixture/a", "mixture/b"}),
        (["train/b", "generate/base.*"], {"base/base", "mixture/b", "train/b", "generate/base.p"}),
        (["*"], {step.title for step in STEPS}),
    ],
)
def test_chosen_steps_bring_all_that_they_need_and_nothing_else(only, titles):
    assert {PLAN.by_id[i].title for i in chosen(PLAN, only)} == titles


def test_matching_gives_the_steps_of_the_patterns_alone():
    assert [s.title for s in matching(PLAN, ["train/?", "score/*"])] == ["train/a", "train/b", "score/score"]


def test_a_pattern_that_no_step_has_is_refused_with_what_was_meant():
    with pytest.raises(UserError, match=r"--only: no step is called 'trian/a'; did you mean 'train/a'\?"):
        chosen(PLAN, ["train/*", "trian/a"])


def test_run_only_prints_where_the_steps_are_and_needs_no_scores(study, mixmerge):
    status, out, err = mixmerge("run", study.recipe, "--out", study.out, "--only", "mixture/*")
    assert status == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["mixture/general", "mixture/mix"]
    assert all((study.store / "mixture").as_posix() in line for line in lines[1:])
    assert sorted(name.partition("--")[0] for name in study.records()) == [
        "base/base",
        "mixture/general",
        "mixture/mix",
    ]


def test_run_only_refuses_what_no_step_is_called_in_one_line(study, mixmerge):
    status, out, err = mixmerge("run", study.recipe, "--out", study.out, "--only", "trian/general")
    assert (status, out) == (2, "")
    assert err == "error: --only: no step is called 'trian/general'; did you mean 'train/general'?\n"


def test_a_group_that_only_saves_loading_is_shared_out_where_there_is_room():
    one = schedule()
    carry_out(one, BASE)
    assert ready(one) == [["mixture/a", "mixture/b"]]
    assert [[step.title for step in batch] for batch in one.ready(2)] == [["mixture/a"], ["mixture/b"]]
    assert len(one.ready(9)) == 2


def test_the_client_of_a_server_and_a_server_that_was_started_stay_one():
    steps = [step("judge", str(at), group="judge api") for at in range(4)]
    assert [len(batch) for batch in Schedule(Plan("s", tuple(steps), {}), steps).ready(4)] == [4]
    served = [
        Step(
            "generate",
            str(at),
            {},
            {},
            how={"server": {"start": "vllm serve", "urls": None, "key": None}, "at": at},
            group="generate x",
        )
        for at in range(2)
    ]
    served = [Step(s.kind, s.name, {"at": s.name}, {}, s.how, s.group) for s in served]
    assert [len(batch) for batch in Schedule(Plan("s", tuple(served), {}), served).ready(4)] == [2]
