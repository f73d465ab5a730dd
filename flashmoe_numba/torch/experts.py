"""Experts of transformers that are decorated: what experts_implementation="flashmoe" calls.

Families whose experts are decorated with transformers' `use_experts_implementation` ask it for a function by name; the
model's own router stays. The other families ignore the name without a word: see blocks.py.
"""

from __future__ import annotations

import ast
from typing import Any, NoReturn

import torch

from .description import describe, training
from .families import expert_kind_of
from .ownership import check_sums, operands, tensor_at
from .training import layer_of

ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
    "Identity": "identity",
    "LinearActivation": "identity",
}


def flashmoe_experts(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    ranks: str | None = None,
    train: tuple[str, bool] | None = None,
) -> torch.Tensor:
    """`[num_tokens, hidden]` of a decorated experts module, as transformers calls it.

    Args:
        ranks: the name of those that compute it together; None: this process alone.
        train: (save, fused_accumulation) of a layer with gradients, as `MoE` has them.

    Raises:
        NotImplementedError: naming what these experts compute that the layer does not.
        RuntimeError: gradients are asked for, without `train`.
    """
    paths, description = describe_experts(experts)
    if train is not None:
        check_sums(train[1], {path: tensor_at(experts, path) for path in paths})
        description = training(description, *train)
    tensors, description = operands(experts, paths, description, ranks)
    arguments = hidden_states, top_k_index, top_k_weights, None, tensors, description
    return layer_of(*arguments, train=train is not None)[0]


def describe_experts(experts: Any, num_parts: int | None = None) -> tuple[list[str], str]:
    """(names of the parameters, description of the layer) of a decorated experts module.

    Args:
        num_parts: ranks over which transformers has spread the experts, of which the parameters are one rank's; None:
            it has not.

    Raises:
        NotImplementedError: naming what these experts compute that the layer does not.
    """
    refuse(experts, num_parts)
    ups = "gate_up" if experts.has_gate else "up"
    up_axes = ("2 ffn" if experts.is_concatenated else "ffn 2") if experts.has_gate else "ffn"
    down_axes = "ffn hidden" if experts.is_transposed else "hidden ffn"
    matrix_axes = f"hidden ({up_axes})" if experts.is_transposed else f"({up_axes}) hidden"
    tensors = {f"{ups}_proj": f"{ups}_proj: expert {matrix_axes}", "down_proj": f"down_proj: expert {down_axes}"}
    if experts.has_bias:
        tensors |= {f"{ups}_proj_bias": f"{ups}_bias: expert ({up_axes})", "down_proj_bias": "down_bias: expert hidden"}
    num_present, *lengths = experts.down_proj.shape
    ffn, hidden = lengths if experts.is_transposed else reversed(lengths)
    sizes = dict(num_experts=num_present * (num_parts or 1), num_present=num_present, hidden=hidden, ffn=ffn)
    return list(tensors), describe(list(tensors.values()), **sizes, expert=expert_kind(experts))


def refuse(experts: Any, num_parts: int | None) -> None:
    """The one place that says what the layer's experts cannot.

    Raises:
        NotImplementedError: naming it.
    """
    name = type(experts).__name__
    if experts.has_post_expert_norm:
        _refuse(name, "normalises each expert's result (has_post_expert_norm)")
    if experts._is_expert_parallel and num_parts is None:
        _refuse(name, 'has its experts spread over ranks by transformers (without ep_implementation="flashmoe")')


def expert_kind(experts: Any) -> dict[str, Any]:
    """The fields of its `ExpertKind`: by its activation, or where it has a gate of its own, by its family's file.

    Raises:
        NotImplementedError: there is none, naming why.
    """
    own_gate = getattr(type(experts)._apply_gate, "__name__", "") != "_default_apply_gate"
    if not (experts.has_gate and own_gate):
        return dict(activation=activation_of(experts, experts.act_fn), gated=experts.has_gate)
    fields = expert_kind_of(experts)
    if fields is None:
        _refuse(type(experts).__name__, "has a gate of its own (_apply_gate) that no family's file describes")
    found: dict[str, Any] = ast.literal_eval(fields)
    return found


def activation_of(module: Any, function: Any) -> str:
    """The name that a config has for a module's activation.

    Raises:
        NotImplementedError: it has none.
    """
    kind = getattr(function, "__name__", type(function).__name__)  # a function or a module
    if kind not in ACTIVATIONS:
        _refuse(type(module).__name__, f"has the activation {function}")
    return "gelu_tanh" if getattr(function, "approximate", "none") == "tanh" else ACTIVATIONS[kind]


def _refuse(name: str, why: str) -> NoReturn:
    cure = 'use another experts_implementation for it, say "grouped_mm"'
    raise NotImplementedError(f"{name} {why}, which FlashMoE's experts do not compute: {cure}")
