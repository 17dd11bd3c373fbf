"""Columns of a table on a terminal: which stand beside each other, how wide they are, and that no word is broken."""

from __future__ import annotations

import random
import re

import pytest

from mixmerge.cli import printing
from mixmerge.cli.widths import GAP, abreast, widths

HEADS = ["Candidate", "Kind", "Harmlessness", "Tokens"]
ROWS = [
    ["general", "expert", "25.0\n[0.1, 99.1]\nworst en: 50.0", "336"],
    ["mix", "baseline", "–\nby definition", "1,385"],
]


def printed(capsys, heads, rows, width, monkeypatch):
    """What a console of that width prints: standard output is none, so the width there is replaced."""
    from rich import console

    real = console.Console
    monkeypatch.setattr(console, "Console", lambda **how: real(**{**how, "width": width}))
    printing.print_table(heads, rows)
    return capsys.readouterr().out


def test_columns_that_fit_stand_in_one_table_as_wide_as_their_lines():
    assert abreast(HEADS, ROWS, 160) == [[0, 1, 2, 3]]
    assert widths(HEADS, ROWS, 160) == [9, 8, 14, 6]


def test_columns_shrink_to_their_longest_word_or_interval_before_one_moves_below():
    assert abreast(HEADS, ROWS, 41) == [[0, 1, 2, 3]]
    assert widths(HEADS, ROWS, 41) == [9, 8, 12, 6]
    assert abreast(HEADS, ROWS, 40) == [[0, 1, 2], [0, 3]]


def test_a_table_too_narrow_for_two_columns_still_has_two():
    assert abreast(HEADS, ROWS, 5) == [[0, 1], [0, 2], [0, 3]]
    assert widths(HEADS[:2], [row[:2] for row in ROWS], 5) is None, "words have to be broken"


def test_wide_letters_take_two_places_each():
    assert widths(["name"], [["日本語"]], 6) == [6]
    assert widths(["name"], [["日本語"]], 5) is None


def test_a_table_of_one_column_or_of_no_row_has_a_width_too():
    assert abreast(["name"], [], 3) == [[0]]
    assert widths(["name", ""], [], 80) == [4, 0]


def test_an_interval_stays_on_one_line_where_a_sentence_is_folded(capsys, monkeypatch):
    out = printed(capsys, HEADS, ROWS, 41, monkeypatch)
    assert "[0.1, 99.1]" in out
    assert [line.split() for line in out.splitlines() if "worst" in line or line.strip() == "50.0"] == [
        ["worst", "en:"],
        ["50.0"],
    ]


def test_columns_below_have_the_first_column_again(capsys, monkeypatch):
    first, second = printed(capsys, HEADS, ROWS, 40, monkeypatch).split("\n\n")
    assert first.split()[:3] == HEADS[:3]
    assert second.split() == ["Candidate", "Tokens", "general", "336", "mix", "1,385"]


def test_a_word_longer_than_the_terminal_is_broken_and_whole_when_put_together(capsys, monkeypatch):
    place = "/very/long/" + "folder/" * 20
    out = printed(capsys, ["Step", "Folder"], [["merge/ties", place]], 40, monkeypatch)
    assert max(map(len, out.splitlines())) <= 40
    assert place in re.sub(r"\s|Step|Folder|merge/ties", "", out)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_table_no_word_is_broken_or_lost_and_no_line_too_long(seed, capsys, monkeypatch):
    draw = random.Random(seed)

    def cell():
        return " ".join("x" * draw.randint(1, 12) for _ in range(draw.randint(1, 5)))

    heads = [cell() for _ in range(draw.randint(2, 9))]
    rows = [[cell() for _ in heads] for _ in range(4)]
    width = draw.randint(24 + GAP, 120)
    out = printed(capsys, heads, rows, width, monkeypatch)
    assert max(map(len, out.splitlines())) <= width
    below = len(abreast(heads, rows, width)) - 1
    firsts = [word for row in [heads, *rows] for word in row[0].split()]
    words = [word for row in [heads, *rows] for cell in row for word in cell.split()]
    assert sorted(out.split()) == sorted(words + below * firsts)
