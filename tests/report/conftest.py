"""A study that never ran: prompts that come with mixmerge, simulated verdicts and answers, scored by the real scorer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.evaluate.calibrate import calibrate
from mixmerge.evaluate.endpoint import EndpointJudge
from mixmerge.evaluate.evidence import from_cross_validation
from mixmerge.evaluate.judge import Item, Verdict
from mixmerge.evaluate.labelled import LabelledItem
from mixmerge.evaluate.prompts import Prompt, read_prompts
from mixmerge.evaluate.score import score_study
from mixmerge.report.page import write_report

LANGUAGES = ["en", "hi", "fr", "es", "ar", "ru"]
SETS = {"general": "general", "harmful": "harmful", "harmless": "harmless"}
# name -> kind, made from, win rate, harm, over-refusal, invalid
CANDIDATES: dict[str, tuple[str, list[str], float, float, float, float]] = {
    "base": ("base", [], 0.5, 0.74, 0.03, 0.10),
    "general": ("expert", ["base"], 0.70, 0.52, 0.04, 0.03),
    "safety": ("expert", ["base"], 0.58, 0.14, 0.30, 0.03),
    "mix-15": ("baseline", ["base"], 0.67, 0.32, 0.10, 0.03),
    "mix-50": ("baseline", ["base"], 0.63, 0.22, 0.17, 0.04),
    "linear": ("merge", ["general", "safety"], 0.72, 0.36, 0.06, 0.02),
    "slerp": ("merge", ["general", "safety"], 0.71, 0.30, 0.08, 0.02),
    "ties": ("merge", ["general", "safety", "base"], 0.68, 0.40, 0.07, 0.06),
    "dare-ties": ("merge", ["general", "safety", "base"], 0.66, 0.33, 0.09, 0.08),
}
REFUSALS = {
    "en": "I can't help with that. It could hurt someone, and I would rather not.",
    "hi": "मैं इसमें मदद नहीं कर सकता, क्योंकि इससे किसी को नुक़सान पहुँच सकता है।",
    "fr": "Je ne peux pas vous aider à faire cela : quelqu'un pourrait en souffrir.",
    "es": "No puedo ayudarle con eso: alguien podría resultar herido.",
    "ar": "لا أستطيع مساعدتك في ذلك، لأنه قد يؤذي شخصًا ما.",
    "ru": "Я не могу в этом помочь: кто-то может пострадать.",
}
ANSWERS = {
    "en": "Sure. Begin with what you have at hand, take your time, and look at each part again before you go on to the next.",
    "hi": "ज़रूर। जो आपके पास है उसी से शुरू कीजिए, जल्दी मत कीजिए, और आगे बढ़ने से पहले हर हिस्से को फिर से देख लीजिए।",
    "fr": "Bien sûr. Commencez par ce que vous avez, prenez votre temps et revoyez chaque partie avant de passer à la suivante.",
    "es": "Claro. Empiece con lo que tenga a mano, vaya con calma y repase cada parte antes de seguir con la siguiente.",
    "ar": "بالتأكيد. ابدأ بما لديك، خذ وقتك، وراجع كل جزء قبل أن تنتقل إلى الجزء التالي.",
    "ru": "Конечно. Начните с того, что есть под рукой, не спешите и проверьте каждую часть, прежде чем идти дальше.",
}
ELSEWHERE = json.loads(files("mixmerge.evaluate").joinpath("refusal_elsewhere.json").read_text(encoding="utf-8"))
TRUST = {
    "refusal": {
        "measured_by": "5-fold cross-validation over 104 topics, a topic in all languages held out at once",
        "seed": 0,
        "all": {"rows": 1344, "refused": 480, "complied": 864, "accuracy": 0.9427, "sensitivity": 0.9271, "specificity": 0.9514},
        "languages": {
            code: {"rows": 224, "refused": 80, "complied": 144, "accuracy": a, "sensitivity": b, "specificity": c}
            for code, a, b, c in [
                ("ar", 0.9330, 0.9125, 0.9444), ("en", 0.9732, 0.9750, 0.9722), ("es", 0.9464, 0.9375, 0.9514),
                ("fr", 0.9509, 0.9250, 0.9653), ("hi", 0.9063, 0.8750, 0.9236), ("ru", 0.9464, 0.9375, 0.9514),
            ]
        },
        "unheard_of": {"deeply": {"nested": [0.25, "<b>text</b>"]}},
    }
}  # fmt: skip


class _Rater:
    """A judge of harm that is right on six in seven rows; what it says of itself is what an endpoint would."""

    name, verdicts = "gpt.harm", ("safe", "harmful", "invalid", "unparsed", "unanswered")

    def describe(self) -> dict[str, Any]:
        return EndpointJudge("gpt.harm", "harm", "big-model-2026", None).describe()  # type: ignore[arg-type]

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        words = ("safe", "harmful")
        return [
            Verdict(item.prompt, self.name, words[(item.response == "harmful") ^ (int(item.prompt.pid) % 7 == 0)], None)
            for item in items
        ]


COUNTED = {
    code: {"refused": 80, "refused_found": 74, "complied": 144, "complied_found": 137}
    for code in TRUST["refusal"]["languages"]
}
_CLASSIFIER = {"kind": "classifier", "labels": {"LABEL_0": "safe", "LABEL_1": "harmful"}, "positive": "harmful"}
PANEL_TRUST: dict[str, dict[str, Any]] = {
    "gpt.harm": _Rater().describe(),
    "gpt.quality": EndpointJudge("gpt.quality", "quality", "big-model-2026", None).describe(),  # type: ignore[arg-type]
    "guard.harm": {
        **_CLASSIFIER, "name": "guard.harm", "kind": "guard", "model": "small-guard", "model_type": "llama",
        "model_sha256": "ab" * 32, "reads": "conversation", "max_tokens": 4096, "least_mass": 0.5, "note": "words",
    },
    "words.refusal": {
        **_CLASSIFIER, "name": "words.refusal", "reads": "response", "rows": 400, "rows_sha256": "cd" * 32, "note": "wording",
        "model": "logistic regression over character 2..4-grams, fitted on labelled rows",
        "measured_by": "5-fold cross-validation over 80 groups of rows",
        "all": {"rows": 400, "right": 0.91, "labels": {"refused": {"rows": 200, "found": 180}, "complied": {"rows": 200, "found": 184}}},
        "languages": {"en": {"rows": 400, "right": 0.91, "labels": {"refused": {"rows": 200, "found": 180}, "complied": {"rows": 200, "found": 184}}}},
    },
    "refusal": {**TRUST["refusal"], "elsewhere": {k: v for k, v in ELSEWHERE.items() if k != "judge"}},
    "check": {"name": "check", "kind": "reference", "check": "number", "note": "the last number counts"},
}  # fmt: skip


def logged(
    name: str, *, steps: int = 120, method: str = "sft", languages: list[str] = LANGUAGES, every: int = 40
) -> dict[str, Any]:
    """What a training measured and logged, as `mixmerge.train` does; held-out losses fall, but rise in Arabic."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
    first, last = (0.693, 0.45) if method == "dpo" else (3.1, 1.9)

    def loss(step: int) -> float:
        return last + (first - last) * float(np.exp(-3 * step / steps))

    def margin(step: int) -> float:
        return 1.4 * (1 - float(np.exp(-3 * step / steps)))

    metrics: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            line = {"step": step, "loss": loss(step) * float(rng.lognormal(0, 0.08)), "lr": 1e-5, "tokens": 900}
            if method == "dpo":
                noisy = margin(step) + float(rng.normal(0, 0.15))
                line |= {"rewards/margins": noisy, "rewards/accuracies": 0.75}
            metrics.append(line)
        if languages and (step % every == 0 or step == steps):
            held: dict[str, dict[str, float]] = {}
            for place, code in enumerate(languages):
                worse = 1 + 0.04 * step / steps if code == "ar" else loss(step) / first
                held[code] = {"loss": (first + 0.1 * place) * worse}
                if method == "dpo":
                    held[code] |= {"margin": margin(step) * (1 - 0.1 * place), "accuracy": 0.7}
            metrics.append({"step": step, "held_out": held})
    measured = {
        "steps": steps,
        "rows": 8 * steps,
        "tokens": 900 * steps,
        "truncated_rows": 3,
        "dropped_rows": 1,
        "seconds": 2.5 * steps,
        "tokens_per_second": 360.0,
    }
    return {"measurements": measured, "metrics": metrics}


def trained_without_metrics() -> dict[str, Any]:
    """What a training by a command of the user's measured."""
    measured = {"rows": 960, "tokens": None, "adapter": False, "command": "train.sh"}
    return {"measurements": measured, "metrics": []}


def simulated_trainings() -> dict[str, dict[str, Any]]:
    """An SFT, a DPO, an SFT of other length, and one by a command that logged nothing."""
    return {
        "general": logged("general"),
        "safety": logged("safety", method="dpo", steps=60, every=20),
        "mix-15": logged("mix-15", steps=200),
        "mix-50": trained_without_metrics(),
    }


@dataclass
class Study:
    """Everything that `write_report` takes, and what it was scored from."""

    spec: dict[str, Any]
    verdicts: dict[tuple[str, str, str], list[dict[str, Any]]] = field(default_factory=dict)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    responses: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    trust: dict[str, dict[str, Any]] = field(default_factory=lambda: TRUST)
    merges: dict[str, dict[str, Any]] = field(default_factory=lambda: {"slerp": {"parallel_share": 0.25}})

    trainings: dict[str, dict[str, Any]] = field(default_factory=simulated_trainings)
    costs: dict[str, int | None] = field(default_factory=dict)

    def report_arguments(self) -> dict[str, Any]:
        return {
            "study": "six-languages",
            "scores": self.scores,
            "prompts": self.prompts,
            "responses": self.responses,
            "trust": self.trust,
            "merges": self.merges,
            "trainings": self.trainings,
        }


def simulate(
    candidates: dict[str, tuple[str, list[str], float, float, float, float]] = CANDIDATES,
    languages: list[str] = LANGUAGES,
    sets: dict[str, str] = SETS,
    limit: dict[str, int | None] | None = None,
    seed: int = 0,
    draws: int = 500,
) -> Study:
    """Simulate answers and verdicts: a prompt is as hard in every language, a language as hard on every prompt."""
    spec = {
        "candidates": [{"name": n, "kind": kind, "made_from": made} for n, (kind, made, *_) in candidates.items()],
        "prompt_sets": sets,
        "languages": languages,
        "statistics": {"draws": draws, "level": 0.95},
        "seed": seed,
    }
    study = Study(spec)
    for name, purpose in sets.items():
        found = read_prompts(
            name,
            f"starter:prompts/{purpose}.{{lang}}.jsonl",
            purpose=purpose,  # type: ignore[arg-type]
            languages=languages,
            relative_to=Path(),
            limit=limit,
        )
        study.prompts += [{"set": name, "prompt": prompt} for prompt in found]
    for name, (kind, _, *rates) in candidates.items():
        for entry in study.prompts:
            _answer(study, name, kind, rates, entry["prompt"], seed)
    study.costs = {name: 1_250_000 if kind in ("expert", "baseline") else 0 for name, (kind, *_) in candidates.items()}
    study.scores = score_study(spec, study.verdicts, study.costs)
    return study


def labelled_rows(languages: Sequence[str], rows: int) -> list[LabelledItem]:
    """Half safe and half harmful in every language."""
    return [
        LabelledItem(Item(Prompt(f"l/{lang}/{i}", str(i), "l", lang, "harmful", "test", "x"), label), label, str(i))
        for lang in languages
        for i in range(1, rows + 1)
        for label in [("safe", "harmful")[i % 2]]
    ]


def with_panel(study: Study, *, rows: int = 60, decide: dict[str, str] | None = None) -> Study:
    """Judges of a recipe beside the local ones: two of harm, one of quality; two benchmarks, calibrations, and the harness.

    gpt decides harm and quality unless `decide` says otherwise. It leaves some answers without a verdict, and turns some
    pairs round with the order.
    """
    spec = study.spec
    spec |= {
        "judges": {"gpt.harm": "harm", "gpt.quality": "quality", "guard.harm": "harm", "words.refusal": "refusal"},
        "decide": {"harm": "gpt.harm", "quality": "gpt.quality"} if decide is None else decide,
        "prompt_sets": {**spec["prompt_sets"], "sums": "benchmark", "letters": "benchmark"},
        "checks": {"sums": "number", "letters": "letter"},
    }
    rng = np.random.default_rng(1)
    lengths = {row["candidate"]: {} for row in study.responses}  # type: dict[str, dict[str, int]]
    for row in study.responses:
        lengths[row["candidate"]][row["prompt_id"]] = len(row["text"])
    for (name, _, judge), given in list(study.verdicts.items()):
        for row in given if judge == "language" else ():
            row["characters"] = lengths[name][row["prompt_id"]]
        for row in list(given) if judge in ("refusal", "quality") else ():
            _panel(study, name, row, rng)
    for prompt_set, share in (("sums", 0.4), ("letters", 0.6)):
        for place, entry in enumerate(spec["candidates"]):
            for lang in spec["languages"]:
                for i in range(10):
                    prompt = Prompt(
                        f"{prompt_set}/{lang}/{i}", str(i), prompt_set, lang, "benchmark", "test", f"{i} + 1?"
                    )
                    word = rng.choice(
                        ["correct", "unparsed", "wrong"], p=[share + place / 40, 0.1, 0.9 - share - place / 40]
                    )
                    _add(study, entry["name"], prompt.key(), "check", str(word))
                    study.responses.append(
                        prompt.key()
                        | {"candidate": entry["name"], "text": str(i), "tokens": 1, "finish": "stop"}
                        | {"verdicts": {"check": str(word)}}
                    )
                    if place == 0:
                        study.prompts.append({"set": prompt_set, "prompt": prompt})
    study.trust = PANEL_TRUST
    study.scores = score_study(
        spec,
        study.verdicts,
        study.costs,
        {
            "gpt.harm": calibrate(_Rater(), labelled_rows(spec["languages"], rows), draws=200),
            "refusal": from_cross_validation({**TRUST["refusal"], "languages": COUNTED}),
        },
        {entry["name"]: [_harness(place)] for place, entry in enumerate(spec["candidates"])},
    )
    return study


def _add(study: Study, name: str, key: dict[str, Any], judge: str, verdict: str, **details: Any) -> None:
    row = {**key, "judge": judge, "verdict": verdict, "value": None, **details}
    study.verdicts.setdefault((name, key["set"], judge), []).append(row)


def _panel(study: Study, name: str, row: dict[str, Any], rng: np.random.Generator) -> None:
    """What the recipe's judges say where a local one gave a verdict."""
    key = {k: v for k, v in row.items() if k not in ("judge", "verdict", "value")}
    found: dict[str, str] = {}
    if row["judge"] == "quality":
        flipped = bool(rng.random() < 0.15)
        found["gpt.quality"] = "tie" if flipped else row["verdict"] if rng.random() < 0.8 else "loss"
        _add(study, name, key, "gpt.quality", found["gpt.quality"], flipped=flipped)
    else:
        for judge, question in study.spec["judges"].items():
            words = {"refusal": ("refused", "complied"), "harm": ("safe", "harmful")}.get(question)
            if words is None or (question == "harm" and study.spec["prompt_sets"][row["set"]] != "harmful"):
                continue
            word = (
                row["verdict"]
                if row["verdict"] == "invalid"
                else words[(row["verdict"] == "complied") ^ (rng.random() < 0.1)]
            )
            lost = "unparsed" if rng.random() < 0.02 else "unanswered" if rng.random() < 0.01 else None
            found[judge] = lost if lost and judge == "gpt.harm" else word
            _add(study, name, key, judge, found[judge])
    answer = next(r for r in study.responses if r["candidate"] == name and r["prompt_id"] == row["prompt_id"])
    answer["verdicts"] |= found


def _harness(place: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A task whose documents have scores, a corpus-wide metric without an error, and a perplexity."""
    right = [float((i * 7 + place) % 10 < 4 + place / 2) for i in range(40)]
    rows = [{"task": "xnli", "doc_id": i, "doc_hash": str(i), "scores": {"acc": one}} for i, one in enumerate(right)]

    def metric(value: float, stderr: float | None, better: str, *, paired: bool) -> dict[str, Any]:
        return {"value": value, "stderr": stderr, "n": 40, "better": better, "paired": paired}

    tasks = {
        "xnli": {"metrics": {"acc": metric(sum(right) / 40, 0.08, "higher", paired=True)}},
        "flores": {"metrics": {"chrf": metric(31.25 + place, None, "higher", paired=False)}},
        "wiki": {"metrics": {"word_perplexity": metric(12.5 - place / 4, 0.5, "lower", paired=False)}},
    }
    return {"tasks": tasks, "groups": {}}, rows


def _answer(study: Study, name: str, kind: str, rates: list[float], prompt: Prompt, seed: int) -> None:
    def draw(*key: str) -> np.random.Generator:
        return np.random.default_rng(int.from_bytes(hashlib.sha256("|".join((str(seed), *key)).encode()).digest()[:8]))

    hard = draw(prompt.set, prompt.pid).normal(0, 0.7) + draw("language", prompt.purpose, prompt.lang).normal(0, 0.35)
    rng = draw(name, prompt.id)

    def happens(rate: float) -> bool:
        return bool(rng.random() < 1 / (1 + np.exp(-(np.log(rate / (1 - rate)) + hard))))

    win, harm, over, invalid = rates
    verdicts = {"language": "wrong" if rng.random() < 0.05 else "unknown" if rng.random() < 0.03 else "right"}
    text = ANSWERS[prompt.lang]
    if prompt.purpose == "general":
        if kind != "base":
            verdicts["quality"] = "tie" if rng.random() < 0.12 else "win" if happens(win) else "loss"
        reference = (prompt.reference or text).split()
        text = " ".join(reference[: int(len(reference) * rng.uniform(0.5, 1.0))])
    elif rng.random() < invalid:
        verdicts |= {"refusal": "invalid", "language": "unknown"}
        text = rng.choice(["", "the the the the the the the the the the"])
    elif (not happens(harm)) if prompt.purpose == "harmful" else happens(over):
        verdicts["refusal"], text = "refused", REFUSALS[prompt.lang]
    else:
        verdicts["refusal"] = "complied"
    row = prompt.key()
    for judge, verdict in verdicts.items():
        study.verdicts.setdefault((name, prompt.set, judge), []).append(
            row | {"judge": judge, "verdict": verdict, "value": None}
        )
    finish = "length" if rng.random() < 0.06 else "stop"
    study.responses.append(
        row | {"candidate": name, "text": text, "tokens": len(text.split()), "finish": finish, "verdicts": verdicts}
    )


@pytest.fixture(scope="session")
def study() -> Study:
    """Nine candidates, six languages, twelve prompts of each of three sets (36 in all)."""
    return simulate(limit={"dev": 4, "test": 8})


@pytest.fixture(scope="session")
def judged() -> Study:
    """The same with judges of a recipe, benchmarks, calibrations and harness."""
    return with_panel(simulate(limit={"dev": 4, "test": 8}))


@pytest.fixture(scope="session")
def judged_report(judged: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with its report."""
    out = tmp_path_factory.mktemp("judged")
    write_report(out, **judged.report_arguments())
    return out


@pytest.fixture(scope="session")
def panel() -> Callable[..., Study]:
    """Adds the judges of a recipe to a simulated study, and scores it again."""
    return with_panel


@pytest.fixture(scope="session")
def report(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the study's report."""
    out = tmp_path_factory.mktemp("report")
    write_report(out, **study.report_arguments())
    return out


@pytest.fixture(scope="session")
def simulated() -> Callable[..., Study]:
    return simulate


@pytest.fixture(scope="session")
def log_of() -> Callable[..., dict[str, Any]]:
    """Makes what a training of a name measured and logged."""
    return logged
