"""Row blocks cut off streams, against a walk over the rows one by one, and against what `reference` allows."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference import MoEConfig
from reference.runs import RowRun, RowTile, packet_tile_height, result_chunks, tiling_problem
from sim.drafting.blocks import blocks_per_expert, blocks_per_source, ladder
from sim.drafting.cuts import Cut, as_if_at_once, chunk_pieces, cut_blocks

NUM_EXPERTS, TILE_M, TILE_M_MIN = 3, 8, 2
HEIGHT = ladder(np.arange(TILE_M + 1), TILE_M_MIN, TILE_M)


@st.composite
def streams(draw):
    """(counts, order, cuts): any packets in any order, cut anywhere, experts in any order of time."""
    ranks = draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, 11), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS)
    counts = np.array(draw(st.lists(rows, min_size=ranks, max_size=ranks)))
    order = np.array([draw(st.permutations(range(ranks))) for _ in range(NUM_EXPERTS)]).T
    left, cuts = counts.sum(axis=0), []
    while left.any():
        expert = draw(st.sampled_from(np.flatnonzero(left).tolist()))
        cuts.append(Cut(expert, draw(st.integers(1, min(TILE_M, int(left[expert])))), draw(st.integers(-1, 5))))
        left[expert] -= cuts[-1].rows
    return counts, order, cuts


def walk(counts, order, cuts):
    """{(expert, number of the block): [(source, slot), ...]} by taking one row after the other."""
    waiting = {
        expert: [(int(source), slot) for source in order[:, expert] for slot in range(counts[source, expert])]
        for expert in range(NUM_EXPERTS)
    }
    blocks = defaultdict(list)
    for cut in cuts:
        rows, waiting[cut.expert] = waiting[cut.expert][: cut.rows], waiting[cut.expert][cut.rows :]
        blocks[cut.expert].append((rows, cut.held_ns))
    return blocks


def rows_of(blocks):
    """Of each block, its rows by piece: {(source, slot), ...}."""
    found = [set() for _ in blocks.expert]
    pieces = blocks.piece_block, blocks.piece_source, blocks.piece_slot, blocks.piece_rows
    for block, source, slot, rows in zip(*(piece.tolist() for piece in pieces), strict=True):
        found[block] |= {(source, slot + i) for i in range(rows)}
    return found


@given(stream=streams())
def test_blocks_have_the_rows_that_were_cut(stream):
    counts, order, cuts = stream
    blocks = cut_blocks(counts, order, cuts, HEIGHT)
    wanted = [(expert, rows, held) for expert, of in sorted(walk(*stream).items()) for rows, held in of]
    assert blocks.expert.tolist() == [expert for expert, _, _ in wanted]
    assert rows_of(blocks) == [set(rows) for _, rows, _ in wanted]
    assert blocks.rows.tolist() == [len(rows) for _, rows, _ in wanted]
    assert blocks.held_ns.tolist() == [held for _, _, held in wanted]
    assert blocks.first_source.tolist() == [rows[0][0] for _, rows, _ in wanted]
    assert blocks.last_source.tolist() == [rows[-1][0] for _, rows, _ in wanted]
    assert len(blocks.piece_block) == sum(len({source for source, _ in rows}) for _, rows, _ in wanted)


@given(stream=streams())
def test_pieces_of_a_packet_follow_each_other(stream):
    counts, order, cuts = stream
    blocks = cut_blocks(counts, order, cuts, HEIGHT)
    ends = np.append(blocks.piece_start.ravel(), len(blocks.piece_block))
    for packet, (first, end) in enumerate(pairwise(ends.tolist())):
        source, expert = divmod(packet, NUM_EXPERTS)
        assert set(blocks.piece_source[first:end]) <= {source}
        assert set(blocks.expert[blocks.piece_block[first:end]]) <= {expert}
        slots = [s + i for s, n in zip(blocks.piece_slot[first:end], blocks.piece_rows[first:end], strict=True)
                 for i in range(n)]  # fmt: skip
        assert slots == list(range(counts[source, expert]))


@given(stream=streams())
def test_they_are_named_and_padded_as_reference_wants_it(stream):
    counts, order, cuts = stream
    sizes = dict(num_ranks=len(counts), num_experts=NUM_EXPERTS * len(counts), num_topk=1, hidden=8, ffn=8)
    config = MoEConfig(num_tokens=99, tile_m=TILE_M, tile_m_min=TILE_M_MIN, **sizes)
    blocks = cut_blocks(counts, order, cuts, HEIGHT)
    tiles = defaultdict(list)
    for block, rows in enumerate(rows for _, of in sorted(walk(*stream).items()) for rows, _ in of):
        runs = []
        for source in dict.fromkeys(source for source, _ in rows):
            slots = [slot for other, slot in rows if other == source]
            runs.append(RowRun(source, slots[0], len(slots)))
        name = int(blocks.first_source[block]), int(blocks.m[block]), int(blocks.height[block])
        tiles[int(blocks.expert[block])].append(RowTile(*name, tuple(runs)))
    for expert in range(NUM_EXPERTS):
        problem = tiling_problem(tiles[expert], counts[:, expert].tolist(), config)
        assert problem is None or "may begin" in problem  # these rests leave rows behind, the kernel's do not


@given(stream=streams())
def test_a_chunk_waits_for_the_pieces_with_its_rows(stream):
    counts, order, cuts = stream
    sizes = dict(num_ranks=1, num_experts=1, num_topk=1, hidden=8, ffn=8)
    config = MoEConfig(num_tokens=99, tile_m=TILE_M, tile_m_min=TILE_M_MIN, **sizes)
    blocks, chunks = cut_blocks(counts, order, cuts, HEIGHT), blocks_per_source(counts, ladder(counts, 2, TILE_M))
    wanted = set()
    for piece, (block, source) in enumerate(zip(blocks.piece_block, blocks.piece_source, strict=True)):
        expert = blocks.expert[block]
        slots = set(range(blocks.piece_slot[piece], blocks.piece_slot[piece] + blocks.piece_rows[piece]))
        for m, chunk in enumerate(result_chunks(int(counts[source, expert]), config)):
            if slots & set(chunk):
                wanted.add((piece, int(source), int(expert), m))
    named = list(zip(chunks.piece_source.tolist(), chunks.expert[chunks.piece_block].tolist(),
                     chunks.m[chunks.piece_block].tolist(), strict=True))  # fmt: skip
    pairs = zip(*(part.tolist() for part in chunk_pieces(blocks, chunks)), strict=True)
    found = [(piece, *named[chunk]) for piece, chunk in pairs]
    assert len(found) == len(set(found)) and set(found) == wanted


@given(counts=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=3))
def test_streams_of_which_all_is_here_are_cut_as_counts_would_have_it(counts):
    counts = np.array(counts)
    order = np.broadcast_to(np.arange(len(counts))[:, None], counts.shape)
    found = cut_blocks(counts, order, as_if_at_once(counts, TILE_M), HEIGHT)
    wanted = blocks_per_expert(counts, TILE_M)
    for name in ("expert", "rows", "piece_block", "piece_source", "piece_rows", "piece_start"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


def test_height_of_every_number_of_rows():
    config = MoEConfig(num_ranks=1, num_tokens=9, hidden=8, ffn=8, num_experts=1, num_topk=1, tile_m=8, tile_m_min=2)
    assert HEIGHT[1:].tolist() == [packet_tile_height(rows, config) for rows in range(1, TILE_M + 1)]
