"""What a rank's last call can tell: its routing, and counters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reference import MoEConfig, Routing
from reference.tiles import shared_row_tiles

from ..kernel.grid import RankArguments
from ..kernel.state import Segments, Tokens
from .cut import read_tiles
from .protocols import Memory


@dataclass(frozen=True)
class Stats:
    """Counters of one rank's last call.

    `padded_rows` is what the row tiles add up to, each as tall as the lowest height that holds its rows;
    `padded_row_share` the part of them that holds no row. Packed by sources, both depend on what came when.
    `rows_per_expert` are the received rows of each of this rank's experts. `dropped_pairs` chose an expert and were not
    sent, because of the capacity. `zero_choices` are pairs that chose a zero-computation expert: nothing is sent for
    them. `shared_tiles` are the row tiles of the shared expert, of this rank's own tokens.

    What is not finite: `nonfinite_tokens` have routing weights that hold an infinity or NaN, because x did or because a
    logit left the range of the accumulator (or as they were given); `nonfinite_rows` are those of the sent rows whose
    result holds one, for the same x, or because it or the hidden row left the range of the element type. (What leaves
    it only when a token's results are added up is in y alone.) Counting them reads all results of the call.
    """

    epoch: int
    num_tokens: int
    sent_rows: int
    received_rows: int
    rows_per_expert: tuple[int, ...]
    dropped_pairs: int
    row_tiles: int
    padded_rows: int
    zero_choices: int
    shared_tiles: int
    nonfinite_tokens: int
    nonfinite_rows: int

    @property
    def padded_row_share(self) -> float:
        return 1 - self.received_rows / self.padded_rows if self.padded_rows else 0.0


def read_routing(tokens: Tokens, num_tokens: int, config: MoEConfig, memory: Memory) -> Routing:
    """A copy of the last call's."""
    shape, size = (num_tokens, config.num_topk), num_tokens * config.num_topk
    parts = tokens.topk_idx[:size], tokens.topk_weights[:size]
    return Routing(*(memory.to_host(part).reshape(shape) for part in parts))


def read_stats(of_rank: RankArguments, epoch: int, num_tokens: int, config: MoEConfig, memory: Memory) -> Stats:
    """Of the last call, which had this epoch and so many tokens."""
    c, received, tokens = config, of_rank.received, of_rank.tokens
    routing = read_routing(tokens, num_tokens, config, memory)
    tiles = [tile for of_expert in read_tiles(received, epoch, config, memory.to_host) for tile in of_expert]
    seen, rows, sent = map(memory.to_host, (received.seen, received.rows, tokens.sent))
    rows = np.where(seen == epoch, rows, 0)
    zero = routing.topk_idx >= c.num_experts
    results = (_results(of_rank.segments, e, num_rows, c, memory) for e, num_rows in enumerate(sent.tolist()))
    return Stats(
        epoch=epoch,
        num_tokens=num_tokens,
        sent_rows=int(sent.sum()),
        received_rows=int(rows.sum()),
        rows_per_expert=tuple(rows.reshape(c.num_ranks, -1).sum(axis=0).tolist()),
        dropped_pairs=int((routing.topk_idx >= 0).sum() - zero.sum() - sent.sum()),
        row_tiles=len(tiles),
        padded_rows=sum(tile.height for tile in tiles),
        zero_choices=int(zero.sum()),
        shared_tiles=len(shared_row_tiles(num_tokens, c)),
        nonfinite_tokens=_num_nonfinite(routing.topk_weights),
        nonfinite_rows=sum(map(_num_nonfinite, results)),
    )


def _results(segments: Segments, expert: int, num_rows: int, c: MoEConfig, memory: Memory) -> np.ndarray:
    """`[num_rows, hidden]`: a copy of what came back for the rows sent to this expert, whose slots come first."""
    first = expert * c.slots * c.hidden
    rows = memory.to_host(segments.result[first : first + num_rows * c.hidden])
    return rows.view(c.numpy_dtype).reshape(num_rows, c.hidden)


def _num_nonfinite(rows: np.ndarray) -> int:
    """Rows of `[rows, columns]` that hold an infinity or NaN."""
    return int((~np.isfinite(rows)).any(axis=1).sum())
