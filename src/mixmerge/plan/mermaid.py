"""A plan as a Mermaid flowchart: a node a step, its colour its state, an arrow from each input.

A large plan is folded until it can be read: first the questions and verdicts of a candidate become one node each, then all
steps of a kind. A folded node says how many steps it stands for, in which states, and has the colour of the least finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from mixmerge.plan.explain import Explanation
from mixmerge.plan.graph import Step

MOST = 60  # nodes that can be read
# the first that a node's steps have gives its colour
COLOURS = {
    "running": "fill:#cfe2ff,stroke:#0b5ed7,color:#052c65",
    "interrupted": "fill:#ffe5d0,stroke:#ca6510,color:#653208",
    "blocked": "fill:#f1f3f5,stroke:#868e96,color:#343a40",
    "changed": "fill:#fff3cd,stroke:#cc9a06,color:#664d03",
    "to run": "fill:#ffffff,stroke:#495057,color:#212529",
    "done": "fill:#d1e7dd,stroke:#146c43,color:#0a3622",
}
BY_CANDIDATE = ("generate", "judge", "harness")
FAILED = "failed"  # a step that failed when it was last tried, or that waits for one
FAILED_COLOUR = "fill:#f8d7da,stroke:#b02a37,color:#58151c"


def mermaid(explained: Sequence[Explanation], candidates: Collection[str] = (), *, most: int = MOST) -> str:
    """The flowchart of a plan's steps, of at most about `most` nodes; `candidates`: their names, which may have dots."""
    names: dict[str, str] = {}
    longest_first = sorted(candidates, key=lambda name: (-len(name), name))

    def by_candidate(step: Step) -> str:
        named = (name for name in longest_first if step.name == name or step.name.startswith(f"{name}."))
        return f"{step.kind}/{next(named, step.name)}" if step.kind in BY_CANDIDATE else step.title

    folds: tuple[Callable[[Step], str], ...] = (lambda step: step.id, by_candidate, lambda step: step.kind)
    for fold in folds:
        names = {entry.step.id: fold(entry.step) for entry in explained}
        if len(set(names.values())) <= most:
            break
    groups: dict[str, list[Explanation]] = {}
    for entry in explained:
        groups.setdefault(names[entry.step.id], []).append(entry)
    nodes = {name: f"n{index}" for index, name in enumerate(groups)}
    lines = ["flowchart LR"]
    lines += [f'  {nodes[name]}["{_label(name, group)}"]:::{_class(group)}' for name, group in groups.items()]
    edges = {
        (nodes[names[source]], nodes[names[entry.step.id]])
        for entry in explained
        for source in entry.step.inputs.values()
        if source in names and names[source] != names[entry.step.id]
    }
    lines += [f"  {source} --> {target}" for source, target in sorted(edges, key=_numbers)]
    used = {_class(group) for group in groups.values()}
    colours = {_word(state): colour for state, colour in COLOURS.items()} | {FAILED: FAILED_COLOUR}
    lines += [f"  classDef {word} {colour}" for word, colour in colours.items() if word in used]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """A text that may stand in a quoted label, whatever it holds.

    >>> escaped('a "b" <c> #1')
    'a #quot;b#quot; #lt;c#gt; #35;1'
    """
    marks = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\\": "#92;"}
    return "".join(marks.get(c, c if c.isprintable() else " ") for c in text)


def _label(name: str, group: Sequence[Explanation]) -> str:
    if len(group) == 1:
        return f"{escaped(group[0].step.title)}<br/>{group[0].state}"
    counts = Counter(entry.state for entry in group)
    told = ", ".join(f"{counts[state]} {state}" for state in reversed(COLOURS) if counts[state])
    return f"{escaped(name)}: {len(group)} steps<br/>{told}"


def _class(group: Sequence[Explanation]) -> str:
    if any(entry.state != "done" and _met_failure(entry) for entry in group):
        return FAILED
    states = {entry.state for entry in group}
    return next(_word(state) for state in COLOURS if state in states)


def _met_failure(entry: Explanation) -> bool:
    return entry.failed is not None or any(blocker.error is not None for blocker in entry.blocked_by)


def _word(state: str) -> str:
    return state.replace(" ", "")


def _numbers(edge: tuple[str, str]) -> tuple[int, int]:
    return int(edge[0][1:]), int(edge[1][1:])
