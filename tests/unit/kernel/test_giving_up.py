"""Giving up: who says what in which word, in which order, and how it reads; on ranks that are made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from cases import record_word, record_words

from flashmoe_numba.device import pause, st_release
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.kernel import control as s
from flashmoe_numba.kernel.control import (
    DISPATCH_FLAG,
    GATE_FLAG,
    PROCESSOR,
    RESULT_FLAG,
    SUBSCRIBER,
    TASK_FLAG,
    AbortRecord,
)
from flashmoe_numba.kernel.waits import Wait
from flashmoe_numba.layer.failures import describe, explain
from reference.layout import CONTROL_WORDS

KERNEL = interpreted("flashmoe_numba.kernel")
WAITS, QUEUE = KERNEL.waits, KERNEL.queue
DEADLINE = 1000


class Ranks:
    """Control words of some ranks, and what their blocks are given."""

    def __init__(self, num_ranks=2):
        self.controls = [np.zeros(CONTROL_WORDS, np.int64) for _ in range(num_ranks)]
        self.addresses = [control.ctypes.data for control in self.controls]

    def problem(self, rank_idx, epoch=3):
        sizes = dict(num_ranks=len(self.controls), control_at=0)
        return SimpleNamespace(rank_idx=rank_idx, epoch=epoch, deadline_ns=DEADLINE, **sizes)

    def segments(self, rank_idx):
        here = np.zeros(len(self.controls), np.int64)
        return SimpleNamespace(control=self.controls[rank_idx], address=self.addresses, remote=here, wire=here[:0])

    def words(self, word):
        return [int(control[word]) for control in self.controls]


def run(*bodies, seed=0):
    scheduler = Scheduler(seed, preempt=0.5)
    for number, body in enumerate(bodies):
        scheduler.add_block(f"block {number}", body, ())
    scheduler.run()


# what one wait that failed leaves in the control words

RECORD = dict(block=11, role=PROCESSOR, flag=RESULT_FLAG, peer=12, expert=13, m=14, found=(15 << 32) + 1, missing=16)


def give_up(ranks, rank_idx, **changes):
    p = ranks.problem(rank_idx)
    record = AbortRecord(**(RECORD | changes), epoch=p.epoch, deadline_ns=p.deadline_ns)
    WAITS.give_up(p, ranks.segments(rank_idx), record)


@pytest.mark.parametrize("rank_idx", [0, 2])
def test_every_field_of_a_record_has_its_word(rank_idx):
    ranks = Ranks(3)
    run(lambda: give_up(ranks, rank_idx))
    control = ranks.controls[rank_idx]
    assert control[s.RECORD] == s.COMPLETE
    words = record_words("block", "role", "flag", "peer", "expert", "m", "epoch", "found", "missing", "deadline_ns")
    assert control[words].tolist() == [11, PROCESSOR, RESULT_FLAG, 12, 13, 14, 3, (15 << 32) + 1, 16, DEADLINE]
    assert ranks.words(s.ABORT) == [rank_idx + 1] * 3
    assert [bool(words.any()) for words in (c[s.RECORD :] for c in ranks.controls)] == [i == rank_idx for i in range(3)]


@pytest.mark.parametrize("seed", range(5))
def test_a_second_block_stops_nobody_before_the_record_of_the_first_is_complete(seed):
    """Else a rank may be told to look at a record that is not there yet."""
    ranks, before = Ranks(), []
    control = ranks.controls[1]
    control[s.RECORD] = s.WRITING  # by the first block, which now takes its time
    unused = np.zeros(1, np.int64)

    def first():
        for turn in range(30):
            pause(0)
            st_release(unused, 0, turn)  # something happens: this is no deadlock
        before.extend(ranks.words(s.ABORT))
        control[record_word("m")] = 99
        st_release(control, s.RECORD, s.COMPLETE)

    run(first, lambda: give_up(ranks, 1), seed=seed)
    assert before == [0, 0]
    assert ranks.words(s.ABORT) == [2, 2]
    assert control[record_word("m")] == 99 and control[record_word("block")] == 0, "the record is the first block's"


def test_the_rank_that_set_the_abort_word_of_rank_0_first_is_named_by_all():
    ranks = Ranks(3)
    ranks.controls[0][s.ABORT] = 3
    run(lambda: give_up(ranks, 1))
    assert ranks.words(s.ABORT) == [3, 3, 3]


def test_a_host_that_leaves_says_why():
    for why in (s.FAILED, s.CLOSED_BY_THREAD, s.CLOSED_EARLY):
        ranks = Ranks()
        run(lambda ranks=ranks, why=why: WAITS.leave(ranks.problem(1), ranks.segments(1), why))
        said = ranks.controls[1][record_words("role", "flag", "m")].tolist()
        assert said == [s.HOST, s.CLOSED_FLAG, why]


def test_a_processor_names_its_ticket():
    ranks, ticket = Ranks(1), 5
    p, places = ranks.problem(0), []
    queue = SimpleNamespace(
        counters=np.zeros(2 * QUEUE.NUM_COUNTERS * QUEUE.COUNTER_STRIDE, np.int64),
        tasks=np.zeros(8 * QUEUE.TASK_WORDS, np.int64),
    )
    queue.counters[QUEUE.counter(p, QUEUE.HEAD)] = ticket
    scheduler = Scheduler()

    def clock():
        while not ranks.controls[0][s.ABORT]:
            scheduler.switches += DEADLINE // 8
            st_release(unused, 0, 1)
            pause(0)

    unused = np.zeros(1, np.int64)
    waiting = KERNEL.processor.wait_for_place
    scheduler.add_block("processor", lambda: places.append(waiting(p, 7, ranks.segments(0), queue)), ())
    scheduler.add_block("clock", clock, ())
    scheduler.run()
    assert places == [-1]
    said = describe(0, ranks.controls[0])
    assert said.startswith(f"rank 0, block 7 (processor) gave up in epoch 3: waited for task {ticket} of this rank's")


# who waits itself, and when it says so


def test_silence_is_said_after_half_a_deadline():
    for silence, said in ((0, 0), (DEADLINE // 2, 0), (DEADLINE // 2 + 1, 3), (DEADLINE, 3), (2 * DEADLINE, 3)):
        ranks = Ranks()
        wait = Wait(0, 50, 50 + silence, 0)
        run(lambda ranks=ranks, wait=wait: WAITS.note_silence(ranks.problem(1), ranks.segments(1), wait))
        assert ranks.words(s.SILENT) == [0, said], f"after {silence} of {DEADLINE}"


@pytest.mark.parametrize(
    ("epoch", "silent", "waits"),
    [(1, 0, False), (1, 1, True), (2, 0, False), (2, 1, True), (2, 2, True), (7, 5, False), (7, 6, True), (7, 7, True)],
)
def test_a_rank_waits_itself_if_it_said_so_in_this_epoch_or_the_last(epoch, silent, waits):
    ranks, said = Ranks(3), []
    ranks.controls[1][s.SILENT] = silent
    run(lambda: said.append(bool(WAITS.waits_itself(ranks.problem(0, epoch), ranks.segments(0), 1))))
    assert said == [waits]


# how it reads


def control(abort=0, **record):
    """Control words with a complete record of these fields, or with none."""
    words = np.zeros(CONTROL_WORDS, np.int64)
    words[s.ABORT] = abort
    for name, value in record.items():
        words[record_word(name)] = value
        words[s.RECORD] = s.COMPLETE
    return words


WAITED = dict(
    block=4, role=SUBSCRIBER, peer=5, expert=6, m=7, epoch=9, found=8 << 32, missing=3, deadline_ns=25 * 10**8
)
GAVE_UP = "rank 2, block 4 (OS block) gave up in epoch 9: waited for "
SAME_CALLS = "every rank must make the same calls"
ABSENT = (
    f"rank 5 came as far as call 8, this one is at call 9: it makes fewer calls ({SAME_CALLS}), was later than "
    "deadline_s allows, or is gone"
)
SILENCE = "3 flags missing, and no rank finished a task for about 2.5 s"


def test_the_first_packet_is_named_where_all_that_are_missed_are_of_ranks_that_wait_themselves():
    ranks, epoch = Ranks(3), 3
    p = SimpleNamespace(**vars(ranks.problem(0, epoch)), num_experts=3, experts_per_rank=1)
    for control in ranks.controls:
        control[s.SILENT] = epoch
    named = []
    for seen in ([0, 0, 0], [epoch, 0, 0], [epoch, epoch, 0], [epoch] * 3):
        received = SimpleNamespace(seen=np.array(seen))
        run(lambda received=received: named.append(KERNEL.subscriber.overdue_packet(p, ranks.segments(0), received)))
    assert named == [0, 1, 2, -1]


@pytest.mark.parametrize(("results_left", "missing"), [(-1, None), (1, (0, 0)), (1, (1, 0)), (1, (2, 1))])
def test_the_os_block_names_what_it_waits_for(results_left, missing):
    """The gate, or the result flag of (expert, row tile); of all experts there are, the last one, too."""
    ranks, epoch = Ranks(3), 3
    sizes = dict(num_experts=3, experts_per_rank=1, row_blocks=2, tile_m_min=4, tile_m=4)
    p = SimpleNamespace(**vars(ranks.problem(1, epoch)), **sizes)
    segments = SimpleNamespace(**vars(ranks.segments(1)), result_flag=np.arange(6) + (2 << 32))
    seen = np.full((3, 2), epoch)
    if missing:
        seen[missing] = epoch - 1
    tokens = SimpleNamespace(sent=np.array([8, 3, 8]), result_seen=seen.reshape(-1))
    received = SimpleNamespace(seen=np.full(3, epoch))
    rank = SimpleNamespace(problem=p, segments=segments, tokens=tokens, received=received)
    run(lambda: KERNEL.subscriber.blame(4, rank, 0, results_left))
    words = record_words("block", "role", "flag", "peer", "expert", "m", "found")
    owner, m = missing or (1, 0)
    flag, found = (RESULT_FLAG, (2 << 32) + 2 * owner + m) if missing else (GATE_FLAG, 0)
    assert ranks.controls[1][words].tolist() == [4, SUBSCRIBER, flag, owner, 0, m, found]
    assert ranks.controls[1][record_word("missing")] == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            dict(flag=DISPATCH_FLAG),
            f"{GAVE_UP}the dispatch flag of rank 5 for expert 6 here; it holds epoch 8; {SILENCE}; {ABSENT}",
        ),
        (
            dict(flag=DISPATCH_FLAG, found=10 << 32),
            f"{GAVE_UP}the dispatch flag of rank 5 for expert 6 here; that of epoch 10 is here; {SILENCE}",
        ),
        (
            dict(flag=RESULT_FLAG),
            f"{GAVE_UP}the result flag of rank 5, its expert 6, row tile 7; it holds epoch 8; {SILENCE}",
        ),
        (dict(flag=GATE_FLAG), f"{GAVE_UP}the gate of this rank; {SILENCE}"),
        (
            dict(flag=TASK_FLAG, role=PROCESSOR),
            f"{GAVE_UP.replace('OS block', 'processor')}task 7 of this rank's queue; {SILENCE}",
        ),
        (dict(flag=s.CLOSED_FLAG, m=s.FAILED), "rank 2 left in epoch 9 because of an error of its own"),
        (
            dict(flag=s.CLOSED_FLAG, m=s.CLOSED_BY_THREAD),
            "rank 2 left in epoch 9 because close() was called in another thread",
        ),
        (
            dict(flag=s.CLOSED_FLAG, m=s.CLOSED_EARLY),
            f"rank 2 closed its layer after 9 calls, and another rank made one more; {SAME_CALLS}",
        ),
    ],
    ids=["dispatch", "dispatch of the next", "result", "gate", "task", "failed", "closed by a thread", "closed early"],
)
def test_a_record_in_words(fields, said):
    assert describe(2, control(**(WAITED | fields))) == said


def test_a_record_in_the_making_is_not_told():
    words = control(**WAITED, flag=GATE_FLAG)
    words[s.RECORD] = s.WRITING
    assert describe(2, words) is None


def test_a_rank_tells_its_own_wait_and_else_that_of_the_rank_that_was_first():
    own, other = control(abort=3, **WAITED, flag=GATE_FLAG), control(abort=3, **WAITED, flag=TASK_FLAG)
    nothing, unknown = control(abort=3), control(abort=2)
    assert explain(0, [own, nothing, other]) == describe(0, own)
    assert explain(1, [own, nothing, other]) == f"rank 1 stopped: {describe(2, other)}"
    assert explain(2, [own, nothing, other]) == describe(2, other)
    assert explain(0, [unknown, nothing, other]) == "rank 0 stopped: rank 1 gave up"
    assert explain(1, [control(), control(), other]) is None
