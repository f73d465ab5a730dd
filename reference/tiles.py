"""The tile tasks of one layer and what each must wait for: the graph that every executor runs (FlashMoE, section 2).

    GATE(rank, m)                        route token block m
    DISPATCH(rank, peer, expert)         store the packet for `expert` of rank `peer` there; empty packets too
    GEMM0(rank, peer, expert, m, n)      hidden column tile n of the row tile (peer, m)
    GEMM1(rank, peer, expert, m, n)      result column tile n of it, each row stored at its source
    COMBINE(rank, m)                     sum the results of token block m
    SHARED0(rank, m, n)                  hidden column tile n of the shared expert, for row tile m of the rank's tokens
    SHARED1(rank, m, n)                  result column tile n of it

`rank` runs the task; `expert` is an index among its owner's experts. There is no barrier: DISPATCH waits for the gates
of its rank (slots are a prefix sum over all its tokens), GEMM0 for the packets of its row tile, GEMM1 for all column
tiles of it, COMBINE for all row tiles with rows of the result chunks that its tokens are in (`runs`), and for those of
the shared expert that hold its tokens. The shared expert's rows are the tokens where they lie: nothing is sent, SHARED0
waits for nothing, and SHARED1 for all column tiles of its row tile. Leaves out: queues, blocks, time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .config import MoEConfig
from .packets import Packets
from .runs import RowTile, chunk_height, expert_tiles
from .task_kinds import BACKWARD_NAMES, COMBINE, DISPATCH, GATE, GEMM0, GEMM1, KIND_NAMES, SHARED0, SHARED1


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
        return f"{BACKWARD_NAMES.get(self.kind) or KIND_NAMES[self.kind]}({indices})"


def tiles_n0(config: MoEConfig) -> int:
    """Column tiles of the hidden rows: GEMM0 tasks per row tile."""
    return -(-config.ffn // config.tile_ffn)


def tiles_n1(config: MoEConfig) -> int:
    """Column tiles of the results: GEMM1 tasks per row tile."""
    return -(-config.hidden // config.tile_n)


def shared_tiles_n0(config: MoEConfig) -> int:
    """Column tiles of the shared expert's hidden rows: SHARED0 tasks per row tile of a rank's tokens."""
    return -(-config.shared_ffn // config.tile_ffn)


def shared_row_tiles(num_tokens: int, config: MoEConfig) -> list[range]:
    """The tokens in each row tile of the shared expert, on a rank with that many."""
    if config.shared_ffn == 0:
        return []
    return [range(first, min(first + config.tile_m, num_tokens)) for first in range(0, num_tokens, config.tile_m)]


def num_token_blocks(num_tokens: int, config: MoEConfig) -> int:
    """GATE tasks, and COMBINE tasks, of a rank with that many tokens."""
    return -(-num_tokens // config.token_block)


def task_graph(packets: Sequence[Packets], config: MoEConfig, tiles: Tiling | None = None) -> dict[Task, list[Task]]:
    """Every task of the layer with the tasks it waits for.

    Args:
        packets: of each source rank.
        tiles: the row tiles of each expert of the layer, such as a run had; None: each packet's own.

    A COMBINE of a block that has no rows, or lost all, still waits for its rank's gates, which say so.
    """
    graph: dict[Task, list[Task]] = {}
    gates = [_gates(source, len(packet.slot), config) for source, packet in enumerate(packets)]
    for source, own in enumerate(gates):
        graph |= {gate: [] for gate in own}
        graph |= {_dispatch(source, expert, config): own for expert in range(config.num_experts)}
    tiles = expert_tiles(packets, config) if tiles is None else tiles
    for expert, of_expert in enumerate(tiles):
        for tile in of_expert:
            graph |= _gemm_tasks(expert, tile, config)
    needed = _chunk_tiles(tiles, packets, config)
    for source, (own, packet) in enumerate(zip(gates, packets, strict=True)):
        graph |= _shared_tasks(source, len(packet.slot), config)
        for gate in own:
            results = _combine_inputs(packet, source, gate.m, needed, config) or own
            graph[gate._replace(kind=COMBINE)] = results + _shared_inputs(source, gate.m, len(packet.slot), config)
    return graph


def _gates(source: int, num_tokens: int, config: MoEConfig) -> list[Task]:
    return [Task(GATE, source, m=m) for m in range(num_token_blocks(num_tokens, config))]


def _dispatch(source: int, expert: int, config: MoEConfig) -> Task:
    return Task(DISPATCH, source, *divmod(expert, config.num_experts_per_rank))


def _column_tiles(kind: int, expert: int, tile: RowTile, config: MoEConfig) -> list[Task]:
    """The tasks of one kind of a row tile."""
    owner, local = divmod(expert, config.num_experts_per_rank)
    number = tiles_n0(config) if kind == GEMM0 else tiles_n1(config)
    return [Task(kind, owner, tile.peer, local, tile.m, n) for n in range(number)]


def _gemm_tasks(expert: int, tile: RowTile, config: MoEConfig) -> dict[Task, list[Task]]:
    dispatches = [_dispatch(run.source, expert, config) for run in tile.runs]
    hidden_tiles = _column_tiles(GEMM0, expert, tile, config)
    graph = dict.fromkeys(hidden_tiles, dispatches)
    return graph | dict.fromkeys(_column_tiles(GEMM1, expert, tile, config), hidden_tiles)


def _shared_columns(kind: int, source: int, m: int, config: MoEConfig) -> list[Task]:
    """The tasks of one kind of a row tile of the shared expert."""
    number = shared_tiles_n0(config) if kind == SHARED0 else tiles_n1(config)
    return [Task(kind, source, m=m, n=n) for n in range(number)]


def _shared_tasks(source: int, num_tokens: int, config: MoEConfig) -> dict[Task, list[Task]]:
    graph: dict[Task, list[Task]] = {}
    for m in range(len(shared_row_tiles(num_tokens, config))):
        hidden_tiles = _shared_columns(SHARED0, source, m, config)
        graph |= {task: [] for task in hidden_tiles}
        graph |= dict.fromkeys(_shared_columns(SHARED1, source, m, config), hidden_tiles)
    return graph


def _shared_inputs(source: int, block: int, num_tokens: int, config: MoEConfig) -> list[Task]:
    """The SHARED1 tasks of every row tile with tokens of `block`."""
    tokens = set(range(num_tokens)[block * config.token_block : (block + 1) * config.token_block])
    tiles = [m for m, rows in enumerate(shared_row_tiles(num_tokens, config)) if not tokens.isdisjoint(rows)]
    return [task for m in tiles for task in _shared_columns(SHARED1, source, m, config)]


Tiling = Sequence[Sequence[RowTile]]  # of each expert of the layer
ChunkTiles = dict[tuple[int, int, int], list[RowTile]]  # by source, expert and chunk


def _chunk_tiles(tiles: Tiling, packets: Sequence[Packets], config: MoEConfig) -> ChunkTiles:
    """The row tiles that must be done before the result flag of a chunk is raised: those with rows of it."""
    found: ChunkTiles = {}
    for expert, of_expert in enumerate(tiles):
        for tile in of_expert:
            for run in tile.runs:
                height = chunk_height(int(packets[run.source].sent[expert]), config)
                for m in range(run.first // height, run.slots[-1] // height + 1):
                    found.setdefault((run.source, expert, m), []).append(tile)
    return found


def _combine_inputs(packet: Packets, source: int, block: int, needed: ChunkTiles, config: MoEConfig) -> list[Task]:
    """The GEMM1 tasks of every row tile with rows of a chunk that holds a row of a token of `block`."""
    tokens = slice(block * config.token_block, (block + 1) * config.token_block)
    pairs = zip(packet.topk_idx[tokens].ravel().tolist(), packet.slot[tokens].ravel().tolist(), strict=True)
    rows = [(expert, slot) for expert, slot in pairs if slot >= 0]
    heights = {expert: chunk_height(int(packet.sent[expert]), config) for expert, _ in rows}
    chunks = sorted({(expert, slot // heights[expert]) for expert, slot in rows})
    tiles = dict.fromkeys((expert, tile) for expert, m in chunks for tile in needed[source, expert, m])
    return [task for expert, tile in tiles for task in _column_tiles(GEMM1, expert, tile, config)]
