"""Values of `training.extra` that TRL would refuse, found before anything starts.

One idea: TRL itself is asked, by its fields' types and by making its configuration, on no device and into no folder; so what
it will say hours later is said now. It takes seconds to import, which only a recipe with `extra` pays. What depends on the
machine that trains (tf32, compilation) is left to that machine.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mixmerge.errors import UserError, did_you_mean
from mixmerge.train.extra import with_extra
from mixmerge.train.settings import SCHEDULES

MACHINE = ("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode")
# What TRL looks at no earlier than when the training starts, or computes its first loss: words, and the losses they fit.
DIVERGING = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})
UNWEIGHTED = frozenset({"aot", "aot_unpaired"})
WORDS = {
    "loss_type": ("nll", "dft"),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}


def check_values(method: str, extra: Mapping[str, Any], *, scheduler: str, loss: str) -> None:
    """Refuse values of options that TRL has, as `check_extra` knows; `scheduler` and `loss` are the training's own.

    Raises:
        UserError: names the option and says what it takes.
    """
    if not extra:
        return
    kind, hints = _config(method)
    for name, value in extra.items():
        where = f"training.extra.{name}"
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"cannot be {value!r:.60}", where=where, do=f"give {_in_words(hints[name])}") from error
        if name in WORDS and value not in WORDS[name]:
            raise UserError(f"cannot be {value!r:.60}", where=where, do=did_you_mean(value, WORDS[name]))
    _check_loss(loss, extra)
    told = extra.get("lr_scheduler_kwargs")
    if isinstance(told, dict):
        _check_scheduler(scheduler, told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest = {name: value for name, value in extra.items() if name not in MACHINE}
        with_extra(kind, rest, output_dir="unused", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)


def _check_loss(loss: str, extra: Mapping[str, Any]) -> None:
    misfits = {
        "f_divergence_type": extra.get("f_divergence_type", "reverse_kl") != "reverse_kl" and loss not in DIVERGING,
        "use_weighting": bool(extra.get("use_weighting")) and loss in UNWEIGHTED,
    }
    for name, misfit in misfits.items():
        if misfit:
            what = f"{extra[name]!r} does not go with loss: {loss}"
            raise UserError(what, where=f"training.extra.{name}", do="leave it out, or set another loss")


def _check_scheduler(scheduler: str, told: Mapping[str, Any]) -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(SCHEDULES[scheduler])]
    own = {"optimizer", "num_warmup_steps", "num_training_steps"}
    known = [name for name in inspect.signature(function).parameters if name not in own]
    for name in told:
        if name not in known:
            what = f"the scheduler '{scheduler}' does not take '{name}'"
            raise UserError(what, where="training.extra.lr_scheduler_kwargs", do=did_you_mean(name, known))


@cache
def _config(method: str) -> tuple[Any, dict[str, Any]]:
    """TRL's configuration of a method, made to ask for no device, and the types of its fields."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nobody asked for
    from trl import DPOConfig, SFTConfig

    plain: Any = SFTConfig if method == "sft" else DPOConfig
    kind = type(plain.__name__, (plain,), {"device": property(lambda _: torch.device("cpu"))})
    return kind, get_type_hints(plain)


def _in_words(hint: Any) -> str:
    """A type as a person writes its values.

    >>> _in_words(int | None), _in_words(bool), _in_words(dict[str, int] | str | None)
    ('int or null', 'bool', 'dict, str or null')
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = ["null" if kind is type(None) else (get_origin(kind) or kind).__name__ for kind in kinds]
    names.sort(key=lambda name: name == "null")
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
