"""What a carrier sends and lands, and in which order, with a communicator that is told what to do."""

from types import SimpleNamespace

import numpy as np
import pytest

from flashmoe_numba.device.compilation import compile_for
from flashmoe_numba.heap import messages
from flashmoe_numba.heap.carrier import PIECE_BYTES, pieces
from flashmoe_numba.heap.messages import MOST_FLYING, Inbox, Outbox
from flashmoe_numba.kernel import carried
from flashmoe_numba.kernel.control import ABORT, COMPLETE, PROGRESS, RECORD, RECORD_FIELDS, SILENT, AbortRecord
from flashmoe_numba.kernel.wire import FIRST, NO_FLAG, PUT_WORDS, STAMP, Put
from reference.layout import CONTROL_WORDS


class Comm:
    """Accepts messages or refuses them; they have left when they are in `left`."""

    def __init__(self):
        self.sent, self.left, self.refuses, self.limited = [], set(), False, False

    def Isend(self, data, rank_idx, tag):
        assert self.limited, "a send to a rank that is gone has no end by itself"
        if self.refuses:
            raise RuntimeError("EAGAIN")
        number = len(self.sent)
        self.sent.append((int(data[0]), rank_idx, tag))
        return SimpleNamespace(Test=lambda: number in self.left)


class Limit:
    def __init__(self, comm):
        self._comm = comm

    def __enter__(self):
        self._comm.limited = True

    def __exit__(self, *_):
        self._comm.limited = False


def make_outbox(comm):
    return Outbox(7, Limit(comm))


def post(outbox, comm, *numbers):
    for number in numbers:
        outbox.post(comm, np.array([number]), number % 3)


def test_messages_are_sent_in_order_and_kept_until_they_have_left():
    comm = Comm()
    outbox = make_outbox(comm)
    assert not outbox and not outbox.push()
    post(outbox, comm, 5, 6, 4)
    assert outbox and outbox.is_stuck
    assert outbox.push() and comm.sent == [(5, 7, 2), (6, 7, 0), (4, 7, 1)]
    assert outbox and not outbox.is_stuck, "they are under way"
    comm.left = {0, 2}
    assert outbox.push() and outbox and not outbox.push(), "the second one has not left"
    comm.left = {0, 1, 2}
    assert outbox.push() and not outbox


def test_mpi_has_so_many_at_a_time():
    comm = Comm()
    outbox = make_outbox(comm)
    post(outbox, comm, *range(MOST_FLYING + 5))
    outbox.push()
    assert len(comm.sent) == MOST_FLYING and outbox.is_stuck
    comm.left = {0, 1}
    outbox.push()
    assert [number for number, *_ in comm.sent] == list(range(MOST_FLYING + 2))


def test_what_is_refused_is_tried_again_when_it_does_not_keep_others_waiting(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(messages, "time", SimpleNamespace(monotonic=lambda: clock.now))
    comm, attempts = Comm(), []
    outbox, isend = make_outbox(comm), comm.Isend

    def slow_isend(*arguments):
        attempts.append(clock.now)
        clock.now += 0.25
        return isend(*arguments)

    comm.Isend, comm.refuses = slow_isend, True
    post(outbox, comm, 1, 2)
    assert not outbox.push() and not outbox.push() and attempts == [100.0]
    clock.now = 100.25 + messages.PATIENCE * 0.25
    assert not outbox.push() and len(attempts) == 2, "again, and no more than a part of the time"
    clock.now, comm.refuses = 200.0, False
    assert outbox.push() and [number for number, *_ in comm.sent] == [1, 2]


def test_signals_wait_for_all_rows_before_them():
    inbox, landed, there = Inbox(), [], set()

    def rows(name):
        return SimpleNamespace(Test=lambda: name in there)

    for request, flag in ((rows("a"), NO_FLAG), (rows("b"), 4), (None, 5), (rows("c"), 6)):
        inbox.expect(request, flag, 10 * flag)
    assert not inbox.land(lambda *signal: landed.append(signal)) and inbox
    there |= {"b", "c"}
    assert not inbox.land(lambda *signal: landed.append(signal))
    there.remove("c")
    there.add("a")
    assert inbox.land(lambda *signal: landed.append(signal)) and inbox
    assert landed == [(NO_FLAG, -10), (4, 40), (5, 50)]
    there.add("c")
    assert inbox.land(lambda *signal: landed.append(signal)) and not inbox and landed[-1] == (6, 60)


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_pieces_are_the_rows_of_a_put_and_the_last_one_has_its_signal(num_bytes):
    puts = np.zeros((2, PUT_WORDS), np.int64)
    puts[1, 1:7] = Put(3, 1000, 5000, num_bytes, 64, 9)
    first, *found = pieces(puts)
    assert first == (0, 0, 0, 0, 0)
    assert [piece.target_at - piece.source_at for piece in found] == [4000] * len(found)
    covered = [byte for piece in found for byte in (piece.source_at, piece.source_at + piece.num_bytes)]
    assert covered[0] == 1000 and covered[-1] == 1000 + num_bytes and covered[1:-1:2] == covered[2::2]
    assert all(0 < piece.num_bytes <= PIECE_BYTES for piece in found) or (num_bytes == 0 and len(found) == 1)
    assert [(piece.flag_at, piece.word) for piece in found] == [(NO_FLAG, 0)] * (len(found) - 1) + [(64, 9)]


def call(name, *arguments):
    """Call one of kernel/carried.py, as carriers do."""
    return compile_for(getattr(carried, name), arguments)(*arguments)


def test_puts_are_taken_in_order_as_far_as_they_are_there():
    places, ring = 5, np.zeros(FIRST + 5 * PUT_WORDS, np.int64)
    for number in (0, 1, 2, 4, 5):  # the fourth is not there yet; the sixth has the first one's place
        at = FIRST + number % places * PUT_WORDS
        if number < 5:
            ring[at : at + 7] = number + 1, *Put(number, 10, 20, 30, 40, number + 100)
    taken = np.zeros(2 * PUT_WORDS, np.int64)
    assert call("take_puts", ring, 0, taken) == 2
    assert taken.reshape(2, -1)[:, 1].tolist() == [0, 1] and taken.reshape(2, -1)[:, 6].tolist() == [100, 101]
    assert call("take_puts", ring, 2, taken) == 1 and taken[6] == 102
    assert call("take_puts", ring, 3, taken) == 0
    ring[FIRST + 3 * PUT_WORDS + STAMP] = 4
    assert call("take_puts", ring, 3, taken) == 2
    assert call("take_puts", ring, 5, taken) == 0, "the first one's stamp is an old one"


def test_what_lands_is_told_and_counted():
    words, control = np.zeros(10 + CONTROL_WORDS, np.int64), 10
    call("land", words, 3, 33, control)
    call("land", words, NO_FLAG, 44, control)
    call("land", words, control + ABORT, 2, control)
    call("land", words, control + ABORT, 5, control)
    expected = np.zeros_like(words)
    expected[[3, control + ABORT, control + PROGRESS]] = 33, 2, 4
    np.testing.assert_array_equal(words, expected)


def test_news_are_all_that_others_look_at_but_the_abort_word():
    control, image = np.arange(100, 100 + CONTROL_WORDS), np.zeros(CONTROL_WORDS, np.int64)
    control[RECORD] = COMPLETE
    news = np.zeros(carried.NEWS_WORDS, np.int64)
    call("read_news", control, news)
    call("write_news", image, news)
    told = [*range(RECORD, RECORD_FIELDS.stop), PROGRESS, SILENT]
    np.testing.assert_array_equal(image[told], control[told])
    assert len(told) == len(news) == 1 + len(AbortRecord._fields) + 2
    np.testing.assert_array_equal(np.delete(image, told), 0)
