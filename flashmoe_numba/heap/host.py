"""What backends share whose kernels read NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference import MoEConfig

from ..device.storage import as_storage
from ..processes.cores import default_processors
from ..processes.ownership import Owned


class HostMemory(Owned):
    """Arrays of this process."""

    every_block = True  # wants the arguments of every block, and not just of a rank's first

    def zeros(self, size: int, dtype: Any) -> np.ndarray:
        return np.zeros(size, dtype)

    def empty(self, size: int, dtype: Any) -> np.ndarray:
        return np.empty(size, dtype)

    def array(self, values: np.ndarray) -> np.ndarray:
        """Values from the host in an array of this memory."""
        return values

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """A copy."""
        return array.copy()

    def store(self, target: np.ndarray, values: np.ndarray) -> None:
        """Copy values from the host into an array of this memory, as a part of the call that began."""
        target[...] = values

    def check_tokens(self, name: str, x: Any, config: MoEConfig) -> np.ndarray:
        """One rank's tokens, as `adopt` wants them: the same array if it is contiguous and writable, else a copy.

        Raises:
            TypeError, ValueError: naming the rule, and both sides of it. Errors call it `name`.
        """
        if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} must be a NumPy array without a mask, got {type(x).__name__}")
        if x.ndim != 2 or x.shape[1] != config.hidden:
            raise ValueError(f"{name} must have shape [num_tokens, hidden={config.hidden}], got {list(x.shape)}")
        if len(x) > config.num_tokens:
            raise ValueError(f"{name} must have at most config.num_tokens={config.num_tokens} tokens, got {len(x)}")
        if x.dtype != config.numpy_dtype:
            raise TypeError(f"{name} must have config's dtype {config.dtype}, got {x.dtype}")
        return np.require(np.asarray(x), requirements=("C_CONTIGUOUS", "ALIGNED", "WRITEABLE"))

    def begin(self, tokens: Sequence[Any]) -> None:
        """A call begins, with these tokens of each rank here."""

    def adopt(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x as the kernel sees it, room for y likewise, y)."""
        y = np.empty_like(x)
        return as_storage(x), as_storage(y), y

    def join(self, x: Any, parts: list[np.ndarray]) -> Any:
        """Results of all ranks: one array if the tokens were one."""
        return np.stack(parts) if isinstance(x, np.ndarray) else parts

    def load(self, folder: Path) -> None:
        """Nothing to load before the arguments' types are known: `prepare` does it."""

    def check_grid(self, num_ranks_here: int, num_processors: int) -> None:
        """Any number of blocks will do."""

    def default_processors(self, num_ranks_here: int, num_ranks: int) -> int:
        """The cores, shared out among the ranks of the layer, at least one."""
        return default_processors(num_ranks)

    def may_have_failed(self) -> bool:
        """Could a call have been given up, as far as is known without waiting? `run` waited, so just look."""
        return True

    def synchronize(self) -> None:
        """`run` waits."""

    def epoch(self, position: int, counted: int) -> int:
        """Calls that a rank has finished."""
        return counted
