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


def missing(plan) -> list[str]:
    return [note for note in plan.notes if "no program" in note]


def test_a_program_that_is_not_here_is_a_note(planned, study, monkeypatch):
    monkeypatch.chdir(study.folder)
    (study.folder / "mine.sh").write_text("#!/bin/sh\n")
    rest = "{model} {mixture} {out}"
    told = "general: no program '{}' is found on this machine"
    for program in ("no-such-trainer", "./mine.sh", "/no/such/trainer"):
        assert missing(planned(training(command=f"{program} {rest}"))) == [told.format(program)]
    (study.folder / "mine.sh").chmod(0o755)
    for program in ("./mine.sh", "env", "{work}/made-by-itself"):
        assert missing(planned(training(command=f"{program} {rest}"))) == []


def test_the_program_of_a_launcher_is_looked_for_where_it_is_used(planned):
    text = "{launcher} no-such-trainer {model} {mixture} {out}"
    launcher = "how.launcher: no program 'srunn' is found on this machine"
    assert missing(planned(training(command=text), "how.launcher=srunn --nodes 2")) == [launcher]
    assert missing(planned(training(command=text), "how.launcher=env A=1")) == []
    assert missing(planned(training(command=text))) == [
        "general: no program 'no-such-trainer' is found on this machine"
    ]
    assert missing(planned("how.nodes=2", "how.launcher=srunn")) == [launcher]
    assert missing(planned("how.launcher=srunn")) == []
    with pytest.raises(RecipeError, match="the launcher cannot be read: no closing quotation; close its quotes"):
        planned(training(command=text), "how.launcher=srun 'x")
