"""The symmetric layout L: what lies where in the segment that every rank allocates, and who may write it.

A segment has the same shape on every rank (FlashMoE, section 3):

    dispatch      [num_ranks, num_experts_per_rank, slots, hidden]   rows in: [source, expert here, slot]
    result        [num_ranks, num_experts_per_rank, slots, hidden]   rows back: [owner, expert there, slot]
    dispatch_flag [num_ranks, num_experts_per_rank, 2]               8-byte words: (epoch << 32) | number of rows
    result_flag   [num_experts, row_blocks]                          likewise, of a result chunk (runs.py)
    control       [CONTROL_WORDS]                                    8-byte words: abort word, error record, progress

and, where calls are kept for a backward, behind result:

    again         [num_ranks, num_experts_per_rank, slots, hidden]   as dispatch: the forward's rows, sent once more
    factors       [num_ranks, num_experts_per_rank, slots]           accumulators, as dispatch: of the rows' results
    dots          [num_ranks, num_experts_per_rank, slots]           accumulators, as result: gradients of the factors

Peers of the same host store straight into the region where the reader wants the rows. Where ranks are on several hosts
there is once more, between these regions and the flags:

    stage         all regions above                                  what this rank writes for ranks of other hosts

Rows for such a peer are written there, at the peer's index, and a put brings them from there to where they belong. This
is the original's stage index 0; it has a part for each rank, also for those of the same host, which is never touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .config import MoEConfig
from .hosts import Hosts

ALIGNMENT = 128
FLAG_BYTES = 8
CONTROL_WORDS = 32
CONTROL_BYTES = CONTROL_WORDS * FLAG_BYTES
DISPATCH, RESULT, AGAIN, FACTORS, DOTS = range(5)  # regions, and the rounds in which they are written
SAVES = ("rows+up", "rows", "nothing")  # what a rank keeps of a call: rows and their products with the up matrices


class Write(NamedTuple):
    """One row stored into a peer's segment: `writer` stores slot `slot` of `segment`'s region `round`.

    `peer` and `expert` are the region's first two indices: the source and its expert here (rounds DISPATCH, AGAIN and
    FACTORS), or the owner and its expert there (rounds RESULT and DOTS).

    Where `staged`, the segment is the writer's own, and `peer` is whom the row is for.
    """

    writer: int
    segment: int
    round: int
    peer: int
    expert: int
    slot: int
    staged: bool = False


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def tile_height(num_rows: int, shortest: int, tallest: int) -> int:
    """Rows per tile for a packet of `num_rows` rows: the shortest that holds them all, else the tallest.

    Heights double from `shortest` to `tallest`. A tall tile reuses each weight more often; a short one pads less. A
    packet that fits one tile reads its weights once whatever the height, so the shortest costs nothing.
    """
    height = shortest
    while height < num_rows and height < tallest:
        height *= 2
    return height


def num_row_blocks(num_rows: int, shortest: int, tallest: int) -> int:
    """Row tiles of a packet of `num_rows` rows."""
    height = tile_height(num_rows, shortest, tallest)
    return (num_rows + height - 1) // height


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes of the regions of one rank's segment, and their element counts.

    Args:
        save: one of SAVES, if the layer's calls can have a backward.
        staged: are its ranks on several hosts?
    """

    config: MoEConfig
    save: str | None = None
    staged: bool = False

    @property
    def row_blocks(self) -> int:
        """Most row tiles that one packet can have."""
        c = self.config
        return num_row_blocks(c.slots, c.tile_m_min, c.tile_m)

    @property
    def region_elements(self) -> int:
        """Elements of the dispatch region, and of the result region."""
        c = self.config
        return c.num_ranks * c.num_experts_per_rank * c.slots * c.hidden

    @property
    def region_bytes(self) -> int:
        return _aligned(self.region_elements * self.config.format.num_bytes)

    @property
    def dispatch(self) -> int:
        return 0

    @property
    def result(self) -> int:
        return self.region_bytes

    @property
    def again(self) -> int:
        return self.result + self.region_bytes

    @property
    def again_elements(self) -> int:
        """Elements of the region for rows that are sent once more."""
        return self.region_elements if self.save == "nothing" else 0

    @property
    def factor_elements(self) -> int:
        """Accumulators of the regions for factors and for their gradients."""
        return self.region_elements // self.config.hidden if self.save is not None else 0

    @property
    def factors(self) -> int:
        return self.again + _aligned(self.again_elements * self.config.format.num_bytes)

    @property
    def dots(self) -> int:
        return self.factors + self._factor_bytes

    @property
    def _factor_bytes(self) -> int:
        return _aligned(self.factor_elements * self.config.format.sums.num_bytes)

    @property
    def stage(self) -> int:
        """Where the stage begins, in which each region is as far from here as it is from 0 in the segment."""
        return self.dots + self._factor_bytes

    @property
    def stage_bytes(self) -> int:
        return self.stage if self.staged else 0

    @property
    def dispatch_flag(self) -> int:
        return self.stage + self.stage_bytes

    @property
    def result_flag(self) -> int:
        return self.dispatch_flag + _aligned(self.num_dispatch_flags * FLAG_BYTES)

    @property
    def control(self) -> int:
        return self.result_flag + _aligned(self.num_result_flags * FLAG_BYTES)

    @property
    def num_dispatch_flags(self) -> int:
        """Of each packet one for even epochs and one for odd ones."""
        return 2 * self.config.num_experts

    @property
    def num_result_flags(self) -> int:
        return self.config.num_experts * self.row_blocks

    @property
    def num_bytes(self) -> int:
        """Size of one rank's segment."""
        return self.control + _aligned(CONTROL_BYTES)

    def row(self, peer: int, expert: int, slot: int) -> int:
        """Row index in either region of `[peer, expert, slot]`; times `hidden` gives its first element."""
        c = self.config
        return (peer * c.num_experts_per_rank + expert) * c.slots + slot

    def offset(self, write: Write) -> tuple[int, int]:
        """Where a write lands: (segment, byte offset of its row)."""
        region = (self.dispatch, self.result, self.again, self.factors, self.dots)[write.round]
        row = self.row(write.peer, write.expert, write.slot) * self.row_bytes(write.round)
        return write.segment, write.staged * self.stage + region + row

    def row_bytes(self, round: int) -> int:
        """Of a row of a region; factors and their gradients are rows of one number."""
        c = self.config
        return c.format.sums.num_bytes if round in (FACTORS, DOTS) else c.hidden * c.format.num_bytes

    @property
    def rounds(self) -> tuple[int, ...]:
        """Those whose regions there are."""
        kept = () if self.save is None else (FACTORS, DOTS)
        return (DISPATCH, RESULT, *kept, *((AGAIN,) if self.save == "nothing" else ()))

    def is_valid(self, write: Write) -> bool:
        """The theorem's premises for one write: indices in range, and the region's peer index is the writer.

        A stage is written by its own rank only, for others; its peer index is whom the row is for.
        """
        c = self.config
        in_range = (
            0 <= write.segment < c.num_ranks
            and 0 <= write.expert < c.num_experts_per_rank
            and 0 <= write.slot < c.slots
            and write.round in self.rounds
        )
        if write.staged:
            is_own = write.segment == write.writer and write.peer != write.writer
            return in_range and self.staged and is_own and 0 <= write.peer < c.num_ranks
        return in_range and write.peer == write.writer


def staged_writes(writes: Iterable[Write], hosts: Hosts) -> Iterator[Write]:
    """The same writes where ranks are on these hosts: a row for another host is written into the stage before.

    What a put writes is a write of the rank whose put it is.
    """
    for write in writes:
        if hosts.are_apart(write.writer, write.segment):
            yield write._replace(segment=write.writer, peer=write.segment, staged=True)
        yield write


def write_conflicts(layout: Layout, writes: Iterable[Write]) -> list[tuple[Write, Write]]:
    """Pairs of writes of one epoch that touch the same row.

    The theorem (FlashMoE, section 3): if every write `is_valid` and no writer uses a slot twice for one (segment,
    round, expert), the list is empty. It looks only at addresses, so it does not assume what it checks.
    """
    seen: dict[tuple[int, int], Write] = {}
    conflicts = []
    for write in writes:
        first = seen.setdefault(layout.offset(write), write)
        if first is not write:
            conflicts.append((first, write))
    return conflicts
