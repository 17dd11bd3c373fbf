"""Values of `training.extra` that TRL refuses, or breaks on while it trains, are refused when a study is planned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixmerge.errors import RecipeError, UserError
from mixmerge.plan.extra import check_values


@pytest.mark.parametrize(
    ("method", "extra", "said"),
    [
        ("sft", {"dataset_num_proc": "many"}, "dataset_num_proc: cannot be 'many'; give int or null"),
        ("sft", {"activation_offloading": "yes"}, "activation_offloading: cannot be 'yes'; give bool"),
        ("sft", {"lr_scheduler_kwargs": [1]}, "lr_scheduler_kwargs: cannot be [1]; give dict, str or null"),
        ("dpo", {"ld_alpha": "half"}, "ld_alpha: cannot be 'half'; give float or null"),
        (
            "dpo",
            {"f_divergence_type": "js_divergenc"},
            "f_divergence_type: cannot be 'js_divergenc'; did you mean 'js_divergence'?",
        ),
        (
            "sft",
            {"lr_scheduler_kwargs": {"num_cycle": 1}},
            "lr_scheduler_kwargs: the scheduler 'cosine' does not take 'num_cycle'; did you mean 'num_cycles'?",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_what_the_option_takes(method, extra, said):
    with pytest.raises(UserError) as caught:
        check_values(method, extra, scheduler="cosine", loss="sigmoid")
    assert str(caught.value) == f"training.extra.{said}"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"torch_empty_cache_steps": 0}, "`torch_empty_cache_steps` must be an integer bigger than 0, got 0"),
        ({"debug": "nothing"}, "nothing is not a valid DebugOption"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "At most one of fp16 and bf16 can be True for full eval"),
    ],
)
def test_what_trl_says_of_values_when_it_takes_them_is_said_early(extra, said):
    with pytest.raises(UserError, match="TRL refuses these options: ValueError: ") as caught:
        check_values("sft", extra, scheduler="cosine", loss="sigmoid")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "scheduler", "extra"),
    [
        ("sft", "cosine", {"lr_scheduler_kwargs": {"num_cycles": 0.4}, "activation_offloading": False}),
        ("sft", "constant", {"router_aux_loss_coef": 1, "dataset_num_proc": None}),
        ("dpo", "linear", {"ld_alpha": 0.5, "f_divergence_type": "js_divergence", "use_weighting": True}),
        ("sft", "cosine", {"tf32": True, "torch_compile": True}),
        ("sft", "cosine", {}),
    ],
)
def test_values_that_trl_takes_are_taken_and_those_of_another_machine_left_to_it(method, scheduler, extra):
    before = sorted(os.environ)
    check_values(method, extra, scheduler=scheduler, loss="sigmoid")
    assert sorted(os.environ) == before
    assert not Path("unused").exists()


@pytest.mark.parametrize(
    ("loss", "extra", "said"),
    [
        (
            "apo_zero",
            {"f_divergence_type": "js_divergence"},
            "f_divergence_type: 'js_divergence' does not go with loss: apo_",
        ),
        (
            "aot",
            {"use_weighting": True},
            "use_weighting: True does not go with loss: aot; leave it out, or set another loss",
        ),
    ],
)
def test_an_option_of_dpo_that_does_not_fit_the_loss_is_refused(loss, extra, said):
    with pytest.raises(UserError) as caught:
        check_values("dpo", extra, scheduler="cosine", loss=loss)
    assert str(caught.value).startswith(f"training.extra.{said}")
    check_values("dpo", extra, scheduler="cosine", loss="hinge")
    check_values("dpo", {"f_divergence_type": "reverse_kl", "use_weighting": False}, scheduler="cosine", loss=loss)


def test_a_scheduler_without_options_says_so():
    with pytest.raises(UserError, match=r"the scheduler 'linear' does not take 'num_cycles'"):
        check_values("sft", {"lr_scheduler_kwargs": {"num_cycles": 1}}, scheduler="linear", loss="sigmoid")


@pytest.mark.parametrize(("key", "where"), [("baselines.mix.training", "baselines.mix."), ("training", "")])
def test_a_refused_value_is_named_where_it_stands_in_the_recipe(planned, key, where):
    with pytest.raises(RecipeError) as caught:
        planned(f"{key}.extra={{dataset_num_proc: many}}")
    said = "training.extra.dataset_num_proc: cannot be 'many'; give int or null"
    assert str(caught.value) == f"--set: {where}{said}"


def test_a_value_as_yaml_reads_it_is_taken(study, planned):
    study.edit("precision: fp32}", "precision: fp32, extra: {lr_scheduler_kwargs: {num_cycles: 4.0e-1}}}")
    assert planned().find("train/mix").what["extra"] == {"lr_scheduler_kwargs": {"num_cycles": 0.4}}


def test_a_recipe_without_such_options_imports_no_trainer(study):
    code = (
        "import sys\nfrom pathlib import Path\nfrom mixmerge.plan.build import build_plan\n"
        "from mixmerge.recipe.load import load_recipe\n"
        f"build_plan(load_recipe(Path({str(study.recipe)!r}), ['training.adapter={{targets: [q_proj]}}']))\n"
        "print({'trl', 'transformers', 'torch', 'peft'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert found.stdout == "set()\n", found.stderr
