"""The plan as a flowchart: nodes, arrows, colours, folding and escapes."""

from __future__ import annotations

import re

import pytest

from mixmerge.plan.explain import Blocker, Explanation
from mixmerge.plan.graph import Step
from mixmerge.plan.mermaid import escaped, mermaid

NODE = re.compile(r'^  (n\d+)\["(.*)"\]:::(\w+)$')
EDGE = re.compile(r"^  (n\d+) --> (n\d+)$")
CLASS = re.compile(r"^  classDef (\w+) fill:#\w{6},stroke:#\w{6},color:#\w{6}$")


def read(chart: str):
    """Label -> class, and the pairs of labels with an arrow; every line is one of the four kinds."""
    first, *lines = chart.splitlines()
    assert first == "flowchart LR"
    nodes, classes, edges, defined = {}, {}, set(), set()
    for line in lines:
        if found := NODE.match(line):
            nodes[found[1]] = found[2].partition("<br/>")[0]
            classes[nodes[found[1]]] = found[3]
        elif found := EDGE.match(line):
            edges.add((nodes[found[1]], nodes[found[2]]))
        else:
            found = CLASS.match(line)
            assert found, line
            defined.add(found[1])
    assert set(classes.values()) == defined
    return classes, edges


def step(kind: str, name: str, *inputs: Step) -> Step:
    return Step(kind, name, {"name": name}, {f"model{i}": one.id for i, one in enumerate(inputs)})


@pytest.fixture
def steps():
    base = step("base", "base")
    experts = [step("train", name, base) for name in ("general", "safety")]
    merge = step("merge", "ties", *experts)
    asked = [step("generate", f"ties.{name}", merge) for name in ("general", "harmful", "harmless")]
    judged = [step("judge", f"{one.name}.{judge}", one) for one in asked for judge in ("language", "refusal")]
    return [base, *experts, merge, *asked, *judged]


def test_every_step_is_a_node_and_every_input_an_arrow(steps):
    states = dict(zip((s.title for s in steps), ("done", "changed", "running", "blocked"), strict=False))
    classes, edges = read(mermaid([Explanation(s, states.get(s.title, "to run")) for s in steps]))
    assert set(classes) == {s.title for s in steps}
    assert len(edges) == sum(len(s.inputs) for s in steps)
    assert ("train/safety", "merge/ties") in edges
    assert (classes["base/base"], classes["train/general"], classes["train/safety"]) == ("done", "changed", "running")
    assert (classes["merge/ties"], classes["generate/ties.general"]) == ("blocked", "torun")


def test_a_failed_step_and_what_waits_for_it_have_a_colour_of_their_own(steps):
    base, first, *rest = steps
    failed = Explanation(first, "to run", ("failed last time: no memory",), failed="no memory")
    waits = [
        Explanation(s, "blocked", (), (Blocker(first, "no memory"),)) for s in rest if first.id in s.inputs.values()
    ]
    classes, _ = read(mermaid([Explanation(base, "done"), failed, *waits]))
    assert classes == {"base/base": "done", "train/general": "failed", "merge/ties": "failed"}


def test_a_large_plan_is_folded_by_candidate_first(steps):
    classes, edges = read(mermaid([Explanation(s, "to run") for s in steps], ("base", "tie", "ties"), most=8))
    assert set(classes) == {
        *("base/base", "train/general", "train/safety", "merge/ties"),
        *("generate/ties: 3 steps", "judge/ties: 6 steps"),
    }
    assert ("generate/ties: 3 steps", "judge/ties: 6 steps") in edges
    assert len(edges) == 6


def test_candidates_whose_names_have_dots_are_folded_one_by_one():
    names = ("mix-0", "mix-0.25", "mix-0.375", "mix-0.375.x")
    merged = [step("merge", name) for name in names]
    asked = [step("generate", f"{one.name}.{axis}", one) for one in merged for axis in ("general", "harmful")]
    classes, edges = read(mermaid([Explanation(s, "to run") for s in (*merged, *asked)], names, most=8))
    assert set(classes) == {one.title for one in merged} | {f"generate/{name}: 2 steps" for name in names}
    assert edges == {(f"merge/{name}", f"generate/{name}: 2 steps") for name in names}


def test_a_larger_one_by_kind_and_no_arrow_leads_back_to_its_own_node(steps):
    after = step("train", "after", steps[1])
    entries = [Explanation(s, "done" if s.kind == "base" else "to run") for s in [*steps, after]]
    chart = mermaid(entries, most=5)
    classes, edges = read(chart)
    assert list(classes) == ["base/base", "train: 3 steps", "merge/ties", "generate: 3 steps", "judge: 6 steps"]
    assert all(source != target for source, target in edges)
    assert 'n1["train: 3 steps<br/>3 to run"]' in chart


def test_a_folded_node_counts_its_states_and_has_the_colour_of_the_least_finished(steps):
    trained = [s for s in steps if s.kind == "train"]
    entries = [Explanation(trained[0], "done"), Explanation(trained[1], "running")]
    chart = mermaid(entries, most=1)
    assert '"train: 2 steps<br/>1 done, 1 running"]:::running' in chart


@pytest.mark.parametrize(
    "name", ['a"]; click n0 "x', "a<script>b", "50 % #1", "`code`", "a&quot;b", "line\nbreak", "एक"]
)
def test_no_name_can_leave_its_label(name):
    chart = mermaid([Explanation(step("merge", name), "to run")])
    classes, _ = read(chart)
    assert set(classes) == {f"merge/{escaped(name)}"}
    label = chart.splitlines()[1][len('  n0["') : -len('"]:::torun')]
    assert not set(label.replace("<br/>", "")) & set('"<>`\n')
