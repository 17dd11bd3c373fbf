"""The page of all methods: nothing on it that METHODS does not say, and every example on it merges."""

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest
from model_folders import read_model

from mixmerge.errors import UserError
from mixmerge.merge import METHODS, load_config, merge
from mixmerge.merge.methods import Parameter
from mixmerge.merge.reference import (
    METHOD_HEADS,
    PARAMETER_HEADS,
    describe_method,
    example_yaml,
    method_rows,
    methods_reference,
    parameter_rows,
    values_text,
)

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_in_the_documents_is_the_one_that_the_methods_give():
    assert PAGE.read_text(encoding="utf-8") == methods_reference(), "see AGENTS.md to make it again"


@pytest.mark.parametrize("method", METHODS)
def test_the_example_of_each_method_merges(method, tiny_models, tmp_path):
    path, text = tmp_path / "merge.yml", example_yaml(method)
    for name, folder in zip(("base", "first", "second"), tiny_models("llama"), strict=True):
        text = text.replace(f"path/to/{name}", str(folder))
    assert "path/to" not in text
    path.write_text(text)
    config = load_config(path)
    assert config.merge_method == method
    merge(config, tmp_path / "out")
    assert set(read_model(tmp_path / "out")) == set(read_model(tiny_models("llama")[0]))


@pytest.mark.parametrize("method", METHODS)
def test_an_example_sets_every_parameter_that_must_be_given(method):
    shown = set(re.findall(r"^ +(\w+): ", example_yaml(method), re.M))
    spec = METHODS[method].parameters
    assert {name for name, parameter in spec.items() if parameter.default is None} <= shown
    assert shown <= set(spec)


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if spec.base == "optional"])
def test_an_example_with_an_optional_base_merges_without_it_too(method, tiny_models, tmp_path):
    lines = [line for line in example_yaml(method).splitlines() if "base_model" not in line]
    path, text = tmp_path / "merge.yml", "\n".join(lines)
    for name, folder in zip(("first", "second"), tiny_models("llama")[1:], strict=True):
        text = text.replace(f"path/to/{name}", str(folder))
    path.write_text(text)
    assert merge(path, tmp_path / "out")["method"] == method


@pytest.mark.parametrize("method", METHODS)
def test_what_is_told_of_a_method_is_what_its_entry_says(method):
    told, spec = describe_method(method), METHODS[method]
    assert (told["summary"], told["base"], told["paper"]) == (spec.summary, spec.base, spec.source or None)
    assert (told["inputs"]["fewest"], told["inputs"]["most"]) == spec.inputs
    assert [parameter["name"] for parameter in told["parameters"]] == list(spec.parameters)
    for parameter in told["parameters"]:
        entry = spec.parameters[parameter["name"]]
        assert parameter["required"] == (entry.default is None)
        assert (parameter["where"] == "shared") == (entry.scope == "shared")
        assert parameter["low"] is None or parameter["low"] == entry.low
        assert parameter["meaning"], "says nothing of what it does"
    json.dumps(told, allow_nan=False)


def test_every_parameter_of_every_method_stands_in_the_table_with_its_default():
    for name, row in zip(METHODS, method_rows(), strict=True):
        assert len(row) == len(METHOD_HEADS)
        for key, parameter in METHODS[name].parameters.items():
            assert re.search(rf"\b{key}{'' if parameter.default is None else '='}", row[2])
        assert all(len(cells) == len(PARAMETER_HEADS) for cells in parameter_rows(name))


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        (Parameter("shared", default=True), "true or false"),
        (Parameter("input"), "any number"),
        (Parameter("input", low=0.0, high=1.0), "0 to 1"),
        (Parameter("shared", low=0.0), "at least 0"),
        (Parameter("shared", high=2.5), "at most 2.5"),
        (Parameter("shared", default=3, whole=True), "a whole number"),
        (Parameter("shared", default=3, low=1, whole=True), "a whole number, at least 1"),
    ],
)
def test_the_values_a_parameter_takes_are_said_in_words(parameter, text):
    assert values_text(parameter) == text


@pytest.mark.parametrize("module", ["anatomy", "conclusions", "diagnose", "reference", "values"])
def test_the_examples_in_docstrings_hold(module):
    found = doctest.testmod(importlib.import_module(f"mixmerge.merge.{module}"))
    assert found.attempted
    assert not found.failed


# The command


def test_the_command_lists_all_methods(mixmerge):
    status, out, err = mixmerge("methods")
    assert (status, err) == (0, "")
    assert all(re.search(rf"^{name} ", out, re.M) for name in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_command_shows_one_method_in_full(method, mixmerge):
    status, out, err = mixmerge("methods", method)
    assert (status, err) == (0, "")
    assert out.startswith(f"{method}: {METHODS[method].summary}\n")
    assert out.endswith(example_yaml(method))
    assert all(re.search(rf"^{name} ", out, re.M) for name in METHODS[method].parameters)
    assert METHODS[method].source in out


def test_the_command_gives_json_of_one_and_of_all(mixmerge):
    assert json.loads(mixmerge("methods", "--json")[1]) == [describe_method(name) for name in METHODS]
    assert json.loads(mixmerge("methods", "ties", "--json")[1]) == describe_method("ties")


def test_the_command_prints_the_page(mixmerge):
    assert mixmerge("methods", "--markdown") == (0, methods_reference(), "")


@pytest.mark.parametrize("arguments", [["ties"], ["--json"]])
def test_the_page_is_of_all_methods_and_nothing_else(arguments, mixmerge):
    status, out, err = mixmerge("methods", *arguments, "--markdown")
    assert (status, out) == (2, "")
    assert err.startswith("error: --markdown: ")


def test_a_method_that_does_not_exist_is_refused_with_the_nearest(mixmerge):
    status, out, err = mixmerge("methods", "tie")
    assert (status, out) == (2, "")
    assert err == "error: NAME: no merge method 'tie'; did you mean 'ties'?\n"
    with pytest.raises(UserError, match="tie_breaker"):
        example_yaml("tie_breaker")
