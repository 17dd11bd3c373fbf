"""Gradients over the layers, filters by tensor name, and which value wins: as mergekit reads them."""

import pytest
from oracle import config, distance, ours

SETTINGS = {
    "a gradient of weights": config(
        "linear",
        "axy",
        base=False,
        each={"a": {"weight": [1, 0.2, 0.5]}, "x": {"weight": [0.2, 0.3]}, "y": {"weight": 1}},
    ),
    "a gradient of t": config("slerp", "x", t=[0, 0.5, 0.3, 1]),
    "a gradient of one value": config("slerp", "x", t=[0.3]),
    "a gradient of more values than layers": config("slerp", "x", t=[0, 0.1, 0.9, 0.4, 0.7, 0.2]),
    "gradients by filter": config(
        "slerp",
        "x",
        t=[
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
            {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
            {"value": 0.5},
        ],
    ),
    "filters of what stands outside of the layers": config(
        "slerp",
        "x",
        t=[
            {"filter": "lm_head", "value": 0.3},
            {"filter": "embed", "value": 0.9},
            {"filter": "model.norm", "value": 0.1},
            {"value": [0.2, 0.7]},
        ],
    ),
    "the first filter that matches": config(
        "slerp",
        "x",
        t=[
            {"filter": "layers.1", "value": 0.3},
            {"filter": "q_proj.weight", "value": 0.9},
            {"filter": "norm", "value": [0.1, 0.9]},
            {"filter": "*", "value": [0.2, 0.7]},
        ],
    ),
    "a model's own value before that of all": config(
        "ties",
        "abc",
        each={
            "a": {"weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 1}]},
            "b": {"weight": 0.3, "density": [0.5, 0.1]},
        },
        density=0.7,
        weight=[{"filter": "q_proj", "value": 2}, {"value": 0.1}],
    ),
    "a model's own filters that leave tensors to the value of all": config(
        "linear",
        "xy",
        base=False,
        each={"x": {"weight": [{"filter": "mlp", "value": 0.3}]}, "y": {"weight": 1}},
        weight=0.5,
    ),
    "gradients of density under filters": config(
        "ties",
        "ab",
        each={
            "a": {
                "weight": 1,
                "density": [
                    {"filter": "layers.0", "value": 0.1},
                    {"filter": "lm_head", "value": 0.2},
                    {"value": [0.3, 0.9]},
                ],
            },
            "b": {"weight": [0.1, 0.5]},
        },
        density=0.7,
    ),
    "a gradient of lambda": config("task_arithmetic", "abc", each=True, lambda_=[0.1, 0.9]),
    "a gradient of gamma": config("breadcrumbs", "ab", each=True, density=0.5, gamma=[0.0, 0.3]),
    "a gradient of select_topk": config("sce", "abc", select_topk=[0.1, 0.8]),
    "a gradient of nearswap's t": config("nearswap", "a", t=[0.001, 0.02]),
    "a scale by filter": config(
        "passthrough",
        "a",
        base=False,
        each={
            "a": {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.3}, {"value": 1.0}]}
        },
    ),
    "a scale for all": config("passthrough", "a", base=False, scale=0.3),
    "int8_mask, which changes nothing": config("ties", "abc", each=True, density=0.5, int8_mask=True),
}


@pytest.mark.parametrize("asked", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_means_the_same(oracle, models, asked, tmp_path):
    assert distance(oracle.merge(asked, models), ours(asked, models, tmp_path / "out")) < 1e-6


def test_dtype_and_out_dtype_store_the_same_types(oracle, models, bf16_models, tmp_path):
    for number, (folders, top) in enumerate(
        [
            (models, {"dtype": "bfloat16"}),
            (models, {"dtype": "float32", "out_dtype": "bfloat16"}),
            (models, {"dtype": "float16"}),
            (bf16_models, {"dtype": "float32"}),
            (bf16_models, {"dtype": "float32", "out_dtype": "float16"}),
        ]
    ):
        asked = config("linear", "ab", base=False, each=True)
        theirs, mine = oracle.merge(asked, folders, **top), ours(asked, folders, tmp_path / str(number), **top)
        assert {name: tensor.dtype for name, tensor in theirs.items()} == {n: t.dtype for n, t in mine.items()}
        if top["dtype"] == "float32":
            assert distance(theirs, mine) < (1e-6 if "out_dtype" not in top else 2**-8)


@pytest.mark.parametrize(
    "asked",
    [
        config("slerp", "a", t=[0.2, 0.9]),
        config("linear", "ab", base=False, each={"a": {"weight": [0, 1]}, "b": {"weight": [1, 0.5]}}),
    ],
    ids=lambda asked: asked.method,
)
def test_a_gradient_over_one_layer_means_the_same(oracle, models, place, asked, tmp_path):
    one = {
        name: {key: tensor for key, tensor in model.items() if ".layers.1." not in key and ".layers.2." not in key}
        for name, model in models.tensors.items()
    }
    placed = place(one, num_hidden_layers=1)
    assert distance(oracle.merge(asked, placed), ours(asked, placed, tmp_path / "out")) < 1e-6
