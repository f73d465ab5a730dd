"""Public blocks, tiny and with odd sizes, built from their own code and run: needs torch and transformers."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from golden.tensors import VOCAB, state, tokens
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reference.families import Family

NUM_TOKENS, EXPERTS = 13, 8
SCALE = 1.75
# What models call the same thing; a config takes those names that it has.
WORDS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 21),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "d_ff"), 11),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 3),
    **dict.fromkeys(("n_group", "num_expert_group"), 4),
    **dict.fromkeys(("norm_topk_prob", "moe_renormalize"), True),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), SCALE),
    **dict.fromkeys(("moe_router_scaling_factor", "moe_routed_scaling_factor"), SCALE),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 2),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 7),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 7),
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "swiglu_limit": 0.75,
    "mlp_gate_softcap": 1.5,
    "mlp_up_softcap": 1.25,
    "moe_router_logit_softcapping": 1.5,
    "output_multiplier": 1.25,
    "moe_norm_min": 0.75,
    "router_jitter_noise": 0.3,
    "zero_expert_num": 4,
    "router_hidden_size": 10,
    "moe_hidden_size": 18,
    "shared_expert_combination_strategy": "sum",
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "expert_capacity": 64,
}
OWN: dict[str, dict[str, Any]] = {
    "dbrx": {"ffn_config": {"ffn_hidden_size": 11, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 21,
                            "moe_normalize_expert_weights": 2.0}},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [11, 5]},
    "step3p7": {"swiglu_limits": [0.0, 0.5], "swiglu_limits_shared": [0.0, 0.25]},
    "deepseek_v4_hash": {"mlp_layer_types": ["moe", "hash_moe"], "vocab_size": VOCAB},
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "nemotron_h_latent": {"moe_latent_size": 12},
    "llama4": {"num_experts_per_tok": 2},
    "phimoe": {"num_experts_per_tok": 2},
    "qwen3_omni_moe_talker": {"shared_expert_intermediate_size": 7},
    "granitemoehybrid": {"mamba_n_heads": 6, "mamba_d_head": 7},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_ocr2": {"hidden_size": 22, "num_attention_heads": 11, "num_key_value_heads": 11},
    "unlimited_ocr": {"hidden_size": 22, "num_attention_heads": 11, "num_key_value_heads": 11},
}  # fmt: skip
LAYER = 1  # of the model, where a block asks for it
PARTS = {"gemma4": "Gemma4Text", "diffusion_gemma": "DiffusionGemmaText"}  # router and experts are no block's


@dataclass
class Run:
    """What a block made of its tokens.

    Args:
        x: `[num_tokens, hidden]`, what the experts get.
        logits: `[num_tokens, num_choices]`, where the router is no matrix on x; else None.
        topk_idx, topk_weights: as the experts get them, with a scale that the block has after them.
        y: of the layer: of the block, without what is outside.
    """

    x: np.ndarray
    logits: np.ndarray | None
    topk_idx: np.ndarray
    topk_weights: np.ndarray
    y: np.ndarray


class Block:
    """One public block.

    Args:
        options: of the model's config, beside WORDS and OWN.
    """

    def __init__(self, family: Family, options: dict[str, Any]) -> None:
        self.family, self.name = family, family.name
        self.config = make_config(family, options)
        module, cls = family.block.split(".")
        code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        torch.manual_seed(0)
        if self.name in PARTS:
            names = {part: PARTS[self.name] + part.title() for part in ("router", "experts")}
            parts = {part: getattr(code, name)(self.config) for part, name in names.items()}
            self.module: torch.nn.Module = torch.nn.ModuleDict(parts)
        else:
            make = getattr(code, cls)
            place = {"layer_idx": LAYER} if "layer_idx" in inspect.signature(make).parameters else {}
            self.module = make(self.config, **place)
        self.module.eval()
        self.shapes = {name: list(value.shape) for name, value in self.module.state_dict().items()}

    @property
    def model(self) -> dict[str, Any]:
        """The model's config, as far as the family's file speaks of it."""
        path = Path(importlib.import_module("reference.families").__file__).parent / f"{self.name}.toml"
        words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        return {key: value for key, value in self.config.to_dict().items() if key in words}

    def run(self, dtype: str, salt: str = "") -> Run:
        """In float64 or float32."""
        arrays = state(self.shapes, EXPERTS, salt)
        self.module.to(getattr(torch, dtype))
        with torch.no_grad():
            for name, value in self.module.state_dict().items():
                value.copy_(torch.from_numpy(arrays[name]))
            return _run(self, torch.from_numpy(tokens(NUM_TOKENS, self.config.hidden_size)).to(getattr(torch, dtype)))


def make_config(family: Family, options: dict[str, Any]) -> Any:
    """The model's config with WORDS, as far as it has such names."""
    kind = CONFIG_MAPPING[family.model_type]
    there, mapped = kind().to_dict(), getattr(kind, "attribute_map", {})
    words = {key: value for key, value in WORDS.items() if key in there and key not in mapped}
    if "moe_intermediate_size" not in there:
        words |= {key: 11 for key in ("intermediate_size",) if key in there}
    config = kind(**(words | OWN.get(family.name, {}) | options))
    config._experts_implementation = "eager"
    return config


class _Seen:
    """Arguments of a module's last call, by a hook."""

    def __init__(self, module: torch.nn.Module, output: bool = False) -> None:
        self.args: tuple[Any, ...] = ()
        if output:
            module.register_forward_hook(lambda _, __, value: setattr(self, "args", (value,)))
        else:
            module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = (*args, *kwargs.values())


def _array(value: Any) -> np.ndarray:
    array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    return array.reshape(-1, array.shape[-1]).copy()


def _run(block: Block, x: torch.Tensor) -> Run:
    module, name = block.module, block.name
    if name in PARTS:
        return _run_parts(module, x)
    if name.startswith("inkling2"):
        module.gate.float()  # its float32 rows and a float64 matrix would not go together
    experts = _Seen(getattr(getattr(module, "text_moe", module), "experts", module))
    normed = _Seen(module.post_mlp_layernorm) if name == "axk1" else None
    inner = _Seen(module.experts, output=True) if name in ("muse_spark", "nemotron_h_latent") else None
    scores = _Seen(module.gate.router_mlp, output=True) if name == "zaya" else None
    more = {"input_ids": torch.arange(NUM_TOKENS)[None] * 3} if name == "deepseek_v4_hash" else {}
    more |= {"moe_mm_token_type_ids": None} if name == "ernie4_5_vl_moe" else {}
    y = module(x[None], **more)
    y = y[0] if isinstance(y, tuple) else y
    rows, idx, factors = _routing(block, x, experts.args)
    if normed:
        y = normed.args[0]
    if name == "jetmoe":
        y = y - module.bias
    if inner:
        y = inner.args[0]
    logits = scores.args[0] if scores else x @ module.gate.weight.to(x.dtype).T if inner else None
    return Run(_array(rows), None if logits is None else _array(logits), idx, factors, _array(y))


def _routing(block: Block, x: torch.Tensor, args: tuple[Any, ...]) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """What the experts got, in one form for all blocks."""
    module, name, config = block.module, block.name, block.config
    if name == "llama4":
        scores, logits = module.router(x)
        idx = torch.topk(logits, config.num_experts_per_tok, dim=1).indices
        return x, _array(idx), _array(scores.gather(1, idx))
    if name == "jetmoe":
        top, idx = (x @ module.router.layer.weight.T).topk(config.num_experts_per_tok, dim=1)
        return x, _array(idx), _array(torch.softmax(top, dim=1))
    rows, idx, factors = args[:3]
    if name == "switch_transformers":
        return rows, _array(idx.argmax(dim=-1)), _array(factors)
    after = {"beam": SCALE, "laguna": SCALE, "step3p7": SCALE, "minimax_m3_vl": SCALE, "openai_privacy_filter": 3}
    topk_idx = _array(idx)
    if name == "zaya":
        topk_idx = np.where(_array(factors) == 0, EXPERTS, topk_idx)  # the choice that nothing is computed for
    return rows, topk_idx, _array(factors) * after.get(name, 1)


def _run_parts(module: Any, x: torch.Tensor) -> Run:
    """gemma: the router sees other rows than the experts."""
    scores = _Seen(module["router"].proj, output=True)
    rows = torch.from_numpy(tokens(NUM_TOKENS, x.shape[1], "rows")).to(x.dtype)
    _, factors, idx = module["router"](x)
    y = module["experts"](rows, idx, factors)
    return Run(_array(rows), _array(scores.args[0]), _array(idx), _array(factors), _array(y))


VERSION = transformers.__version__
