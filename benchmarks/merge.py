"""Merging against the rival and against the disk: wall time, CPU time and memory of whole processes, as ratios.

    python benchmarks/merge.py --rival path/to/venv/bin/mergekit-yaml --work /tmp/bench --methods ties slerp

Makes bf16 Llamas of random weights (a base and three fine-tunes of it), then runs, in turn and `--rounds` times: the
rival, mixmerge, and a plain copy of the same bytes (every input read once, the output written once, fsync). Prints the
medians and their ratios; nothing is asserted. Memory is the peak of anonymous memory: the page cache is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
METHODS: dict[str, dict[str, object]] = {
    "linear": {"models": 3, "parameters": {}},
    "task_arithmetic": {"models": 3, "base": True, "parameters": {}},
    "slerp": {"models": 1, "base": True, "parameters": {"t": 0.4}},
    "nuslerp": {"models": 2, "parameters": {}},
    "multislerp": {"models": 3, "parameters": {}},
    "karcher": {"models": 3, "parameters": {}},
    "model_stock": {"models": 3, "base": True, "parameters": {}},
    "ties": {"models": 3, "base": True, "parameters": {"density": 0.5}},
    "dare_ties": {"models": 3, "base": True, "parameters": {"density": 0.5}},
    "dare_linear": {"models": 3, "base": True, "parameters": {"density": 0.5}},
    "breadcrumbs": {"models": 3, "base": True, "parameters": {"density": 0.5, "gamma": 0.01}},
    "della": {"models": 3, "base": True, "parameters": {"density": 0.5, "epsilon": 0.1}},
    "sce": {"models": 3, "base": True, "parameters": {"select_topk": 0.5}},
    "ramplus_tl": {"models": 3, "base": True, "parameters": {}},
    "arcee_fusion": {"models": 1, "base": True, "parameters": {}},
    "nearswap": {"models": 1, "base": True, "parameters": {"t": 0.001}},
}
RIVAL_OPTIONS = ["--lazy-unpickle", "--allow-crimes", "--no-copy-tokenizer"]
SHARD_BYTES = 500_000_000  # the rival is fastest with shards of this size


@dataclass(frozen=True)
class Run:
    """One process: seconds of wall time and of CPU time, and its peak anonymous memory in bytes."""

    wall: float
    cpu: float
    peak: int


def tensors_of(shape: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    kv = hidden // heads * kv_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (kv, hidden),
            f"{at}self_attn.v_proj.weight": (kv, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_model(folder: Path, shape: str, seed: int, *, sparse: bool) -> None:
    """A base (seed 0) or a fine-tune of it (small changes), bf16; sparse: a file of zeros that takes no room."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True)
    tensors, header, offset = tensors_of(shape), {"__metadata__": {"format": "pt"}}, 0
    for name, dims in tensors.items():
        size = int(np.prod(dims)) * 2
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, dims in enumerate(tensors.values()):
            if sparse:
                break
            draw = np.random.default_rng([0, index])
            values = draw.standard_normal(int(np.prod(dims)), dtype=np.float32) * np.float32(0.02)
            if seed:
                own = np.random.default_rng([seed, index])
                values += own.standard_normal(values.size, dtype=np.float32) * np.float32(0.001)
            bits = values.view(np.uint32)
            file.write(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes())
        file.truncate(8 + len(text) + offset)
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_config(path: Path, method: str, models: Path) -> tuple[Path, list[Path]]:
    """The mergekit YAML of a method, and the models that it reads."""
    spec = METHODS[method]
    used = [models / f"m{i}" for i in range(1, int(str(spec["models"])) + 1)]
    shared, own = dict(spec["parameters"]), {"weight": 0.4}  # type: ignore[call-overload]
    own |= {key: shared.pop(key) for key in ("density", "gamma", "epsilon") if key in shared}
    config = {
        "merge_method": method,
        "models": [{"model": str(m), "parameters": own if method not in NO_WEIGHT else {}} for m in used],
        "parameters": shared,
        "dtype": "bfloat16",
    }
    if spec.get("base"):
        config["base_model"] = str(models / "base")
        used = [models / "base", *used]
    if method == "slerp":
        config["models"] = [{"model": str(m)} for m in used]
    path.write_text(json.dumps(config))  # JSON is YAML
    return path, used


NO_WEIGHT = ("slerp", "karcher", "model_stock", "sce", "ramplus_tl", "arcee_fusion", "nearswap")


def measure(command: list[str]) -> Run:
    """Run a process to its end; its threads and children count."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max(peak, *(int(kilobytes) * 1024 for kilobytes in anonymous), 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    stop.set()
    watcher.join()
    wall = time.monotonic() - began
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{errors[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, peak)


COPY = """
import os, sys
*inputs, out = sys.argv[1:]
for last, path in enumerate(inputs, 1 - len(inputs)):
    source = os.open(path, os.O_RDONLY)
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if last == 0 else None
    buffer = bytearray(8 << 20)
    while size := os.readv(source, [buffer]):
        if target is not None:
            os.write(target, memoryview(buffer)[:size])
    if target is not None:
        os.fsync(target)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs (12 GB for 1.1b)")
    parser.add_argument("--rival", help="mergekit-yaml of its own environment; without it, only we and the copy run")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument(
        "--sparse", action="store_true", help="models of zeros in sparse files: for memory, not for speed"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    models = options.work / f"{options.shape}{'-sparse' if options.sparse else ''}"
    for seed, name in enumerate(["base", "m1", "m2", "m3"]):
        make_model(models / name, options.shape, seed, sparse=options.sparse)
    out = options.work / "out"
    ours = str(Path(sys.executable).parent / "mixmerge")
    print(
        f"{options.shape}, {os.cpu_count()} cores, medians of {options.rounds}; x: times the time of mixmerge / the copy"
    )
    print(
        f"{'method':16} {'rival s':>9} {'ours s':>8} {'ours CPU s':>11} {'copy s':>8} {'rival/ours':>11} {'ours/copy':>10} {'MB':>6}"
    )
    for method in options.methods:
        config, used = write_config(options.work / f"{method}.yml", method, models)
        commands = {
            "ours": [ours, "merge", str(config), str(out)],
            "copy": [sys.executable, "-c", COPY, *(str(m / "model.safetensors") for m in used), str(out)],
        }
        if options.rival:
            shard = ["--out-shard-size", str(SHARD_BYTES)]
            commands = {"rival": [options.rival, str(config), str(out), *RIVAL_OPTIONS, *shard], **commands}
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                runs[name].append(measure(command))
                shutil.rmtree(out) if out.is_dir() else out.unlink()
                os.sync()
        wall = {name: statistics.median(run.wall for run in made) for name, made in runs.items()}
        cpu = statistics.median(run.cpu for run in runs["ours"])
        peak = max(run.peak for run in runs["ours"]) / 1e6
        rival = f"{wall['rival']:9.1f}" if "rival" in wall else f"{'-':>9}"
        ratio = f"{wall['rival'] / wall['ours']:11.1f}" if "rival" in wall else f"{'-':>11}"
        print(
            f"{method:16} {rival} {wall['ours']:8.1f} {cpu:11.1f} {wall['copy']:8.1f} {ratio} "
            f"{wall['ours'] / wall['copy']:10.2f} {peak:6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
