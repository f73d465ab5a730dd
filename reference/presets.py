"""Named layers: the shapes of real models, and small ones for a laptop. One TOML file each in presets/.

A file has a `description`, a `source`, optionally `leaves_out` (what the model has and `MoEConfig` does not) and
`capacity_factor` (from which the capacity follows, whatever the sizes become), and the fields of `MoEConfig` under
`[layer]`. The ranks and tokens there are defaults of ours, not the model's. Where there is `[model]`, it has sizes of
the whole model under the names of its config.json.
"""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import MoEConfig, expert_capacity
from .scalars import check_one_of

_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """All presets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The file of a preset as it is.

    It has `description`, `source`, `layer`, and maybe `leaves_out`, `capacity_factor` and `model`.

    Raises:
        ValueError: no such preset; lists those there are.
    """
    check_one_of("preset", name, preset_names())
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def load_preset(name: str, **overrides: Any) -> MoEConfig:
    """The config of a preset, with the fields in `overrides` changed; a capacity by factor follows the changed sizes.

    Raises:
        TypeError: an override is not a field of `MoEConfig`; ValueError: no such preset, or the sizes do not fit.
    """
    names = [field.name for field in fields(MoEConfig)]
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise TypeError(f"overrides must be fields of MoEConfig ({', '.join(names)}), got {', '.join(unknown)}")
    preset = read_preset(name)
    layer = preset["layer"] | overrides
    if "capacity_factor" in preset and "capacity" not in overrides:
        layer["capacity"] = expert_capacity(MoEConfig(**layer), preset["capacity_factor"])
    return MoEConfig(**layer)
