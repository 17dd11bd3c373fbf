"""Near duplicates: what MinHash proposes and the true Jaccard decides, in any script."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.data.near import PLACES, bands_of, jaccard, near_duplicates, shingles, signatures

WORDS = {
    "en": "what how would someone open close paint the old new red green door window garden without a key before morning",
    "hi": "बिना चाबी के पुराना नया लाल हरा दरवाज़ा खिड़की बगीचा सुबह से पहले कैसे कोई खोलेगा बंद करेगा क्यों",
    "ar": "كيف يمكن لشخص أن يفتح يغلق الباب القديم الجديد الأحمر النافذة الحديقة بدون مفتاح قبل الصباح لماذا",
    "ru": "как открыть закрыть старую новую красную дверь окно сад без ключа до утра почему",
}


def sentences(lang, count, seed, length=14):
    """Sentences of words drawn at random, all different."""
    chance = random.Random(f"{lang} {seed}")
    words = WORDS[lang].split()
    return [" ".join(chance.choices(words, k=length)) + f" {index * 7919}" for index in range(count)]


def all_pairs(left, right, threshold):
    """What near duplicates are, by comparing everything with everything."""
    likeness = {(i, j): jaccard(shingles(a), shingles(b)) for (i, a), (j, b) in itertools.product(enumerate(left), enumerate(right))}  # fmt: skip
    return [(i, j, value) for (i, j), value in likeness.items() if value >= threshold]


def changed(text, chance, edits):
    """The text with some of its characters left out."""
    for _ in range(edits):
        at = chance.randrange(len(text))
        text = text[:at] + text[at + 1 :]
    return text


@pytest.mark.parametrize("lang", WORDS)
def test_a_slightly_changed_question_is_found_in_every_script(lang):
    chance = random.Random(lang)
    right = sentences(lang, 60, "prompts")
    left = [changed(text, chance, 1) for text in right] + sentences(lang, 60, "others")
    expected = all_pairs(left, right, 0.8)
    assert len(expected) >= 50
    assert near_duplicates(left, right, 0.8) == expected


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_nothing_below_the_threshold_is_found_and_next_to_nothing_above_it_is_missed(threshold):
    chance = random.Random(7)
    right = sentences("en", 150, 1) + sentences("hi", 150, 1)
    left = [changed(text, chance, chance.randrange(12)) for text in right]
    expected = all_pairs(left, right, threshold)
    found = near_duplicates(left, right, threshold)
    assert set(found) <= set(expected)
    assert len(found) >= 0.99 * len(expected)


@given(st.lists(st.text(max_size=30), max_size=8), st.lists(st.text(max_size=30), max_size=8), st.floats(0.1, 1))
def test_every_pair_found_is_as_alike_as_it_says(left, right, threshold):
    for i, j, likeness in near_duplicates(left, right, threshold):
        assert likeness == jaccard(shingles(left[i]), shingles(right[j])) >= threshold


@given(st.lists(st.text(max_size=40), min_size=1, max_size=12))
def test_equal_texts_are_always_found(texts):
    found = {(i, j) for i, j, likeness in near_duplicates(texts, texts, 1.0) if likeness == 1}
    assert {(i, i) for i in range(len(texts))} <= found


@given(st.lists(st.text(max_size=60), min_size=2, max_size=12))
def test_a_signature_does_not_depend_on_the_texts_around_it(texts):
    together = signatures(texts)
    for text, signed in zip(texts, together, strict=True):
        assert np.array_equal(signatures([text])[0], signed)


def test_a_text_longer_than_what_is_hashed_at_once_keeps_its_signature():
    long = " ".join(sentences("ru", 3000, 5))
    assert len(long) > 3 * 65_536
    together = signatures(["short one", long, "another"])
    assert np.array_equal(together[1], signatures([long])[0])
    assert near_duplicates(["x", long + " and more"], [long], 0.8)[0][:2] == (1, 0)


def test_signatures_agree_as_often_as_the_texts_are_alike():
    chance = random.Random(3)
    left = sentences("en", 400, 9, length=30)
    right = [changed(text, chance, 6) for text in left]
    truth = np.array([jaccard(shingles(a), shingles(b)) for a, b in zip(left, right, strict=True)])
    agree = (signatures(left) == signatures(right)).mean(axis=1)
    assert abs((agree - truth).mean()) < 0.02
    assert (agree - truth).std() < 1.2 * np.sqrt(truth * (1 - truth) / PLACES).mean()


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_fit_into_a_signature_and_seldom_lose_a_pair(threshold):
    bands, places = bands_of(threshold)
    assert 1 <= bands * places <= PLACES
    if threshold >= 0.3:
        assert (1 - threshold**places) ** bands <= 1e-3


def test_texts_that_all_share_a_template_are_told_apart():
    left = [f"please translate the following sentence into french as well as you can: {n}" for n in range(300)]
    assert near_duplicates(left, left, 0.8) == all_pairs(left, left, 0.8)


def test_short_texts_are_one_shingle_and_equal_or_different():
    assert near_duplicates(["hi", "yes", ""], ["hi", "no"], 0.5) == [(0, 0, 1.0)]
    assert shingles("abc") == {"abc"}
    assert len(shingles("abcdefg")) == 3


@pytest.mark.parametrize(("left", "right"), [([], ["a"]), (["a"], []), ([], [])])
def test_nothing_is_near_to_nothing(left, right):
    assert near_duplicates(left, right, 0.8) == []


def test_another_process_finds_the_same_signatures():
    code = (
        "from mixmerge.data.near import signatures; print(signatures(['كيف يمكن', 'what is it', 'x']).tobytes().hex())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert told == {signatures(["كيف يمكن", "what is it", "x"]).tobytes().hex().encode() + b"\n"}


def test_signatures_do_not_change_between_releases():
    # A changed signature may lose or find other pairs, and with them change what a study trains on.
    assert signatures(["what colour has the sky"])[0, :3].tolist() == [2612895, 13261793, 62905160]
