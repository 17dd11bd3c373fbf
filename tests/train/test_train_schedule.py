import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mixmerge.train.schedule import WINDOW, training_order

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=120)


@given(LENGTHS, st.floats(0.05, 4), st.integers(1, 9), st.integers(0, 2**31))
def test_every_epoch_reads_every_row_once_and_a_fraction_its_part(lengths, epochs, batch, seed):
    order = training_order(lengths, epochs=epochs, batch_size=batch, seed=seed)
    assert len(order) == max(1, round(epochs * len(lengths)))
    uses = Counter(order)
    counts = [uses[row] for row in range(len(lengths))]
    assert max(counts) - min(counts) <= 1
    assert order == training_order(lengths, epochs=epochs, batch_size=batch, seed=seed)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**31))
def test_rows_stay_within_their_window_of_the_mixtures_order(lengths, batch, seed):
    order = training_order(lengths, epochs=1, batch_size=batch, seed=seed)
    span = WINDOW * batch
    for begin in range(0, len(order), span):
        assert sorted(order[begin : begin + span]) == list(range(begin, min(begin + span, len(lengths))))


@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**31))
def test_rows_of_a_batch_are_neighbours_in_length_within_their_window(lengths, batch, seed):
    order = training_order(lengths, epochs=1, batch_size=batch, seed=seed)
    span = WINDOW * batch
    for begin in range(0, len(order), span):
        window = order[begin : begin + span]
        batches = [[lengths[row] for row in window[at : at + batch]] for at in range(0, len(window), batch)]
        by_length = sorted(batches, key=lambda members: (min(members), max(members)))
        assert all(max(a) <= min(b) for a, b in itertools.pairwise(by_length))


def test_padding_shrinks_and_batches_do_not_come_in_order_of_length():
    lengths = [(row * 7919) % 97 + 1 for row in range(400)]

    def padded(order):
        return sum(8 * max(lengths[row] for row in order[at : at + 8]) for at in range(0, 400, 8))

    order = training_order(lengths, epochs=1, batch_size=8, seed=0)
    assert padded(order) < 0.75 * padded(list(range(400)))
    windows = [
        [max(lengths[row] for row in order[at : at + 8]) for at in range(begin, begin + 32, 8)]
        for begin in range(0, 384, 32)
    ]
    assert any(longest != sorted(longest) and longest != sorted(longest, reverse=True) for longest in windows)


def test_another_seed_gives_another_order_after_the_first_epoch():
    orders = {tuple(training_order([1] * 30, epochs=2, batch_size=30, seed=seed)[30:]) for seed in range(3)}
    assert len(orders) == 3


def test_no_rows_give_no_order():
    assert training_order([], epochs=1, batch_size=8, seed=0) == []


@given(st.integers(8, 40), st.integers(1, 8), st.integers(0, 2**31))
def test_no_window_reaches_over_two_epochs(count, batch, seed):
    order = training_order([5] * count, epochs=3, batch_size=batch, seed=seed)
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
