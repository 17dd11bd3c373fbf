"""Whole merges: what appears, what survives a kill, what is refused on the way, and that transformers takes it."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from model_folders import config_for, example, merge_tensors, read_model, write_model

from mixmerge.errors import ModelError, RecipeError
from mixmerge.kept import stretch_digest
from mixmerge.merge import METHODS, load_config, merge, parse_config, tensors
from mixmerge.merge.card import model_card, to_yaml

DARE = {"parameters": {"weight": 0.8, "density": 0.5}, "seed": 3}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", METHODS)
def test_blocks_threads_and_shards_change_no_byte(method, tiny_models, tmp_path, monkeypatch):
    config = example(method, tiny_models("gpt2"))
    results = []
    for i, (block, threads, shard_bytes) in enumerate([(1 << 16, 1, 10**9), (512, 3, 10**9), (1 << 12, 2, 30_000)]):
        monkeypatch.setattr(tensors, "BLOCK", block)
        merge(config, tmp_path / f"{i}", threads=threads, shard_bytes=shard_bytes)
        results.append(read_model(tmp_path / f"{i}"))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in results[0])
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from mixmerge.merge import load_config, merge
def progress(done, total):
    if done > total * 0.6:
        time.sleep(0.5)  # flushing and journaling go on behind the work
        os.kill(os.getpid(), signal.SIGKILL)
merge(load_config(Path(sys.argv[1])), Path(sys.argv[2]), progress=progress, shard_bytes=20_000)
"""


@pytest.fixture
def killed(tiny_models, tmp_path):
    """A DARE merge into several shards whose process was killed past half: its configuration and its output folder."""
    base, a, b = tiny_models("llama")
    path, out = tmp_path / "merge.yml", tmp_path / "out"
    path.write_text(to_yaml(config_for("dare_ties", [a, b], base=base, **DARE)))
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(out)], env=os.environ, capture_output=True, text=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not out.exists()
    assert list((tmp_path / ".out.partial" / "model").glob("*.safetensors"))
    return path, out


def test_a_merge_killed_half_way_and_run_again_carries_on_and_gives_the_same_bytes(killed, tmp_path):
    path, out = killed
    resumed = merge(path, out, shard_bytes=20_000)
    clean = merge(path, tmp_path / "clean", shard_bytes=20_000)
    assert resumed["tensors_resumed"] > 0
    assert resumed["bytes_written"] < clean["bytes_written"]
    assert resumed["kept_share"] == clean["kept_share"]
    assert contents(out) == contents(tmp_path / "clean")
    assert not (tmp_path / ".out.partial").exists()


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped": lambda shard: flip(shard, -1),
    "header": lambda shard: flip(shard, 12),
    "cut": lambda shard: os.truncate(shard, 5000),
    "emptied": lambda shard: shard.write_bytes(b""),
    "lost": lambda shard: shard.unlink(),
    "longer": lambda shard: shard.write_bytes(shard.read_bytes() + b"x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_changed_after_they_were_finished_are_made_again(killed, damage, tmp_path, caplog):
    path, out = killed
    shard = min((tmp_path / ".out.partial" / "model").glob("*.safetensors"))
    DAMAGE[damage](shard)
    resumed = merge(path, out, shard_bytes=20_000)
    clean = merge(path, tmp_path / "clean", shard_bytes=20_000)
    assert contents(out) == contents(tmp_path / "clean")
    assert 0 < resumed["tensors_resumed"] < clean["tensors"], "those of the other shards"
    again = r": finished tensors that changed since they were written, or cannot be read, and are made again: \d+"
    if damage == "header":  # it is known, and is written in any case
        assert caplog.messages == []
    else:
        (told,) = caplog.messages
        assert re.fullmatch(re.escape(str(shard)) + again, told)


@pytest.mark.parametrize("at", [0, 31])
@pytest.mark.parametrize("bit", [1, 0x80])
def test_a_partial_folder_that_no_longer_says_what_it_is_of_is_begun_anew(killed, at, bit, tmp_path):
    path, out = killed
    job = tmp_path / ".out.partial" / "job"
    data = bytearray(job.read_bytes())
    data[at] ^= bit
    job.write_bytes(data)
    assert merge(path, out, shard_bytes=20_000)["tensors_resumed"] == 0
    merge(path, tmp_path / "clean", shard_bytes=20_000)
    assert contents(out) == contents(tmp_path / "clean")


def test_tensors_that_the_disk_does_not_give_back_are_made_again(killed, tmp_path, caplog, monkeypatch):
    path, out = killed
    lost = [1]

    def failing(descriptor, start, size):
        if lost:
            lost.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stretch_digest(descriptor, start, size)

    monkeypatch.setattr("mixmerge.merge.writer.stretch_digest", failing)
    merge(path, out, shard_bytes=20_000)
    (told,) = caplog.messages
    assert told.endswith(
        ": finished tensors that changed since they were written, or cannot be read, and are made again: 1"
    )
    merge(path, tmp_path / "clean", shard_bytes=20_000)
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize("damage", ["flipped", "null", "older", "not text"])
def test_a_line_of_the_journal_that_has_changed_counts_for_nothing(killed, damage, tmp_path, caplog):
    path, out = killed
    journal = tmp_path / ".out.partial" / "journal"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    changed = {
        "flipped": first.replace(b"weight", b"wdight"),
        "null": b"null\n",
        "older": b'["model.norm.weight", [0.0, 0.0]]\n',
        "not text": b"\xff\xfe{\n",
    }
    journal.write_bytes(b"".join([changed[damage], *rest]))
    resumed = merge(path, out, shard_bytes=20_000)
    assert resumed["tensors_resumed"] == len(rest)
    told = f"{journal}: 1 of {len(rest) + 1} lines changed since they were written: not carried on from"
    assert caplog.messages == [told]
    merge(path, tmp_path / "clean", shard_bytes=20_000)
    assert contents(out) == contents(tmp_path / "clean")


def test_killed_at_twenty_random_moments_a_merge_ends_with_the_same_bytes(tmp_path):
    draw = torch.Generator().manual_seed(0)
    folders = [
        write_model(tmp_path / name, {f"layers.{i}.w": torch.randn(300, 500, generator=draw) for i in range(16)})
        for name in ("base", "a", "b")
    ]
    config, out = example("della", folders, seed=2), tmp_path / "out"
    merge(config, tmp_path / "clean", shard_bytes=2_000_000)  # loads the kernels
    shutil.rmtree(tmp_path / "clean")
    clean = merge(config, tmp_path / "clean", shard_bytes=2_000_000)
    moments = random.Random(0)
    killed = 0
    for _ in range(20):
        child = os.fork()  # as quick as it gets: no interpreter to start
        if child == 0:
            try:
                merge(config, out, shard_bytes=2_000_000)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, clean["seconds"]))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if out.exists():  # it was quicker than the blow: the whole folder is there, and the next one starts afresh
            assert contents(out) == contents(tmp_path / "clean")
            shutil.rmtree(out)
    assert killed
    if not out.exists():
        merge(config, out, shard_bytes=2_000_000)
    assert contents(out) == contents(tmp_path / "clean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "clean", "out"]


def test_two_runs_at_once_into_one_folder_leave_a_whole_model_and_no_mixture(tiny_models, tmp_path):
    base, a, b = tiny_models("llama")
    path, out = tmp_path / "merge.yml", tmp_path / "out"
    path.write_text(to_yaml(config_for("dare_ties", [a, b], base=base, **DARE)))
    code = KILLED.replace("0.6", "2")  # never killed
    command = [sys.executable, "-c", code, str(path), str(out)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate()[1] for run in runs]
    assert any(run.returncode == 0 for run in runs), errors
    assert all("Error: " in error for run, error in zip(runs, errors, strict=True) if run.returncode)
    merge(path, tmp_path / "clean", shard_bytes=20_000)
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize("change", ["configuration", "input"])
def test_a_partial_folder_of_another_merge_is_thrown_away(killed, change, tmp_path, tiny_models):
    path, out = killed
    if change == "configuration":
        path.write_text(path.read_text().replace("seed: 3", "seed: 4"))
    else:
        file = tiny_models("llama")[1] / "model.safetensors"
        os.utime(file, (1, 1))
    assert merge(path, out, shard_bytes=20_000)["tensors_resumed"] == 0
    merge(path, tmp_path / "clean", shard_bytes=20_000)
    assert contents(out) == contents(tmp_path / "clean")


def test_an_output_folder_that_holds_anything_is_refused_and_an_empty_one_is_used(tmp_path):
    model, out = write_model(tmp_path / "m", {"w": torch.ones(2)}), tmp_path / "out"
    config = config_for("linear", [model], parameters={"weight": 1})
    out.mkdir()
    merge(config, out)
    before = contents(out)
    with pytest.raises(ModelError, match="there already and not empty; remove it, or name another folder"):
        merge(config, out)
    with pytest.raises(ModelError, match="there already"):
        merge(config, model / "config.json")
    assert contents(out) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_nan_or_infinity_in_an_input_is_refused_naming_tensor_and_model(method, bad, tmp_path):
    good = write_model(tmp_path / "good", {"v": torch.ones(3), "w": torch.ones(300)})
    x = torch.ones(300)
    x[123] = bad
    broken = write_model(tmp_path / "broken", {"v": torch.ones(3), "w": x})
    other = write_model(tmp_path / "other", {"v": torch.ones(3), "w": torch.ones(300)})
    folders = [good, broken] if METHODS[method].inputs[1] == 1 else [good, other, broken]
    config = example(method, folders)
    with pytest.raises(ModelError, match=r"broken: tensor 'w' holds NaN or infinity"):
        merge(config, tmp_path / "out", shard_bytes=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "good", "other"]


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 6e4), ("bfloat16", 3e38), ("float32", 3e38)])
def test_a_result_that_does_not_fit_its_type_is_refused_and_never_written_as_infinity(dtype, largest, tmp_path):
    x = torch.tensor([1.0, largest])
    model = write_model(tmp_path / "m", {"w": x})
    config = config_for("linear", [model], parameters={"weight": 2, "normalize": False}, out_dtype=dtype)
    with pytest.raises(ModelError, match="the merged tensor 'w' does not fit"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fp16_with_rescale_stays_finite():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).half()
    out = merge_tensors("dare_ties", [x], base=0 * x, weight=1, density=0.1)
    assert torch.isfinite(out).all()
    assert out.abs().sum().item() == pytest.approx(x.abs().sum().item(), rel=1e-2)


def test_weights_that_sum_to_0_at_one_tensor_are_refused_before_anything_is_written(tmp_path):
    both = {"mlp.w": torch.ones(2), "attn.w": torch.ones(2)}
    a, b = write_model(tmp_path / "a", both), write_model(tmp_path / "b", both)
    weights = [{"weight": 1}, {"weight": [{"filter": "attn", "value": -1}, {"value": 1}]}]
    with pytest.raises(RecipeError, match=r"the weights sum to 0 at tensor 'attn.w'"):
        merge(config_for("linear", [a, b], per_model=weights), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_weight_of_0_under_a_filter_leaves_those_tensors_of_the_base():
    base = {"embed": torch.zeros(3), "mlp": torch.zeros(3)}
    model = {"embed": torch.ones(3), "mlp": torch.ones(3)}
    weight = [{"filter": "embed", "value": 0}, {"value": 1}]
    for method in ("task_arithmetic", "ties", "dare_ties"):
        out = merge_tensors(method, [model], base=base, weight=weight)
        assert out["embed"].tolist() == [0, 0, 0]
        assert out["mlp"].tolist() == [1, 1, 1]


def test_a_gradient_runs_from_the_first_layer_to_the_last(tmp_path):
    names = ["embed.w", *(f"layers.{i}.w" for i in range(5))]
    zero, one = ({name: torch.full((2,), value) for name in names} for value in (0.0, 1.0))
    base = write_model(tmp_path / "base", zero)
    model = write_model(tmp_path / "m", one)
    config = config_for("task_arithmetic", [model], base=base, per_model=[{"weight": [0, 1, 0.5]}])
    merge(config, tmp_path / "out")
    out = read_model(tmp_path / "out")
    assert [out[name][0].item() for name in names] == [0, 0, 0.5, 1, 0.75, 0.5]


def test_configuration_and_tokenizer_come_from_the_base_else_from_the_first_model(tmp_path):
    folders = [write_model(tmp_path / name, {"w": torch.ones(2)}, origin=name) for name in ("a", "b", "base")]
    for folder in folders:
        (folder / "tokenizer.json").write_text(f'"{folder.name}"')
        (folder / "generation_config.json").write_text(f'"{folder.name}"')
        (folder / "chat_template.jinja").write_text(folder.name)
        (folder / "trainer_state.json").write_text("{}")
        (folder / "README.md").write_text("the old card")
    a, b, base = folders
    merge(config_for("linear", [b, a], parameters={"weight": 1}), tmp_path / "first")
    merge(config_for("ties", [a, b], base=base, parameters={"weight": 1}), tmp_path / "based")
    for out, donor in (("first", b), ("based", base)):
        files = contents(tmp_path / out)
        for name in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
            assert files[name] == (donor / name).read_bytes()
        assert set(files) == {"README.md", "chat_template.jinja", "config.json", "generation_config.json"} | {
            "mergekit_config.yml",
            "mixmerge_merge.json",
            "model.safetensors",
            "tokenizer.json",
        }


def test_a_chosen_dtype_is_stored_and_written_into_the_configuration(tiny_models, tmp_path):
    _, a, b = tiny_models("llama")
    merge(
        config_for("linear", [a, b], parameters={"weight": 1}, dtype="float16", out_dtype="float32"), tmp_path / "out"
    )
    assert {tensor.dtype for tensor in read_model(tmp_path / "out").values()} == {torch.float32}
    changed, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", a))
    assert changed == original | {"dtype": "float32"}


def test_the_card_names_models_method_and_measurements_and_holds_the_exact_configuration(tmp_path):
    for name in ("a", "b", "base"):
        write_model(tmp_path / name, {"w": torch.randn(100)})
    path = tmp_path / "merge.yml"
    path.write_text(
        "merge_method: dare_ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 0.5, density: 0.3, int8_mask: true}\nseed: 9\n"
    )
    measured = merge(path, tmp_path / "out")
    card, yaml = ((tmp_path / "out" / name).read_text() for name in ("README.md", "mergekit_config.yml"))
    for part in ("**dare_ties**", "`base` (base)", "`a`", "`b`", "- seed: 9", "int8_mask has no numeric effect"):
        assert part in card
    assert f"kept_share: {measured['kept_share']:.6g}" in card
    assert f"```yaml\n{yaml}```" in card
    assert card.startswith("---\n")
    assert load_config(tmp_path / "out" / "mergekit_config.yml") == load_config(path)


def test_only_hub_ids_are_linked_from_the_card():
    models = [{"model": name} for name in ("org/name@v2", "../local/thing", "plain", "./org/name")]
    config = parse_config({"merge_method": "linear", "models": models, "parameters": {"weight": 1}})
    assert "base_model:\n- org/name\nlibrary_name" in model_card(config, {"parameters": 1, "tensors": 1})


def test_what_was_measured_comes_back(tmp_path):
    parallel, other = torch.ones(100), torch.randn(100, generator=torch.Generator().manual_seed(0))
    base = write_model(tmp_path / "a", {"v": parallel, "w": other})
    model = write_model(tmp_path / "b", {"v": 2 * parallel, "w": other.flip(0)})
    seen = []
    config = config_for("slerp", [model], base=base, parameters={"t": 0.5}, seed=4)
    measured = merge(config, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    seconds = measured.pop("seconds")
    assert seconds > 0
    assert measured == {
        "method": "slerp",
        "seed": 4,
        "tensors": 2,
        "parameters": 200,
        "parallel_share": 0.5,
        "bytes_read": 2 * 800,  # two models, read once for both passes
        "bytes_written": 800,
        "tensors_resumed": 0,
    }
    assert seen == sorted(seen)
    assert seen[-1] == (200, 200)


def test_ties_reports_the_share_that_it_kept(tmp_path):
    base = write_model(tmp_path / "a", {"w": torch.zeros(10)})
    model = write_model(tmp_path / "b", {"w": torch.arange(10.0)})
    config = config_for("ties", [model], base=base, parameters={"weight": 1, "density": 0.25})
    assert merge(config, tmp_path / "out")["kept_share"] == 0.2


MEMORY = """
import resource, sys
from pathlib import Path
from mixmerge.merge import merge, parse_config
base, model, out = map(Path, sys.argv[1:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(parse_config({"merge_method": "dare_ties", "base_model": str(base), "models": [{"model": str(model)}],
                    "parameters": {"weight": 1, "density": 0.5}}), out, threads=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "torch" in sys.modules)
"""


def test_memory_does_not_grow_with_the_tensor_and_torch_is_not_needed(tmp_path):
    x = torch.zeros(25_000_000)  # 100 MB
    base, model = write_model(tmp_path / "a", {"w": x}), write_model(tmp_path / "b", {"w": x + 1})
    command = [sys.executable, "-c", MEMORY, str(base), str(model), str(tmp_path / "out")]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    kilobytes, torch_loaded = run.stdout.split()
    assert int(kilobytes) < 60_000
    assert torch_loaded == "False"


def test_a_difference_beyond_float32_is_no_trouble_where_the_result_fits():
    base, x = torch.tensor([-3e38, 1.0, 0.0]), torch.tensor([3e38, 2.0, 1.0])
    for method in ("task_arithmetic", "ties", "dare_ties"):
        rescale = {} if method == "task_arithmetic" else {"rescale": False}
        assert torch.equal(merge_tensors(method, [x], base=base, weight=1, **rescale), x), method
    assert merge_tensors("ties", [x], base=base, weight=1, density=0.4).tolist() == [x[0].item(), 1.0, 0.0]


def test_models_without_anything_to_merge_are_copied(tmp_path):
    a, b = (write_model(tmp_path / name, {"ids": torch.arange(5)}) for name in "ab")
    measured = merge(config_for("ties", [b], base=a, parameters={"weight": 1}), tmp_path / "out")
    assert measured["kept_share"] == 0
    assert torch.equal(read_model(tmp_path / "out")["ids"], torch.arange(5))
