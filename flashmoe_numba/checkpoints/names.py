"""Which tensors of a checkpoint are one layer of a family, by the [disk] section of the family's file.

Beside fields (entries.py) the section has `prefix`, with which all names of the block begin, with {layer} in it; and
`outside`, what the block has that is not of the layer, in which * stands for anything. Both may be lists. Where such
blocks are not layers in the sense of this package, the section only has `not_read`, a text that says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from reference.families import Family

from .entries import Entry, parse_entries
from .stored import companions

# A model for text keeps its layers in "model."; inside one that also sees or hears they are moved.
LANGUAGE = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")


@dataclass(frozen=True, kw_only=True)
class Names:
    """A section as it is written.

    Args:
        prefixes: in the order in which they are looked for.
        entries: by field, in the order in which they are looked for.
        outside: names without prefix.
    """

    prefixes: tuple[str, ...]
    entries: Mapping[str, list[Entry]]
    outside: tuple[str, ...] = ()

    def layers(self, names: Set[str]) -> list[int]:
        """The layers that have such a block: those with a router."""
        routers = [prefix + entry.name for prefix in self.prefixes for entry in self.entries["router"]]
        patterns = [re.compile(re.escape(router).replace(r"\{layer\}", r"(\d+)")) for router in routers]
        matches = (pattern.fullmatch(name) for pattern in patterns for name in names)
        return sorted({int(match[1]) if match.groups() else 0 for match in matches if match})

    def check_numbered(self, layer: int) -> None:
        """Nothing, if names tell this layer from others; else a ValueError."""
        routers = [prefix + entry.name for prefix in self.prefixes for entry in self.entries["router"]]
        if layer and not all("{layer}" in router for router in routers):
            raise ValueError(f"layer must be 0 where names are the same of all (prefix has no {{layer}}), got {layer}")

    def prefix(self, layer: int, names: Set[str]) -> str:
        """Of this layer.

        Raises:
            ValueError: it is not there; says what was looked for, and which layers are there.
        """
        routers = {
            f"{prefix}{entry.name}".replace("{layer}", str(layer)): prefix.replace("{layer}", str(layer))
            for prefix in self.prefixes
            for entry in self.entries["router"]
        }
        for router, prefix in routers.items():
            if router in names:
                return prefix
        layers = spans(self.layers(names))
        there = f"layers with experts are {layers}" if layers else "no layer has experts that are called so"
        first, *others = routers
        looked_for = f"{first}, and where else it may be ({len(others)} names)" if others else first
        raise ValueError(f"layer must be one with experts, got {layer}: {there}; looked for {looked_for}")

    def choose(self, without: Set[str], prefix: str, names: Set[str], expert: int) -> dict[str, Entry]:
        """For each array of the layer the entry that holds it.

        Args:
            without: arrays that the layer has not.
            expert: one that must be here.

        Raises:
            ValueError: an array is in none of its entries; names the tensors.
        """
        chosen: dict[str, Entry] = {}
        for entry in self._all():
            if prefix + entry.tensor(expert) in names:
                chosen = {array: entry for array in entry.arrays if array not in without} | chosen
        needed = {array for entry in self._all() if not entry.optional for array in entry.arrays} - without
        for array in sorted(needed - set(chosen)):
            looked_for = " and ".join(prefix + entry.tensor(expert) for entry in self._all() if array in entry.arrays)
            raise ValueError(f"{array} is missing: looked for tensor {looked_for}")
        return chosen

    def unclaimed(self, chosen: Mapping[str, Entry], prefix: str, names: Set[str], num_experts: int) -> list[str]:
        """Tensors of the block that are in none of the chosen entries, nor outside the layer."""
        claimed = {
            prefix + entry.tensor(expert)
            for entry in chosen.values()
            for expert in range(num_experts if entry.per_expert else 1)
        }
        claimed |= {companion for name in claimed for companion in companions(name)}
        left = (name for name in names if name.startswith(prefix) and name not in claimed)
        return sorted(name for name in left if not self._is_outside(name.removeprefix(prefix)))

    def _is_outside(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.outside)

    def _all(self) -> Iterator[Entry]:
        for entries in self.entries.values():
            yield from entries


def names_of(family: Family, section: str, model: Mapping[str, Any]) -> Names:
    """How tensors are called by a section of a family's file.

    Raises:
        ValueError: naming the family, the section and what is wrong in it.
    """
    table = family.section(section, model)
    try:
        return read_names(table)
    except ValueError as error:
        raise ValueError(f"family {family.name!r}: [{section}]: {error}") from None


def read_names(section: Mapping[str, Any]) -> Names:
    """The section of a family's file.

    Raises:
        ValueError: naming the key, what it is and what it should be.
    """
    if not section or "not_read" in section:
        raise ValueError(f"such a layer is not read: {section.get('not_read', 'the section is empty')}")
    fields = {key: value for key, value in section.items() if key not in ("prefix", "outside")}
    entries = {key: parse_entries(key, value) for key, value in fields.items()}
    if "router" not in entries:
        raise ValueError("router is missing: it shows which layers have experts")
    prefixes = [moved for prefix in _texts("prefix", section.get("prefix", "")) for moved in _moved(prefix)]
    outside = _texts("outside", section.get("outside", []))
    return Names(prefixes=tuple(prefixes), entries=entries, outside=tuple(outside))


def spans(layers: list[int]) -> str:
    """[1, 2, 3, 7] is "1 to 3, 7"."""
    runs = [list(run) for _, run in groupby(enumerate(layers), lambda item: item[1] - item[0])]
    return ", ".join(f"{run[0][1]} to {run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def _moved(prefix: str) -> list[str]:
    if not prefix.startswith("model.layers."):
        return [prefix]
    return [place + prefix.removeprefix("model.") for place in LANGUAGE]


def _texts(key: str, value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} must be a text or a list of texts, got {value!r}")
    return texts
