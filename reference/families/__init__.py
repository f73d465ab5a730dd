"""Families of public MoE blocks as a table: one TOML file each in this folder, or a file of a user's own.

A file says in which words a model's config has the layer's sizes (`[sizes]`), how its router chooses (`[router]`), what
an expert computes (`[experts]`), what every token goes through besides (`[shared]`), and what tensors are called in a
block's own state (`[state]`) and in a published checkpoint (`[disk]`). `values` says how a value is taken from a
model's config, `layer_config` makes a `MoEConfig` of them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scalars import check_one_of
from .checks import SECTIONS, TEXTS, check_table
from .values import section_values

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of MoE block.

    Args:
        name: of the file, without its suffix.
        model_type: in a model's config.json.
        block: module and class in `transformers.models`, or empty.
        outside: what a block of the family does that is not of the layer, or empty.
        quirks: what surprises in the public block, or empty.
        sections: each of SECTIONS as it is in the file; {} where the file has none.
    """

    name: str
    model_type: str
    block: str
    outside: str
    quirks: str
    sections: Mapping[str, Mapping[str, Any]]

    def section(self, name: str, model: Mapping[str, Any], layer: int = 0) -> dict[str, Any]:
        """A section with its values for one layer of a model, whose config is the dictionary in config.json.

        Raises:
            ValueError: the config has none of the names of a value without a literal, names them; or such a model is
                refused, says why.
        """
        try:
            return section_values(self.sections[name], model, layer)
        except KeyError as error:
            names, key = error.args
            raise ValueError(f"config of model_type {self.model_type!r} must have {names} ({name}.{key})") from None
        except ValueError as error:
            raise ValueError(f"family {self.name!r}: {error}") from None


def family_names() -> list[str]:
    """All families of this package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read_family(name: str | Path) -> Family:
    """A family of this package by its name, or the one in a file of that path.

    Raises:
        ValueError: no such family, lists those there are; or the file is not one, and what is wrong with it.
        FileNotFoundError, IsADirectoryError, TypeError: it is no file; or neither a name nor a path.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"family must be a name or the path of a .toml file, got {name!r}")
    path = Path(name)
    if path.suffix != ".toml":
        check_one_of("family", str(name), family_names())
        path = _FOLDER / f"{name}.toml"
    return _family(path.stem, _read_table(path))


def families_of(model_type: str) -> list[Family]:
    """The families of this package with that model_type: most have one kind of block, some two."""
    return [family for family in map(read_family, family_names()) if family.model_type == model_type]


def _read_table(path: Path) -> dict[str, Any]:
    """What is in a family's file, whose sections are what they should be."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        check_table(table)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise type(error)(f"family must be a file, got {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be in UTF-8: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: must be TOML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return table


def _family(name: str, table: Mapping[str, Any]) -> Family:
    sections = {section: table.get(section, {}) for section in SECTIONS}
    texts = {key: table.get(key, "") for key in TEXTS}
    return Family(name=name, model_type=table["model_type"], **texts, sections=sections)
