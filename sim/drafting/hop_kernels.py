"""Kernels on few multiprocessors that move rows hop by hop: to the relay of each node, to each rank, and back.

A hop is cut into chunks, of which a window is under way at a time; on the way back each hop sums. Methods take and give
what is complete, `[num_ranks]`.

Source: DeepEP's normal mode, see `policies/deepep.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import NONE, Array
from ..engine.kinds import COMBINE, DISPATCH, SEND
from .draft import Draft
from .hops import make_hops


class HopKernels:
    """On the servers `comm` `[num_ranks]`, of one multiprocessor a slot.

    Args:
        chunk_rows: rows of a chunk.
        window: chunks under way.
    """

    def __init__(self, draft: Draft, comm: Array, chunk_rows: int, window: int) -> None:
        self.draft = draft
        self.world = draft.world
        self.comm = comm
        self.hops = make_hops(draft.world, chunk_rows, draft.token_block)
        self.window = window
        self.one_node = self.world.num_nodes == 1

    def meet(self, begun: Array) -> Array:
        """A barrier with which dispatch and combine begin."""
        network = 0 if self.one_node else self.world.hardware.nic_latency_ns
        return self.draft.barrier(begun, self.world.hardware.barrier_ns + network)

    def dispatch(self, begun: Array) -> Array:
        """Each row to the relay of each node, from there to each rank."""
        hops, size = self.hops, self.world.config.hidden * self.world.precision.token_bytes
        rows, shares = hops.rows * size, hops.share_rows * size
        first = self._send(DISPATCH, hops.source, hops.relay, rows, read=None if self.one_node else rows)
        self.draft.after(begun[hops.source], first)
        relay = hops.relay[hops.share_chunk]
        second = self._send(DISPATCH, relay, hops.share_rank, shares, read=shares, of=hops.source[hops.share_chunk])
        self.draft.after(first[hops.share_chunk], second)
        return self.draft.after(begun, self.draft.gather(second, hops.share_rank))

    def combine(self, begun: Array) -> Array:
        """The way back, with sums at the relays and at the source."""
        hops, size = self.hops, self.world.config.hidden * self.world.precision.result_bytes
        met, relay, shares = self.meet(begun), hops.relay[hops.share_chunk], hops.share_rows * size
        first = self._send(SEND, hops.share_rank, relay, shares, read=shares, of=hops.source[hops.share_chunk])
        self.draft.after(met[hops.share_rank], first)
        read = None if self.one_node else np.bincount(hops.share_chunk, hops.share_rows, len(hops.rows)) * size
        second = self._send(SEND, hops.relay, hops.source, hops.rows * size, read=read)
        self.draft.builder.edge(first, second[hops.share_chunk])
        return self._sum(met, second, size)

    def _sum(self, met: Array, arrived: Array, size: float) -> Array:
        """Blocks of tokens are summed when `arrived` `[num_chunks]` has their rows."""
        hops, draft = self.hops, self.draft
        rows = hops.copies if self.one_node else hops.visits
        block = np.arange(rows.shape[1])
        tokens = np.minimum(draft.token_block, self.world.routing.num_tokens - block * draft.token_block)
        read = rows + tokens if self.world.config.shared_ffn else rows
        time = self._time(read * size, tokens * size)
        sums = draft.builder.add(COMBINE, draft.ranks[:, None], m=block, server=self.comm[:, None], duration_ns=time)
        draft.builder.edge(arrived[hops.block_chunk], sums[hops.block_source, hops.block])
        return draft.kernel(met, sums.ravel(), np.repeat(draft.ranks, len(block)))

    def _send(
        self, kind: int, source: Array, target: Array, nbytes: Array, read: Array | None, of: Array | int = 0
    ) -> Array:
        """Chunks on one hop, a window of them under way in each stream (source, target, `of`).

        A multiprocessor reads `read` bytes and writes `nbytes`; None: there is nothing to do on this hop.
        """
        time, server = (0, NONE) if read is None else (self._time(read, nbytes), self.comm[source])
        nodes = self.draft.send(kind, source, target, nbytes, server=server, duration_ns=time)
        stream = (source * self.world.num_ranks + target) * self.world.num_ranks + of
        self.draft.in_window(nodes, stream, self.window)
        return nodes

    def _time(self, read: ArrayLike, written: ArrayLike) -> Array:
        """One multiprocessor reads and writes this many bytes."""
        hardware = self.world.hardware
        time = np.maximum(np.asarray(read) / hardware.sm_read_gbps, np.asarray(written) / hardware.sm_write_gbps)
        return np.asarray(np.ceil(time))
