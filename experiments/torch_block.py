"""The layer as PyTorch programs for CPUs have it, over the same weights: what 04 and 05 compare with.

    eager     transformers' experts of Qwen3-MoE: a loop over the experts that were chosen
    grouped   its other way: rows sorted by expert, all experts in one call of PyTorch's grouped GEMM

Gate and up matrices are one, as there, and routing weights are rounded to the element type. The router is float32, as
the layer has it. For gated experts with silu, without biases.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, one_hot, silu

from reference import MoEConfig, Routing, Weights, tolerance
from reference.tolerance import GROWTH

# Roundings to the element type on the way of a result: gate, up, silu, their product, the expert's result, routing
# weight, weighted result; and a sum for each choice. The layer has 3 (reference/tolerance.py).
ROUNDINGS = 7


class TorchBlock:
    """Router and experts as tensors; those that need not be joined are the arrays of `weights`."""

    def __init__(self, config: MoEConfig, weights: Weights, trains: bool = False) -> None:
        assert config.gated and config.activation == "silu", "see the module"
        self._config = config
        self._router = as_tensor(weights.router)
        self._up = as_tensor(np.concatenate([weights.gate_proj, weights.up_proj], axis=1))
        self._down = as_tensor(weights.down_proj)
        for parameter in (self._router, self._up, self._down):
            parameter.requires_grad_(trains)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_idx, topk_weights: `[num_tokens, num_topk]`, int64 and float32."""
        scores = torch.softmax(linear(x.to(self._router.dtype), self._router), dim=-1)
        factors, idx = torch.topk(scores, self._config.num_topk, dim=-1)
        return idx, factors / factors.sum(-1, keepdim=True) if self._config.renormalize else factors

    def eager(self, x: Tensor, idx: Tensor, factors: Tensor) -> Tensor:
        """`[num_tokens, hidden]`"""
        y, factors = torch.zeros_like(x), factors.to(x.dtype)
        chosen = one_hot(idx, self._config.num_experts).permute(2, 1, 0)
        for expert in chosen.sum(dim=(1, 2)).nonzero().flatten().tolist():
            choices, rows = torch.where(chosen[expert])
            gate, up = linear(x[rows], self._up[expert]).chunk(2, dim=-1)
            result = linear(silu(gate) * up, self._down[expert])
            y.index_add_(0, rows, result * factors[rows, choices, None])
        return y

    def grouped(self, x: Tensor, idx: Tensor, factors: Tensor) -> Tensor:
        """`[num_tokens, hidden]`"""
        experts, num_topk = idx.flatten(), idx.shape[1]
        order = experts.argsort(stable=True)
        ends = experts.bincount(minlength=self._config.num_experts).cumsum(0, dtype=torch.int32)
        gate, up = grouped_mm(x[order // num_topk], self._up.mT, offs=ends).chunk(2, dim=-1)
        results = grouped_mm(silu(gate) * up, self._down.mT, offs=ends)
        pairs = torch.empty_like(results)
        pairs[order] = results * factors.to(x.dtype).flatten()[order, None]
        return pairs.view(-1, num_topk, self._config.hidden).sum(dim=1)

    def step(self, name: str, x: np.ndarray, dy: np.ndarray, routing: Routing | None = None) -> dict[str, np.ndarray]:
        """Gradients by name, of one of the blocks; of the routing's weights where it is given, else of the router's."""
        parameters = {"router": self._router, "up": self._up, "down": self._down}
        for parameter in parameters.values():
            parameter.grad = None
        tensor = as_tensor(x).clone().requires_grad_()
        if routing is None:
            idx, factors = self.route(tensor)
        else:
            idx, factors = torch.from_numpy(routing.topk_idx).long(), torch.from_numpy(routing.topk_weights)
            factors.requires_grad_()
            del parameters["router"]
        getattr(self, name)(tensor, idx, factors).backward(as_tensor(dy))
        found = parameters | {"x": tensor} | ({} if routing is None else {"topk_weights": factors})
        return {name: as_array(part.grad) for name, part in found.items() if part.grad is not None}


def as_tensor(array: np.ndarray) -> Tensor:
    """The same memory; bfloat16 of ml_dtypes, too."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> np.ndarray:
    """For comparisons: bfloat16 as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_routing(idx: Tensor, factors: Tensor) -> Routing:
    """As the reference has it."""
    return Routing(idx.numpy().astype(np.int32), factors.numpy())


def agreement(config: MoEConfig) -> float:
    """How far results of the layer and of a block may be apart, of the largest: both are that of the oracle but for
    independent roundings, so squares add."""
    more = (ROUNDINGS + config.num_topk - 3) * config.format.unit_roundoff**2
    return math.sqrt(2 * tolerance(config) ** 2 + GROWTH**2 * more)
