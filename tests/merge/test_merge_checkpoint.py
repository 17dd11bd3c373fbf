"""Model folders: what cannot be merged is refused from the headers, by name, before anything is written."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from model_folders import config_for, read_model, write_model
from safetensors.torch import save_file

from mixmerge.amounts import in_bytes
from mixmerge.errors import CheckpointError, ModelError
from mixmerge.merge import merge
from mixmerge.merge.card import to_yaml
from mixmerge.merge.checkpoint import ITEM_BYTES, Tensor, locate_model, open_checkpoint, read_header
from mixmerge.merge.sources import Files, encode, read_decoded, stored
from mixmerge.merge.writer import CheckpointWriter


def averaged(*folders, out, **top):
    return merge(config_for("linear", folders, parameters={"weight": 1}, **top), out)


def refused(error, *folders, out):
    """The message of a refusal that left nothing behind."""
    with pytest.raises(error) as caught:
        averaged(*folders, out=out)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return str(caught.value)


@pytest.fixture
def two(tmp_path):
    return [write_model(tmp_path / name, {"w": torch.ones(4, 3), "v": torch.zeros(5)}) for name in "ab"]


def test_headers_give_names_types_and_shapes_of_a_sharded_model(tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama")[0])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    opened = open_checkpoint(tmp_path / "sharded")
    assert len({tensor.file for tensor in opened.tensors.values()}) > 1
    weights = model.state_dict()
    assert {name: tensor.shape for name, tensor in opened.tensors.items()} == {
        n: tuple(w.shape) for n, w in weights.items()
    }
    for name, weight in weights.items():
        for start, size in ((0, weight.numel()), (weight.numel() // 3, 7)):
            found = torch.from_numpy(floats(opened, name, start, size))
            assert torch.equal(found, weight.flatten()[start : start + size].float())


def test_a_missing_tensor_is_named_with_both_models(two, tmp_path):
    write_model(two[1], {"w": torch.ones(4, 3)})
    text = refused(ModelError, *two, out=tmp_path / "out")
    assert f"tensor 'v' is in '{two[0]}' and not in '{two[1]}'" in text


def test_another_shape_is_named_with_both_shapes_and_both_models(two, tmp_path):
    write_model(two[1], {"w": torch.ones(6, 3), "v": torch.zeros(5)})
    text = refused(ModelError, *two, out=tmp_path / "out")
    assert f"tensor 'w' has shape [4, 3] in '{two[0]}' and [6, 3] in '{two[1]}'" in text
    assert "fine-tunes of one base" in text


def test_models_of_different_kinds_are_refused(two, tmp_path):
    (two[1] / "config.json").write_text('{"model_type": "qwen2"}')
    assert "is a llama model" in refused(ModelError, *two, out=tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn])
def test_tensors_that_are_not_merged_are_copied_when_equal_and_refused_when_not(dtype, tmp_path):
    mask = torch.tensor([1.0, 0.0, 1.0]).to(dtype)
    a, b = (write_model(tmp_path / n, {"w": torch.ones(2), "mask": mask}) for n in "ab")
    averaged(a, b, out=tmp_path / "out")
    copied = read_model(tmp_path / "out")["mask"]
    assert copied.dtype == dtype
    assert torch.equal(copied.float(), mask.float())
    write_model(b, {"w": torch.ones(2), "mask": torch.zeros(3).to(dtype)})
    assert "tensor 'mask'" in refused(ModelError, a, b, out=tmp_path / "other")


def test_an_empty_tensor_and_a_scalar_pass(tmp_path):
    tensors = {"none": torch.zeros(0, 4), "one": torch.tensor(2.5)}
    averaged(write_model(tmp_path / "a", tensors), write_model(tmp_path / "b", tensors), out=tmp_path / "out")
    out = read_model(tmp_path / "out")
    assert out["none"].shape == (0, 4)
    assert out["one"].item() == 2.5


def test_inputs_of_different_precision_merge_into_that_of_the_base_or_the_first(tmp_path):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    wide, narrow = write_model(tmp_path / "a", {"w": x}), write_model(tmp_path / "b", {"w": x.bfloat16()})
    averaged(narrow, wide, out=tmp_path / "first")
    averaged(narrow, out=tmp_path / "based", base_model=str(wide))
    exact = (x.double() + x.bfloat16().double()) / 2
    assert torch.equal(read_model(tmp_path / "first")["w"], exact.bfloat16())
    assert torch.equal(read_model(tmp_path / "based")["w"], exact.float())


def test_an_lm_head_that_repeats_the_embedding_is_dropped_where_another_model_ties_its_own(tmp_path):
    embedding = torch.randn(6, 4)
    tensors = {"model.embed_tokens.weight": embedding}
    tied = write_model(tmp_path / "tied", tensors, tie_word_embeddings=True)
    both = write_model(tmp_path / "both", {**tensors, "lm_head.weight": embedding}, tie_word_embeddings=True)
    twin = shutil.copytree(both, tmp_path / "twin")
    for i, pair in enumerate([(tied, both), (both, tied), (both, twin)]):
        averaged(*pair, out=tmp_path / f"out{i}")
        assert read_model(tmp_path / f"out{i}").keys() == tensors.keys()
        assert json.loads((tmp_path / f"out{i}" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("says", [True, False])
def test_an_lm_head_of_its_own_beside_a_tied_model_is_refused(says, tmp_path):
    embedding = {"model.embed_tokens.weight": torch.zeros(6, 4)}
    tied = write_model(tmp_path / "tied", embedding, tie_word_embeddings=True)
    head = torch.zeros(6, 4) if not says else torch.ones(6, 4)
    own = write_model(tmp_path / "own", {**embedding, "lm_head.weight": head}, tie_word_embeddings=says)
    assert "tie_word_embeddings" in refused(ModelError, tied, own, out=tmp_path / "out")


def test_an_untied_lm_head_is_merged_like_any_tensor(tiny_models, tmp_path):
    _, a, b = tiny_models("llama")
    averaged(a, b, out=tmp_path / "out")
    mean = (read_model(a)["lm_head.weight"].double() + read_model(b)["lm_head.weight"].double()) / 2
    assert torch.equal(read_model(tmp_path / "out")["lm_head.weight"], mean.bfloat16())


def test_only_pickled_weights_are_refused_with_what_to_do(two, tmp_path):
    (two[1] / "model.safetensors").rename(tmp_path / "elsewhere")
    torch.save({"w": torch.ones(1)}, two[1] / "pytorch_model.bin")
    text = refused(ModelError, *two, out=tmp_path / "out")
    assert "pickled" in text
    assert "as safetensors; or have its tensors read, and nothing else, by --pickle" in text


def test_an_adapter_folder_is_refused_with_what_to_do(two, tmp_path):
    (two[1] / "model.safetensors").rename(two[1] / "adapter_model.safetensors")
    (two[1] / "adapter_config.json").write_text("{}")
    assert f"write it behind its model: MODEL+{two[1]}" in refused(ModelError, *two, out=tmp_path / "out")


def test_a_folder_with_nothing_to_merge_or_without_configuration_is_refused(two, tmp_path):
    (two[1] / "config.json").unlink()
    assert "config.json is missing" in refused(ModelError, *two, out=tmp_path / "out")
    (two[1] / "model.safetensors").unlink()
    assert "neither model.safetensors" in refused(ModelError, *two, out=tmp_path / "out")
    assert "no such model folder" in refused(ModelError, two[0], tmp_path / "typo", out=tmp_path / "out")


def test_a_folder_with_a_single_file_and_an_index_is_refused_as_two_models(two, tmp_path):
    (two[1] / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "remove the one that is stale" in refused(ModelError, *two, out=tmp_path / "out")


def header_of(entries, data=b""):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


DAMAGE = {
    "cut short in the data": lambda whole: whole[:-4],
    "cut short in the header": lambda whole: whole[:20],
    "empty": lambda whole: b"",
    "longer than it says": lambda whole: whole + b"\0",
    "a page from a web server": lambda whole: b"<!DOCTYPE html><html><body>Not found</body></html>",
    "a header that is no JSON": lambda whole: whole[:8] + b"!" * (len(whole) - 8),
    "a header that is a list": lambda whole: header_of([1]),
    "offsets that do not fit the shape": lambda whole: header_of(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"
    ),
    "overlapping tensors": lambda whole: header_of(
        {n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "wv"}, b"12"
    ),
    "an unknown dtype": lambda whole: header_of({"w": {"dtype": "F3", "shape": [1], "data_offsets": [0, 1]}}, b"1"),
    "a negative shape": lambda whole: header_of(
        {"w": {"dtype": "U8", "shape": [-1, -1], "data_offsets": [0, 1]}}, b"1"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(damage, two, tmp_path):
    file = two[1] / "model.safetensors"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert str(file) in refused(CheckpointError, *two, out=tmp_path / "out")


def test_an_index_that_does_not_hold_is_refused_by_name(tmp_path):
    folder = write_model(tmp_path / "m", {"w": torch.ones(2)})
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    for weight_map, culprit in [
        ({"w": "model-2.safetensors"}, "model-2.safetensors"),
        ({"v": "model-1.safetensors"}, "tensor 'v'"),
        ({"w": "../m/model-1.safetensors"}, "files of this folder"),
        (None, "files of this folder"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert culprit in refused(CheckpointError, folder, out=tmp_path / "out")
    index.write_text("{")
    assert str(index) in refused(CheckpointError, folder, out=tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    assert averaged(folder, out=tmp_path / "out")["tensors"] == 1


FULL = """
import resource, sys
from pathlib import Path
from mixmerge.merge import load_config, merge
config, out, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
merge(load_config(Path(config)), Path(out))
"""


def test_a_disk_that_refuses_is_named_and_the_same_command_carries_on(two, tmp_path):
    path, out = tmp_path / "merge.yml", tmp_path / "out"
    path.write_text(to_yaml(config_for("linear", two, parameters={"weight": 1})))
    command = [sys.executable, "-c", FULL, str(path), str(out), "100"]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert "CheckpointError: " in run.stderr
    assert "cannot write: File too large" in run.stderr
    assert not out.exists()
    merge(path, out)
    merge(path, tmp_path / "clean")
    assert read_model(out).keys() == read_model(tmp_path / "clean").keys()
    assert not (tmp_path / ".out.partial").exists()


def test_a_shared_folder_without_file_locks_can_be_written(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with CheckpointWriter(tmp_path / "out", {"w": Tensor("F32", (4,))}, job="j", shard_bytes=100) as writer:
        writer.write("w", 0, np.zeros(16, np.uint8))
        writer.finish("w", None)
        writer.publish({})
    assert read_model(tmp_path / "out")["w"].tolist() == [0, 0, 0, 0]


def test_a_second_run_into_the_same_folder_is_told_of_the_first(tmp_path):
    layout = {"w": Tensor("F32", (4,))}
    with CheckpointWriter(tmp_path / "out", layout, job="j", shard_bytes=100) as writer:
        with pytest.raises(CheckpointError, match="another process is writing this folder"):
            CheckpointWriter(tmp_path / "out", layout, job="j", shard_bytes=100)
        writer.write("w", 0, np.zeros(16, np.uint8))
        writer.finish("w", None)
        writer.publish({})
    assert read_model(tmp_path / "out")["w"].tolist() == [0, 0, 0, 0]


def test_what_a_kill_left_in_the_middle_of_a_journal_line_is_done_again(tmp_path):
    layout = {name: Tensor("F32", (4,)) for name in "vw"}
    with CheckpointWriter(tmp_path / "out", layout, job="j", shard_bytes=100) as writer:
        for name in "vw":
            writer.write(name, 0, np.zeros(16, np.uint8))
            writer.finish(name, {"part": 1})
    journal = tmp_path / ".out.partial" / "journal"
    journal.write_bytes(journal.read_bytes()[:-3])
    with CheckpointWriter(tmp_path / "out", layout, job="j", shard_bytes=100) as again:
        assert again.finished == {"v": {"part": 1}}
        again.finish("w", {"part": 2})
    with CheckpointWriter(tmp_path / "out", layout, job="j", shard_bytes=100) as last:
        assert last.finished == {"v": {"part": 1}, "w": {"part": 2}}


def test_a_merge_that_cannot_fit_is_refused_before_it_begins(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CheckpointError, match=rf"the merge needs {in_bytes(free * 2)}\b.* are free; free space"):
        CheckpointWriter(tmp_path / "out", {"w": Tensor("U8", (free * 2,))}, job="j", shard_bytes=1)


def test_a_folder_in_the_place_of_the_partial_one_is_left_alone(two, tmp_path):
    stranger = tmp_path / ".out.partial"
    stranger.mkdir()
    (stranger / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not ours"):
        averaged(*two, out=tmp_path / "out")
    assert (stranger / "diary.txt").read_text() == "mine"


def test_shards_with_wide_and_narrow_items_stay_aligned_and_loadable(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(3).half(), "c": torch.ones(3)}
    save_file(tensors, write_model(tmp_path / "m", tensors) / "model.safetensors")
    averaged(tmp_path / "m", out=tmp_path / "out")
    header = open_checkpoint(tmp_path / "out").tensors
    assert all(tensor.offset % {"BOOL": 1, "F16": 2, "F32": 4}[tensor.dtype] == 0 for tensor in header.values())


HUB = """
import sys
from pathlib import Path
from mixmerge.errors import ModelError
from mixmerge.merge.checkpoint import locate_model
print(locate_model("org/there", Path(sys.argv[1])), locate_model("org/there@v1", Path(sys.argv[1])))
try:
    locate_model("org/absent", Path(sys.argv[1]))
except ModelError as error:
    print(error)
"""


def test_a_hub_id_is_found_in_the_local_cache_and_a_missing_one_is_said_so(tmp_path):
    repo = tmp_path / "hub" / "models--org--there"
    snapshot = write_model(repo / "snapshots" / ("a" * 40), {"w": torch.ones(1)})
    (repo / "refs").mkdir()
    for ref in ("main", "v1"):
        (repo / "refs" / ref).write_text("a" * 40)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    found, absent = run.stdout.splitlines()
    assert found == f"{snapshot} {snapshot}"
    assert absent.startswith("org/absent: the Hub did not give this model")


def test_a_folder_is_looked_for_beside_the_configuration(tmp_path):
    (tmp_path / "models" / "a").mkdir(parents=True)
    assert locate_model("models/a", tmp_path) == tmp_path / "models" / "a"


def floats(checkpoint, name, start, size):
    """Elements of a tensor as float32, through the source that merges read."""
    with closing(Files()) as files:
        source = stored(checkpoint, files)[name]
        values, read = read_decoded(source, start, size)
        assert read == size * ITEM_BYTES[source.dtype]
    return values


def test_a_file_cut_short_while_it_is_read_is_named(two):
    opened = open_checkpoint(two[0])
    file = two[0] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 40)
    with pytest.raises(CheckpointError, match=r"a/model\.safetensors: the file ends inside tensor 'w'"):
        floats(opened, "w", 0, 12)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read: No such file"):
        floats(opened, "w", 0, 12)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.sampled_from(["F32", "U8", "w"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries({}, optional={"dtype": JSON, "shape": JSON, "data_offsets": JSON}) | JSON


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from("wvx"), ENTRY, max_size=2) | JSON, st.binary(max_size=8))
def test_whatever_a_header_holds_it_is_read_or_refused_and_never_a_crash(entries, data):
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.safetensors"
        file.write_bytes(header_of(entries, data))
        try:
            read = sum(tensor.bytes for tensor in read_header(file).values())
        except CheckpointError as error:
            event("refused")
            read = len(data) if str(file) in str(error) else -1
        assert read == len(data)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(width=32), st.sampled_from(["F32", "F16", "BF16"]))
def test_storing_rounds_as_torch_does_and_says_when_a_number_does_not_fit(value, dtype):
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    exact = torch.tensor([value, -value], dtype=torch.float64)
    raw, single = np.empty(2 * ITEM_BYTES[dtype], np.uint8), np.empty(2, np.float32)
    finite = encode(exact.numpy(), dtype, single, raw)
    assert finite == bool(torch.isfinite(exact.to(kind)).all())
    if finite:
        assert raw.tobytes() == exact.to(kind).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("left", [[], ["job.77.tmp"], ["job"], ["job", "model-x.json"], ["job", "w.77.tmp"]])
def test_whatever_a_kill_leaves_in_the_partial_folder_is_known_as_ours(left, two, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    for name in left:
        (partial / name).write_text("half")
    averaged(*two, out=tmp_path / "out")
    assert not partial.exists()
    assert read_model(tmp_path / "out").keys() == {"w", "v"}
