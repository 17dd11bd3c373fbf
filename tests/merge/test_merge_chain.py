"""Files of several merges that feed each other: one output, as if each had been run on its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import generates, read_model, write_model

from mixmerge.errors import CheckpointError, ModelError, RecipeError
from mixmerge.merge import load_config, merge, rehearse, verify
from mixmerge.merge.checkpoint import open_checkpoint
from mixmerge.merge.diagnose import diagnose

CHAIN = """\
name: blend
merge_method: linear
models: [{model: first}, {model: second}]
parameters: {weight: 0.5}
---
name: grown
merge_method: passthrough
slices:
  - sources: [{model: blend, layer_range: [0, 2]}]
  - sources: [{model: second, layer_range: [1, 3]}]
---
merge_method: slerp
base_model: grown
models: [{model: longer}]
parameters: {t: 0.5}
---
name: longer
merge_method: passthrough
slices:
  - sources: [{model: blend, layer_range: [0, 1]}]
  - sources: [{model: first, layer_range: [0, 3]}]
"""
# the last document is the output
CHAIN = "---\n".join([*(CHAIN.split("---\n")[i] for i in (3, 1, 0)), CHAIN.split("---\n")[2]])


@pytest.fixture
def chain(tiny_models, tmp_path):
    for folder in tiny_models("llama"):
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "merge.yml").write_text(CHAIN)
    return tmp_path / "merge.yml"


def left(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {"merge.yml", "base", "first", "second"}


def test_a_chain_gives_what_its_merges_give_one_after_the_other(chain, tmp_path):
    seen = []
    config = load_config(chain)
    assert [one.name for one in config.earlier] == ["blend", "longer", "grown"]
    measured = merge(config, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert left(tmp_path) == {"out"}
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > measured["parameters"]
    for text in CHAIN.split("---\n")[2::-1]:
        name = text.splitlines()[0].removeprefix("name: ")
        (tmp_path / "one.yml").write_text(text)
        merge(tmp_path / "one.yml", tmp_path / name)
    (tmp_path / "one.yml").write_text(CHAIN.split("---\n")[3])
    merge(tmp_path / "one.yml", tmp_path / "by_hand")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "by_hand" / file).read_bytes()
    assert generates(tmp_path / "out").config.num_hidden_layers == 4


def test_the_configuration_beside_the_output_holds_the_whole_chain(chain, tmp_path):
    merge(chain, tmp_path / "out")
    again = load_config(tmp_path / "out" / "mergekit_config.yml")
    card = (tmp_path / "out" / "README.md").read_text()
    assert again == load_config(chain)
    assert "- `first`" in card
    assert "- `blend`" not in card


def test_a_chain_is_rehearsed_in_sum_and_writes_nothing(chain, tmp_path):
    found, before = rehearse(load_config(chain)), left(tmp_path)
    assert left(tmp_path) == before
    merged = merge(chain, tmp_path / "out")
    assert found["bytes_written"] <= merged["bytes_written"] <= found["bytes_written"] + 100_000  # and headers
    assert (found["tensors"], found["parameters"]) == (merged["tensors"], merged["parameters"])
    assert not {"blend", "longer", "grown"} & found["models"].keys()
    assert found["seconds"] > 0


def test_a_chain_is_verified_from_its_first_inputs_on_and_leaves_nothing(chain, tmp_path):
    merge(chain, tmp_path / "out")
    before = left(tmp_path)
    assert verify(tmp_path / "out")["tensors"] == len(open_checkpoint(tmp_path / "out").tensors)
    assert left(tmp_path) == before
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors differ from the merge of its record"):
        verify(tmp_path / "out")
    (tmp_path / "second").unlink()
    (tmp_path / "second").symlink_to((tmp_path / "base").resolve())
    with pytest.raises(CheckpointError, match="model 'second' is not the one that this merge was made from"):
        verify(tmp_path / "out")
    assert left(tmp_path) == before


KILLED = """
import os, signal, sys, time
from pathlib import Path
from mixmerge.merge import load_config, merge, rehearse, verify
def progress(done, total):
    if done > total * float(sys.argv[3]):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
merge(load_config(Path(sys.argv[1])), Path(sys.argv[2]), progress=progress)
"""


@pytest.mark.parametrize(("share", "kept"), [(0.1, 0), (0.5, 2), (0.9, 3)])
def test_finished_merges_of_a_chain_survive_a_kill_and_are_not_made_again(share, kept, chain, tmp_path):
    command = [sys.executable, "-c", KILLED, str(chain), str(tmp_path / "out"), str(share)]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "out").exists()
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.earlier").glob("[a-z]*")}
    assert len(made) == kept
    measured = merge(chain, tmp_path / "out")
    assert left(tmp_path) == {"out"}
    clean = merge(chain, tmp_path / "clean")
    assert measured["bytes_written"] + (kept > 0) <= clean["bytes_written"]
    for path in (tmp_path / "clean").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_finished_merge_of_a_chain_that_has_changed_since_is_made_again(chain, tmp_path, caplog):
    command = [sys.executable, "-c", KILLED, str(chain), str(tmp_path / "out"), "0.9"]
    assert subprocess.run(command, env=os.environ, capture_output=True).returncode == -signal.SIGKILL
    flipped = next((tmp_path / ".out.earlier").glob("blend-*/model.safetensors"))
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 1
    flipped.write_bytes(data)
    merge(chain, tmp_path / "out")
    assert f"{flipped} has changed since it was written: not carried on from" in caplog.messages
    assert left(tmp_path) == {"out"}
    merge(chain, tmp_path / "clean")
    for path in (tmp_path / "clean").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_chain_that_cannot_end_is_refused_before_its_first_merge_writes(chain, tmp_path):
    chain.write_text(CHAIN.replace("layer_range: [0, 3]", "layer_range: [0, 2]"))  # 3 layers instead of 4
    wrote = []
    with pytest.raises(ModelError, match=r"tensor 'model.layers.3.* is in 'grown' and not in 'longer'"):
        merge(chain, tmp_path / "out", progress=lambda *done: wrote.append(done))
    chain.write_text(CHAIN.replace("second, layer_range: [1, 3]", "blend, layer_range: [2, 4]"))
    with pytest.raises(RecipeError, match=r"merge.yml:11: slices.1.* \[2, 4\] goes beyond the 3 layers of 'blend'"):
        merge(chain, tmp_path / "out", progress=lambda *done: wrote.append(done))
    chain.write_text(CHAIN.replace("model: blend, layer_range: [0, 1]", "model: blnd, layer_range: [0, 1]"))
    unknown = (
        r"merge.yml:4: slices.0.sources.0.model: 'blnd' is neither a merge of this file nor a folder; did you mean 'ble"
    )
    with pytest.raises(RecipeError, match=unknown):
        merge(chain, tmp_path / "out", progress=lambda *done: wrote.append(done))
    chain.write_text(CHAIN.replace("base_model: grown", "base_model: grown+adapter"))
    with pytest.raises(RecipeError, match="nothing uses the merge 'grown'"):
        merge(chain, tmp_path / "out")
    assert not wrote
    assert left(tmp_path) == set()


def test_a_chain_that_breaks_off_leaves_nothing(tmp_path):
    for name, value in (("a", 1.0), ("b", float("nan"))):
        write_model(tmp_path / name, {"w": torch.full((4,), value)})
    (tmp_path / "merge.yml").write_text(
        "name: twice\nmerge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 2, normalize: false}\n---\n"
        "merge_method: linear\nmodels: [{model: twice}, {model: b}]\nparameters: {weight: 1}\n"
    )
    with pytest.raises(ModelError, match="b: tensor 'w' holds NaN"):
        merge(tmp_path / "merge.yml", tmp_path / "out")
    assert left(tmp_path) == {"a", "b"}
    write_model(tmp_path / "b", {"w": torch.full((4,), 4.0)})
    merge(tmp_path / "merge.yml", tmp_path / "out")
    assert read_model(tmp_path / "out")["w"].tolist() == [3.0] * 4


def test_what_only_numbers_can_tell_is_checked_when_the_earlier_merge_has_made_them(tiny_models, tmp_path):
    _, a, b = tiny_models("llama_tied")
    (tmp_path / "repeats").mkdir()
    tensors = read_model(b) | {"lm_head.weight": read_model(b)["model.embed_tokens.weight"]}
    write_model(tmp_path / "repeats", tensors)
    (tmp_path / "repeats" / "config.json").write_text((b / "config.json").read_text().replace('"tie_word', '"x'))
    (tmp_path / "merge.yml").write_text(
        "name: copy\nmerge_method: passthrough\nmodels: [{model: repeats}]\n---\n"
        f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: copy}}]\nparameters: {{weight: 1}}\n"
    )
    merge(tmp_path / "merge.yml", tmp_path / "out")
    assert "lm_head.weight" not in read_model(tmp_path / "out")
    generates(tmp_path / "out")


def test_a_folder_of_the_same_name_as_ours_keeps_its_files(chain, tmp_path):
    (tmp_path / ".out.earlier").mkdir()
    (tmp_path / ".out.earlier" / "notes.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r".out.earlier: this folder is in the way and is not ours; move it away"):
        merge(chain, tmp_path / "out")
    assert (tmp_path / ".out.earlier" / "notes.txt").read_text() == "precious"


def test_a_chain_is_not_diagnosed_before_its_models_are_there(chain):
    with pytest.raises(RecipeError, match=r"takes the results of others of its file \('blend', .*make them first"):
        diagnose(chain)
