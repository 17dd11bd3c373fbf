"""What drives the cost of a step: how much there is to do, and which earlier steps are like it.

The one idea: a step to come and the record of a finished one are read by the same function, so that seconds for so much work
there are seconds for so much work here. Training and generation count floating-point operations, merging the weights that it
reads, judging the answers; disk follows from weights, tokens or answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mixmerge.train.settings import Devices

PROMPT_TOKENS = 60  # of a question, where nothing tells its length
READ_AND_LEARN = 6  # operations a weight and token: 2 forward, 4 backward (Kaplan et al. 2020)
READ = 2
ON_MODELS = ("classifier", "guard")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a step's own settings do not tell: of its model the weights, of its mixture the tokens, of answers the longest."""

    parameters: int | None = None
    tokens: float | None = None
    longest: int | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """`amount` sets the time and `bulk` the disk; None where `lacking` is not known. Steps are alike if `like` is the same.

    `here`: this machine does it, and not a server elsewhere. `gpus`: how many it takes where there are any.
    """

    amount: float | None
    bulk: float | None
    like: tuple[str, ...] = ()
    lacking: str = ""
    here: bool = True
    gpus: int = 0


Spec = Mapping[str, Any]  # kind, what, how and inputs, of a step or of a record


def work_of(spec: Spec, facts: Facts) -> Work:
    """The work of a step or of a record."""
    return WORK[spec["kind"]](spec, facts)


def _model(spec: Spec, facts: Facts) -> Work:
    like = ("trimmed",) if spec["what"].get("trim") else ("package",) if "package" in spec["how"] else ()
    return Work(facts.parameters, facts.parameters, like, "the size of the base")


def _mixture(spec: Spec, facts: Facts) -> Work:
    return Work(facts.tokens, facts.tokens, (), "the tokens of the mixture")


def _train(spec: Spec, facts: Facts) -> Work:
    what, how = spec["what"], spec["how"]
    adapter, devices = what.get("adapter"), Devices.of(how)
    like = (
        what.get("engine", "trl") + str(what.get("command", "")),
        what["method"],
        "all weights" if adapter is None else str(adapter["type"]),
        str(what.get("precision", "")),
        "checkpointing" if how.get("gradient_checkpointing") else "",
        str(devices.size),
    )
    lacking = "the size of the base" if facts.parameters is None else "the tokens of the mixture"
    if facts.parameters is None or facts.tokens is None:
        return Work(None, facts.parameters, like, lacking, gpus=devices.size)
    epochs = what.get("epochs", what.get("settings", {}).get("epochs", 1.0))
    # an adapter spares the gradients of the weights; dpo reads every row once more, by the reference
    operations = READ_AND_LEARN - (0 if adapter is None else 2) + (READ if what["method"] == "dpo" else 0)
    operations += READ if how.get("gradient_checkpointing") else 0
    return Work(operations * facts.tokens * epochs * facts.parameters, facts.parameters, like, gpus=devices.size)


def _merge(spec: Spec, facts: Facts) -> Work:
    config = spec["what"]["config"]
    like = (str(config.get("merge_method", "")), str(config.get("dtype", "")))
    read = None if facts.parameters is None else facts.parameters * (len(set(_ids(spec))) or 1)
    return Work(read, facts.parameters, like, "the size of the base")


def _generate(spec: Spec, facts: Facts) -> Work:
    what, how = spec["what"], spec["how"]
    prompts, longest = how.get("prompts"), what["max_new_tokens"]
    server = how.get("server")
    like = ("served", str(what["server"]["known_as"])) if server else ()
    bulk = None if prompts is None else prompts * longest
    lacking = "the size of the base" if facts.parameters is None else "the number of prompts"
    unknown = prompts is None or facts.parameters is None
    amount = None if unknown else READ * prompts * (longest + PROMPT_TOKENS) * facts.parameters
    return Work(amount, bulk, like, lacking, here=not (server and server["urls"]), gpus=_replicas(server))


def _harness(spec: Spec, facts: Facts) -> Work:
    what = spec["what"]
    like = (*map(str, what["tasks"]), str(what["limit"]), str(what["num_fewshot"]))
    return Work(facts.parameters, 1.0, like, "the size of the base", gpus=1)


def _fit(spec: Spec, facts: Facts) -> Work:
    return Work(1.0, 1.0, (str(spec["what"]["judge"]), *map(str, spec["what"].get("languages", ()))))


def _judge(spec: Spec, facts: Facts) -> Work:
    what, server, answers = spec["what"], spec["how"].get("server"), spec["how"].get("prompts")
    like = tuple(str(what.get(key, "")) for key in ("judge", "question", "model", "content", "guard", "check"))
    gpus = _replicas(server) if server else int(what["judge"] in ON_MODELS)
    here = not (server and server["urls"])
    return Work(answers, answers, like, "the number of prompts", here=here, gpus=gpus)


def _verdicts(spec: Spec, facts: Facts) -> Work:
    """Of scores and reports: all the answers that were judged, once a judge."""
    how = spec["how"]
    counts = {name: told["prompts"] for name, told in how.get("sets", {}).items() if "prompts" in told}
    for name, splits in how.get("prompts", {}).items():
        counts[name] = sum(len(alike["languages"]) * alike["prompts"] for found in splits.values() for alike in found)
    roles = (role.split("/") for role in spec["inputs"] if role.startswith("verdicts/"))
    judged = float(sum(counts.get(parts[2], 0) for parts in roles if len(parts) > 2))
    return Work(judged or None, judged or None, (), "the number of prompts")


def _replicas(server: Mapping[str, Any] | None) -> int:
    return 1 if server is None else 0 if server["urls"] else int(server["replicas"])


def _ids(spec: Spec) -> list[str]:
    return [entry if isinstance(entry, str) else entry["id"] for entry in spec["inputs"].values()]


WORK: Mapping[str, Callable[[Spec, Facts], Work]] = {
    "base": _model,
    "adopt": _model,
    "mixture": _mixture,
    "train": _train,
    "merge": _merge,
    "generate": _generate,
    "harness": _harness,
    "fit-judge": _fit,
    "judge": _judge,
    "score": _verdicts,
    "report": _verdicts,
}
