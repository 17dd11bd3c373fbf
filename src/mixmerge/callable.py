"""Packages that are also the function they are named after: `mixmerge.plan`, `mixmerge.run`, `mixmerge.merge`.

Importing a subpackage puts it over a function of the same name in its parent, so the package itself has to be callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package whose call is the call of the function that has its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*args, **kwargs)


def make_callable(name: str) -> None:
    """Let the package `name` be called as its function of the same name."""
    sys.modules[name].__class__ = CallablePackage
