"""Row blocks and pieces, against a walk over the rows one by one, and against the tasks of `reference`."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from policy_worlds import small_world

from reference import MoEConfig, make_packets, task_graph
from reference.runs import packet_tile_height
from reference.task_kinds import COMBINE, GEMM0
from sim.drafting.blocks import blocks_per_expert, blocks_per_source, ladder
from sim.world.routing import make_routing

counts_strategy = st.integers(1, 4).flatmap(
    lambda ranks: st.lists(st.lists(st.integers(0, 40), min_size=6, max_size=6), min_size=ranks, max_size=ranks)
)


def walk_packed(counts, height):
    """{(expert, m): {source: rows}} by laying one row after the other."""
    blocks = {}
    for expert in range(counts.shape[1]):
        sources = [source for source in range(len(counts)) for _ in range(counts[source, expert])]
        for row, source in enumerate(sources):
            part = blocks.setdefault((expert, row // height), {})
            part[source] = part.get(source, 0) + 1
    return blocks


def as_dict(blocks):
    found = {}
    for block, source, rows in zip(blocks.piece_block, blocks.piece_source, blocks.piece_rows, strict=True):
        found.setdefault((int(blocks.expert[block]), int(blocks.m[block])), {})[int(source)] = int(rows)
    return found


@given(counts=counts_strategy, height=st.sampled_from([1, 4, 16]))
def test_packed_blocks_are_the_rows_end_to_end(counts, height):
    counts = np.array(counts)
    blocks = blocks_per_expert(counts, height)
    want = walk_packed(counts, height)
    assert as_dict(blocks) == want
    rows = {(int(e), int(m)): int(r) for e, m, r in zip(blocks.expert, blocks.m, blocks.rows, strict=True)}
    assert rows == {key: sum(part.values()) for key, part in want.items()}


@given(counts=counts_strategy)
def test_blocks_per_source_are_cut_from_each_packet(counts):
    counts = np.array(counts)
    heights = ladder(counts, 4, 16)
    blocks = blocks_per_source(counts, heights)
    found = {}
    for block in range(len(blocks.m)):
        packet = (int(blocks.piece_source[block]), int(blocks.expert[block]))
        assert blocks.m[block] == len(found.setdefault(packet, []))
        found[packet].append((int(blocks.rows[block]), int(blocks.height[block])))
    for (source, expert), rows in np.ndenumerate(counts):
        height = heights[source, expert]
        want = [(min(height, rows - start), height) for start in range(0, rows, height)]
        assert found.get((source, expert), []) == want


def test_the_ladder_is_that_of_reference():
    config = MoEConfig(num_ranks=1, num_tokens=300, hidden=8, ffn=8, num_experts=1, num_topk=1)
    rows = np.arange(1, 301)
    assert ladder(rows, 16, 128).tolist() == [packet_tile_height(int(row), config) for row in rows]


def reference_combines(config, routing):
    """{(rank, token block): {(expert, m)}} of the tasks that `reference` makes, and the number of GEMM0 row blocks."""
    packets = [make_packets(topk_idx, config) for topk_idx in routing.topk_idx]
    tasks = task_graph(packets, config)
    combines = {
        (task.rank, task.m): {
            (need.rank * config.num_experts_per_rank + need.expert, need.m) for need in needs if need.kind != 0
        }
        for task, needs in tasks.items()
        if task.kind == COMBINE
    }
    row_blocks = {(t.peer, t.rank * config.num_experts_per_rank + t.expert, t.m) for t in tasks if t.kind == GEMM0}
    return combines, row_blocks


def test_what_combines_wait_for_is_what_reference_says():
    sizes = dict(num_ranks=3, num_tokens=83, hidden=8, ffn=8, num_experts=6, num_topk=2)
    config = MoEConfig(**sizes, tile_m=16, tile_m_min=4, token_block=8)
    routing = make_routing("zipf:1", config)
    blocks = blocks_per_source(routing.counts, ladder(routing.counts, 4, 16))
    want, row_blocks = reference_combines(config, routing)
    assert {
        (int(s), int(e), int(m)) for s, e, m in zip(blocks.piece_source, blocks.expert, blocks.m, strict=True)
    } == row_blocks
    found, pieces = blocks.combine_pieces(routing, 8)
    got = {key: set() for key in want}
    for rank, block, piece in zip(found.rank, found.block, pieces, strict=True):
        index = blocks.piece_block[piece]
        assert blocks.piece_source[piece] == rank
        got[int(rank), int(block)].add((int(blocks.expert[index]), int(blocks.m[index])))
    assert got == want


def test_packed_combines_wait_for_the_pieces_that_hold_their_rows():
    world = small_world("zipf:1")
    routing = world.routing
    height = 16
    blocks = blocks_per_expert(routing.counts, height)
    found, pieces = blocks.combine_pieces(routing, 8)
    got = set(zip(found.rank.tolist(), found.block.tolist(), pieces.tolist(), strict=True))
    first = np.cumsum(routing.counts, axis=0) - routing.counts
    slots = np.zeros(routing.counts.shape, int)
    want = set()
    piece_of = {
        (int(s), int(blocks.expert[b]), int(blocks.m[b])): piece
        for piece, (s, b) in enumerate(zip(blocks.piece_source, blocks.piece_block, strict=True))
    }
    for rank, choices in enumerate(routing.topk_idx):
        for token, experts in enumerate(choices):
            for expert in experts:
                row = first[rank, expert] + slots[rank, expert]
                slots[rank, expert] += 1
                want.add((rank, token // 8, piece_of[rank, int(expert), row // height]))
    assert got == want
