"""YAML with marks: what is read, where it stands, what is refused."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mixmerge.errors import RecipeError
from mixmerge.yaml import Marks, read_value, read_yaml, read_yaml_documents


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "file.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text.removeprefix(str(path))


def test_every_key_and_item_has_the_line_where_it_stands(write):
    path = write("# a comment\na: 1\nb:\n  c: [x,\n      y]\n  d: {e: 2}\n\nf:\n  - g: 3\n")
    data, marks = read_yaml(path)
    assert data == {"a": 1, "b": {"c": ["x", "y"], "d": {"e": 2}}, "f": [{"g": 3}]}
    assert marks.lines == {
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", 0): 4,
        ("b", "c", 1): 5,
        ("b", "d"): 6,
        ("b", "d", "e"): 6,
        ("f",): 8,
        ("f", 0): 9,
        ("f", 0, "g"): 9,
    }


def test_a_place_is_file_line_and_dotted_key():
    marks = Marks("r.yaml", {("merges",): 4, ("merges", "ties"): 5})
    assert marks.where(("merges", "ties")) == "r.yaml:5: merges.ties"
    assert marks.where(("merges", "ties", "models", 0)) == "r.yaml:5: merges.ties.models.0"
    assert marks.where(("data",)) == "r.yaml: data"
    assert marks.where(()) == "r.yaml"


def test_a_key_from_elsewhere_shows_that_place_for_its_line():
    assert Marks("r.yaml", {("seed",): "--set"}).where(("seed",)) == "--set: seed"


def test_norwegian_is_text_and_an_exponent_is_a_number(write):
    data, _ = read_yaml(write("langs: [no, yes, on]\nlr: 1e-5\nbig: 1_000\nhex: 0x10\nflag: true\nnothing:\n"))
    assert data == {"langs": ["no", "yes", "on"], "lr": 1e-5, "big": 1000, "hex": 16, "flag": True, "nothing": None}
    assert [type(data[key]) for key in ("lr", "big", "hex", "flag")] == [float, int, int, bool]


def test_a_date_stays_text(write):
    data, _ = read_yaml(write("day: 2026-01-02\n"))
    assert data == {"day": "2026-01-02"}
    assert not isinstance(data["day"], datetime.date)


def test_anchors_and_merge_keys_are_followed(write):
    data, marks = read_yaml(write("x: &x {a: 1}\ny:\n  <<: *x\n  b: 2\nz: *x\n"))
    assert data == {"x": {"a": 1}, "y": {"a": 1, "b": 2}, "z": {"a": 1}}
    assert marks.where(("y", "a")).endswith(":2: y.a"), "a merged key is shown at its mapping"


def test_keys_are_text(write):
    assert read_yaml(write("2: a\ntrue: b\n"))[0] == {"2": "a", "True": "b"}


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key"),
        ("a:\n  b: 1\n  b: 2\n", 3, "duplicate key"),
        ("a: [1,\n", 2, "expected"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a: *gone\n", 1, "undefined alias"),
        ("a:\n  b: 1\n   c: 2\n", 3, "mapping values"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(write, text, line, word):
    found = refusal(write(text))
    assert found.startswith(f":{line}: ")
    assert word in found.replace("'\\t'", "tab")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- a\n", "must be a mapping"),
        ("just text\n", "must be a mapping"),
        ("---\n", "must be a mapping"),
        ("", "0 YAML documents"),
        ("a: 1\n---\nb: 2\n", "2 YAML documents"),
        (b"a: \xff\xfe\n", "not UTF-8"),
    ],
)
def test_what_is_no_single_mapping_is_refused(write, text, word):
    assert word in refusal(write(text))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "gone.yaml")
    assert "directory" in refusal(tmp_path)


def test_several_documents_have_marks_of_their_own(write):
    first, second = read_yaml_documents(write("a: 1\n---\n\nb: 2\n"))
    assert (first[0], second[0]) == ({"a": 1}, {"b": 2})
    assert (first[1].lines, second[1].lines) == ({("a",): 1}, {("b",): 4})


def test_a_value_is_read_as_in_a_file():
    assert read_value("0.7") == 0.7
    assert read_value("no") == "no"
    assert read_value("[a, {1: b}]") == ["a", {"1": "b"}]
    assert read_value("") is None


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcdefghij", min_size=1, max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(data=st.dictionaries(st.text("klmnopqrst", min_size=1, max_size=6), PLAIN, min_size=1, max_size=4))
def test_plain_data_comes_back_as_it_was_written(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False  # in [..] and {..} ruamel writes '?0' so that it cannot read it itself
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(data, file)
    read, marks = read_yaml(path)
    assert read == data
    assert set(marks.lines) >= {(key,) for key in data}
