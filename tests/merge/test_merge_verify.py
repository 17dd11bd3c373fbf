"""A merge that is looked at again: compared with its record byte for byte, or rehearsed, and nothing is ever written."""

import json
import os
from pathlib import Path

import pytest
import torch
from model_folders import config_for, example, write_model

from mixmerge.errors import CheckpointError, ModelError
from mixmerge.merge import METHODS, merge, parse_config, rehearse, verify, words
from mixmerge.merge.card import to_yaml
from mixmerge.merge.checkpoint import open_checkpoint
from mixmerge.merge.record import RECORD, fingerprint


@pytest.fixture
def models(tmp_path):
    """A base and two models of 300 and 40 elements and a step counter."""
    draw = torch.Generator().manual_seed(0)
    return [
        write_model(
            tmp_path / name,
            {"w": torch.randn(30, 10, generator=draw), "v": torch.randn(40, generator=draw), "step": torch.tensor([7])},
        )
        for name in ("base", "a", "b")
    ]


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_found_to_be_what_its_record_says(method, models, tmp_path):
    merge(example(method, models, seed=5), tmp_path / "out", threads=2)
    before, seen = everything(tmp_path), []
    found = verify(tmp_path / "out", threads=1, progress=lambda done, total: seen.append((done, total)))
    assert (found["tensors"], found["parameters"]) == (3, 341)
    assert seen[-1] == (341, 341)
    assert everything(tmp_path) == before


def test_the_record_holds_configuration_inputs_seed_and_measurements(models, tmp_path):
    config = example("dare_ties", models, seed=9)
    measured = merge(config, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["config"] == config.to_mergekit()
    assert record["seed"] == 9
    assert record["measured"]["kept_share"] == measured["kept_share"]
    assert set(record["inputs"]) == {str(folder) for folder in models}
    assert all(entry["bytes"] > 1000 for entry in record["inputs"].values())


def test_relative_models_are_found_again_from_another_folder(models, tmp_path, monkeypatch):
    text = to_yaml(config_for("ties", models[1:], base=models[0], parameters={"weight": 1}))
    (tmp_path / "merge.yml").write_text(text.replace(f"{tmp_path}/", ""))
    merge(tmp_path / "merge.yml", tmp_path / "out")
    monkeypatch.chdir("/")
    assert verify(tmp_path / "out")["tensors"] == 3


def test_one_changed_bit_is_found_and_its_tensor_named(models, tmp_path):
    out = tmp_path / "out"
    merge(example("slerp", models), out)
    tensor = open_checkpoint(out).tensors["w"]
    data = bytearray((out / "model.safetensors").read_bytes())
    data[tensor.offset + 123] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"out: 1 of 3 tensors differ from the merge of its record: w; merge it again"
    ):
        verify(out)


def test_another_input_in_the_old_place_is_named(models, tmp_path):
    merge(example("ties", models), tmp_path / "out")
    write_model(models[1], {"w": torch.zeros(30, 10), "v": torch.zeros(40), "step": torch.tensor([7])})
    with pytest.raises(CheckpointError, match=r"model '.*a' is not the one that this merge was made from"):
        verify(tmp_path / "out")


def test_an_input_that_is_gone_is_named(models, tmp_path):
    merge(example("ties", models), tmp_path / "out")
    models[2].rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"b: no such model folder"):
        verify(tmp_path / "out")


def test_an_output_with_other_tensors_is_refused(models, tmp_path):
    merge(example("ties", models), tmp_path / "out")
    write_model(tmp_path / "out", {"w": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="its tensors are not those of its record"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "only a model that mixmerge merge has written"),
        ("{", "not the record"),
        ("[1]", "not the record"),
        ("{}", "not the"),
    ],
)
def test_a_missing_or_broken_record_is_said_to_be(content, what, models):
    if content is not None:
        (models[0] / RECORD).write_text(content)
    with pytest.raises(CheckpointError, match=what):
        verify(models[0])


def test_a_fingerprint_is_of_the_bytes_and_not_of_the_time(models, tmp_path):
    first = fingerprint(open_checkpoint(models[0]))
    os.utime(models[0] / "model.safetensors", (1, 1))
    assert fingerprint(open_checkpoint(models[0])) == first
    assert fingerprint(open_checkpoint(models[1])) != first


@pytest.mark.parametrize("method", METHODS)
def test_a_rehearsal_tells_sizes_and_time_and_writes_nothing(method, models, tmp_path):
    before = everything(tmp_path)
    found = rehearse(example(method, models, out_dtype="bfloat16"), threads=1)
    assert everything(tmp_path) == before
    count = len(found["models"])
    assert (found["tensors"], found["copied"], found["parameters"]) == (3, 1, 341)
    assert found["bytes_read"] == count * 340 * 4 + 8
    assert found["bytes_written"] == 340 * 2 + 8
    assert found["seconds"] > 0


def test_a_rehearsal_refuses_what_the_merge_would(models, tmp_path):
    write_model(models[2], {"w": torch.zeros(30, 11), "v": torch.zeros(40), "step": torch.tensor([7])})
    with pytest.raises(ModelError, match="tensor 'w' has shape"):
        rehearse(example("ties", models))


def test_words_for_people(models, tmp_path):
    config = example("ties", models)
    assert f"  {models[0]}: " in words.rehearsed(rehearse(config))
    found = merge(config, tmp_path / "out")
    assert words.merged(found, tmp_path / "out").startswith(f"{tmp_path}/out: 341 parameters in 3 tensors by ties, ")
    assert "2 tensors were there already" in words.merged(found | {"tensors_resumed": 2}, tmp_path)
    assert "all 3 tensors (341 parameters) and the files beside them are byte for byte" in words.verified(
        verify(tmp_path / "out"), tmp_path
    )


def loadable(models):
    (models[0] / "generation_config.json").write_text("{}")
    (models[0] / "tokenizer.json").write_text("{}")
    return example("ties", models)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda out: (out / "config.json").write_text('{"model_type": "llama", "rope_theta": 1}'), "config.json"),
        (lambda out: (out / "tokenizer.json").write_text("[]"), "tokenizer.json"),
        (lambda out: (out / "generation_config.json").unlink(), r"generation_config.json \(gone\)"),
        (lambda out: (out / "mergekit_config.yml").write_text("a: b"), "mergekit_config.yml"),
        (
            lambda out: (out / "pytorch_model.bin").write_bytes(b""),
            r"pytorch_model.bin \(added\)",
        ),
        (lambda out: (out / "chat_template.jinja").write_text("x"), r"chat_template.jinja \(added\)"),
        (lambda out: (out / "adapter_config.json").write_text("{}"), r"adapter_config.json \(added\)"),
        (
            lambda out: write_model(out / "sub", {"w": torch.zeros(1)}),
            r"sub/config.json \(added\), sub/model.safetensors",
        ),
    ],
)
def test_another_file_beside_the_weights_is_named(change, named, models, tmp_path):
    out = tmp_path / "out"
    merge(loadable(models), out)
    assert verify(out)["tensors"] == 3
    (out / "README.md").write_text("a card is for people to edit")
    (out / "LICENSE.txt").write_text("and so is what no loader reads")
    verify(out)
    change(out)
    with pytest.raises(CheckpointError, match=f"the tensors are those of its record, and these files are not: {named}"):
        verify(out)


def test_layers_that_are_read_twice_are_rehearsed_twice(tiny_models, tmp_path):
    model = tiny_models("llama")[0]
    part = {"sources": [{"model": str(model), "layer_range": [0, 2]}]}
    config = parse_config({"merge_method": "passthrough", "slices": [part, part, part]})
    foreseen = rehearse(config)
    assert foreseen["bytes_read"] == foreseen["bytes_written"] == merge(config, tmp_path / "out")["bytes_written"]
