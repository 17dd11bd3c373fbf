"""mergekit's YAML in and out, and every mistake in it refused where it stands."""

import re
import textwrap

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mixmerge.errors import RecipeError
from mixmerge.merge import METHODS, load_config, parse_config
from mixmerge.merge.card import to_yaml
from mixmerge.merge.values import layer_depths

# the example of mergekit's own README: gradients, a filter, a flag without effect
PUBLISHED = """\
models:
  - model: org/orca
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/platypus
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: org/wizard
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/llama
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: 1
  - model: b
    parameters:
      weight: 1
"""

SLERP = """\
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t: 0.5
"""

VOCABULARY = """\
merge_method: linear
models:
  - model: a+lora
  - model: b@main+org/lora@v2
parameters:
  weight: 0.5
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: a+lora, force: true}
    <|im_end|>: {source: {kind: zero}}
    <x>: {source: {kind: model_token, model: c, token: y}}
    <z>: {source: {kind: model_token, model: c, token_id: 0}}
  pad_to_multiple_of: 64
chat_template: chatml
"""
LINEAR = """\
merge_method: linear
models:
  - model: a
  - model: b
parameters:
  weight: 0.5
"""


@pytest.fixture
def load(tmp_path):
    def loader(text):
        path = tmp_path / "merge.yml"
        path.write_text(textwrap.dedent(text))
        return load_config(path)

    return loader


def test_a_published_mergekit_configuration_means_what_it_means_there(load):
    config = load(PUBLISHED)
    first, middle, last = (config.whole.at("model.layers.0.mlp.up_proj.weight", 10, depth) for depth in (0.0, 0.5, 1.0))
    assert first.each("weight") == [1.0, 0.0, 0.5]
    assert middle.each("weight") == pytest.approx([1.0, 0.5, 0.5])
    assert last.each("weight") == [1.0, 1.0, 0.5]
    assert middle.each("density") == [0.7, 0.5, 0.33]
    assert config.whole.at("lm_head.weight", 10).each("weight") == [1.0, 0.0, 0.0]
    assert first["normalize"] is True
    assert config.stored_dtype == "F16"


def test_int8_mask_is_accepted_and_said_to_have_no_effect(load):
    assert load(PUBLISHED).notes == ("int8_mask has no numeric effect here: it is accepted and ignored",)
    assert load(TIES).notes == ()


@pytest.mark.parametrize("text", [PUBLISHED, TIES, SLERP, LINEAR, SLERP + "seed: 7\nout_dtype: bfloat16\n", VOCABULARY])
def test_a_configuration_written_out_reads_back_as_the_same_merge(load, text):
    config = load(text)
    assert parse_config(config.to_mergekit()) == config
    assert load(to_yaml(config)) == config


def test_a_models_own_parameter_goes_before_the_top_level_and_that_before_the_default(load):
    config = load(TIES + "parameters: {density: 0.4, lambda: 2}\n")
    assert config.whole.at("w", 1).each("density") == [0.4, 0.4]
    assert config.whole.at("w", 1)["lambda"] == 2
    assert load(TIES).whole.at("w", 1).each("density") == [1.0, 1.0]
    own = load(TIES.replace("weight: 1\n  -", "weight: 1\n      density: 0.2\n  -") + "parameters: {density: 0.4}\n")
    assert own.whole.at("w", 1).each("density") == [0.2, 0.4]


def test_a_filter_that_does_not_match_falls_through_to_the_next_level(load):
    config = load(SLERP.replace("t: 0.5", "t: [{filter: attn, value: [0, 1]}, {filter: '*', value: 0.3}]"))
    assert config.whole.at("layers.1.attn.w", 1, 0.25)["t"] == 0.25
    assert config.whole.at("layers.1.mlp.w", 1, 0.25)["t"] == 0.3
    some = load(TIES + "parameters:\n  density:\n    - {filter: attn, value: 0.1}\n")
    assert some.whole.at("attn.w", 1).each("density") == [0.1, 0.1]
    assert some.whole.at("mlp.w", 1).each("density") == [1.0, 1.0]


def test_a_required_parameter_that_covers_no_value_for_a_tensor_is_refused_there(load):
    config = load(SLERP.replace("t: 0.5", "t: [{filter: attn, value: 0.5}]"))
    with pytest.raises(RecipeError, match=r"merge.yml:4: parameters: slerp needs 't', and no value .* 'mlp.w'"):
        config.whole.at("mlp.w", 1)


def test_layer_positions_come_from_the_names_and_everything_else_takes_the_first_element():
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(5) for j in range(2)]
    names += ["vision.blocks.0.w", "vision.blocks.1.w", "only.0.w"]
    depths = layer_depths(names)
    assert [depths[f"model.layers.{i}.mlp.experts.1.w"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [depths[name] for name in ("lm_head.weight", "vision.blocks.1.w", "only.0.w")] == [0, 1, 0]


def test_a_base_of_linear_is_an_input_like_the_others_and_comes_last():
    raw = {"merge_method": "linear", "models": [{"model": "a"}], "base_model": "z", "parameters": {"weight": 1}}
    config = parse_config(raw)
    assert [entry.model for entry in config.whole.inputs] == ["a", "z"]
    assert config.donor == "z"


def test_a_base_that_is_listed_is_not_its_own_task_vector():
    raw = {"merge_method": "ties", "models": [{"model": "z"}, {"model": "a"}], "base_model": "z"}
    assert [entry.model for entry in parse_config(raw | {"parameters": {"weight": 1}}).whole.inputs] == ["a"]


def test_all_weights_zero_at_a_filtered_tensor_leave_the_base_there(load):
    config = load(TIES.replace("weight: 1", "weight: [{filter: embed, value: 0}, {value: 1}]"))
    assert config.whole.at("embed.weight", 1).each("weight") == [0, 0]


REFUSED = {
    "unknown method": (
        TIES.replace("ties", "tiess"),
        "merge.yml:1: merge_method",
        "did you mean 'ties'? (known: linear",
    ),
    "far-off method": (
        TIES.replace("ties", "frankenmerge"),
        "merge.yml:1",
        "known: arcee_fusion, breadcrumbs, breadcrumbs_ties",
    ),
    "no method": ("models: [{model: a}]", "merge.yml", "'merge_method' is missing"),
    "unknown key": (TIES + "dtpye: float16\n", "merge.yml:10: dtpye", "did you mean 'dtype'?"),
    "misspelt parameter": (
        TIES.replace("weight: 1\n  -", "weight: 1\n      densty: 0.5\n  -"),
        "merge.yml:7: models.0.parameters.densty",
        "did you mean 'density'?",
    ),
    "misspelt top-level parameter": (
        TIES + "parameters: {normalise: true}\n",
        "merge.yml:10",
        "did you mean 'normalize'?",
    ),
    "other method's parameter": (LINEAR + "  density: 0.5\n", "merge.yml:7", "a parameter of ties, dare_ties"),
    "shared parameter under a model": (
        SLERP.replace("{model: b}", "{model: b, parameters: {t: 0.2}}"),
        "merge.yml:3: models.1.parameters.t",
        "move it to the top-level parameters",
    ),
    "parameter beside the model": (
        TIES.replace("    parameters:\n      weight: 1\n  - model: b", "    weight: 1\n  - model: b"),
        "merge.yml:5: models.0.weight",
        "write it under models.0.parameters",
    ),
    "parameter under the base": (
        TIES.replace("  - model: a\n", "  - model: base\n    parameters: {weight: 1}\n  - model: a\n"),
        "merge.yml:5",
        "'weight' does nothing under the base model",
    ),
    "density in percent": (
        TIES + "parameters: {density: 50}\n",
        "merge.yml:10: parameters.density",
        "did you mean 0.5?",
    ),
    "t above 1": (SLERP.replace("0.5", "2"), "merge.yml:5: parameters.t", "must lie between 0 and 1, got 2"),
    "gradient out of range": (SLERP.replace("0.5", "[0, 0.5, 1.5]"), "merge.yml:5: parameters.t.2", "between 0 and 1"),
    "filtered value out of range": (SLERP.replace("0.5", "[{value: -1}]"), "parameters.t.0.value", "between 0 and 1"),
    "infinite weight": (LINEAR.replace("0.5", ".inf"), "merge.yml:6", "must be a finite number"),
    "text for a number": (LINEAR.replace("0.5", "'0.5'"), "merge.yml:6", "must be a finite number, got '0.5'"),
    "flag for a number": (LINEAR.replace("0.5", "true"), "merge.yml:6", "must be a finite number, got True"),
    "number for a flag": (LINEAR + "  normalize: 1\n", "merge.yml:7", "must be true or false, got 1"),
    "gradient of flags": (LINEAR + "  normalize: [true, false]\n", "merge.yml:7", "cannot be a gradient"),
    "empty gradient": (LINEAR.replace("0.5", "[]"), "merge.yml:6", "an empty list"),
    "filter entry without value": (LINEAR.replace("0.5", "[{filter: mlp}]"), "merge.yml:6", "must be {filter, value}"),
    "filter that is no text": (
        LINEAR.replace("0.5", "[{filter: 3, value: 1}]"),
        "merge.yml:6",
        "a part of tensor names",
    ),
    "entry after the catch-all": (
        LINEAR.replace("0.5", "[{value: 1}, {filter: mlp, value: 0.5}]"),
        "merge.yml:6: parameters.weight.1",
        "never reached",
    ),
    "parameters that are no mapping": (LINEAR.replace("\n  weight: 0.5", " 3"), "merge.yml:5", "must be a mapping"),
    "missing weight": (
        LINEAR.replace("  weight: 0.5", "  normalize: true"),
        "merge.yml:3: models.0",
        "linear needs 'weight' for model 'a'",
    ),
    "missing t": (SLERP.replace("parameters:\n  t: 0.5", ""), "merge.yml:1", "slerp needs 't'"),
    "missing base": (TIES.replace("base_model: base\n", ""), "merge.yml:1", "ties needs a 'base_model'"),
    "weights that sum to 0": (
        TIES.replace("weight: 1\n  -", "weight: -1\n  -").replace("ties", "task_arithmetic")
        + "parameters: {normalize: true}\n",
        "merge.yml:3: models",
        "the weights sum to 0 everywhere, so they cannot be normalised",
    ),
    "weights 0 in all models": (LINEAR.replace("0.5", "0"), "merge.yml:2", "sum to 0"),
    "third model for slerp": (
        SLERP.replace("{model: b}", "{model: b}, {model: c}"),
        "merge.yml:3",
        "exactly 1 model(s) besides the base, got 2",
    ),
    "only the base": (
        TIES.replace("base_model: base", "base_model: a")
        .split("  - model: b")[0]
        .replace("\n    parameters:\n      weight: 1", ""),
        "merge.yml:3",
        "at least 1 model(s) besides the base, got 0",
    ),
    "no models": ("merge_method: linear\n", "merge.yml", "'models' must be a list"),
    "empty models": ("merge_method: linear\nmodels: []\n", "merge.yml:2", "'models' must be a list"),
    "model given twice": (LINEAR.replace("model: b", "model: a"), "merge.yml:4", "'a' is listed twice"),
    "entry that is a name": (
        "merge_method: linear\nmodels: [a]\n",
        "merge.yml:2: models.0",
        "must be {model, parameters}",
    ),
    "model that is no text": (
        LINEAR.replace("model: b", "model: [b]"),
        "merge.yml:4: models.1.model",
        "a folder or a Hub id",
    ),
    "two adapters": (LINEAR.replace("model: b", "model: org/b+org/lora+org/other"), "merge.yml:4", "names 2 adapters"),
    "slices beside models": (LINEAR + "slices: []\n", "merge.yml:7: slices", "both 'models' and 'slices' are there"),
    "modules beside models": (LINEAR + "modules: {}\n", "merge.yml:7: modules", "give one of them"),
    "tokenizer twice": (
        LINEAR + "tokenizer_source: union\ntokenizer: {source: union}\n",
        "merge.yml:7",
        "both 'tokenizer' and 'tokenizer_source'",
    ),
    "base tokenizer without base": (LINEAR + "tokenizer_source: base\n", "merge.yml:7", "there is no base_model"),
    "tokenizer": (LINEAR + "tokenizer: {source: base}\n", "merge.yml:7", "there is no base_model"),
    "chat template": (LINEAR + "chat_template: autto\n", "merge.yml:7", "did you mean 'auto'?"),
    "padding at the top": (LINEAR + "pad_to_multiple_of: 8\n", "merge.yml:7", "write it into the tokenizer block"),
    "tokenizer that is no mapping": (
        LINEAR + "tokenizer: union\n",
        "merge.yml:7: tokenizer",
        "or write tokenizer_source",
    ),
    "tokenizer without source": (LINEAR + "tokenizer: {tokens: {}}\n", "merge.yml:7: tokenizer", "'source' is missing"),
    "tokenizer key": (LINEAR + "tokenizer: {source: union, tokns: {}}\n", "tokenizer.tokns", "did you mean 'tokens'?"),
    "padding to nothing": (
        LINEAR + "tokenizer:\n  source: union\n  pad_to_multiple_of: 0\n",
        "merge.yml:9: tokenizer.pad_to_multiple_of",
        "from 1 to 65,536, got 0",
    ),
    "tokens in a list": (LINEAR + "tokenizer: {source: union, tokens: [x]}\n", "tokenizer.tokens", "must be a mapping"),
    "token without source": (LINEAR + "tokenizer: {source: union, tokens: {x: {}}}\n", "tokenizer.tokens.x", "must be"),
    "token key": (
        LINEAR + "tokenizer: {source: union, tokens: {x: {source: a, forse: true}}}\n",
        "tokenizer.tokens.x.forse",
        "did you mean 'force'?",
    ),
    "force that is a text": (
        LINEAR + "tokenizer: {source: union, tokens: {x: {source: a, force: 'yes'}}}\n",
        "tokenizer.tokens.x.force",
        "true or false",
    ),
    "kind of source": (
        LINEAR + "tokenizer: {source: union, tokens: {x: {source: {kind: zeros}}}}\n",
        "tokenizer.tokens.x.source",
        "did you mean 'zero'?",
    ),
    "key of a source": (
        LINEAR + "tokenizer: {source: union, tokens: {x: {source: {kind: zero, token: y}}}}\n",
        "tokenizer.tokens.x.source.token",
        "unknown key 'token'",
    ),
    "model_token without token": (
        LINEAR + "tokenizer: {source: union, tokens: {x: {source: {kind: model_token, model: a}}}}\n",
        "tokenizer.tokens.x.source",
        "one of 'token' and 'token_id'",
    ),
    "model_token of a negative number": (
        LINEAR + "tokenizer: {source: union, tokens: {x: {source: {kind: model_token, model: a, token_id: -1}}}}\n",
        "tokenizer.tokens.x.source.token_id",
        "at least 0, got -1",
    ),
    "unknown dtype": (LINEAR + "dtype: bf16\n", "merge.yml:7: dtype", "did you mean 'bfloat16'?"),
    "unknown out_dtype": (LINEAR + "out_dtype: float8\n", "merge.yml:7: out_dtype", "known: float32, float16"),
    "negative seed": (LINEAR + "seed: -1\n", "merge.yml:7: seed", "at least 0, got -1"),
    "seed that is a flag": (LINEAR + "seed: true\n", "merge.yml:7: seed", "whole number"),
    "several documents": (LINEAR + "---\n" + LINEAR, "merge.yml:1", "document 1 of 2 has no name"),
    "an empty file": ("", "merge.yml", "there is no merge in this file"),
    "broken YAML": ("models: [", "merge.yml:", ""),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused_with_its_line_and_what_to_do(load, mistake):
    text, where, phrase = REFUSED[mistake]
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert where in str(caught.value)
    assert phrase in str(caught.value)


def test_a_configuration_without_a_file_still_says_where(tmp_path):
    with pytest.raises(RecipeError, match=r"merge configuration: models\.0\.parameters\.t"):
        parse_config({"merge_method": "slerp", "base_model": "a", "models": [{"model": "b", "parameters": {"t": 1}}]})


def test_tokenizer_source_base_is_accepted_where_there_is_a_base(load):
    assert load(SLERP + "tokenizer_source: base\n").tokenizer_source == "base"


def test_a_folder_whose_name_has_a_plus_is_a_folder(load, tmp_path):
    (tmp_path / "a+b").mkdir()
    assert load(LINEAR.replace("model: b", "model: a+b")).models[1].model == "a+b"


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_every_method_has_a_default_within_its_range_or_is_required(name):
    for parameter in METHODS[name].parameters.values():
        assert parameter.default is None or parameter.low <= parameter.default <= parameter.high


NAMES = ["merge_method", "models", "base_model", "parameters", "dtype", "seed", "tokenizer_source", "slices", "x"]
LEAVES = (
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.sampled_from(["a", "b", *METHODS])
)
DATA = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "parameters", "weight", "t", "density", "filter", "value"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from([*METHODS]), st.dictionaries(st.sampled_from(NAMES), DATA, max_size=4), DATA)
def test_whatever_a_configuration_holds_it_is_read_or_refused_and_never_a_crash(method, raw, weight):
    sound = {"merge_method": method, "models": [{"model": "a"}], "base_model": "b", "parameters": {"weight": weight}}
    for mapping in (raw, sound, sound | raw):
        try:
            config = parse_config(mapping)
        except RecipeError:
            event("refused")
            continue
        event("read")
        assert parse_config(config.to_mergekit()) == config


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_ends_and_passes_through_each_of_its_points(points, depth):
    config = parse_config(
        {"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": points, "normalize": False}}
    )

    def weight(place):
        return config.whole.at("w", 1, place).each("weight")[0]

    assert min(points) - 1e-9 <= weight(depth) <= max(points) + 1e-9
    last = max(1, len(points) - 1)
    assert [weight(i / last) for i in range(len(points))] == pytest.approx(points)


def test_the_layer_of_a_model_of_one_layer_lies_at_the_end():
    depths = layer_depths(["embed.weight", "model.layers.0.w", "norm.weight"])
    assert depths == {"embed.weight": 0.0, "model.layers.0.w": 1.0, "norm.weight": 0.0}


def test_a_number_that_begins_a_name_is_no_layer_where_there_is_another():
    depths = layer_depths(["0.encoder.layer.0.w", "0.encoder.layer.2.w", "0.norm.weight", "1.dense.weight"])
    assert depths == {
        "0.encoder.layer.0.w": 0.0,
        "0.encoder.layer.2.w": 1.0,
        "0.norm.weight": 0.0,
        "1.dense.weight": 1.0,
    }


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ({"model": {"path": "m/a"}}, "m/a"),
        ({"model": {"path": "m/a", "revision": "v1"}, "lora": None}, "m/a@v1"),
        ({"model": "m/a", "lora": {"path": "l", "revision": "v2"}}, "m/a+l@v2"),
    ],
)
def test_a_model_may_be_the_mapping_that_mergekit_writes(reference, name):
    raw = {"merge_method": "linear", "models": [{"model": reference}, {"model": "b"}], "parameters": {"weight": 1}}
    assert parse_config(raw).references == (name, "b")


@pytest.mark.parametrize(
    ("reference", "what"),
    [
        ({"model": {"pth": "a"}}, "models.0.model.model: must be {path: .., revision: ..}, got {'pth': 'a'}"),
        ({"model": {"path": "a", "revison": "x"}}, "unknown key 'revison'; did you mean 'revision'"),
        ({"lora": {"path": "a"}}, "a model is {model: {path: ..}}, or its name"),
        ({"modle": "a"}, "unknown key 'modle'; did you mean 'model'"),
        ({"model": {"path": ""}}, "a model is a folder or a Hub id, got ''"),
    ],
)
def test_a_mapping_that_is_no_model_is_refused(reference, what):
    raw = {"merge_method": "linear", "models": [{"model": reference}, {"model": "b"}], "parameters": {"weight": 1}}
    with pytest.raises(RecipeError, match=re.escape(what)):
        parse_config(raw)


@pytest.mark.parametrize(("given", "meant"), [(1.0, "true"), (0, "false"), ("yes", "true")])
def test_a_flag_in_another_spelling_is_told_the_right_one(given, meant):
    raw = {"merge_method": "linear", "models": [{"model": "b"}], "parameters": {"weight": 1, "normalize": given}}
    with pytest.raises(RecipeError, match=f"'normalize' must be true or false, got .*; write {meant}"):
        parse_config(raw)
