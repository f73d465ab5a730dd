"""FlashMoE's tiles packed as rows arrive: in the finished schedule the rule holds, and what follows from it."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from policy_worlds import kind_nodes, on_few_sms, run_policy, small_world
from ticking import Ticking

from sim.drafting.blocks import ladder
from sim.drafting.cuts import Cut, as_if_at_once
from sim.drafting.owner import Packet, Rules, Work
from sim.engine.graph import NONE
from sim.engine.kinds import COMBINE, GEMM0, GEMM1, JOIN, RECEIVE, SEND
from sim.policies import flashmoe, make_knobs
from sim.simulation import simulate

SCHEDULE_NS, POLL_NS = 10, 300
KNOBS = dict(
    packing="arrived", tile_m=16, tile_n=64, settle_ns=500, tile_latency_ns=700, schedule_ns=SCHEDULE_NS,
    poll_ns=POLL_NS,
)  # fmt: skip
few, backward = partial(on_few_sms, sms=5), partial(replace, passes="backward")
BUSY = {  # processors have more than they can do for a while
    "uniform": (few(small_world("uniform")), {}),
    "zipf": (few(small_world("zipf:1.2", num_experts=12)), {}),
    "top-1": (few(small_world(num_topk=1, gated=False)), {"settle_ns": 0}),
    "two nodes": (few(small_world(hardware="2x2xH100")), {"ladder": True}),
    "few tokens": (on_few_sms(small_world(num_tokens=9), 40), {"tile_m": 64}),
    "k = E": (few(small_world(num_topk=8, num_tokens=33)), {"settle_ns": 50_000}),
    "no gate": (few(small_world("hot", num_tokens=30)), {"gate": False, "row_unit": 6}),
    "silent rank": (few(small_world(silent_ranks=(1,))), {}),
    "backward": (few(backward(small_world())), {}),
    "a backward of few tokens": (on_few_sms(backward(small_world(num_tokens=9)), 40), {"tile_m": 64}),
}


class Tile:
    """A row tile as the graph has it: its expert here, rows, nodes, the packets that it waits for, its JOIN if any."""

    def __init__(self, graph, world, node):
        nodes, before = graph.nodes, graph.predecessors(node)
        kind = nodes["kind"][before]
        ups = 2 if world.config.gated and world.passes == "forward" else 1
        per_row = 2 * world.config.hidden * world.config.ffn * ups
        self.expert = int(nodes["expert"][node])
        self.rows = round(float(nodes["useful_flops"][node] * nodes["count"][node]) / per_row)
        self.up = node
        after = graph.successors(node)
        [self.down] = after[nodes["kind"][after] == GEMM1]
        self.packets = before[kind == RECEIVE]
        self.held = before[kind == JOIN]
        assert len(self.held) <= 1 and len(self.packets) + len(self.held) == len(before)


def tiles_of(graph, world, rank):
    return [Tile(graph, world, node) for node in kind_nodes(graph, GEMM0, rank).tolist()]


def cut_of(tile, timeline):
    """As the timeline has it."""
    waited = timeline.ready_ns[tile.up] - timeline.done_ns[tile.packets].max()
    return Cut(tile.expert, tile.rows, int(waited) if len(tile.held) else NONE)


def load_of(graph, timeline, world, rank, tiles, knobs):
    """(packets, other work, rules) of a rank, as the timeline has them."""
    nodes = graph.nodes
    packets = []
    for node in kind_nodes(graph, RECEIVE, rank).tolist():
        source, expert = int(nodes["peer"][node]), int(nodes["expert"][node])
        rows = int(world.routing.counts[source, rank * world.experts_per_rank + expert])
        packets.append(Packet(int(timeline.start_ns[node]) + POLL_NS, source, expert, rows))
    [server] = [i for i, s in enumerate(graph.servers) if s.name == "SM slots" and s.rank == rank]
    mine = np.flatnonzero((nodes["server"] == server) & ~np.isin(nodes["kind"], (GEMM0, GEMM1)))
    fields = timeline.ready_ns, nodes["priority"], nodes["count"], nodes["duration_ns"]
    others = [Work(*(int(values[node]) for values in fields)) for node in mine.tolist()]
    tile_ns = tuple([{} for _ in range(world.experts_per_rank)] for _ in range(2))
    for tile in tiles:
        for of_product, node in zip(tile_ns, (tile.up, tile.down), strict=True):
            of_product[tile.expert][tile.rows] = int(nodes["duration_ns"][node])
    columns = tuple(int(nodes["count"][node]) for node in ((tiles[0].up, tiles[0].down) if tiles else (0, 0)))
    rules = Rules(
        slots=graph.servers[server].slots,
        tile_m=knobs["tile_m"],
        tiles=columns,
        tile_ns=tile_ns,
        poll_ns=POLL_NS,
        settle_ns=knobs["settle_ns"],
        hand_ns=sum(columns) * SCHEDULE_NS,
    )
    return sorted(packets), others, rules


@pytest.mark.parametrize("name", BUSY)
def test_tiles_are_cut_in_the_schedule_when_the_rule_says_so(name):
    """Arrivals and durations of the finished timeline, the rule by another machine: the same tiles at the same time."""
    world, changes = BUSY[name]
    knobs = KNOBS | changes
    graph, timeline = run_policy("flashmoe", world, **knobs)
    for rank in range(world.num_ranks):
        tiles = tiles_of(graph, world, rank)
        found = Ticking(*load_of(graph, timeline, world, rank, tiles, knobs)).run()
        assert sorted(cut_of(tile, timeline) for tile in tiles) == sorted(found), f"rank {rank}"


def rows_of_tiles(graph, timeline, world):
    """{(expert, source, slot): the GEMM1 node of its tile}, one row after the other as packets came."""
    found = {}
    for rank in range(world.num_ranks):
        waiting = {}
        received = kind_nodes(graph, RECEIVE, rank)
        for node in received[np.argsort(timeline.done_ns[received], kind="stable")].tolist():
            source, local = int(graph.nodes["peer"][node]), int(graph.nodes["expert"][node])
            expert = rank * world.experts_per_rank + local
            slots = range(world.routing.counts[source, expert])
            waiting.setdefault(local, []).extend((expert, source, slot) for slot in slots)
        for tile in tiles_of(graph, world, rank):  # an expert's in the order of its stream
            rows, waiting[tile.expert] = waiting[tile.expert][: tile.rows], waiting[tile.expert][tile.rows :]
            found |= dict.fromkeys(rows, tile.down)
        assert not any(waiting.values())
    return found


@pytest.mark.parametrize("name", ["uniform", "few tokens", "k = E", "silent rank"])
def test_a_combine_waits_for_all_tiles_with_its_rows_and_for_few_others(name):
    """Those of the chunks that its rows are in, told when all their rows are stored."""
    world, changes = BUSY[name]
    graph, timeline = run_policy("flashmoe", world, **KNOBS | changes, token_block=5)
    tile_of = rows_of_tiles(graph, timeline, world)
    height = (KNOBS | changes)["tile_m"]
    chunk_of = ladder(world.routing.counts, 16, height)
    for node in kind_nodes(graph, COMBINE).tolist():
        rank, block = int(graph.nodes["rank"][node]), int(graph.nodes["m"][node])
        needed, told = set(), set()
        slots = Counter()
        for token, experts in enumerate(world.routing.topk_idx[rank].tolist()):
            for expert in (expert for expert in experts if expert >= 0):
                if token // 5 == block:
                    needed.add(tile_of[expert, rank, slots[expert]])
                    chunk = slots[expert] // chunk_of[rank, expert] * chunk_of[rank, expert]
                    ends = min(chunk + chunk_of[rank, expert], world.routing.counts[rank, expert])
                    told |= {tile_of[expert, rank, slot] for slot in range(chunk, ends)}
                slots[expert] += 1
        found = results_before(graph, node)
        assert needed <= found and found == told


def results_before(graph, node):
    """The GEMM1 nodes that a node waits for, directly or by way of JOIN and SEND."""
    found = set()
    for before in graph.predecessors(node).tolist():
        kind = graph.nodes["kind"][before]
        found |= {before} if kind == GEMM1 else results_before(graph, before) if kind in (JOIN, SEND) else set()
    return found


def kinds_of_tiles():
    """How many tiles of each kind these worlds have: mixed, full, rests cut on idleness and rests cut by a packet."""
    number = Counter()
    for world, changes in BUSY.values():
        graph, _ = run_policy("flashmoe", world, **KNOBS | changes)
        for rank in range(world.num_ranks):
            for tile in tiles_of(graph, world, rank):
                number["mixed"] += len(tile.packets) > 1
                full = tile.rows == (KNOBS | changes)["tile_m"]
                number["full" if full else "idle" if len(tile.held) else "last"] += 1
    return number


def test_all_kinds_of_tiles_occur_in_these_worlds():
    number = kinds_of_tiles()
    assert min(number[kind] for kind in ("mixed", "full", "idle", "last")) > 10, number


@pytest.mark.parametrize("knobs", [{}, {"tile_m": 16}, {"tile_m": 16, "ladder": True, "row_unit": 6}])
def test_on_one_rank_every_packet_is_an_experts_last(knobs):
    world = small_world("zipf:1.2", num_ranks=1)
    alone, packed = (
        simulate("flashmoe", world, make_knobs("flashmoe", {"ladder": False} | knobs | {"packing": packing}))
        for packing in ("per_source", "arrived")
    )
    assert packed.latency_us == alone.latency_us
    for kind in (GEMM0, GEMM1):
        times = [np.sort(s.timeline.start_ns[kind_nodes(s.graph, kind)]) for s in (alone, packed)]
        np.testing.assert_array_equal(*times)


def test_the_longer_rows_are_held_back_the_fewer_tiles_there_are():
    world, _ = BUSY["few tokens"]
    number = []
    for settle_ns in (0, 100_000):
        graph, _ = run_policy("flashmoe", world, **KNOBS | {"tile_m": 64, "settle_ns": settle_ns})
        number.append(len(kind_nodes(graph, GEMM0)))
    busy_experts = (world.routing.counts.sum(axis=0) > 0).sum()
    assert number[0] > number[1] == busy_experts


@pytest.mark.parametrize("name", BUSY)
def test_the_packet_that_completes_tiles_pays_for_their_hand_out(name):
    """A rest that goes to an idle processor is handed out on its own."""
    world, changes = BUSY[name]
    graph, timeline = run_policy("flashmoe", world, **KNOBS | changes)
    spent = Counter()
    for rank in range(world.num_ranks):
        for tile in tiles_of(graph, world, rank):
            hand_ns = SCHEDULE_NS * int(graph.nodes["count"][[tile.up, tile.down]].sum())
            if len(tile.held):
                waited = int(graph.nodes["duration_ns"][tile.held[0]])
                assert waited >= (KNOBS | changes)["settle_ns"] + hand_ns
            else:
                spent[int(tile.packets[timeline.done_ns[tile.packets].argmax()])] += hand_ns
    for node in kind_nodes(graph, RECEIVE).tolist():
        assert graph.nodes["duration_ns"][node] == POLL_NS + spent[node]


@pytest.mark.parametrize(
    ("heights", "rounds"), [([16], 1), ([8, 16], 2), ([8, 8], 2), (range(1, 99), flashmoe.MOST_ROUNDS)]
)
def test_rounds_end(heights, rounds, monkeypatch):
    """Where tiles stay the same, go to and fro between two, or are others each time; the first are of 16 rows."""
    world, _ = BUSY["uniform"]
    counts, drawn, heights = world.routing.counts, [], iter(heights)
    order = np.broadcast_to(np.arange(len(counts))[:, None], counts.shape)
    draw = flashmoe._draw
    monkeypatch.setattr(flashmoe, "_draw", lambda *args: drawn.append(args[2]) or draw(*args))
    monkeypatch.setattr(flashmoe, "cuts_of_all", lambda *_: (order, as_if_at_once(counts, next(heights))))
    graph = flashmoe.build(world, make_knobs("flashmoe", KNOBS))
    assert len(drawn) == rounds
    assert len(kind_nodes(graph, GEMM0)) == len(drawn[-1][0].expert)
