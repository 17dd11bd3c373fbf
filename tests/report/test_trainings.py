"""What the page says of trainings: their numbers as they were logged, for every kind of trainer, few charts for many."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mixmerge.report.page import render
from mixmerge.report.trainings import MOST_CHARTS, Section, Training, from_to, panels, read_metrics, section

if TYPE_CHECKING:
    from conftest import Study

HELD = {"en": {"loss": 3.0}, "ar": {"loss": 4.0}}
LATER = {"en": {"loss": 2.0}, "ar": {"loss": 4.5}}


def steps(losses: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss, "lr": 1e-5, "tokens": 9} | more for step, loss in enumerate(losses, 1)]


def told(study: Study, trainings: dict[str, Any] | None = None) -> Section:
    found = section(study.scores, study.trainings if trainings is None else trainings)
    assert found is not None
    return found


def cells(found: Section, name: str) -> dict[str, str]:
    row = next(row for row in found.rows if row.name == name)
    return dict(zip(found.heads, (cell.value for cell in row.cells), strict=True))


def shown(study: Study, trainings: dict[str, Any]) -> str:
    """The section as it stands on the page."""
    page = render(**study.report_arguments() | {"trainings": trainings})
    return page.partition('<section id="trainings"')[2].partition("</section>")[0]


# Reading what was logged


def test_metrics_are_the_lines_of_the_file_and_none_where_there_is_no_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text("".join(json.dumps(line) + "\n" for line in steps([2.0, 1.0])))
    assert read_metrics(file) == steps([2.0, 1.0])


@pytest.mark.parametrize("text", ["no json\n", '[1, 2]\n"text"\n', b"\xff\xfe\x00"])
def test_a_file_of_that_name_that_another_trainer_wrote_otherwise_is_no_metrics(
    tmp_path: Path, text: str | bytes
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_metrics(file) == []


def test_curves_are_in_the_order_of_their_steps_whatever_the_order_of_the_lines() -> None:
    (panel,) = panels(reversed(steps([3.0, 2.0, 1.0])))
    assert panel.trained == [(1, 3.0), (2, 2.0), (3, 1.0)]


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"loss": 2.0},
        {"step": "1", "loss": 2.0},
        {"step": 1, "loss": None},
        {"step": 1, "loss": float("nan")},
        {"step": 1, "loss": float("inf")},
        {"step": True, "loss": 2.0},
        {"step": 1, "train_loss": 2.0},
        {"step": 1, "held_out": [1, 2]},
        {"step": 1, "held_out": {"en": 3.0}},
    ],
)
def test_lines_that_say_nothing_of_a_loss_are_passed_over(line: dict[str, Any]) -> None:
    assert panels([line]) == []
    (panel,) = panels([*steps([3.0, 2.0]), line | {"step": line.get("step", "none")}])
    assert len(panel.trained) == 2
    assert panel.lines()


def test_the_mean_is_over_languages_and_the_worst_is_the_one_that_ends_highest() -> None:
    (panel,) = panels([{"step": 0, "held_out": HELD}, *steps([3.0, 2.0]), {"step": 2, "held_out": LATER}])
    assert panel.mean == [(0, 3.5), (2, 3.25)]
    assert panel.worst == "ar"
    assert panel.wrong == ["ar"]


def test_the_worst_margin_is_the_lowest_and_falls_where_it_goes_wrong() -> None:
    held = [
        {"step": step, "held_out": {"en": {"loss": 0.6, "margin": en}, "fr": {"loss": 0.6, "margin": fr}}}
        for step, en, fr in ((0, 0.0, 0.0), (2, 0.5, -0.1))
    ]
    _, margin = panels([*held, *steps([0.69, 0.6], **{"rewards/margins": 0.2})])
    assert (margin.worst, margin.wrong) == ("fr", ["fr"])
    assert margin.measure.wrong_way == "Fell in"


def test_a_mean_is_taken_only_where_every_language_was_read() -> None:
    held = [{"step": 0, "held_out": {"en": {"loss": 3.0}}}, {"step": 2, "held_out": HELD}]
    (panel,) = panels([*held, *steps([3.0, 2.0])])
    assert panel.mean == [(2, 3.5)]
    apart = [{"step": 0, "held_out": {"en": {"loss": 3.0}}}, {"step": 2, "held_out": {"ar": {"loss": 4.0}}}]
    (panel,) = panels([*apart, *steps([3.0, 2.0])])
    assert panel.mean == []
    assert panel.lines()


def test_a_single_language_has_no_worst_one() -> None:
    (panel,) = panels([{"step": 0, "held_out": {"en": {"loss": 3.0}}}, *steps([3.0])])
    assert panel.worst is None


def test_the_method_is_told_from_what_was_measured() -> None:
    def method(measured: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
        return Training("x", "expert", [], measured, panels(metrics)).method

    assert method({}, steps([1.0])) == "sft"
    assert method({}, steps([1.0], **{"rewards/margins": 0.1})) == "dpo"
    assert method({"command": "train.sh"}, steps([1.0])) == "command"


# The section


def test_a_study_that_trained_nothing_has_no_such_section_and_no_link_to_it(study: Study) -> None:
    assert section(study.scores, {}) is None
    page = render(**study.report_arguments() | {"trainings": {}})
    assert "How the trainings went" not in page
    assert "#trainings" not in page.partition("</header>")[0].partition("</style>")[2]


def test_every_training_has_a_row_with_what_it_took_and_how_its_loss_went(study: Study) -> None:
    found = told(study)
    assert [row.name for row in found.rows] == ["general", "safety", "mix-15", "mix-50"]
    general = cells(found, "general")
    logged = [line["loss"] for line in study.trainings["general"]["metrics"] if "loss" in line]
    assert general | {"Method": "SFT", "Rows": "960", "Steps": "120", "Tokens": "108,000", "Seconds": "300"} == general
    assert general["Loss"] == from_to((sum(logged[:24]) / 24, sum(logged[-24:]) / 24))
    assert (general["Rows cut"], general["Rows dropped"], general["Reward margin"]) == ("3", "1", "–")
    assert "→" in cells(found, "safety")["Reward margin"]


def test_a_training_without_metrics_is_named_and_keeps_its_row(study: Study) -> None:
    found = told(study)
    assert found.without == ["mix-50"]
    assert cells(found, "mix-50") | {"Method": "a command", "Rows": "960", "Loss": "–"} == cells(found, "mix-50")
    assert "No metrics of: mix-50." in shown(study, study.trainings)


def test_trainings_by_commands_alone_make_a_table_without_empty_columns(study: Study) -> None:
    found = told(study, {"general": study.trainings["mix-50"]})
    assert (found.cards, found.held_rows, found.heads) == ([], [], ["Method", "Rows"])
    assert "<svg" not in re.sub(r'<svg class="key".*?</svg>', "", shown(study, {"general": study.trainings["mix-50"]}))


def test_a_command_that_logs_steps_and_losses_is_drawn_like_any_other(study: Study) -> None:
    measured = study.trainings["mix-50"]["measurements"]
    found = told(study, {"general": {"measurements": measured, "metrics": steps([3.0, 2.0, 1.0])}})
    (training, (chart,)) = found.cards[0]
    assert training.about == "a command from base, 3 steps"
    assert chart.numbers == [("trained", "In training", "3.000 → 1.000")]


def test_held_out_losses_stand_before_and_after_by_language_with_the_worst_and_what_rose(study: Study) -> None:
    found = told(study)
    assert found.held_heads[:3] == ["Mean", "Arabic", "English"]
    row = next(row for row in found.held_rows if row.name == "general")
    held = [line["held_out"] for line in study.trainings["general"]["metrics"] if "held_out" in line]
    for code, cell in zip(sorted(held[0]), row.cells[1:], strict=True):
        assert cell.value == from_to((held[0][code]["loss"], held[-1][code]["loss"]))
        assert cell.note == ("worst, rose" if code == "ar" else "")


def test_numbers_beside_a_chart_name_the_worst_language_and_where_it_rose(study: Study) -> None:
    (training, (chart,)) = told(study).cards[0]
    assert training.name == "general"
    heads = [what for _, what, _ in chart.numbers]
    assert heads == ["In training", "Held out, mean of 6", "Worst: Arabic", "Rose in"]
    assert chart.numbers[-1][2] == "Arabic"


def test_a_dpo_has_a_chart_of_its_margin_and_stands_after_the_sfts(study: Study) -> None:
    cards = told(study).cards
    assert [training.name for training, _ in cards] == ["general", "mix-15", "safety"]
    assert [[chart.head for chart in charts] for _, charts in cards] == [["Loss"], ["Loss"], ["Loss", "Reward margin"]]


def axis(picture: str) -> list[str]:
    """The numbers of the y axis: those that end where they are placed."""
    return re.findall(r'<text text-anchor="end"[^>]*>([^<]*)</text>', picture)


def test_charts_of_one_method_share_their_y_axis(study: Study, log_of: Callable[..., dict[str, Any]]) -> None:
    low = copy.deepcopy(log_of("mix-15", languages=[]))
    for line in low["metrics"]:
        line["loss"] -= 1.0
    found = told(study, {"general": log_of("general", languages=[]), "mix-15": low})
    (_, (first,)), (_, (second,)) = found.cards
    assert axis(first.picture) == axis(second.picture) != []
    assert found.unshared == []


def test_one_loss_far_above_the_others_does_not_flatten_them(
    study: Study, log_of: Callable[..., dict[str, Any]]
) -> None:
    high = copy.deepcopy(log_of("mix-50", languages=[]))
    for line in high["metrics"]:
        line["loss"] += 80.0
    logs = {name: log_of(name, languages=[]) for name in ("general", "mix-15")} | {"mix-50": high}
    found = told(study, logs)
    assert found.unshared == ["SFT, loss"]
    assert "except where it would flatten most of them (SFT, loss)" in shown(study, logs)
    axes = [axis(charts[0].picture) for _, charts in found.cards]
    assert axes[0] != axes[2]


@pytest.fixture(scope="module")
def many(simulated: Callable[..., Study], log_of: Callable[..., dict[str, Any]]) -> Study:
    """Forty trained candidates, one of them a DPO."""
    rates = (0.6, 0.4, 0.1, 0.05)
    made = {f"mix-{number:02}": ("baseline", ["base"], *rates) for number in range(40)}
    study = simulated({"base": ("base", [], *rates)} | made, limit={"dev": 1, "test": 1}, draws=100)
    study.trainings = {name: log_of(name, method="dpo" if name == "mix-39" else "sft") for name in made}
    return study


def test_forty_trainings_show_a_dozen_charts_and_say_where_the_others_are(many: Study) -> None:
    found = told(many)
    assert len(found.cards) == MOST_CHARTS
    assert len(found.left_out) == 40 - MOST_CHARTS
    assert len(found.rows) == len(found.held_rows) == 40
    text = shown(many, many.trainings)
    assert "28 more trainings" in text
    assert "models/NAME/metrics.jsonl" in text
    assert len(text) < 300_000


def test_what_the_answer_speaks_of_keeps_its_chart_among_many(many: Study) -> None:
    scores = copy.deepcopy(many.scores)
    scores["best_set"], scores["pareto"]["front"] = ["mix-39"], ["mix-39"]
    scores["answer"]["verdict"] = "none"
    found = section(scores, many.trainings)
    assert found is not None
    assert [training.name for training, _ in found.cards][-1] == "mix-39"
    assert [training.name for training, _ in found.cards][:-1] == [f"mix-{number:02}" for number in range(11)]


def test_texts_of_a_foreign_trainer_are_escaped_on_the_page(study: Study) -> None:
    metrics = [{"step": 0, "held_out": {"<b>x</b>": {"loss": 1.0}, "en": {"loss": 0.5}}}, *steps([2.0, 1.0])]
    text = shown(study, {"general": {"measurements": {"command": "<i>"}, "metrics": metrics}})
    assert "<b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text


def test_every_chart_has_a_name_and_the_numbers_that_describe_it(study: Study) -> None:
    text = shown(study, study.trainings)
    pictures = re.findall(r'role="img" aria-label="([^"]*)" aria-describedby="([^"]*)"', text)
    assert [name for name, _ in pictures] == [
        "Loss of general over its steps",
        "Loss of mix-15 over its steps",
        "Loss of safety over its steps",
        "Reward margin of safety over its steps",
    ]
    assert len({place for _, place in pictures}) == 4
    assert all(f'<dl id="{place}">' in text for _, place in pictures)


def test_languages_without_a_held_out_row_and_without_a_trained_one_are_named(study: Study) -> None:
    told = study.trainings["general"]
    apart = {"held_out": {"rows": 5, "without": ["fr"], "untrained": ["ar", "hi"]}}
    given = {"general": told | {"measurements": told["measurements"] | apart}}
    numbers = shown(study, given).replace("\n", "")
    assert re.search(r"No row held out.{,60}French", numbers)
    assert re.search(r"Never trained on.{,60}Arabic and Hindi", numbers)
    assert "No row held out" not in shown(study, {"general": told})
