"""Gradients of what every rank holds a copy of, added up in the order of ranks, so that runs are repeatable."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..heap.tensors import as_array, as_tensor
from .description import read
from .ownership import tensor_at
from .ranks import Ranks
from .rounds import ROOM
from .session import SESSION
from .weight_gradients import is_of_experts


def sum_replicated_gradients(
    module: nn.Module, *, comm: Any = None, process_group: Any = None, more: bool = False
) -> None:
    """Add up `.grad` over the ranks, of all parameters of a module but those of experts, which each rank has alone.

    Of a model these are its routers, its shared experts, and all that is none of FlashMoE's. Sums are made as
    `((rank 0 + rank 1) + rank 2) + ...`, in float32 where the parameter's type is shorter, and every rank gets the same
    bits. A rank without a gradient adds none, as where it has frozen a parameter; where no rank has one, none has one
    afterwards. All ranks call it, with the same parameters in the same order.

    Args:
        module: a `MoE`, a model with swapped blocks, or one whose experts were called by `register`'s name.
        comm, process_group: those of the modules.
        more: do more micro-batches follow before the step? Then the sums are left on rank 0, and the others' gradients
            are None, so that the next ones are added in the order of micro-batches, and of ranks in each.

    Raises:
        ValueError: neither is given.
        FlashMoEError: a rank is missing, or does something else.
    """
    ranks = SESSION.ranks(comm, process_group)
    if ranks is None:
        raise ValueError("comm or process_group must be given: gradients of one rank are whole")
    with SESSION.ending(ranks):
        add_up(module, ranks, more)


def add_up(module: nn.Module, ranks: Ranks, more: bool) -> None:
    """The same among these ranks."""
    own = {id(parameter) for parameter in _of_experts(module, ranks)}
    for name, parameter in module.named_parameters():  # frozen ones, too: other ranks may have frozen others
        if id(parameter) not in own:
            total = _total(name, parameter, ranks)
            parameter.grad = None if more and ranks.rank_idx > 0 else total


def _of_experts(module: nn.Module, ranks: Ranks) -> Iterator[torch.Tensor]:
    """Parameters of experts, in all modules of these ranks that are in a module."""
    for part in module.modules():
        member = ranks.member_of(part)
        if member is not None:
            paths, description = member
            for path, name in zip(paths, read(description)[0], strict=True):
                if is_of_experts(name):
                    yield tensor_at(part, path)


def _total(name: str, parameter: torch.Tensor, ranks: Ranks) -> torch.Tensor | None:
    """The sum of all ranks' gradients of a parameter, if any has one."""
    sums = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    gradient = None if parameter.grad is None else parameter.grad.detach().cpu().to(sums).reshape(-1)
    mine: Any = as_array("gradient", gradient)
    total = np.zeros(parameter.numel(), np.float64 if sums == torch.float64 else np.float32)
    step, mark = ROOM // total.itemsize, zlib.crc32(f"{name} {parameter.shape} {parameter.dtype}".encode())
    for first in range(0, len(total), step):
        part = total[first : first + step]
        given = ranks.exchange(None if mine is None else mine[first : first + step], len(part), total.dtype, mark)
        there = [values for values in given if values is not None]
        if not there:
            return None
        for rank, values in enumerate(there):
            part[:] = values if rank == 0 else part + values
    return as_tensor(total).reshape(parameter.shape).to(parameter.device, parameter.dtype) if len(total) else None
