"""Adapters that PEFT itself trained and saved, folded as the model streams by, against PEFT's own merge and inference."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import config_for, read_model
from safetensors.torch import load_file, save_file

from mixmerge.errors import CheckpointError, ModelError, RecipeError
from mixmerge.merge import adapters, load_config, merge, parse_config, tensors, verify
from mixmerge.merge.adapters import open_model, sources_of
from mixmerge.merge.sources import Files

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LINEAR = ["q_proj", "k_proj", "down_proj"]
KINDS = {
    "lora": ("llama", {"target_modules": LINEAR}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True, "lora_alpha": 3}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "dora and rslora on every linear layer": (
        "llama",
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    ),
    "biases of all layers": ("biased", {"target_modules": LINEAR, "bias": "all"}),
    "biases of adapted layers": ("biased", {"target_modules": LINEAR, "bias": "lora_only"}),
    "a bias of its own": ("biased", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
    "modules to save": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "down_proj": 2},
            "rank_pattern": {"layers.0.self_attn.q_proj": 7},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "embedding with dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied module to save": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d with dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "bias": "all"}),
    "one square conv1d": ("gpt2", {"target_modules": r".*attn\.c_proj"}),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Random float32 models, by name: as a folder."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "llama": LlamaConfig(**size, num_key_value_heads=1, tie_word_embeddings=False),
        "biased": LlamaConfig(**size, num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True),
        "tied": LlamaConfig(**size, num_key_value_heads=1, tie_word_embeddings=True),
        "gpt2": GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    }
    folders = {}
    for name, config in configs.items():
        torch.manual_seed(len(folders))
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        folders[name] = tmp_path_factory.mktemp(name) / name
        model.save_pretrained(folders[name])
    return folders


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(base: Path, folder: Path, seed: int = 0, **settings) -> Path:
    """An adapter whose every trained parameter moved, as PEFT saves it."""
    model = peft.get_peft_model(load(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def fold(base: Path, adapter: Path, out: Path, **top) -> dict[str, torch.Tensor]:
    merge(config_for("linear", [f"{base}+{adapter}"], parameters={"weight": 1}, **top), out)
    return read_model(out)


def edit(adapter: Path, **settings) -> None:
    path = adapter / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_at_weight_1_is_the_model_that_peft_computes(kind, bases, tmp_path):
    architecture, settings = KINDS[kind]
    adapter = train(bases[architecture], tmp_path / "adapter", **settings)
    wrapped = peft.PeftModel.from_pretrained(load(bases[architecture]), adapter).eval()
    tokens = torch.tensor([[1, 5, 7, 90]])
    with torch.no_grad():
        at_inference = wrapped(tokens).logits
    merged = wrapped.merge_and_unload().state_dict()
    folded = fold(bases[architecture], adapter, tmp_path / "out")
    before = read_model(bases[architecture])
    changed = [name for name in folded if not torch.equal(folded[name], before[name])]
    assert changed
    if kind == "tied embedding":  # PEFT adds the change twice to the one tensor of embedding and output layer
        del folded["model.embed_tokens.weight"]
    for name, tensor in folded.items():
        assert torch.allclose(tensor, merged[name], rtol=1e-6, atol=1e-6), name
        if torch.equal(merged[name], before[name]):
            assert name not in changed
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "out")(tokens).logits, at_inference, atol=2e-5)


@pytest.mark.parametrize("kind", ["dora", "embedding with dora", "conv1d with dora", "a bias of its own"])
def test_any_stretch_of_a_folded_tensor_is_the_same_stretch_of_the_whole(kind, bases, tmp_path):
    architecture, settings = KINDS[kind]
    adapter = train(bases[architecture], tmp_path / "adapter", **settings)
    model = open_model(f"{bases[architecture]}+{adapter}", tmp_path)
    files, draw = Files(), np.random.default_rng(0)
    found = sources_of(model, files)
    for name in model.folds:
        source = found[name]
        size = int(np.prod(source.shape))
        whole = np.empty(size * 4, np.uint8)
        assert source.read(0, whole) > 0
        for _ in range(20):
            start = int(draw.integers(size))
            part = np.empty(int(draw.integers(1, size - start + 1)) * 4, np.uint8)
            source.read(start, part)
            assert part.tobytes() == whole[start * 4 : start * 4 + part.size].tobytes()
    files.close()


def test_blocks_and_threads_change_no_byte_of_a_merge_with_adapters(bases, tmp_path, monkeypatch):
    a = train(bases["llama"], tmp_path / "a", 1, **KINDS["dora"][1])
    b = train(bases["llama"], tmp_path / "b", 2, **KINDS["embedding"][1])
    models = [f"{bases['llama']}+{a}", f"{bases['llama']}+{b}"]
    config = config_for("ties", models, base=bases["llama"], parameters={"weight": 0.5, "density": 0.5})
    outputs = []
    for block, stretch, threads in [(1 << 15, 1 << 18, 1), (100, 1 << 18, 2), (1 << 10, 70, 3)]:
        monkeypatch.setattr(tensors, "BLOCK", block)
        monkeypatch.setattr(adapters, "STRETCH", stretch)
        out = tmp_path / f"{block}"
        merge(config, out, threads=threads)
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_adapters_merge_as_their_folded_models_do(bases, tmp_path):
    base = bases["llama"]
    folders, models = [], []
    for i in range(2):
        adapter = train(base, tmp_path / f"a{i}", i, **KINDS["lora"][1])
        fold(base, adapter, tmp_path / f"folded{i}")
        folders.append(tmp_path / f"folded{i}")
        models.append(f"{base}+{adapter}")
    for i, inputs in enumerate((folders, models)):
        merge(config_for("task_arithmetic", inputs, base=base, parameters={"weight": 0.7}), tmp_path / f"out{i}")
    assert (tmp_path / "out0" / "model.safetensors").read_bytes() == (
        tmp_path / "out1" / "model.safetensors"
    ).read_bytes()


def test_layers_of_a_model_with_an_adapter_are_those_of_its_folded_model(bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", **KINDS["lora"][1])
    fold(bases["llama"], adapter, tmp_path / "folded")
    for i, model in enumerate((tmp_path / "folded", f"{bases['llama']}+{adapter}")):
        slices = [{"sources": [{"model": str(model), "layer_range": ends}]} for ends in ([0, 2], [1, 2], [0, 1])]
        merge(parse_config({"merge_method": "passthrough", "slices": slices}), tmp_path / f"out{i}")
    folded, grown = (read_model(tmp_path / out) for out in ("folded", "out1"))
    q_proj = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(grown[q_proj.format(2)], folded[q_proj.format(1)])
    written = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out0", "out1")]
    assert written[0] == written[1]


def test_an_adapter_in_half_precision_on_a_bf16_model_is_folded_before_the_one_rounding(tiny_models, bases, tmp_path):
    base = tiny_models("llama")[0]
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / adapters.WEIGHTS
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    name = "model.layers.0.self_attn.q_proj"
    parts = load_file(file)
    a, b = (parts[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    exact = read_model(base)[f"{name}.weight"].double() + 2 * (b @ a)
    assert torch.equal(fold(base, adapter, tmp_path / "out")[f"{name}.weight"], exact.float().bfloat16())


def test_an_adapter_saved_under_a_longer_prefix_finds_its_tensors_by_how_their_names_end(bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", **KINDS["lora"][1])
    expected = fold(bases["llama"], adapter, tmp_path / "expected")
    file = adapter / adapters.WEIGHTS
    parts = {
        f"base_model.model.wrapper.{key.removeprefix('base_model.model.')}": t for key, t in load_file(file).items()
    }
    save_file(parts, file)
    found = fold(bases["llama"], adapter, tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_relative_adapter_stands_beside_the_configuration_and_its_change_is_another_merge(bases, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "m+1")
    train(bases["llama"], tmp_path / "adapter", **KINDS["lora"][1])
    path = tmp_path / "merge.yml"
    path.write_text("merge_method: linear\nmodels: [{model: m+1+adapter}]\nparameters: {weight: 1}\n")
    with pytest.raises(RecipeError, match="names 2 adapters"):
        load_config(path)
    (tmp_path / "m+1").rename(tmp_path / "m")
    path.write_text(path.read_text().replace("m+1", "m"))
    merge(path, tmp_path / "out")
    assert "model: m+adapter" in (tmp_path / "out" / "mergekit_config.yml").read_text()
    before = open_model("m+adapter", tmp_path).fingerprint()
    os.utime(tmp_path / "adapter" / adapters.CONFIG, (1, 1))
    assert open_model("m+adapter", tmp_path).fingerprint() != before


def test_a_merge_with_an_adapter_is_verified_until_the_adapter_changes(bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", **KINDS["dora"][1])
    fold(bases["llama"], adapter, tmp_path / "out")
    assert verify(tmp_path / "out")["tensors"] > 0
    edit(adapter, lora_alpha=9)
    with pytest.raises(CheckpointError, match=r"adapter' is not the one that this merge was made from"):
        verify(tmp_path / "out")


def test_a_folder_whose_name_holds_a_plus_is_a_model(bases, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "m+1")
    assert type(open_model("m+1", tmp_path)) is not adapters.FoldedCheckpoint


@pytest.mark.parametrize(
    ("reference", "message"),
    [("a+b+c", "names 2 adapters, and one can be folded"), ("a+", "lacks a part"), ("+b", "lacks a part")],
)
def test_a_reference_that_is_none_is_refused_where_it_stands(reference, message):
    raw = {"merge_method": "linear", "models": [{"model": reference}], "parameters": {"weight": 1}}
    with pytest.raises(RecipeError, match=rf"models.0.model: .*{message}"):
        parse_config(raw)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "its peft_type is LOHA, and only LORA"),
        ({"peft_type": "PROMPT_TUNING"}, "its peft_type is PROMPT_TUNING"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which began by changing the model's own"),
        ({"trainable_token_indices": [1, 2]}, r"adapter_config.json has trainable_token_indices: \[1, 2\]"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "adapter_config.json has layer_replication"),
        ({"target_parameters": ["experts.w1"]}, "adapter_config.json has target_parameters"),
        ({"alora_invocation_tokens": [3]}, "adapter_config.json has alora_invocation_tokens"),
        ({"something_of_2030": True}, "adapter_config.json has something_of_2030: true"),
        ({"lora_alpha": "many"}, "no usable lora_alpha for 'model.layers"),
        ({"alpha_pattern": ["q_proj"]}, "the alpha_pattern of adapter_config.json is no mapping"),
        ({"rank_pattern": ["q_proj"]}, "the rank_pattern of adapter_config.json is no mapping"),
        ({"alpha_pattern": {"q_proj": "much"}}, "no usable lora_alpha for 'model.layers"),
        ({"use_dora": True}, "use_dora is True, and of 'model.layers.*it holds lora_A.weight, lora_B.weight"),
    ],
)
def test_an_adapter_of_a_kind_that_cannot_be_folded_is_refused_by_name(settings, message, bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", **KINDS["lora"][1])
    edit(adapter, **settings)
    with pytest.raises(ModelError, match=f"adapter: this adapter cannot be folded: .*{message}"):
        fold(bases["llama"], adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(", "(?\n", "q{99999999999}"])
def test_a_pattern_that_is_no_regular_expression_is_named_with_its_file(kind, pattern, bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, **{kind: {pattern: 4}})
    with pytest.raises(ModelError) as refused:
        fold(bases["llama"], adapter, tmp_path / "out")
    text = str(refused.value)
    assert text.count("\n") == 0
    assert f"adapter_config.json has the {kind} '{pattern.strip()}" in text
    assert "is no regular expression" in text
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def rename(parts, old, new):
    return {key.replace(old, new): tensor for key, tensor in parts.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: rename(parts, "q_proj", "r_proj"), "the model has no tensor '.*r_proj.weight'"),
        (lambda parts: rename(parts, "model.model.layers", "layers"), "could be any of|has no tensor"),
        (lambda parts: {**parts, "base_model.model.extra.weight": torch.ones(2)}, "the model has no such tensor"),
        (
            lambda parts: {**parts, "base_model.model.model.norm.weight": torch.ones(2)},
            r"'model.norm.weight' has shape \[2\] where the model's has \[32\]",
        ),
        (lambda parts: {k: t for k, t in parts.items() if "lora_A" not in k}, "one of lora_A and lora_B is missing"),
        (lambda parts: {k: t[:, :-1] if "lora_A" in k else t for k, t in parts.items()}, "does not fit: A "),
        (lambda parts: {k: t.to(torch.int8) for k, t in parts.items()}, "is stored as I8"),
    ],
)
def test_an_adapter_that_does_not_fit_its_model_is_refused_from_the_headers(change, message, bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", **KINDS["lora"][1])
    file = adapter / adapters.WEIGHTS
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}, file)
    with pytest.raises(ModelError, match=message):
        fold(bases["llama"], adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_that_would_part_a_tied_embedding_is_refused(settings, bases, tmp_path):
    adapter = train(bases["tied"], tmp_path / "adapter", **{"target_modules": ["q_proj"]} | settings)
    with pytest.raises(ModelError, match=r"both as embedding and as output layer.*ensure_weight_tying"):
        fold(bases["tied"], adapter, tmp_path / "out")


def test_a_nan_in_an_adapter_is_refused_naming_the_tensor_it_changes(bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", **KINDS["lora"][1])
    file = adapter / adapters.WEIGHTS
    parts = load_file(file)
    parts["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 2] = torch.nan
    save_file(parts, file)
    with pytest.raises(ModelError, match=r"'model.layers.1.self_attn.q_proj.weight \(its adapter\)' holds NaN"):
        fold(bases["llama"], adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_pickled_or_missing_adapter_weights_are_refused(bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", **KINDS["lora"][1])
    (adapter / adapters.WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is missing; save it again .* can run code"):
        fold(bases["llama"], adapter, tmp_path / "out")
    with pytest.raises(ModelError, match=r"adapter_config.json is missing"):
        fold(bases["llama"], bases["llama"], tmp_path / "out")
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        fold(bases["llama"], "./nowhere", tmp_path / "out")


def test_an_adapter_alone_is_refused_with_the_way_to_write_it(bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", **KINDS["lora"][1])
    with pytest.raises(ModelError, match=r"not a whole model; .*MODEL\+"):
        merge(config_for("linear", [adapter], parameters={"weight": 1}), tmp_path / "out")


@pytest.mark.parametrize("rank", [9, 0, "x"])
def test_a_rank_that_the_tensors_do_not_have_is_refused(rank, bases, tmp_path):
    adapter = train(bases["llama"], tmp_path / "adapter", target_modules=LINEAR)
    edit(adapter, r=rank)
    with pytest.raises(
        ModelError, match=rf"cannot be folded: .* gives '.*' the rank {rank!r}, and its tensors have \d+"
    ):
        fold(bases["llama"], adapter, tmp_path / "out")


def test_a_pickled_adapter_is_read_where_asked_for(bases, tmp_path, monkeypatch):
    adapter = train(bases["llama"], tmp_path / "adapter", target_modules=LINEAR)
    plain = fold(bases["llama"], adapter, tmp_path / "plain")
    torch.save(load_file(adapter / adapters.WEIGHTS), adapter / "adapter_model.bin")
    (adapter / adapters.WEIGHTS).unlink()
    (tmp_path / "c.yml").write_text(
        f"merge_method: linear\nmodels: [{{model: {bases['llama']}+{adapter}}}]\nparameters: {{weight: 1}}\n"
    )
    merge(load_config(tmp_path / "c.yml", pickles=True), tmp_path / "out")
    made = read_model(tmp_path / "out")
    assert all(torch.equal(made[name], plain[name]) for name in plain)
