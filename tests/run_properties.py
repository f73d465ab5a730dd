"""What must hold in every run of a world, by other means than the explorer's own checks.

Each property asserts one thing of a `WatchedRun` that has ended: it compares what was heard, and what each call left
behind, with sums over the reference's packets.
"""

from collections import Counter

import numpy as np
from cases import assert_equals_oracle, assert_same_bits

from flashmoe_numba.explore.run.cells import COUNTERS
from flashmoe_numba.kernel.control import PROGRESS
from flashmoe_numba.kernel.queue import COUNTER_STRIDE, NUM_COUNTERS
from flashmoe_numba.kernel.row_tiles import QUEUED, SEEN, STREAM_WORDS, TILES, WAITING
from reference import GATE, Layout, make_plan, tile_height
from reference.task_kinds import GEMM0, GEMM1, KIND_NAMES
from reference.tiles import num_token_blocks, shared_row_tiles, shared_tiles_n0, tiles_n0, tiles_n1


def equals_the_oracle(run):
    for (x, given), calls in zip(run.world.data, run.calls, strict=True):
        external = any(routing is not None for routing in given)
        y, routings = [call.y for call in calls], [call.routing for call in calls]
        if external:
            assert_same_bits([r.topk_idx for r in routings], [r.topk_idx for r in given], "routing")
            assert_same_bits([r.topk_weights for r in routings], [r.topk_weights for r in given], "factors")
        assert_equals_oracle(y, x, run.world.weights, run.config, routings, external)


def combine_is_ordered(run):
    """Bit for bit the sum of the results in the accumulator's type, in the order of choices, rounded once.

    Behind them comes the shared expert's row, and a zero-computation expert has the token itself, or nothing.
    """
    c = run.config
    for call, (calls, packets) in enumerate(zip(run.calls, run.packets, strict=True), start=1):
        for rank, (one, packet) in enumerate(zip(calls, packets, strict=True)):
            sums = np.zeros(one.y.shape, c.accumulator)
            results = one.results.reshape(c.num_experts, c.slots, c.hidden)
            for j in range(c.num_topk):
                kept = packet.slot[:, j] >= 0
                rows = results[one.routing.topk_idx[kept, j], packet.slot[kept, j]].astype(c.accumulator)
                sums[kept] += one.routing.topk_weights[kept, j, None] * rows
                own = one.routing.topk_idx[:, j] >= c.num_experts if c.zero == "identity" else []
                tokens = run.world.data[call - 1][0][rank][own].astype(c.accumulator)
                sums[own] += one.routing.topk_weights[own, j, None] * tokens
            if c.shared_ffn:
                sums += one.factors[:, None] * one.shared.astype(c.accumulator)
            assert_same_bits(one.y, sums.astype(c.numpy_dtype), f"rank {rank}, call {call}")


def every_task_runs_once(run):
    """By the traces; and by kind over all ranks as many as the plan says, but for the tiles, which the run has cut."""
    for call, (calls, packets) in enumerate(zip(run.calls, run.packets, strict=True), start=1):
        tasks = sum((one.tasks for one in calls), Counter())
        assert set(tasks.values()) == {1}, f"call {call}: {[task for task, times in tasks.items() if times != 1]}"
        kinds = Counter(task.kind for task in tasks)
        counts, num_tokens = np.array([packet.counts for packet in packets]), [len(one.y) for one in calls]
        planned = make_plan(run.config, counts, num_tokens).num_tasks
        planned |= {KIND_NAMES[kind]: len(run.row_tiles(calls)) * n for kind, n in _column_tiles(run.config).items()}
        planned[KIND_NAMES[GATE]] += sum(len(one.y) == 0 for one in calls)  # a rank without tokens runs one, too
        assert {name: kinds[kind] for kind, name in enumerate(KIND_NAMES)} == planned, f"call {call}"


def _column_tiles(config):
    return {GEMM0: tiles_n0(config), GEMM1: tiles_n1(config)}


def every_row_is_in_one_tile(run):
    """No tile is too tall, their names are their own, and they are as many as rows that come in any order can make."""
    c = run.config
    for call, (calls, packets) in enumerate(zip(run.calls, run.packets, strict=True), start=1):
        sent = run.sent(packets).reshape(c.num_ranks, c.num_experts)
        rows, names = Counter(), Counter()
        for expert, tile in run.row_tiles(calls):
            rows.update((one.source, expert, slot) for one in tile.runs for slot in one.slots)
            names[tile.peer, expert, tile.m] += 1
            assert 1 <= tile.num_rows <= c.tile_m, f"call {call}, expert {expert}: {tile}"
            assert len(tile.runs) == 1 or run.spec.packing == "sources", f"call {call}, expert {expert}: {tile}"
        wanted = {(s, e, slot) for (s, e), count in np.ndenumerate(sent) for slot in range(count)}
        assert rows == Counter(wanted), f"call {call}: rows (source, expert, slot) {rows}"
        assert set(names.values()) <= {1}, f"call {call}: names (source, expert, m) {names}"
        for e, numbers in enumerate(sent.T.tolist()):
            tiles, most = sum(name[1] == e for name in names), sum(-(-number // c.tile_m) for number in numbers)
            fewest = -(-sum(numbers) // c.tile_m) if run.spec.packing == "sources" else most
            assert fewest <= tiles <= most, f"call {call}, expert {e}: {tiles} tiles of packets of {numbers} rows"


def flags_are_written_once(run):
    """Every flag of each call by its owner, with the right number of rows, which are there at that moment."""
    wanted = {"dispatch": _wanted_packets(run), "result": _wanted_tiles(run)}
    for kind, rows in wanted.items():
        signals = run.story.signals[kind]
        written = Counter((s.writer, s.call, s.reader, s.i, s.word) for s in signals)
        assert written == Counter(rows.keys()), f"{kind} flags (writer, call, reader, index, word): {written}"
        for s in signals:
            assert_same_bits(s.rows, rows[s[:5]], f"{kind} rows when they were signalled, {s[:5]}")


def _wanted_packets(run):
    """Rows of x by (writer, call, reader, index, word) of the packet's signal."""
    c, wanted = run.config, {}
    for call, ((x, _), packets) in enumerate(zip(run.world.data, run.packets, strict=True), start=1):
        for source, packet in enumerate(packets):
            for e, sent in enumerate(packet.sent.tolist()):
                owner, local = divmod(e, c.num_experts_per_rank)
                i = 2 * (source * c.num_experts_per_rank + local) + call % 2
                wanted[source, call, owner, i, call << 32 | sent] = x[source][packet.pairs(e) // c.num_topk]
    return wanted


def _wanted_tiles(run):
    """Rows that the source has at the call's end, by (writer, call, reader, index, word) of the row tile's signal."""
    c, row_blocks, wanted = run.config, Layout(run.config).row_blocks, {}
    for call, (calls, packets) in enumerate(zip(run.calls, run.packets, strict=True), start=1):
        for source, (one, packet) in enumerate(zip(calls, packets, strict=True)):
            results = one.results.reshape(c.num_experts, c.slots, c.hidden)
            for e, sent in enumerate(packet.sent.tolist()):
                height = tile_height(sent, c.tile_m_min, c.tile_m)
                for m, first in enumerate(range(0, sent, height)):
                    rows = results[e, first : min(first + height, sent)]
                    key = c.owner(e), call, source, e * row_blocks + m, call << 32 | len(rows)
                    wanted[key] = rows
    return wanted


def rows_sent_are_received(run):
    for call, (calls, packets) in enumerate(zip(run.calls, run.packets, strict=True), start=1):
        sent, received = run.sent(packets), np.array([one.rows for one in calls])
        np.testing.assert_array_equal(received, sent.transpose(1, 0, 2), f"call {call}: [owner, source, expert]")


def ranks_are_a_call_apart_at_most(run):
    assert run.story.most_apart <= 1, f"{run.story.most_apart} calls apart"


def counters_add_up(run):
    """What each counter holds at the end of each call, from the routing's counts and the number of row tiles."""
    c, progress = run.config, Counter()
    for call, (calls, packets) in enumerate(zip(run.calls, run.packets, strict=True), start=1):
        sent = run.sent(packets)
        for rank, one in enumerate(calls):
            tiles = sum(map(len, one.tiles))
            wanted = _wanted_counters(run, len(one.y), tiles, int(sent[:, rank].sum()))
            words = [(rank, call, "queue.counters", _word(call, counter)) for counter in range(NUM_COUNTERS)]
            got = dict(zip(COUNTERS, [run.story.last.get(word, 0) for word in words], strict=True))
            assert got == wanted, f"rank {rank}, call {call}: {got}, wanted {wanted}"
            places = {place for owner, stamp, place in run.story.stamps if (owner, stamp) == (rank, call)}
            assert places == set(range(wanted["TAIL"])), f"rank {rank}, call {call}: places {sorted(places)}"
            progress[rank] += wanted["TAIL"]
    assert set(run.story.stamps.values()) == {1}, "a place was filled twice in a call"
    done = {rank: int(run.world.ranks[rank].control[PROGRESS]) for rank in range(c.num_ranks)}
    assert done == progress, f"tasks finished {done}, wanted {progress}"


def _wanted_counters(run, num_tokens, num_tiles, num_rows):
    c, token_blocks = run.config, num_token_blocks(num_tokens, run.config)
    gates, gemms = max(1, token_blocks), num_tiles * sum(_column_tiles(c).values())
    shared = len(shared_row_tiles(num_tokens, c)) * (shared_tiles_n0(c) + tiles_n1(c))
    total = gates + c.num_experts + token_blocks + gemms + shared
    return {
        "HEAD": total + run.spec.num_processors,  # each draws one ticket that there is no task for
        "TAIL": total,
        "GATES_DONE": gates,
        "GATE_OPEN": 1,
        "PACKETS_SEEN": c.num_experts,
        "GEMM_TASKS": gemms,
        "HIDDEN_ROWS": num_rows,
        "KEPT_ROWS": 0,  # of calls that have no backward
        "TOTAL": total + 1,
    }


def _word(call, counter):
    return ((call & 1) * NUM_COUNTERS + counter) * COUNTER_STRIDE


def nothing_is_left_over(run):
    """What was finished is zero everywhere, as the other set of counters is; no row waits, no block for a result."""
    for rank in run.world.ranks:
        case = f"rank {rank.rank_idx}"
        for name in ("up_done", "down_done", "chunk_done"):
            assert not getattr(rank.received, name).any(), f"{case}: {name} of what is finished"
        streams = rank.received.streams.reshape(-1, STREAM_WORDS)
        assert (streams[:, SEEN] == run.config.num_ranks).all(), f"{case}: packets of streams {streams}"
        assert not streams[:, WAITING].any(), f"{case}: rows that wait in streams {streams}"
        assert (streams[:, QUEUED] == streams[:, TILES]).all(), f"{case}: tiles of streams {streams}"
        assert not (rank.tokens.shared_up_done.any() or rank.tokens.shared_down_done.any()), f"{case}: of what is done"
        assert not rank.tokens.results_left.any(), f"{case}: results left {rank.tokens.results_left}"
        counters = rank.queue.counters.reshape(2, -1)
        assert not counters[1 - (run.spec.epochs & 1)].any(), f"{case}: counters of the next call"
    left = {key: value for key, value in run.story.last.items() if key[2] == "tokens.needs_left" and value != 0}
    assert not left, f"result tiles that a token block did not get: {left}"


PROPERTIES = (
    equals_the_oracle, combine_is_ordered, every_task_runs_once, every_row_is_in_one_tile, flags_are_written_once,
    rows_sent_are_received, ranks_are_a_call_apart_at_most, counters_add_up, nothing_is_left_over,
)  # fmt: skip


def check_run(run):
    """No report of the explorer, and all properties."""
    assert run.reports == [], "\n".join(map(str, run.reports))
    assert run.ended
    for holds in PROPERTIES:
        holds(run)


def broken(run):
    """Names of the properties that do not hold, of a run that may have been spoilt in any way."""
    return [holds.__name__ for holds in PROPERTIES if not _holds(holds, run)]


def _holds(holds, run):
    try:
        holds(run)
    except Exception:  # an assertion, or values that nothing can be computed from
        return False
    return True
