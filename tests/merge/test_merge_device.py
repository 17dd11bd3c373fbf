"""Blocks worked on by torch give the bytes of the compiled loops: here on torch's CPU device, on CUDA where there is one."""

import numpy as np
import pytest
import torch
from model_folders import config_for, example, write_model

from mixmerge.errors import UserError
from mixmerge.merge import METHODS, merge, merge_state_dicts, rehearse, selection, sparsify, tensors, verify
from mixmerge.merge.device import Device

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = {"w": (37, 61), "tall": (300, 3), "v": (401,), "s": (), "wide": (2, 3000)}


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """A torch device; "cpu" would be the compiled loops, so torch gets it by another name."""
    monkeypatch.setattr(tensors, "BLOCK", 1500)  # several blocks a tensor
    if request.param == "cpu":
        monkeypatch.setattr("mixmerge.merge.stream.engine", lambda _: Device("cpu"))
    return request.param


@pytest.fixture(params=["float32", "float16", "bfloat16", "mixed"])
def models(request, tmp_path):
    """A base and two models near it: with equal magnitudes, unchanged elements and a tensor that is the same in all."""
    draw = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    folders = []
    for i, name in enumerate(("base", "a", "b")):
        made = {}
        for key, tensor in base.items():
            change = torch.randn(tensor.shape, generator=draw) * 0.05
            change[torch.rand(tensor.shape, generator=draw) < 0.3] = 0.0
            made[key] = tensor + (change if i and key != "v" else 0.0)
        kind = ("float32", "bfloat16", "float16")[i] if request.param == "mixed" else request.param
        folders.append(write_model(tmp_path / name, {k: t.to(getattr(torch, kind)) for k, t in made.items()}))
    return folders


def bytes_of(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
def test_a_device_changes_no_byte(method, out_dtype, models, device, tmp_path, monkeypatch):
    config = example(method, models, out_dtype=out_dtype, seed=4)
    on_device = merge(config, tmp_path / "device", device=device, threads=2)
    monkeypatch.undo()
    monkeypatch.setattr(tensors, "BLOCK", 1500)
    plain = merge(config, tmp_path / "plain")
    assert bytes_of(tmp_path / "device") == bytes_of(tmp_path / "plain")
    changing = {"seconds", "bytes_read", "bytes_written"}
    assert {k: v for k, v in on_device.items() if k not in changing} == {
        k: v for k, v in plain.items() if k not in changing
    }


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False}),
        ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
        ("ties", {"weight": 0.5, "density": 0.3, "rescale": True}),
        ("ties", {"weight": -0.5, "density": 0.3, "normalize": False, "lambda": 1.7}),
        ("della", {"weight": 1, "density": 0.5, "epsilon": 0.4, "rescale": False}),
        ("breadcrumbs_ties", {"weight": 1, "density": 0.5, "gamma": 0.2, "normalize": True}),
        ("sce", {}),
        ("nearswap", {"t": 0.003}),
        ("nearswap", {"t": 0.1}),
        ("ram", {"epsilon": 0.003}),
        ("ramplus_tl", {"epsilon": 0.003, "r": 0.37, "alpha": 0.91}),
    ],
)
def test_nor_with_other_parameters(method, parameters, models, device, tmp_path, monkeypatch):
    base, *others = models
    others = others[: METHODS[method].inputs[1]]
    config = config_for(method, others, base=base, parameters=parameters, out_dtype="bfloat16")
    merge(config, tmp_path / "device", device=device)
    monkeypatch.undo()
    monkeypatch.setattr(tensors, "BLOCK", 1500)
    merge(config, tmp_path / "plain")
    assert bytes_of(tmp_path / "device") == bytes_of(tmp_path / "plain")


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "sce", "arcee_fusion"])
def test_counting_what_is_too_much_to_list_changes_no_byte(method, models, device, tmp_path, monkeypatch):
    config = example(method, models)
    merge(config, tmp_path / "listed")
    monkeypatch.setattr(sparsify, "CROWDED", 5)
    merge(config, tmp_path / "counted", device=device)
    assert bytes_of(tmp_path / "counted") == bytes_of(tmp_path / "listed")
    monkeypatch.undo()
    monkeypatch.setattr(sparsify, "CROWDED", 5)
    merge(config, tmp_path / "on the cpu")
    assert bytes_of(tmp_path / "on the cpu") == bytes_of(tmp_path / "listed")


def test_one_rounding_on_a_device_too():
    draw = np.random.default_rng(0)
    values = np.concatenate(
        [draw.standard_normal(20000), draw.standard_normal(20000) * 10.0 ** draw.integers(-44, 5, 20000)]
    )
    near = (np.float32(1) + np.arange(4000, dtype=np.float32) / 256).astype(
        np.float64
    )  # ties of bfloat16, and beside them
    values = np.concatenate([values, near, near * (1 + 1e-12), near * (1 - 1e-12), [0.0, -0.0]])
    device = Device("cpu")
    for dtype, size in (("BF16", 2), ("F16", 2), ("F32", 4)):
        plain, torched = np.empty(values.size * size, np.uint8), np.empty(values.size * size, np.uint8)
        with np.errstate(over="ignore"):
            finite = device_free_encode(values, dtype, plain)
        single = torch.empty(values.size)
        assert device.encode(torch.from_numpy(values), dtype, single, torched) == finite
        assert np.array_equal(plain, torched), dtype


def device_free_encode(values, dtype, into):
    from mixmerge.merge.sources import encode

    return encode(values, dtype, np.empty(values.size, np.float32), into)


@pytest.mark.parametrize("start", [0, 3, 64, 4095, 2**33 + 1])
def test_random_words_are_those_of_the_compiled_loop(start):
    plain, torched = np.empty(999, np.uint32), torch.empty(999, dtype=torch.int64)
    selection.philox(0x12345678, 0x9ABCDEF0, start, plain)
    Device("cpu").philox(0x12345678, 0x9ABCDEF0, start, torched)
    assert np.array_equal(plain, torched.numpy())


def test_a_nan_is_named_on_a_device_too(tmp_path, device):
    folders = [write_model(tmp_path / name, {"w": torch.ones(40, 50)}) for name in ("base", "a", "b")]
    write_model(folders[2], {"w": torch.ones(40, 50).index_fill(0, torch.tensor([39]), torch.nan)})
    for method in ("linear", "ties", "dare_ties"):
        with pytest.raises(UserError, match=r"b: tensor 'w' holds NaN or infinity"):
            merge(example(method, folders), tmp_path / "out", device=device)
        assert not (tmp_path / "out").exists()


def test_what_was_made_on_one_device_is_verified_on_another(models, device, tmp_path):
    config = example("ties", models)
    assert rehearse(config, device=device)["tensors"] == len(SHAPES)
    merge(config, tmp_path / "out")
    assert verify(tmp_path / "out", device=device)["tensors"] == len(SHAPES)


def test_state_dicts_are_merged_on_a_device(device):
    held = {name: {"w": torch.randn(30, 50)} for name in ("base", "a", "b")}
    config = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 1, "density": 0.5},
    }
    merged = merge_state_dicts(held, config, device=device)
    assert torch.equal(merged["w"], merge_state_dicts(held, config)["w"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(models, mixmerge, tmp_path):
    with pytest.raises(UserError, match=r"--device cuda: torch finds no CUDA device here"):
        merge(example("linear", models), tmp_path / "out", device="cuda")
    with pytest.raises(UserError, match=r"--device: unknown device 'gpu'; cpu, cuda, or one of several as cuda:1"):
        merge(example("linear", models), tmp_path / "out", device="gpu")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "b"}


@pytest.mark.parametrize("name", ["meta", "mps", "CPU", "xla:0", "", "cpu:x"])
def test_other_devices_are_refused_by_name(name):
    with pytest.raises(UserError, match=r"--device"):
        Device(name)


def test_a_device_that_is_refused_leaves_nothing_behind(models, tmp_path, mixmerge, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
    )
    status, _, error = mixmerge("merge", "c.yml", "out", "--device", "meta")
    assert status == 2
    assert error.strip() == "error: --device: unknown device 'meta'; cpu, cuda, or one of several as cuda:1"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "b", "c.yml"}
