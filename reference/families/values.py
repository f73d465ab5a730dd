"""Values of a family's file: constants, or texts that begin with $ and say where a model's config has them.

    "$moe_intermediate_size|intermediate_size"    the first that is there, and not null
    "$norm_topk_prob|true"                        at the end a literal, for where none is
    "$ffn_config.moe_top_k|4"                     inside another table
    "$moe_intermediate_size*n_shared_experts"     a product; + is a sum, which binds less
    "$moe_intermediate_size[0]"                   of a list; of one without an index it is the layer's

`when` is a list of tables, each of values that hold for some configs: its keys but `set` and `refuse` are names of the
model's config with the value that they must have. Of the first case that holds, `set` has the section's values in place
of others; `refuse` is a text that says why such a model is none that this package computes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from math import prod
from typing import Any

Model = Mapping[str, Any]


def section_values(section: Mapping[str, Any], model: Model, layer: int) -> dict[str, Any]:
    """All values of a section for one layer of a model.

    Raises:
        KeyError: (what the model's config must have one of, the section's key).
        ValueError: it is refused, or a list is too short for the layer.
    """
    values = {key: value for key, value in section.items() if key != "when"}
    for case in section.get("when", []):
        wanted = {key: value for key, value in case.items() if key not in ("set", "refuse")}
        if all(lookup(name, model, layer) == value for name, value in wanted.items()):
            if "refuse" in case:
                raise ValueError(case["refuse"])
            values |= case["set"]
            break
    found = {}
    for key, value in values.items():
        try:
            found[key] = resolve(value, model, layer)
        except KeyError as error:
            raise KeyError(error.args[0], key) from None
    return found


def resolve(value: Any, model: Model, layer: int = 0) -> Any:
    """A value for one layer of a model.

    Raises:
        KeyError: the config has none of the names, and there is no literal; its argument names them.
        ValueError: the model's list is too short for the layer, or what is multiplied or added is no number.
    """
    if not (isinstance(value, str) and value.startswith("$")):
        return value
    alternatives = value[1:].split("|")
    for alternative in alternatives:
        terms = [[lookup(name, model, layer) for name in term.split("*")] for term in alternative.split("+")]
        if all(factor is not None for factors in terms for factor in factors):
            return terms[0][0] if len(terms) == len(terms[0]) == 1 else _sum_of_products(alternative, terms)
    try:
        return tomllib.loads(f"value = {alternatives[-1]}")["value"]
    except tomllib.TOMLDecodeError:
        raise KeyError(" or ".join(alternatives)) from None


def _sum_of_products(text: str, terms: list[list[Any]]) -> Any:
    if not all(isinstance(factor, int | float) for factors in terms for factor in factors):
        raise ValueError(f"{text} of the model's config must be of numbers, got {terms}")
    return sum(prod(factors) for factors in terms)


def lookup(name: str, model: Model, layer: int) -> Any:
    """What a model's config has under a name, or None."""
    match = re.fullmatch(r"([\w.]+)(?:\[(\d+)\])?", name.strip())
    found: Any = model if match else None
    for part in match[1].split(".") if match else []:
        found = found.get(part) if isinstance(found, Mapping) else None
    if not isinstance(found, list) or match is None:
        return found
    index = layer if match[2] is None else int(match[2])
    if index >= len(found):
        raise ValueError(f"{name} of the model's config must have a value for layer {index}, got {found}")
    return found[index]
