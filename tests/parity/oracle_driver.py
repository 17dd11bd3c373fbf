"""Runs inside the oracle's own Python: merges one configuration per line of standard input, in one process.

A line in: {"config": mergekit's YAML as data, "out": folder, "seed": number}. A line out: {"error": text or null}.
"""

import json
import os
import sys

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # whatever the oracle prints goes to standard error

import torch  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import MergeOptions, run_merge  # noqa: E402

torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    error = None
    try:
        quiet = {"quiet": True, "copy_tokenizer": False, "write_model_card": False}
        options = MergeOptions(random_seed=job["seed"], lora_merge_cache=job["out"] + ".adapters", **quiet)
        torch.manual_seed(job["seed"])
        run_merge(MergeConfiguration.model_validate(job["config"]), job["out"], options)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    answers.write(json.dumps({"error": error}) + "\n")
    answers.flush()
