"""Servers that steps ask: given by their address, or started for a model and stopped with the last step that needs them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mixmerge.errors import MixmergeError, StepError

if TYPE_CHECKING:
    from mixmerge.evaluate.client import Client
    from mixmerge.plan.graph import Step
    from mixmerge.run.steps import StepContext

STARTED_PATIENCE_S = 60.0  # beyond the time that one answer may take


@dataclass(slots=True)
class Connection:
    """A client, and what has to end with it."""

    client: Client
    stack: ExitStack

    def close(self) -> None:
        """Close the client; then stop the servers that were started for it."""
        self.client.close()
        self.stack.close()

    def fail(self, error: MixmergeError) -> None:
        """Close what an error of ours has ended.

        Raises:
            StepError: a server that was started for it is dead, which is why; with its last words.
        """
        self.client.close()
        self.stack.__exit__(type(error), error, error.__traceback__)


def connect(
    context: StepContext, model: str, *, scope: str, name: str | None = None, budget: Mapping[str, Any] | None = None
) -> Connection:
    """The connection to the server in the step's `how`, kept for the next steps of this process.

    model: the folder or the name that a server is started with. scope: what answers are known by, whatever the address.
    name: who is named where the budget is spent.

    Raises:
        UserError, StepError: a server that cannot be started.
    """
    server = context.how["server"]

    def made() -> Connection:
        from mixmerge.evaluate.client import Budget, Client, Limits
        from mixmerge.evaluate.serving import serving

        urls = server["urls"]
        limits = {"timeout_s": server["timeout"], "max_concurrency": server["concurrency"]}
        started = server["start"] is not None
        with ExitStack() as stack:
            if started:
                urls = stack.enter_context(
                    serving(
                        server["start"],
                        Path(model),
                        # beside the log of the first step that needs it: it outlives that step, as the server does
                        log=context.log.with_name(f"{context.log.stem}.server.log"),
                        replicas=server["replicas"],
                        threads=context.threads,
                        ready_seconds=server["ready_within"],
                    )
                )
                limits["patience_s"] = server["timeout"] + STARTED_PATIENCE_S
            client = Client(
                urls,
                answers=context.store.answers,
                scope=scope,
                key_env=server["key"],
                budget=None if budget is None else Budget(**budget),
                limits=Limits(**limits),
                # one of ours does not come back; where nothing ever answered, the address is wrong
                gone=lambda: refused(urls) and (started or not client.stats()["answered"]),
                name=name,
            )
            return Connection(client, stack.pop_all())

    key = ("server", model, scope, name, repr(sorted(server.items())), repr(sorted((budget or {}).items())))
    found: Connection = context.keep(key, made)
    found.client.tell = context.tell
    return found


def servers_of(step: Step) -> tuple[str, ...]:
    """What the step's server is known by within a run: the model that it serves, and its address with its key, if given."""
    if "server" not in step.how:
        return ()
    urls, key = step.how["server"]["urls"], step.how["server"]["key"]
    return (step.group, f"{', '.join(sorted(urls))} by {key}") if urls else (step.group,)


def told_of(step: Step, error: MixmergeError | None) -> dict[str, Any]:
    """What other steps can learn from a step's error: `server`, which is of no use to them, or `budget`, which is spent."""
    from mixmerge.evaluate.limits import BudgetError, NoKeyError, ServerError

    if isinstance(error, BudgetError):
        return {"budget": {"whose": error.where, **asdict(error.shortage)}}
    if not (known := servers_of(step)) or not isinstance(error, ServerError | NoKeyError | StepError):
        return {}
    of_model = isinstance(error, StepError) or (isinstance(error, ServerError) and error.of_model)
    return {"server": known[0] if of_model else known[-1]}


def refused(urls: Sequence[str]) -> bool:
    """Whether nothing listens at any of the addresses: a server that is only busy lets a connection wait."""
    for url in urls:
        parts = urlsplit(url)
        with socket.socket() as trial:
            trial.settimeout(1.0)
            try:
                trial.connect((parts.hostname, parts.port))
            except ConnectionRefusedError:
                continue
            except OSError:
                return False
            return False
    return True
