"""Words that are sent instead of shared: the last line of each rank arrives, and none that is late holds anybody up."""

import sys
import threading
from types import SimpleNamespace

import numpy as np

from flashmoe_numba.processes import words
from flashmoe_numba.processes.words import LINE_WORDS, SentWords


class Post:
    """A communicator of ranks of this thread; messages to a rank in `deaf` are never taken."""

    def __init__(self, num_ranks, deaf=()):
        self.boxes, self.deaf, self.sent = [[] for _ in range(num_ranks)], deaf, 0

    def of(self, rank):
        return SimpleNamespace(
            rank=rank, size=len(self.boxes), Dup=lambda: self.of(rank), Improbe=lambda *a: self._take(rank, a[-1]),
            Isend=lambda line, target, tag: self._send(rank, line, target, tag),
        )  # fmt: skip

    def _send(self, source, line, target, tag):
        self.sent += 1
        self.boxes[target].append((source, line, tag))  # not a copy: MPI reads it late
        return SimpleNamespace(Test=lambda: target not in self.deaf)

    def _take(self, rank, status):
        if not self.boxes[rank]:
            return None
        status.source, line, status.tag = self.boxes[rank].pop(0)
        return SimpleNamespace(Recv=lambda target: target.__setitem__(slice(None), line))


def lines_of(post, monkeypatch):
    fake = SimpleNamespace(ANY_SOURCE=-1, ANY_TAG=-1, Status=SimpleNamespace, Exception=OSError)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake))
    return [SentWords(post.of(rank)) for rank in range(len(post.boxes))]


def test_everybody_has_everybodys_last_line(monkeypatch):
    lines = lines_of(Post(3), monkeypatch)
    for value in (5, 7):
        for rank, line in enumerate(lines):
            line.mine[value - 4] = value + rank
            line.tell()
            line.exchange()
    lines[1].mine[0] = 99  # not told
    for line in (lines[0], lines[2]):
        line.exchange()
        want = np.zeros((3, LINE_WORDS), np.int64)
        want[:, 1], want[:, 3] = (5, 6, 7), (7, 8, 9)
        assert (line.all == want).all()


def test_what_changes_without_a_word_is_told_now_and_then(monkeypatch):
    post = Post(2)
    line, clock = lines_of(post, monkeypatch)[0], [100.0]
    monkeypatch.setattr(words.time, "monotonic", lambda: clock[0])
    for step in range(1000):
        clock[0] = 100 + step * 1e-3
        line.mine[0] = step // 500 * 500 if step > 500 else step  # then nothing changes any more
        line.exchange()
    assert 0.3 / words.MINE_AGAIN_S < post.sent <= 0.5 / words.MINE_AGAIN_S + 2
    assert post.boxes[1][-1][1][0] == 500


def test_messages_that_a_dead_rank_does_not_take_are_waited_for_by_nobody(monkeypatch):
    post = Post(3, deaf={1})
    line = lines_of(post, monkeypatch)[0]
    for _ in range(5):
        line.tell()
        line.exchange()
    assert len(line._on_their_way) == 5 + 1  # to the deaf one all, to the other the last, which nobody asked after yet


def test_who_naps_is_woken_by_news(monkeypatch):
    lines = lines_of(Post(2), monkeypatch)
    lines[0].tell()
    lines[0].exchange()
    lines[1].exchange()
    lines[1].nap(1000.0)


def test_who_naps_wakes_the_thread_that_looks_for_news(monkeypatch):
    monkeypatch.setattr(words, "MINE_AGAIN_S", 1000.0)  # by itself it does not look again
    lines = lines_of(Post(2), monkeypatch)
    asleep, stir = threading.Event(), lines[0]._stir
    monkeypatch.setattr(stir, "wait", lambda seconds, wait=stir.wait: (asleep.set(), wait(seconds)))
    thread = threading.Thread(target=lines[0]._carry, daemon=True)
    thread.start()
    asleep.wait()
    lines[1].mine[0] = 5
    lines[1].tell()
    lines[1].exchange()
    lines[0].nap(20.0)
    assert lines[0].all[1, 0] == 5
    monkeypatch.setattr(words, "GOODBYE_S", 0.0)
    lines[0]._end(thread)


def test_who_parts_takes_all_that_is_under_way(monkeypatch):
    lines = lines_of(Post(3), monkeypatch)
    for line in lines[1:]:
        line.mine[2] = 9
        line.part(0.0)  # does not wait for the others
        assert line._under_way()
    lines[0].part(1000.0)
    assert lines[0].all[1:, 2].tolist() == [9, 9] and not lines[0]._under_way()


def test_who_parts_waits_for_a_dead_rank_no_longer_than_it_is_patient(monkeypatch):
    lines_of(Post(3, deaf={1}), monkeypatch)[0].part(0.05)
