"""Slices, modules and files of several merges as YAML: what they mean, and every mistake refused where it stands."""

import textwrap

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mixmerge.errors import RecipeError
from mixmerge.merge import METHODS, load_config, parse_config
from mixmerge.merge.card import to_yaml

# the examples that people copy from each other: a slerp of two halves, and a model grown by repeating layers
SLERP = """\
slices:
  - sources:
      - model: org/orca
        layer_range: [0, 40]
      - model: org/platypus
        layer_range: [0, 40]
merge_method: slerp
base_model: org/orca
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float16
"""

GROWN = """\
slices:
  - sources:
    - model: a
      layer_range: [0, 16]
  - sources:
    - model: b
      layer_range: [8, 24]
      parameters:
        scale: 0.5
  - sources:
    - model: a
      layer_range: [16, 32]
    parameters:
      scale: [1, 2]
merge_method: passthrough
dtype: bfloat16
"""

MODULES = """\
modules:
  encoder:
    slices:
      - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
        parameters: {normalize: false}
    parameters:
      weight: 0.25
  decoder:
    models: [{model: a}, {model: b, parameters: {weight: 3}}]
merge_method: linear
parameters:
  weight: 1
"""

TIES = """\
merge_method: ties
base_model: base
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [2, 4]}]
    base_model: other
parameters: {weight: 1}
"""

CHAIN = """\
name: blend
merge_method: linear
models: [{model: ./a}, {model: ./b}]
parameters: {weight: 0.5}
---
merge_method: ties
base_model: ./a
models: [{model: blend}, {model: ./b}]
parameters: {weight: 1}
"""


@pytest.fixture
def load(tmp_path):
    def loader(text):
        path = tmp_path / "merge.yml"
        path.write_text(textwrap.dedent(text))
        return load_config(path)

    return loader


def test_the_sources_of_a_slice_are_combined_over_their_layers(load):
    (part,) = load(SLERP).stack
    assert part.base.model == "org/orca"
    assert [entry.model for entry in part.inputs] == ["org/platypus"]
    assert part.at("model.layers.20.self_attn.q.weight", (1,), 0.5)["t"] == 0.3
    assert part.at("model.layers.39.mlp.up.weight", (1,), 1.0)["t"] == 0
    assert part.at("lm_head.weight", (1,))["t"] == 0.5


def test_a_parameter_is_looked_up_with_the_source_then_the_slice_then_the_module_then_the_top(load):
    first, second, third = load(GROWN + "parameters: {scale: 7}\n").stack
    assert [part.at("w", (1,)).each("scale") for part in (first, second, third)] == [[7], [0.5], [1]]
    assert third.at("w", (1,), 1.0).each("scale") == [2]
    config = load(MODULES)
    (encoder,), (decoder,) = config.module("encoder"), config.module("decoder")
    assert encoder.at("w", (1,)).each("weight") == [0.25, 0.25]
    assert encoder.at("w", (1,))["normalize"] is False
    assert decoder.at("w", (1,)).each("weight") == [1, 3]
    assert decoder.at("w", (1,))["normalize"] is True


def test_filters_see_the_input_name_for_a_models_own_parameters_and_the_output_name_for_shared_ones(load):
    ties = TIES.replace("weight: 1", "weight: [{filter: layers.2., value: 1}, {value: 5}], lambda: LIST")
    _, part = load(ties.replace("LIST", "[{filter: layers.7., value: 9}, {value: 1}]")).stack
    at = part.at("layers.7.w", (1,), names=["layers.2.w"])
    assert at.each("weight") == [1]
    assert at["lambda"] == 9


def test_a_base_apart_that_a_slice_does_not_list_gives_the_layers_that_its_sources_take(load):
    first, second = load(TIES).stack
    assert (first.base.model, first.base.layers) == ("base", (0, 2))
    assert (second.base.model, second.base.layers) == ("other", (2, 4))
    assert [entry.model for entry in second.inputs] == ["a"]
    assert load(TIES).references == ("base", "a", "b", "other")


def test_a_base_of_linear_that_no_slice_lists_gives_configuration_and_tokenizer_only(load):
    text = "merge_method: linear\nbase_model: z\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n"
    config = load(text + "parameters: {weight: 1}\n")
    assert config.donor == "z"
    assert [entry.model for entry in config.stack[0].inputs] == ["a"]
    assert config.notes == ("z gives configuration and tokenizer only: no slice lists it as a source",)


def test_one_model_may_stand_twice_in_a_slice_with_other_layers(load):
    text = "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]}]\n"
    (part,) = load(text + "parameters: {weight: 1}\n").stack
    assert [entry.layers for entry in part.inputs] == [(0, 2), (2, 4)]


def test_merges_run_in_the_order_in_which_they_feed_each_other(load):
    third = CHAIN.split("---\n")[0].replace("blend", "start").replace("./a", "./c")
    config = load(
        CHAIN.replace("./b}]\nparameters: {weight: 0.5}", "start}]\nparameters: {weight: 0.5}\n---\n" + third)
    )
    assert [merge.name for merge in config.earlier] == ["start", "blend"]
    assert config.merge_method == "ties"
    assert config.name is None


def test_a_single_merge_may_have_a_name(load):
    config = load("name: x\n" + GROWN)
    assert (config.name, config.earlier) == ("x", ())


@pytest.mark.parametrize("text", [SLERP, GROWN, MODULES, TIES, CHAIN])
def test_what_is_written_out_reads_back_as_the_same_merge(load, text):
    config = load(text)
    assert load(to_yaml(config)) == config
    assert load(to_yaml(load(to_yaml(config)))) == config


ONE = "{sources: [{model: a, layer_range: [0, 2]}]}"
PASS = f"merge_method: passthrough\nslices:\n  - {ONE}\n"
LINEAR = """\
merge_method: linear
parameters: {weight: 1}
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2]}
"""

REFUSED = {
    "reversed range": (PASS.replace("[0, 2]", "[3, 1]"), "merge.yml:3", "[3, 1] holds no layer; did you mean [1, 3]?"),
    "empty range": (PASS.replace("[0, 2]", "[3, 3]"), "sources.0.layer_range", "did you mean [3, 4]?"),
    "negative range": (PASS.replace("[0, 2]", "[-2, 2]"), "layer_range", "counted from 0, got [-2, 2]"),
    "three numbers": (PASS.replace("[0, 2]", "[0, 1, 2]"), "layer_range", "[first layer, layer after the last]"),
    "fractions": (PASS.replace("[0, 2]", "[0, 1.5]"), "layer_range", "got [0, 1.5]"),
    "no range": (PASS.replace(", layer_range: [0, 2]", ""), "merge.yml:3: slices.0.sources.0", "{model, layer_range"),
    "misspelt range": (PASS.replace("}]", ", layer_rnge: 3}]"), "layer_rnge", "did you mean 'layer_range'?"),
    "misplaced parameter": (
        PASS.replace("}]", ", scale: 3}]"),
        "merge.yml:3: slices.0.sources.0.scale",
        "write it under slices.0.sources.0.parameters",
    ),
    "misplaced slice parameter": (
        PASS.replace("}]}", "}], scale: 3}"),
        "merge.yml:3: slices.0.scale",
        "write it under slices.0.parameters",
    ),
    "another method for one slice": (
        PASS.replace("}]}", "}], merge_method: linear}"),
        "merge.yml:3: slices.0.merge_method",
        "unknown key 'merge_method'",
    ),
    "shared parameter under a source": (
        LINEAR.replace("[0, 2]}", "[0, 2], parameters: {normalize: true}}"),
        "merge.yml:5: slices.0.sources.0.parameters.normalize",
        "move it to the parameters of the slice",
    ),
    "two sources for passthrough": (
        PASS.replace("}]}", "}, {model: b, layer_range: [0, 2]}]}"),
        "merge.yml:3: slices.0",
        "passthrough merges exactly 1 model(s), got 2",
    ),
    "sources of unequal length": (
        LINEAR.replace("b, layer_range: [0, 2]", "b, layer_range: [0, 3]"),
        "merge.yml:6: slices.0.sources.1.layer_range",
        "3 layers of 'b' and 2 of 'a' cannot be combined layer by layer",
    ),
    "the same layers twice": (LINEAR.replace("model: b", "model: a"), "merge.yml:6", "listed twice in this slice: 'a'"),
    "the base twice": (
        TIES.replace("{model: a, layer_range: [0, 2]}, {model: b,", "{model: base, layer_range: [1, 3]}, {model: base,"),
        "merge.yml:4: slices.0.sources.1",
        "the base is listed twice",
    ),
    "which layers of the base": (
        TIES.replace("b, layer_range: [0, 2]", "b, layer_range: [1, 3]"),
        "merge.yml:4: slices.0.sources",
        "which ones of the base 'base'?; list it as a source with its layer_range",
    ),
    "a slice without base": (TIES.replace("base_model: base\n", ""), "merge.yml:1", "ties needs a 'base_model'"),
    "a base that does nothing": (
        LINEAR + "    base_model: c\n",
        "merge.yml:7: slices.0.base_model",
        "linear takes no base, so this does nothing",
    ),
    "missing weight in one slice": (
        LINEAR.replace("parameters: {weight: 1}\n", "").replace("[0, 2]}", "[0, 2], parameters: {weight: 1}}", 1),
        "merge.yml:5: slices.0.sources.1",
        "linear needs 'weight' for model 'b'",
    ),
    "weights of one slice sum to 0": (
        LINEAR + "    parameters: {weight: 0}\n",
        "merge.yml:4: slices.0",
        "the weights sum to 0 everywhere",
    ),
    "slices that are no list": ("merge_method: linear\nslices: 3\n", "merge.yml:2", "must be a list of {sources"),
    "a slice that is a name": ("merge_method: linear\nslices: [a]\n", "slices.0", "must be {sources, parameters}"),
    "sources that are no list": ("merge_method: linear\nslices: [{sources: a}]\n", "slices.0.sources", "must be a list"),
    "two adapters in a slice": (PASS.replace("model: a", "model: a+b+c"), "merge.yml:3", "names 2 adapters"),
    "modules that are no mapping": ("merge_method: linear\nmodules: [a]\n", "merge.yml:2", "must be a mapping"),
    "a module that is a list": ("merge_method: linear\nmodules: {x: [a]}\n", "modules.x", "must be {slices"),
    "an empty module": ("merge_method: linear\nmodules: {x: {}}\n", "modules.x", "unless 'slices' is given"),
    "both in a module": (
        MODULES.replace("    models: [", f"    slices: [{ONE}]\n    models: ["),
        "modules.decoder.slices",
        "both 'models' and 'slices' are there",
    ),
    "a misspelt parameter of a module": (MODULES.replace("weight: 0.25", "wieght: 1"), "merge.yml:7", "'weight'?"),
    "a base in a module": (
        MODULES.replace("  decoder:\n", "  decoder:\n    base_model: a\n"),
        "merge.yml:9: modules.decoder.base_model",
        "unknown key",
    ),
    "a name that is a path": ("name: ../x\n" + PASS, "merge.yml:1: name", "a name is a word"),
    "a name that is a number": ("name: 3\n" + PASS, "merge.yml:1: name", "got 3"),
    "a merge that nothing uses": (CHAIN.replace("model: blend", "model: ./c"), "merge.yml:1: name", "nothing uses"),
    "a name given twice": (CHAIN.replace("---\n", "---\nname: blend\n"), "merge.yml:6: name", "two merges are named"),
    "a merge of its own result": (
        CHAIN.replace("model: ./a}, {model: ./b", "model: ./a}, {model: blend"),
        "merge.yml:3: models.1.model",
        "'blend' needs its own result",
    ),
    "a circle": (
        CHAIN.replace("{model: ./a}, {model: ./b}]\nparameters: {weight: 0.5}", "{model: last}]\nparameters: {weight: 1}")
        .replace("---\n", "---\nname: last\n"),
        "merge.yml:3: models.0.model",
        "the merge 'last' needs its own result (last -> blend -> last)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused_with_its_line_and_what_to_do(load, mistake):
    text, where, phrase = REFUSED[mistake]
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert where in str(caught.value)
    assert phrase in str(caught.value)


KEYS = ["model", "parameters", "sources", "layer_range", "base_model", "slices", "models", "weight", "default"]
DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.sampled_from(["a", "b", "base"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
SOURCES = st.lists(
    st.fixed_dictionaries({"model": st.sampled_from("abc"), "layer_range": st.sampled_from([[0, 2], [1, 3], [0, 3]])}),
    min_size=1,
    max_size=3,
)
SLICES = st.lists(st.fixed_dictionaries({"sources": SOURCES | DATA}), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from([*METHODS]), SLICES | DATA, st.sampled_from([None, "a", "base"]))
def test_whatever_slices_hold_they_are_read_or_refused_and_never_a_crash(method, slices, base):
    parameters = {name: 0.5 for name in ("weight", "t") if name in METHODS[method].parameters}
    sound = {"merge_method": method, "base_model": base, "parameters": parameters}
    for form in ({"slices": slices}, {"modules": {"default": {"slices": slices}}}, {"modules": slices}):
        try:
            config = parse_config(sound | form)
        except RecipeError:
            event("refused")
            continue
        event("read")
        assert parse_config(config.to_mergekit()) == config
