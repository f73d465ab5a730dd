"""A carrier between a rank and MPI, both of which do what the test says: in which order what goes and comes."""

import sys
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from flashmoe_numba.heap.carrier import GOODBYE, LETTER, MOST_PIECES, NEWS, PIECE_BYTES, ROWS, Carrier
from flashmoe_numba.kernel.control import ABORT, COMPLETE, PROGRESS, RECORD
from flashmoe_numba.kernel.wire import FIRST, NO_FLAG, PUT_WORDS, STAMP, Put
from reference.layout import CONTROL_WORDS

ROOM = 4 * PIECE_BYTES
FLAG, CONTROL_AT = 2 * ROOM // 8, 2 * ROOM + 8 * 16  # a word, and bytes
NUM_PLACES = 64


class FakeMpi:
    """Of mpi4py's module, what a carrier asks for. Nothing is sent: `sent` has it, and `incoming` comes."""

    ANY_SOURCE, ANY_TAG, BYTE = -1, -1, "bytes"

    def __init__(self):
        self.sent, self.incoming, self.asked = [], deque(), []

    def get_vendor(self):
        return ("none", (0,))

    def Status(self):
        self.status = SimpleNamespace(Get_source=lambda: self.of[0], Get_tag=lambda: self.of[1])
        self.status.Get_count = lambda _: self.of[2].nbytes
        return self.status

    def Improbe(self, source, tag, status):
        if not self.incoming:
            return None
        self.of = self.incoming.popleft()
        return SimpleNamespace(Recv=lambda words: np.copyto(words, self.of[2].reshape(-1)))

    def Isend(self, data, rank_idx, tag):
        self.sent.append((rank_idx, tag, data.copy()))
        return SimpleNamespace(Test=lambda: True)

    def Irecv(self, room, source, tag):
        assert tag == ROWS
        request = SimpleNamespace(is_here=False, Test=lambda: request.is_here, room=room, source=source)
        self.asked.append(request)
        return request


class Side:
    """Rank 0 of three: rank 1 is on its host, rank 2 is not."""

    def __init__(self, monkeypatch):
        self.mpi = FakeMpi()
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=self.mpi))
        self.segments = [np.zeros(CONTROL_AT + 8 * CONTROL_WORDS, np.uint8) for _ in range(3)]
        self.segments[0][:ROOM] = np.arange(ROOM) % 251
        self.words = self.segments[0].view(np.int64)
        self.control, self.image = (self.segments[i][CONTROL_AT:].view(np.int64) for i in (0, 2))
        self.wire = np.zeros(FIRST + NUM_PLACES * PUT_WORDS, np.int64)
        self.carrier = Carrier(self.mpi, self.mpi, 0, self.segments, [2], CONTROL_AT, self.wire)
        self.carrier.step()
        assert [tag for _, tag, _ in self.mpi.sent] == [NEWS], "the first ones are due"
        self.mpi.sent.clear()
        self.carrier.beat_s = 1e9

    def post(self, put):
        number = int(self.wire[0])
        at = FIRST + number * PUT_WORDS
        self.wire[at + STAMP : at + 7] = number + 1, *put
        self.wire[0] += 1

    def letter(self, *pieces):
        self.mpi.incoming.append((2, LETTER, np.array(pieces, np.int64)))


@pytest.fixture
def side(monkeypatch):
    return Side(monkeypatch)


def test_rows_go_before_the_letter_that_says_where_they_belong(side):
    side.post(Put(2, 64, 4096, 2 * PIECE_BYTES + 8, 8 * FLAG, 77))
    side.post(Put(2, 0, 0, 0, 8 * FLAG + 8, 78))
    assert side.carrier.has_words and side.carrier.step() and not side.carrier.is_busy
    *rows, (to, tag, letter) = side.mpi.sent
    assert (to, tag) == (2, LETTER) and [(to, tag) for to, tag, _ in rows] == [(2, ROWS)] * 3
    np.testing.assert_array_equal(
        np.concatenate([data for *_, data in rows]), side.segments[0][64:][: 2 * PIECE_BYTES + 8]
    )
    assert letter.tolist() == [
        [4096, PIECE_BYTES, NO_FLAG, 0],
        [4096 + PIECE_BYTES, PIECE_BYTES, NO_FLAG, 0],
        [4096 + 2 * PIECE_BYTES, 8, 8 * FLAG, 77],
        [0, 0, 8 * FLAG + 8, 78],
    ]


def test_a_letter_has_no_more_pieces_than_may_wait_for_it(side):
    for number in range(2 * MOST_PIECES + 1):
        side.post(Put(2, 8 * number, 8 * number, 8, NO_FLAG, 0))
    side.carrier.step()
    tags = [tag for _, tag, _ in side.mpi.sent]
    assert tags == ([ROWS] * MOST_PIECES + [LETTER]) * 2 + [ROWS, LETTER]
    assert sum(len(data) for _, tag, data in side.mpi.sent if tag == LETTER) == 2 * MOST_PIECES + 1


def test_a_signal_is_released_when_all_rows_before_it_are_here(side):
    side.letter([ROOM, 16, NO_FLAG, 0], [ROOM + 16, 8, 8 * FLAG, 5])
    side.letter([0, 0, 8 * FLAG + 8, 6])
    assert side.carrier.step() and side.carrier.is_busy
    first, second = side.mpi.asked
    assert [(request.source, request.room.nbytes) for request in side.mpi.asked] == [(2, 16), (2, 8)]
    second.room[:] = 1
    assert side.segments[0][ROOM + 16] == 1, "they land in place"
    second.is_here = True
    side.carrier.step()
    assert not side.words[FLAG : FLAG + 2].any() and side.control[PROGRESS] == 0
    first.is_here = True
    side.carrier.step()
    assert side.words[FLAG : FLAG + 2].tolist() == [5, 6] and side.control[PROGRESS] == 3
    assert not side.carrier.is_busy


def test_an_abort_waits_for_no_rows(side):
    side.letter([ROOM, 16, 8 * FLAG, 5], [0, 0, CONTROL_AT + 8 * ABORT, 3])
    side.carrier.step()
    assert side.carrier.is_given_up and side.control[ABORT] == 3 and side.words[FLAG] == 0


def test_who_gives_up_says_why_before_that_it_does(side):
    side.control[RECORD], side.control[RECORD + 1] = COMPLETE, 42
    side.post(Put(2, 0, 0, 0, CONTROL_AT + 8 * ABORT, 1))
    side.carrier.step()
    (_, first, news), (_, second, letter) = side.mpi.sent
    assert (first, second) == (NEWS, LETTER) and news[:2].tolist() == [COMPLETE, 42]
    assert letter.tolist() == [[0, 0, CONTROL_AT + 8 * ABORT, 1]]


def test_news_of_another_host_come_into_the_image(side):
    news = np.arange(1, 14)
    side.mpi.incoming.append((2, NEWS, news))
    side.carrier.step()
    assert side.image[RECORD] == 1 and side.image[PROGRESS] == 12 and not side.control.any()


def test_news_go_to_whom_nothing_waits_for(side, monkeypatch):
    def refuse(*_):
        raise RuntimeError("EAGAIN")

    side.carrier.beat_s = 0.0
    monkeypatch.setattr(side.mpi, "Isend", refuse)
    for _ in range(5):
        side.carrier.step()
    (outbox,) = side.carrier._outboxes.values()
    assert len(outbox._waiting) == 1, "to a rank that is gone they would grow without an end"


def test_all_that_stay_are_known_until_they_say_goodbye(side):
    side.carrier.say_goodbye()
    side.carrier.step()
    assert [(to, tag) for to, tag, _ in side.mpi.sent] == [(2, GOODBYE)] and side.carrier.staying == {2}
    side.mpi.incoming.append((2, GOODBYE, np.zeros(0, np.int64)))
    side.carrier.step()
    assert side.carrier.staying == set()
