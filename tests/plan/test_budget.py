"""How many tokens a row can have, told before the base is there: bounds that the real count never leaves."""

from __future__ import annotations

import pytest

from mixmerge.data.formats import Row
from mixmerge.data.loading import load_rows
from mixmerge.data.mixture import check_tokens, draw_mixture
from mixmerge.data.sources import DataSource
from mixmerge.errors import DataError
from mixmerge.plan.budget import FEWEST, both_sides, token_bounds


@pytest.fixture
def rows(study):
    return load_rows(DataSource(path="data/general.{lang}.jsonl"), ["en", "fr"], study.folder).rows


def test_a_local_base_counts_nearly_as_the_mixture_step_does(tiny_base, rows):
    from mixmerge.train.tokens import token_counter

    bounds, count = token_bounds(tiny_base, None, trimmed=False), token_counter(tiny_base)
    for row in rows:
        least, most = bounds(row)
        assert least <= count(row) <= most
        assert most - least < 30


@pytest.mark.parametrize(("local", "template", "trimmed"), [(True, None, True), (False, "{{ messages }}", False)])
def test_elsewhere_a_token_is_at_least_a_byte_of_the_rendered_text(tiny_base, rows, local, template, trimmed):
    bounds = token_bounds(tiny_base if local else None, template, trimmed=trimmed)
    for row in rows:
        least, most = bounds(row)
        assert least == FEWEST
        assert most >= len(row.prompt[0]["content"].encode()) + len(row.completion.encode())


def test_a_template_that_is_not_known_or_refuses_a_row_gets_an_allowance(rows):
    refusing = "{{ raise_exception('no') }}"
    for template in (None, refusing):
        bounds = token_bounds(None, template, trimmed=False)
        assert bounds(rows[0])[1] > 2000


def test_both_sides_of_a_pair_are_bounded_and_a_plain_row_by_its_one_side():
    def lengths(row):
        return len(row.completion), 2 * len(row.completion)

    ask = [{"role": "user", "content": "?"}]
    bounds = both_sides(lengths)
    assert bounds(Row("1", "en", ask, "four", rejected="seventy")) == (11, 22)
    assert bounds(Row("2", "en", ask, "four")) == (4, 8)


@pytest.mark.parametrize("budget", [1, 2, 40, 400, 4000, 40000])
@pytest.mark.parametrize("size", [3, 17])
def test_only_what_drawing_would_refuse_is_refused(rows, budget, size):
    cells = {("general", code): [row for row in rows if row.lang == code] for code in ("en", "fr")}
    shares = {("general", "en"): 0.25, ("general", "fr"): 0.75}

    def refused(function, **rest) -> bool:
        try:
            function(cells, shares, budget=budget, max_repeats=2, **rest)
        except DataError:
            return True
        return False

    draws = refused(draw_mixture, unit="tokens", seed=0, count_tokens=lambda _: size)
    exact = refused(check_tokens, bounds=lambda _: (size, size))
    wide = refused(check_tokens, bounds=lambda _: (FEWEST, 4 * size))
    assert exact == draws
    assert draws or not wide
