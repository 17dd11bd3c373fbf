"""The error tree: one line, the right exit status, and the standard error that each one also is."""

from __future__ import annotations

import doctest

import pytest

import mixmerge.errors
from mixmerge.errors import (
    CheckpointError,
    DataError,
    MixmergeError,
    ModelError,
    RecipeError,
    StepError,
    UserError,
    did_you_mean,
)


def test_an_error_says_where_what_and_what_to_do():
    assert str(RecipeError("unknown key 'x'", where="r.yaml:3: a.x", do="remove it")) == (
        "r.yaml:3: a.x: unknown key 'x'; remove it"
    )
    assert str(UserError("no such step")) == "no such step"


def test_an_error_is_one_line_whatever_it_was_given():
    assert str(DataError("broken\n  text", where="a\nb", do="mend\tit")) == "a b: broken text; mend it"


@pytest.mark.parametrize("kind", [UserError, RecipeError, DataError, ModelError])
def test_mistakes_of_the_user_are_value_errors_and_exit_2(kind):
    assert kind("x").exit_code == 2
    assert issubclass(kind, ValueError)


@pytest.mark.parametrize(("kind", "standard"), [(CheckpointError, OSError), (StepError, RuntimeError)])
def test_what_goes_wrong_outside_exits_1(kind, standard):
    assert kind("x").exit_code == 1
    assert issubclass(kind, standard)
    assert issubclass(kind, MixmergeError)


def test_the_parts_of_an_error_can_be_read():
    error = CheckpointError("no space left on the disk", where="/a", do="free some")
    assert (error.what, error.where, error.do) == ("no space left on the disk", "/a", "free some")


def test_advice_names_the_nearest_known_name_or_all_of_them():
    assert did_you_mean("densty", ["density", "weight"]) == "did you mean 'density'?"
    assert did_you_mean("zzz", ["weight", "density"]) == "known: density, weight"


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(mixmerge.errors).failed == 0


def test_what_an_error_quotes_cannot_steer_the_terminal():
    text = str(UserError("the role is '\x1b[2J\u202e\ud800'", where="a\x07.jsonl:1", do="write हिन्दी or déjà\u00a0vu"))
    assert text == "a\\x07.jsonl:1: the role is '\\x1b[2J\\u202e\\ud800'; write हिन्दी or déjà vu"
