"""Ranks on GPUs of their own take and give back memory that all map; with threads as ranks, and numbers as memory."""

import threading
from types import SimpleNamespace

import pytest
from fake_comm import Comm

from flashmoe_numba.heap import gpus

SETUP_DEADLINE_S = 5.0


class IpcGpu:
    """Memory that is handed around by numbers; `fails` is the verb that raises on this rank."""

    def __init__(self, rank, log, fails=""):
        self.rank, self.log, self.fails = rank, log, fails

    def _do(self, verb, result):
        self.log.append((verb, self.rank))
        if verb == self.fails:
            raise MemoryError(verb)
        return result

    def bus_id(self):
        return str(self.rank)

    def can_access(self, bus_id):
        return True

    def allocate_alone(self, num_bytes):
        return self._do("allocate", self.rank)

    def ipc_handle(self, segment):
        return str(segment).encode()

    def open_ipc(self, handle):
        return self._do("open", 100 + int(handle))

    def view(self, address, num_bytes):
        return address

    def close_ipc(self, address):
        self._do("close", None)

    def free_alone(self, segment):
        self._do("free", None)


class Heap(gpus.GpuIpcHeap):
    def require_one_machine(self):
        pass


def set_up(num_ranks, fails, seen=None):
    """Every rank takes segments and gives them back; the errors by rank, and what was done, in order."""
    log, arrived, errors = [], {}, {}
    seen = {} if seen is None else seen  # the segments of each rank

    def one(rank):
        try:
            heap = Heap(Comm(rank, num_ranks, arrived), SETUP_DEADLINE_S)
            heap.allocate(64, SimpleNamespace(gpu=IpcGpu(rank, log, fails.get(rank, ""))))
            seen[rank] = list(heap.segments)
            heap.close(lambda: None)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors, log


@pytest.mark.parametrize("verb", ["", "allocate", "open", "close"])
@pytest.mark.parametrize("rank", [0, 2])
def test_no_rank_frees_what_another_has_mapped_and_none_waits_for_ever(verb, rank):
    errors, log = set_up(3, {rank: verb})
    assert not [error for error in errors.values() if isinstance(error, (TimeoutError, AssertionError))], errors
    assert set(errors) == {"": set(), "close": {rank}}.get(verb, {0, 1, 2})
    verbs = [verb for verb, _ in log]
    if "free" in verbs:
        assert "close" not in verbs[verbs.index("free") :], log
    if verb in ("", "open"):
        assert sorted(rank for done, rank in log if done == "free") == [0, 1, 2]


def test_an_error_of_cleaning_up_hides_none_that_made_it_necessary():
    errors, _ = set_up(2, {0: "close", 1: "open"})
    assert str(errors[0]) == "another rank could not start: rank 1: open"
    assert isinstance(errors[1], MemoryError)


def test_each_rank_has_its_own_segment_and_maps_those_of_the_others():
    seen = {}
    errors, _ = set_up(3, {}, seen)
    assert not errors
    assert seen == {0: [0, 101, 102], 1: [100, 1, 102], 2: [100, 101, 2]}
