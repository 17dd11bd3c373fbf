"""What a training here costs beside TRL called as its documentation shows: seconds of the training loop on the same rows.

    python benchmarks/training.py --work /tmp/bench [--model FOLDER] [--rounds 3]

Makes a random Llama of 12 M weights with a tokenizer of its own (or takes `--model`), and a mixture from the starter data in
six languages. Runs, in turn and `--rounds` times, `SFTTrainer` on prompt/completion rows, and `train_sft`; once with rows as
they are and once with rows of one length, where batches of like length save nothing. Then three LoRA experts: in a process
each, and in one process. Prints medians and ratios; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH, LENGTH = 8, 256
LANGUAGES = ("en", "fr", "hi", "es", "ru", "ar")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(folder: Path, texts: list[str]) -> None:
    """A random Llama with a byte-level BPE of 8,000 tokens learnt from the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=8000, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        pad_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def rows(equal: bool) -> list[dict]:
    """Prompt and completion messages from the starter data; with `equal` one row many times."""
    starter = Path(__file__).resolve().parents[1] / "src" / "mixmerge" / "starter" / "train"
    found = []
    for code in LANGUAGES:
        lines = (starter / f"general.{code}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines[:16]:
            row = json.loads(line)
            prompt = [{"role": "user", "content": row["prompt"]}]
            answer = [{"role": "assistant", "content": row["completion"]}]
            found.append(
                {
                    "id": f"{code}/{row['id']}",
                    "objective": "general",
                    "lang": code,
                    "prompt": prompt,
                    "completion": answer,
                }
            )
    return [found[0] | {"id": str(i)} for i in range(len(found))] if equal else found


def write_mixture(folder: Path, found: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    return folder


def by_trl(model: Path, mixture: Path, work: Path) -> None:
    """TRL as its documentation shows it, with our settings; prints the seconds of the loop."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    lines = (mixture / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    data = Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in map(json.loads, lines)])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=data,
        args=SFTConfig(
            output_dir=str(work),
            per_device_train_batch_size=BATCH,
            max_length=LENGTH,
            bf16=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
    )
    began = time.perf_counter()
    trainer.train()
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def by_us(model: Path, mixture: Path, work: Path, adapters: int = 0) -> None:
    """`train_sft`, or that many LoRA experts one after another; prints the seconds of the loop and of everything."""
    from mixmerge.train.settings import Adapter, SftSettings
    from mixmerge.train.sft import train_sft

    began, loop = time.perf_counter(), 0.0
    for number in range(max(1, adapters)):
        adapter = Adapter(r=8) if adapters else None
        settings = SftSettings(batch_size=BATCH, max_length=LENGTH, seed=number, adapter=adapter)
        found = train_sft(
            model,
            mixture,
            work / f"out{number}",
            settings,
            work=work / f"work{number}",
            threads=None,
            checkpoint_every=10**6,
        )
        loop += found["seconds"]
    print(json.dumps({"seconds": loop, "all": time.perf_counter() - began}), flush=True)


def run(what: str, *arguments: object) -> dict[str, float]:
    """One run in a process of its own: what it printed last, and the seconds of the whole process."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--run", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    return json.loads(line) | {"process": time.perf_counter() - began}


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        what, model, mixture, work = sys.argv[2], *map(Path, sys.argv[3:6])
        {"trl": by_trl, "us": by_us}[what](model, mixture, work, *map(int, sys.argv[6:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = options.model or options.work / "training-model"
    if not (model / "config.json").exists():
        make_model(model, [turn["content"] for row in rows(False) for turn in (*row["prompt"], *row["completion"])])
    print(f"{os.cpu_count()} cores, medians of {options.rounds}; x: our seconds over TRL's")
    print(f"{'rows':14} {'TRL s':>8} {'ours s':>8} {'x':>6}")
    scratch = options.work / "training-scratch"
    for title, equal in (("as they are", False), ("of one length", True)):
        mixture = write_mixture(options.work / f"training-{int(equal)}", rows(equal))
        seconds: dict[str, list[float]] = {"trl": [], "us": []}
        for _ in range(options.rounds):
            for what, found in seconds.items():
                shutil.rmtree(scratch, ignore_errors=True)
                found.append(run(what, model, mixture, scratch)["seconds"])
        theirs, ours = (statistics.median(seconds[what]) for what in ("trl", "us"))
        print(f"{title:14} {theirs:8.2f} {ours:8.2f} {ours / theirs:6.2f}")
    mixture = options.work / "training-0"
    shutil.rmtree(scratch, ignore_errors=True)
    apart = sum(run("us", model, mixture, scratch / str(n), 1)["process"] for n in range(3))
    together = run("us", model, mixture, scratch / "together", 3)["process"]
    print(f"three LoRA experts: {apart:.1f} s in a process each, {together:.1f} s in one ({together / apart:.2f})")


if __name__ == "__main__":
    main()
