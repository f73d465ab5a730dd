"""One rank of the tests in test_carrier_mpi.py, as in layer_worker.py: puts by hand, without a layer."""

import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from layer_worker import main
from losing import wait_for

from flashmoe_numba.bench import carrying as bench
from flashmoe_numba.heap import carrier
from flashmoe_numba.heap.carrier import PIECE_BYTES
from flashmoe_numba.heap.hosts import HostsHeap
from flashmoe_numba.kernel.control import ABORT, COMPLETE, PROGRESS, RECORD
from flashmoe_numba.kernel.wire import FIRST, FLAG_AT, NO_FLAG, NUM_BYTES, PUT_WORDS, STAMP, WORD
from reference.layout import CONTROL_WORDS

SIZES = 0, 8, 72, 4096, 100_008, PIECE_BYTES, 2 * PIECE_BYTES + 8  # bytes of a put
MOST, ROUNDS = 12, 5  # puts of a rank to a peer in a round, and rounds
DEADLINE_S = 30.0


class Side:
    """One rank's segment: a stage, rooms for what comes (source, put), flags likewise, control words."""

    def __init__(self, comm, ranks_per_host):
        self.comm, self.rank = comm, comm.rank
        self.heap = heap = HostsHeap(comm, 60.0, ranks_per_host)
        self.room = max(SIZES)
        self.flag_at = 2 * comm.size * MOST * self.room
        self.control_at = self.flag_at + 8 * comm.size * MOST
        heap.allocate(self.control_at + 8 * CONTROL_WORDS)
        self.own, self.words = heap.segments[self.rank], heap.segments[self.rank].view(np.int64)
        self.control = self.words[self.control_at // 8 :]
        self.ring = np.zeros(FIRST + PUT_WORDS * comm.size * MOST, np.int64)
        heap.carry(self.control_at, [self.ring], MOST * self.room)
        self.others = [rank for rank in range(comm.size) if heap.hosts.are_apart(rank, self.rank)]

    def room_at(self, half, peer, put):
        """Half 0: what goes to a peer; half 1: what comes from it."""
        return ((half * self.comm.size + peer) * MOST + put) * self.room

    def flag(self, source, put):
        return self.flag_at // 8 + source * MOST + put

    def post(self, peer, source_at, target_at, num_bytes, flag_at, word):
        number = int(self.ring[0])
        self.ring[0] += 1
        at = FIRST + number % ((self.ring.size - FIRST) // PUT_WORDS) * PUT_WORDS
        self.ring[at + 1 : at + 1 + WORD] = peer, source_at, target_at, num_bytes, flag_at, word
        self.ring[at + STAMP] = number + 1


def drawn(source, target, number):
    """(bytes, has a signal) of the puts of a round, as both sides know them. The last has one."""
    rng = np.random.default_rng([source, target, number])
    sizes = rng.choice(SIZES, rng.integers(1, MOST + 1)).tolist()
    return list(zip(sizes, [*(rng.random(len(sizes) - 1) < 0.7).tolist(), True], strict=True))


def pattern(source, target, number, put, num_bytes):
    return (np.arange(num_bytes) * 3 + source + 7 * target + 31 * number + 101 * put).astype(np.uint8)


def post_round(side, number):
    """To all peers by turns."""
    plans = {peer: drawn(side.rank, peer, number) for peer in side.others}
    for put in range(MOST):
        for peer, plan in plans.items():
            if put < len(plan):
                num_bytes, has_signal = plan[put]
                source_at = side.room_at(0, peer, put)
                side.own[source_at : source_at + num_bytes] = pattern(side.rank, peer, number, put, num_bytes)
                flag_at = 8 * side.flag(side.rank, put) if has_signal else NO_FLAG
                side.post(peer, source_at, side.room_at(1, side.rank, put), num_bytes, flag_at, number + 1)


def check_round(side, number):
    """When a signal is there, so are the rows of its put and of all before it."""
    plans = {peer: drawn(peer, side.rank, number) for peer in side.others}
    missing = {(peer, put) for peer, plan in plans.items() for put, (_, has_signal) in enumerate(plan) if has_signal}
    until = time.monotonic() + DEADLINE_S
    while missing:
        assert time.monotonic() < until, f"rank {side.rank}, round {number}: {sorted(missing)} did not come"
        for peer, last in sorted(missing):
            if side.words[side.flag(peer, last)] == number + 1:
                for put, (num_bytes, _) in enumerate(plans[peer][: last + 1]):
                    at = side.room_at(1, peer, put)
                    expected = pattern(peer, side.rank, number, put, num_bytes)
                    np.testing.assert_array_equal(side.own[at : at + num_bytes], expected)
                missing.discard((peer, last))
        time.sleep(0)


def puts(comm, folder, ranks_per_host):
    """Of all sizes, from all to all, in rounds."""
    side = Side(comm, int(ranks_per_host))
    for number in range(ROUNDS):
        with side.heap.carrying(DEADLINE_S):
            post_round(side, number)
            check_round(side, number)
        comm.Barrier()
    side.heap.close(lambda: None)


def puts_pile_up(comm, folder, ranks_per_host):
    """The carrier is late: many puts are in the ring at a time."""
    piles, take = [], carrier.Carrier.send_puts

    def send_puts(self):
        time.sleep(0.05)
        piles.append(int(self._wire[0]) - self._taken)
        return take(self)

    carrier.Carrier.send_puts = send_puts
    puts(comm, folder, ranks_per_host)
    assert max(piles) > 1, piles


def news(comm, folder, ranks_per_host):
    """What a rank says of itself comes to its images, also while nothing else does; its abort word does not."""
    side = Side(comm, int(ranks_per_host))
    side.control[PROGRESS] += 100 + side.rank
    side.control[ABORT] = -1
    with side.heap.carrying(0.5):
        images = [side.heap.segments[other][side.control_at :].view(np.int64) for other in side.others]
        wait_for(lambda: all(image[PROGRESS] >= 100 + other for image, other in zip(images, side.others, strict=True)))
        assert all(image[ABORT] == 0 for image in images)
        comm.Barrier()
        side.control[ABORT] = 0
    side.heap.close(lambda: None)


def abort(comm, folder, ranks_per_host):
    """Ranks give up at the same time: who is named there stays so, and has said why before."""
    side = Side(comm, int(ranks_per_host))
    with side.heap.carrying(DEADLINE_S):
        comm.Barrier()
        side.control[RECORD + 1] = 1000 + side.rank
        side.control[RECORD] = COMPLETE
        for other in side.others:
            side.post(other, 0, 0, 0, side.control_at + 8 * ABORT, side.rank + 1)
        wait_for(lambda: side.control[ABORT] != 0)
        culprit = int(side.control[ABORT]) - 1
        assert culprit in side.others
        image = side.heap.segments[culprit][side.control_at :].view(np.int64)
        assert image[RECORD] == COMPLETE and image[RECORD + 1] == 1000 + culprit
        comm.Barrier()
    assert side.control[ABORT] == culprit + 1
    side.heap.close(lambda: None)


def carrying(comm, folder, ranks_per_host):
    """Streams to measure by: all rows of all others come, and what other threads take of cores counts."""
    bench.NUM_PUTS, bench.PUT_BYTES, bench.REPEATS = 5, 8192, 2
    per_host = int(ranks_per_host)
    stream = bench.Stream(comm, per_host)
    for number in range(3):
        stream.run(number)
        for other in stream.others:
            assert (stream.received[other] == number + other).all()
        comm.Barrier()
    stream.heap.close(lambda: None)
    all_threads, this_one = count(), count()  # each look finds that time has passed
    bench.time = SimpleNamespace(
        process_time=lambda: next(all_threads) * (comm.rank + 1) / 4, thread_time=lambda: next(this_one) / 8,
        monotonic=time.monotonic, sleep=time.sleep,
    )  # fmt: skip
    spent_s = sum((rank + 1) / 4 - 1 / 8 for rank in range(comm.size))
    pairs = sum(stream.heap.hosts.are_apart(a, b) for a in range(comm.size) for b in range(comm.size))
    expected = pairs * 5 * 8192 / spent_s / 1e9
    assert bench.measure_carrying(comm, per_host) == pytest.approx(expected)


if __name__ == "__main__":
    assert (FLAG_AT, NUM_BYTES) == (5, 4), "the order in which `post` writes fields"
    main(globals(), sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
