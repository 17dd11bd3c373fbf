"""A training in several processes on a Ray cluster, by Ray Train: `python -m mixmerge.run.ray.train ADDRESS SPEC` starts it.

Ray Train places the processes, brings them together and, when one or its node dies, starts them all again a few times: the
training carries on from its last whole checkpoint then. What they tell comes by a queue on this node.

The starter is a process of its own, which may be ended at any moment: a process that leaves its cluster while one of its
threads still asks Ray for something may hang, or be ended by Ray at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

from mixmerge.errors import StepError, reason, told
from mixmerge.events import Emit, take_stdout
from mixmerge.leaving import leave
from mixmerge.run.ray.address import joined
from mixmerge.run.ray.rank import in_process_of_ray
from mixmerge.train.settings import Devices
from mixmerge.train.team import GRACE_S
from mixmerge.train.together import KilledError, Starter, train_together

FAILURES = 2
LISTEN_S = 0.5


def train_on_ray(
    address: str, devices: Devices, *arguments: Any, tell: Callable[[str], None], **place: Any
) -> dict[str, Any]:
    """Train as `train_together` does, in processes that Ray Train starts on the cluster at that address.

    Where a signal ended the starter one ends this process too, which the backend starts again as it does any other.

    Raises:
        UserError, ModelError, DataError, StepError: as `train_together` does.
    """
    starter = Starter("Ray Train", [sys.executable, "-m", "mixmerge.run.ray.train", address])
    try:
        return train_together(devices, *arguments, starter=starter, tell=tell, **place)
    except KilledError as error:
        sys.stderr.write(f"{error}\n")
        tell(str(error))
        os.kill(os.getpid(), signal.SIGTERM)
        raise


def main(argv: list[str]) -> int:
    """Have the processes train that the file SPEC tells of, on the cluster at ADDRESS."""
    address, spec = argv[0], Path(argv[1])
    emit = take_stdout()
    try:
        with joined(address) as ray:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's would have to wait until Python is called
            return _train(ray, spec, emit)
    except Exception as error:
        return _fail(error, emit)


def _fail(error: Exception, emit: Emit) -> int:
    traceback.print_exception(error)
    emit("failed", rank=None, lost=False, **told(error))
    return 1


def _train(ray: Any, spec: Path, emit: Emit) -> int:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    given = json.loads(spec.read_text(encoding="utf-8"))
    devices, cores = Devices(**given["devices"]), given["cores"]
    gpu = given["device"] != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
    # a process has a device of its own, and a share of the cores
    each = {"CPU": max(1, cores // devices.processes) if cores >= devices.processes else 0.1}
    spreading = "STRICT_SPREAD" if devices.processes == 1 else "PACK"
    here = On(ray.get_runtime_context().get_node_id(), soft=False)
    said = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    trainer = TorchTrainer(
        in_process_of_ray,
        train_loop_config={"spec": str(spec), "said": said, "device": given["device"] if gpu else "cpu"},
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
    )
    listener = _Listener(said, emit)
    try:
        trainer.fit()
    except Exception as error:
        listener.end()
        died = f"its processes died, {listener.began} times: " if listener.began > FAILURES else ""
        failed = StepError(died + reason(error), do="see the log")
        failed.__cause__ = error
        return _fail(failed, emit)  # before the cluster is left
    listener.end()
    for rank in range(devices.size):
        emit("exit", rank=rank, status=0)
    return 0


class _Listener:
    """Passes on what the processes say, until `end`."""

    def __init__(self, said: Any, emit: Emit) -> None:
        self.began = 0  # so many times have they been started
        self._said, self._emit = said, emit
        self._ended = Event()
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Pass on the rest, once the processes have ended."""
        self._ended.set()
        self._thread.join(GRACE_S)

    def _listen(self) -> None:
        try:
            self._pass_on()
        except Exception:  # a training that is not heard any more is of no use
            traceback.print_exc()
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGTERM)

    def _pass_on(self) -> None:
        from ray.util.queue import Empty

        while True:
            try:
                said = self._said.get(timeout=LISTEN_S)
            except Empty:
                if self._ended.is_set():
                    break
                continue
            if said["event"] != "began":
                self._emit(**said)
                continue
            self.began += 1
            if self.began > 1:
                again = f"its processes died; Ray Train started them again ({self.began} of {FAILURES + 1})"
                sys.stderr.write(again + "\n")
                self._emit("note", rank=None, text=again)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
