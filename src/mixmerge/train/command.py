"""Training by a command of the user's own (axolotl, LLaMA-Factory, torchrun of a script): mixture in, model folder out.

The one idea: the contract is files. The command gets the start, the mixture's folder, an empty folder for the model and a
folder that survives a kill, in which it may keep checkpoints; called again, it is to carry on. What it leaves, a whole model
or a PEFT adapter, is brought in as an adopted one is: it has to fit its start, and ends as a whole model folder.

A keeper process (`mixmerge.keeper`) ends the command, and all that it has started, with this process, also when that is killed:
what went on would hold the GPUs and write beside the next run. Should the keeper itself be killed, the next run finds what is
left on this machine by a mark in its environment, and ends it first.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from mixmerge.errors import StepError, UserError, did_you_mean
from mixmerge.model.folder import TOKENIZER_FILES, copy_files

FOLDERS = ("model", "mixture", "out", "work")
GIVEN = (*FOLDERS, "seed", "threads", "launcher")
GRACE_S = (
    4.0  # to end by itself in once it is asked to; less than a runner gives its workers, so that these see its end
)
LOOK_S = 0.1
MARK = "MIXMERGE_COMMAND_IN"  # in the environment of a command and all that it starts: the folder that it works in


def command_fields(command: str, known: Sequence[str]) -> set[str]:
    """The `{names}` in a command, which has to use `{model}`, `{mixture}` and `{out}`; braces are doubled to stand for themselves.

    Raises:
        UserError: a name that is not `known` or GIVEN, quotes that do not close, or one of the three missing.
    """
    found = set[str]()
    try:
        words = shlex.split(command)
        for word in words:
            for _, name, spec, conversion in string.Formatter().parse(word):
                if name is None:
                    continue
                if name not in {*GIVEN, *known} or spec or conversion:
                    do = did_you_mean(name, [*GIVEN, *known])
                    raise UserError(f"the command has an unknown {{{name}}}", do=do)
                found.add(name)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the command cannot be read: {str(error).lower()}", do="double braces that mean themselves"
        ) from error
    for name in ("model", "mixture", "out"):
        if name not in found:
            raise UserError(f"the command does not use {{{name}}}", do="it has to say where it reads and writes")
    return found


def train_by_command(
    command: str,
    model: Path,
    mixture: Path,
    out: Path,
    settings: Mapping[str, Any],
    *,
    work: Path,
    seed: int,
    threads: int,
    launcher: str = "",
) -> dict[str, Any]:
    """Run `command` without a shell and bring the model that it leaves into the folder `out`.

    `settings` fill the other names in it. `{out}` is empty whenever the command starts; `{work}` is kept until the step is
    done. `{launcher}` standing alone becomes as many words as it has. What the command prints goes where this process's goes.

    Returns:
        rows; tokens of the mixture times `epochs`, None where the command is not told `epochs`; adapter, whether it left one;
        command, as it was run.

    Raises:
        StepError: no such program, it ended with an error, or it left NaN or infinite weights.
        ModelError, CheckpointError: what it left is no model that fits its start.
    """
    from mixmerge.model.adopt import adopt, check_adopted

    made, kept = work / "made", work / "kept"
    shutil.rmtree(made, ignore_errors=True)
    for folder in (made, kept):
        folder.mkdir(parents=True, exist_ok=True)
    folders = dict(zip(FOLDERS, (model, mixture, made, kept), strict=True))
    values = {name: str(folder.resolve()) for name, folder in folders.items()}
    values |= {name: str(value) for name, value in settings.items()} | {"seed": str(seed), "threads": str(threads)}
    words: list[str] = []
    for word in shlex.split(command):
        words += shlex.split(launcher) if word == "{launcher}" else [word.format_map(values | {"launcher": launcher})]
    status = _run(words, threads, work)
    if status != 0:
        raise StepError(
            f"the command {how_it_ended(status)}", where=words[0], do="see the log; run it again to carry on"
        )
    _complete(made, model)
    check_adopted(made, model)
    _check_finite(made, words[0])
    manifest = json.loads((mixture / "manifest.json").read_text(encoding="utf-8"))
    adapter = adopt(made, model, out, threads=threads)
    epochs = settings.get("epochs")
    tokens = None if epochs is None else round(manifest["tokens"] * epochs)
    return {"rows": manifest["rows"], "tokens": tokens, "adapter": adapter, "command": shlex.join(words)}


def _run(words: Sequence[str], threads: int, work: Path) -> int:
    """The exit status of the program; it is ended with this process."""
    if shutil.which(words[0]) is None:
        reason = os.strerror(errno.EACCES if Path(words[0]).exists() else errno.ENOENT).lower()
        what = f"the command cannot be started: {reason}"
        raise StepError(what, where=words[0], do="install the program, or give its path")
    mark = str(work.resolve())
    end_left_over(mark)
    keeper = subprocess.Popen(
        [sys.executable, "-m", "mixmerge.keeper", str(GRACE_S), *words],
        env={"OMP_NUM_THREADS": str(threads)} | os.environ | {MARK: mark},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        status = keeper.wait()
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait()
    return 128 - status if status - 128 in signal.valid_signals() else status


def end_left_over(mark: str) -> None:
    """End what bears this mark on this machine, and come back when it is gone: an earlier run's, whose keeper may be at it."""
    patience = GRACE_S
    while left := [process for process in psutil.process_iter() if _marked(process, mark)]:
        for process in psutil.wait_procs(left, timeout=patience)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        patience = LOOK_S


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False


def how_it_ended(status: int) -> str:
    """What the exit status of a process says.

    >>> how_it_ended(3), how_it_ended(-9)
    ('ended with status 3', 'was ended by SIGKILL')
    """
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _complete(made: Path, start: Path) -> None:
    """Give a whole model without a tokenizer that of its start: many trainers leave it out."""
    if (made / "config.json").is_file() and not (made / "tokenizer.json").is_file():
        copy_files(start, made, TOKENIZER_FILES, over=False)


def _check_finite(made: Path, program: str) -> None:
    """Refuse a model or an adapter that diverged: it would be merged, and fail much later."""
    from mixmerge.merge.checkpoint import open_checkpoint, read_header
    from mixmerge.model.adopt import is_adapter
    from mixmerge.model.check import first_unusable

    adapter = made / "adapter_model.safetensors"
    name = first_unusable(read_header(adapter) if is_adapter(made) else open_checkpoint(made).tensors)
    if name is not None:
        what = f"the command left a model whose tensor '{name}' holds NaN or infinity"
        raise StepError(what, where=program, do="see the log; a lower learning rate may help")
