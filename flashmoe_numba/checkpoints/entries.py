"""How a family's file says where an array of `Weights` lies: the name of a tensor, and the order of its axes.

    router    = "gate.weight"                                      the usual order: [choice, hidden]
    down_proj = "experts.{expert}.w2.weight"                       a tensor for each expert
    gate_up_proj = "experts.gate_up_proj: expert hidden (ffn 2)"   all experts, transposed, gate and up in turn

Axes are written as in einops (https://einops.rocks): names in brackets are one axis of the tensor, the last of them
counting fastest. 2 is gate and up, 1 an axis of length 1; `expert` comes first. A ? behind the name: may be missing. A
list has several ways in which an array may be stored, of which the first that is there counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reference.arrays import Array
from reference.scalars import check_one_of

# Each array as it is mostly stored, one expert of it where there is one for each. What `Weights` has, is in this order.
OF_EXPERTS = {
    "gate_up_proj": "(2 ffn) hidden",
    "gate_proj": "ffn hidden",
    "up_proj": "ffn hidden",
    "down_proj": "hidden ffn",
    "gate_up_bias": "(2 ffn)",
    "gate_bias": "ffn",
    "up_bias": "ffn",
    "down_bias": "hidden",
}
OF_LAYER = {
    "router": "choice hidden",
    "router_bias": "choice",
    "selection_bias": "choice",
    "expert_scale": "choice",
    "result_scale": "hidden",
    "shared_gate_up_proj": "(2 shared) hidden",
    "shared_gate_proj": "shared hidden",
    "shared_up_proj": "shared hidden",
    "shared_down_proj": "hidden shared",
    "shared_gate_bias": "shared",
    "shared_up_bias": "shared",
    "shared_down_bias": "hidden",
    "shared_gate_weight": "hidden",
}
STORED = OF_EXPERTS | OF_LAYER
Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one array lies, or two that are stored as one (`gate_up`).

    Args:
        field: a key of STORED.
        name: of the tensor, with {layer} and, if every expert has its own, {expert}.
        axes: names in each axis of the tensor.
        optional: whether it may be missing.
    """

    field: str
    name: str
    axes: tuple[tuple[str, ...], ...]
    optional: bool

    @property
    def per_expert(self) -> bool:
        """A tensor for each expert?"""
        return "{expert}" in self.name

    @property
    def arrays(self) -> tuple[str, ...]:
        """Fields of `Weights` that are in it."""
        return arrays_of(self.field)

    def tensor(self, expert: int) -> str:
        """Its name, for this expert where each has one."""
        return self.name.replace("{expert}", str(expert))

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(math.prod(_length(name, sizes) for name in axis) for axis in self.axes)

    def array_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of one array: one expert's, where each has one."""
        return tuple(_length(name, sizes) for name in _flat(parse_axes(STORED[self.field])) if not name.isdigit())

    @property
    def num_pieces(self) -> str:
        """The length of the first axis of a tensor with all experts: "expert", or "choice"."""
        return self.axes[0][0]

    @property
    def _pieces(self) -> tuple[str, ...]:
        return (self.num_pieces,) if self.field in OF_EXPERTS and not self.per_expert else ()

    def arrange(self, piece: Array, sizes: Sizes) -> list[Array]:
        """The arrays in a tensor, or in one expert's piece of it, as views where NumPy can."""
        stored = [name for name in _flat(self.axes) if name not in ("1", *self._pieces)]
        wanted = [name for name in _flat(parse_axes(STORED[self.field])) if name != "1"]
        whole = piece.reshape([_length(name, sizes) for name in stored])
        ordered = whole.transpose([stored.index(name) for name in wanted])
        return list(ordered) if wanted[:1] == ["2"] else [ordered]


def arrays_of(field: str) -> tuple[str, ...]:
    """Fields of `Weights` that are stored as this one."""
    if "gate_up" not in field:
        return (field,)
    return tuple(field.replace("gate_up", half) for half in ("gate", "up"))


def parse_entries(field: str, value: Any) -> list[Entry]:
    """What a family's file says of a field: one text, or a list of them.

    Raises:
        ValueError: no such field, or the text says something else; quotes it.
    """
    check_one_of("field", field, STORED)
    texts = value if isinstance(value, list) else [value]
    return [_parse_entry(field, text) for text in texts]


def parse_axes(text: str) -> tuple[tuple[str, ...], ...]:
    """The names in each axis: "expert (2 ffn) hidden" is (("expert",), ("2", "ffn"), ("hidden",))."""
    return tuple(tuple((many or one).split()) for many, one in re.findall(r"\(([^()]*)\)|([^\s()]+)", text))


def _parse_entry(field: str, text: Any) -> Entry:
    match = re.fullmatch(r"([^\s:?]+)(\?)?(?::\s*(.+))?", text) if isinstance(text, str) else None
    if not match:
        raise ValueError(f"{field} must be 'NAME' or 'NAME: AXES', got {text!r}")
    name, optional, axes = match.groups()
    stacked = field in OF_EXPERTS and "{expert}" not in name
    entry = Entry(
        field=field,
        name=name,
        axes=parse_axes(axes or ("expert " if stacked else "") + STORED[field]),
        optional=bool(optional),
    )
    _check_axes(entry, stacked, text)
    return entry


def _check_axes(entry: Entry, stacked: bool, text: str) -> None:
    """Every axis of the array is there once, and that of experts comes first."""
    flat = _flat(entry.axes)
    if stacked and flat[0] == "choice":  # it has room for zero-computation experts
        flat[0] = "expert"
    got = sorted(name for name in flat if name != "1")
    wanted = [name for name in _flat(parse_axes(STORED[entry.field])) if name != "1"] + ["expert"] * stacked
    if got != sorted(wanted) or (stacked and flat[0] != "expert"):
        raise ValueError(f"{entry.field} must have the axes {' '.join(sorted(wanted))}, expert first, got {text!r}")


def _flat(axes: tuple[tuple[str, ...], ...]) -> list[str]:
    return [name for axis in axes for name in axis]


def _length(name: str, sizes: Sizes) -> int:
    return int(name) if name.isdigit() else sizes[name]
