"""Where steps run, by name; what a backend brings is imported by whoever asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixmerge.errors import UserError, did_you_mean
from mixmerge.plan.graph import Plan
from mixmerge.run.backend import Backend

BACKENDS = ("local", "ray")


def checked(name: str, address: str | None) -> None:
    """Refuse a backend that there is none of, and an address that nobody would read.

    Raises:
        UserError: says what was meant.
    """
    if name not in BACKENDS:
        raise UserError(f"no backend '{name}'", where="--backend", do=did_you_mean(name, BACKENDS))
    if address is not None and not address.strip():
        raise UserError("the address is empty", where="--address", do="give host:port, or leave it out")
    if address is not None and name != "ray":
        raise UserError("the local backend joins no cluster", where="--address", do="add --backend ray")


@contextmanager
def backend_for(
    name: str, plan: Plan, out: Path, *, address: str | None, jobs: int | None, threads: int | None
) -> Iterator[Backend | None]:
    """The backend of a run of a plan; None for the local one, which the run makes itself.

    Raises:
        UserError: there is none of that name, or it cannot be had.
    """
    checked(name, address)
    if name == "local":
        yield None
        return
    from mixmerge.run.ray.backend import RayBackend
    from mixmerge.run.runner import Study
    from mixmerge.run.store import Store

    backend = RayBackend(Store(out), Study(out, plan.study).file_of(plan), address=address, jobs=jobs, threads=threads)
    try:
        yield backend
    finally:
        backend.close()
