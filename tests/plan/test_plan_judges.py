"""The judges that a recipe names: what their steps' identity follows, who decides, and what is refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixmerge.errors import DataError, MixmergeError, RecipeError, UserError
from mixmerge.evaluate.rubrics import shipped_rubric

URL = "http://127.0.0.1:9/v1"


def endpoint(name: str = "gpt", **keys) -> str:
    return f"judges.endpoints.{name}=" + json.dumps({"url": URL, "model": "m", "asks": ["quality", "harm"]} | keys)


def steps(plan, judge: str):
    return {step.name: step for step in plan.steps if step.how.get("judge") == judge}


def score(plan):
    return next(step for step in plan.steps if step.kind == "score")


def test_a_judge_behind_a_server_is_asked_on_the_prompts_of_its_questions(planned):
    plan = planned(endpoint(asks=["quality", "harm", "refusal"]))
    assert set(steps(plan, "gpt.quality")) == {f"{c}.general.gpt.quality" for c in ("general", "mix", "ties")}
    for question in ("harm", "refusal"):
        expected = {f"{c}.harmful.gpt.{question}" for c in ("base", "general", "mix", "ties")}
        assert set(steps(plan, f"gpt.{question}")) == expected
    pair = steps(plan, "gpt.quality")["mix.general.gpt.quality"]
    assert plan.by_id[pair.inputs["opponent"]].title == "generate/base.general"
    assert {step.group for name in ("quality", "harm") for step in steps(plan, f"gpt.{name}").values()} == {"judge gpt"}


def test_what_it_may_cost_and_how_quickly_it_is_asked_change_no_id(planned):
    before = planned(endpoint())
    for keys in ({"key": "MY_KEY"}, {"budget": {"requests": 5}}, {"timeout": 9.0}, {"concurrency": 3}):
        assert {s.id for s in planned(endpoint(**keys)).steps} == {s.id for s in before.steps}, keys


def test_another_server_is_another_judge_unless_it_is_known_as_the_same(planned):
    name, there = "mix.harmful.gpt.harm", "https://elsewhere.example/v1"
    one, other = (steps(planned(endpoint(url=url)), "gpt.harm")[name].id for url in (URL, there))
    assert one != other, "many servers call their model `default`"
    moved = [steps(planned(endpoint(url=url, known_as="ours")), "gpt.harm")[name].id for url in (URL, there)]
    assert moved[0] == moved[1]
    again = steps(planned(endpoint(url=URL, known_as="ours", attempt=1)), "gpt.harm")[name].id
    assert again not in moved


@pytest.mark.parametrize(
    "keys",
    [
        {"model": "other"},
        {"max_tokens": 9},
        {"extra": {"top_p": 0.5}},
        {"grammar": "tags"},
        {"longest": 99},
        {"temperature": None},
    ],
    ids=str,
)
def test_what_changes_its_verdicts_changes_its_steps(planned, keys):
    name = "mix.harmful.gpt.harm"
    assert steps(planned(endpoint()), "gpt.harm")[name].id != steps(planned(endpoint(**keys)), "gpt.harm")[name].id


def test_a_rubric_of_ones_own_counts_by_its_content(study, planned):
    file = study.folder / "harm.md"
    ours = files_text("harm")
    file.write_text(ours, encoding="utf-8")
    own = endpoint(rubrics={"harm": "harm.md"})
    name = "mix.harmful.gpt.harm"
    same = steps(planned(own), "gpt.harm")[name]
    assert same.id == steps(planned(endpoint()), "gpt.harm")[name].id, "the same text asks the same"
    assert same.what["rubric"] == shipped_rubric("harm").sha256
    file.write_text(ours.replace("version: ", "version: 9."), encoding="utf-8")
    assert steps(planned(own), "gpt.harm")[name].id != same.id


def files_text(question: str) -> str:
    from importlib.resources import files

    return files("mixmerge.evaluate").joinpath("rubrics", f"{question}.md").read_text(encoding="utf-8")


def test_the_first_judge_that_is_asked_decides_unless_the_recipe_says_who(planned):
    both = (endpoint(), endpoint("guard", asks=["harm"], guard="llama-guard"))
    assert score(planned(*both)).what["decide"] == {"quality": "gpt.quality", "harm": "gpt.harm"}
    chosen = planned(*both, "judges.decide={harm: guard, quality: quality}")
    assert score(chosen).what["decide"] == {"harm": "guard.harm"}
    assert "decide" not in score(planned()).what
    refusals = planned(endpoint(asks=["refusal"]), "judges.decide={harm: gpt}")
    assert score(refusals).what["decide"] == {"harm": "gpt.refusal", "refusal": "gpt.refusal"}


@pytest.mark.parametrize("judge", ["refusal", "refusals"])
def test_who_decides_is_checked_where_the_recipe_names_no_judge_at_all(planned, judge):
    decided = f"judges.decide={{harm: {judge}}}"
    if judge == "refusal":
        before, after = score(planned()), score(planned(decided))
        assert after.id == before.id, "the local judge decides as it does by default"
        return
    with pytest.raises(RecipeError, match=r"judges\.decide\.harm: no judge 'refusals'; did you mean 'refusal'\?"):
        planned(decided)


@pytest.mark.parametrize("question", ["quality", "harm", "refusal"])
def test_a_judge_that_is_not_there_decides_no_question(planned, question):
    with pytest.raises(RecipeError, match=rf"judges\.decide\.{question}: no judge 'gpt'; known: "):
        planned(f"judges.decide={{{question}: gpt}}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ((endpoint(), "judges.decide={harm: gtp}"), r"no judge 'gtp'; did you mean 'gpt'"),
        ((endpoint(), "judges.decide={refusal: gpt}"), r"'gpt' is not asked about refusal"),
        ((endpoint(guard="lama-guard", asks=["harm"]),), r"unknown guard 'lama-guard'; did you mean 'llama-guard'"),
        ((endpoint(rubrics={"harm": "none.md"}),), r"none\.md: cannot be read as a rubric"),
        ((endpoint(rubrics={"refusal": "r.md"}),), r"rubrics: it is not asked about refusal"),
        ((endpoint(asks=[]),), r"asks"),
        ((endpoint(guard="llama-guard", asks=["refusal"]),), r"the guard llama-guard tells harm, not refusal"),
        ((endpoint(guard="llama-guard", asks=["harm"], grammar="tags"),), r"grammar does not go with guard"),
        ((endpoint(url="htp://x"),), r"not the address of a server"),
        ((endpoint(url=[]),), r"no address is given"),
        ((endpoint(url=[5]),), r"not the address of a server"),
        ((endpoint(url="http://127.0.0.1:99999/v1"),), r"not the address of a server.*no port has that number"),
        ((endpoint(url=["http://a/v1", "http://127.0.0.1 :80/v1"]),), r"not the address of a server.*it holds a blank"),
        ((endpoint(url="http://a..b/v1"),), r"not the address of a server.*its host is no name"),
        ((endpoint(extra={"messages": []}),), r"extra cannot set messages"),
        ((endpoint(model=""),), r"model"),
        ((endpoint(budget={"price_in": 3.0}),), r"give at least one of requests, tokens or money"),
        ((endpoint("refusal", asks=["refusal"]),), r"'refusal' is the name of a local judge"),
        ((endpoint(url=None),), r"give exactly one of url or start"),
        ((endpoint(url=None, start="vllm serve {model}"),), r"start needs \{port\}"),
        ((endpoint(budget={"money": 3.0}),), r"money needs price_in and price_out"),
        ((endpoint(calibration={"harm": "none.json"}),), r"none\.json: cannot be read as a calibration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_judge_that_cannot_be_is_named_before_anything_starts(planned, override, message):
    with pytest.raises(UserError, match=message) as caught:
        planned(*override)
    assert "judges" in str(caught.value)


def test_general_prompts_need_no_reference_where_a_judge_of_quality_is_named(study, planned):
    for code in ("en", "fr"):
        path = study.folder / f"prompts/general.{code}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps({**row, "reference": None}) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"name a judge that is asked about quality"):
        planned()
    plan = planned(endpoint())
    titles = {step.title for step in plan.steps}
    assert "judge/mix.general.gpt.quality" in titles
    assert "judge/mix.general.quality" not in titles


def test_a_check_makes_a_benchmark_of_a_set_and_decides_quality_where_the_set_is_general(planned):
    plan = planned("evaluation.prompts.general.check=exact")
    titles = {step.title for step in plan.steps}
    assert {"judge/mix.general.check", "judge/base.general.check", "judge/mix.general.quality"} <= titles
    assert next(s for s in plan.steps if s.title == "judge/mix.general.quality").what["judge"] == "paired-check"
    assert score(plan).what["checks"] == {"general": "exact"}
    bench = planned("evaluation.prompts.general.check=exact", "evaluation.prompts.general.purpose=benchmark")
    assert "judge/mix.general.quality" not in {step.title for step in bench.steps}
    assert score(bench).what["prompt_sets"]["general"] == "benchmark"


def test_an_address_with_and_without_the_end_of_its_requests_is_one_server(planned):
    whole, bare = (steps(planned(endpoint(url=f"http://h/v1{end}")), "gpt.harm") for end in ("/chat/completions", ""))
    assert {s.id for s in whole.values()} == {s.id for s in bare.values()}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluation.prompts.general={path: x, like: xsafty}",
            r"no ready-made prompt set 'xsafty'; did you mean 'xsafety'",
        ),
        ("evaluation.prompts.general={path: x}", r"give purpose, or like for a known set"),
        ("evaluation.prompts.general.purpose=benchmark", r"a benchmark needs a check"),
        ("evaluation.prompts.general.check=instructions", r"no instructions for prompt"),
        ("evaluation.prompts.general.ask={de: Bitte}", r"unknown language 'de'"),
        ("evaluation.prompts.general.threshold=0.5", r"threshold goes with check: chrf"),
    ],
)
def test_a_prompt_set_that_cannot_be_read_is_named(planned, override, message):
    with pytest.raises(MixmergeError, match=message) as caught:
        planned(override)
    assert "evaluation.prompts.general" in str(caught.value)


def labelled(folder: Path) -> None:
    rows = [{"id": i, "lang": "en", "text": f"words number {i}", "label": "rc"[i % 2]} for i in range(20)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def classifier(**keys) -> str:
    given = {"kind": "ngrams", "path": "labelled.jsonl", "asks": "refusal", "labels": {"r": "refused", "c": "complied"}}
    return "judges.classifiers.words=" + json.dumps(given | keys)


def test_a_fitted_classifier_has_one_step_that_fits_it_for_all_candidates(study, planned):
    labelled(study.folder)
    plan = planned(classifier())
    fitted = [step for step in plan.steps if step.title == "fit-judge/words.refusal"]
    judged = steps(plan, "words.refusal").values()
    assert len(fitted) == 1
    assert {step.inputs["judge"] for step in judged} == {fitted[0].id}
    with (study.folder / "labelled.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": 99, "lang": "en", "text": "more", "label": "r"}\n')
    again = planned(classifier())
    assert fitted[0].id not in again.by_id
    kept = [step for step in planned(classifier(threshold=0.3)).steps if step.title == "fit-judge/words.refusal"]
    assert kept[0].id in again.by_id, "a threshold needs no new fit"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"labels": {"r": "harmful"}}, r"'harmful' is no verdict on refusal"),
        ({"path": "none.jsonl"}, r"no file .*none\.jsonl"),
        ({"labels": {"r": "refused"}}, r"label"),
        ({"kind": "pipeline"}, r"a pickle.*trust_pickle"),
        ({"kind": "classifier", "path": "none"}, r"no folder .*none"),
        ({"kind": "classifier", "path": "base"}, r"is a LlamaForCausalLM, which has no head that classifies; .*guard"),
        ({"kind": "guard", "path": "head"}, r"is a BertForSequenceClassification.*; write kind: classifier"),
        ({"kind": "pipeline", "trust_pickle": True, "path": "labelled.jsonl"}, r"labelled\.jsonl is no joblib file"),
    ],
)
def test_a_classifier_that_cannot_judge_is_named_before_anything_starts(study, planned, keys, message):
    labelled(study.folder)
    model(study.folder / "head", "BertForSequenceClassification")
    with pytest.raises(MixmergeError, match=message) as caught:
        planned(classifier(**keys))
    assert "judges.classifiers.words" in str(caught.value)


def model(folder: Path, name: str | None) -> None:
    """What a plan reads of a model's folder."""
    folder.mkdir()
    labels = {"id2label": {"0": "r", "1": "c"}}
    (folder / "config.json").write_text(json.dumps(labels | ({} if name is None else {"architectures": [name]})))
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "SomebodysOwnClassifier", None])
def test_a_model_that_may_classify_is_let_through(study, planned, name):
    model(study.folder / "head", name)
    assert steps(planned(classifier(kind="classifier", path="head")), "words.refusal")


def test_a_model_that_classifies_works_where_the_recipe_says_and_is_the_same_judge(study, planned):
    model(study.folder / "head", None)
    judges = {
        device: steps(planned(classifier(kind="classifier", path="head"), f"how.device={device}"), "words.refusal")
        for device in ("cpu", "cuda")
    }
    assert all(step.how["device"] == device for device, found in judges.items() for step in found.values())
    assert [step.id for step in judges["cpu"].values()] == [step.id for step in judges["cuda"].values()]


@pytest.mark.parametrize("packed", [0, "zlib", "gzip", "bz2", "xz", "lzma"])
def test_a_pipeline_is_known_by_how_joblib_writes_it(study, planned, packed):
    joblib = pytest.importorskip("joblib")
    joblib.dump({"pipeline": 1}, study.folder / "p.joblib", compress=packed and (packed, 3))
    assert steps(planned(classifier(kind="pipeline", path="p.joblib", trust_pickle=True)), "words.refusal")


def test_tasks_of_the_harness_are_checked_by_name_and_given_to_every_candidate(study, planned):
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match=r"hellaswga.*did you mean 'hellaswag'"):
        planned("evaluation.harness={more: {tasks: [hellaswga]}}")
    plan = planned("evaluation.harness={more: {tasks: [hellaswag], limit: 5}}")
    names = {step.name for step in plan.steps if step.kind == "harness"}
    assert names == {f"{candidate}.more" for candidate in ("base", "general", "mix", "ties")}
    assert {f"harness/{name.replace('.', '/')}" for name in names} <= set(score(plan).inputs)


def test_a_calibration_of_another_question_is_refused(study, planned):
    file = study.folder / "cal.json"
    file.write_text(
        json.dumps({"version": 1, "question": "harm", "judge": {}, "rows": 0, "languages": {}}), encoding="utf-8"
    )
    with pytest.raises((DataError, RecipeError), match=r"measures verdicts on harm, not on refusal"):
        planned("judges.refusal.calibration=cal.json")


def test_a_key_that_is_not_in_the_environment_is_a_note_and_no_refusal(planned, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    told = "judges.endpoints.gpt: the environment variable NO_SUCH_KEY holds no key on this machine"
    assert told in planned(endpoint(key="NO_SUCH_KEY")).notes
    monkeypatch.setenv("NO_SUCH_KEY", "k")
    assert told not in planned(endpoint(key="NO_SUCH_KEY")).notes


def test_answers_that_leave_no_room_for_a_prompt_are_refused(planned):
    with pytest.raises(
        RecipeError, match=r"max_new_tokens: answers of 512 tokens leave no room for a prompt in the 512"
    ):
        planned("evaluation.max_new_tokens=512")


@pytest.mark.parametrize(
    "keys",
    [
        {"key": "sk-LITERAL-0123456789"},
        {"url": "http://me:s3cretpw@host/v1"},
        {"url": "http://[s3cretpw@host/v1"},
        {"extra": {"api_key": "sk-LITERAL-0123456789"}},
        {"extra": {"auth": {"accessToken": "s3cretpw"}}},
        {"extra": {"extra_headers": {"Authorization": "Bearer s3cretpw"}}},
        {"extra": {"note": "sk-proj-LITERAL-0123456789abcdef"}},
        {"extra": {"keys": [{"password": "s3cretpw"}]}},
        {"extra": {"extra_headers": ["Authorization: Bearer s3cretpw"]}},
        {"extra": {"a": [[{"api_key": "s3cretpw"}]]}},
        {"extra": {"user": "key=sk-LITERAL-0123456789abcdef"}},
        {"extra": {"openai_key": "s3cretpw"}},
        {"extra": {"sk-LITERAL-0123456789abcdef": 1}},
        {"extra": {"password": 123456789}},
        {"url": None, "start": "python serve.py {port} --api-key sk-LITERAL-0123456789abcdef"},
    ],
)
def test_a_secret_in_the_recipe_is_refused_and_not_repeated(planned, keys):
    with pytest.raises(RecipeError) as caught:
        planned(endpoint(**keys))
    assert "judges.endpoints.gpt" in str(caught.value)
    assert "s3cretpw" not in str(caught.value)
    assert "LITERAL" not in str(caught.value)


def test_a_secret_among_the_fields_of_a_generating_server_is_refused_too(planned):
    server = {"url": URL, "extra": {"X-Api-Key": "s3cretpw"}}
    with pytest.raises(RecipeError, match=r"evaluation\.server\.extra: X-Api-Key looks like a secret.*`key`") as caught:
        planned("evaluation.server=" + json.dumps(server))
    assert "s3cretpw" not in str(caught.value)


def test_fields_that_only_sound_like_secrets_are_sent(planned):
    fields = {"max_completion_tokens": 9, "stop": ["<|im_end|>"], "prompt_cache_key": "study", "token": None}
    fields |= {"logit_bias": {"50256": -1}, "chat_template_kwargs": {"enable_thinking": False}, "user": "sk-1"}
    fields |= {"cookie_policy": "strict", "auth": "none", "sort_key": "difficulty", "seed": 123456789}
    assert steps(planned(endpoint(extra=fields)), "gpt.harm")


def test_a_server_that_would_answer_for_every_candidate_is_refused(planned):
    for name, message in (
        ("same", r"'same' would answer for every candidate"),
        ("{candidat}", r"would answer|unknown"),
    ):
        with pytest.raises(RecipeError, match=message):
            planned("evaluation.server=" + json.dumps({"url": URL, "model": name}))
    plan = planned("evaluation.server=" + json.dumps({"url": URL, "model": "lora-{candidate}"}))
    assert {s.what["server"]["called"] for s in plan.steps if s.kind == "generate"} == {
        f"lora-{name}" for name in ("base", "general", "mix", "ties")
    }


def test_a_misspelt_key_of_the_harness_is_one_line(planned):
    with pytest.raises(RecipeError, match=r"evaluation\.harness\.h\.task: unknown key 'task'; did you mean 'tasks'"):
        planned("evaluation.harness={h: {task: [arc]}}")


def test_a_damaged_calibration_is_named(study, planned):
    (study.folder / "cal.json").write_text('{"version": 1, "question": "refusal"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"cal\.json: a damaged calibration"):
        planned("judges.refusal.calibration=cal.json")
