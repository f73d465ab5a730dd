"""Gradients of weights, between the arrays that a layer sums them up in and tensors in the shapes of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from reference.weights import EXPERT_ARRAYS, SHARED_ARRAYS

from ..checkpoints.entries import arrays_of
from ..heap.tensors import as_tensor
from ..layer.gradients import Gradients
from .description import views

OF_EXPERTS = {*EXPERT_ARRAYS, *SHARED_ARRAYS, "shared_gate_weight", "result_scale"}
OF_ROUTER = {"router", "router_bias", "expert_scale"}


def is_of_experts(text: str) -> bool:
    """Is a tensor of that text some of each expert, the shared one not among them?"""
    return not set(arrays_of(text.partition(":")[0])).isdisjoint(EXPERT_ARRAYS)


def groups(texts: Sequence[str]) -> dict[str, bool]:
    """Which gradients a layer is asked for, those of experts or of the router, where these tensors' are wanted."""
    arrays = {array for text in texts for array in arrays_of(text.partition(":")[0])}
    return {"experts": bool(arrays & OF_EXPERTS), "router": bool(arrays & OF_ROUTER)}


def begin_from(
    sums: Gradients, texts: Sequence[str], tensors: Sequence[torch.Tensor], fields: Mapping[str, Any]
) -> None:
    """Let the sums begin with what these tensors hold."""
    for array, tensor in _pairs(sums, texts, tensors, fields):
        array.copy_(tensor)


def fill(tensors: Sequence[torch.Tensor], sums: Gradients, texts: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Fill tensors, which are zeros, with the sums. What has no gradient, or is of other ranks' experts, is left."""
    for array, tensor in _pairs(sums, texts, tensors, fields):
        tensor.copy_(array)


def _pairs(
    sums: Gradients, texts: Sequence[str], tensors: Sequence[torch.Tensor], fields: Mapping[str, Any]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(what is summed up, its place in the tensors), both as views in the shapes of `Weights`."""
    weights = sums.weights[0] if isinstance(sums.weights, list) else sums.weights
    for name, tensor in views(texts, tensors, fields).items():
        array = getattr(weights, name)
        if array is None:
            continue
        if name in EXPERT_ARRAYS and len(tensor) != len(array):
            tensor = tensor[weights.first_expert : weights.first_expert + len(array)]
        yield as_tensor(array), tensor
