"""What the operator is told beside tensors, as text: it stands in graphs, which know tensors, numbers and texts only.

A text is "name=value" joined by ";": `tensors`, what each tensor is, and fields of `MoEConfig` but those that follow
from the tensors. What a tensor is, is written as in a family's file (checkpoints/entries.py), without its name:
"router", or "gate_up_proj: expert hidden (ffn 2)" where its axes are in another order than usual.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from reference import MoEConfig
from reference.layer_kinds import ExpertKind, RouterKind

from ..checkpoints.entries import OF_EXPERTS, STORED, Entry, arrays_of, parse_axes, parse_entries

FOLLOWS = ("num_ranks", "dtype")  # one, and that of the experts
NUM_TOKENS = 1024  # of a call of the layer; more are cut into several, which changes no bit
TILES = dict(tile_m=192, tile_m_min=3)  # whole groups of 12 rows, for the CPU's micro-kernels
KINDS: dict[str, type[Any]] = {"router": RouterKind, "expert": ExpertKind, "shared_expert": ExpertKind}
TRAINING, FUSED = "save", "fused_accumulation"  # of a layer with gradients
OF_MODULE = ("ranks", "module", "num_present", TRAINING, FUSED)  # fields that are not the config's
TICKET = "ticket"  # in place of the matrices, where the kernel's order is the only one that is kept


def describe(tensors: Sequence[str], **fields: Any) -> str:
    """The text for such tensors and a config of these fields."""
    return ";".join([f"tensors={tuple(tensors)!r}", *[f"{name}={value!r}" for name, value in fields.items()]])


def describe_config(tensors: Sequence[str], config: MoEConfig, num_present: int | None = None) -> str:
    """The text of a config's layer; what has its default is left out.

    Args:
        num_present: experts in the tensors; None: all.
    """
    fields = {} if num_present in (None, config.num_experts) else {"num_present": num_present}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in FOLLOWS and value != field.default:
            fields[field.name] = vars(value) if field.name in KINDS else value
    return describe(tensors, **fields)


def describe_entry(entry: Entry) -> str:
    """What a tensor is."""
    axes = " ".join(f"({' '.join(axis)})" if len(axis) > 1 else axis[0] for axis in entry.axes)
    return f"{entry.field}: {axes}"


def is_matrix(tensor: str) -> bool:
    """Is a tensor of that text matrices of experts, the shared one among them?"""
    return tensor.partition(":")[0].endswith("_proj")


def rename(description: str, tensors: Sequence[str]) -> str:
    """The same layer's text for such tensors."""
    _, _, fields = description.partition(";")
    return ";".join([describe(tensors), *([fields] if fields else [])])


@lru_cache(1024)
def read(text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(what the tensors are, fields) of a text."""
    pairs = (item.partition("=") for item in text.split(";"))
    fields = {name: ast.literal_eval(value) for name, _, value in pairs}
    return fields.pop("tensors"), fields


def among(description: str, ranks: str, module: int) -> str:
    """The same layer's text for the module with that number among these ranks."""
    return f"{description};ranks={ranks!r};module={module}"


def training(description: str, save: str, fused_accumulation: bool) -> str:
    """The same layer's text, with gradients; `fused_accumulation` as `MoE` has it."""
    return f"{description};{TRAINING}={save!r}" + (f";{FUSED}=True" if fused_accumulation else "")


def config_of(
    fields: Mapping[str, Any], weights: Mapping[str, torch.Tensor], num_topk: int | None, num_ranks: int
) -> MoEConfig:
    """The layer of these fields and of weights under the names of `Weights`.

    Args:
        num_topk: of a routing from outside, for fields without it.
    """
    kinds = {name: KINDS[name](**fields[name]) for name in KINDS if name in fields}
    given = {"num_tokens": NUM_TOKENS, "num_topk": num_topk, **TILES, **fields, **kinds}
    own = {name: value for name, value in given.items() if name not in OF_MODULE}
    return MoEConfig(num_ranks=num_ranks, dtype=str(weights["up_proj"].dtype).removeprefix("torch."), **own)


def views(texts: Sequence[str], tensors: Sequence[torch.Tensor], fields: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The same tensors under the names and in the shapes of `Weights`, as views: what is written there is in them."""
    found: dict[str, torch.Tensor] = {}
    for text, tensor in zip(texts, tensors, strict=True):
        entry = _entry(text)
        arrays = arrays_of(entry.field)
        halves = _arrange(entry, tensor.detach(), fields)
        found |= dict(zip(arrays, halves if len(arrays) > 1 else [halves], strict=True))
    return found


@lru_cache(1024)
def _entry(text: str) -> Entry:
    field, _, axes = text.partition(":")
    return parse_entries(field, f"tensor:{axes}" if axes else "tensor")[0]


def _arrange(entry: Entry, tensor: torch.Tensor, fields: Mapping[str, Any]) -> torch.Tensor:
    """Axes in the order of STORED, those of length 1 left out, and only the rows of experts.

    Raises:
        ValueError: the tensor has another shape than its text says.
    """
    num_experts, num_present = fields["num_experts"], fields.get("num_present", fields["num_experts"])
    sizes = {"expert": num_present, "hidden": fields["hidden"], "ffn": fields["ffn"], "2": 2, "1": 1}
    sizes |= {"choice": num_experts + fields.get("num_zero", 0), "shared": fields.get("shared_ffn", 0)}
    if entry.field == "selection_bias":  # none is of experts that every token chooses
        sizes["choice"] -= fields.get("router", {}).get("num_always", 0)
    shape = [math.prod(sizes[name] for name in axis) for axis in entry.axes]
    if list(tensor.shape) != shape:
        raise ValueError(f"{entry.field} must have shape {shape}, got {list(tensor.shape)}")
    stored, wanted = ([name for axis in axes for name in axis if name != "1"] for axes in _axes(entry))
    whole = tensor.reshape([sizes[name] for name in stored])
    if entry.field in OF_EXPERTS:
        whole = whole[: sizes["expert"]]
        stored[0] = "expert"
        wanted.insert(wanted.count("2"), "expert")
    return whole.permute([stored.index(name) for name in wanted])


def _axes(entry: Entry) -> tuple[Any, Any]:
    return entry.axes, parse_axes(STORED[entry.field])
