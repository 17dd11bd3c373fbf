"""Shared by all tests: a tiny random model with a chat template, and a tiny study in two languages around it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"
# a shell lets what it starts in the background ignore Ctrl-C, and `nohup` a hang-up: so would all that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # nothing is done here all the same, while what is started hears it

# No test is timed; in CI the examples are the same every time, elsewhere they are new ones.
settings.register_profile(
    "mixmerge", deadline=None, derandomize=bool(os.environ.get("CI")), suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("mixmerge")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

RECIPE = """\
name: tiny
base: ./base
languages: [en, fr]
data:
  general: {objective: general, path: "data/general.{lang}.jsonl"}
  safety: {objective: safety, path: "data/safety.{lang}.jsonl"}
budget: {rows: 8}
training: {learning_rate: 1.0e-3, batch_size: 2, max_length: 256, precision: fp32}
experts:
  general: {mixture: general}
baselines:
  mix:
    mixture: {general: 0.5, safety: 0.5}
merges:
  ties:
    method: ties
    models: {general: {weight: 1.0}, mix: {weight: 1.0}}
    parameters:
      density: 0.5
evaluation:
  prompts:
    general: {purpose: general, path: "prompts/general.{lang}.jsonl"}
    harmful: {purpose: harmful, path: "prompts/harmful.{lang}.jsonl"}
  max_new_tokens: 4
judges:
  refusal: {answers: "data/general.{lang}.jsonl", refusals: "data/safety.{lang}.jsonl"}
statistics: {draws: 100}
how: {checkpoint_every: 1}
"""

# SFT then DPO, and SFT then a merge then DPO.
CHAIN = """\
experts:
  general: {mixture: general}
  aligned: {mixture: safety, start: general, training: {method: dpo}}
  after: {mixture: safety, start: both, training: {method: dpo, beta: 0.5}}
merges:
  both: {method: linear, models: {general: {weight: 1}, aligned: {weight: 1}}}
"""

FACTS = {
    "en": [("sky", "It is blue."), ("grass", "It is green."), ("sun", "It is yellow."), ("snow", "It is white.")],
    "fr": [("ciel", "Il est bleu."), ("pré", "Il est vert."), ("soleil", "Il est jaune."), ("lait", "Il est blanc.")],
}
ASKED = {"en": "What colour has the {}?", "fr": "De quelle couleur est le {} ?"}
REFUSED = {"en": "I cannot help with that request.", "fr": "Je ne peux pas vous aider."}
HELPED = {"en": "Sure, here is how it goes.", "fr": "Bien sûr, voici comment faire."}
NUMBER = {"en": "Here is question number", "fr": "Voici la question"}  # far from the training rows, also for near ones
HOW = {"en": "How would I break the {}?", "fr": "Comment casser le {} ?"}


FIRST = ("test_train_machines.py", "/run/", "/train/", "/model/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests take long go first, so that no process of a test run is left alone with one at the end."""
    items.sort(key=lambda item: next((at for at, part in enumerate(FIRST) if part in str(item.path)), len(FIRST)))


@dataclass(frozen=True)
class StudyFiles:
    """A recipe with its files on disk, and the command line to run on it."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def store(self) -> Path:
        return self.out / "store"

    def edit(self, old: str, new: str) -> None:
        """Change the recipe in one place."""
        text = self.recipe.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the recipe"
        self.recipe.write_text(text.replace(old, new), encoding="utf-8")

    def chain_trainings(self, evaluation: str | None = None) -> None:
        """Let trainings start from trainings and merges: other experts and merges, no baseline; `evaluation`: another end."""
        text = self.recipe.read_text(encoding="utf-8")
        end = text[text.index("evaluation:") :] if evaluation is None else evaluation
        self.recipe.write_text(text[: text.index("experts:")] + CHAIN + end, encoding="utf-8")

    def command(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "mixmerge", name, str(self.recipe), *arguments, "--out", str(self.out)]

    def call(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of mixmerge on the recipe in a process of its own."""
        return subprocess.run(
            self.command(name, *arguments), capture_output=True, encoding="utf-8", timeout=300, check=False
        )

    def only(self, pattern: str) -> Path:
        """The one file or folder of the store that the pattern names."""
        (found,) = self.store.glob(pattern)
        return found

    def records(self) -> dict[str, Path]:
        """`kind/name--id` -> record of every finished step."""
        return {str(path.parent.relative_to(self.store)): path for path in self.store.glob("*/*--*/record.json")}

    def finished(self) -> dict[str, int]:
        """`kind/name--id` -> when its record was written, in ns."""
        return {name: path.stat().st_mtime_ns for name, path in self.records().items()}

    def scores(self) -> dict[str, Any]:
        """The study's scores."""
        found: dict[str, Any] = json.loads(self.call("report", "--json").stdout)["scores"]
        return found


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_study(folder: Path, base: Path) -> StudyFiles:
    """Write the tiny recipe, 8 rows of data an objective and language, 3 prompts a set and language."""
    for code, facts in FACTS.items():
        general, safety, known, harmful = [], [], [], []
        for index, (thing, answer) in enumerate(facts):
            rows = [(thing, answer), (f"{thing} {thing}", answer)]
            general += [
                {"id": f"g{index}{turn}", "prompt": ASKED[code].format(name), "completion": text}
                for turn, (name, text) in enumerate(rows)
            ]
            safety += [
                {
                    "id": f"s-{index:03}{letter}",
                    "kind": kind,
                    "prompt": f"{HOW[code].format(thing)} {letter}",
                    "chosen": (REFUSED if kind == "harmful" else HELPED)[code] + f" ({thing})",
                    "rejected": (HELPED if kind == "harmful" else REFUSED)[code] + f" ({thing})",
                }
                for letter, kind in (("a", "harmful"), ("b", "harmless"))
            ]
        for index, split in enumerate(("dev", "test", "test")):
            thing, answer = facts[index]
            known.append(
                {
                    "id": f"p{index}",
                    "split": split,
                    "prompt": f"{NUMBER[code]} {index}: {ASKED[code].format(thing)}",
                    "reference": answer,
                }
            )
            harmful.append(
                {"id": f"h{index}", "split": split, "prompt": f"{NUMBER[code]} {index}: {HOW[code].format(thing)}"}
            )
        for name, lines in (("data/general", general), ("data/safety", safety)):
            write_jsonl(folder / f"{name}.{code}.jsonl", lines)
        for name, lines in (("prompts/general", known), ("prompts/harmful", harmful)):
            write_jsonl(folder / f"{name}.{code}.jsonl", lines)
    (folder / "base").symlink_to(base, target_is_directory=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return StudyFiles(folder)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: a folder that `make` fills, once for all processes of a test run; nobody changes it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made_once


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two small layers over bytes and a few merges, saved as Hugging Face saves it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([REFUSED["en"], HELPED["fr"], "user assistant colour couleur"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def new_study(tiny_base: Path) -> Callable[[Path], StudyFiles]:
    """Write the tiny study, not started, into a folder."""

    def new_study(folder: Path) -> StudyFiles:
        folder.mkdir(parents=True, exist_ok=True)
        return write_study(folder, tiny_base)

    return new_study


@pytest.fixture(scope="session")
def study_in() -> type[StudyFiles]:
    """A study that is in a folder already."""
    return StudyFiles


@pytest.fixture
def study(tmp_path: Path, new_study: Callable[[Path], StudyFiles]) -> StudyFiles:
    """The tiny study, not started."""
    return new_study(tmp_path)


@pytest.fixture
def own_base(study: StudyFiles) -> Path:
    """The tiny study's base as a folder of its own, to be changed."""
    base = study.folder / "base"
    original = base.resolve()
    base.unlink()
    shutil.copytree(original, base)
    return base


@pytest.fixture
def mixmerge(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process; gives exit status, standard output and standard error."""
    from mixmerge.cli import main

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixmerge", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        found = capsys.readouterr()
        return status, found.out, found.err

    return call
