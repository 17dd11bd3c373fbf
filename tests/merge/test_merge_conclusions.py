"""The sentences of a diagnosis: each is true of the models it speaks of, and what was not measured is not spoken of."""

import math
import re

import pytest
import torch
from model_folders import config_for, write_model

from mixmerge.merge.conclusions import short_names
from mixmerge.merge.diagnose import diagnose

EYE = torch.eye(8)
NAMES = [f"layers.{i}.mlp.up_proj.weight" for i in range(4)]


@pytest.fixture
def said(tmp_path):
    """The sentences on a base (None: there is none) and models, each a value for all tensors or one value for each."""

    def said(base, *models, method="task_arithmetic", **parameters):
        def write(name, value):
            values = value if isinstance(value, list) else [value] * len(NAMES)
            return write_model(tmp_path / name, dict(zip(NAMES, values, strict=True)))

        folders = [write(name, value) for name, value in zip(("one", "two", "three", "four"), models, strict=False)]
        root = None if base is None else write("base", base)
        return diagnose(config_for(method, folders, base=root, parameters=parameters or {"weight": 1.0}))["conclusions"]

    return said


def turned(degrees):
    """The identity turned out of itself by an angle."""
    angle = math.radians(degrees)
    return math.cos(angle) * EYE + math.sin(angle) * EYE.flip(0)


def test_slerp_is_called_linear_where_all_tensors_are_parallel(said):
    found = said(EYE, turned(1.5), method="slerp", t=0.5)
    assert found[0] == "SLERP is linear here: all 4 tensors are parallel (|cosine| > 0.9995)."


@pytest.mark.parametrize(("degrees", "linear"), [(1.8, True), (1.82, False)])
def test_the_border_is_that_of_slerp(degrees, linear, said):
    assert ("is linear here" in said(EYE, turned(degrees), method="slerp", t=0.5)[0]) == linear


def test_it_says_how_far_slerp_is_from_the_average_where_it_is_not_linear(said):
    found = said(EYE, [turned(1), turned(1), turned(1), turned(90)], method="slerp", t=0.5)
    assert found[0] == (
        "SLERP is linear in 3 of 4 tensors (75.0 % of the parameters), which are parallel (|cosine| > 0.9995); "
        f"the others are, at t = 0.5, the plain average times at most 1.414 ({NAMES[3]})."
    )


def test_that_factor_is_the_one_that_a_merge_shows(tmp_path):
    """At t = 0.5 SLERP is the average over cos(angle / 2), whatever the lengths of the two are."""
    from model_folders import read_model

    from mixmerge.merge import merge

    folders = [write_model(tmp_path / "a", {"w": EYE}), write_model(tmp_path / "b", {"w": 3 * turned(60)})]
    config = config_for("slerp", folders[1:], base=folders[0], parameters={"t": 0.5}, out_dtype="float32")
    merge(config, tmp_path / "out")
    factor = float(re.search(r"at most ([\d.]+)", diagnose(config)["conclusions"][0])[1])
    assert torch.allclose(read_model(tmp_path / "out")["w"], factor * (EYE + 3 * turned(60)) / 2, rtol=1e-3)


def test_a_tensor_that_is_zero_in_one_model_alone_is_at_a_right_angle_to_slerp(said):
    found = said([EYE, EYE, EYE, 0 * EYE], EYE, method="slerp", t=0.5)
    assert "3 of 4 tensors" in found[0]
    assert "at most 1.414" in found[0]


def test_a_tensor_that_is_zero_everywhere_is_not_counted(said):
    zero = 0 * EYE
    assert "all 3 tensors are parallel" in said([EYE, EYE, EYE, zero], [EYE, EYE, EYE, zero], method="slerp", t=0.5)[0]


def test_of_more_than_two_models_it_speaks_of_any_two(said):
    assert said(EYE, turned(0.5), turned(1))[0].startswith("SLERP of any two of these models is linear here: all 4")
    assert "0 of 4 tensors (0.0 %" in said(EYE, turned(0.5), turned(9))[0]


@pytest.mark.parametrize(
    ("count", "words"), [(1, "The task vector is 2.0 % (one)"), (3, "and 2.0 % (three) of the base")]
)
def test_lengths_are_told_for_each_model(count, words, said):
    assert words in said(EYE, *[1.02 * EYE] * count)[1]


def test_of_many_models_the_shortest_and_the_longest_are_told(said):
    found = said(EYE, *(EYE * (1 + step / 100) for step in (4, 2, 6, 3)))[1]
    assert "between 2.0 % (two) and 6.0 % (three) of the base in length" in found


def test_a_model_that_is_the_base_is_named(said):
    assert "one is the base itself: no element differs." in said(EYE, EYE, 2 * EYE)
    assert "one and two are the base itself: no element differs." in said(EYE, EYE, EYE)


@pytest.mark.parametrize(
    ("first", "second", "meaning"),
    [
        (EYE, 2 * EYE, "1.000: they point almost the same way"),
        (EYE, EYE.flip(0), "0.000: they are almost at right angles"),
        (EYE, -EYE, "-1.000: they point against each other"),
        (EYE, EYE + EYE.flip(0), "0.707: they share a part of their direction"),
    ],
)
def test_the_direction_of_two_task_vectors_is_put_in_words(first, second, meaning, said):
    base = torch.ones(8, 8) * 10
    assert any(
        f"The cosine of the task vectors is {meaning}" in told for told in said(base, base + first, base + second)
    )


def test_of_more_than_two_task_vectors_the_ends_are_told_with_their_pairs(said):
    base = torch.ones(8, 8) * 10
    (told,) = [t for t in said(base, base + EYE, base + 2 * EYE, base + EYE.flip(0)) if "cosines" in t]
    assert "between 0.000 (" in told
    assert "1.000 (one and two)" in told


def test_conflicts_are_told_beside_what_chance_would_give(said):
    base = torch.ones(8, 8)
    mostly = torch.ones(8, 8)
    mostly[0] = -1.0
    (told,) = [t for t in said(base, base + torch.ones(8, 8), base + mostly) if t.startswith("Signs")]
    assert told == (
        "Signs conflict in 12.5 % of the elements that two or more task vectors change (12.5 % by size); "
        "by chance it would be 50.0 %."
    )


def test_of_a_single_task_vector_neither_signs_nor_directions_are_told(said):
    found = said(EYE, turned(1))
    assert len(found) == 2
    assert not any("ign" in told or "cosines" in told for told in found)


def test_without_a_base_only_the_models_are_spoken_of(said):
    assert said(None, EYE, turned(1), method="linear") == [
        "SLERP is linear here: all 4 tensors are parallel (|cosine| > 0.9995)."
    ]


def test_one_model_alone_is_said_to_be_one(said):
    assert said(None, EYE, method="passthrough", scale=1) == ["There is one model and no base: nothing to compare."]


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["m/base", "m/code"], ["base", "code"]),
        (["m/base/", "../code"], ["base", "code"]),
        (["a/model", "b/model", "c/other"], ["a/model", "b/model", "other"]),
        (["org/name@v1", "org/name@v2"], ["name@v1", "name@v2"]),
        (["m/base", "m/base+lora/french"], ["base", "base+french"]),
        (["."], ["."]),
    ],
)
def test_short_names_tell_models_apart(models, names):
    assert list(short_names(models).values()) == names
