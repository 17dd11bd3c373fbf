"""Benchmarks of lm-evaluation-harness on a model folder: a result file of the whole, and a row for every document.

The harness runs in this process, on a model that our loader opened: its own would draw missing weights at random, and only
here can NaN be seen, which the harness ranks as the best answer. So it seeds the global generators: call it in a step's
process. Documents' rows come first and results.json last, each whole or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmerge.errors import DataError, MixmergeError, ModelError, StepError, UserError, reason
from mixmerge.evaluate.harness_results import write_harness
from mixmerge.evaluate.harness_tasks import TaskDefinition, check_tasks, identity
from mixmerge.model.loading import check_loadable, load_pretrained, torch_device

Progress = Callable[[int, int], None] | None
DRAWS = 1000  # of the harness' own bootstrap, for metrics whose standard error has no formula


def run_harness(
    model: Path,
    tasks: Sequence[str],
    out: Path,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    apply_chat_template: bool = False,
    include_path: Path | None = None,
    progress: Progress = None,
) -> dict[str, Any]:
    """Run tasks, groups or tags by name on a model folder; writes results.json and samples.jsonl into `out`.

    limit: the first documents of each task only. num_fewshot: for tasks that do not fix it at 0, as the harness has it.
    progress: (requests done, requests known); the second grows when another kind of request begins. Log-probabilities
    are taken in float32 also for bfloat16 weights (the harness' default rounds them, and ties go to the first choice).

    Returns what results.json holds: settings; identity (as `harness_tasks.identity`); tasks, name -> version,
    num_fewshot, documents in all, sha256 of the resolved definition, metrics; groups, name -> members, metrics; samples,
    the rows' number and sha256; notes, what the harness warned of, with how often. Metrics: name -> `Score` as a
    mapping; a filter other than the default is part of the name: `exact_match@strict-match`.

    Raises:
        UserError: as check_tasks; one task named twice through groups; a package that a task needs is missing.
        DataError: a definition that cannot be read, or a data set that cannot be had.
        ModelError: a model that cannot be loaded, has no chat template where one is asked for, or gives NaN.
        StepError: the harness failed, or a metric has no finite value.
        CheckpointError: a file that cannot be written.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size {batch_size} and limit {limit} must be positive")
    model, out = model.resolve(), out.resolve()
    include_path = None if include_path is None else include_path.resolve()
    definitions = check_tasks(tasks, include_path)
    with _listening() as heard, contextlib.chdir(include_path or Path.cwd()):
        loaded = _load_tasks(tasks, definitions, include_path)
        for name in sorted(set(loaded["tasks"]) - set(definitions)):
            if "::" not in name:  # a task that a group defines within itself
                heard.note(f"{name}: no definition has this name, so none counts for the results' identity")
        for task in loaded["tasks"].values():
            _settle(task, num_fewshot, seed, heard)
        lm = _language_model(model, batch_size, device, threads, apply_chat_template, progress)
        heard.clear_setup()
        with _harness_errors(tasks):
            found = _evaluate(lm, loaded, limit, seed, apply_chat_template)
    settings = {
        "tasks": list(tasks),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "seed": seed,
        "apply_chat_template": apply_chat_template,
        "softmax": "float32",
    }
    head = {"settings": settings, "identity": identity(definitions), "notes": heard.notes()}
    return write_harness(out, head, found)


def _load_tasks(
    tasks: Sequence[str], definitions: Mapping[str, TaskDefinition], include_path: Path | None
) -> dict[str, Any]:
    """The harness' own tasks and groups with their data.

    Raises:
        UserError: a package that a task's functions need is missing; one task named twice.
        DataError: a data set that cannot be had.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    own = all(definition.own for definition in definitions.values())
    manager = TaskManager(include_defaults=not own, include_path=None if include_path is None else str(include_path))
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    found: list[Any] = []
    try:
        for name in tasks:
            try:
                loaded = manager.load([name])
            except ImportError as error:
                what = f"the task's functions cannot be imported: {reason(error)}"
                do = f"pip install {error.name}, or what the task's page asks for" if error.name else None
                raise UserError(what, where=name, do=do) from error
            except Exception as error:  # of `datasets`, of its HTTP client, of the task's own functions
                hubs = sorted({hub for each in definitions.values() for hub in each.hub})
                do = f"check that the Hub has {', '.join(hubs[:3])} and can be reached" if hubs else None
                raise DataError(f"cannot load the task or its data set: {reason(error)}", where=name, do=do) from error
            found += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
        everything: dict[str, Any] = manager.load(found)
    except ValueError as error:
        if isinstance(error, MixmergeError):
            raise
        raise UserError(reason(error), where=", ".join(tasks), do="name each task once") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    return everything


def _settle(task: Any, num_fewshot: int | None, seed: int, heard: _Heard) -> None:
    """Examples in the prompt, as `lm_eval.simple_evaluate` settles them: a task that says 0 keeps 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 and num_fewshot != 0:
        heard.note(f"{task.task_name}: fixed at 0 examples in the prompt, num_fewshot is not used")
    elif num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def _evaluate(lm: Any, loaded: Mapping[str, Any], limit: int | None, seed: int, chat: bool) -> dict[str, Any]:
    """`lm_eval.evaluate` and not `simple_evaluate`, which spends seconds on a description of the machine."""
    import random

    import lm_eval
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    found: dict[str, Any] = lm_eval.evaluate(
        lm,
        loaded,
        limit=limit,
        bootstrap_iters=DRAWS,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    return found


def _language_model(
    model: Path, batch_size: int, device: str, threads: int | None, chat: bool, progress: Progress
) -> Any:
    """The harness' model for transformers around a network of ours, that counts requests and refuses logits that are no numbers."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    device = str(torch_device(device, threads))
    check_loadable(model)
    tokenizer = load_pretrained("AutoTokenizer", model)
    if chat and not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template", where=str(model), do="run without apply_chat_template")
    network = load_pretrained("AutoModelForCausalLM", model, dtype="auto", use_safetensors=True)
    if device == "cpu" and network.dtype == torch.float16:
        network = network.float()
    network.to(device).eval()
    # a candidate's own temperature or penalty must not decide a comparison; where its answers end must stay
    named = network.generation_config.eos_token_id
    ends = {named} if isinstance(named, int) else set(named or ())
    ends.add(tokenizer.eos_token_id)
    network.generation_config = transformers.GenerationConfig(eos_token_id=sorted(ends - {None}) or None)

    def refuse_broken(numbers: Any) -> Any:
        # a token may be ruled out (-inf), but the best of each position is a number, or log-probabilities are none
        if not bool(numbers.amax(-1).isfinite().all()):
            raise ModelError("the model's logits are not finite", where=str(model), do=_broken_weights(network))
        return numbers

    class Counted(HFLM):  # type: ignore[misc]
        """Requests done and known, over all kinds of requests."""

        done = known = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.known += len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.known += len(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.known += len(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, *arguments: Any, **named: Any) -> Any:
            return refuse_broken(super()._model_call(*arguments, **named))

        def _model_generate(self, *arguments: Any, **named: Any) -> Any:
            check = transformers.LogitsProcessorList([lambda ids, numbers: refuse_broken(numbers)])
            with torch.inference_mode():
                return super()._model_generate(*arguments, logits_processor=check, **named)

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            self.done += 1
            if progress:
                progress(self.done, self.known)

    lm: Any = Counted(pretrained=network, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    lm.set_cache_hook(lm)  # told of every answer
    return lm


def _broken_weights(network: Any) -> str:
    broken = [name for name, weight in network.named_parameters() if not bool(weight.isfinite().all())]
    if not broken:
        return "its weights are finite: they overflow on the way; check how it was made"
    return f"weights that are not finite: {len(broken)}, '{broken[0]}' among them"


@contextlib.contextmanager
def _harness_errors(tasks: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except MixmergeError:
        raise
    except Exception as error:  # of the harness, or of a task's own functions
        raise StepError(f"lm-evaluation-harness failed: {reason(error)}", where=", ".join(tasks)) from error


class _Heard(logging.Handler):
    """What the harness warns of; warnings that differ in numbers only are one, with how often it came."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first: dict[str, str] = {}
        self.times: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.note(record.getMessage())

    def note(self, text: str) -> None:
        key = re.sub(r"\d+", "#", text)
        self.first.setdefault(key, " ".join(text.split()))
        self.times[key] += 1

    def clear_setup(self) -> None:
        """Forget that the harness was given a network that is open already: it always is."""
        for key in [key for key in self.first if "`pretrained`" in key]:
            del self.first[key], self.times[key]

    def notes(self) -> list[dict[str, Any]]:
        return [{"text": text, "times": self.times[key]} for key, text in self.first.items()]


@contextlib.contextmanager
def _listening() -> Iterator[_Heard]:
    """The harness' log in a list instead of on the terminal, no bars, and no processes forked off torch's."""
    import tqdm

    log, heard = logging.getLogger("lm_eval"), _Heard()
    level, spread, bars = log.level, log.propagate, tqdm.tqdm.__init__
    alone = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # read where it estimates standard errors
    log.setLevel(logging.WARNING)
    log.propagate = False
    log.addHandler(heard)

    def no_bar(self: Any, *arguments: Any, **named: Any) -> None:
        bars(self, *arguments, **named | {"disable": True})

    tqdm.tqdm.__init__ = no_bar
    try:
        with warnings.catch_warnings():
            for kind in (UserWarning, RuntimeWarning):  # of the libraries that the tasks' metrics call
                warnings.simplefilter("always", kind)
            warnings.showwarning = lambda message, *_, **__: heard.note(str(message))
            yield heard
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        if alone is not None:
            os.environ["DISABLE_MULTIPROC"] = alone
        tqdm.tqdm.__init__ = bars
        log.removeHandler(heard)
        log.setLevel(level)
        log.propagate = spread
