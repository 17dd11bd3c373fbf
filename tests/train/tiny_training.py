"""A tiny tokenizer, tiny random models and small mixtures, made on the spot: no network, no stored weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "what is the colour of sky grass sea blue green deep red sun a warm light it says please tell me now"


def tiny_tokenizer(template: str | None = CHATML):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([WORDS, "user", "assistant", "system"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(folder: Path, kind: str = "llama", *, dtype: str = "bfloat16", template: str | None = CHATML, **config):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.models.gemma3 import Gemma3TextConfig
    from transformers.models.llama import LlamaConfig

    tokenizer = tiny_tokenizer(template)
    shape = {
        "vocab_size": 416,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        **config,
    }
    made = LlamaConfig(**shape) if kind == "llama" else Gemma3TextConfig(head_dim=16, sliding_window=32, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(do_sample=True, top_k=7, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(folder: Path, rows, lang: str = "en") -> Path:
    """A mixture of rows (prompt, answer) or (prompt, chosen, rejected)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "id": f"{lang}/{i}",
            "objective": "general",
            "lang": lang,
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        | ({"rejected": [{"role": "assistant", "content": rejected[0]}]} if rejected else {})
        for i, (prompt, answer, *rejected) in enumerate(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FACTS = [("sky", "it is deep blue"), ("grass", "green"), ("sea", "blue light"), ("sun", "warm red light it is a sun")]
FORMS = ["what is the colour of {}", "tell me the colour of {}", "{} please", "now {}", "what is {}", "the {} says"]
QUICK = {"learning_rate": 5e-3, "batch_size": 4, "max_length": 64, "seed": 1}


def train(
    model: Path, mixture: Path, folder: Path, progress=None, checkpoint_every=100, method="sft", cache=None, **settings
):
    """Train in `folder`, quickly: the model goes to its `out`."""
    from mixmerge.train.dpo import train_dpo
    from mixmerge.train.settings import settings_from
    from mixmerge.train.sft import train_sft

    return {"sft": train_sft, "dpo": train_dpo}[method](
        model,
        mixture,
        folder / "out",
        settings_from({**QUICK, **settings, "method": method}),
        work=folder / "work",
        threads=1,
        checkpoint_every=checkpoint_every,
        progress=progress,
        cache=cache,
    )


def weights(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / "out" / "model.safetensors")


def same(one, two) -> bool:
    import torch

    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_training import train
import json
model, mixture, folder, kill_at = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
def progress(done, total):
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
train(model, mixture, folder, progress, checkpoint_every=4, **json.loads(sys.argv[6]))
"""


def run_child(model: Path, mixture: Path, folder: Path, kill_at: int, **settings) -> subprocess.CompletedProcess:
    """Train in a process of its own, which kills itself with SIGKILL after a step (-1: never)."""
    arguments = [Path(__file__).parent, model, mixture, folder, kill_at, json.dumps(settings)]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
