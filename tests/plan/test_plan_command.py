"""A training by a command, in a recipe: what its identity follows, and what is refused beforehand."""

from __future__ import annotations

import json

import pytest

from mixmerge.errors import RecipeError

COMMAND = "train {model} {mixture}/rows.jsonl {out} --lr {learning_rate}"


def training(**keys) -> str:
    return "experts.general.training=" + json.dumps({"engine": "command", "command": COMMAND} | keys)


def test_the_identity_is_the_command_and_the_keys_that_it_uses(planned):
    plan = planned(training(learning_rate=1e-4))
    step = plan.by_id[plan.models["general"]]
    assert step.what == {
        "engine": "command",
        "method": "sft",
        "command": COMMAND,
        "settings": {"learning_rate": 1e-4},
        "seed": 0,
    }
    assert planned(training(learning_rate=1e-4)).models == plan.models
    assert planned(training(learning_rate=2e-4)).models["general"] != plan.models["general"]
    other = training(learning_rate=1e-4, command=COMMAND + " --fast")
    assert planned(other).models["general"] != plan.models["general"]


def test_keys_of_the_whole_recipe_that_the_command_does_not_use_change_nothing(planned):
    before, after = planned(training()), planned(training(), "training.batch_size=4")
    assert before.models["general"] == after.models["general"]
    assert before.models["mix"] != after.models["mix"]


def test_the_launcher_is_how_and_not_what(planned):
    text = "{launcher} " + COMMAND
    before, after = planned(training(command=text)), planned(training(command=text), "how.launcher=torchrun -n 2")
    assert before.models == after.models
    assert after.by_id[after.models["general"]].how["launcher"] == "torchrun -n 2"


def test_the_default_learning_rate_is_that_of_the_method(planned):
    settings = planned(training(), "training.learning_rate=null")
    assert settings.by_id[settings.models["general"]].what["settings"] == {"learning_rate": 2e-5}


@pytest.mark.parametrize(
    ("override", "what"),
    [
        (
            'experts.general.training={"engine": "command"}',
            "experts.general: engine: command needs a 'command'; add it",
        ),
        ('experts.general.training={"command": "x"}', "'command' means nothing to engine: trl; set engine: command"),
        (training(command="x {model} {mixture}"), "training.command: the command does not use {out}"),
        (training(command=COMMAND + " {lr}"), "training.command: the command has an unknown {lr}"),
        (training(batch_size=4), "'batch_size' does nothing: the command does not use it; write {batch_size} into"),
        (training(adapter={"r": 4}), "'adapter' does nothing: the command does not use it; remove it"),
    ],
)
def test_what_would_do_nothing_is_refused(planned, override, what):
    with pytest.raises(RecipeError) as caught:
        planned(override)
    assert what in str(caught.value)


def test_a_command_for_the_whole_recipe_takes_its_keys_from_there(study, planned):
    study.edit(
        "training: {learning_rate: 1.0e-3, batch_size: 2, max_length: 256, precision: fp32}",
        f'training: {{engine: command, command: "{COMMAND}", learning_rate: 1.0e-3, batch_size: 2}}',
    )
    with pytest.raises(RecipeError, match="'batch_size' does nothing"):
        planned()
    study.edit(", batch_size: 2}", "}")
    plan = planned()
    assert {plan.by_id[plan.models[name]].what["engine"] for name in ("general", "mix")} == {"command"}


def test_a_training_of_its_own_seed_hands_that_to_its_command(planned):
    text = COMMAND + " {seed}"
    for own, seed in (({}, 0), ({"seed": 5}, 5)):
        plan = planned(training(command=text, **own))
        what = plan.by_id[plan.models["general"]].what
        assert (what["seed"], what["settings"].keys()) == (seed, {"learning_rate"})
    with pytest.raises(RecipeError, match="'seed' does nothing: the command does not use it"):
        planned(training(seed=5))
