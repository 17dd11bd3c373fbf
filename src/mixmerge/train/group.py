"""The processes that train one model together, seen from one of them; alone, it is a group of one.

One idea: what differs between the processes is asked here and nowhere else: which one writes, what they add up to, and who
holds which weights. Asking costs no import: torch is there wherever a group is.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixmerge.train.settings import Devices

ADDRESS = "address"  # in the meeting folder: where the first process listens, for those of other machines
WAIT_S = 600.0  # for the others to come: a queue may start them one after another

_devices = Devices()


def join(number: int, devices: Devices, meeting: Path, *, cpu: bool) -> None:
    """Become process `number` of the group, which meets in the folder `meeting`; returns once all are there.

    On one machine they meet by a file and no port: no race for a free one, and nothing listens to the network. On several
    the first listens on a port that the system gives, and writes the address into the folder; MASTER_ADDR, where it is
    set, is the name that the others can reach it by.
    """
    global _devices
    local = {"LOCAL_RANK": number % devices.processes, "LOCAL_WORLD_SIZE": devices.processes}
    places = {"RANK": number, "WORLD_SIZE": devices.size} | local
    os.environ.update({name: str(value) for name, value in places.items()})
    import torch

    meet: Any = torch.distributed
    if not cpu:
        torch.cuda.set_device(local["LOCAL_RANK"])
    if devices.nodes == 1:
        store = meet.FileStore(str(meeting / "file"), devices.size)
    else:
        store = _network_store(meet, number, devices.size, meeting / ADDRESS)
    backend = "gloo" if cpu else "cpu:gloo,cuda:nccl"
    meet.init_process_group(backend, store=store, rank=number, world_size=devices.size)
    _devices = devices


def joined(devices: Devices) -> None:
    """Another has made this process part of the group, with a device of its own (Ray Train)."""
    global _devices
    _devices = devices


def _network_store(meet: Any, number: int, size: int, address: Path) -> Any:
    if number == 0:
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        store = meet.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        partial = address.with_suffix(".part")
        partial.write_text(f"{host} {store.port}", encoding="utf-8")
        partial.replace(address)
        os.environ["MASTER_ADDR"] = host  # accelerate asks for it, and for no more than that it is set
        return store
    until = time.monotonic() + WAIT_S
    while not address.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"the first process has not come within {WAIT_S:.0f} s")
        time.sleep(0.1)
    host, port = address.read_text(encoding="utf-8").split()
    os.environ["MASTER_ADDR"] = host
    return meet.TCPStore(host, int(port), size, is_master=False)


def leave() -> None:
    """Part from the group."""
    global _devices
    _devices = Devices()
    sys.modules["torch"].distributed.destroy_process_group()


def devices() -> Devices:
    """What the training is spread over."""
    return _devices


def size() -> int:
    """How many processes train together."""
    return _devices.size


def rank() -> int:
    """Which of them this is, from 0."""
    return int(sys.modules["torch"].distributed.get_rank()) if size() > 1 else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def total(numbers: Sequence[int]) -> list[int]:
    """The sums over all processes; every one of them has to ask."""
    return [int(value) for value in _summed(numbers, "int64")]


def total_of_floats(numbers: Any) -> Any:
    """The sums over all processes of an array of float64, in its shape; every one of them has to ask."""
    return _summed(numbers, "float64")


def _summed(numbers: Any, dtype: str) -> Any:
    if size() == 1:
        return numbers
    import torch

    sums = torch.tensor(numbers, dtype=getattr(torch, dtype))
    torch.distributed.all_reduce(sums)
    return sums.numpy()


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process through, and the others once it is done."""
    if not first():
        total([0])
    yield
    if size() > 1 and first():
        total([0])


@contextmanager
def first_alone_loads() -> Iterator[None]:
    """Where the weights are shared out, transformers reads them in the first process alone; `share_weights` hands them on."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"} if _devices.fsdp else {}
    os.environ.update(asked)
    yield
    for name in asked:
        del os.environ[name]


def share_weights(trainer: Any) -> None:
    """Have a new trainer share out weights, gradients and moments (FSDP2) once it trains, if this group does.

    accelerate does so for processes with a CUDA device each, and by the same code for others, but does not offer it there:
    so it is told here what kind of group it has.
    """
    if not _devices.fsdp:
        return
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
        state_dict_type="SHARDED_STATE_DICT",
        mixed_precision_policy=half if trainer.args.bf16 else None,
    )
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def whole_weights(model: Any) -> dict[str, Any] | None:
    """All weights of a model on the CPU, by name, in the first process; None where each holds them whole already."""
    if not _devices.fsdp:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return found
