"""The live table: what it shows of running steps at any width, and the time that is left."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mixmerge.plan.graph import Plan, Step, longest_chains
from mixmerge.run.expected import expected_seconds, length_by
from mixmerge.run.live import MOST, Board, Row
from mixmerge.run.schedule import Schedule, rough
from mixmerge.run.store import Store


class Clock:
    """A clock that goes as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(title: str, *inputs: Step, **what) -> Step:
    kind, _, name = title.partition("/")
    return Step(kind, name, {"name": name, **what}, {f"in{at}": one.id for at, one in enumerate(inputs)})


def board_of(*steps: Step, total: int | None = None, seconds=None, jobs: int = 1) -> tuple[Board, Clock]:
    clock = Clock()
    board = Board(clock)
    board.begin("study", total=total or len(steps), todo=steps, seconds=seconds or {}, jobs=jobs)
    return board, clock


def shown(board: Board, width: int = 80, height: int = 24) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, height=height, force_terminal=True, color_system=None).print(board)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    return [line.rstrip() for line in text.splitlines()]


TRAIN, OTHER = step("train/a"), step("train/b")


def test_a_running_step_is_shown_with_its_share_its_time_what_is_left_and_its_gpus():
    board, clock = board_of(TRAIN, OTHER)
    board.take(TRAIN, {"event": "start", "gpus": ["0", "1"]})
    board.take(TRAIN, {"event": "progress", "done": 0, "total": 200})
    clock.now += 60
    board.take(TRAIN, {"event": "progress", "done": 50, "total": 200})
    heads, row, whole = shown(board)
    assert heads.split() == ["running", "done", "for", "left", "GPU"]
    assert row.split() == ["train/a", "50/200", "25", "%", "1:00", "3", "min", "0,1"]
    assert whole.startswith("study: 0/2 done, 1:00, more than 3 min left"), "nothing tells how long the other takes"


def test_a_step_that_carries_on_is_measured_by_what_it_did_now():
    row = Row(TRAIN, 0.0)
    assert row.left(5.0, None) is None
    assert row.left(5.0, 30.0) == 25.0
    row.advance(10.0, 80, 100)
    assert row.left(12.0, 30.0) == 18.0, "one sign of life tells no pace"
    row.advance(20.0, 90, 100)
    assert row.left(20.0, 30.0) == 10.0
    assert Row(TRAIN, 0.0).left(99.0, 30.0) == 0.0


def test_the_time_left_is_the_longest_chain_or_all_of_it_shared_out():
    first = step("train/first")
    after = step("merge/after", first)
    many = [step(f"judge/{at}") for at in range(10)]
    seconds = {first.id: 100.0, after.id: 50.0} | {one.id: 10.0 for one in many}
    for jobs, left in ((1, 250.0), (2, 150.0), (8, 150.0)):
        board, _ = board_of(first, after, *many, seconds=seconds, jobs=jobs)
        assert board.left() == (left, True)
    board, clock = board_of(first, after, *many, seconds=seconds)
    board.take(first, {"event": "start"})
    clock.now += 40
    assert board.left() == (210.0, True)
    board.take(first, {"event": "done"})
    assert board.left() == (150.0, True)
    assert board.line() == "study: 1/12 done, 0:40, about 2.5 min left"


def test_without_any_estimate_no_time_is_made_up():
    board, clock = board_of(TRAIN, total=7)
    clock.now += 3661
    assert board.left() is None
    assert board.line() == "study: 6/7 done, 1:01:01"


@pytest.mark.parametrize("width", [200, 80, 60, 40, 20, 10])
def test_no_line_is_wider_than_the_terminal(width):
    steps = [step(f"train/a-very-long-name-of-an-expert-in-six-languages-{at}") for at in range(3)]
    board, clock = board_of(*steps, seconds={one.id: 5000.0 for one in steps})
    for one in steps:
        board.take(one, {"event": "start", "gpus": ["0"]})
        board.take(one, {"event": "progress", "done": 12345, "total": 1234567})
    board.take(steps[2], {"event": "failed", "error": "x"})
    clock.now += 40_000
    lines = shown(board, width)
    assert max(map(len, lines)) <= width
    assert len(lines) == 4
    if width >= 40:
        assert all("train/a-very" in line for line in lines[1:3])


def test_of_many_running_steps_the_first_are_shown_and_the_rest_counted():
    steps = [step(f"train/{at}") for at in range(64)]
    board, _ = board_of(*steps)
    for one in steps:
        board.take(one, {"event": "start"})
    lines = shown(board, height=50)
    assert sum(line.startswith("train/") for line in lines) == MOST
    assert f"and {64 - MOST} more" in lines
    low = shown(board, height=10)
    assert len(low) < 10, "the terminal's last line stays free"
    assert f"and {64 - sum(line.startswith('train/') for line in low)} more" in low


def test_what_another_runner_has_is_named_until_it_is_done():
    board, _ = board_of(TRAIN, OTHER)
    board.take(TRAIN, {"event": "waiting"})
    assert shown(board) == ["another runner is at train/a", "study: 0/2 done, 0:00"]
    board.take(TRAIN, {"event": "done"})
    board.take(OTHER, {"event": "waiting"})
    board.take(OTHER, {"event": "start"})
    assert [line.split()[0] for line in shown(board)] == ["running", "train/b", "study:"]


def test_failures_are_counted_and_what_was_left_out_stays_to_do():
    board, _ = board_of(TRAIN, OTHER)
    board.take(TRAIN, {"event": "start"})
    board.take(TRAIN, {"event": "failed", "error": "x"})
    board.take(OTHER, {"event": "skipped"})
    assert board.line().startswith("study: 0/2 done, 1 failed, ")
    assert list(board.todo) == [OTHER.id]


def test_names_that_would_steer_the_terminal_or_rich_are_plain_text():
    wild = step("train/[bold]x[/bold]\x1b[2J:smile:")
    board, _ = board_of(wild)
    board.take(wild, {"event": "start"})
    text = "\n".join(shown(board))
    assert "train/[bold]x[/bold]\\x1b[2J:smile:" in text


def test_events_of_a_step_that_nobody_saw_begin_do_no_harm():
    board, _ = board_of(TRAIN)
    board.take(TRAIN, {"event": "progress", "done": 1, "total": 2})
    board.take(TRAIN, {"event": "note", "text": "x"})
    assert shown(board) == ["study: 0/1 done, 0:00"]


# What steps are expected to take


def test_the_longest_chain_from_each_step_counts_what_is_left_alone():
    a = step("train/a")
    b, c = step("merge/b", a), step("generate/c", a)
    d = step("score/d", b, c)
    lengths = {a.id: 1.0, b.id: 5.0, c.id: 2.0, d.id: 1.0}
    assert longest_chains((a, b, c, d), lambda s: lengths[s.id]) == {a.id: 7.0, b.id: 6.0, c.id: 3.0, d.id: 1.0}
    assert longest_chains((c, d), lambda s: lengths[s.id]) == {c.id: 3.0, d.id: 1.0}
    assert longest_chains((), rough) == {}


def test_what_is_estimated_makes_the_order_and_the_rest_is_scaled_to_it():
    base, short, long = step("base/base"), step("train/short"), step("train/long")
    answers = step("generate/x")
    steps = (base, short, long, answers)
    length = length_by({short.id: 10.0, long.id: 1000.0, base.id: 5.0}, steps)
    assert [length(one) for one in (short, long, base)] == [10.0, 1000.0, 5.0]
    assert length(answers) == rough(answers), "the middle one of the estimates is a second for each rough one"
    assert length_by({}, steps)(long) == rough(long)
    plan = Plan("s", steps, {})
    schedule = Schedule(plan, [short, long, answers], length=length)
    assert [batch[0].title for batch in schedule.ready()] == ["train/long", "train/short", "generate/x"]


def test_a_studys_own_records_tell_how_long_its_steps_take(finished, tmp_path):
    from mixmerge.plan.build import build_plan
    from mixmerge.recipe.load import load_recipe

    plan = build_plan(load_recipe(finished.study.recipe, ["seed=5"]))
    found = expected_seconds(plan, plan.steps, Store(finished.study.out))
    assert found.keys() == plan.by_id.keys()
    assert all(seconds >= 0 for seconds in found.values())


def test_a_plan_that_nothing_can_be_told_of_is_run_by_rough_lengths(chain, tmp_path):
    odd = Plan("odd", (*chain.steps, Step("train", "odd", {}, {"model": "nowhere"})), {})
    assert expected_seconds(odd, odd.steps, Store(tmp_path)) == {}
