"""Layers of published models: `load` for one, `Checkpoint` for several of a folder, `from_state_dict` for a block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reference import MoEConfig, Weights
from reference.scalars import check_whole

from .folder import Folder
from .layers import Asked, load_layer
from .models import find_families
from .names import read_names
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
        names = [read_names(family.section("disk", self._model)) for family in self._families]
        return sorted({layer for each in names for layer in each.layers(self._folder.names)})

    def load(
        self,
        layer: int,
        *,
        num_tokens: int,
        num_ranks: int = 1,
        rank_idx: int | None = None,
        dtype: str | None = None,
        **overrides: Any,
    ) -> tuple[MoEConfig, Weights]:
        """One layer, and nothing of any other.

        Args:
            layer: its index in the model.
            num_tokens, num_ranks: as in `MoEConfig`; a model's config knows nothing of them.
            rank_idx: only the experts of this rank are read; None: all.
            dtype: element type of the layer, to which what is stored is rounded; None: what experts are stored in, or
                where that is quantised, what the model's config says.
            overrides: other fields of `MoEConfig`.

        Raises:
            TypeError, ValueError: naming the argument, its value and the rule; or the tensor that is missing, of
                another shape or type, and its file. FileNotFoundError: its file is not there.
        """
        check_whole("layer", layer, 0)
        own = {"num_tokens": num_tokens, "num_ranks": num_ranks, **overrides}
        asked = Asked(layer=layer, rank_idx=rank_idx, dtype=dtype, own=own)
        for family in self._families[:-1]:  # several kinds of block have that model_type: which is this one?
            try:
                return load_layer(self._folder, family, "disk", self._model, asked)
            except ValueError:
                continue
        return load_layer(self._folder, self._families[-1], "disk", self._model, asked)

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
    num_tokens: int,
    family: str | Path | None = None,
    layer: int = 0,
    num_ranks: int = 1,
    rank_idx: int | None = None,
    dtype: str | None = None,
    **overrides: Any,
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
    source = State(state)
    families, part = find_families(model, family)
    own = {"num_tokens": num_tokens, "num_ranks": num_ranks, **overrides}
    asked = Asked(layer=layer, rank_idx=rank_idx, dtype=dtype, own=own)
    return load_layer(source, families[0], "state", part, asked)
