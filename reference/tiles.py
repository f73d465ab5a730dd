"""The tile tasks of one layer and what each must wait for: the graph that every executor runs (FlashMoE, section 2).

    GATE(rank, m)                        route token block m
    DISPATCH(rank, peer, expert)         store the packet for `expert` of rank `peer` there; empty packets too
    GEMM0(rank, peer, expert, m, n)      hidden column tile n of row block m of the packet from `peer`
    GEMM1(rank, peer, expert, m, n)      result column tile n of it, stored at `peer`
    COMBINE(rank, m)                     sum the results of token block m

`rank` runs the task; `expert` is an index among its owner's experts. There is no barrier: DISPATCH waits for the gates
of its rank (slots are a prefix sum over all its tokens), GEMM0 for its packet, GEMM1 for all column tiles of its row
block, COMBINE for all results of its tokens. Leaves out: queues, blocks, time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .config import MoEConfig
from .layout import num_row_blocks, tile_height
from .packets import Packets

GATE, DISPATCH, GEMM0, GEMM1, COMBINE = range(5)
KIND_NAMES = ("GATE", "DISPATCH", "GEMM0", "GEMM1", "COMBINE")


class Task(NamedTuple):
    """One unit of work; the indices its kind does not use are 0."""

    kind: int
    rank: int
    peer: int = 0
    expert: int = 0
    m: int = 0
    n: int = 0

    def __str__(self) -> str:
        indices = ", ".join(f"{name}={value}" for name, value in zip(self._fields[1:], self[1:], strict=True))
        return f"{KIND_NAMES[self.kind]}({indices})"


def tiles_n0(config: MoEConfig) -> int:
    """Column tiles of the hidden rows: GEMM0 tasks per row block."""
    return -(-config.ffn // config.tile_ffn)


def tiles_n1(config: MoEConfig) -> int:
    """Column tiles of the results: GEMM1 tasks per row block."""
    return -(-config.hidden // config.tile_n)


def num_token_blocks(num_tokens: int, config: MoEConfig) -> int:
    """GATE tasks, and COMBINE tasks, of a rank with that many tokens."""
    return -(-num_tokens // config.token_block)


def packet_tile_height(num_rows: int, config: MoEConfig) -> int:
    return tile_height(num_rows, config.tile_m_min, config.tile_m)


def packet_row_blocks(num_rows: int, config: MoEConfig) -> int:
    return num_row_blocks(num_rows, config.tile_m_min, config.tile_m)


def task_graph(packets: Sequence[Packets], config: MoEConfig) -> dict[Task, list[Task]]:
    """Every task of the layer with the tasks it waits for; `packets` are those of each source rank.

    A COMBINE of a block that has no rows, or lost all, still waits for its rank's gates, which say so.
    """
    graph: dict[Task, list[Task]] = {}
    for source, packet in enumerate(packets):
        gates = [Task(GATE, source, m=m) for m in range(num_token_blocks(len(packet.slot), config))]
        graph |= {gate: [] for gate in gates}
        for expert, num_rows in enumerate(packet.sent.tolist()):
            owner, local = divmod(expert, config.num_experts_per_rank)
            dispatch = Task(DISPATCH, source, owner, local)
            graph[dispatch] = gates
            graph |= _gemm_tasks(dispatch, packet_row_blocks(num_rows, config), config)
        for gate in gates:
            graph[gate._replace(kind=COMBINE)] = _combine_inputs(packet, source, gate.m, config) or gates
    return graph


def _gemm_tasks(dispatch: Task, row_blocks: int, config: MoEConfig) -> dict[Task, list[Task]]:
    """The GEMM tasks of the packet that `dispatch` brings."""
    graph: dict[Task, list[Task]] = {}
    source, owner, local = dispatch.rank, dispatch.peer, dispatch.expert
    for m in range(row_blocks):
        hidden_tiles = [Task(GEMM0, owner, source, local, m, n) for n in range(tiles_n0(config))]
        graph |= {tile: [dispatch] for tile in hidden_tiles}
        graph |= dict.fromkeys(_result_tiles(owner, source, local, m, config), hidden_tiles)
    return graph


def _result_tiles(owner: int, source: int, local: int, m: int, config: MoEConfig) -> Iterator[Task]:
    """The GEMM1 tasks of one row block."""
    return (Task(GEMM1, owner, source, local, m, n) for n in range(tiles_n1(config)))


def _combine_inputs(packet: Packets, source: int, block: int, config: MoEConfig) -> list[Task]:
    """The GEMM1 tasks of every row block that holds a row of a token of `block`."""
    tokens = slice(block * config.token_block, (block + 1) * config.token_block)
    pairs = zip(packet.topk_idx[tokens].ravel().tolist(), packet.slot[tokens].ravel().tolist(), strict=True)
    rows = [(expert, slot) for expert, slot in pairs if slot >= 0]
    heights = {expert: packet_tile_height(int(packet.sent[expert]), config) for expert, _ in rows}
    row_blocks = sorted({(expert, slot // heights[expert]) for expert, slot in rows})
    per_rank = config.num_experts_per_rank
    return [tile for e, m in row_blocks for tile in _result_tiles(e // per_rank, source, e % per_rank, m, config)]
