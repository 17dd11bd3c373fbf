"""Models put together from layers: what goes where, what config.json says, and that transformers takes it."""

import io
import json

import pytest
import torch
from model_folders import example, generates, read_model, write_model
from ruamel.yaml import YAML

from mixmerge.errors import ModelError, RecipeError
from mixmerge.merge import METHODS, load_config, merge, parse_config, rehearse, verify
from mixmerge.merge.stacks import find_stacks


def toy(folder, scale, layers, **config):
    """A model whose tensors say where they come from: layer i holds scale + i, others scale + 90 .. 92."""
    rest = {"model.embed_tokens.weight": 90, "model.norm.weight": 91, "lm_head.weight": 92}
    tensors = {f"model.layers.{i}.mlp.weight": i for i in range(layers)} | rest
    filled = {name: torch.full((2,), float(scale + value)) for name, value in tensors.items()}
    return write_model(folder, filled, **{"num_hidden_layers": layers} | config)


@pytest.fixture
def toys(tmp_path):
    for name, scale, layers in (("a", 100, 4), ("b", 200, 4), ("c", 300, 6)):
        toy(tmp_path / name, scale, layers)
    return tmp_path


def sources(*named):
    """`sources("a0:2", "b2:4")`: sources of one slice."""
    return {"sources": [{"model": text[0], "layer_range": [int(end) for end in text[1:].split(":")]} for text in named]}


def run(root, slices, *, method="passthrough", out="out", **top):
    """Merge slices of models in a folder; the first element of every tensor, layers as a list."""
    text = io.StringIO()
    YAML().dump({"merge_method": method, "slices": slices} | top, text)
    (root / "merge.yml").write_text(text.getvalue())
    merge(load_config(root / "merge.yml"), root / out, threads=1)
    tensors = {name: tensor[0].item() for name, tensor in read_model(root / out).items()}
    layers = [tensors[f"model.layers.{i}.mlp.weight"] for i in range(len(tensors) - 3)]
    return [tensors["model.embed_tokens.weight"], *layers, tensors["model.norm.weight"], tensors["lm_head.weight"]]


def test_layers_are_renumbered_and_what_is_outside_comes_from_the_first_and_the_last_slice(toys):
    # what mergekit 0.1.5 gives for the same files
    made = run(toys, [sources("a0:2"), sources("c3:6"), sources("b3:4")])
    assert made == [190, 100, 101, 303, 304, 305, 203, 291, 292]
    assert json.loads((toys / "out" / "config.json").read_text())["num_hidden_layers"] == 6


def test_layers_may_repeat_in_any_order(toys):
    assert run(toys, [sources("a2:4"), sources("a0:3"), sources("a0:3")])[1:-2] == [
        102,
        103,
        100,
        101,
        102,
        100,
        101,
        102,
    ]


def test_slices_with_different_numbers_of_sources_use_each_of_them(toys):
    linear = {"method": "linear", "parameters": {"weight": 1}}
    wide_last = run(toys, [sources("c3:6"), sources("a0:2", "b0:2")], **linear)
    assert wide_last == [390, 303, 304, 305, 150, 151, 241, 242]
    wide_first = run(toys, [sources("a0:2", "b0:2"), sources("c3:6")], out="other", **linear)
    assert wide_first == [240, 150, 151, 303, 304, 305, 391, 392]


def test_each_slice_takes_task_vectors_from_its_own_base(toys):
    slices = [sources("a0:2", "c4:6") | {"base_model": "c"}, sources("a0:2", "b2:4") | {"base_model": "b"}]
    made = run(toys, slices, method="task_arithmetic", base_model="a", parameters={"weight": 2})
    assert made == [-10, -104, -103, -2, -1, 91, 92]


def test_gradients_run_over_the_layers_of_a_slice_and_the_rest_takes_their_first_element(toys):
    first, second = sources("a0:3"), sources("c2:6") | {"parameters": {"scale": [2, 3]}}
    first["sources"][0]["parameters"] = {"scale": [1, 2]}
    made = run(toys, [first, second], parameters={"scale": 10})
    assert made[:4] == [190, 100, 151.5, 204]
    assert made[4:8] == pytest.approx([604, 707, 2430.0 / 3 + 2 / 3, 915], rel=1e-6)
    assert made[8:] == [782, 784]


def test_a_slice_of_one_layer_takes_the_last_element_of_a_gradient_as_mergekit_does(toys):
    one = sources("a0:1") | {"parameters": {"scale": [1, 2]}}
    assert run(toys, [one, sources("c2:3")])[:3] == [190, 200, 302]


def test_filters_of_a_source_see_its_own_layer_numbers(toys):
    one = sources("a2:4")
    one["sources"][0]["parameters"] = {"scale": [{"filter": "layers.2.", "value": 2}]}
    assert run(toys, [one], parameters={"scale": 10}) == [1900, 204, 1030, 1910, 1920]


def test_one_model_is_merged_with_other_layers_of_itself(toys):
    assert run(toys, [sources("a0:2", "a2:4")], method="linear", parameters={"weight": 1})[1:3] == [101, 102]


def test_layers_that_a_model_does_not_have_are_refused_with_their_line(toys):
    with pytest.raises(
        RecipeError, match=r"merge.yml:\d+: slices.1.sources.0.layer_range: .*\[2, 9\] .* the 4 layers of 'a'"
    ):
        run(toys, [sources("c0:2"), sources("a2:9")])
    assert not (toys / "out").exists()


def test_a_model_whose_config_does_not_count_its_layers_is_refused(toys):
    write_model(toys / "d", {"w": torch.ones(2), "h.0.w": torch.ones(2)})
    with pytest.raises(ModelError, match=r"d: config.json does not say how many layers there are; merge whole models"):
        run(toys, [sources("d0:1")])


def test_an_embedding_of_another_size_than_config_json_describes_is_refused(toys):
    tensors = read_model(toys / "a") | {"model.embed_tokens.weight": torch.ones(3)}
    write_model(toys / "w", tensors, num_hidden_layers=4)
    slices = [sources("w0:2"), sources("a0:2")]
    with pytest.raises(ModelError, match=r"'model.embed_tokens.weight' of 'w' has shape \[3\], and 'a', .* \[2\]"):
        run(toys, slices, base_model="a")


def test_layers_unlike_those_that_config_json_describes_are_refused(toys):
    tensors = read_model(toys / "a")
    write_model(toys / "d", tensors | {"model.layers.3.extra": torch.ones(2)}, num_hidden_layers=4)
    for slices in ([sources("a0:2", "d2:4")], [sources("a0:2"), sources("d3:4")]):
        with pytest.raises(ModelError, match=r"layer . of '.' has other tensors than any layer of 'a', .* \('extra'\)"):
            run(toys, slices, method="linear", parameters={"weight": 1})
    with pytest.raises(ModelError, match=r"'model.layers.3.extra' is in 'd' and not as 'model.layers.2.extra' in 'a'"):
        run(toys, [sources("d2:4", "a1:3")], method="linear", parameters={"weight": 1})
    wide = {name: torch.ones(3) if "mlp" in name else tensor for name, tensor in tensors.items()}
    write_model(toys / "w", wide, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"'mlp.weight' in layer 1 of 'w' has shape \[3\], and in 'a', .* \[2\]"):
        run(toys, [sources("a0:2"), sources("w1:4")])


def kinds(root, name, pattern, **more):
    layers = len(pattern)
    return toy(root / name, 0, layers, layer_types=[{"s": "sliding", "f": "full"}[kind] for kind in pattern], **more)


def test_per_layer_lists_follow_the_layers(toys):
    kinds(toys, "s", "ssfssf", no_rope_layers=[1, 1, 0, 1, 1, 0], sparse_layers=[2, 5], max_window_layers=6)
    run(toys, [sources("s0:3"), sources("s1:6")])
    made = json.loads((toys / "out" / "config.json").read_text())
    assert [kind[0] for kind in made["layer_types"]] == list("ssfsfssf")
    assert made["no_rope_layers"] == [1, 1, 0, 1, 0, 1, 1, 0]
    assert made["sparse_layers"] == [2, 4, 7]
    assert made["max_window_layers"] == made["num_hidden_layers"] == 8


def test_layers_of_different_kinds_are_not_combined(toys):
    kinds(toys, "s", "ssf")
    with pytest.raises(
        ModelError, match=r"layer 0 of 's' and layer 2 of 's' differ in layer_types \(sliding and full\)"
    ):
        run(toys, [sources("s0:1", "s2:3")], method="linear", parameters={"weight": 1})


def test_kinds_that_config_json_counts_by_position_are_moved_by_whole_periods_only(toys):
    toy(toys / "p", 0, 6, sliding_window_pattern=3)
    run(toys, [sources("p0:6"), sources("p0:3")])
    with pytest.raises(ModelError, match=r"one layer in 3 is of another kind .* layer 1 of 'p' would become layer 0"):
        run(toys, [sources("p1:4")], out="other")
    toy(toys / "q", 0, 4, first_k_dense_replace=1)
    run(toys, [sources("q0:1"), sources("q2:4")], out="third")
    assert json.loads((toys / "third" / "config.json").read_text())["first_k_dense_replace"] == 1
    with pytest.raises(ModelError, match="the first 1 layers differ from the rest"):
        run(toys, [sources("q1:2"), sources("q0:2")], out="fourth")


@pytest.mark.parametrize("method", METHODS)
def test_one_slice_of_all_layers_is_the_merge_of_whole_models(method, tiny_models, tmp_path):
    raw = example(method, tiny_models("llama")).to_mergekit()
    merge(parse_config(raw), tmp_path / "whole", threads=1)
    entries = raw.pop("models")
    raw["slices"] = [{"sources": [entry | {"layer_range": [0, 3]} for entry in entries]}]
    merge(parse_config(raw), tmp_path / "sliced", threads=1)
    whole, sliced = (tmp_path / out / "model.safetensors" for out in ("whole", "sliced"))
    assert whole.read_bytes() == sliced.read_bytes()
    described = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("whole", "sliced")]
    assert described[0] == described[1]


GROW = ["llama", "llama_tied", "qwen2", "qwen3", "gemma3", "gpt2", "mixtral", "cohere", "phi3", "mistral"]


@pytest.mark.parametrize("architecture", GROW)
def test_transformers_loads_a_grown_model_and_generates_from_it(architecture, tiny_models, tmp_path):
    base, a, b = tiny_models(architecture)
    stretches = [(a, [0, 2]), (b, [0, 3]), (a, [2, 3])]
    slices = [{"sources": [{"model": str(folder), "layer_range": ends}]} for folder, ends in stretches]
    merge(parse_config({"merge_method": "passthrough", "slices": slices}), tmp_path / "out", shard_bytes=30_000)
    model = generates(tmp_path / "out")
    assert model.config.num_hidden_layers == 6
    stacked = [
        {"sources": [{"model": str(folder), "layer_range": [first, 2]} for folder in (base, a, b)]} for first in (0, 1)
    ]
    ties = {"merge_method": "ties", "base_model": str(base), "parameters": {"weight": 0.5, "density": 0.6}}
    merge(parse_config(ties | {"slices": stacked}), tmp_path / "ties")
    assert generates(tmp_path / "ties").config.num_hidden_layers == 3


def test_a_grown_model_computes_what_its_layers_compute(tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    _, a, _ = tiny_models("llama")
    slices = [{"sources": [{"model": str(a), "layer_range": ends}]} for ends in ([0, 2], [1, 3])]
    merge(parse_config({"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
    grown, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", a))
    tokens = torch.tensor([[1, 5, 7]])
    layers = small.model.layers
    small.model.layers = torch.nn.ModuleList([layers[i] for i in (0, 1, 1, 2)])
    small.config.num_hidden_layers = 4
    with torch.no_grad():
        assert torch.equal(grown(tokens, use_cache=False).logits, small(tokens, use_cache=False).logits)


def test_a_model_with_special_first_layers_keeps_them_first(tiny_models, tmp_path):
    _, a, b = tiny_models("qwen3_moe")  # its layer 0 has no experts

    def slices(*stretches):
        return [{"sources": [{"model": str(folder), "layer_range": ends}]} for folder, ends in stretches]

    config = {"merge_method": "passthrough", "slices": slices((a, [0, 2]), (b, [1, 3]))}
    merge(parse_config(config), tmp_path / "out")
    model = generates(tmp_path / "out")
    assert model.config.mlp_only_layers == [0]
    config["slices"] = slices((a, [0, 2]), (b, [0, 3]))
    with pytest.raises(ModelError, match=r"only layer 0 of .* has 'mlp.down_proj.weight', and in the output layer 2"):
        merge(parse_config(config), tmp_path / "other")


def test_a_grown_model_is_verified(tiny_models, tmp_path):
    _, a, b = tiny_models("gpt2")
    slices = cut(0, 2, a)["slices"] + cut(1, 3, b)["slices"]
    config = parse_config({"merge_method": "passthrough", "slices": slices, "out_dtype": "float32"})
    assert rehearse(config)["tensors"] == merge(config, tmp_path / "out")["tensors"]
    assert verify(tmp_path / "out")["tensors"] == len(read_model(tmp_path / "out"))


def modules(given, **top):
    return parse_config({"merge_method": "linear", "parameters": {"weight": 1}, "modules": given} | top)


def whole(*folders, **parameters):
    own = {"parameters": parameters} if parameters else {}
    return {"models": [{"model": str(folder)} for folder in folders], **own}


def cut(first, end, *folders):
    return {"slices": [{"sources": [{"model": str(folder), "layer_range": [first, end]} for folder in folders]}]}


def test_encoder_and_decoder_are_modules_of_their_own(tiny_models, tmp_path):
    _, a, b = tiny_models("t5")
    merge(modules({"encoder": whole(a, b), "decoder": cut(0, 2, a, b)}), tmp_path / "out")
    model = generates(tmp_path / "out")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 2)
    ours, one, other = (read_model(folder) for folder in (tmp_path / "out", a, b))
    mean = (one["shared.weight"].double() + other["shared.weight"].double()) / 2
    assert torch.equal(ours["shared.weight"], mean.to(torch.bfloat16))  # mergekit leaves it out of the file


def test_a_vision_tower_is_a_module_and_the_projector_follows_the_models_of_all(tiny_models, tmp_path):
    _, a, b = tiny_models("llava")
    text = cut(0, 2, a, b)
    text["slices"] += cut(0, 3, a, b)["slices"]
    merge(modules({"language_model": text, "vision_tower": whole(a, b)}), tmp_path / "out")
    config = generates(tmp_path / "out").config
    assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (5, 2)


def test_what_belongs_to_no_listed_module_is_asked_for_where_the_modules_merge_different_models(tiny_models, tmp_path):
    _, a, b = tiny_models("t5")
    config = modules({"encoder": whole(a), "decoder": whole(a, b)})
    with pytest.raises(RecipeError, match=r"'shared.weight' belongs to no module listed.*add the module 'shared'"):
        merge(config, tmp_path / "out")
    merge(modules({"encoder": whole(a), "decoder": whole(a, b), "shared": whole(b)}), tmp_path / "out")
    assert torch.equal(read_model(tmp_path / "out")["shared.weight"], read_model(b)["shared.weight"])
    generates(tmp_path / "out")


def test_a_module_that_is_not_there_or_missing_is_refused_with_those_that_are(tiny_models, tmp_path):
    _, a, b = tiny_models("t5")
    with pytest.raises(RecipeError, match=r"has no module 'encodr'; it has: decoder, encoder, shared"):
        merge(modules({"encodr": whole(a), "decoder": whole(a)}), tmp_path / "out")
    with pytest.raises(RecipeError, match="module 'encoder' is missing; add it"):
        merge(modules({"decoder": whole(a, b)}), tmp_path / "out")
    with pytest.raises(RecipeError, match="module 'shared' has no layers to slice"):
        merge(modules({"decoder": whole(a), "encoder": whole(a), "shared": cut(0, 1, a)}), tmp_path / "out")
    with pytest.raises(
        RecipeError, match="several stacks of layers; give slices for each under 'modules': decoder, enc"
    ):
        merge(parse_config({"merge_method": "passthrough", **cut(0, 2, a)}), tmp_path / "out")
    with pytest.raises(
        ModelError, match=r"only layer 0 of .* has 'layer.0.SelfAttention.relative_attention_bias.weight'"
    ):
        merge(modules({"decoder": whole(a, b), "encoder": cut(1, 3, a, b)}), tmp_path / "out")


def test_the_module_of_a_model_with_one_stack_is_called_default(toys):
    config = {"merge_method": "passthrough", "modules": {"default": cut(1, 3, toys / "a")}}
    merge(parse_config(config), toys / "out")
    assert [t[0].item() for t in read_model(toys / "out").values()] == [192, 190, 101, 102, 191]
    merge(parse_config(config | {"modules": {"default": whole(toys / "a")}}), toys / "same")
    same, original = read_model(toys / "same"), read_model(toys / "a")
    assert all(torch.equal(same[name], original[name]) for name in same.keys() | original.keys())


STACKS = {
    "one": ({"model.layers": 3}, {"num_hidden_layers": 3}, {"default": "model.layers"}),
    "experts": ({"h": 2, "h.0.mlp.experts": 2}, {"n_layer": 2}, {"default": "h"}),
    "equal encoder and decoder": (
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2},
        {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
    ),
    "a decoder alone": ({"model.decoder.layers": 2}, {"num_hidden_layers": 2}, {"default": "model.decoder.layers"}),
    "equal vision and text": (
        {"model.visual.blocks": 2, "model.visual.merger": 2, "model.language_model.layers": 2},
        {"vision_config": {"model_type": "v", "depth": 2}, "text_config": {"model_type": "t", "num_hidden_layers": 2}},
        {"visual": "model.visual.blocks", "language_model": "model.language_model.layers"},
    ),
    "a text part that leaves its defaults out": (
        {"vision_tower.encoder.layers": 2, "language_model.model.layers": 3, "projector": 2},
        {"vision_config": {"model_type": "v", "num_hidden_layers": 2}, "text_config": {"model_type": "t"}},
        {"vision_tower": "vision_tower.encoder.layers", "language_model": "language_model.model.layers"},
    ),
    "images alone": ({"vit.encoder.layer": 2}, {"num_hidden_layers": 2}, {"default": "vit.encoder.layer"}),
    "a count that does not fit": ({"model.layers": 4}, {"num_hidden_layers": 3}, {}),
    "a gap": ({"model.layers.1": 1}, {"num_hidden_layers": 2}, {}),
}


@pytest.mark.parametrize("case", STACKS)
def test_stacks_of_layers_are_known_from_tensor_names_and_counts_in_config_json(case):
    stacks, config, expected = STACKS[case]
    names = [f"{prefix}.{i}.{j}" for prefix, count in stacks.items() for i in range(count) for j in "vw"]
    names += [f"{prefix}.x" for prefix in stacks if "merger" not in prefix and "projector" not in prefix]
    assert {name: stack.prefix for name, stack in find_stacks(names, config).items()} == expected
