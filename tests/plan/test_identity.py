"""What makes two steps the same, as properties over random payloads."""

from __future__ import annotations

import copy
import doctest
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import mixmerge.plan.identity
from mixmerge.plan.graph import KINDS, REVISIONS, Step
from mixmerge.plan.identity import ABSENT, ID_LENGTH, brief, canonical, changes, fingerprint, step_id

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
FIELDS = st.dictionaries(TEXT, VALUE, max_size=4)
INPUTS = st.dictionaries(TEXT, st.text("0123456789abcdef", min_size=12, max_size=12), max_size=3)
STEP = st.builds(Step, st.sampled_from(KINDS), TEXT, FIELDS, INPUTS, FIELDS, TEXT)


def differences(old, new) -> list[str]:
    return [str(change) for change in changes(old, new)]


def shuffled(value, order):
    """The same value with the keys of every mapping in another order."""
    if isinstance(value, dict):
        keys = order.draw(st.permutations(list(value)))
        return {key: shuffled(value[key], order) for key in keys}
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


@given(value=VALUE, data=st.data())
def test_the_order_of_keys_does_not_matter(value, data):
    assert canonical(shuffled(value, data)) == canonical(value)


@given(value=VALUE)
def test_the_canonical_text_says_everything(value):
    assert canonical(json.loads(canonical(value))) == canonical(value)


@given(one=VALUE, two=VALUE)
def test_values_that_differ_have_texts_that_differ(one, two):
    assert (fingerprint(one) == fingerprint(two)) == (not differences(one, two))


@pytest.mark.parametrize(("one", "two"), [(1, 1.0), (1, True), (0, False), (0.0, -0.0), (None, ""), ("1", 1), ([], {})])
def test_values_that_python_may_confuse_are_kept_apart(one, two):
    assert canonical(one) != canonical(two)


@given(step=STEP, how=FIELDS, name=TEXT, group=TEXT)
def test_changing_how_name_or_group_keeps_the_id(step, how, name, group):
    assert Step(step.kind, name, step.what, step.inputs, how, group).id == step.id


@given(step=STEP, what=FIELDS)
def test_changing_what_changes_the_id(step, what):
    assume(canonical(what) != canonical(dict(step.what)))
    assert Step(step.kind, step.name, what, step.inputs).id != step.id


@given(step=STEP, inputs=INPUTS)
def test_changing_an_input_changes_the_id(step, inputs):
    assume(inputs != step.inputs)
    assert Step(step.kind, step.name, step.what, inputs).id != step.id


@given(step=STEP, kind=st.sampled_from(KINDS))
def test_changing_the_kind_changes_the_id(step, kind):
    assume(kind != step.kind)
    assert Step(kind, step.name, step.what, step.inputs).id != step.id


@pytest.mark.parametrize("kind", KINDS)
def test_raising_a_kinds_revision_changes_its_ids_only(kind, monkeypatch):
    before = {other: Step(other, "x", {}).id for other in KINDS}
    monkeypatch.setitem(REVISIONS, kind, REVISIONS[kind] + 1)
    after = {other: Step(other, "x", {}).id for other in KINDS}
    assert {other for other in KINDS if before[other] != after[other]} == {kind}


@given(step=STEP)
def test_a_step_that_went_through_json_is_the_same_step(step):
    again = Step.from_json(json.loads(json.dumps(step.to_json())))
    assert (again, again.id) == (step, step.id)


@given(payload=FIELDS)
def test_an_id_is_twelve_hex_digits(payload):
    assert len(step_id(payload)) == ID_LENGTH == 12
    assert int(step_id(payload), 16) >= 0


@dataclass
class Thing:
    x: int = 1


@pytest.mark.parametrize("odd", [Path("a"), {1, 2}, (1, 2), b"x", Thing(), {1: 2}, object(), 1 + 2j, range(3)])
@pytest.mark.parametrize("place", [lambda v: v, lambda v: [v], lambda v: {"a": {"b": [0, v]}}])
def test_a_type_without_one_text_is_refused_with_its_place(odd, place):
    with pytest.raises(TypeError, match=r"^\$.*has no canonical form"):
        canonical(place(odd))


def test_the_place_of_a_refused_value_is_told():
    with pytest.raises(TypeError, match=r"^\$\.a\.b\[1\]: PosixPath has no canonical form"):
        canonical({"a": {"b": [0, Path("x")]}})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="no place in an identity"):
        canonical({"x": [number]})


# Differences


@given(value=VALUE, data=st.data())
def test_what_is_equal_has_no_differences(value, data):
    assert differences(value, shuffled(copy.deepcopy(value), data)) == []


LEAVES = st.dictionaries(st.text("abcd", min_size=1, max_size=3), st.integers(0, 9), min_size=1, max_size=5)


@given(old=st.dictionaries(st.text("xyz", min_size=1, max_size=2), LEAVES, min_size=1, max_size=4), data=st.data())
def test_the_differences_are_exactly_the_changed_fields(old, data):
    places = [(outer, inner) for outer, group in old.items() for inner in group]
    changed = data.draw(st.lists(st.sampled_from(places), unique=True))
    new = copy.deepcopy(old)
    for outer, inner in changed:
        new[outer][inner] += 1
    assert differences(old, new) == [
        f"{outer}.{inner}: {old[outer][inner]} -> {old[outer][inner] + 1}" for outer, inner in sorted(changed)
    ]


@given(old=FIELDS, new=FIELDS)
def test_there_is_a_difference_exactly_where_the_ids_differ(old, new):
    assert bool(differences(old, new)) == (canonical(old) != canonical(new))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"a": {"density": 0.5}}, {"a": {"density": 0.7}}, ["a.density: 0.5 -> 0.7"]),
        ({"a": 1}, {}, ["a: removed 1"]),
        ({}, {"a": "x"}, ['a: added "x"']),
        ({"a": [1, 2, 3]}, {"a": [1, 5, 3]}, ["a.1: 2 -> 5"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a.1: removed 2"]),
        ({"a": 1}, {"a": 1.0}, ["a: 1 -> 1.0"]),
        ({"a": True}, {"a": 1}, ["a: true -> 1"]),
        ({"a": 0.0}, {"a": -0.0}, ["a: 0.0 -> -0.0"]),
        ({"a": "x" * 90}, {"a": 1}, ['a: "' + "x" * 56 + "... -> 1"]),
        ({"a": {"b": 1}}, {"a": None}, ['a: {"b": 1} -> null']),
    ],
)
def test_a_difference_reads_as_field_old_and_new(old, new, told):
    assert differences(old, new) == told


RUBRIC = "Refuse what is harmful to anyone, and say in one sentence why; else answer the question, " * 3


def test_long_values_that_differ_late_are_told_where_they_differ():
    (change,) = changes({"rubric": RUBRIC + "briefly."}, {"rubric": RUBRIC + "at length."})
    assert str(change) == 'rubric: ...nswer the question, briefly." -> ...nswer the question, at length."'
    assert change.whole == f'rubric: "{RUBRIC}briefly." -> "{RUBRIC}at length."'
    assert change.to_json() == {"field": "rubric", "old": RUBRIC + "briefly.", "new": RUBRIC + "at length."}


@given(st.text("ab", min_size=0, max_size=200), st.text("ab", max_size=90), st.text("ab", max_size=90))
def test_two_values_never_look_alike_and_are_never_long(start, one, other):
    texts = brief(start + one, start + other)
    assert (texts[0] == texts[1]) == (one == other)
    assert all(len(text) <= 63 for text in texts)


def test_a_value_that_only_one_has_is_told_without_the_other():
    added, removed = changes({"a": "x"}, {"b": "y" * 99})
    assert (added.whole, removed.whole) == ('a: removed "x"', f'b: added "{"y" * 99}"')
    assert [change.to_json() for change in (added, removed)] == [
        {"field": "a", "old": "x"},
        {"field": "b", "new": "y" * 99},
    ]
    assert len(str(removed)) < 70


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (["en", "fr", "hi"], ["fr", "hi"], ['l.0: removed "en"']),
        (["en"], ["ar", "en", "fr"], ['l.0: added "ar"', 'l.2: added "fr"']),
        ([{"a": 1}, {"b": 1}, {"c": 1}], [{"a": 2}, {"c": 1}], ["l.0.a: 1 -> 2", 'l.1: removed {"b": 1}']),
        ([], [[1], [2]], ["l.0: added [1]", "l.1: added [2]"]),
        ([1, 2, 3], [3, 2, 1], ["l.0: 1 -> 3", "l.2: 3 -> 1"]),
    ],
)
def test_lists_are_told_element_by_element(old, new, told):
    assert differences({"l": old}, {"l": new}) == told


def test_elements_that_have_names_are_told_by_these():
    old = [{"name": "a", "lr": 1}, {"name": "b", "lr": 2}]
    new = [{"name": "b", "lr": 3}]
    assert differences({"l": old}, {"l": new}) == ['l.a: removed {"name": "a", "lr": 1}', "l.b.lr: 2 -> 3"]
    assert differences({"l": old}, {"l": old[::-1]}) != [], "another order is another list"


def test_very_long_lists_are_compared_place_by_place():
    found = list(changes({"l": list(range(2000))}, {"l": list(range(2001))}))
    assert [tuple(change) for change in found] == [("l.2000", ABSENT, 2000)]


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_the_changes_of_a_list_lead_from_the_old_one_to_the_new_one(old, new):
    found = list(changes({"l": old}, {"l": new}))
    gone = {int(change.field[2:]) for change in found if change.new is ABSENT}
    came = {int(change.field[2:]): change.new for change in found if change.new is not ABSENT}
    left = [value for at, value in enumerate(old) if at not in gone]
    added = {int(change.field[2:]) for change in found if change.old is ABSENT}
    kept = iter(left)
    made = [came[at] if at in added else (next(kept), came.get(at))[1] for at in range(len(new))]
    assert [value if value is not None else new[at] for at, value in enumerate(made)] == new
    assert len(left) + len(added) == len(new)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(mixmerge.plan.identity).failed == 0
