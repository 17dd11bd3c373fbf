"""A study judged by a model behind a real server on loopback: asked once, scored again for nothing, killed and carried on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time

import pytest
from scripted_judge import Reply, plainly, rubric_judge, serving

KEY = "sk-this-key-must-never-be-written-anywhere-0123456789"


def with_judge(study, url: str, **keys) -> str:
    entry = {"url": url, "model": "m", "asks": ["quality", "harm"], "grammar": "json", "key": "TINY_KEY"} | keys
    entry = {"known_as": "the scripted judge"} | entry
    return "judges.endpoints.gpt=" + json.dumps(entry)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished study; only judging by the new judge, scores and report are left to do."""
    return finished.copy(tmp_path / "study")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TINY_KEY", KEY)


def test_a_judge_behind_a_server_decides_is_asked_once_and_leaves_no_key(copy):
    with serving(rubric_judge()) as server:
        override = with_judge(copy, server.url)
        done = copy.call("run", "--set", override)
        assert done.returncode == 0, done.stderr
        asked = len(server.bodies)
        assert asked > 0
        again = copy.call("run", "--set", override, "--set", "statistics.draws=150")
        assert again.returncode == 0, again.stderr
        elsewhere = copy.call("run", "--set", with_judge(copy, server.url.replace("127.0.0.1", "localhost")))
        assert elsewhere.returncode == 0, elsewhere.stderr
        assert len(server.bodies) == asked, "an answer that is paid for is never asked for again"
        scores = scores_of(copy, "--set", override)
    rows = [row["verdict"] for row in verdicts(copy, "mix.harmful.gpt.harm") if row["split"] == "test"]
    assert scores["counts"]["mix"].get("gpt.harm: harmful", 0) >= rows.count("harmful")
    assert scores["splits"]["test"]["harm"]["mix"]["macro"]["value"] == pytest.approx(rows.count("harmful") / len(rows))
    assert set(scores["agreement"]) >= {"harm"}
    assert scores["agreement"]["harm"]["judges"] == ["refusal", "gpt.harm"]
    page = (copy.out / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "gpt.harm" in page
    for path in copy.out.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def scores_of(study, *arguments: str) -> dict:
    return json.loads(study.call("report", "--json", *arguments).stdout)["scores"]


def verdicts(study, name: str) -> list[dict]:
    [file] = study.store.glob(f"judge/{name}--*/verdicts.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def failures(done) -> list[str]:
    """The lines on steps that failed, one as they run and one at the end each."""
    assert "Traceback" not in done.stderr
    running = [line for line in done.stderr.splitlines() if "  FAILED: " in line]
    ended = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ended) == len(running) + 1, "and one that counts them"
    return running


def test_a_missing_key_and_a_server_that_is_gone_are_one_line_each(copy, monkeypatch):
    with serving(rubric_judge()) as server:
        url = server.url
        monkeypatch.delenv("TINY_KEY")
        done = copy.call("run", "--set", with_judge(copy, url))
        assert done.returncode == 1
        [line] = failures(done)
        assert "the environment variable TINY_KEY holds no key" in line
        assert "more step(s) that ask this server are not tried in this run" in line
        assert server.bodies == []
    monkeypatch.setenv("TINY_KEY", KEY)
    gone = copy.call("run", "--set", with_judge(copy, url))
    assert gone.returncode == 1
    [line] = failures(gone)
    assert f"FAILED: {url}: ConnectError" in line
    unknown = copy.call("run", "--set", with_judge(copy, "http://no-such-host.invalid/v1"), "--jobs", "2")
    [line] = failures(unknown)
    assert "its host is not found" in line
    counted = unknown.stderr.splitlines()[-1]
    steps = json.loads(copy.call("plan", "--json", "--set", with_judge(copy, url)).stdout)["steps"]
    left = [step for step in steps if step["state"] != "done"]
    assert f"error: 1 step(s) failed, {len(left) - 1} could not start" in counted
    assert f"; {len(left) - 3} more step(s) that ask this server" in line, "all but itself, scores and report"


def test_a_judge_whose_model_is_not_served_leaves_others_at_its_address_their_work(copy):
    def answer(body):
        return Reply("no such model", status=404) if body["model"] == "none" else rubric_judge()(body)

    with serving(answer) as server:
        other = with_judge(copy, server.url, model="none", known_as="other").replace(".gpt=", ".aaa=")
        done = copy.call("run", "--set", other, "--set", with_judge(copy, server.url))
    [line] = failures(done)
    assert "HTTP 404" in line
    assert ".aaa." in line
    assert verdicts(copy, "mix.harmful.gpt.harm")
    told = [json.loads(line) for line in (copy.out / "runs" / "tiny" / "events.jsonl").read_text().splitlines()]
    skipped = {event["step"] for event in told if event["event"] == "skipped"}
    assert skipped
    assert not skipped & {event["step"] for event in told if event["event"] == "failed"}


def test_a_server_that_is_silent_for_a_while_is_told_of_while_it_is_waited_for(copy):
    began: list[float] = []

    def late(body):
        began.append(time.monotonic())
        return Reply("loading", status=503) if began[-1] - began[0] < 11 else rubric_judge()(body)

    with serving(late) as server:
        done = copy.call("run", "--set", with_judge(copy, server.url, asks=["harm"]))
        assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "no answer for" in line]
    assert f"harmful.gpt.harm: {server.url}: no answer for 1" in line
    assert "HTTP 503 (invalid_request_error: loading); it is tried for up to 15 min more" in line


def test_a_budget_ends_the_step_and_says_what_is_missing_and_more_of_it_carries_on(copy):
    with serving(rubric_judge()) as server:
        done = copy.call("run", "--set", with_judge(copy, server.url, budget={"requests": 3}))
        assert done.returncode == 1
        assert len(server.bodies) == 3
        failed = [line for line in done.stderr.splitlines() if "  FAILED: " in line]
        assert all("  FAILED: judge gpt: the budget of 3 requests is spent: " in line for line in failed)
        missing = sum(int(line.partition(" are missing")[0].rpartition(" ")[2]) for line in failed)
        [total, counted] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert total.startswith("error: judge gpt: the budget of 3 requests is spent: up to ")
        assert f" up to {missing} requests of {len(failed)} steps are missing, about " in total
        assert counted.startswith(f"error: {len(failed)} step(s) failed")
        more = copy.call("run", "--set", with_judge(copy, server.url, budget={"requests": 10_000}))
        assert more.returncode == 0, more.stderr
        bodies = [json.dumps(body, sort_keys=True) for body in server.bodies]
        assert len(bodies) == len(set(bodies)), "nothing is asked twice"
        assert len(bodies) - 3 <= missing


def test_a_killed_run_carries_on_without_asking_twice(copy):
    slow = [0.05]

    def slowly(reading, word):
        time.sleep(slow[0])
        return plainly(reading, word)

    with serving(rubric_judge(slowly)) as server:
        override = with_judge(copy, server.url, concurrency=2)
        process = subprocess.Popen(
            copy.command("run", "--set", override), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while len(server.bodies) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1)
        slow[0] = 0
        done = copy.call("run", "--set", override)
        assert done.returncode == 0, done.stderr
        bodies = [json.dumps(body, sort_keys=True) for body in server.bodies]
        assert len(bodies) - len(set(bodies)) <= 2, "at most what was under way is asked again"


def test_verdicts_that_a_judge_never_gave_are_told_in_one_line_and_on_the_page(copy):
    with serving(rubric_judge(lambda reading, word: Reply("I would rather not say."))) as server:
        override = with_judge(copy, server.url, asks=["harm"])
        decide = 'judges.decide={"harm": "refusal"}'
        done = copy.call("run", "--set", override, "--set", decide)
        assert done.returncode == 0, done.stderr
    names = ("base", "general", "mix", "ties")
    rows = [row["verdict"] for name in names for row in verdicts(copy, f"{name}.harmful.gpt.harm")]
    lost = f"{rows.count('unparsed')} of {len(rows)} answers ({rows.count('unparsed')} unparsed)"
    assert "unparsed" in rows
    scored = copy.call("score", "--set", override, "--set", decide)
    for said in (done.stderr, scored.stderr):
        (line,) = [line for line in said.splitlines() if line.startswith("warning: ")]
        assert f"No verdict of gpt.harm on {lost}" in line
    page = (copy.out / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert f'<p class="notice">No verdict of gpt.harm on {lost}' in page
    assert page.index("No verdict of gpt.harm") < page.index('id="results"')
    assert "warning" not in copy.call("score").stderr


def test_what_is_no_verdict_is_counted_and_gives_no_number_of_its_own(copy):
    with serving(rubric_judge(lambda reading, word: Reply("I would rather not say."))) as server:
        override = with_judge(copy, server.url, asks=["quality"])
        done = copy.call("run", "--set", override)
        asked = len(server.bodies)
    rows = [
        row["verdict"] for name in ("general", "mix", "ties") for row in verdicts(copy, f"{name}.general.gpt.quality")
    ]
    assert rows.count("unparsed") == asked / 2, "both orders of a pair are asked"
    if done.returncode:  # none of a candidate's verdicts was known without asking
        assert "verdict on 'win'" in done.stderr
        assert " unparsed" in done.stderr
    else:
        counts = scores_of(copy, "--set", override)["counts"]
        assert sum(found.get("gpt.quality: unparsed", 0) for found in counts.values()) == asked / 2


def test_scores_are_computed_again_from_verdicts_alone(copy):
    shutil.rmtree(copy.store / "mixture")
    before = copy.scores()
    done = copy.call("score", "--set", "statistics.draws=300")
    assert done.returncode == 0, done.stderr
    after = scores_of(copy, "--set", "statistics.draws=300")
    assert after["statistics"]["draws"] == 300
    assert {n: s["macro"]["value"] for n, s in after["splits"]["test"]["win"].items()} == {
        n: s["macro"]["value"] for n, s in before["splits"]["test"]["win"].items()
    }
    assert not (copy.store / "mixture").exists(), "nothing but scores and report is made"


def test_scoring_what_is_not_judged_names_the_first_missing_step(copy):
    shutil.rmtree(next(copy.store.glob("judge/mix.harmful.refusal--*")))
    done = copy.call("score", "--set", "statistics.draws=300")
    assert done.returncode == 2
    assert "1 step(s) not done, judge/mix.harmful.refusal" in done.stderr


def test_a_judge_is_measured_on_labelled_rows_and_its_calibration_corrects_the_rates(copy):
    rows = [
        {"lang": lang, "q": f"request {i}", "a": text, "r": label}
        for lang, texts in {
            "en": (("I cannot help with that request.", 1), ("Sure, here is how it goes.", 0)),
            "fr": (("Je ne peux pas vous aider.", 1), ("Bien sûr, voici comment faire.", 0)),
        }.items()
        for text, label in texts
        for i in range(20)
    ]
    path = copy.folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = copy.folder / "cal.json"
    arguments = ("refusal", str(path), "--columns", "prompt=q,response=a,label=r", "--labels", "1=refused,0=complied")
    done = copy.call("calibrate", *arguments, "--to", str(out))
    assert done.returncode == 0, done.stderr
    assert "sensitivity" in done.stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["languages"]) == {"en", "fr"}
    assert found["rows"] == 80
    scored = copy.call("score", "--set", "judges.refusal.calibration=cal.json")
    assert scored.returncode == 0, scored.stderr
    corrected = scores_of(copy, "--set", "judges.refusal.calibration=cal.json")["corrected"]["harm"]
    assert corrected["rows"] == 80
    assert set(corrected["rates"]) == {"base", "general", "mix", "ties"}
    wrong = copy.call("calibrate", "refusl", *arguments[1:], "--to", str(out))
    assert (wrong.returncode, "did you mean 'refusal'" in wrong.stderr) == (2, True)
