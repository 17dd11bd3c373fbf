"""The error tree: every error a person can meet says where, what, and what to do, on one line.

A `UserError` is a mistake in what the user gave (recipe, data, arguments): the command line prints it
without a traceback and exits 2. Any other `MixmergeError` is something that went wrong outside our code
while working (a corrupt file, a full disk): printed likewise, exit 1. Everything else is a bug, exit 70.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Mapping
from typing import Any, Self

from mixmerge.terminal import visible

MOST_NAMES = 24  # a longer list is cut: an error is one line
FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: no space left for this user
LONGEST_REASON = 200  # characters of another library's message
FREE_SOME = (
    "free some (`mixmerge gc RECIPE`, with the same --out, lists what no recipe needs) and run the same command again"
)


class MixmergeError(Exception):
    """Something a person can mend; `str()` gives `where: what; do` on one line."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        self.what, self.where, self.do = what, where, do
        text = what if where is None else f"{where}: {what}"
        super().__init__(visible(" ".join((text if do is None else f"{text}; {do}").split())))

    def again(self, *, what: str | None = None, where: str | None = None, do: str | None = None) -> Self:
        """The same error with other words in one of its parts."""
        return type(self)(what or self.what, where=where or self.where, do=do or self.do)

    def within(self, place: str) -> Self:
        """The same error with the place around it in front: the recipe's line that names a file."""
        return self.again(where=place if self.where is None else f"{place}: {self.where}")


class UserError(MixmergeError, ValueError):
    """A mistake in what the user gave; nothing was started."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe or merge configuration that does not hold together; `where` is `file:line: key.path`."""


class DataError(UserError):
    """A data file or row that cannot be used; `where` is `file:row`."""


class ModelError(UserError):
    """A model folder that cannot be used: missing file, wrong shape, unknown format."""


class CheckpointError(MixmergeError, OSError):
    """A file that is damaged or cannot be read or written whole (corrupt safetensors, full disk)."""


class FullDiskError(CheckpointError):
    """No space left: every other step would meet it too."""


class StepError(MixmergeError, RuntimeError):
    """A step of a study that failed; what was finished before it is kept."""


def reason(error: BaseException) -> str:
    """What another library's error says, in its first line.

    >>> reason(ValueError("cannot read it from one of:" + chr(10) + "(1) a file"))
    'ValueError: cannot read it from one of'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(":;,.") if lines else "no reason given"
    short = text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
    return f"{type(error).__name__}: {short}"


def told(error: Exception) -> dict[str, Any]:
    """An error in words that can be sent to another process, which says it again (`retold`); of a bug no `kind`."""
    if not isinstance(error, MixmergeError):
        return {"kind": None, "what": reason(error)}
    return {"kind": type(error).__name__, "what": error.what, "where": error.where, "do": error.do}


def retold(said: Mapping[str, Any], who: str) -> MixmergeError:
    """The error that a process told; where no person can mend it, or a step failed, it names the process, `who`."""
    if said["kind"] is None:
        return StepError(said["what"], where=who, do="see the log")
    kind: type[MixmergeError] = globals()[said["kind"]]
    error = kind(said["what"], where=said["where"], do=said["do"])
    return error.within(who) if isinstance(error, StepError) else error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Advice for an unknown name: the nearest known one, or the list of all.

    >>> did_you_mean("tie", ["linear", "ties"])
    "did you mean 'ties'?"
    """
    names = sorted(str(k) for k in known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMES else ""
    return f"known: {', '.join(names[:MOST_NAMES])}{more}"
