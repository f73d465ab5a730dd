"""Public models whose MoE layers this package computes, and what it knows of each family.

A family is a file of a few lines (reference/families); a file of your own does the same for a model that is not here.
Values that a model's config decides are marked by *. transformers: its version whose blocks were run for comparison.
float64: are results equal to 1e-12 with the public block's routing given, or does that block compute in float32 itself?
`outside` is what a block does that is not of the layer.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any

from reference.families import Family, family_names, read_family

from .outputs import check_outputs, give

COLUMNS = ("family", "router", "experts", "shared", "k of experts", "transformers", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="all of it as JSON; - is stdout")


def main(args: argparse.Namespace) -> int:
    """List the families."""
    check_outputs({"--json": args.json})
    families = [read_family(name) for name in family_names()]
    give(args.json, table(families), [as_json(family) for family in families])
    return 0


def as_json(family: Family) -> dict[str, Any]:
    """All that its file says, but names of tensors in checkpoints."""
    texts = {"name": family.name, "model_type": family.model_type, "block": family.block}
    sections = {name: dict(values) for name, values in family.sections.items() if name not in ("state", "disk")}
    return texts | {"outside": family.outside, "quirks": family.quirks} | sections


def table(families: list[Family]) -> Iterator[str]:
    """For people: a line for each, and under it what is outside."""
    cells = [[*COLUMNS], *(_cells(family) for family in families)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    yield lines[0]
    for family, line in zip(families, lines[1:], strict=True):
        yield line
        if family.outside:
            yield f"    outside: {family.outside}"


def _cells(family: Family) -> list[str]:
    sections = family.sections
    if not sections["router"]:
        return [family.name, "not a layer in this sense", *[""] * (len(COLUMNS) - 2)]
    sizes = sections["sizes"]
    tested, exact = sections["tested"].get("transformers", "none"), sections["tested"].get("float64")
    return [
        family.name,
        _router(sections["router"]),
        _experts(sections["experts"]),
        _shared(sections["shared"]),
        f"{_names(sizes['num_topk'])} of {_names(sizes['num_experts'])}",
        tested,
        "yes" if exact else "no",
    ]


def _router(section: Mapping[str, Any]) -> str:
    words = [_value(section["score"])]
    if section.get("choice") == "given":
        words[0] += " of given experts"
    if section.get("selection_bias", False) is not False:
        words[0] += " + bias"
    if "num_groups" in section:
        words.append(f"groups by {section['group_score']}{'*' if 'when' in section else ''}")
    marked = {"renormalize": "renormalised", "scale": "scaled", "logit_bias": "logit bias", "logit_cap": "cap"}
    marked |= {"weight_input": "weighs inputs", "expert_scale": "scale of each expert"}
    marked |= {"num_always": "some always chosen", "logit_scale": "logits scaled"}
    words += [word + _mark(section[name]) for name, word in marked.items() if section.get(name, False) is not False]
    return ", ".join(words)


def _experts(section: Mapping[str, Any]) -> str:
    word = _value(section["activation"])
    words = [f"{word}(g) u" if section["gated"] else f"{word}(u)"]
    words += [section["bound"]] if "bound" in section else []
    words += ["u + 1"] if "up_offset" in section else []
    return ", ".join(words + (["RMS norm"] if "norm_eps" in section else []))


def _shared(section: Mapping[str, Any]) -> str:
    if "ffn" not in section:
        return "no"
    return "yes, gated" if section.get("gate") else "yes"


def _mark(value: object) -> str:
    return "*" if isinstance(value, str) and value.startswith("$") else ""


def _value(value: str) -> str:
    """A constant, or what counts where a model's config says nothing."""
    return value.rsplit("|", 1)[-1].strip("'$") + _mark(value)


def _names(value: object) -> str:
    """A constant, or the first name in a model's config."""
    return re.split(r"[|+]", str(value).lstrip("$"))[0].rsplit(".", 1)[-1]
