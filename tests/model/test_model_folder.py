"""Model folders: which are accepted, how they are copied, and that a new one appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixmerge.errors import CheckpointError, FullDiskError, ModelError, UserError
from mixmerge.model.folder import (
    context_of,
    copy_files,
    copy_model,
    read_json,
    save_tensors,
    weight_files,
    whole_folder,
    write_json,
)


def test_a_folder_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    with whole_folder(out) as partial:
        (partial / "config.json").write_text("{}")
        assert not out.exists()
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert [file.name for file in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), UserError("wrong")])
def test_an_error_leaves_nothing_and_passes_through(error: BaseException, tmp_path: Path) -> None:
    def build() -> None:
        with whole_folder(tmp_path / "model") as partial:
            (partial / "config.json").write_text("{}")
            raise error

    with pytest.raises(type(error)):
        build()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mixmerge.model.folder import whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'config.json').write_text('{}'); print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "model")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "model").exists()
    with whole_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
    assert (tmp_path / "model" / "config.json").exists()


def test_an_empty_folder_may_be_there_but_a_full_one_or_a_file_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as partial:
        (partial / "a").touch()
    for taken in (tmp_path / "empty", tmp_path / "empty" / "a"):
        with pytest.raises(UserError, match="already there; name a new folder"), whole_folder(taken):
            pass


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"), whole_folder(tmp_path / "file" / "model"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_that_of_the_new_folder_whatever_file_the_copy_names(code: int, tmp_path: Path) -> None:
    error = OSError(code, os.strerror(code), "/base/model.safetensors")
    whole = f"{tmp_path / 'model'}: no space left on the disk; free some"
    with pytest.raises(FullDiskError, match=whole), whole_folder(tmp_path / "model"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_copying_links_weights_and_leaves_code_pickles_and_other_formats_behind(tmp_path: Path) -> None:
    source, out = _model(tmp_path / "source"), tmp_path / "out"
    for name in (
        "modeling_x.py",
        "pytorch_model.bin",
        "model.gguf",
        "stray.safetensors.txt",
        ".gitattributes",
        "LICENSE",
    ):
        (source / name).touch()
    (source / "onnx").mkdir()
    out.mkdir()
    copy_model(source, out)
    assert sorted(file.name for file in out.iterdir()) == [
        "LICENSE",
        "config.json",
        "model.safetensors",
        "stray.safetensors.txt",
    ]
    assert (out / "model.safetensors").samefile(source / "model.safetensors")
    assert not (out / "config.json").samefile(source / "config.json")


def test_weights_are_readable_by_whoever_may_read_the_other_files(tmp_path: Path) -> None:
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_pickles_are_refused_with_advice(tmp_path: Path) -> None:
    folder = _model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickles, which can run code .*save_pretrained"):
        weight_files(folder)


def test_folders_that_are_no_model_say_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        weight_files(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"no config\.json"):
        weight_files(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter, not a whole model; fold it"):
        weight_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no safetensors weights"):
        weight_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = _model(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"missing: model-2\.safetensors"):
        weight_files(folder)


def test_a_model_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    folder = _model(tmp_path / "m", model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    with pytest.raises(ModelError, match="'mystery' needs Python code that comes with the model"):
        weight_files(folder)


def test_a_model_that_transformers_knows_loses_its_code_and_the_pointer_to_it(tmp_path: Path) -> None:
    folder = _model(tmp_path / "m", model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    (tmp_path / "out").mkdir()
    copy_model(folder, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == {"model_type": "llama"}


def test_json_is_replaced_so_that_a_linked_file_keeps_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    os.link(tmp_path / "a.json", tmp_path / "b.json")
    write_json(tmp_path / "b.json", {"é": 1})
    assert (tmp_path / "a.json").read_text() == "{}"
    assert read_json(tmp_path / "b.json") == {"é": 1}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "expected a mapping, got a list")])
def test_broken_json_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        read_json(tmp_path / "config.json")


def _model(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors({"a": torch.zeros(2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("over", [True, False])
def test_files_of_a_name_are_copied_over_others_or_beside_them(over, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    (model / "tokenizer.d").mkdir(parents=True)
    out.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "config.json"):
        (model / name).write_text("the model's")
    (out / "vocab.txt").write_text("its own")
    copy_files(model, out, ("tokenizer", "vocab"), over=over)
    assert {file.name: file.read_text() for file in out.iterdir()} == {
        "tokenizer.json": "the model's",
        "vocab.txt": "the model's" if over else "its own",
    }


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 7}, 4096),
        ({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 8192),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default"}}, 64),
        ({"hidden_size": 8}, None),
    ],
)
def test_the_context_of_a_model_is_read_from_its_configuration(config, context):
    assert context_of(config) == context
