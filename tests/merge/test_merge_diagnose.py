"""A diagnosis before the merge: its numbers against plain numpy, its sums over places, and what it refuses and reads."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import config_for, example, read_model, write_model
from safetensors.torch import save_file

from mixmerge.errors import ModelError, RecipeError
from mixmerge.merge import METHODS, merge, tensors
from mixmerge.merge.checkpoint import open_checkpoint
from mixmerge.merge.diagnose import SMALL, diagnose, effective_rank, measure
from mixmerge.merge.sources import Files, stored
from mixmerge.merge.tensors import Crew, Target

WEIGHT = {"parameters": {"weight": 1.0}}


def ties(base, models):
    return config_for("ties", models, base=base, **WEIGHT)


def as_numpy(folder):
    return {name: tensor.double().numpy().ravel() for name, tensor in read_model(folder).items()}


def cosine(a, b):
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


@pytest.fixture(scope="module")
def llama(tiny_models):
    """The base, two models, and their diagnosis as a merge by ties."""
    folders = tiny_models("llama")
    return folders, diagnose(ties(folders[0], folders[1:]))


# Numbers


def test_cosines_lengths_and_signs_of_every_tensor_are_what_numpy_finds(llama):
    folders, found = llama
    base, first, second = map(as_numpy, folders)
    assert [row["name"] for row in found["tensors"]] == sorted(base)
    for row in found["tensors"]:
        b, x, y = (model[row["name"]] for model in (base, first, second))
        pairs = {tuple(entry["pair"]): entry for entry in row["models"]}
        for (p, u), (q, v) in itertools.combinations(zip(map(str, folders), (b, x, y), strict=True), 2):
            assert pairs[p, q]["cosine"] == pytest.approx(cosine(u, v), rel=1e-12)
            assert pairs[p, q]["parallel_tensors"] == (abs(cosine(u, v)) > 0.9995)
        d, e = (x - b).astype(np.float32).astype(float), (y - b).astype(np.float32).astype(float)
        assert row["task_vectors"][0]["cosine"] == pytest.approx(cosine(d, e), rel=1e-9)
        for entry, delta in zip(row["lengths"], (d, e), strict=True):
            assert entry["relative_length"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(b), rel=1e-9)
            assert entry["changed_share"] == np.count_nonzero(delta) / delta.size
        shared, conflict = (d != 0) & (e != 0), d * e < 0
        size = np.abs(d) + np.abs(e)
        assert row["signs"]["shared_share"] == shared.mean()
        assert row["signs"]["conflict_share"] == conflict.sum() / shared.sum()
        assert row["signs"]["conflict_share_by_size"] == pytest.approx(size[conflict].sum() / size[shared].sum())
        assert row["signs"]["conflict_share_by_chance"] == 0.5


def test_the_effective_rank_is_that_of_the_singular_values(llama):
    folders, found = llama
    base, first = (read_model(folder) for folder in folders[:2])
    for row in found["tensors"]:
        entry = row["lengths"][0]
        if len(row["shape"]) < 2:
            assert entry["effective_rank"] is entry["full_rank"] is None
            continue
        values = np.linalg.svd((first[row["name"]].float() - base[row["name"]].float()).numpy(), compute_uv=False)
        shares = values / values.sum()
        assert entry["effective_rank"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
        assert entry["full_rank"] == min(row["shape"])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_directions_count_one_each_and_rounding_counts_nothing(rank):
    random = np.random.default_rng(rank)
    left, _ = np.linalg.qr(random.normal(size=(40, rank)))
    right, _ = np.linalg.qr(random.normal(size=(24, rank)))
    assert effective_rank((left @ right.T).astype(np.float32)) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_a_matrix_of_zeros_has_no_direction(shape):
    assert effective_rank(np.zeros(shape, np.float32)) == 0.0


def test_a_large_matrix_has_no_rank_and_says_what_large_is(tmp_path, monkeypatch):
    monkeypatch.setattr("mixmerge.merge.diagnose.SMALL", 99)
    models = [write_model(tmp_path / f"{i}", {"w": torch.randn(10, 10)}) for i in range(2)]
    found = diagnose(ties(models[0], models[1:]))
    assert found["tensors"][0]["lengths"][0]["effective_rank"] is None
    assert found["small_matrix"] == 99
    assert SMALL == 1 << 21


@pytest.mark.parametrize(("models", "chance"), [(2, 0.5), (3, 0.75), (4, 0.875)])
def test_unrelated_task_vectors_conflict_as_often_as_chance_says(models, chance, tmp_path):
    torch.manual_seed(models)
    folders = [write_model(tmp_path / f"{i}", {"w": torch.randn(200, 100)}) for i in range(models)]
    base = write_model(tmp_path / "base", {"w": torch.zeros(200, 100)})
    signs = diagnose(ties(base, folders))["total"]["signs"]
    assert signs["conflict_share_by_chance"] == pytest.approx(chance)
    assert signs["conflict_share"] == pytest.approx(chance, abs=0.02)


def test_an_element_that_one_model_changes_alone_is_no_conflict(tmp_path):
    base = write_model(tmp_path / "base", {"w": torch.zeros(4)})
    one = write_model(tmp_path / "one", {"w": torch.tensor([1.0, -1.0, 2.0, 0.0])})
    two = write_model(tmp_path / "two", {"w": torch.tensor([0.0, -3.0, -1.0, 0.0])})
    signs = diagnose(ties(base, [one, two]))["total"]["signs"]
    assert signs == {
        "shared_share": 0.5,
        "conflict_share": 0.5,
        "conflict_share_by_size": 3 / 7,
        "conflict_share_by_chance": 0.5,
    }


def test_what_cannot_be_divided_is_none_and_json_takes_it_all(tmp_path):
    zeros = [write_model(tmp_path / name, {"w": torch.zeros(3, 3)}) for name in "abc"]
    found = diagnose(ties(zeros[0], zeros[1:]))
    row = found["tensors"][0]
    assert row["models"][0]["cosine"] is None
    assert row["models"][0]["compared_tensors"] == 0
    assert row["models"][0]["parallel_share"] is None
    assert row["task_vectors"][0]["cosine"] is None
    assert row["lengths"][0]["relative_length"] is None
    assert row["signs"]["conflict_share"] is None
    json.dumps(found, allow_nan=False)


# Places


@pytest.mark.parametrize("by", ["kinds", "cells", "tensors"])
def test_places_cut_the_model_into_parts_that_add_up(by, llama):
    folders, found = llama
    assert sum(row["elements"] for row in found[by]) == sum(t.numel() for t in read_model(folders[0]).values())
    assert sum(row["tensors"] for row in found[by]) == len(found["tensors"])


def test_a_place_is_told_as_if_its_tensors_were_one_vector(llama):
    folders, found = llama
    base, first, second = map(as_numpy, folders)
    for cell in found["cells"]:
        place = (cell["stack"], cell["layer"], cell["kind"])
        names = [r["name"] for r in found["tensors"] if (r["stack"], r["layer"], r["kind"]) == place]
        b, x, y = (np.concatenate([model[name] for name in names]) for model in (base, first, second))
        assert cell["models"][0]["cosine"] == pytest.approx(cosine(b, x), rel=1e-9)
        assert cell["task_vectors"][0]["cosine"] == pytest.approx(cosine(x - b, y - b), rel=1e-5)


def test_layers_and_the_total_are_told_over_matrices(tmp_path):
    """A norm of great length would hide what the matrices do."""

    def model(name, turned):
        matrix = torch.eye(4) if not turned else torch.eye(4).flip(0)
        layer = {"layers.0.mlp.up_proj.weight": matrix, "layers.0.norm.weight": torch.full((4,), 1e4)}
        return write_model(tmp_path / name, layer)

    found = diagnose(ties(model("base", False), [model("one", True)]))
    assert found["total"]["models"][0]["cosine"] == 0.0
    assert found["layers"][0]["models"][0]["cosine"] == 0.0
    assert found["total"]["tensors"] == 1
    assert {row["kind"]: row["models"][0]["cosine"] for row in found["kinds"]} == {"mlp": 0.0, "norm": 1.0}


def test_a_model_of_vectors_alone_is_told_over_vectors(tmp_path):
    models = [write_model(tmp_path / f"{i}", {"w": torch.tensor([1.0, i])}) for i in range(2)]
    assert diagnose(ties(models[0], models[1:]))["total"]["models"][0]["cosine"] == pytest.approx(math.sqrt(0.5))


def test_layers_come_in_their_order_after_what_stands_outside(tmp_path):
    names = [f"layers.{i}.mlp.up_proj.weight" for i in range(11)] + ["lm_head.weight"]
    models = [write_model(tmp_path / f"{i}", {name: torch.randn(2, 2) for name in names}) for i in range(2)]
    found = diagnose(config_for("linear", models, **WEIGHT))
    assert [row["layer"] for row in found["layers"]] == [None, *range(11)]


def test_tensors_of_other_models_are_added_without_a_mix_up(tmp_path):
    """What a merge in slices has: each layer from models of its own."""
    torch.manual_seed(0)
    values = {name: torch.randn(6, 5) for name in "abc"}
    files = Files()
    sources = {
        name: stored(open_checkpoint(write_model(tmp_path / name, {"w": value}), name), files)["w"]
        for name, value in values.items()
    }
    at = ties(tmp_path / "a", [tmp_path / "b"]).whole.at("w", (6, 5))

    def target(*names):
        return Target("w", (6, 5), "F32", METHODS["linear"], at, tuple(sources[name] for name in names), None)

    with Crew(1, 2, 0) as crew:
        told = (measure(target("a", "b"), crew) + measure(target("c", "b"), crew)).told()
    files.close()
    flat = {name: value.double().numpy().ravel() for name, value in values.items()}
    assert {tuple(e["pair"]): e["cosine"] for e in told["models"]} == {
        ("a", "b"): pytest.approx(cosine(flat["a"], flat["b"])),
        ("c", "b"): pytest.approx(cosine(flat["c"], flat["b"])),
    }
    assert told["tensors"] == 2


def test_an_adapter_is_diagnosed_as_the_model_that_it_makes(tmp_path):
    """The task vector of a LoRA of rank 2 has two directions; the rest of the model is the base."""
    torch.manual_seed(0)
    names = ["layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"]
    base = write_model(tmp_path / "base", {name: torch.randn(24, 24) for name in names})
    left, right = (torch.linalg.qr(torch.randn(24, 2))[0] for _ in range(2))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = "base_model.model.layers.0.mlp.up_proj"
    factors = {f"{stem}.lora_A.weight": right.T.contiguous(), f"{stem}.lora_B.weight": left.contiguous()}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    found = diagnose(config_for("task_arithmetic", [f"{base}+{adapter}"], base=base, **WEIGHT))
    down, up = (row["lengths"][0] for row in found["tensors"])
    assert down["changed_share"] == down["relative_length"] == down["effective_rank"] == 0.0
    assert up["effective_rank"] == pytest.approx(2.0, rel=1e-3)
    assert up["full_rank"] == 24
    assert list(found["names"].values()) == ["base", "base+adapter"]


# The merge it speaks of


@pytest.mark.parametrize("drift", [0.0, 0.02, 0.04, 1.0])
def test_slerp_merges_as_parallel_what_the_diagnosis_says(drift, tmp_path):
    torch.manual_seed(1)
    base = {f"layers.{i}.mlp.up_proj.weight": torch.randn(20, 20) for i in range(6)} | {"zero": torch.zeros(5)}
    moved = {name: x + drift * (1 + i / 10) * torch.randn_like(x) for i, (name, x) in enumerate(base.items())}
    folders = [write_model(tmp_path / "base", base), write_model(tmp_path / "one", moved)]
    config = config_for("slerp", folders[1:], base=folders[0], parameters={"t": 0.5})
    found = diagnose(config)
    parallel = sum(row["models"][0]["parallel_tensors"] for row in found["tensors"])
    assert merge(config, tmp_path / "out")["parallel_share"] == parallel / len(base)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_diagnosed(method, tiny_models):
    config = example(method, tiny_models("gpt2"))
    found = diagnose(config)
    assert found["method"] == method
    assert found["bases"] == ([config.whole.base.model] if config.whole.base else [])
    assert found["models"] == [entry.model for entry in config.whole.inputs]
    assert found["conclusions"]
    assert len(found["total"]["lengths"]) == (len(config.whole.inputs) if config.whole.base else 0)
    assert len(found["total"]["models"]) == math.comb(len(config.whole.inputs) + (config.whole.base is not None), 2)
    json.dumps(found, allow_nan=False)


def test_without_a_base_there_are_models_and_no_task_vectors(tiny_models):
    found = diagnose(config_for("linear", tiny_models("llama"), **WEIGHT))
    assert found["bases"] == []
    assert (found["total"]["task_vectors"], found["total"]["lengths"]) == ([], [])
    assert found["total"]["signs"]["conflict_share"] is None
    assert len(found["total"]["models"]) == 3


# How it works


def without_times(found):
    return {key: value for key, value in found.items() if key != "seconds"}


def test_threads_change_no_number_and_blocks_none_that_can_be_seen(tiny_models, monkeypatch):
    folders = tiny_models("gpt2")
    config = ties(folders[0], folders[1:])
    one = diagnose(config, threads=1)
    assert without_times(diagnose(config, threads=3)) == without_times(one)
    monkeypatch.setattr(tensors, "BLOCK", 300)
    small = diagnose(config, threads=2)
    for ours, theirs in zip(small["tensors"], one["tensors"], strict=True):
        assert ours["signs"]["conflict_share"] == theirs["signs"]["conflict_share"]
        cosines = [row["models"][2]["cosine"] for row in (ours, theirs)]  # of the two models: none is zero in both
        assert cosines[0] == pytest.approx(cosines[1], rel=1e-12)


def test_every_input_is_read_once_and_nothing_is_written(llama, tiny_models):
    folders, found = llama
    files = [sorted(path.name for path in folder.iterdir()) for folder in tiny_models("llama")]
    elements = sum(t.numel() for t in read_model(folders[0]).values())
    assert found["bytes_read"] == 3 * 2 * elements
    assert files[0] == files[1] == files[2]


def test_progress_counts_to_the_whole(tiny_models):
    folders, seen = tiny_models("llama"), []
    diagnose(ties(folders[0], folders[1:]), progress=lambda done, whole: seen.append((done, whole)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(t.numel() for t in read_model(folders[0]).values())


def test_a_nan_is_named_with_its_tensor_and_model(tmp_path):
    good = write_model(tmp_path / "good", {"w": torch.ones(4)})
    bad = write_model(tmp_path / "bad", {"w": torch.tensor([1.0, float("nan"), 1.0, 1.0])})
    with pytest.raises(ModelError, match="bad: tensor 'w' holds NaN"):
        diagnose(ties(good, [bad]))


def test_models_that_do_not_fit_are_refused_as_a_merge_refuses_them(tmp_path):
    one, other = write_model(tmp_path / "a", {"w": torch.ones(4)}), write_model(tmp_path / "b", {"w": torch.ones(5)})
    config = ties(one, [other])
    with pytest.raises(ModelError) as diagnosed:
        diagnose(config)
    with pytest.raises(ModelError) as merged:
        merge(config, tmp_path / "out")
    assert str(diagnosed.value) == str(merged.value)


def test_a_configuration_that_would_not_merge_is_not_diagnosed(tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text("merge_method: tie\nmodels: [{model: a}]\n")
    with pytest.raises(RecipeError, match="did you mean 'ties'"):
        diagnose(path)


@settings(max_examples=25)
@given(
    values=st.lists(
        st.lists(st.floats(-4, 4, width=16), min_size=6, max_size=6).map(
            lambda row: [x if abs(x) > 0.01 else 0.0 for x in row]
        ),
        min_size=2,
        max_size=4,
    )
)
def test_shares_are_shares_and_cosines_are_cosines(values, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = [write_model(root / f"{i}", {"w": torch.tensor(row).view(2, 3)}) for i, row in enumerate(values)]
    found = diagnose(ties(folders[0], folders[1:]))
    total = found["total"]
    shares = [v for v in total["signs"].values() if v is not None]
    shares += [entry["changed_share"] for entry in total["lengths"]]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert all(-1.0 <= e["cosine"] <= 1.0 for e in total["models"] + total["task_vectors"] if e["cosine"] is not None)
    ranks = [(e["effective_rank"], e["full_rank"]) for e in total["lengths"]]
    assert all(0.0 <= rank <= full * (1 + 1e-9) for rank, full in ranks)
    json.dumps(found, allow_nan=False)
