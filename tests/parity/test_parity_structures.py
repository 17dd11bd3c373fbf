"""Slices of layers, adapters and models of different vocabularies: what mergekit makes of the same YAML."""

import pytest
import torch
from model_folders import read_model
from oracle import distance
from test_merge_vocabulary import TEXTS, ids_of, make_model

from mixmerge.merge import merge, parse_config

SLICES = {
    "a frankenmerge of two models": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3]}]},
        ],
    },
    "layers left out": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 1]}]},
            {"sources": [{"model": "a", "layer_range": [2, 3]}]},
        ],
    },
    "a scaled projection in the repeated layers": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {
                "sources": [
                    {
                        "model": "a",
                        "layer_range": [1, 3],
                        "parameters": {"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]},
                    }
                ]
            },
        ],
    },
    "slerp of slices with a gradient": {
        "merge_method": "slerp",
        "base_model": "x",
        "slices": [
            {"sources": [{"model": "x", "layer_range": [0, 3]}, {"model": "y", "layer_range": [0, 3]}]},
        ],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.3}]},
    },
    "ties of slices": {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    {"model": "base", "layer_range": [0, 3]},
                    {"model": "a", "layer_range": [0, 3], "parameters": {"weight": 0.7, "density": 0.4}},
                    {"model": "b", "layer_range": [0, 3], "parameters": {"weight": [0.1, 0.9], "density": 0.6}},
                ]
            },
        ],
    },
    "linear of shifted layers": {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": "x", "layer_range": [0, 2], "parameters": {"weight": 0.3}},
                    {"model": "y", "layer_range": [1, 3], "parameters": {"weight": 0.9}},
                ]
            },
            {
                "sources": [
                    {"model": "x", "layer_range": [2, 3], "parameters": {"weight": 1}},
                    {"model": "y", "layer_range": [0, 1], "parameters": {"weight": 0.5}},
                ]
            },
        ],
    },
}


def placed(node, folders):
    """The configuration with the folders of the models that it names by a letter."""
    if isinstance(node, dict):
        return {
            key: str(folders[value]) if key in ("model", "base_model") and value in folders else placed(value, folders)
            for key, value in node.items()
        }
    return [placed(entry, folders) for entry in node] if isinstance(node, list) else node


@pytest.mark.parametrize("asked", SLICES.values(), ids=SLICES)
def test_slices_mean_the_same(oracle, models, asked, tmp_path):
    whole = placed(asked | {"dtype": "float32"}, models.folders)
    merge(parse_config(whole), tmp_path / "out")
    assert distance(read_model(oracle.carry_out(whole)), read_model(tmp_path / "out")) < 1e-6


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A Llama that transformers wrote, and two LoRA adapters of it that PEFT wrote, of random factors."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **size)).save_pretrained(root / "base")
    for seed, name in enumerate(("first", "second"), start=1):
        torch.manual_seed(seed)
        targets = ["q_proj", "v_proj", "down_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=name == "second")
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.1)
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    "method",
    [{"merge_method": "linear"}, {"merge_method": "ties", "parameters": {"density": 0.5}}],
    ids=["linear", "ties"],
)
def test_a_model_plus_an_adapter_means_the_same(oracle, adapted, method, tmp_path):
    base = str(adapted / "base")
    models = [
        {"model": f"{base}+{adapted / 'first'}", "parameters": {"weight": 0.6}},
        {"model": f"{base}+{adapted / 'second'}", "parameters": {"weight": 0.9}},
    ]
    whole = {**method, "models": models, "dtype": "float32"}
    whole |= {"base_model": base} if method["merge_method"] == "ties" else {}
    merge(parse_config(whole), tmp_path / "out")
    assert distance(read_model(oracle.carry_out(whole)), read_model(tmp_path / "out")) < 1e-6


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabularies")
    return {name: make_model(name, root / name) for name in TEXTS}


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("source", ["union", "base", "german"])
def test_a_tokenizer_source_takes_the_same_row_for_every_token(oracle, three, method, source, tmp_path):
    names = ["english", "german", "mixed"]
    if method == "ties":
        names.remove("english")
    own = {"weight": 0.5} | ({"density": 0.6} if method == "ties" else {})
    whole = {
        "merge_method": method,
        "base_model": str(three["english"]),
        "models": [{"model": str(three[name]), "parameters": own} for name in names],
        "tokenizer_source": str(three[source]) if source in three else source,
        "dtype": "float32",
    }
    merge(parse_config(whole), tmp_path / "out")
    theirs, mine = oracle.carry_out(whole), tmp_path / "out"
    there, here = ids_of(theirs), ids_of(mine)
    assert there.keys() == here.keys()
    one, other = read_model(theirs), read_model(mine)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = [
            one.pop(name)[[there[token] for token in sorted(there)]],
            other.pop(name)[[here[t] for t in sorted(here)]],
        ]
        if method == "ties":  # which of equal magnitudes are kept may differ, and how many rows count
            differing = (rows[0] - rows[1]).abs().amax(dim=1) > 1e-6
            assert differing.float().mean() < 0.2, name
        else:
            assert torch.allclose(*rows, rtol=1e-6, atol=1e-7), name
    assert distance(one, other) < 1e-6
