"""Ranks on GPUs of their own take and give back memory that all map; with threads as ranks, and numbers as memory."""

import threading
from types import SimpleNamespace

import pytest

from flashmoe_numba.heap import gpus, meeting


class Comm:
    """A communicator of ranks that are threads: the n-th collective of each is the same one."""

    def __init__(self, rank, size, arrived):
        self.rank, self.size, self._arrived, self._count = rank, size, arrived, 0

    def _collective(self, name, data, out):
        number, self._count = self._count, self._count + 1
        everybody = self._arrived.setdefault(number, {})
        everybody[self.rank] = (name, data)

        def test():
            if len(everybody) < self.size:
                return False
            assert {name for name, _ in everybody.values()} == {name}
            if out is not None:
                out[:] = [everybody[rank][1] for rank in range(self.size)]
            return True

        return SimpleNamespace(Test=test)

    def Idup(self):
        return self, self._collective("dup", None, None)

    def Ibarrier(self):
        return self._collective("barrier", None, None)

    def Iallgather(self, mine, everybody):
        return self._collective("gather", mine.copy(), everybody)

    def Free(self):
        pass


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
        return b"handle"

    def open_ipc(self, handle):
        return self._do("open", 100 + self.rank)

    def view(self, address, num_bytes):
        return address

    def close_ipc(self, address):
        self._do("close", None)

    def free_alone(self, segment):
        self._do("free", None)


class Heap(gpus.GpuIpcHeap):
    def require_one_machine(self):
        pass


def set_up(num_ranks, fails):
    """Every rank takes segments and gives them back; the errors by rank, and what was done, in order."""
    log, arrived, errors = [], {}, {}

    def one(rank):
        try:
            heap = Heap(Comm(rank, num_ranks, arrived))
            heap.allocate(64, SimpleNamespace(gpu=IpcGpu(rank, log, fails.get(rank, ""))))
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
def test_no_rank_frees_what_another_has_mapped_and_none_waits_for_ever(monkeypatch, verb, rank):
    monkeypatch.setattr(meeting, "SETUP_DEADLINE_S", 5.0)
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
