"""What the operator is told beside tensors, as text: it stands in graphs, which know tensors, numbers and texts only.

A text is "name=value" joined by ";": fields of `MoEConfig` that do not follow from the tensors, and how these are laid
out: `tensors`, their names, and the keys of LAYOUTS.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from reference import MoEConfig
from reference.layer_kinds import ExpertKind, RouterKind

LAYOUTS = {
    "transposed": "matrices are [experts, in, out]",
    "interleaved": "gate and up rows of a fused matrix take turns",
    "flat": "the number of experts, where they and ffn are one axis: [experts * ffn, hidden], down_proj too",
}
FOLLOWS = ("num_ranks", "hidden", "ffn", "num_experts", "dtype")  # from tensors
NUM_TOKENS = 1024  # of a call of the layer; more are cut into several, which changes no bit
TILES = dict(tile_m=192, tile_m_min=3)  # whole groups of 12 rows, for the CPU's micro-kernels
KINDS: dict[str, type[Any]] = {"router": RouterKind, "expert": ExpertKind}  # written as what they are made of
TICKET = "ticket"  # in place of the matrices, where the kernel's order is the only one that is kept


def describe(tensors: Sequence[str], **fields: Any) -> str:
    """The text for tensors of these names: fields of `Weights`, fused ones as transformers names them, or TICKET."""
    return ";".join([f"tensors={','.join(tensors)!r}", *[f"{name}={value!r}" for name, value in fields.items()]])


def describe_config(tensors: Sequence[str], config: MoEConfig) -> str:
    """The text of a config's layer; what has its default is left out."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in FOLLOWS and value != field.default:
            fields[field.name] = vars(value) if field.name in KINDS else value
    return describe(tensors, **fields)


def rename(description: str, tensors: Sequence[str]) -> str:
    """The same layer's text for tensors of these names."""
    _, _, fields = description.partition(";")
    return ";".join([describe(tensors), *([fields] if fields else [])])


@lru_cache(1024)
def read(text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(names of the tensors, fields) of a text."""
    pairs = (item.partition("=") for item in text.split(";"))
    fields = {name: ast.literal_eval(value) for name, _, value in pairs}
    return tuple(fields.pop("tensors").split(",")), fields


def config_of(fields: Mapping[str, Any], weights: Mapping[str, torch.Tensor], num_topk: int | None) -> MoEConfig:
    """The layer of these fields and of weights under the names of `Weights`.

    Args:
        num_topk: of a routing from outside, or None where the fields have it.
    """
    chosen = {name: value for name, value in fields.items() if name not in LAYOUTS}
    num_experts, ffn, hidden = weights["up_proj"].shape
    chosen |= {name: kind(**chosen[name]) for name, kind in KINDS.items() if isinstance(chosen.get(name), dict)}
    given = {"num_tokens": NUM_TOKENS, **TILES, **chosen} | ({} if num_topk is None else {"num_topk": num_topk})
    dtype = str(weights["up_proj"].dtype).removeprefix("torch.")
    return MoEConfig(num_ranks=1, hidden=hidden, ffn=ffn, num_experts=num_experts, dtype=dtype, **given)


def views(names: Sequence[str], tensors: Sequence[torch.Tensor], fields: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The same tensors under the names and in the shapes of `Weights`, as views: what is written there is in them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in zip(names, tensors, strict=True):
        tensor = tensor.detach()
        if name.endswith("_proj"):
            tensor = _matrices(name, tensor, fields)
        if name.startswith("gate_up"):
            end = "bias" if name.endswith("_bias") else "proj"
            found[f"gate_{end}"], found[f"up_{end}"] = _halves(tensor, bool(fields.get("interleaved")))
        else:
            found[name.replace("_proj_bias", "_bias")] = tensor
    return found


def _matrices(name: str, tensor: torch.Tensor, fields: Mapping[str, Any]) -> torch.Tensor:
    """`[experts, out, in]`."""
    if fields.get("flat"):
        tensor = tensor.view(fields["flat"], -1, tensor.shape[-1])
        return tensor.transpose(1, 2) if name == "down_proj" else tensor
    return tensor.transpose(1, 2) if fields.get("transposed") else tensor


def _halves(fused: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return fused[:, ::2], fused[:, 1::2]
    ffn = fused.shape[1] // 2
    return fused[:, :ffn], fused[:, ffn:]
