"""Layers of published models: `load` for one, `Checkpoint` for several of a folder, `from_state_dict` for a block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reference import MoEConfig, Weights
from reference.families.layer_config import layer_config
from reference.scalars import check_whole

from .folder import Folder, read_json
from .layers import Asked, LayerPlan, plan_first
from .models import find_families
from .names import names_of
from .state import State


def load(path: str | Path, layer: int, *, family: str | Path | None = None, **how: Any) -> tuple[MoEConfig, Weights]:
    """One layer of a checkpoint.

        config, weights = load("Mixtral-8x7B-v0.1", layer=3, num_tokens=256)
        config, weights = load(path, layer=3, num_tokens=256, num_ranks=comm.size, rank_idx=comm.rank)

    Args:
        path, family: as in `Checkpoint`.
        layer, how: as in `Checkpoint.load`.
    """
    with Checkpoint(path, family) as checkpoint:
        return checkpoint.load(layer, **how)


class Checkpoint:
    """A folder as published: config.json, and .safetensors files, which are read as layers are asked for.

    Args:
        path: of the folder.
        family: of the model's blocks: a name (`reference.families`), or a TOML file that describes one; None: by
            model_type in config.json.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: naming what is missing, or which file is wrong, and how.
    """

    def __init__(self, path: str | Path, family: str | Path | None = None) -> None:
        self._folder = Folder(path)
        try:
            found, self._model = find_families(self._folder.config, family)
            self._families = [each for each in found if "not_read" not in each.sections["disk"]] or found
        except BaseException:
            self._folder.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Of tensors, so far."""
        return self._folder.bytes_read

    @property
    def layers(self) -> list[int]:
        """Indices of those with experts."""
        names = [names_of(family, "disk", self._model) for family in self._families]
        return sorted({layer for each in names for layer in each.layers(self._folder.names)})

    def load(
        self, layer: int, *, rank_idx: int | None = None, dtype: str | None = None, **own: Any
    ) -> tuple[MoEConfig, Weights]:
        """One layer, and nothing of any other.

        Args:
            layer: its index in the model.
            rank_idx: only the experts of this rank are read; None: all.
            dtype: element type of the layer, to which what is stored is rounded; None: what experts are stored in, or
                where that is quantised, what the model's config says.
            own: fields of `MoEConfig` that a model's config knows nothing of, of which `num_tokens` must be here and
                `num_ranks` is 1 by default; any others are taken in place of what the model's config says.

        Raises:
            TypeError, ValueError: naming the argument, its value and the rule; or the tensor that is missing, of
                another shape or type, and its file. FileNotFoundError: its file is not there.
        """
        plan = self._plan(Asked(layer=layer, rank_idx=rank_idx, dtype=dtype, own=own))
        return plan.config, plan.read()

    def config(self, layer: int, *, rank_idx: int | None = None, dtype: str | None = None, **own: Any) -> MoEConfig:
        """The config that `load` gives, after all its checks, without reading any tensor."""
        return self._plan(Asked(layer=layer, rank_idx=rank_idx, dtype=dtype, own=own)).config

    def _plan(self, asked: Asked) -> LayerPlan:
        return plan_first(self._folder, "disk", self._families, self._model, asked)

    def close(self) -> None:
        """Close its files; what was loaded stays."""
        self._folder.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def from_state_dict(
    model: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    family: str | Path | None = None,
    layer: int = 0,
    rank_idx: int | None = None,
    dtype: str | None = None,
    **own: Any,
) -> tuple[MoEConfig, Weights]:
    """The layer that one block of a model is, from the tensors that the block has in memory.

        config, weights = from_state_dict(model.config.to_dict(), block.state_dict(), num_tokens=256)

    Args:
        model: its config as a dictionary.
        state: NumPy's arrays or PyTorch's tensors by the block's own names for them.
        family: as in `Checkpoint`.
        layer: the block's index, where a model's config has a value for each.

    All else, and what is raised, as in `Checkpoint.load`.
    """
    asked = Asked(layer=layer, rank_idx=rank_idx, dtype=dtype, own=own)
    families, part = find_families(model, family)
    plan = plan_first(State(state), "state", families, part, asked)
    return plan.config, plan.read()


def read_config(path: str | Path, layer: int = 0, *, family: str | Path | None = None, **own: Any) -> MoEConfig:
    """The config of a layer by a model's config.json alone, from which nobody can tell the layer's dtype.

    Args:
        path: of the file.
        family: as in `Checkpoint`.
        layer, own: as in `Checkpoint.load`.
    """
    check_whole("layer", layer, 0)
    families, model = find_families(read_json(Path(path)), family)
    return layer_config(families[0], model, layer, **{"num_ranks": 1, **own})
