"""The machine with a profile: what each kind of task costs in instructions, and how well it uses memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reference.arrays import Array
from reference.task_kinds import BACKWARD_NAMES, KIND_NAMES

from ..build.likeness import forward_of, like_arguments
from ..build.variants import Variant
from ..device.records import read_record
from ..kernel.grid import BLOCKS_PER_RANK, HEADER_WORDS, WORDS_PER_RANK
from ..kernel.queue import TASK_WORDS, WHO
from . import in_step, state
from .in_step import FIRST_KIND, NUM_ACTIVITIES, NUM_COUNTERS, OS_BLOCK, WAITING, Profile, run_in_step
from .linked import name_in
from .machine import Machine, run_to_end
from .state import State

WORD_BYTES = 8
KINDS = dict(enumerate(KIND_NAMES)) | BACKWARD_NAMES
ACTIVITIES = {WAITING: "waiting", OS_BLOCK: "OS block"} | {FIRST_KIND + kind: name for kind, name in KINDS.items()}


@dataclass(kw_only=True)
class ProfilingMachine(Machine):
    """A machine that runs warps in step and counts; slower than one that does not.

    Args:
        variant: of the kernel, whose table of arguments it reads. Launches of others it just runs.
        counts: int64 `[NUM_ACTIVITIES, NUM_COUNTERS]` of in_step.py, of all its launches so far.
        by_step: int64 `[steps, 3]`: requests of global memory, sectors, and how many fewer the same bytes could have
            been, by the program's steps.
    """

    variant: Variant
    counts: Array = field(default_factory=lambda: np.zeros((NUM_ACTIVITIES, NUM_COUNTERS), np.int64))
    by_step: Array = field(default_factory=lambda: np.zeros((0, in_step.STEP_COUNTERS), np.int64))

    def _launch(self, text: str, *grid: Any) -> tuple[int, str]:
        self._counts = self._is_its(text)
        return super()._launch(text, *grid)

    def _is_its(self, text: str) -> bool:
        """Is this PTX of the variant? What says nothing of itself is."""
        return name_in(text) in (None, self.variant.name)

    def execute(self, S: State, arguments: Sequence[int]) -> None:
        """Run and count."""
        if not self._counts:
            super().execute(S, arguments)
            return
        if not self.by_step.size:
            self.by_step = np.zeros((S.executed.size, in_step.STEP_COUNTERS), np.int64)
        run_to_end(run_in_step, S, self._profile(S, *arguments))

    def _profile(self, S: State, table_address: int, num_words: int) -> Profile:
        table = self.arena.view(table_address, WORD_BYTES * num_words).view(np.int64)
        blocks_per_rank = int(table[BLOCKS_PER_RANK])
        activity = np.full(S.blocks.size, WAITING)
        activity[blocks_per_rank - 1 :: blocks_per_rank] = OS_BLOCK
        return Profile(
            counts=self.counts,
            steps=self.by_step,
            activity=activity,
            queues=self._queues(table, S.blocks.size // blocks_per_rank),
            task_bytes=np.array([WORD_BYTES * TASK_WORDS, WORD_BYTES * WHO]),
            together=np.zeros(state.WARP, np.int64),
            seen=np.zeros(8 * state.WARP, np.int64),
            banks=np.zeros(in_step.BANKS, np.int64),
        )

    def _queues(self, table: Array, num_ranks: int) -> Array:
        """(address, bytes) of each rank's queue."""
        like, found = forward_of(like_arguments(self.variant)), []
        for rank in range(num_ranks):
            at = HEADER_WORDS + rank * int(table[WORDS_PER_RANK])
            arguments: Any = read_record(table, at, like, lambda address, size, dtype: (address, WORD_BYTES * size))
            found.append(arguments.queue.tasks)
        return np.array(found, np.int64)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object for each activity in which anything was done."""
        return [self._row(ACTIVITIES[i], self.counts[i]) for i in range(NUM_ACTIVITIES) if self.counts[i].any()]

    def most_waste(self, most: int) -> list[dict[str, Any]]:
        """The accesses to global memory with the most sectors that the same bytes need not have, as JSON objects."""
        found = [program for text, program in self._programs.items() if self._is_its(text)]
        if len(found) != 1:
            return []
        (program,) = found
        requests, sectors, excess = self.by_step.T
        worst = np.argsort(-excess, kind="stable")[:most]
        return [
            {
                "line": program.instruction(step).line,
                "text": program.instruction(step).text,
                "requests": int(requests[step]),
                "sectors_per_request": float(sectors[step] / requests[step]),
                "excess_per_request": float(excess[step] / requests[step]),
            }
            for step in worst.tolist()
            if excess[step]
        ]

    def _row(self, name: str, counts: Array) -> dict[str, Any]:
        def per(counter: int, others: int) -> float | None:
            return float(counts[counter] / counts[others]) if counts[others] else None

        return {
            "activity": name,
            "instructions": int(counts[in_step.WARP_STEPS]),
            "threads_per_instruction": per(in_step.THREAD_STEPS, in_step.WARP_STEPS),
            "barriers": int(counts[in_step.BARRIERS]),
            "copies": int(counts[in_step.COPIES]),
            "products": int(counts[in_step.PRODUCTS]),
            "atomics": int(counts[in_step.ATOMICS]),
            "global_requests": int(counts[in_step.GLOBAL_REQUESTS]),
            "sectors_per_request": per(in_step.GLOBAL_SECTORS, in_step.GLOBAL_REQUESTS),
            "bytes_per_sector": per(in_step.GLOBAL_BYTES, in_step.GLOBAL_SECTORS),
            "bytes_per_request": per(in_step.GLOBAL_BYTES, in_step.GLOBAL_REQUESTS),
            "shared_requests": int(counts[in_step.SHARED_REQUESTS]),
            "turns_per_request": per(in_step.SHARED_TURNS, in_step.SHARED_REQUESTS),
        }
