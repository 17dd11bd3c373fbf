"""How each kind of step is carried out: from a step's spec and its inputs' folders to its own folder.

One function per kind. Each translates the spec into a call of the layer that does the work and returns the measurements
for the record. Heavy imports stay inside, so that a process loads only what its steps need.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mixmerge.errors import DataError, FullDiskError, MixmergeError, ModelError, StepError, UserError
from mixmerge.evaluate.limits import BudgetError
from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.identity import fingerprint
from mixmerge.run.judges import checked_calibrations, judge_of, spent
from mixmerge.run.local import usable_threads
from mixmerge.run.ray.address import ray_address
from mixmerge.run.readable import JUDGE_FILE, VERDICTS_FILE, read_verdicts
from mixmerge.run.servers import Connection, connect
from mixmerge.run.store import Store, read_json, read_record, write_json

if TYPE_CHECKING:
    from mixmerge.evaluate.engine import Engine, GenerationSettings

JUDGED_AT_ONCE = 64

Measurements = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step gets: its spec, where to write, its inputs, and what its process holds already; `log`: its own log.
    `plan`: what it is of, for processes that share it.

    `progress(done, all)` and `tell(words)` go to the person who waits. What a step puts into `checks` is called with the
    sha256 of the files that it made, by name, before these become its folder.
    """

    step: Step
    out: Path
    work: Path
    store: Store
    shared: dict[Any, Any]
    progress: Callable[[int, int], None]
    tell: Callable[[str], None]
    log: Path
    checks: list[Callable[[Mapping[str, str]], None]] = field(default_factory=list)
    plan: Plan | None = None

    @property
    def what(self) -> Mapping[str, Any]:
        return self.step.what

    @property
    def how(self) -> Mapping[str, Any]:
        return self.step.how

    def input(self, role: str) -> Path:
        return self.store.path(self.step.inputs[role])

    @property
    def threads(self) -> int:
        """What the runner gave this process."""
        return usable_threads()

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """The one large thing that this process holds: made when the key changes, the last one dropped first."""
        if self.shared.get("key") != key:
            let_go(self.shared)
            self.shared.update(key=key, value=make())
        return self.shared["value"]


def let_go(shared: dict[Any, Any], error: MixmergeError | None = None) -> None:
    """Drop what a process holds for its steps; what can be closed (a client, a server) is closed.

    With `error`: what it has made useless. A server whose budget is spent is well, and answers what it has answered.

    Raises:
        StepError: with `error`, where it comes of a server that has died.
    """
    if isinstance(error, BudgetError):
        return
    value = shared.pop("value", None)
    shared.clear()
    if error is not None and isinstance(value, Connection):
        value.fail(error)
    elif (close := getattr(value, "close", None)) is not None:
        close()


def make_base(context: StepContext) -> Measurements:
    """Bring the base into the store: unpacked, downloaded or linked; vocabulary trimmed, chat template set."""
    from mixmerge.model.prepare import prepare_base

    place, what = context.how, context.what
    source = Path(place["path"]) if "path" in place else None
    if "hub" in place:
        source = _downloaded(place)
    trim = (what["trim"]["languages"], what["trim"]["size"]) if what["trim"] else None
    shutil.rmtree(context.out)  # it makes the folder itself, whole; one that is there had no record yet
    template = None
    if what["chat_template"] is not None:
        template = context.work / "chat_template.jinja"
        template.write_text(what["chat_template"], encoding="utf-8")
    with _named_as_given(context):
        trimmed = prepare_base(
            source,
            place.get("package"),
            context.out,
            trim=trim,
            chat_template=None if template is None else str(template),
            progress=context.progress,
        )
    if "path" in place:
        context.checks.append(partial(_as_planned, context, Path(place["path"]), copied=trimmed is None))
    return {"parameters": _parameters(context.out)} | ({} if trimmed is None else {"trimmed": asdict(trimmed)})


def adopt(context: StepContext) -> Measurements:
    """Bring a model or an adapter from outside into the store."""
    from mixmerge.model.adopt import adopt as adopt_model

    place = context.how
    source = Path(place["path"]) if "path" in place else _downloaded(place)
    shutil.rmtree(context.out)
    adapter = adopt_model(
        source, context.input("start"), context.out, threads=context.threads, progress=context.progress
    )
    if "path" in place:
        context.checks.append(partial(_as_planned, context, source, copied=not adapter))
    # tokens: what it was trained on is not known
    return {"parameters": _parameters(context.out), "adapter": adapter, "tokens": None}


def _as_planned(context: StepContext, source: Path, made: Mapping[str, str], *, copied: bool) -> None:
    """Refuse a model whose content is not what the plan named, as it was read: where `copied`, by the weights that were made.

    Weights that are only worked with are read again, unless nothing has touched them since the plan.
    """
    from mixmerge.hashes import cache_folder
    from mixmerge.plan.models import folder_fingerprint

    weights = {name: digest for name, digest in made.items() if copied and name.endswith(".safetensors")}
    if folder_fingerprint(source, cache_folder(), weights) != context.what["source"]["content"]:
        raise ModelError(
            "the model has changed since the plan was made", where=str(source), do="run the same command again"
        )


def _parameters(model: Path) -> int:
    from mixmerge.merge.checkpoint import open_checkpoint

    return sum(tensor.size for tensor in open_checkpoint(model).tensors.values())


def _downloaded(place: Mapping[str, Any]) -> Path:
    """A model's or adapter's files from the Hub, without code and pickles."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    return Path(snapshot_download(place["hub"], revision=place["commit"], allow_patterns=patterns))


@contextmanager
def _named_as_given(context: StepContext) -> Iterator[None]:
    """Let errors name what the recipe names, where the work is done on copies in the partial folder."""
    place, copies = context.how, re.escape(str(context.out.parent)) + "/"
    base = next(str(place[key]) for key in ("path", "hub", "package") if key in place)
    template = str(place.get("chat_template") or "its chat template")

    def given(text: str | None) -> str | None:
        if text is None:
            return None
        text = re.sub(copies + r"work/chat_template\.jinja", lambda _: template, text)
        return re.sub(copies + r"\.?out[^/\s:']*(/trimmed)?", lambda _: base, text)

    try:
        yield
    except FullDiskError as error:  # the store's disk is full, whatever was being copied
        raise error.again(where=str(context.store.folder)) from error
    except MixmergeError as error:
        raise error.again(what=given(error.what), where=given(error.where)) from error


def make_mixture(context: StepContext) -> Measurements:
    """Draw the rows of a training and write them out with their manifest."""
    from mixmerge.data.formats import Row
    from mixmerge.data.loading import SAMPLE, load_rows, take_out
    from mixmerge.data.mixture import draw_mixture, write_mixture
    from mixmerge.data.sources import DataSource, source_files
    from mixmerge.data.sources import fingerprint as data_fingerprint
    from mixmerge.hashes import FileHashes
    from mixmerge.plan.lengths import too_long
    from mixmerge.train.tokens import long_prompts, token_counter

    what, how, sha256 = context.what, context.how, FileHashes(None)
    folder = Path(how["folder"])
    cells: dict[tuple[str, str], list[Row]] = {(cell["objective"], cell["lang"]): [] for cell in what["cells"]}
    accounts: dict[str, Any] = {}
    origin: dict[int, str] = {}  # by identity: rows of two data sets may be equal
    place: dict[int, tuple[str, int]] = {}
    for name, spec in how["sources"].items():
        source, languages = DataSource(**spec), what["data"][name]["languages"]
        if data_fingerprint(source, languages, folder, sha256) != what["data"][name]["fingerprint"]:
            raise StepError(
                f"the data set '{name}' has changed since the plan was made", do="run the same command again"
            )
        objective, gone = what["data"][name]["objective"], set(how.get("dropped", {}).get(name, ()))
        loaded = load_rows(source, languages, folder, sample=SAMPLE)
        if (longest := what.get("max_length")) is not None:
            asked = [row for row in loaded.rows if (objective, row.lang) in cells and row.id not in gone]
            long = long_prompts(asked, context.input("tokenizer"), longest)
            loaded = take_out(loaded, source, [(row, too_long(context.step.name, longest)) for row in long])
        read = source_files(source, languages, folder, sha256)
        accounts[name] = loaded.account.to_json() | {"files": [asdict(file) for file in read.values()]}
        for row in loaded.rows:
            if (objective, row.lang) not in cells or row.id in gone:
                continue
            cells[objective, row.lang].append(row)
            origin[id(row)] = name
            where, _, number = loaded.places[row.id].rpartition(":")
            place[id(row)] = read[where].file, int(number)
    shares = {(cell["objective"], cell["lang"]): cell["share"] for cell in what["cells"]}
    mixture = draw_mixture(
        cells,
        shares,
        budget=what["budget"],
        unit=what["unit"],
        max_repeats=what["max_repeats"],
        seed=what["seed"],
        count_tokens=token_counter(
            context.input("tokenizer"), pairs=what.get("pairs", False), max_length=what.get("max_length")
        ),
        repeats={cell: most for cell in cells if (most := what.get("repeats", {}).get("/".join(cell)))},
    )
    told = ("objective", "languages", "fingerprint")
    manifest = write_mixture(
        mixture,
        context.out,
        pairs=what.get("pairs", False),
        data={name: {key: found[key] for key in told} | accounts[name] for name, found in what["data"].items()},
        origin=lambda row: origin[id(row)],
        place=lambda row: place[id(row)],
        dropped=what.get("dropped", {}).get("counts"),
        capped=what.get("capped"),
    )
    return {key: manifest[key] for key in ("rows", "tokens", "data")}


def train(context: StepContext) -> Measurements:
    """Fine-tune the start on the mixture."""
    if context.what.get("engine") == "command":
        return _train_by_command(context)
    from mixmerge.train.methods import train_by
    from mixmerge.train.settings import Devices
    from mixmerge.train.together import train_together

    devices, train_here = Devices.of(context.how), cast(Callable[..., Measurements], train_by)
    launcher, address = context.how.get("launcher", ""), ray_address()
    if devices.size > 1 and address is not None:
        from mixmerge.run.ray.train import train_on_ray

        if launcher not in ("", "ray"):
            context.tell("how.launcher is not used: Ray starts the processes")
        train_here = partial(train_on_ray, address, devices, tell=context.tell)
    elif devices.nodes > 1 and launcher == "ray":
        raise UserError("Ray starts nothing here", where="how.launcher", do="run with --backend ray")
    elif devices.size > 1:
        train_here = partial(train_together, devices, launcher=launcher)
    return train_here(
        context.what,
        context.input("model"),
        context.input("mixture"),
        context.out,
        work=context.work,
        cache=context.store.tokens,
        threads=context.threads,
        checkpoint_every=context.how["checkpoint_every"],
        gradient_checkpointing=context.how.get("gradient_checkpointing", False),
        evaluate_every=context.how.get("evaluate_every"),
        report_to=context.how.get("report_to", ()),
        device=context.how["device"],
        progress=context.progress,
    )


def _train_by_command(context: StepContext) -> Measurements:
    from mixmerge.train.command import train_by_command

    shutil.rmtree(context.out)
    return train_by_command(
        context.what["command"],
        context.input("model"),
        context.input("mixture"),
        context.out,
        context.what["settings"],
        work=context.work,
        seed=context.what["seed"],
        threads=context.threads,
        launcher=context.how.get("launcher", ""),
    )


def merge(context: StepContext) -> Measurements:
    """Merge the inputs' weights."""
    from mixmerge.merge import merge as merge_models
    from mixmerge.merge import parse_config

    config = dict(context.what["config"])
    folders = {role: str(context.input(role)) for role in context.step.inputs}
    config["models"] = [entry | {"model": folders[entry["model"]]} for entry in config["models"]]
    if "base_model" in config:
        config["base_model"] = folders[config["base_model"]]
    config["seed"] = context.what["seed"]
    shutil.rmtree(context.out)
    return merge_models(parse_config(config), context.out, threads=context.threads, progress=context.progress)


def generate(context: StepContext) -> Measurements:
    """Ask the candidate every prompt of one set."""
    from mixmerge.evaluate.generate import generate as generate_rows

    what, how = context.what, context.how
    settings = _generation_settings(what)
    prompts = _prompts(how, what["prompts"])
    if how.get("processes", 1) > 1:
        from mixmerge.run.shared_generation import generate_shared

        return generate_shared(context, how["processes"], len(prompts))
    # a server batches by itself: it gets everything at once, and its client keeps every answer
    batch_size = max(1, len(prompts)) if "server" in how else how["batch_size"]
    out = context.out / "responses.jsonl"
    return generate_rows(
        _engine(context),
        prompts,
        out,
        settings,
        batch_size=batch_size,
        progress=context.progress,
        plan=context.work / "responses.batches",
    )


def generate_part(context: StepContext, number: int, of: int) -> None:
    """Answer what falls to process `number` of `of` of a generation."""
    from mixmerge.evaluate.shared import generate_share
    from mixmerge.evaluate.transformers_engine import TransformersEngine

    what, how = context.what, context.how
    engine = TransformersEngine(context.input("model"), threads=context.threads, device=how["device"], beside=of - 1)
    generate_share(
        engine,
        _prompts(how, what["prompts"]),
        context.work,
        _generation_settings(what),
        number=number,
        of=of,
        batch_size=how["batch_size"],
        progress=context.progress,
    )


def _generation_settings(what: Mapping[str, Any]) -> GenerationSettings:
    from mixmerge.evaluate.engine import GenerationSettings

    return GenerationSettings(**{k: what[k] for k in ("max_new_tokens", "temperature", "top_p", "seed") if k in what})


def _engine(context: StepContext) -> Engine:
    model, how = context.input("model"), context.how
    if "server" in how:
        from mixmerge.evaluate.server_engine import ServerEngine

        # another command may serve it in another precision: its answers are others
        known_as = context.what["server"]
        seal = context.store.record(context.step.inputs["model"]).get("seal")  # one that was made again is asked again
        scope = json.dumps([context.step.inputs["model"], known_as["known_as"], known_as["called"], seal])
        client = connect(context, str(model), scope=scope).client
        return ServerEngine(client, known_as["called"] or str(model), folder=model, extra=known_as["extra"])
    from mixmerge.evaluate.transformers_engine import TransformersEngine

    made: Engine = context.keep(
        ("engine", model), lambda: TransformersEngine(model, threads=context.threads, device=how["device"])
    )
    return made


def harness(context: StepContext) -> Measurements:
    """Send the candidate through tasks of lm-evaluation-harness."""
    from mixmerge.evaluate.harness import run_harness

    what, how = context.what, context.how
    found = run_harness(
        context.input("model"),
        what["tasks"],
        context.out,
        limit=what["limit"],
        num_fewshot=what["num_fewshot"],
        batch_size=how["batch_size"],
        device=how["device"],
        threads=context.threads,
        seed=what["seed"],
        apply_chat_template=what["apply_chat_template"],
        include_path=Path(how["include_path"]) if how["include_path"] else None,
        progress=context.progress,
    )
    return {"tasks": len(found["tasks"]), "notes": found.get("notes", {})}


def fit_judge(context: StepContext) -> Measurements:
    """Fit the refusal judge on labelled rows, and measure it on topics it was not fitted on."""
    from mixmerge.data.sources import DataSource, read_records
    from mixmerge.evaluate.refusal import fit_refusal, labelled_rows

    if context.what["judge"] == "ngrams":
        return _fit_ngrams(context)
    how, folder, rows = context.how, Path(context.how["folder"]), []
    for code in context.what["languages"]:
        answers, refusals = (read_records(DataSource(path=how[key]), code, folder) for key in ("answers", "refusals"))
        rows += labelled_rows(answers, refusals, lang=code, without=context.what.get("dropped"))
    return fit_refusal(rows, context.out, seed=context.what["seed"])


def _fit_ngrams(context: StepContext) -> Measurements:
    from mixmerge.data.sources import DataSource, read_records
    from mixmerge.evaluate.ngrams import fit_ngrams, labelled_answers

    what, path = context.what, Path(context.how["path"])
    if sha256(path.read_bytes()).hexdigest() != what["rows"]:
        raise DataError("the labelled rows have changed since the plan was made", do="run the same command again")
    records = read_records(DataSource(path=str(path)), None, path.parent)
    return fit_ngrams(
        labelled_answers(records, labels=what["labels"], columns=what["columns"]), context.out, seed=what["seed"]
    )


def judge(context: StepContext) -> Measurements:
    """Judge one candidate's responses to one prompt set; every verdict is a row."""
    from mixmerge.evaluate.generate import read_responses
    from mixmerge.evaluate.judge import pair_up, write_verdicts

    prompts = _prompts(context.how, context.how["fingerprint"])
    opponents = None
    if "opponent" in context.step.inputs:
        opponents = read_responses(context.input("opponent") / "responses.jsonl")
    items = pair_up(prompts, read_responses(context.input("responses") / "responses.jsonl"), opponents)
    judge, verdicts = judge_of(context), []
    # a server is asked everything at once, so that it is never idle; its client tells the progress
    at_once = max(1, len(items)) if "server" in context.how else JUDGED_AT_ONCE
    for start in range(0, len(items), at_once):
        verdicts += judge.judge(items[start : start + at_once])
        context.progress(len(verdicts), len(items))
    write_json(context.out / JUDGE_FILE, judge.describe())
    return write_verdicts(judge, verdicts, context.out / VERDICTS_FILE) | spent(context)


def score(context: StepContext) -> Measurements:
    """Turn all verdicts into scores with intervals, comparisons and an answer."""
    from mixmerge.evaluate.evidence import from_cross_validation
    from mixmerge.evaluate.harness_results import read_harness
    from mixmerge.evaluate.score import score_study

    verdicts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    costs: dict[str, int | None] = {}
    judges: dict[str, list[Path]] = defaultdict(list)
    calibrations: dict[str, dict[str, Any]] = {}
    harness: dict[str, list[Any]] = defaultdict(list)
    for role in context.step.inputs:
        kind, _, rest = role.partition("/")
        folder = context.input(role)
        if kind == "verdicts":
            candidate, prompt_set, judge_name = rest.split("/")
            verdicts[candidate, prompt_set, judge_name] = read_verdicts(folder, prompt_set, context.what["languages"])
            judges[judge_name].append(folder / JUDGE_FILE)
        elif kind == "model":
            costs[rest] = read_record(folder)["measurements"].get("tokens", 0)
        elif kind == "harness":
            harness[rest.partition("/")[0]].append(read_harness(folder))
        elif kind == "judge":
            calibrations[rest] = from_cross_validation(read_record(folder)["measurements"])
    calibrations |= checked_calibrations(context, judges)
    scores = score_study(context.what, verdicts, costs, calibrations, harness)
    write_json(context.out / "scores.json", scores)
    return {"answer": scores["answer"]["sentence"]}


def report(context: StepContext) -> Measurements:
    """Write the page, and the tables beside it."""
    from mixmerge.evaluate.generate import read_responses
    from mixmerge.report.page import write_report
    from mixmerge.report.trainings import read_metrics

    scores = read_json(context.input("score") / "scores.json")
    prompts, responses = [], []
    verdicts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    judges: dict[str, dict[str, Any]] = {}
    merges: dict[str, dict[str, Any]] = {}
    trainings: dict[str, dict[str, Any]] = {}
    for name, how in context.how["sets"].items():
        prompts += [{"set": name, "prompt": prompt} for prompt in _prompts(how, how["fingerprint"])]
    for role in context.step.inputs:
        kind, _, rest = role.partition("/")
        if kind == "responses":
            candidate, prompt_set = rest.split("/")
            rows = read_responses(context.input(role) / "responses.jsonl")
            responses += [row | {"candidate": candidate, "set": prompt_set} for row in rows]
        elif kind == "merge":
            merges[rest] = read_record(context.input(role))["measurements"]
        elif kind == "train":
            folder = context.input(role)
            measured, metrics = read_record(folder)["measurements"], read_metrics(folder / "metrics.jsonl")
            trainings[rest] = {"measurements": measured, "metrics": metrics}
        elif kind == "verdicts":
            candidate, prompt_set, judge_name = rest.split("/")
            judges[judge_name] = read_json(context.input(role) / JUDGE_FILE)
            for row in read_verdicts(context.input(role), prompt_set, scores["languages"]):
                verdicts[candidate, row["prompt_id"]][judge_name] = row["verdict"]
    responses = [row | {"verdicts": verdicts[row["candidate"], row["prompt_id"]]} for row in responses]
    # What a judge measured of itself stands beside what it is.
    trust = {name: told.pop("trust", {}) | told for name, told in judges.items()}
    return write_report(
        context.out,
        study=context.what["study"],
        scores=scores,
        prompts=prompts,
        responses=responses,
        trust=trust,
        merges=merges,
        trainings=trainings,
    )


def _prompts(how: Mapping[str, Any], expected: str) -> list[Any]:
    """The prompts of a set, read again; refused if the files have changed since the plan."""
    from mixmerge.evaluate.prompts import read_prompts
    from mixmerge.evaluate.ready import prompt_reading

    reading = prompt_reading(how["prompt_set"], seed=how["seed"])
    prompts = read_prompts(
        how["set"],
        how["prompt_set"]["path"],
        languages=how["languages"],
        relative_to=Path(how["folder"]),
        limit=how["limit"],
        **reading.arguments,
    )
    if fingerprint([prompt.identity() for prompt in prompts]) != expected:
        raise DataError(
            f"the prompt set '{how['set']}' has changed since the plan was made", do="run the same command again"
        )
    return prompts


CARRY_OUT: Mapping[str, Callable[[StepContext], Measurements]] = {
    "base": make_base,
    "adopt": adopt,
    "mixture": make_mixture,
    "train": train,
    "merge": merge,
    "generate": generate,
    "harness": harness,
    "fit-judge": fit_judge,
    "judge": judge,
    "score": score,
    "report": report,
}
