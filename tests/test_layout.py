"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src" / "mixmerge").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def public_functions(path: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes at the top of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


@pytest.mark.parametrize("path", MODULES + TESTS, ids=name)
def test_no_module_is_longer_than_600_lines(path):
    assert lines(path) <= 600


def test_modules_are_short_as_a_rule():
    assert statistics.median(lines(path) for path in MODULES if path.name != "__init__.py") <= 250


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_opens_with_what_it_is_in_at_most_ten_lines(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text, "no docstring"
    assert len(text.splitlines()) <= 10


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_module_has_a_name_that_says_nothing(path):
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc", "base"}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_is_left_to_be_done_and_nothing_is_asserted_at_users(path):
    text = path.read_text(encoding="utf-8")
    for word in ("TODO", "FIXME", "XXX", "NotImplementedError", "breakpoint(", "# type: ignore\n"):
        assert word not in text


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_the_command_line_prints(path):
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls or path.parent.name == "cli"


def test_most_public_things_are_described():
    nodes = [(path, node) for path in MODULES for node in public_functions(path)]
    bare = [f"{name(path)}:{node.lineno} {node.name}" for path, node in nodes if not ast.get_docstring(node)]
    assert len(bare) <= 0.1 * len(nodes), bare


def test_there_are_at_least_as_many_lines_of_tests_as_of_code():
    assert sum(map(lines, TESTS)) >= sum(map(lines, MODULES))


def test_every_folder_of_the_package_has_tests():
    folders = {path.name for path in (ROOT / "src" / "mixmerge").iterdir() if (path / "__init__.py").is_file()}
    tested = {path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))}
    assert folders <= tested


def test_tests_are_sentences():
    short = [
        f"{name(path)}: {node.name}"
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name.count("_") < 3
    ]
    assert short == []


def test_test_files_have_names_of_their_own():
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert len(names) == len(set(names)), "pytest would take one for the other"
