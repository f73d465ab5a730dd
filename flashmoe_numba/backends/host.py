"""What backends share that run blocks in this process, and return when all have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference import MoEConfig
from reference.arrays import Array

from ..heap.host import HostMemory
from ..kernel.backward.arguments import BackwardArguments
from ..kernel.grid import RankArguments
from ..kernel.state import BOX_WORDS
from ..processes.cores import default_processors
from ..seeing.trace import block_name
from ..tile_gemm import Scratch
from .protocols import Arguments

FORWARD, BACKWARD = "persistent", "persistent_backward"  # entries


class Block(NamedTuple):
    """What runs: the block's name, an entry of the kernel by its name, and what that is given."""

    name: str
    entry: str
    arguments: tuple[Any, ...]


class Room(NamedTuple):
    """What one block has to itself."""

    scratch: Scratch
    box: Array  # int64 [BOX_WORDS]
    trace: Array  # int64, its part of the rank's `traces`


class HostBackend(HostMemory, ABC):
    """Blocks as something of this process. Those who inherit say how they compile, and how they run."""

    def __init__(self) -> None:
        self._rooms: dict[int, list[Room]] = {}  # by rank, then by block

    @abstractmethod
    def make_scratch(self, config: MoEConfig) -> Scratch:
        """Working memory of one block."""

    def compile(self, block: Block, folder: Path) -> None:
        """Compile a block's entry for arguments of these types, or load it from `folder`; nothing, if interpreted."""

    @abstractmethod
    def run_blocks(self, blocks: Sequence[Block], stop: Callable[[], None]) -> None:
        """Run these to their end. `stop` makes them leave early; it is called if this thread is interrupted."""

    def load(self, folder: Path, backward: bool) -> None:
        """Nothing to load before the arguments' types are known: `prepare` does it."""

    def default_processors(self, num_ranks_here: int, num_ranks_sharing: int) -> int:
        """The cores, shared out among the ranks of this host, at least one."""
        return default_processors(num_ranks_sharing)

    def check_grid(self, num_ranks_here: int, num_processors: int) -> None:
        """Any number of blocks will do."""

    def prepare(self, config: MoEConfig, of_ranks: Sequence[RankArguments], folder: Path) -> None:
        """Give every block its room, and compile the kernel for arguments of the types of the first one's."""
        for of_rank in of_ranks:
            self.make_rooms(config, of_rank)
        self.compile(self.blocks(of_ranks[0])[0], folder)

    def prepare_backward(self, of_rank: BackwardArguments, folder: Path) -> None:
        """Compile that kernel for arguments of these types."""
        self.compile(self.blocks(of_rank)[0], folder)

    def make_rooms(self, config: MoEConfig, of_rank: RankArguments) -> list[Room]:
        """A room for each block of the rank with these arguments. The OS block uses no scratch, so it shares one."""
        num_blocks = of_rank.problem.num_processors + 1
        scratch = [self.make_scratch(config) for _ in range(num_blocks - 1)]
        parts = zip([*scratch, scratch[-1]], np.split(of_rank.traces, num_blocks), strict=True)
        rooms = [Room(of_block, np.zeros(BOX_WORDS, np.int64), trace) for of_block, trace in parts]
        self._rooms[of_rank.problem.rank_idx] = rooms
        return rooms

    def blocks(self, arguments: Arguments) -> list[Block]:
        """Those of a rank in one call, with cleared traces."""
        if isinstance(arguments, BackwardArguments):
            return self._blocks(BACKWARD, arguments.forward, arguments.back, arguments.gradients)
        return self._blocks(FORWARD, arguments)

    def _blocks(self, entry: str, of_rank: RankArguments, *more: Any) -> list[Block]:
        problem, found = of_rank.problem, []
        for block, room in enumerate(self._rooms[problem.rank_idx]):
            room.trace[:1] = 0
            name = f"rank {problem.rank_idx} {block_name(block, problem.num_processors)}"
            groups = problem, of_rank.segments, of_rank.experts, of_rank.tokens, of_rank.received, of_rank.queue
            found.append(Block(name, entry, (block, *groups, *more, *room)))
        return found

    def check_keeping(self, tokens: Sequence[Any]) -> None:
        """Any can."""

    def begin(self, tokens: Sequence[Any]) -> None:
        """Nothing: calls come one after the other."""

    def run(self, of_ranks: Sequence[Arguments], stop: Callable[[], None]) -> None:
        """Run all blocks of these ranks to their end."""
        self.run_blocks([block for of_rank in of_ranks for block in self.blocks(of_rank)], stop)

    def may_have_failed(self) -> bool:
        """`run` waited, so just look."""
        return True

    def synchronize(self) -> None:
        """`run` waits."""

    def epoch(self, position: int, counted: int) -> int:
        """Only the host begins calls."""
        return counted

    def close(self) -> None:
        self._rooms.clear()
