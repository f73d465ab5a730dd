"""What a model's config says of its layers with experts: its family, and the `MoEConfig` of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reference.families import Family, families_of, family_names, read_family

Model = Mapping[str, Any]
OF_ALL_PARTS = ("quantization_config", "dtype", "torch_dtype")  # which only the outermost config may have
HOW_TO_ADD = "describe it in a file and give that: family='my.toml' (docs/checkpoints.md)"


def find_families(model: Model, family: str | Path | None) -> tuple[list[Family], Model]:
    """The families that a model's layers may be of, and the part of its config that has their sizes.

    A model that sees or hears, too, has the config of its language model inside its own.

    Args:
        model: what is in config.json.
        family: its name, or a file; None: by model_type.

    Raises:
        TypeError: no dictionary.
        ValueError: it is none that is known, or several; says which there are, and how to describe another.
    """
    if not isinstance(model, Mapping):
        raise TypeError(f"model must be a dictionary of what is in config.json, got {type(model).__name__}")
    if family is not None:
        found = read_family(family)
        inside = [part for part in _parts(model) if part.get("model_type") == found.model_type]
        return [found], (inside or [model])[0]
    known = [(families, part) for part in _parts(model) if (families := families_of(str(part.get("model_type"))))]
    if not known:
        types = sorted({str(part["model_type"]) for part in _parts(model) if "model_type" in part}) or ["none"]
        names = ", ".join(family_names())
        raise ValueError(f"model_type must be of a known family, got {', '.join(types)}: {HOW_TO_ADD}. Known: {names}")
    if any(each != known[0] for each in known) and known[0][1] is not model:
        names = ", ".join(each.name for families, _ in known for each in families)
        raise ValueError(f"family must be given, because the model has several: {names}")
    return known[0]


def _parts(model: Model) -> Iterator[Model]:
    """A model's config, and those inside it with what is said of all of them outside."""
    yield model
    for key, value in model.items():
        if isinstance(value, Mapping) and key not in OF_ALL_PARTS:
            yield from _parts(_inherited(value, model))


def _inherited(part: Model, model: Model) -> Model:
    names = [name for name in OF_ALL_PARTS if model.get(name) is not None and part.get(name) is None]
    if part.get("dtype") or part.get("torch_dtype"):  # two names of one thing
        names = [name for name in names if not name.endswith("dtype")]
    return {**part, **{name: model[name] for name in names}}
