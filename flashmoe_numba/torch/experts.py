"""`register`: experts_implementation="flashmoe" of transformers.

Families whose experts are decorated with transformers' `use_experts_implementation` ask it for a function by name; the
model's own router stays. The other families ignore the name without a word: see blocks.py.
"""

from __future__ import annotations

from typing import Any

import torch

from .description import describe
from .operator import moe_layer
from .ownership import operands

NAME = "flashmoe"
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "Identity": "identity",
    "LinearActivation": "identity",
}


def register(name: str = NAME) -> None:
    """Let transformers find the layer: `from_pretrained(..., experts_implementation="flashmoe")`, or later
    `model.set_experts_implementation("flashmoe")`.

    Only families with decorated experts ask for it; `replace_moe_blocks` is for the others, which do not say that they
    ignore the name. What experts of a decorated family compute beyond `ExpertKind` is refused at the first call.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, flashmoe_experts)


def flashmoe_experts(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`[num_tokens, hidden]` of a decorated experts module, as transformers calls it.

    Raises:
        NotImplementedError: naming what these experts compute that the layer does not.
        RuntimeError: gradients are asked for.
    """
    paths, description = describe_experts(experts)
    tensors, description = operands(experts, paths, description)
    return moe_layer(hidden_states, top_k_index, top_k_weights, tensors, description)


def describe_experts(experts: Any) -> tuple[list[str], str]:
    """(names of the parameters, description of the layer) of a decorated experts module.

    Raises:
        NotImplementedError: naming what these experts compute that the layer does not.
    """
    refuse(experts)
    ups = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [ups, "down_proj"]
    if experts.has_bias:
        names += [f"{ups}_bias", "down_proj_bias"]
    kind: dict[str, Any] = dict(gated=experts.has_gate, activation=activation_of(experts, experts.act_fn))
    layout = dict(transposed=experts.is_transposed, interleaved=not experts.is_concatenated)
    return names, describe(names, **kind, **layout)


def refuse(experts: Any) -> None:
    """The one place that says what the layer's experts cannot.

    Raises:
        NotImplementedError: naming it.
    """
    own_gate = getattr(type(experts)._apply_gate, "__name__", "") != "_default_apply_gate"
    name = type(experts).__name__
    if experts.has_gate and own_gate:
        _refuse(name, "has a gate of its own (_apply_gate)")
    if experts.has_post_expert_norm:
        _refuse(name, "normalises each expert's result (has_post_expert_norm)")
    if experts._is_expert_parallel:
        _refuse(name, "has its experts spread over processes by transformers (_is_expert_parallel)")
    activation_of(experts, experts.act_fn)


def activation_of(module: Any, function: Any) -> str:
    """The name that a config has for a module's activation.

    Raises:
        NotImplementedError: it has none.
    """
    kind = type(function).__name__
    if kind not in ACTIVATIONS or getattr(function, "approximate", "none") != "none":
        _refuse(type(module).__name__, f"has the activation {function}")
    return ACTIVATIONS[kind]


def _refuse(name: str, why: str) -> None:
    cure = 'use another experts_implementation for it, say "grouped_mm"'
    raise NotImplementedError(f"{name} {why}, which FlashMoE's experts do not compute: {cure}")
