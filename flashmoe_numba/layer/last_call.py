"""What a layer tells of its last call: who chose what, how much there was of it, and what each block did when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..heap.rank import Rank
from ..heap.stats import Stats
from ..processes.ownership import Owned
from .calls import Calls
from .parts import Parts


class LastCall(Owned):
    """Base of the layer, which makes the calls."""

    _parts: Parts
    _calls: Calls
    num_processors: int

    @property
    def routing(self) -> Any:
        """`Routing` of the last call: of this rank with `comm`, else a list over ranks."""
        return self._of_last_call(lambda rank, _, num_tokens: rank.routing(num_tokens))

    @property
    def stats(self) -> Stats | list[Stats]:
        """`Stats` of the last call: of this rank with `comm`, else a list over ranks."""
        stats: Stats | list[Stats] = self._of_last_call(Rank.stats)
        return stats

    @property
    def row_tiles(self) -> Any:
        """`RowTile`s of the last call, for each expert of this rank with `comm`, else a list over ranks of these.

        Which rows share a tile depends on what came when, unless each source's rows have tiles of their own.
        """
        return self._of_last_call(lambda rank, epoch, _: rank.row_tiles(epoch))

    def _of_last_call(self, read: Callable[[Rank, int, int], Any]) -> Any:
        self.require_maker()
        found = [read(*of_rank) for of_rank in self._calls.last()]
        return found if self._parts.all_here else found[0]

    @property
    def traces(self) -> dict[tuple[int, int], np.ndarray]:
        """Raw events of the last call, by (rank, block); decoded by `flashmoe_numba.seeing.trace`."""
        self.require_maker()
        return {
            (rank.rank_idx, block): trace
            for rank, _, _ in self._calls.last()
            for block, trace in enumerate(np.split(self._parts.backend.to_host(rank.traces), self.num_processors + 1))
        }
