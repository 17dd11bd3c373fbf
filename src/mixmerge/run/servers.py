"""Servers that steps ask: given by their address, or started for a model and stopped with the last step that needs them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixmerge.evaluate.client import Client
    from mixmerge.run.steps import StepContext

STARTED_PATIENCE_S = 60.0  # a server of ours that is silent for so long is dead


@dataclass(slots=True)
class Connection:
    """A client, and what has to end with it."""

    client: Client
    stack: ExitStack

    def close(self) -> None:
        """Close the client; then stop the servers that were started for it."""
        self.client.close()
        self.stack.close()


def connect(context: StepContext, model: str, *, scope: str, budget: Mapping[str, Any] | None = None) -> Connection:
    """The connection to the server in the step's `how`, kept for the next steps of this process.

    model: the folder or the name that a server is started with. scope: what answers are known by, whatever the address.

    Raises:
        UserError, StepError: a server that cannot be started.
    """
    server = context.how["server"]

    def made() -> Connection:
        from mixmerge.evaluate.client import Budget, Client, Limits
        from mixmerge.evaluate.serving import serving

        stack = ExitStack()
        urls = [server["url"]] if isinstance(server["url"], str) else list(server["url"] or ())
        limits = {"timeout_s": server["timeout"], "max_concurrency": server["concurrency"]}
        if server["start"] is not None:
            log = context.work / "server.log"
            urls = stack.enter_context(
                serving(
                    server["start"],
                    Path(model),
                    log=log,
                    replicas=server["replicas"],
                    threads=context.threads,
                    ready_seconds=server["ready_within"],
                )
            )
            limits["patience_s"] = STARTED_PATIENCE_S
        client = Client(
            urls,
            answers=context.store.answers,
            scope=scope,
            key_env=server["key"],
            budget=None if budget is None else Budget(**budget),
            limits=Limits(**limits),
        )
        return Connection(client, stack)

    found: Connection = context.keep(("server", model, scope, repr(sorted(server.items()))), made)
    return found
