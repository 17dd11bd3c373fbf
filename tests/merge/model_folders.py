"""Real model folders for the merge tests: safetensors on disk, written by safetensors or by transformers."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mixmerge.merge import METHODS, merge, parse_config

Tensors = dict[str, torch.Tensor]


def write_model(folder: Path, tensors: Tensors, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False} | config))
    return folder


def read_model(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def config_for(method, models, *, base=None, per_model=None, **top):
    """A checked configuration; `models` and `base` are folders, `per_model` one mapping of parameters each."""
    entries = [{"model": str(folder)} for folder in models]
    for entry, parameters in zip(entries, per_model or [], strict=bool(per_model)):
        entry["parameters"] = parameters
    raw = {"merge_method": method, "models": entries, **top}
    return parse_config(raw | ({"base_model": str(base)} if base is not None else {}))


EXAMPLE = {"weight": 0.8, "t": 0.3, "density": 0.4, "gamma": 0.1, "epsilon": 0.2, "select_topk": 0.4}


def example(method, folders, **top):
    """A configuration of any method with plausible parameters, over a base (the first folder) and two models."""
    base, *models = folders
    spec = METHODS[method]
    parameters = {name: EXAMPLE[name] for name in spec.parameters if name in EXAMPLE}
    models = models[: spec.inputs[1]]
    return config_for(method, models, base=None if spec.base == "none" else base, parameters=parameters, **top)


def merge_tensors(method, inputs, *, base=None, per_model=None, out_dtype=None, seed=0, threads=1, **parameters):
    """Write each input (tensor or tensors) as a model, merge, and give what came out in the same form."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)

        def write(name, value):
            return write_model(root / name, value if isinstance(value, dict) else {"w": value})

        folders = [write(f"m{i}", value) for i, value in enumerate(inputs)]
        base_folder = None if base is None else write("base", base)
        top = {"parameters": parameters, "seed": seed} | ({"out_dtype": out_dtype} if out_dtype else {})
        config = config_for(method, folders, base=base_folder, per_model=per_model, **top)
        merge(config, root / "out", threads=threads)
        tensors = read_model(root / "out")
    return tensors if isinstance(inputs[0], dict) else tensors["w"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def generates(folder: Path):
    """Load a folder as transformers does, without a missing or left-over tensor, and generate; the loaded model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if config.model_type == "llava" else AutoModelForCausalLM
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else kind
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    left = {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    assert not left, left
    prompt = torch.tensor([[1, 5, 7]])
    tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 5 if config.is_encoder_decoder else 7)
    extra = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    assert torch.isfinite(model(prompt, **extra).logits).all()
    return model
