"""A training in several processes on a Ray cluster, by Ray Train: `python -m mixmerge.run.ray.train ADDRESS SPEC`.

It is a starter as `mixmerge.train.together` has them: Ray Train places the processes, brings them together and, when one or
its node dies, starts them all again a few times: the training carries on from its last whole checkpoint then. What they tell
comes by a queue on this node and goes on to standard output; what they print goes to files in the training's folder, which
all nodes see, and from there to the step's log. This is a process of its own because Ray Train can be ended early in no
better way: to leave the cluster while one of its threads still asks Ray for something may hang, or end the process at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from mixmerge.errors import StepError, reason, told
from mixmerge.events import Emit, take_stdout
from mixmerge.leaving import leave
from mixmerge.run.ray.address import joined
from mixmerge.run.ray.rank import PRINTED, in_process_of_ray
from mixmerge.train.settings import Devices
from mixmerge.train.together import KilledError, Starter, train_together

FAILURES = 2
LISTEN_S = 0.5


def train_on_ray(address: str, devices: Devices, *arguments: Any, **place: Any) -> dict[str, Any]:
    """Train as `train_together` does, in processes that Ray Train starts on the cluster at that address.

    When the starter is killed so is this process, which the backend starts again as it does any other.

    Raises:
        UserError, ModelError, DataError, StepError: as `train_together` does.
    """
    starter = Starter("Ray Train", [sys.executable, "-m", "mixmerge.run.ray.train", address])
    try:
        return train_together(devices, *arguments, starter=starter, **place)
    except KilledError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        raise


def main(argv: list[str]) -> int:
    """Have the processes train that the file SPEC tells of, on the cluster at ADDRESS."""
    address, spec = argv[0], Path(argv[1])
    emit = take_stdout()
    try:
        with joined(address) as ray:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's would have to wait until Python is called
            _train(ray, spec, emit)
    except Exception as error:
        traceback.print_exc()
        emit("failed", rank=None, lost=False, **told(error))
        return 1
    return 0


def _train(ray: Any, spec: Path, emit: Emit) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    given = json.loads(spec.read_text(encoding="utf-8"))
    devices, threads = Devices(**given["devices"]), given["cores"]
    gpu = given["device"] != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
    # a process has a device of its own, and a share of the threads
    each = {"CPU": max(1, threads // devices.processes) if threads >= devices.processes else 0.1}
    spreading = "STRICT_SPREAD" if devices.processes == 1 else "PACK"
    here = On(ray.get_runtime_context().get_node_id(), soft=False)
    said = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    listener = _Listener(said, spec.parent, emit)
    try:
        TorchTrainer(
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
        ).fit()
    except Exception as error:
        died = f"its processes died, {listener.began} times: " if listener.began > FAILURES else ""
        raise StepError(died + reason(error), do="see the log") from error
    finally:
        listener.end()
    for rank in range(devices.size):
        emit("exit", rank=rank, status=0)


class _Listener:
    """Passes on what the processes say and print, until `end`."""

    def __init__(self, said: Any, folder: Path, emit: Emit) -> None:
        self.began = 0  # so many times have they been started
        self._said, self._folder, self._emit = said, folder, emit
        self._read = dict[Path, int]()
        self._ended = Event()
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Pass on the rest, once the processes have ended."""
        self._ended.set()
        self._thread.join()

    def _listen(self) -> None:
        from ray.util.queue import Empty

        while True:
            try:
                said = self._said.get(timeout=LISTEN_S)
            except Empty:
                said = None
            except Exception:  # the cluster is gone
                break
            self._bring_printed()  # what led to a failure comes before it
            if said is None:
                if self._ended.is_set():
                    break
            elif said["event"] == "began":
                self.began += 1
                if self.began > 1:
                    again = f"its processes died; Ray Train started them again ({self.began} of {FAILURES + 1})"
                    sys.stderr.write(again + "\n")
                    self._emit("note", rank=None, text=again)
            else:
                self._emit(**said)

    def _bring_printed(self) -> None:
        """Put what the processes have printed since the last time into the log."""
        for file in sorted(self._folder.glob(f"{PRINTED}*")):
            with suppress(OSError), file.open("rb") as stream:
                stream.seek(self._read.get(file, 0))
                sys.stderr.write(stream.read().decode(errors="replace"))
                self._read[file] = stream.tell()
        sys.stderr.flush()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
