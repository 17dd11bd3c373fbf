"""A tiny tokenizer, tiny random models and small mixtures, made on the spot: no network, no stored weights."""

from __future__ import annotations

import json
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


def write_rows(folder: Path, pairs) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "id": f"en/{i}",
            "objective": "general",
            "lang": "en",
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for i, (prompt, answer) in enumerate(pairs)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FACTS = [("sky", "it is deep blue"), ("grass", "green"), ("sea", "blue light"), ("sun", "warm red light it is a sun")]
