"""The tile tasks of a backward and what each must wait for, and the rows that they store at peers.

The kinds of a forward (`tiles`) are here what gives their gradients, and wait for the same; but there is one GATE on a
rank, as the routing is known:

    DISPATCH(rank, peer, expert)           store the packet's rows of dy, their factors, and if need be the rows again
    GEMM0(rank, peer, expert, m, n)        column tile n of gradients of hidden rows, by the down matrices
    GEMM1(rank, peer, expert, m, n)        column tile n of rows of dx, by the up matrices, each stored at its source
    COMBINE(rank, m)                       dx of token block m, gradients of its weights and logits
    WEIGHTS(rank, matrix, expert, m, n)    tile (m, n) of the gradient of a matrix of an expert
    ROUTER_WEIGHTS(rank, 0, 0, m, n)       tile of the router's
    SHARED_WEIGHTS(rank, matrix, 0, m, n)  tile of the shared expert's
    NORM_WEIGHTS(rank, 0, 0, 0, n)         column tile of that of result_scale, where results go through a norm

`matrix`, in the place of `peer`, is UP (all up matrices one below the other), DOWN, or of the shared expert GATED, that
of its gate. WEIGHTS wait for all packets of the expert, also the empty ones, which say so, and for all its GEMM0; an
expert without rows has none. ROUTER_WEIGHTS wait for all COMBINEs of the rank, SHARED_WEIGHTS for all its SHARED0, and
NORM_WEIGHTS for all its DISPATCHes, which go back through the norm.

What a forward has kept (`layout.SAVES`) changes what tasks compute and store, and not what they wait for. Leaves out:
gradients that nobody wants, which have no tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .config import MoEConfig
from .layout import AGAIN, DISPATCH, DOTS, FACTORS, RESULT, SAVES, Write
from .packets import Packets
from .runs import expert_tiles
from .scalars import check_one_of
from .task_kinds import COMBINE, GATE, GEMM0, NORM_WEIGHTS, ROUTER_WEIGHTS, SHARED0, SHARED_WEIGHTS, WEIGHTS
from .task_kinds import DISPATCH as DISPATCHED
from .tiles import Task, Tiling, task_graph

UP, DOWN, GATED = range(3)
Tile = tuple[int, int]  # rows and columns
GRADIENT_TILE = (256, 256)  # of the gradient of a matrix, as kernels have it (tile_gemm/gradients.py)


def backward_task_graph(
    packets: Sequence[Packets],
    config: MoEConfig,
    tiles: Tiling | None = None,
    *,
    routed: bool = False,
    gradient_tile: Tile = GRADIENT_TILE,
) -> dict[Task, list[Task]]:
    """Every task of a backward with the tasks it waits for.

    Args:
        packets: of each source rank, those of the forward.
        tiles: the row tiles of each expert of the layer, such as a run had; None: each packet's own.
        routed: the routing came from outside, so that the router has no gradient.
        gradient_tile: of the gradient of a matrix.
    """
    forward = task_graph(packets, config, tiles)
    graph: dict[Task, list[Task]] = {Task(GATE, rank): [] for rank in range(len(packets))}
    for task, needs in forward.items():
        if task.kind == DISPATCHED:
            graph[task] = [Task(GATE, task.rank)]
        elif task.kind != GATE:
            graph[task] = [need for need in needs if need.kind != GATE or need.m == 0]
    graph |= _expert_weights(graph, packets, config, gradient_tile)
    for rank, packet in enumerate(packets):
        if len(packet.slot):
            graph |= _dense_weights(graph, rank, config, routed, gradient_tile)
    return graph


def _expert_weights(
    graph: dict[Task, list[Task]], packets: Sequence[Packets], config: MoEConfig, tile: Tile
) -> dict[Task, list[Task]]:
    needs: dict[tuple[int, int], list[Task]] = {}
    for task in graph:
        if task.kind == GEMM0:
            needs.setdefault((task.rank, task.expert), []).append(task)
    ups = config.ffn * config.expert_kind.num_ups
    found: dict[Task, list[Task]] = {}
    for (rank, expert), products in needs.items():
        dispatches = [Task(DISPATCHED, source, rank, expert) for source in range(len(packets))]
        for matrix, shape in ((UP, (ups, config.hidden)), (DOWN, (config.hidden, config.ffn))):
            tasks = _gradient_tiles(Task(WEIGHTS, rank, matrix, expert), shape, tile)
            found |= dict.fromkeys(tasks, dispatches + products)
    return found


def _dense_weights(
    graph: dict[Task, list[Task]], rank: int, config: MoEConfig, routed: bool, tile: Tile
) -> dict[Task, list[Task]]:
    """Of the router, the shared expert and the norm of results, on a rank that has tokens."""
    combines, hidden, dispatches = (
        [task for task in graph if (task.kind, task.rank) == (kind, rank)] for kind in (COMBINE, SHARED0, DISPATCHED)
    )
    found: dict[Task, list[Task]] = {}
    shapes: dict[int, Tile] = {}
    if not routed:
        tasks = _gradient_tiles(Task(ROUTER_WEIGHTS, rank), (config.num_choices, config.hidden), tile)
        found = dict.fromkeys(tasks, combines)
    if config.shared_ffn:
        ups = config.shared_ffn * config.shared_kind.num_ups
        shapes = {UP: (ups, config.hidden), DOWN: (config.hidden, config.shared_ffn)}
        shapes |= {GATED: (1, config.hidden)} if config.shared_gate else {}
    if config.expert_kind.norm_eps is not None:
        tasks = _gradient_tiles(Task(NORM_WEIGHTS, rank), (1, config.hidden), tile)
        found |= dict.fromkeys(tasks, dispatches)
    for matrix, shape in shapes.items():
        found |= dict.fromkeys(_gradient_tiles(Task(SHARED_WEIGHTS, rank, matrix), shape, tile), hidden)
    return found


def _gradient_tiles(task: Task, shape: Tile, tile: Tile) -> list[Task]:
    """The task of each tile of a matrix."""
    rows, columns = (range(-(-size // step)) for size, step in zip(shape, tile, strict=True))
    return [task._replace(m=m, n=n) for m in rows for n in columns]


def backward_writes(
    packets: Sequence[Packets], config: MoEConfig, tiles: Tiling | None = None, save: str = SAVES[0]
) -> Iterator[Write]:
    """Every row that a backward stores into a peer's segment; a row of dx counts once, whatever its column tiles.

    Args:
        save: what the forward has kept.

    Raises:
        ValueError: there is no such `save`.
    """
    check_one_of("save", save, SAVES)
    sent = (DISPATCH, FACTORS, AGAIN) if save == "nothing" else (DISPATCH, FACTORS)
    for source, packet in enumerate(packets):
        for expert, rows in enumerate(packet.sent.tolist()):
            owner, local = divmod(expert, config.num_experts_per_rank)
            for slot in range(rows):
                yield from (Write(source, owner, round, source, local, slot) for round in sent)
    for expert, of_expert in enumerate(expert_tiles(packets, config) if tiles is None else tiles):
        owner, local = divmod(expert, config.num_experts_per_rank)
        for run in (run for tile in of_expert for run in tile.runs):
            for slot in run.slots:
                yield from (Write(owner, run.source, round, owner, local, slot) for round in (RESULT, DOTS))
