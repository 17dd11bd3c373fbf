"""One of the processes that share a generation: `python -m mixmerge.run.share ROOT PLAN STEP NUMBER OF`.

What the one that started it needs to know goes to standard output as JSON lines: how far it is, that it is done, or how it
failed. It ends with the one that started it.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from mixmerge.errors import told
from mixmerge.events import take_stdout
from mixmerge.leaving import leave
from mixmerge.run.local import log_file
from mixmerge.run.plans import read_plan
from mixmerge.run.steps import StepContext, generate_part
from mixmerge.run.store import Store
from mixmerge.run.worker import log_to


def main(argv: list[str]) -> int:
    """Answer what falls to process NUMBER of OF; the exit status says whether all is there."""
    root, plan_file, step_id, number, of = argv
    emit = take_stdout()
    step = read_plan(Path(plan_file)).by_id[step_id]
    log = log_file(Path(plan_file), step)
    log_to(log)
    store = Store(Path(root))
    folders = store.begin(step)

    def progress(done: int, total: int) -> None:
        emit("progress", done=done, total=total)

    context = StepContext(step, folders.out, folders.work, store, {}, progress, lambda words: None, log)
    try:
        generate_part(context, int(number), int(of))
    except Exception as error:
        traceback.print_exc()
        emit("failed", **told(error))
        return 1
    emit("done")
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
