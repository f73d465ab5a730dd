"""A model's sizes beside its experts: attention, dense layers, vocabulary, as public configs say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reference.families.values import resolve
from reference.scalars import whole

NAMES = {  # sizes in public configs, as `reference.families.values` reads them
    "num_layers": "$num_hidden_layers|n_layers|num_layers",
    "hidden": "$hidden_size|d_model",
    "num_heads": "$num_attention_heads|n_heads",
    "num_kv_heads": "$num_key_value_heads|attn_config.kv_n_heads|num_attention_heads|n_heads",
    "head_dim": "$head_dim|0",
    "v_dim": "$v_head_dim|0",
    "q_lora_rank": "$q_lora_rank|0",
    "kv_lora_rank": "$kv_lora_rank|0",
    "nope_dim": "$qk_nope_head_dim|0",
    "rope_dim": "$qk_rope_head_dim|0",
    "vocab": "$vocab_size",
    "dense_ffn": "$intermediate_size_mlp|intermediate_size|0",
}
OTHER_ATTENTION = (  # keys of configs whose layers are not all attention as it is here
    *("attn_layer_period", "attn_type_list", "hybrid_override_pattern", "linear_attn_config", "linear_num_value_heads"),
    *("mamba_d_state", "ssm_cfg", "index_topk", "layers_block_type"),
)
WINDOWS = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model beside its experts.

    Args:
        windows: of each layer, the most tokens of context that it looks at; None: all.
        dense: of each layer, whether it has a dense feed-forward in place of experts.
        tied: the head is the embedding.
    """

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    vocab: int
    dense_ffn: int
    windows: tuple[int | None, ...]
    dense: tuple[bool, ...]
    tied: bool

    @property
    def projection_weights(self) -> int:
        """Of one layer's attention."""
        hidden, heads = self.hidden, self.num_heads
        if not self.kv_lora_rank:
            return hidden * (heads + self.num_kv_heads) * (self.head_dim + self.v_dim)
        query = self.nope_dim + self.rope_dim
        down = hidden * (self.q_lora_rank + self.kv_lora_rank + self.rope_dim)
        queries = (self.q_lora_rank or hidden) * heads * query
        return down + queries + heads * (self.kv_lora_rank * (self.nope_dim + self.v_dim) + self.v_dim * hidden)

    @property
    def key_and_value(self) -> int:
        """Length of a key and a value of one head, as attention multiplies them."""
        return 2 * self.kv_lora_rank + self.rope_dim if self.kv_lora_rank else self.head_dim + self.v_dim

    @property
    def cached(self) -> int:
        """Elements that one layer keeps of a token."""
        if self.kv_lora_rank:
            return self.kv_lora_rank + self.rope_dim
        return self.num_kv_heads * (self.head_dim + self.v_dim)


def read_shape(model: Mapping[str, Any], num_layers: int | None = None) -> Shape:
    """The shape of a model's first `num_layers`, or all, from what its config.json says of the language model.

    Raises:
        TypeError, ValueError: naming what the config lacks, what kind of layers it has that are not modelled, or the
            number of layers that it has.
    """
    other = [key for key in OTHER_ATTENTION if model.get(key) is not None]
    if other:
        raise ValueError(f"the model has layers that are no plain attention, by {', '.join(other)} of its config")
    sizes = {name: _size(name, text, model) for name, text in NAMES.items()}
    there = sizes.pop("num_layers")
    number = there if num_layers is None else num_layers
    if not 1 <= number <= there:
        raise ValueError(f"layers must be in [1, {there}], the layers of the model, got {number}")
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden"] // sizes["num_heads"]
    sizes["v_dim"] = sizes["v_dim"] or sizes["head_dim"]
    return Shape(
        **sizes,
        windows=tuple(_window(model, layer) for layer in range(number)),
        dense=tuple(_is_dense(model, layer) for layer in range(number)),
        tied=bool(model.get("tie_word_embeddings", False)),
    )


def _size(name: str, text: str, model: Mapping[str, Any]) -> int:
    try:
        return whole(name, resolve(text, model))
    except KeyError as error:
        raise ValueError(f"the model's config must have {error.args[0]}") from None


def _window(model: Mapping[str, Any], layer: int) -> int | None:
    kinds = model.get("layer_types")
    kind = kinds[layer] if kinds else "full_attention"
    if kind not in WINDOWS:
        raise ValueError(f"layer_types must be of {', '.join(WINDOWS)}, got {kind!r} for layer {layer}")
    key = WINDOWS[kind]
    return None if key is None else whole(key, model.get(key))


def _is_dense(model: Mapping[str, Any], layer: int) -> bool:
    """By the names of DeepSeek, Qwen and Llama 4."""
    every = model.get("moe_layer_freq", 1)
    step = model.get("decoder_sparse_step", model.get("interleave_moe_layer_step", 1))
    skipped = not every[layer] if isinstance(every, list) else layer % every != 0
    first = layer < model.get("first_k_dense_replace", 0) or layer in (model.get("mlp_only_layers") or ())
    return bool(skipped or first or (layer + 1) % step != 0)
