import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import FACTS, QUICK, run_child, same, tiny_model, train, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixmerge.errors import DataError, ModelError, StepError, UserError
from mixmerge.train.fit import Place, stored_dtype
from mixmerge.train.settings import SftSettings
from mixmerge.train.tokens import IGNORED, load_tokenizer, tokenise
from mixmerge.train.trainer import build_trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_small_mixture_is_learned_and_the_saved_model_answers(kind, precision, request, facts, tmp_path, capfd):
    base = request.getfixturevalue(kind)
    steps = []
    metrics = train(
        base, facts, tmp_path, epochs=20, precision=precision, learning_rate=1e-2, progress=lambda *at: steps.append(at)
    )
    assert metrics["last_loss"] < 0.3 * metrics["first_loss"]
    assert metrics["steps"] == 120
    assert steps == [(step, 120) for step in range(1, 121)]
    assert capfd.readouterr().out == ""

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    right = 0
    for thing, answer in FACTS:
        chat = [{"role": "user", "content": f"what is the colour of {thing}"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**ids, do_sample=False, max_new_tokens=16, pad_token_id=0)[0][ids["input_ids"].shape[1] :]
        right += tokenizer.decode(said, skip_special_tokens=True).strip() == answer
    assert right >= 3


def test_the_model_folder_is_the_bases_in_all_but_its_weights(gemma, facts, tmp_path):
    train(gemma, facts, tmp_path)
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (gemma / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((gemma / "config.json").read_text())
    before, after = load_file(gemma / "model.safetensors"), weights(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    assert not same(before, after)
    assert {file.name for file in out.iterdir()} == {file.name for file in gemma.iterdir()} | {"metrics.jsonl"}


def test_tied_embeddings_stay_tied_and_are_stored_once(facts, tmp_path):
    base = tiny_model(tmp_path / "base", tie_word_embeddings=True)
    train(base, facts, tmp_path)
    assert "lm_head.weight" not in weights(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_stored_in_the_dtype_of_the_base_unless_asked_otherwise(dtype, facts, tmp_path):
    base = tiny_model(tmp_path / "base", dtype=dtype)
    assert stored_dtype(base) == dtype
    train(base, facts, tmp_path / "kept", epochs=0.2)
    assert stored_dtype(tmp_path / "kept" / "out") == dtype
    train(base, facts, tmp_path / "asked", epochs=0.2, save_dtype="float32")
    assert stored_dtype(tmp_path / "asked" / "out") == "float32"
    assert json.loads((tmp_path / "asked" / "out" / "config.json").read_text())["dtype"] == "float32"


def test_small_updates_are_kept_in_fp32_even_from_a_bf16_base(llama, facts, tmp_path):
    train(llama, facts, tmp_path, learning_rate=1e-5, save_dtype="float32")
    base = load_file(llama / "model.safetensors")
    after = weights(tmp_path)
    # A step of 1e-5 on weights around 0.02 is below half of a bf16 unit: pure bf16 would leave most of them alone.
    moved = [(after[name] != base[name].float()).float().mean().item() for name in base if name.endswith("proj.weight")]
    assert min(moved) > 0.9
    assert max((after[name] - base[name].float()).abs().max().item() for name in base) < 1e-4


def test_metrics_count_steps_tokens_and_rows_that_did_not_fit(llama, tmp_path):
    pairs = [("sky", "blue")] * 6 + [("sky", "blue " * 90), ("sky " * 90, "blue")]
    mixture = write_rows(tmp_path / "mix", pairs)
    metrics = train(llama, mixture, tmp_path, epochs=2)
    rows = [json.loads(line) for line in (mixture / "rows.jsonl").read_text().splitlines()]
    made = tokenise(rows, load_tokenizer(llama), 64)
    assert (metrics["rows"], metrics["truncated_rows"], metrics["dropped_rows"]) == (8, 1, 1)
    assert metrics["diverging_rows"] == 0
    assert metrics["tokens"] == 2 * sum(len(ids) for ids in made.ids)
    assert metrics["completion_tokens"] == 2 * sum(int((labels != IGNORED).sum()) for labels in made.labels)
    assert (metrics["steps"], metrics["steps_resumed"], metrics["seconds_resumed"]) == (4, 0, 0)
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    assert metrics["peak_rss_mb"] > 50
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["tokens"] for line in lines) == metrics["tokens"]
    assert set(lines[0]) == {"step", "loss", "lr", "tokens", "completion_tokens"}


def test_the_rate_warms_up_and_falls_to_nothing(llama, facts, tmp_path):
    train(llama, facts, tmp_path, epochs=2, warmup_ratio=0.25)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    top = rates.index(max(rates))
    assert len(rates) == 12
    assert max(rates) == pytest.approx(QUICK["learning_rate"])
    assert top == 3
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)


def loss_of(model, labels, ids, folder):
    """The loss and gradient that our trainer computes for one batch, through its own collator."""
    settings = SftSettings(**{**QUICK, "precision": "fp32"})
    made = tokenise([], load_tokenizer(model), 64)
    made.ids, made.labels = ids, labels
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attention_dropout=0.0)
    trainer = build_trainer(
        network,
        load_tokenizer(model),
        made,
        range(len(ids)),
        settings,
        place=Place(folder, None, "cpu"),
        training="",
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(network, dict(batch))
    loss.backward()
    return trainer, batch, network, loss.detach()


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_loss_is_that_of_transformers_on_answer_tokens_alone(kind, request, facts, tmp_path):
    base = request.getfixturevalue(kind)
    rows = [json.loads(line) for line in (facts / "rows.jsonl").read_text().splitlines()][:4]
    made = tokenise(rows, load_tokenizer(base), 64)
    _, batch, network, loss = loss_of(base, made.labels, made.ids, tmp_path)
    assert [row.tolist() for row in batch["labels"]] == [
        labels.tolist() + [IGNORED] * (batch["labels"].shape[1] - len(labels)) for labels in made.labels
    ]
    gradient = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attention_dropout=0.0).train()
    expected = plain(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_answers_are_learned_and_prompts_are_not(llama, facts, tmp_path):
    train(llama, facts, tmp_path, epochs=20, learning_rate=1e-2)
    rows = [json.loads(line) for line in (facts / "rows.jsonl").read_text().splitlines()]
    made = tokenise(rows, load_tokenizer(llama), 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    losses = {"prompt": [], "answer": []}
    with torch.no_grad():
        for ids, labels in zip(made.ids, made.labels, strict=True):
            whole = torch.tensor(ids.tolist())
            each = torch.nn.functional.cross_entropy(model(whole[None]).logits[0, :-1], whole[1:], reduction="none")
            learned = torch.tensor(labels.tolist())[1:] != IGNORED
            losses["answer"] += each[learned].tolist()
            losses["prompt"] += each[~learned].tolist()
    mean = {part: sum(values) / len(values) for part, values in losses.items()}
    assert mean["answer"] < 1
    assert mean["prompt"] > 5


def test_padding_does_not_change_the_loss(llama, facts, tmp_path):
    rows = [json.loads(line) for line in (facts / "rows.jsonl").read_text().splitlines()]
    made = tokenise(rows, load_tokenizer(llama), 64)
    short, long = sorted(range(len(rows)), key=lambda i: len(made.ids[i]))[:: len(rows) - 1]
    counts = {i: int((made.labels[i] != IGNORED).sum()) for i in (short, long)}
    alone = {i: loss_of(llama, [made.labels[i]], [made.ids[i]], tmp_path)[3] for i in (short, long)}
    both = loss_of(llama, [made.labels[i] for i in (short, long)], [made.ids[i] for i in (short, long)], tmp_path)[3]
    expected = sum(alone[i] * counts[i] for i in alone) / sum(counts.values())
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)


def test_the_same_training_gives_the_same_weights_and_another_seed_others(llama, facts, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(llama, facts, tmp_path / name, seed=seed, epochs=2)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_killed_training_called_again_ends_with_the_weights_of_an_unbroken_one(llama, facts, tmp_path):
    whole = run_child(llama, facts, tmp_path / "whole", -1, epochs=3)
    assert whole.returncode == 0, whole.stderr
    assert run_child(llama, facts, tmp_path / "cut", 11, epochs=3).returncode == -signal.SIGKILL
    work = tmp_path / "cut" / "work"
    assert [folder.name for folder in work.glob("checkpoint-*")] == ["checkpoint-8"]
    # What a kill in the middle of the next save leaves behind: some of its files, one of them cut.
    half = work / "checkpoint-12"
    half.mkdir()
    data = (work / "checkpoint-8" / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(data[: len(data) // 2])
    (half / "trainer_state.json").write_text("{}")

    steps = []
    metrics = train(llama, facts, tmp_path / "cut", lambda done, _: steps.append(done), checkpoint_every=4, epochs=3)
    assert steps == list(range(9, 19))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    logs = [(tmp_path / name / "out" / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert (metrics["steps"], metrics["steps_resumed"]) == (18, 8)
    assert 0 < metrics["seconds_resumed"] < metrics["seconds"]


def test_a_training_killed_before_its_first_checkpoint_starts_anew(llama, facts, tmp_path):
    assert run_child(llama, facts, tmp_path / "cut", 2, epochs=3).returncode == -signal.SIGKILL
    train(llama, facts, tmp_path / "cut", checkpoint_every=4, epochs=3)
    train(llama, facts, tmp_path / "whole", checkpoint_every=4, epochs=3)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_training_killed_after_its_last_step_trains_from_the_last_checkpoint_only(llama, facts, tmp_path):
    train(llama, facts, tmp_path, checkpoint_every=4, epochs=1)
    first = weights(tmp_path)
    (tmp_path / "out").rename(tmp_path / "before")
    steps = []
    metrics = train(llama, facts, tmp_path, lambda done, _: steps.append(done), checkpoint_every=4, epochs=1)
    assert steps == [5, 6]
    assert metrics["steps"] == 6
    assert same(first, weights(tmp_path))


def test_a_work_folder_of_other_settings_data_or_weights_is_refused(llama, gemma, facts, tmp_path):
    train(llama, facts, tmp_path, checkpoint_every=2)
    other = write_rows(tmp_path / "mix", [("sky", "blue")] * 8)
    for model, mixture, settings in ((llama, facts, {"seed": 9}), (llama, other, {}), (gemma, facts, {})):
        with pytest.raises(StepError, match="of another training"):
            train(model, mixture, tmp_path, **settings)


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(facts, tmp_path):
    base = tiny_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match=r"the loss is nan at step 1 of 6; lower the learning rate"):
        train(base, facts, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_is_stopped_where_it_does(facts, tmp_path):
    base = tiny_model(tmp_path / "base")
    with pytest.raises(StepError, match=r"is (nan|inf) at step \d+ of 60"):
        train(base, facts, tmp_path, learning_rate=1e30, epochs=10, warmup_ratio=0.0)


def test_a_mixture_that_cannot_be_used_is_named_with_its_row(llama, tmp_path):
    with pytest.raises(DataError, match="cannot read the mixture"):
        train(llama, tmp_path / "none", tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        train(llama, tmp_path, tmp_path)
    for text in ("{", "[]", "{}", '{"prompt": [], "completion": []}', '{"prompt": "q", "completion": "a"}'):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"rows\.jsonl:1"):
            train(llama, tmp_path, tmp_path)


def test_a_mixture_of_which_no_row_fits_is_refused(llama, facts, tmp_path):
    with pytest.raises(
        DataError, match=r"none of 24 rows has room for an answer within max_length 4; raise max_length"
    ):
        train(llama, facts, tmp_path, max_length=4)


def test_a_model_folder_that_cannot_be_trained_is_refused(facts, tmp_path):
    base = tiny_model(tmp_path / "base")
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="weights are stored as I8"):
        train(base, facts, tmp_path)
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        train(base, facts, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"epochs": 0},
        {"batch_size": 0},
        {"max_length": 1},
        {"warmup_ratio": 1.5},
        {"scheduler": "step"},
        {"weight_decay": -1.0},
        {"precision": "fp16"},
        {"seed": -1},
        {"save_dtype": "int8"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SftSettings(**wrong)


def test_settings_are_imported_without_torch():
    code = "import sys, mixmerge.train.sft, mixmerge.data.mixture; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 0
    )


def test_the_work_folder_keeps_one_checkpoint_and_none_of_the_last_step(llama, facts, tmp_path):
    train(llama, facts, tmp_path, checkpoint_every=2)
    assert [folder.name for folder in Path(tmp_path / "work").iterdir()] == ["checkpoint-4"]


def test_rows_longer_than_the_model_can_read_are_refused_before_any_work(llama, facts, tmp_path):
    with pytest.raises(
        UserError, match=r"^training.max_length: rows of max_length 300 are longer than the 256 tokens "
    ):
        train(llama, facts, tmp_path, max_length=300)
    assert not (tmp_path / "work").exists()
