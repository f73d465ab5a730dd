"""Planted bugs: small, realistic faults of the kernel, each one edit of its source, that the tools must find.

`planted(PLANTS[name])` makes the interpreted kernel one with that fault in it. An edit has to fit exactly one place, so
that a plant cannot outlive the code it was made for.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..device.compilation import PACKAGE, load_interpreted
from .worlds import PLAIN

KERNEL = PACKAGE / "kernel"
INTERPRETED = "flashmoe_numba.kernel_interpreted"  # where device.compilation.interpreted looks first

WRONG_RESULT, RACE, DEADLOCK, OUT_OF_BOUNDS = "wrong result", "race", "deadlock", "out of bounds"
POISON, CONFLICT, COUNT, BLAME = "poison", "conflict", "count", "blame"


@dataclass(frozen=True)
class Plant:
    """One fault.

    Args:
        name: for `--plant`.
        summary: one line.
        file, old, new: in `flashmoe_numba/kernel/file`, `old` becomes `new`.
        found_by: the kinds of report (reports.KINDS) that it was found by, the most frequent one first. Which one comes
            first in a run depends on the world and the schedule.
        weak: it shows only where loads of atomic words may be late (run/words.py).
        world: one of worlds.WORLDS in which it is found, under the random strategy or PCT.
    """

    name: str
    summary: str
    file: str
    old: str
    new: str
    found_by: tuple[str, ...]
    weak: bool = False
    world: str = PLAIN


@contextlib.contextmanager
def planted(plant: Plant) -> Iterator[ModuleType]:
    """The interpreted kernel, everywhere in this process, is an edited copy; afterwards it is what it was.

    Raises:
        ValueError: the edit does not fit exactly one place.
    """
    with tempfile.TemporaryDirectory(prefix="flashmoe-plant-") as temporary, _without_the_interpreted_kernel():
        folder = Path(temporary) / "kernel"
        shutil.copytree(KERNEL, folder, ignore=shutil.ignore_patterns("__pycache__"))
        _edit(folder / plant.file, plant)
        yield load_interpreted(folder, INTERPRETED)


def _edit(file: Path, plant: Plant) -> None:
    source = file.read_text(encoding="utf-8")
    places = source.count(plant.old)
    if places != 1:
        raise ValueError(f"plant {plant.name} must fit one place of {plant.file}, but {plant.old!r} is there {places}x")
    file.write_text(source.replace(plant.old, plant.new), encoding="utf-8")


@contextlib.contextmanager
def _without_the_interpreted_kernel() -> Iterator[None]:
    """Take its modules away, and bring them back in the end in place of those that came meanwhile."""
    before = _take_modules()
    try:
        yield
    finally:
        _take_modules()
        sys.modules.update(before)


def _take_modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if f"{name}.".startswith(f"{INTERPRETED}.")]
    return {name: sys.modules.pop(name) for name in names}


_ALL = (
    # Signals without release or acquire: the plain access orders nothing, which an interleaving cannot show.
    Plant(
        "dispatch-not-released",
        "a packet's signal is a plain store",
        "peers.py",
        "    st_release(flags, packet, signal_word(p.epoch, num_rows))",
        "    flags[packet] = signal_word(p.epoch, num_rows)",
        (RACE,),
    ),
    Plant(
        "result-not-released",
        "a result tile's signal is a plain store",
        "peers.py",
        "    st_release(flags, e * p.row_blocks + m, signal_word(p.epoch, num_rows))",
        "    flags[e * p.row_blocks + m] = signal_word(p.epoch, num_rows)",
        (RACE,),
    ),
    Plant(
        "task-not-released",
        "a task's stamp is a plain store",
        "queue.py",
        "    st_release(queue.tasks, at + STAMP, p.epoch)",
        "    queue.tasks[at + STAMP] = p.epoch",
        (RACE,),
    ),
    Plant(
        "gate-not-released",
        "the word that opens the gate is a plain store",
        "gate.py",
        "        st_release(queue.counters, counter(p, GATE_OPEN), 1)",
        "        queue.counters[counter(p, GATE_OPEN)] = 1",
        (RACE,),
    ),
    Plant(
        "dispatch-not-acquired",
        "a packet's signal is read by a plain load",
        "subscriber.py",
        "word = ld_acquire(segments.dispatch_flag, packet)",
        "word = segments.dispatch_flag[packet]",
        (RACE,),
    ),
    Plant(
        "dispatch-acquired-relaxed",
        "a packet's signal is read by a relaxed load",
        "subscriber.py",
        "word = ld_acquire(segments.dispatch_flag, packet)",
        "word = ld_relaxed(segments.dispatch_flag, packet)",
        (RACE,),
    ),
    Plant(
        "result-not-acquired",
        "a result tile's signal is polled, and not acquired",
        "subscriber.py",
        "                    ld_acquire(segments.result_flag, i)\n",
        "",
        (RACE,),
    ),
    Plant(
        "task-not-acquired",
        "a task's stamp is read by a plain load",
        "processor.py",
        "ld_acquire(queue.tasks, stamp_at) != p.epoch",
        "queue.tasks[stamp_at] != p.epoch",
        (RACE,),
    ),
    Plant(
        "gate-not-acquired",
        "the word that opens the gate is read by a relaxed load",
        "subscriber.py",
        "ld_acquire(queue.counters, counter(p, GATE_OPEN)) != 0",
        "ld_relaxed(queue.counters, counter(p, GATE_OPEN)) != 0",
        (RACE,),
    ),
    # Block barriers
    Plant(
        "no-barrier-after-logits",
        "tokens choose experts before all lanes have made logits",
        "router.py",
        "    compute_logits(p, tokens, experts, scratch, first, rows)\n    block_sync()\n",
        "    compute_logits(p, tokens, experts, scratch, first, rows)\n",
        (WRONG_RESULT, POISON, RACE),
    ),
    Plant(
        "no-barrier-before-dispatch-signal",
        "a packet is signalled before all lanes have copied",
        "dispatch.py",
        "    block_sync()\n    if lane() == 0:\n        tell_packet",
        "    if lane() == 0:\n        tell_packet",
        (RACE, WRONG_RESULT),
    ),
    Plant(
        "no-barrier-before-gate-opens",
        "the gate opens before all lanes have counted the tiles of their token blocks",
        "gate.py",
        "    block_sync()\n    if lane() == 0:\n        first",
        "    if lane() == 0:\n        first",
        (RACE, COUNT, POISON, WRONG_RESULT, OUT_OF_BOUNDS),
    ),
    Plant(
        "no-barrier-before-gates-done",
        "a token block counts as routed before all lanes have sorted its pairs",
        "gate.py",
        "    block_sync()\n    if lane() == 0:\n        done = ",
        "    if lane() == 0:\n        done = ",
        (RACE, POISON, WRONG_RESULT, COUNT, DEADLOCK),
        world="alone",
    ),
    Plant(
        "no-barrier-after-gemm0",
        "a down projection begins before all lanes have multiplied",
        "gemms.py",
        "    block_sync()\n    if lane() == 0 and finished_last(received.up_done",
        "    if lane() == 0 and finished_last(received.up_done",
        (RACE, WRONG_RESULT),
        world="grid",
    ),
    Plant(
        "no-barrier-before-result-signal",
        "a result tile is signalled before all lanes have multiplied",
        "gemms.py",
        "    block_sync()\n    if lane() == 0 and finished_last(received.down_done",
        "    if lane() == 0 and finished_last(received.down_done",
        (RACE, WRONG_RESULT, POISON),
    ),
    Plant(
        "no-barrier-after-ticket",
        "lanes run the task of the block's last ticket",
        "processor.py",
        "    block_sync()\n    return box[PLACE]",
        "    return box[PLACE]",
        (RACE, DEADLOCK, POISON, WRONG_RESULT, COUNT),
    ),
    Plant(
        "no-barrier-before-ticket",
        "the next ticket overwrites one that slower lanes have not read",
        "processor.py",
        "    block_sync()\n    if lane() == 0:\n        box[PLACE]",
        "    if lane() == 0:\n        box[PLACE]",
        (RACE, WRONG_RESULT),
    ),
    Plant(
        "no-barrier-before-next-epoch",
        "a grid's epoch counts up before all lanes of the last block have left",
        "grid.py",
        "    block_sync()\n    if lane() == 0 and fetch_add(r.left",
        "    if lane() == 0 and fetch_add(r.left",
        (RACE, DEADLOCK),
        world="grid",
    ),
    # Order
    Plant(
        "task-before-its-fields",
        "a task is published before its fields are written",
        "queue.py",
        "    queue.tasks[at + KIND] = task.kind\n",
        "    st_release(queue.tasks, at + STAMP, p.epoch)\n    queue.tasks[at + KIND] = task.kind\n",
        (RACE, DEADLOCK, COUNT, WRONG_RESULT, CONFLICT, POISON),
    ),
    Plant(
        "signal-before-data",
        "a packet is signalled before its rows are stored",
        "dispatch.py",
        """\
    for b in range(num_token_blocks(p)):
        i = b * p.num_experts + e
        slot = tokens.bases[i]
        first = b * p.token_block * p.num_topk + tokens.starts[i]
        for pair in range(first, first + min(tokens.counts[i], p.slots - slot)):
            token = tokens.order[pair] // p.num_topk
            copy_row(room, (packet * p.slots + slot) * p.hidden, tokens.x, token * p.hidden, p.hidden)
            slot += 1
    block_sync()
    if lane() == 0:
        tell_packet(p, segments, owner, packet, tokens.sent[e])
""",
        """\
    if lane() == 0:
        tell_packet(p, segments, owner, packet, tokens.sent[e])
    for b in range(num_token_blocks(p)):
        i = b * p.num_experts + e
        slot = tokens.bases[i]
        first = b * p.token_block * p.num_topk + tokens.starts[i]
        for pair in range(first, first + min(tokens.counts[i], p.slots - slot)):
            token = tokens.order[pair] // p.num_topk
            copy_row(room, (packet * p.slots + slot) * p.hidden, tokens.x, token * p.hidden, p.hidden)
            slot += 1
""",
        (RACE, POISON, WRONG_RESULT),
    ),
    Plant(
        "gemm1-early",
        "the last GEMM0 of a row tile to begin, not to end, queues its GEMM1",
        "gemms.py",
        """\
    tile_gemm(
        received.hidden, received.first_row[packet] + first,
        segments.dispatch, packet * p.slots + first, rows, experts.up, expert, task.n, p.activation, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0 and finished_last(received.up_done, packet * p.row_blocks + m, up_tiles(p)):
        place = reserve(p, queue, down_tiles(p))
        for n in range(down_tiles(p)):
            fill(p, queue, place + n, QueueTask(GEMM1, source, expert, m, n))
""",
        """\
    if lane() == 0 and finished_last(received.up_done, packet * p.row_blocks + m, up_tiles(p)):
        place = reserve(p, queue, down_tiles(p))
        for n in range(down_tiles(p)):
            fill(p, queue, place + n, QueueTask(GEMM1, source, expert, m, n))
    tile_gemm(
        received.hidden, received.first_row[packet] + first,
        segments.dispatch, packet * p.slots + first, rows, experts.up, expert, task.n, p.activation, scratch,
    )  # fmt: skip
""",
        (RACE, WRONG_RESULT, POISON),
        world="drops",
    ),
    Plant(
        "combine-early",
        "a token block is combined one result tile early",
        "gate.py",
        "    return tiles\n",
        "    return max(tiles - 1, min(tiles, 1))\n",
        (RACE, WRONG_RESULT, POISON),
    ),
    # Who writes what where
    Plant(
        "slot-twice",
        "two rows of a packet share a slot",
        "dispatch.py",
        "copy_row(room, (packet * p.slots + slot)",
        "copy_row(room, (packet * p.slots + max(slot - 1, 0))",
        (CONFLICT, WRONG_RESULT, POISON),
    ),
    Plant(
        "slot-off-by-one",
        "rows go one slot too far",
        "dispatch.py",
        "copy_row(room, (packet * p.slots + slot)",
        "copy_row(room, (packet * p.slots + slot + 1)",
        (POISON, WRONG_RESULT, CONFLICT, OUT_OF_BOUNDS, RACE),
    ),
    Plant(
        "two-writers",
        "rows of all sources go to the region of source 0",
        "dispatch.py",
        "copy_row(room, (packet * p.slots + slot)",
        "copy_row(room, (expert * p.slots + slot)",
        (CONFLICT, WRONG_RESULT, POISON, RACE),
    ),
    Plant(
        "wrong-source-region",
        "packets go to the region of their owner, not of their source",
        "dispatch.py",
        "packet = p.rank_idx * p.experts_per_rank + expert",
        "packet = owner * p.experts_per_rank + expert",
        (CONFLICT, DEADLOCK, RACE, POISON),
    ),
    Plant(
        "expert-forgotten",
        "all packets of a source go to its first expert's region",
        "dispatch.py",
        "packet = p.rank_idx * p.experts_per_rank + expert",
        "packet = p.rank_idx * p.experts_per_rank",
        (CONFLICT, DEADLOCK, RACE),
    ),
    Plant(
        "capacity-ignored",
        "rows beyond the capacity are sent",
        "dispatch.py",
        "min(tokens.counts[i], p.slots - slot)",
        "tokens.counts[i]",
        (CONFLICT, WRONG_RESULT, RACE, OUT_OF_BOUNDS),
        world="drops",
    ),
    Plant(
        "no-choice-has-a-place",
        "a choice of no expert is counted and given a place like any other",
        "gate.py",
        "if e >= 0 and e % lanes() == lane():",
        "if e % lanes() == lane():",
        (RACE, OUT_OF_BOUNDS),
        world="drops",
    ),
    Plant(
        "bases-at-zero",
        "slots of every token block begin at 0",
        "gate.py",
        "+ e] = slot\n",
        "+ e] = 0\n",
        (CONFLICT, POISON, DEADLOCK, RACE, WRONG_RESULT),
    ),
    Plant(
        "hidden-rows-shared",
        "hidden rows of all packets lie in one place",
        "subscriber.py",
        "received.first_row[packet] = fetch_add",
        "received.first_row[packet] = 0 * fetch_add",
        (WRONG_RESULT, RACE),
    ),
    # Epochs
    Plant(
        "epoch-not-compared",
        "a packet's signal of any earlier call is taken",
        "subscriber.py",
        ", packet)) >= p.epoch",
        ", packet)) > 0",
        (DEADLOCK,),
    ),
    Plant(
        "result-epoch-not-compared",
        "a result tile's signal of any earlier call is taken",
        "subscriber.py",
        ", i)) == p.epoch",
        ", i)) > 0",
        (WRONG_RESULT, RACE, POISON),
    ),
    Plant(
        "stale-epoch-accepted",
        "a result tile's signal of the call before is taken",
        "subscriber.py",
        ", i)) == p.epoch",
        ", i)) >= p.epoch - 1",
        (WRONG_RESULT, POISON, RACE),
    ),
    Plant(
        "stale-task-accepted",
        "a place of the queue that an earlier call filled is taken",
        "processor.py",
        "ld_acquire(queue.tasks, stamp_at) != p.epoch",
        "ld_acquire(queue.tasks, stamp_at) == 0",
        (RACE, DEADLOCK, CONFLICT, WRONG_RESULT, COUNT, POISON),
    ),
    Plant(
        "overtaken-signal-used",
        "a peer one epoch ahead overwrites an empty packet's signal, and its rows count for this epoch",
        "subscriber.py",
        "rows = word_rows(word) if word_epoch(word) == p.epoch else 0",
        "rows = word_rows(word)",
        (COUNT,),
        world="far ahead",
    ),
    Plant(
        "overtaken-signal-missed",
        "a peer one epoch ahead overwrites an empty packet's signal, which is then waited for",
        "subscriber.py",
        ", packet)) >= p.epoch",
        ", packet)) == p.epoch",
        (DEADLOCK,),
        world="far ahead",
    ),
    Plant(
        "rows-remembered",
        "rows of an earlier call's packet are remembered where this call's is empty",
        "subscriber.py",
        "    received.rows[packet] = rows\n",
        "    if rows > 0:\n        received.rows[packet] = rows\n",
        (COUNT, WRONG_RESULT),
    ),
    Plant(
        "counters-not-zeroed",
        "the counters of a call begin where those of the last but one ended",
        "subscriber.py",
        "        zero_next_counters(p, queue)\n",
        "",
        (OUT_OF_BOUNDS, WRONG_RESULT, DEADLOCK),
    ),
    # Signals that are not set, counts that are wrong
    Plant(
        "empty-packet-not-signalled",
        "an empty packet sets no signal",
        "dispatch.py",
        "    if lane() == 0:\n",
        "    if lane() == 0 and tokens.sent[e] > 0:\n",
        (DEADLOCK,),
    ),
    Plant(
        "later-row-tiles-not-signalled",
        "only the first row tile of a packet is signalled",
        "gemms.py",
        "        tell_results(p, segments, source, e, m, rows)",
        "        if m == 0:\n            tell_results(p, segments, source, e, m, rows)",
        (DEADLOCK,),
        world="tall packets",
    ),
    Plant(
        "counter-decremented-twice",
        "a result tile counts down its token block by two",
        "subscriber.py",
        "fetch_add(tokens.tiles_left, b, -1) == 1",
        "fetch_add(tokens.tiles_left, b, -2) == 1",
        (DEADLOCK, RACE, POISON, WRONG_RESULT),
    ),
    Plant(
        "result-counted-twice",
        "a result tile counts as two of its expert's",
        "subscriber.py",
        "tokens.results_left[e] -= 1",
        "tokens.results_left[e] -= 2",
        (DEADLOCK,),
        world="tall packets",
    ),
    Plant(
        "last-finisher-early",
        "the last but one tile finished is taken for the last",
        "gemms.py",
        "fetch_add(done, i, 1) + 1 <",
        "fetch_add(done, i, 1) + 2 <",
        (CONFLICT, RACE, COUNT, OUT_OF_BOUNDS, WRONG_RESULT, POISON),
    ),
    Plant(
        "last-finisher-late",
        "one more finished tile is waited for than there are",
        "gemms.py",
        "fetch_add(done, i, 1) + 1 <",
        "fetch_add(done, i, 1) <",
        (DEADLOCK,),
    ),
    Plant(
        "finished-tiles-not-reset",
        "the last finisher leaves its counter as it is",
        "gemms.py",
        "    done[i] = 0\n",
        "",
        (CONFLICT, COUNT, RACE, OUT_OF_BOUNDS, WRONG_RESULT, POISON),
    ),
    Plant(
        "one-token-block-too-many",
        "a result tile counts for one token block too many",
        "subscriber.py",
        "+ e] < end:",
        "+ e] <= end:",
        (RACE, WRONG_RESULT, POISON),
        world="tall packets",
    ),
    Plant(
        "one-token-block-too-early",
        "a result tile counts from one token block too early",
        "subscriber.py",
        "middle * p.num_experts + e] <= slot",
        "middle * p.num_experts + e] < slot",
        (RACE, WRONG_RESULT, POISON),
        world="tall packets",
    ),
    Plant(
        "dropped-block-not-combined",
        "a token block that lost all its rows is never combined",
        "gate.py",
        "if tokens.tiles_left[b] == 0:",
        "if tokens.tiles_left[b] < 0:",
        (DEADLOCK,),
        world="drops",
    ),
    # The queue and its end
    Plant(
        "ticket-twice",
        "two processors may draw one ticket",
        "processor.py",
        "    place = fetch_add(queue.counters, counter(p, HEAD), 1)\n",
        "    place = ld_acquire(queue.counters, counter(p, HEAD))\n"
        "    st_release(queue.counters, counter(p, HEAD), place + 1)\n",
        (COUNT, RACE, CONFLICT, WRONG_RESULT, POISON, OUT_OF_BOUNDS, DEADLOCK),
    ),
    Plant(
        "place-twice",
        "two tasks may be given one place of the queue",
        "queue.py",
        "    return fetch_add(queue.counters, counter(p, TAIL), num_tasks)\n",
        "    place = fetch_add(queue.counters, counter(p, TAIL), 0)\n"
        "    fetch_add(queue.counters, counter(p, TAIL), num_tasks)\n"
        "    return place\n",
        (DEADLOCK, RACE),
    ),
    Plant(
        "bound-short",
        "processors leave before the last task of the queue",
        "subscriber.py",
        "counter(p, TOTAL), total + 1)",
        "counter(p, TOTAL), total)",
        (WRONG_RESULT, COUNT),
    ),
    Plant(
        "bound-long",
        "processors wait for one more task than there are",
        "subscriber.py",
        "counter(p, TOTAL), total + 1)",
        "counter(p, TOTAL), total + 2)",
        (DEADLOCK,),
    ),
    Plant(
        "combines-not-in-bound",
        "processors leave before the combines",
        "subscriber.py",
        " + num_token_blocks(p) + gemms",
        " + gemms",
        (WRONG_RESULT, COUNT),
    ),
    Plant(
        "packets-seen-before-queued",
        "a packet counts as seen before its tasks are counted",
        "subscriber.py",
        """\
                seen += 1
        if row_tiles > 0:
            queue_gemm0(p, received, queue, expert, row_tiles)
    if seen > 0 and fetch_add(queue.counters, counter(p, PACKETS_SEEN), seen) + seen == p.num_experts:
""",
        """\
                seen += 1
                counted = fetch_add(queue.counters, counter(p, PACKETS_SEEN), 1) + 1
        if row_tiles > 0:
            queue_gemm0(p, received, queue, expert, row_tiles)
    if seen > 0 and counted == p.num_experts:
""",
        (COUNT, WRONG_RESULT, DEADLOCK),
        world="odd lanes",
    ),
    Plant(
        "abort-ignored",
        "waits do not look at the abort word",
        "waits.py",
        "return ld_relaxed(segments.control, ABORT) != 0",
        "return False",
        (DEADLOCK,),
        world="one leaves",
    ),
    Plant(
        "culprit-not-agreed",
        "a rank that gives up names itself also where another was first",
        "waits.py",
        "        if rank_idx == 0 and before != 0:",
        "        if False:",
        (BLAME,),
        world="all leave",
    ),
    Plant(
        "record-complete-before-its-fields",
        "a record is complete before its fields are written",
        "control.py",
        "        for i in range(len(record)):\n",
        "        st_release(control, RECORD, COMPLETE)\n        for i in range(len(record)):\n",
        (RACE, BLAME),
        world="all leave",
    ),
    Plant(
        "abort-before-record",
        "the abort words are set before the record is written",
        "waits.py",
        "    write_record(segments.control, record)\n",
        "    abort(p, segments)\n    write_record(segments.control, record)\n",
        (BLAME,),
        world="all leave",
    ),
    # A call that is given up
    Plant(
        "record-not-waited-for",
        "a second block of a rank that gives up does not wait until the first one's record is complete",
        "control.py",
        "    attempt = 0\n    while ld_acquire(control, RECORD) != COMPLETE:  # another block of this rank is at it\n"
        "        attempt = pause(attempt)\n",
        "",
        (BLAME,),
        world="two give up",
    ),
    Plant(
        "abort-skipped",
        "who gives up tells nobody",
        "waits.py",
        "    write_record(segments.control, record)\n    abort(p, segments)\n",
        "    write_record(segments.control, record)\n",
        (BLAME, DEADLOCK),
        world="never comes",
    ),
    Plant(
        "silence-of-this-call-only",
        "a rank that waits in the call before is not taken for one that waits itself",
        "waits.py",
        ">= max(1, p.epoch - 1)",
        ">= p.epoch",
        (BLAME,),
        world="lost between two",
    ),
    Plant(
        "silence-said-late",
        "a rank says only after a whole deadline that it waits itself",
        "waits.py",
        "    if silence_ns(wait) > p.deadline_ns // 2:",
        "    if silence_ns(wait) > p.deadline_ns:",
        (BLAME,),
        world="lost between two",
    ),
    Plant(
        "silence-from-the-beginning",
        "a wait fails after a deadline, whatever others finish meanwhile",
        "waits.py",
        "time if moved else wait.since",
        "wait.since",
        (BLAME,),
        world="short of time",
    ),
    Plant(
        "waiting-ranks-blamed",
        "who gives up names the first rank that it misses a packet of, also if that one waits itself",
        "subscriber.py",
        "            if not waits_itself(p, segments, source):\n",
        "            if True:\n",
        (BLAME,),
        world="lost between two",
    ),
    Plant(
        "arrived-packet-blamed",
        "who gives up names a packet that is here",
        "subscriber.py",
        "        if expert % lanes() == lane() and received.seen[packet] != p.epoch:\n",
        "        if expert % lanes() == lane():\n",
        (BLAME,),
        world="lost on the way",
    ),
    # Order between two words, which sequentially consistent words have for nothing
    Plant(
        "packets-counted-by-lanes",
        "each lane of the OS block counts its packets in a word of its own, then adds up: the last two miss each other",
        "subscriber.py",
        """\
    if seen > 0 and fetch_add(queue.counters, counter(p, PACKETS_SEEN), seen) + seen == p.num_experts:
""",
        """\
    all_seen, mine = 0, counter(p, PACKETS_SEEN) + lane()
    if seen > 0:
        st_release(queue.counters, mine, ld_relaxed(queue.counters, mine) + seen)
        for other in range(lanes()):
            all_seen += ld_acquire(queue.counters, counter(p, PACKETS_SEEN) + other)
    if all_seen == p.num_experts:
""",
        (DEADLOCK,),
        weak=True,
    ),
    Plant(
        "last-packet-noticed-relaxed",
        "whichever lane notices that all packets were seen says how many tasks there are, which its look did not bring",
        "subscriber.py",
        """\
    if seen > 0 and fetch_add(queue.counters, counter(p, PACKETS_SEEN), seen) + seen == p.num_experts:
""",
        """\
    if seen > 0:
        fetch_add(queue.counters, counter(p, PACKETS_SEEN), seen)
    all_seen = ld_relaxed(queue.counters, counter(p, PACKETS_SEEN)) == p.num_experts
    if all_seen and ld_relaxed(queue.counters, counter(p, TOTAL)) == 0:
""",
        (COUNT, WRONG_RESULT, DEADLOCK),
        weak=True,
    ),
    # Arithmetic and indices: no matter of order, but the checks must see these, too.
    Plant(
        "combine-reversed",
        "results are added in the order k - 1 to 0",
        "combine.py",
        "            pair = token * p.num_topk + j\n            e =",
        "            pair = token * p.num_topk + p.num_topk - 1 - j\n            e =",
        (WRONG_RESULT,),
        world="drops",
    ),
    Plant(
        "dropped-pair-added",
        "a dropped pair is added",
        "combine.py",
        "if slot < p.slots:",
        "if slot <= p.slots:",
        (WRONG_RESULT, RACE, POISON, OUT_OF_BOUNDS),
        world="drops",
    ),
    Plant(
        "first-row-tile-again",
        "the down projection takes the first row tile's hidden rows",
        "gemms.py",
        "received.hidden, received.first_row[packet] + first, rows, experts.down",
        "received.hidden, received.first_row[packet], rows, experts.down",
        (WRONG_RESULT,),
        world="tall packets",
    ),
    Plant(
        "tile-heights-disagree",
        "owner and source disagree on the height of row tiles",
        "gemms.py",
        "height = tile_height(received.rows[packet], p.tile_m_min, p.tile_m)",
        "height = p.tile_m_min",
        (WRONG_RESULT, POISON),
    ),
    Plant(
        "column-tile-twice",
        "a column tile of weights is used twice",
        "gemms.py",
        "experts.up, expert, task.n,",
        "experts.up, expert, max(task.n - 1, 0),",
        (WRONG_RESULT, POISON, RACE),
    ),
    Plant(
        "first-experts-weights",
        "every expert has the first one's down projection",
        "gemms.py",
        "experts.down, expert, task.n,",
        "experts.down, 0, task.n,",
        (WRONG_RESULT,),
    ),
    Plant(
        "not-renormalised",
        "weights of the chosen experts are not normalised",
        "router.py",
        "    if p.renormalize:\n",
        "    if False:\n",
        (WRONG_RESULT,),
    ),
    Plant(
        "softmax-without-sum",
        "the softmax is not divided by its sum",
        "router.py",
        " - highest) / total",
        " - highest)",
        (WRONG_RESULT,),
        world="drops",
    ),
    Plant(
        "tie-to-the-last",
        "of experts with the same logits, the last one is chosen",
        "router.py",
        "logit > tokens.logits[at + best]",
        "logit >= tokens.logits[at + best]",
        (WRONG_RESULT,),
        world="alone",
    ),
    Plant(
        "rows-of-a-whole-tile",
        "a result tile's signal tells of a whole tile's rows",
        "gemms.py",
        "tell_results(p, segments, source, e, m, rows)",
        "tell_results(p, segments, source, e, m, p.tile_m)",
        (WRONG_RESULT,),
    ),
)

PLANTS = {plant.name: plant for plant in _ALL}
