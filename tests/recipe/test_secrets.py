"""Secrets are refused wherever a recipe takes a command or options, and are never repeated."""

from __future__ import annotations

import pytest

from mixmerge.errors import RecipeError
from mixmerge.recipe.load import load_recipe
from mixmerge.recipe.secrets import is_secret, secret_in_command

KEY = "hf_LITERAL0123456789abcdef"

SECRET = [
    f"env HF_TOKEN={KEY} srun --ntasks 8",
    "env HF_TOKEN=s3cretpw srun",
    "srun --export=ALL,WANDB_API_KEY=s3cretpw --ntasks 8",
    "python train.py --api-key s3cretpw",
    "python train.py --api-key=s3cretpw",
    "python train.py --hf_token s3cretpw",
    "python train.py --password 's3cret pw'",
    f"python train.py --note {KEY}",
    "docker run -e AWS_SECRET_ACCESS_KEY=s3cretpw image",
    "bash -c 'MY_SECRET=s3cretpw exec python train.py'",
    "bash -c \"python train.py --api-key 's3cretpw'\"",
    "curl -H 'Authorization: Bearer s3cretpw' http://localhost",
    "curl -H 'X-Api-Key:s3cretpw' http://localhost",
    "curl https://me:s3cretpw@example.org/model",
    "python 'train.py --api-key s3cretpw",
]

HARMLESS = [
    "srun --nodes 2 --ntasks-per-node 1",
    "torchrun --nproc-per-node 8 --rdzv-endpoint localhost:29500",
    "env HF_TOKEN=$HF_TOKEN srun --ntasks 8",
    "env HF_TOKEN=${HF_TOKEN} OMP_NUM_THREADS=8 srun",
    "srun --export=ALL,HF_TOKEN",
    "docker run -e HF_TOKEN -v /data:/data image",
    "python train.py --api-key $API_KEY --max-tokens 1000000",
    "python train.py --api-key-file /home/me/key.txt --token-env HF_TOKEN",
    "bash -c 'HF_TOKEN=$(cat token.txt) python train.py'",
    "curl -H 'Authorization: Bearer $TOKEN' http://localhost:8000/v1",
    "curl https://me:$PASSWORD@example.org/model",
    "python train.py --pad-token '<|endoftext|>' --tokenizer mistral --token-type 123456",
    "python train.py --model {model} --data {mixture} --out {out} --lr {learning_rate}",
    "vllm serve {model} --host 127.0.0.1 --port {port}",
    "mpirun -x PATH -x LD_LIBRARY_PATH --map-by ppr:8:node",
    "",
]


@pytest.mark.parametrize("command", SECRET)
def test_a_secret_in_a_command_is_seen(command):
    assert secret_in_command(command)


@pytest.mark.parametrize("command", HARMLESS)
def test_a_command_that_only_refers_to_a_secret_is_none(command):
    assert not secret_in_command(command)


@pytest.mark.parametrize("name", ["hf_token", "HUB_TOKEN", "wandb_key", "github-token"])
def test_names_of_well_known_tokens_are_secrets_in_fields_too(name):
    assert is_secret(name, "s3cretpw")
    assert not is_secret(name, None)


@pytest.mark.parametrize(
    ("override", "place"),
    [
        (f"how.launcher=env HF_TOKEN={KEY}", "how.launcher"),
        ("training.command=python train.py --api-key s3cretpw", "training.command"),
        ("experts.general.training.command=env WANDB_API_KEY=s3cretpw train", "experts.general.training.command"),
        ("training.extra={hub_token: s3cretpw}", "training.extra"),
        ("evaluation.server={start: 'serve {port} --api-key s3cretpw'}", "evaluation.server.start"),
        (
            "judges.endpoints={gpt: {model: m, start: 'env API_KEY=s3cretpw serve {port}', asks: [quality]}}",
            "judges.endpoints.gpt.start",
        ),
    ],
)
def test_every_command_of_a_recipe_is_refused_with_a_secret_in_it(study, override, place):
    with pytest.raises(RecipeError) as caught:
        load_recipe(study.recipe, [override])
    said = str(caught.value)
    assert place in said
    assert "looks like a secret" in said
    assert "s3cretpw" not in said
    assert "LITERAL" not in said


def test_a_launcher_with_a_reference_to_a_variable_is_taken(study):
    command = "env HF_TOKEN=$HF_TOKEN srun"
    assert load_recipe(study.recipe, [f"how.launcher={command}"]).recipe.how.launcher == command


def test_a_refused_secret_reaches_no_file(study, mixmerge):
    status, out, err = mixmerge("run", study.recipe, "--set", f"how.launcher=env HF_TOKEN={KEY}", "--out", study.out)
    assert (status, out) == (2, "")
    assert KEY not in err
    assert not study.out.exists()
