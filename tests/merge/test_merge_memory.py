"""State dicts in memory: the numbers of the same merge on disk, also into the parameters of a loaded model."""

import numpy as np
import pytest
import torch
from model_folders import EXAMPLE, example, read_model, same_bits, write_model

from mixmerge.errors import ModelError, RecipeError, UserError
from mixmerge.merge import METHODS, merge, merge_state_dicts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    floats = {"embed.w": torch.randn(30, 20, generator=draw), "layers.0.w": torch.randn(17, generator=draw)}
    return {name: tensor.to(dtype) for name, tensor in floats.items()} | {"step": torch.tensor(3)}


def config_of(method, **top):
    spec = METHODS[method]
    parameters = {name: EXAMPLE[name] for name in spec.parameters if name in EXAMPLE}
    models = [{"model": name} for name in ("a", "b")][: spec.inputs[1]]
    base = {} if spec.base == "none" else {"base_model": "base"}
    return {"merge_method": method, "models": models, "parameters": parameters, **base, **top}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_that_of_the_same_merge_on_disk(method, dtype, tmp_path):
    models = {name: drawn(seed, dtype) for seed, name in enumerate(("base", "a", "b"))}
    folders = [write_model(tmp_path / name, tensors) for name, tensors in models.items()]
    merge(example(method, folders, seed=4), tmp_path / "out")
    found, expected = merge_state_dicts(models, config_of(method, seed=4)), read_model(tmp_path / "out")
    assert list(found) == list(models["a"])
    assert found.keys() == expected.keys()
    for name in ("embed.w", "layers.0.w"):
        assert same_bits(found[name], expected[name]), name
    assert found["step"] == 3


def test_a_loaded_model_is_filled_in_place_and_runs(tiny_models):
    from transformers import AutoModelForCausalLM

    base, a, b = (AutoModelForCausalLM.from_pretrained(folder) for folder in tiny_models("llama"))
    models = {"base": base.state_dict(), "a": a.state_dict(), "b": b.state_dict()}
    expected = merge_state_dicts(models, config_of("ties"))
    places = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    found = merge_state_dicts(models, config_of("ties"), into=base.state_dict())  # the target is an input, too
    assert {name: parameter.data_ptr() for name, parameter in base.named_parameters()} == places
    for name, parameter in base.named_parameters():
        assert same_bits(parameter.detach(), expected[name])
        assert same_bits(found[name], expected[name])
    assert torch.isfinite(base(torch.tensor([[1, 2, 3]])).logits).all()


def test_tensors_that_are_not_contiguous_are_read_and_filled():
    models = {name: {"w": torch.randn(6, 9).T} for name in "ab"}
    target = {"w": torch.zeros(6, 9).T}
    config = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    merge_state_dicts(models, config, into=target)
    torch.testing.assert_close(target["w"], (models["a"]["w"] + models["b"]["w"]) / 2)


def test_the_inputs_are_left_as_they_are():
    models = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    before = {name: {key: tensor.clone() for key, tensor in model.items()} for name, model in models.items()}
    merge_state_dicts(models, config_of("dare_ties"), threads=2)
    for name, model in models.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in model.items())


def test_a_chosen_dtype_is_that_of_the_result():
    models = {name: drawn(seed) for seed, name in enumerate("ab")}
    found = merge_state_dicts(models, config_of("linear", out_dtype="bfloat16"))
    assert found["embed.w"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"models": [{"model": "a"}, {"model": "bb"}]}, RecipeError, "there is no state dict 'bb'; did you mean 'b'"),
        ({"merge_method": "tis"}, RecipeError, "did you mean 'ties'"),
        ({"tokenizer_source": "base"}, RecipeError, "state dicts are merged whole"),
        ({"tokenizer": {"source": "union"}}, RecipeError, "state dicts are merged whole"),
        ({"chat_template": "chatml"}, RecipeError, "state dicts are merged whole"),
    ],
)
def test_a_configuration_that_cannot_hold_is_refused(change, error, what):
    models = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    with pytest.raises(error, match=what):
        merge_state_dicts(models, config_of("ties") | change)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    models = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    target = {name: torch.zeros_like(tensor) for name, tensor in models["base"].items()}
    for change, what in (
        ({"embed.w": torch.zeros(30, 21)}, r"is F32 \[30, 21\], the result F32 \[30, 20\]"),
        ({"embed.w": torch.zeros(30, 20).half()}, r"is F16 \[30, 20\], the result F32"),
        ({"embed.w": torch.zeros(30, 20, dtype=torch.complex64)}, "which cannot be merged or copied"),
    ):
        with pytest.raises(ModelError, match=what):
            merge_state_dicts(models, config_of("ties"), into=target | change)
    with pytest.raises(ModelError, match=r"no tensor 'layers.0.w' to merge into"):
        merge_state_dicts(models, config_of("ties"), into={"embed.w": target["embed.w"], "step": target["step"]})
    models["b"]["embed.w"] = torch.zeros(2, 2)
    with pytest.raises(ModelError, match=r"tensor 'embed.w' has shape \[30, 20\] in 'base' and \[2, 2\] in 'b'"):
        merge_state_dicts(models, config_of("ties"), into=target)
    assert not any(tensor.any() for tensor in target.values())


def test_a_nan_is_named_with_its_model():
    models = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    models["a"]["layers.0.w"][3] = float("nan")
    with pytest.raises(ModelError, match=r"a: tensor 'layers.0.w' holds NaN or infinity"):
        merge_state_dicts(models, config_of("ties"))


# names that are one tensor, and memory that is shared


def tied(value):
    shared = torch.full((4, 2), float(value))
    return {"embed.weight": shared, "norm.weight": torch.full((2,), float(value)), "lm_head.weight": shared}


HALVES = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}


def test_tied_tensors_are_merged_once_and_stay_tied():
    a, b = tied(0), tied(1)
    found = merge_state_dicts({"a": a, "b": b}, HALVES)
    assert list(found) == list(a)
    assert found["lm_head.weight"] is found["embed.weight"]
    place = a["embed.weight"].data_ptr()
    found = merge_state_dicts({"a": a, "b": b}, HALVES, into=a)
    assert a["embed.weight"].data_ptr() == place == found["lm_head.weight"].data_ptr()
    assert torch.equal(a["embed.weight"], torch.full((4, 2), 0.5))


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic", "dare_ties"])
def test_a_tied_model_is_merged_into_itself_as_it_would_be_on_disk(method, tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    folders = tiny_models("llama_tied")
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
    merge(example(method, folders, seed=4), tmp_path / "out")
    state_dicts = dict(zip(("base", "a", "b"), (model.state_dict() for model in models), strict=True))
    target = models[0] if METHODS[method].base != "none" else models[1]
    merge_state_dicts(state_dicts, config_of(method, seed=4), into=dict(target.named_parameters()))  # lists a twin once
    expected = read_model(tmp_path / "out")
    assert "lm_head.weight" not in expected
    for name, parameter in target.named_parameters():
        assert same_bits(parameter.detach(), expected[name]), name


def test_a_filter_counts_by_the_first_of_two_names():
    weight = [{"filter": "lm_head", "value": 0.0}, {"value": 1.0}]
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": weight}}]
    found = merge_state_dicts({"a": tied(0), "b": tied(1)}, {"merge_method": "linear", "models": models})
    assert torch.equal(found["lm_head.weight"], torch.full((4, 2), 0.5))


def test_tensors_that_only_one_model_ties_are_two():
    a, b = tied(0), tied(1)
    b["lm_head.weight"] = torch.full((4, 2), 3.0)
    found = merge_state_dicts({"a": a, "b": b}, HALVES)
    assert found["embed.weight"][0, 0] == 0.5
    assert found["lm_head.weight"][0, 0] == 1.5
    with pytest.raises(
        ModelError, match=r"'embed.weight' and 'lm_head.weight' to merge into lie in each other's memory"
    ):
        merge_state_dicts({"a": a, "b": b}, HALVES, into=tied(7))
    merge_state_dicts({"a": a, "b": b}, HALVES, into=b)
    assert b["lm_head.weight"][0, 0] == 1.5


def test_twins_are_both_filled_where_the_target_has_two():
    target = {name: torch.zeros_like(tensor) for name, tensor in tied(0).items()}
    found = merge_state_dicts({"a": tied(0), "b": tied(1)}, HALVES, into=target)
    assert target["lm_head.weight"][0, 0] == target["embed.weight"][0, 0] == 0.5
    assert found["lm_head.weight"].data_ptr() == target["lm_head.weight"].data_ptr()
    with pytest.raises(ModelError, match=r"'lm_head.weight' to merge into is F32 \[2\]"):
        merge_state_dicts({"a": tied(0), "b": tied(1)}, HALVES, into=target | {"lm_head.weight": torch.zeros(2)})


def test_a_target_in_the_memory_of_another_input_is_refused():
    memory = torch.arange(8.0)
    a = {"p": memory[:4], "q": memory[4:]}
    b = {"p": torch.zeros(4), "q": torch.zeros(4)}
    for into in ({"p": memory[4:], "q": memory[:4]}, {"p": memory[1:5], "q": torch.zeros(4)}):
        with pytest.raises(
            ModelError, match=r"to merge into lies in the memory of '[pq]' of 'a', which is read for another"
        ):
            merge_state_dicts({"a": a, "b": b}, HALVES, into=into)
    with pytest.raises(ModelError, match="the elements of tensor 'q' to merge into share their memory"):
        merge_state_dicts({"a": a, "b": b}, HALVES, into={"p": torch.zeros(4), "q": torch.zeros(1).expand(4)})
    assert torch.equal(memory, torch.arange(8.0))
    merge_state_dicts({"a": a, "b": b}, HALVES, into=a)
    assert torch.equal(memory, torch.arange(8.0) / 2)


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (torch.nn.Linear(2, 2), "a: a Linear is not a state dict; give .* its state_dict"),
        ({"w": np.zeros(3)}, "'w' is a ndarray, not a torch tensor .* torch.from_numpy"),
        ({"w": None}, "'w' is a NoneType"),
        ({3: torch.zeros(3)}, "3 is a Tensor, not a torch tensor under its name"),
        ({"w": torch.zeros(3).to_sparse()}, "tensor 'w' is stored as torch.sparse_coo"),
        ({"w": torch.nested.nested_tensor([torch.zeros(3)])}, "tensor 'w' is a nested tensor"),
        ({"w": torch.zeros(3, device="meta")}, "tensor 'w' is on the meta device"),
    ],
)
def test_what_is_no_state_dict_is_refused(odd, what):
    with pytest.raises(ModelError, match=what):
        merge_state_dicts({"a": odd, "b": {"w": torch.zeros(3)}}, HALVES)
    if isinstance(odd, dict) and "w" in odd:
        fine = {"w": torch.zeros(3)}
        with pytest.raises(ModelError, match=what.replace("a: ", "into: ")):
            merge_state_dicts({"a": fine, "b": fine}, HALVES, into=odd)


def test_a_view_that_negates_is_read_as_it_looks():
    negated = torch.tensor([2 + 1j, 4 + 2j]).conj().imag
    assert negated.is_neg()
    found = merge_state_dicts({"a": {"w": negated}, "b": {"w": torch.zeros(2)}}, HALVES)
    assert found["w"].tolist() == [-0.5, -1]


def test_targets_that_overlap_in_any_way_are_refused():
    target = tied(7)
    memory = torch.zeros(40)
    target["norm.weight"], target["lm_head.weight"] = memory[:2], memory[1:9].view(4, 2)
    with pytest.raises(
        ModelError, match=r"'norm.weight' and 'lm_head.weight' to merge into lie in each other's memory"
    ):
        merge_state_dicts({"a": tied(0), "b": tied(1)}, HALVES, into=target)
    models = {name: {"w": torch.ones(4, 4)} for name in "ab"}
    with pytest.raises(ModelError, match="the elements of tensor 'w' to merge into share their memory"):
        merge_state_dicts(models, HALVES, into={"w": torch.zeros(20).as_strided((4, 4), (2, 1))})
    spread = {"w": torch.zeros(40).as_strided((4, 4), (9, 2))}
    merge_state_dicts(models, HALVES, into=spread)
    assert torch.equal(spread["w"], models["a"]["w"])
    negated = {"w": torch.tensor([[1 + 2j]]).conj().imag}
    merge_state_dicts({name: {"w": torch.ones(1, 1)} for name in "ab"}, HALVES, into=negated)
    assert negated["w"].tolist() == [[1]]


def test_threads_have_to_be_some():
    models = {name: drawn(seed) for seed, name in enumerate("ab")}
    for threads in (0, -1):
        with pytest.raises(UserError, match=f"threads must be at least 1, got {threads}"):
            merge_state_dicts(models, config_of("linear"), threads=threads)
