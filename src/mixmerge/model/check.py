"""What a look at a model folder tells: is it a base that everything after can load?

The one idea: headers and JSON files are small, so a broken base is named by file before anything starts, and without
importing transformers, which takes seconds. What is found whole here may still be refused by the library that loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mixmerge.errors import CheckpointError, ModelError, did_you_mean, reason
from mixmerge.merge.checkpoint import Tensor, open_checkpoint
from mixmerge.merge.values import split_layer
from mixmerge.model.chat import compile_template, own_chat_template
from mixmerge.model.folder import read_json, weight_files

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# By dtype the bits of a float that are all set in NaN and infinities alone, and the type that has as many.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
}
_EXPONENTS |= {"F8_E5M2": ("<u1", 0x7C), "F8_E4M3": ("<u1", 0x7F)}
_STRETCH = 1 << 22  # elements that are looked at at once
_CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict("


def check_model(folder: Path) -> None:
    """Refuse a folder whose weights, configuration, tokenizer or own chat template are missing or broken.

    Raises:
        ModelError: says which file and why.
    """
    weight_files(folder)
    try:
        tensors = open_checkpoint(folder).tensors
    except CheckpointError as error:
        raise ModelError(error.what, where=error.where, do=error.do) from error
    _check_type(folder / "config.json")
    _check_sizes(folder / "config.json", {name: tensor.shape for name, tensor in tensors.items()})
    check_tokenizer(folder)
    own = own_chat_template(folder)
    if own is not None:
        settings = folder / "tokenizer_config.json"
        compile_template(own[0], read_json(settings) if settings.is_file() else {}, str(own[1]))


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without a `tokenizer.json` that can be read."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        advice = "load it with transformers.AutoTokenizer and save it again with save_pretrained"
        raise ModelError("no tokenizer.json", where=str(folder), do=advice)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        read_json(settings)
    read_json(file)
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more exact
        what = f"not a tokenizer: {reason(error).partition(': ')[2]}"
        raise ModelError(what, where=str(file), do="copy or download it again") from error


def first_unusable(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first floating-point tensor that holds a NaN or an infinity; read from its file in stretches."""
    import numpy as np

    for name, tensor in tensors.items():
        if tensor.dtype not in _EXPONENTS:
            continue
        kind, bits = _EXPONENTS[tensor.dtype]
        with tensor.file.open("rb") as opened:
            opened.seek(tensor.offset)
            for start in range(0, tensor.size, _STRETCH):
                part = np.fromfile(opened, kind, min(_STRETCH, tensor.size - start))
                if ((part & part.dtype.type(bits)) == bits).any():
                    return name
    return None


def _check_type(config: Path) -> None:
    kind, known = read_json(config).get("model_type"), _causal_types()
    if not isinstance(kind, str):
        raise ModelError("no 'model_type'", where=str(config), do="copy it from where the model came from")
    if known and kind not in known:
        what = f"transformers has no language model of type '{kind}'"
        raise ModelError(what, where=str(config), do=did_you_mean(kind, known))


def _check_sizes(config: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights with other layers or another width than the configuration says, where it says so as most do."""
    said = read_json(config)
    text = said.get("text_config")
    said = text if isinstance(text, dict) else said
    do = "config.json and weights must belong together: copy both again"
    stacks: dict[str, set[int]] = {}
    for name in shapes:
        if (split := split_layer(name)) is not None:
            stacks.setdefault(split[0], set()).add(split[1])
    most = max((len(layers) for layers in stacks.values()), default=0)
    layers = next((said[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in said), most)
    if most and layers != most:
        what = f"it says {layers!r} layers, and the weights have {most}"
        raise ModelError(what, where=str(config), do=do)
    width = next((said[key] for key in ("hidden_size", "n_embd", "d_model") if key in said), None)
    for name, shape in shapes.items():
        if width is not None and name.endswith(_EMBEDDINGS) and len(shape) == 2 and width not in shape:
            what = f"it says a width of {width!r}, and '{name}' has shape {list(shape)}"
            raise ModelError(what, where=str(config), do=do)


@cache
def _causal_types() -> frozenset[str]:
    """The model types that transformers can load as language models, read from its source; empty if it has moved."""
    import re

    spec = find_spec("transformers")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    file = folder / "models" / "auto" / "modeling_auto.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    listed = text.partition(_CAUSAL)[2].partition("\n)\n")[0]
    return frozenset(re.findall(r'\(\s*"([^"]+)",', listed))
