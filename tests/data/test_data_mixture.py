import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.data.formats import Row
from mixmerge.data.mixture import check_rows, check_tokens, draw_mixture, write_mixture
from mixmerge.errors import DataError


def rows(count, lang="en", tag="r", length=lambda i: 1 + i % 7):
    return [
        Row(f"{lang}/{tag}{i}", lang, [{"role": "user", "content": f"q{i}"}], "w " * length(i)) for i in range(count)
    ]


def tokens(row):
    return len(row.completion.split())


def draw(cells, shares, budget=20, unit="rows", max_repeats=1, seed=0):
    return draw_mixture(
        cells, shares, budget=budget, unit=unit, max_repeats=max_repeats, seed=seed, count_tokens=tokens
    )


CELLS = {("general", "en"): rows(40), ("general", "bn"): rows(40, "bn"), ("safety", "en"): rows(40, tag="s")}


@st.composite
def recipes(draw_value):
    """Cells that can always give what is asked: up to 5 of them, each with data and repeats enough for the budget."""
    keys = draw_value(
        st.lists(
            st.tuples(st.sampled_from(["general", "safety", "code"]), st.sampled_from(["en", "bn", "sw"])),
            min_size=1,
            max_size=5,
            unique=True,
        )
    )
    cells = {key: rows(draw_value(st.integers(5, 30)), key[1], key[0]) for key in keys}
    shares = {key: draw_value(st.floats(0.7, 5)) for key in keys}  # at least a row for every cell
    unit = draw_value(st.sampled_from(["rows", "tokens"]))
    budget = draw_value(st.integers(150, 300) if unit == "tokens" else st.integers(40, 90))
    return cells, shares, budget, unit, draw_value(st.integers(0, 2**31))


@given(recipes())
def test_shares_are_met_to_within_one_row(recipe):
    cells, shares, budget, unit, seed = recipe
    mixture = draw(cells, shares, budget, unit, max_repeats=100, seed=seed)
    total = sum(shares.values())
    if unit == "rows":
        assert len(mixture.rows) == budget
    for cell in mixture.cells:
        asked = shares[cell.objective, cell.lang] / total * budget
        # The last row taken, or the first one left out, is at most 7 tokens long here.
        got, slack = (cell.rows, 1) if unit == "rows" else (cell.tokens, 7 / 2)
        assert abs(got - asked) <= slack + 1e-9


@given(recipes(), st.randoms(use_true_random=False))
def test_neither_the_order_of_files_nor_that_of_cells_changes_a_byte(recipe, chance):
    cells, shares, budget, unit, seed = recipe
    shuffled = {key: chance.sample(list(cells[key]), len(cells[key])) for key in chance.sample(list(cells), len(cells))}
    other_shares = {key: shares[key] for key in chance.sample(list(shares), len(shares))}
    assert draw(cells, shares, budget, unit, 100, seed) == draw(shuffled, other_shares, budget, unit, 100, seed)


@given(recipes())
def test_a_row_is_repeated_only_once_all_others_were_used_as_often(recipe):
    cells, shares, budget, unit, seed = recipe
    mixture = draw(cells, shares, budget, unit, max_repeats=100, seed=seed)
    for cell in mixture.cells:
        uses = Counter(cell.ids)
        counts = [uses[row.id] for row in cells[cell.objective, cell.lang]]
        assert max(counts) - min(counts) <= 1
        assert cell.repeats == sum(count - 1 for count in counts if count)


@given(st.integers(1, 60), st.integers(0, 2**31))
def test_no_row_is_used_twice_unless_allowed(budget, seed):
    cells = {("general", "en"): rows(40)}
    if budget > 40:
        with pytest.raises(DataError):
            draw(cells, {("general", "en"): 1}, budget, seed=seed)
    else:
        ids = [item.row.id for item in draw(cells, {("general", "en"): 1}, budget, seed=seed).rows]
        assert len(ids) == len(set(ids)) == budget


@given(st.integers(3, 39), st.integers(0, 2**31))
def test_a_larger_budget_draws_the_smaller_ones_rows_and_more(budget, seed):
    cells = {("general", "en"): rows(40)}
    small, large = (draw(cells, {("general", "en"): 1}, b, seed=seed).cells[0].ids for b in (budget, budget + 1))
    assert large[: len(small)] == small


def test_another_seed_draws_other_rows():
    shares = dict.fromkeys(CELLS, 1.0)
    assert draw(CELLS, shares, seed=1).rows != draw(CELLS, shares, seed=2).rows


def test_a_second_pass_has_another_order():
    ids = draw({("g", "en"): rows(30)}, {("g", "en"): 1}, 60, max_repeats=2).cells[0].ids
    assert sorted(ids[:30]) == sorted(ids[30:])
    assert ids[:30] != ids[30:]


def test_every_stretch_of_the_mixture_holds_the_shares_of_the_whole():
    shares = {("general", "en"): 2.0, ("general", "bn"): 1.0, ("safety", "en"): 1.0}
    mixture = draw(CELLS, shares, 64)
    for begin in range(0, 64, 8):
        seen = Counter((item.objective, item.row.lang) for item in mixture.rows[begin : begin + 8])
        assert abs(seen["general", "en"] - 4) <= 2
        assert all(seen[cell] >= 1 for cell in CELLS)


def test_shares_are_relative_and_zero_draws_nothing():
    shares = {("general", "en"): 3.0, ("general", "bn"): 1.0, ("safety", "en"): 0.0}
    mixture = draw(CELLS, shares)
    assert [(cell.objective, cell.lang, cell.rows) for cell in mixture.cells] == [
        ("general", "bn", 5),
        ("general", "en", 15),
    ]
    assert mixture.rows == draw(CELLS, {key: share * 10 for key, share in shares.items()}).rows


@pytest.mark.parametrize(
    ("cells", "shares", "named", "expected"),
    [
        ({("general", "en"): []}, {("general", "en"): 1}, {}, "no rows for general/en"),
        ({}, {("general", "en"): 1}, {}, "no rows for general/en"),
        (CELLS, {("general", "en"): 0}, {}, "no share is above 0"),
        (CELLS, {("general", "en"): -1}, {}, "the share of general/en is -1"),
        (CELLS, {("general", "en"): float("nan")}, {}, "the share of general/en is nan"),
        (CELLS, {("general", "en"): 1}, {"budget": 0}, "at least 1"),
        (CELLS, {("general", "en"): 1}, {"max_repeats": 0}, "at least 1"),
        (
            CELLS,
            {("general", "en"): 1},
            {"budget": 90, "max_repeats": 2},
            "40 rows, which give 80 rows with max_repeats 2",
        ),
        (CELLS, {("general", "en"): 1}, {"budget": 90, "max_repeats": 2}, "raise max_repeats to 3"),
        (CELLS, {("general", "en"): 1}, {"budget": 900, "unit": "tokens"}, "but its share of the budget is 900"),
        (CELLS, {("general", "en"): 99, ("safety", "en"): 1}, {}, "less than one row"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_says_what_to_change(cells, shares, named, expected):
    with pytest.raises(DataError) as caught:
        draw(cells, shares, **named)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_advised_number_of_repeats_is_enough():
    for unit, budget in (("rows", 113), ("tokens", 777)):
        with pytest.raises(DataError) as caught:
            draw(CELLS, {("general", "en"): 1}, budget, unit)
        advised = int(str(caught.value).split("raise max_repeats to ")[1].split(",")[0])
        assert draw(CELLS, {("general", "en"): 1}, budget, unit, max_repeats=advised).rows


def test_a_token_budget_of_all_the_data_is_no_overdraft():
    every = sum(tokens(row) for row in CELLS["general", "en"])
    mixture = draw(CELLS, {("general", "en"): 1 / 3}, every, "tokens")
    assert len(mixture.rows) == 40


def test_a_cell_may_be_repeated_more_often_than_the_others(tmp_path):
    shares = {("general", "en"): 3.0, ("safety", "en"): 1.0}
    settings = {"budget": 160, "unit": "rows", "max_repeats": 3, "seed": 0, "count_tokens": tokens}
    cells = CELLS | {("safety", "en"): CELLS["safety", "en"][:5]}
    with pytest.raises(DataError, match="safety/en has 5 rows, which give 15 rows with max_repeats 3"):
        draw_mixture(cells, shares, **settings)
    mixture = draw_mixture(cells, shares, **settings, repeats={("safety", "en"): 8})
    assert max(Counter(mixture.cells[1].ids).values()) == 8
    assert max(Counter(mixture.cells[0].ids).values()) == 3
    assert write_mixture(mixture, tmp_path)["repeats"] == {"safety/en": 8}
    with pytest.raises(DataError, match="general/en has 40 rows, which give 80 rows with max_repeats 2"):
        draw_mixture(cells, shares, **settings, repeats={("general", "en"): 2, ("safety", "en"): 8})


@given(
    st.dictionaries(
        st.sampled_from([("a", "en"), ("a", "bn"), ("b", "sw")]),
        st.tuples(st.integers(0, 6), st.integers(0, 5)),
        min_size=1,
    ),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_checking_a_budget_in_rows_says_what_drawing_it_would(sizes, budget, max_repeats, more):
    cells = {cell: rows(count, cell[1]) for cell, (count, _) in sizes.items()}
    shares = {cell: share for cell, (_, share) in sizes.items()}
    settings = {"budget": budget, "max_repeats": max_repeats, "repeats": {("a", "en"): more}}
    errors = []
    for work in (check_rows, functools.partial(draw_mixture, unit="rows", seed=1, count_tokens=tokens)):
        try:
            work(cells, shares, **settings)
            errors.append(None)
        except DataError as error:
            errors.append(str(error))
    assert errors[0] == errors[1]


def test_the_bounds_of_tokens_know_the_repeats_of_each_cell():
    cells, shares = (
        {("general", "en"): rows(4), ("safety", "en"): rows(4)},
        {("general", "en"): 1.0, ("safety", "en"): 1},
    )
    settings = {"budget": 100, "max_repeats": 50, "bounds": lambda row: (tokens(row), tokens(row))}
    check_tokens(cells, shares, **settings)
    with pytest.raises(DataError, match="safety/en has 4 rows, which give at most 20 tokens with max_repeats 2"):
        check_tokens(cells, shares, **settings, repeats={("safety", "en"): 2})


def test_what_was_dropped_and_capped_beforehand_stands_in_the_manifest(tmp_path):
    mixture = draw(CELLS, {("general", "en"): 1.0}, 9)
    told = {"dropped": {"near": {"en": 2}}, "capped": {"general/en": {"asked": 0.9, "share": 0.5}}}
    manifest = write_mixture(mixture, tmp_path, **told)
    assert {key: manifest[key] for key in told} == told
    assert manifest["sha256"] == write_mixture(mixture, tmp_path)["sha256"]
    assert not told.keys() & write_mixture(mixture, tmp_path).keys()


def test_the_manifest_says_which_data_set_gave_how_much_and_each_row_of_a_shared_cell(tmp_path):
    own, shared = rows(20), rows(20)  # equal rows, ids included
    cells = {("general", "en"): own + shared, ("safety", "en"): rows(9, tag="s")}
    names = {id(row): "own" for row in own} | {id(row): "shared" for row in shared}
    mixture = draw(cells, dict.fromkeys(cells, 1.0), 18)
    data = {name: {"fingerprint": name * 2} for name in ("shared", "own", "refusals", "unused")}
    manifest = write_mixture(mixture, tmp_path, data=data, origin=lambda row: names.get(id(row), "refusals"))
    general, safety = manifest["cells"]
    assert "from" not in safety
    assert len(general["from"]) == len(general["ids"]) == 9
    assert list(manifest["data"]) == ["own", "refusals", "shared", "unused"]
    assert manifest["data"]["refusals"] == {"fingerprint": "refusalsrefusals", "rows": 9, "tokens": safety["tokens"]}
    assert manifest["data"]["unused"]["rows"] == manifest["data"]["unused"]["tokens"] == 0
    assert {name: manifest["data"][name]["rows"] for name in ("own", "shared")} == Counter(general["from"])
    assert sum(found["tokens"] for found in manifest["data"].values()) == manifest["tokens"]


@given(recipes(), st.randoms(use_true_random=False))
def test_whatever_the_order_of_rows_and_data_sets_both_files_have_the_same_bytes(recipe, chance):
    cells, shares, budget, unit, seed = recipe
    data = {name: {"fingerprint": name} for name in "ab"}
    written = []
    for _ in range(2):
        turned = {
            key: chance.sample(list(cells[key]), len(cells[key])) for key in chance.sample(list(cells), len(cells))
        }
        mixture = draw(turned, shares, budget, unit, 100, seed)
        named = {name: data[name] for name in chance.sample(list(data), 2)}
        with tempfile.TemporaryDirectory() as folder:
            write_mixture(mixture, Path(folder), data=named, origin=lambda row: "ab"[len(row.completion) % 2])
            written.append([(Path(folder) / name).read_bytes() for name in ("rows.jsonl", "manifest.json")])
    assert written[0] == written[1]


def test_the_written_rows_are_messages_and_the_manifest_accounts_for_them(tmp_path):
    shares = {("general", "en"): 2.0, ("safety", "en"): 1.0}
    mixture = draw(CELLS, shares, 9)
    manifest = write_mixture(mixture, tmp_path / "mix")
    data = (tmp_path / "mix" / "rows.jsonl").read_bytes()
    lines = [json.loads(line) for line in data.splitlines()]
    assert len(lines) == 9
    for line, item in zip(lines, mixture.rows, strict=True):
        assert line == {
            "id": item.row.id,
            "objective": item.objective,
            "lang": "en",
            "prompt": item.row.prompt,
            "completion": [{"role": "assistant", "content": item.row.completion}],
        }
    assert json.loads((tmp_path / "mix" / "manifest.json").read_text()) == manifest
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["tokens"] == sum(tokens(item.row) for item in mixture.rows)
    general, safety = manifest["cells"]
    assert (general["objective"], general["rows"], general["share_got"]) == ("general", 6, pytest.approx(2 / 3))
    assert sorted(safety["ids"]) == sorted(item.row.id for item in mixture.rows if item.objective == "safety")


def test_another_process_with_other_hash_seeds_writes_the_same_bytes(tmp_path):
    code = """
import sys
from pathlib import Path
from mixmerge.data.formats import Row
from mixmerge.data.mixture import draw_mixture, write_mixture
cells = {(o, l): [Row(f"{l}/{i}", l, [{"role": "user", "content": f"é{i}"}], "w " * (1 + i % 5)) for i in range(20)]
         for o in {"general", "safety", "code"} for l in {"en", "bn", "sw"}}
mixture = draw_mixture(cells, {key: 1.0 for key in cells}, budget=300, unit="tokens", max_repeats=3, seed=5,
                       count_tokens=lambda row: len(row.completion.split()))
write_mixture(mixture, Path(sys.argv[1]))
"""
    for name in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": name}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, env=environment)
    for file in ("rows.jsonl", "manifest.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_the_bytes_of_a_mixture_do_not_change_between_releases(tmp_path):
    # A changed digest means that every study's mixtures, and with them all their trainings, get new identities.
    manifest = write_mixture(draw(CELLS, dict.fromkeys(CELLS, 1.0), 30, seed=3), tmp_path)
    assert manifest["sha256"] == "54ea36a70183acb90158c6f79d06eaa7d6bb59dc5750cb015b272db5149c3a7d"
    found = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert found == "9be891181f19cedb587fba92c85473f25375f66a1ca65342bd5d80633957d014"


def test_rejected_answers_do_not_enter_a_mixture_that_is_not_of_pairs(tmp_path):
    row = dataclasses.replace(rows(1)[0], rejected="never write this")
    mixture = draw({("safety", "en"): [row]}, {("safety", "en"): 1}, 1)
    write_mixture(mixture, tmp_path)
    assert "never write this" not in (tmp_path / "rows.jsonl").read_text()


def test_rejected_answers_are_written_where_pairs_are_asked_for_and_only_where_there_are_any(tmp_path):
    pair, plain = dataclasses.replace(rows(2)[0], rejected="not this"), rows(2)[1]
    write_mixture(draw({("safety", "en"): [pair, plain]}, {("safety", "en"): 1}, 2), tmp_path, pairs=True)
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {row["id"]: row.get("rejected") for row in written}
    assert found == {pair.id: [{"role": "assistant", "content": "not this"}], plain.id: None}
