"""What runs a layer's blocks.

A layer and its ranks use what stands here and in heap/protocols.py, and nothing else, so that whatever gives it can
take the place of ours (`FlashMoE.from_parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from reference import MoEConfig

from ..heap.protocols import Memory
from ..kernel.backward.arguments import BackwardArguments
from ..kernel.grid import RankArguments
from ..kernel.state import Problem, Segments

Arguments = RankArguments | BackwardArguments


class Backend(Memory, Protocol):
    """A memory whose kernels can be run. The order: load, prepare, then begin and run for each call, close."""

    def load(self, folder: Path, backward: bool) -> None:
        """Build the kernel, or find it in `folder`; nothing, where that needs the types of arguments: see `prepare`.

        Args:
            backward: is that of gradients needed, too?
        """

    def default_processors(self, num_ranks_here: int, num_ranks_sharing: int) -> int:
        """Processors of a rank for which the user named no number.

        Args:
            num_ranks_here: ranks of this process.
            num_ranks_sharing: ranks of this host.
        """

    def check_grid(self, num_ranks_here: int, num_processors: int) -> None:
        """Raise a ValueError if so many blocks cannot run at the same time; nothing, where any number can."""

    def prepare(self, config: MoEConfig, of_ranks: Sequence[RankArguments], folder: Path) -> None:
        """Make all that blocks need beside these arguments of each rank of this process, and compile what is left.

        Args:
            folder: where compiled kernels are kept; not looked at where nothing is compiled.
        """

    def prepare_backward(self, of_rank: BackwardArguments, folder: Path) -> None:
        """The same for backwards, of which a rank has arguments like these; only where a layer is made for them."""

    def deadline_ns(self, deadline_s: float) -> int:
        """The same by the kernel's clock; as good as none, where the clock does not count time."""

    def check_keeping(self, tokens: Sequence[Any]) -> None:
        """Raise a ValueError if no call with these tokens of each rank here can be kept for a backward, or be one."""

    def begin(self, tokens: Sequence[Any]) -> None:
        """A call begins, with these tokens of each rank here; nothing, where calls have no order to keep."""

    def run(self, of_ranks: Sequence[Arguments], stop: Callable[[], None]) -> None:
        """Run all blocks of these ranks: to their end, or on a GPU only to where they are on their way.

        Args:
            of_ranks: of this call, in the order of those that were prepared.
            stop: makes blocks leave early; called if this thread is interrupted while it waits.
        """

    def may_have_failed(self) -> bool:
        """Could a call have been given up, as far as is known without waiting? True where `run` waits: just look."""

    def synchronize(self) -> None:
        """Wait for the last call; nothing, where `run` does."""

    def epoch(self, position: int, counted: int) -> int:
        """Calls that the rank at this position here has finished: the host's number, where only the host begins any."""

    def leave(self, problem: Problem, segments: Segments, why: int) -> None:
        """Make the blocks of all ranks stop, as the kernel's `leave` does, but from outside of a kernel."""

    def close(self) -> None:
        """Give threads back and wait for the last call; nothing, where there is neither. No other verb comes after."""
