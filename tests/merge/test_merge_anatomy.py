"""Layer and kind of a tensor from its name alone, over the names that real families use."""

import pytest

from mixmerge.merge.anatomy import KINDS, Place, place_of

NAMES = {
    "attention q": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_a_proj.weight",  # DeepSeek
        "encoder.block.0.layer.0.SelfAttention.q.weight",  # T5
        "bert.encoder.layer.0.attention.self.query.weight",
        "layers.0.attention.wq.weight",
    ],
    "attention k": ["model.layers.0.self_attn.k_proj.weight", "decoder.block.0.layer.1.EncDecAttention.k.weight"],
    "attention v": ["model.layers.0.self_attn.v_proj.weight", "bert.encoder.layer.0.attention.self.value.weight"],
    "attention qkv": [
        "transformer.h.1.attn.c_attn.bias",
        "h.1.attn.c_attn.weight",
        "gpt_neox.layers.2.attention.query_key_value.weight",
        "transformer.h.0.self_attention.query_key_value.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
    ],
    "attention o": [
        "model.layers.0.self_attn.o_proj.weight",
        "model.decoder.layers.0.self_attn.out_proj.weight",
        "transformer.h.1.attn.c_proj.weight",
        "gpt_neox.layers.2.attention.dense.weight",
        "bert.encoder.layer.0.attention.output.dense.weight",
    ],
    "attention": [
        "model.layers.0.self_attn.kv_b_proj.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "model.layers.0.self_attn.sinks",
    ],
    "mlp": [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.mlp.experts.7.down_proj.weight",
        "model.layers.0.block_sparse_moe.experts.3.w2.weight",
        "transformer.h.1.mlp.c_proj.weight",
        "gpt_neox.layers.2.mlp.dense_h_to_4h.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "model.decoder.layers.0.fc1.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "layers.0.feed_forward.w1.weight",
    ],
    "router": [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.router.weight",
    ],
    "norm": [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "transformer.ln_f.bias",
        "transformer.h.1.ln_1.weight",
        "bert.embeddings.LayerNorm.weight",
        "encoder.block.0.layer.0.layer_norm.weight",
    ],
    "embedding": [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "wpe.weight",
        "shared.weight",
        "gpt_neox.embed_in.weight",
        "bert.embeddings.word_embeddings.weight",
        "model.decoder.embed_positions.weight",
        "tok_embeddings.weight",
    ],
    "head": ["lm_head.weight", "embed_out.weight", "score.weight", "output.weight"],
    "other": ["w", "multi_modal_projector.linear_1.weight", "model.layers.0.mixer.in_proj.weight"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_the_words_of_a_name_say_its_kind(kind, name):
    assert place_of(name).kind == kind


def test_every_kind_has_a_name_here_and_no_other_kind_is_given():
    assert set(NAMES) == set(KINDS)


@pytest.mark.parametrize(
    ("name", "stack", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers", 3),
        ("h.11.mlp.c_fc.weight", "h", 11),
        ("decoder.block.5.layer.1.EncDecAttention.o.weight", "decoder.block", 5),
        ("model.layers.2.mlp.experts.7.down_proj.weight", "model.layers", 2),
        ("0.encoder.layer.3.attention.self.query.weight", "0.encoder.layer", 3),
        ("lm_head.weight", None, None),
        ("encoder.final_layer_norm.weight", None, None),
    ],
)
def test_the_first_number_of_a_name_is_its_layer_and_what_stands_before_it_the_stack(name, stack, layer):
    place = place_of(name)
    assert (place.stack, place.layer) == (stack, layer)


@pytest.mark.parametrize("name", ["", ".", "0", "3.weight", "a.1", "weight"])
def test_any_name_has_a_place(name):
    place = place_of(name)
    assert isinstance(place, Place)
    assert place.kind in KINDS


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_nothing_of_a_real_model_is_other(architecture, tiny_models):
    from model_folders import read_model

    names = read_model(tiny_models(architecture)[0])
    assert "other" not in {place_of(name).kind for name in names}
