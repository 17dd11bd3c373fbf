"""The whole of a study's statistics against a limit of two seconds, and its parts against plain ways to do the same.

    OMP_NUM_THREADS=1 python benchmarks/significance.py [--draws 10000 --candidates 8 --languages 6 --prompts 200]

Simulates verdicts of the base and the candidates on three axes (wins against the base, harmful prompts refused, look-alikes
answered), each over prompts of its own, and answers' lengths. Prints processor seconds (other work on the machine counts less
in them than in wall time), the best of `--repeat`; rivals are run on a share and scaled up. Prints; nothing is asserted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from scipy import stats

from mixmerge.stats.davidson import chances
from mixmerge.stats.paired import (
    bootstrap_means,
    estimate,
    lags,
    means,
    on_front,
    ratio_interval,
    student_interval,
)
from mixmerge.stats.permutation import compare, contributions, sign_flip
from mixmerge.stats.ratings import against_base, length_lead, rate

LEVEL, LIMIT = 0.95, 2.0
AXES = ("win", "harm", "over_refusal")


def simulated(
    rng: np.random.Generator, candidates: int, languages: int, prompts: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The base's and the candidates' values on each axis (C + 1, L, P), a fiftieth missing, and their lengths."""
    shape = (candidates + 1, languages, prompts)
    ahead = np.linspace(0, 1, candidates + 1)[:, None, None]
    tables = [
        (rng.random(shape) < 1 / (1 + np.exp(-rng.normal(0, 1, (1, 1, prompts)) - ahead))).astype(float) for _ in AXES
    ]
    lengths = np.exp(rng.normal(5, 0.5, shape))
    won, tied, _ = chances(ahead + length_lead(lengths, np.broadcast_to(lengths[:1], shape)), np.log(0.6))
    drawn = rng.random(shape)
    tables[0] = np.where(drawn < won, 1.0, np.where(drawn < won + tied, 0.5, 0.0))
    for values in tables:
        values[rng.random(shape) < 0.02] = np.nan
    tables[0][0] = 0.5
    return tables, lengths


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Processor seconds of the quickest run."""
    found = []
    for _ in range(repeat):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def parts(tables: list[np.ndarray], lengths: np.ndarray, draws: int) -> dict[str, Callable[[], object]]:
    """What a study computes, in its order; each part uses what those before it left in `held`."""
    held: dict[str, list[np.ndarray]] = {}
    clusters = tables[0].shape[2]
    count = len(tables[0])

    def bootstrap() -> None:
        held["drawn"] = [
            bootstrap_means(values, draws=draws, seed=0, purpose=axis)
            for axis, values in zip(AXES, tables, strict=True)
        ]

    def goodness() -> tuple[np.ndarray, np.ndarray]:
        mean = np.stack([np.nanmean(means(values), axis=1) for values in tables], axis=-1)
        return mean, np.stack([drawn.mean(axis=2) for drawn in held["drawn"]], axis=-1)

    def intervals() -> None:
        for values, drawn in zip(tables, held["drawn"], strict=True):
            for i in range(count):
                estimate(values[i], drawn[:, i], LEVEL)
                for j in range(values.shape[1]):
                    estimate(values[i, [j]], drawn[:, i, [j]], LEVEL)
        mean, drawn = goodness()
        harm = drawn[:, :, 1]
        for i in range(count):
            student_interval(float(mean[i].mean()), drawn[:, i].mean(axis=-1), LEVEL, clusters, (0.0, 1.0))
            student_interval(float(mean[i, 0] - mean[0, 0]), drawn[:, i, 0] - drawn[:, 0, 0], LEVEL, clusters)
            ratio_interval(harm[:, i], harm[:, 0], LEVEL, clusters)

    def paired() -> None:
        for axis, values, drawn in zip(AXES, tables, held["drawn"], strict=True):
            for against in (
                0,
                1,
            ):  # the base, and the mix: other cells are missing in each pair, so all are drawn again
                apart = bootstrap_means(values - values[against], draws=draws, seed=0, purpose=axis).mean(axis=2)
                for i in range(count) if against == 0 else (count - 1,):
                    student_interval(0.0, apart[:, i] - drawn[:, 0].mean(), LEVEL, clusters)

    def tests() -> None:
        for axes in [[values] for values in tables] + [tables]:
            compare(axes, against=0, flips=draws, seed=0, purpose="x")

    def ratings() -> None:
        found = against_base(tables[0], 0, lengths)
        rate(found, candidates=count, base=0, draws=draws, level=LEVEL, seed=0, purpose="win")

    def front() -> None:
        on_front(goodness()[1]).mean(axis=0)

    def best_set() -> None:
        mean, drawn = goodness()
        found = lags(drawn.mean(axis=-1), mean.mean(axis=-1), LEVEL, clusters)
        asked = found.behind > found.needed
        terms = [
            np.concatenate([contributions(values, i)[asked[i]] for values in tables], axis=1) / len(tables)
            for i in range(count)
        ]
        told = np.zeros_like(asked)
        told[asked] = sign_flip(np.concatenate(terms), flips=draws, seed=0, purpose="x")[0] <= 1 - LEVEL
        found.surest(told)

    return {
        "bootstrap": bootstrap,
        "intervals": intervals,
        "differences on common prompts": paired,
        "sign-flip tests with Holm": tests,
        "Bradley-Terry with ties and length": ratings,
        "Pareto front": front,
        "best set": best_set,
    }


def loop(values: np.ndarray, draws: int) -> None:
    """The bootstrap of one axis as it is usually written: resample, take means, once for each draw."""
    rng = np.random.default_rng(0)
    for _ in range(draws):
        np.nanmean(values[:, :, rng.integers(0, values.shape[2], values.shape[2])], axis=2)


def by_scipy(values: np.ndarray, draws: int) -> None:
    """The same by scipy.stats.bootstrap, which resamples along one axis for all candidates and languages at once."""
    stats.bootstrap(
        (values,), np.nanmean, axis=-1, n_resamples=draws, batch=100, method="percentile", rng=np.random.default_rng(0)
    )


def tests_by_scipy(values: np.ndarray, draws: int) -> None:
    """Each candidate's sign-flip test by scipy.stats.permutation_test."""
    for row in contributions(values, 0)[1:]:
        stats.permutation_test((row,), np.sum, permutation_type="samples", n_resamples=draws, batch=1000, rng=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("draws", 10_000), ("candidates", 8), ("languages", 6), ("prompts", 200), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    tables, lengths = simulated(np.random.default_rng(0), asked.candidates, asked.languages, asked.prompts)
    whole = parts(tables, lengths, asked.draws)
    print(
        f"{asked.draws:,} draws, base + {asked.candidates} candidates x {asked.languages} languages x {asked.prompts} prompts, 3 axes"
    )
    spent = {name: seconds(work, asked.repeat) for name, work in whole.items()}
    for name, found in spent.items():
        print(f"  {name:36s} {found:6.3f} s")
    total = sum(spent.values())
    print(f"  {'all of it':36s} {total:6.3f} s, limit {LIMIT:.0f} s: {'within' if total < LIMIT else 'MISSED'}")
    share = max(1, asked.draws // 20)
    scale = asked.draws / share
    ours = seconds(lambda: bootstrap_means(tables[1], draws=asked.draws, seed=0, purpose="x"), asked.repeat)
    for name, rival in (("a plain loop", loop), ("scipy.stats.bootstrap", by_scipy)):
        theirs = scale * seconds(lambda rival=rival: rival(tables[1], share), 1)  # type: ignore[misc]
        print(f"bootstrap of one axis: {theirs / ours:6.1f} times as fast as {name} ({ours:.3f} s, {theirs:.2f} s)")
    ours = seconds(lambda: compare([tables[1]], against=0, flips=asked.draws, seed=0, purpose="x"), asked.repeat)
    theirs = scale * seconds(lambda: tests_by_scipy(tables[1], share), 1)
    print(
        f"tests of one axis: {theirs / ours:6.1f} times as fast as scipy.stats.permutation_test ({ours:.3f} s, {theirs:.2f} s)"
    )


if __name__ == "__main__":
    main()
