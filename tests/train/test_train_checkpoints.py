import errno
import os
import shutil

import pytest

from mixmerge.errors import StepError
from mixmerge.kept import MARKER, unsealed
from mixmerge.train.checkpoints import last_whole, mark_whole


def checkpoint(work, step, mark=None):
    folder = work / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * step)
    (folder / "deep" / "optimizer.pt").write_bytes(b"y" * step)
    if mark is not None:
        mark_whole(folder, mark)
    return folder


def test_without_checkpoints_there_is_nothing_to_carry_on_from(tmp_path):
    assert last_whole(tmp_path, "t") is None
    assert last_whole(tmp_path / "absent", "t") is None


def test_marking_a_checkpoint_removes_those_before_it(tmp_path):
    checkpoint(tmp_path, 5, "t")
    newest = checkpoint(tmp_path, 10, "t")
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-10"]
    assert last_whole(tmp_path, "t") == newest


def test_a_newer_half_written_checkpoint_is_removed_and_the_whole_one_before_it_is_used(tmp_path):
    whole = checkpoint(tmp_path, 5, "t")
    half = checkpoint(tmp_path, 10)
    assert last_whole(tmp_path, "t") == whole
    assert not half.exists()


def test_numbers_decide_which_is_newest_not_names(tmp_path):
    checkpoint(tmp_path / "a", 9, "t")
    checkpoint(tmp_path / "b", 10, "t")
    shutil.move(tmp_path / "a" / "checkpoint-9", tmp_path / "b" / "checkpoint-9")
    assert last_whole(tmp_path / "b", "t").name == "checkpoint-10"


@pytest.mark.parametrize("name", ["model.safetensors", "deep/optimizer.pt", MARKER])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_checkpoint_with_a_file_cut_or_missing_is_not_whole(tmp_path, name, damage):
    folder = checkpoint(tmp_path, 5, "t")
    file = folder / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert last_whole(tmp_path, "t") is None
    assert not folder.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "deep/optimizer.pt"])
def test_a_checkpoint_whose_bytes_have_changed_is_not_carried_on_from_and_is_named(tmp_path, caplog, name):
    folder = checkpoint(tmp_path, 5, "t")
    file = folder / name
    file.write_bytes(b"z" + file.read_bytes()[1:])
    assert last_whole(tmp_path, "t", read=False) == folder, "of a group, one process reads them"
    assert last_whole(tmp_path, "t") is None
    assert not folder.exists()
    assert caplog.messages == [f"{file} has changed since it was written: not carried on from"]


def test_a_checkpoint_that_the_disk_does_not_give_back_is_not_carried_on_from(tmp_path, caplog, monkeypatch):
    folder = checkpoint(tmp_path, 5, "t")

    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("mixmerge.kept.file_digest", failing)
    assert last_whole(tmp_path, "t") is None
    assert caplog.messages == [f"{folder} cannot be read: Input/output error: not carried on from"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT])
def test_a_checkpoint_that_cannot_be_read_just_now_stays(tmp_path, monkeypatch, number):
    folder = checkpoint(tmp_path, 5, "t")

    def failing(path):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr("mixmerge.kept.file_digest", failing)
        with pytest.raises(OSError, match=os.strerror(number)):
            last_whole(tmp_path, "t")
    assert last_whole(tmp_path, "t") == folder


def test_a_marker_with_a_flipped_bit_or_that_is_none_of_ours_marks_nothing(tmp_path, caplog):
    folder = checkpoint(tmp_path / "made", 5, "t")
    whole = (folder / MARKER).read_bytes()
    flipped = [
        whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in range(len(whole))
    ]
    for marker in [*flipped, b"", b"null", b"[]", b"3", b"{}", b'{"files": []}']:
        shutil.copytree(folder, tmp_path / "work" / folder.name)
        (tmp_path / "work" / folder.name / MARKER).write_bytes(marker)
        assert last_whole(tmp_path / "work", "t") is None, marker
        assert list((tmp_path / "work").iterdir()) == []
        assert (
            caplog.messages.pop()
            == f"{tmp_path / 'work' / folder.name / MARKER} has changed since it was written: not carried on from"
        )


def test_weights_that_are_shared_out_among_machines_are_not_read_back_by_one(tmp_path):
    folder = checkpoint(tmp_path, 5)
    mark_whole(folder, "t", fsdp=True)
    assert unsealed((folder / MARKER).read_bytes())["xxh3"] == {}
    assert last_whole(tmp_path, "t", fsdp=True) == folder


def test_a_checkpoint_of_another_training_is_refused_and_kept(tmp_path):
    folder = checkpoint(tmp_path, 5, "one")
    with pytest.raises(StepError, match="of another training"):
        last_whole(tmp_path, "two")
    assert folder.exists()
