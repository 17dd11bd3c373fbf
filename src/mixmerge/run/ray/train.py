"""A training in several processes on a Ray cluster, by Ray Train: on one node or several, by the training of one process.

Ray Train places the processes, brings them together and, when one or its node dies, starts them all again a few times: the
training carries on from its last whole checkpoint then. What they tell comes by a queue on this node; what they print goes
to files in the training's folder, which all nodes see, and from there to the step's log.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

from mixmerge.errors import reason
from mixmerge.run.ray.address import joined
from mixmerge.train.settings import Devices
from mixmerge.train.team import GRACE_S, Event
from mixmerge.train.together import train_together

FAILURES = 2
PRINTED = "printed-"
LISTEN_S = 0.5


def train_on_ray(
    address: str,
    devices: Devices,
    tell: Callable[[str], None],
    *arguments: Any,
    threads: int,
    device: str,
    **place: Any,
) -> Any:
    """Train as `train_together` does, in processes that Ray Train starts on the cluster; `tell` hears that it did so again.

    Raises:
        UserError, ModelError, DataError, StepError: as `train_together` does.
    """
    with joined(address) as ray:
        gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        # a process has a device of its own, and a share of the threads
        each = {"CPU": max(1, threads // devices.processes) if threads >= devices.processes else 0.1}

        def starting(spec: Path, queue: Queue[Event]) -> Iterator[RayTraining]:
            yield RayTraining(ray, spec, devices, queue, each, tell, gpu=gpu)

        return train_together(
            devices, *arguments, threads=threads, device=device if gpu else "cpu", starting=starting, **place
        )


class RayTraining:
    """A training that Ray Train carries out: what its processes say goes to `queue`, and at last that each has ended."""

    def __init__(
        self,
        ray: Any,
        spec: Path,
        devices: Devices,
        queue: Queue[Event],
        each: dict[str, float],
        tell: Callable[[str], None],
        *,
        gpu: bool,
    ) -> None:
        from ray.util.queue import Queue as RayQueue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        here = On(ray.get_runtime_context().get_node_id(), soft=False)
        self._ray, self._devices, self._queue, self._tell = ray, devices, queue, tell
        self._folder, self._read = spec.parent, dict[Path, int]()
        self._said = RayQueue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._began = 0
        self._lost: Event | None = None
        self._trainer = Thread(target=self._train, args=(spec, each, gpu), daemon=True)
        self._listener = Thread(target=self._listen, daemon=True)
        self._trainer.start()
        self._listener.start()

    def stop(self) -> None:
        """End the processes, if they have not ended."""
        if self._trainer.is_alive():
            self._ray.shutdown()
        for thread in (self._trainer, self._listener):
            thread.join(GRACE_S)

    def _train(self, spec: Path, each: dict[str, float], gpu: bool) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        devices = self._devices
        spreading = "STRICT_SPREAD" if devices.processes == 1 else "PACK"
        try:
            TorchTrainer(
                in_process_of_ray,
                train_loop_config={"spec": str(spec), "said": self._said},
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=devices.size,
                    use_gpu=gpu,
                    resources_per_worker=each | ({"GPU": 1} if gpu else {}),
                    placement_strategy="STRICT_PACK" if devices.nodes == 1 else spreading,
                ),
                run_config=RunConfig(
                    name=spec.parent.name,
                    storage_path=str(spec.parent),
                    failure_config=FailureConfig(max_failures=FAILURES),
                ),
            ).fit()
        except Exception as error:
            died = f"its processes died, {self._began} times: " if self._began > FAILURES else ""
            self._lost = {"rank": 0, "event": "failed", "kind": None, "lost": False, "what": died + reason(error)}

    def _listen(self) -> None:
        from ray.util.queue import Empty

        while True:
            self._bring_printed()
            try:
                told = self._said.get(timeout=LISTEN_S)
            except Empty:
                if self._trainer.is_alive():
                    continue
                break
            except Exception:  # the cluster is left
                break
            if told["event"] == "began":
                self._began += 1
                if self._began > 1:
                    again = f"its processes died; Ray Train started them again ({self._began} of {FAILURES + 1})"
                    sys.stderr.write(again + "\n")
                    self._tell(again)
            else:
                self._queue.put(told)
        self._bring_printed()
        if self._lost is not None:
            self._queue.put(self._lost)
        for rank in range(self._devices.size):
            self._queue.put({"rank": rank, "event": "exit", "status": 0})

    def _bring_printed(self) -> None:
        """Put what the processes have printed since the last time into the log."""
        for file in sorted(self._folder.glob(f"{PRINTED}*")):
            with suppress(OSError), file.open("rb") as stream:
                stream.seek(self._read.get(file, 0))
                sys.stderr.write(stream.read().decode(errors="replace"))
                self._read[file] = stream.tell()


def in_process_of_ray(config: dict[str, Any]) -> None:
    """What Ray Train calls in each process, which is part of the group already."""
    from ray.train import get_context

    from mixmerge.train.rank import failure, train

    rank, said, spec = get_context().get_world_rank(), config["said"], Path(config["spec"])
    with (spec.parent / f"{PRINTED}{rank}").open("ab") as printed:
        for stream in (1, 2):  # until the process ends
            os.dup2(printed.fileno(), stream)

    def emit(event: str, **data: Any) -> None:
        said.put({"rank": rank, "event": event, **data})

    if rank == 0:
        emit("began")
    try:
        measured = train(json.loads(spec.read_text(encoding="utf-8")), rank, emit, joined=True)
    except Exception as error:
        os.write(2, traceback.format_exc().encode(errors="replace"))  # Ray would print it twice
        told = failure(error)
        if told["lost"]:
            raise  # another one died: all start again
        emit("failed", **told)
        return
    emit("done", measured=measured if rank == 0 else None)
