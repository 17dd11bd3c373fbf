"""Which layer and which kind of module a tensor belongs to, read off its name: there is no table of architectures.

The one idea: checkpoints of any family use the same few words ("attn", "q_proj", "mlp", "norm", "embed"), so a name is cut
into its words and the words say the kind. What no word fits is "other"; a kind only groups numbers and changes no merge.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixmerge.merge.values import split_layer

KINDS = (
    "embedding",
    "attention q",
    "attention k",
    "attention v",
    "attention qkv",
    "attention o",
    "attention",
    "mlp",
    "router",
    "norm",
    "head",
    "other",
)

# The last words of attention's own matrices, without "proj", "weight" and the like.
_ATTENTION = {
    "attention q": {"q", "query", "wq"},
    "attention k": {"k", "key", "wk"},
    "attention v": {"v", "value", "wv"},
    "attention qkv": {"qkv", "wqkv", "c_attn", "query_key_value", "w_pack"},
    "attention o": {"o", "out", "wo", "c_proj", "dense"},
}
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|moe|^fc\d*$|^w[123]$|dense|intermediate|^(gate|up|down)(_up)?_proj$")
_EMBEDDING = re.compile(r"emb(ed|$)|^w[tp]e$|^shared$|^tok_|position")
_HEAD = re.compile(r"head$|^embed_out$|^score$|^classifier$|^output$")
_NORM = re.compile(r"norm|^ln_?\w?$|(^|_)ln(_|$)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: its stack of layers and its layer's index (none outside of layers), and its kind, one of KINDS."""

    stack: str | None
    layer: int | None
    kind: str


def place_of(tensor: str) -> Place:
    """The place of a tensor, by its name.

    A layer's index is the number that `split_layer` finds in the name; what stands before it is the stack.

    >>> place_of("model.layers.3.self_attn.q_proj.weight")
    Place(stack='model.layers', layer=3, kind='attention q')
    >>> place_of("transformer.ln_f.bias")
    Place(stack=None, layer=None, kind='norm')
    """
    found = split_layer(tensor)
    if found is None:
        return Place(None, None, _kind(tensor.lower().split("."), inside=False))
    stack, layer, rest = found
    return Place(stack, layer, _kind(rest.lower().split("."), inside=True))


def _kind(parts: list[str], *, inside: bool) -> str:
    """The kind that the words of a name say; `inside` a layer, where an "output" is no head."""
    words = [part for part in parts if part not in ("weight", "bias", "base_layer") and not part.isdecimal()]
    last = words[-1] if words else ""
    if any(_NORM.search(word) for word in words):
        return "norm"
    if any("attn" in word or "attention" in word for word in words):
        return _attention(last)
    if (inside and last == "gate") or "router" in words:
        return "router"
    if inside and any(_MLP.search(word) for word in words):
        return "mlp"
    if not inside and _HEAD.search(last):
        return "head"
    return "embedding" if any(_EMBEDDING.search(word) for word in words) else "other"


def _attention(last: str) -> str:
    """The matrix of attention that a last word names: whole ("query_key_value"), or by its first part ("q_a_proj")."""
    name = last.removesuffix("_proj")
    for word in (last, name, name.partition("_")[0]):
        for kind, names in _ATTENTION.items():
            if word in names:
                return kind
    return "attention"
