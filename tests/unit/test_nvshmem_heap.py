"""Segments on GPUs of several hosts: where everything lies, and what happens where something fails.

NVSHMEM is a stand-in, ranks are threads, and addresses are numbers: rank r's memory is mapped from MEMORY * (1 + r) on.
"""

import re
import sys
import threading
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fake_comm import Comm

from flashmoe_numba.backends import make_backend
from flashmoe_numba.gpu.nvshmem import Nvshmem
from flashmoe_numba.heap import make_heap
from flashmoe_numba.heap.gpus import GpuIpcHeap
from flashmoe_numba.heap.nvshmem import (
    CONTROL_AT,
    CONTROL_SIZE,
    IMAGE_AT,
    OWN,
    SHOWN_AT,
    SHOWN_SIZE,
    NvshmemHeap,
    wire_words,
)
from flashmoe_numba.kernel import control as s
from reference import Hosts, Layout, MoEConfig
from reference.layout import CONTROL_BYTES

SETUP_DEADLINE_S = 5.0
MEMORY = 1 << 40
CONFIG = MoEConfig(num_ranks=4, num_tokens=5, hidden=12, ffn=8, num_experts=8, num_topk=2)
LAYOUT = Layout(CONFIG, None, True)
TWO_HOSTS = Hosts((0, 1, 0, 1))


class NvshmemError(Exception):
    pass


class Processes:
    """What nvshmem4py has in each of some processes, which are threads; `fails` are verbs that raise, by rank."""

    def __init__(self, hosts, fails=None, apart=()):
        self.hosts, self.fails, self.apart, self.log = hosts, fails or {}, apart, []
        self.here = threading.local()
        self.status = 0  # that a kernel is admitted with
        self.InitStatus = SimpleNamespace(STATUS_IS_INITIALIZED=2)
        self.SignalOp = SimpleNamespace(SIGNAL_SET=9)
        self.NvshmemError = NvshmemError

    def _do(self, verb, error=NvshmemError):
        self.log.append((verb, self.here.rank))
        if self.fails.get(self.here.rank) == verb:
            raise error(verb)

    def get_unique_id(self, empty=False):
        data = np.zeros(1, np.dtype([("version", np.int32), ("internal", np.int8, (124,))]))
        if not empty:
            data.view(np.uint8)[...] = np.arange(128) % 251
        return SimpleNamespace(_data=data)

    def init_status(self):
        return 2 if hasattr(self.here, "world") else 0

    def init(self, device, uid, rank, nranks, initializer_method):
        assert initializer_method == "uid"
        assert bytes(uid._data.view(np.uint8)) == bytes(range(128))
        self.here.rank, self.here.world = rank, (rank, nranks)
        self._do("init", RuntimeError)

    def my_pe(self):
        return self.here.world[0]

    def n_pes(self):
        return self.here.world[1]

    def buffer(self, num_bytes):
        self._do("buffer")
        return SimpleNamespace(handle=self._start(self.here.rank), size=num_bytes)

    def get_peer_buffer(self, buffer, rank):
        if self.hosts.are_apart(self.here.rank, rank) or {self.here.rank, rank} == set(self.apart):
            raise NvshmemError("no such mapping")
        return SimpleNamespace(handle=self._start(rank))

    def free(self, buffer):
        self._do("free")

    def cumodule_init(self, module):
        self._do("module", RuntimeError)
        return self.status

    def putmem_signal_on_stream(self, *put):
        raise AssertionError("kernels put, and hosts that leave")

    def _start(self, rank):
        return MEMORY * (1 + rank)


class Memory:
    """A backend of which only the GPU is looked at."""

    def __init__(self):
        self.joined = None
        how = dict(synchronize=lambda: None, view=lambda at, size: View((at, size)))
        self.gpu = SimpleNamespace(device=0, name="stand-in", here=nullcontext(), **how)

    def join_network(self, nvshmem):
        self.joined = nvshmem
        nvshmem.admit(7)


class View(tuple):
    """(address, bytes), which can be filled."""

    def __setitem__(self, key, value):
        assert value == 0


def install(monkeypatch, processes):
    nvshmem, cuda = ModuleType("nvshmem"), ModuleType("cuda")
    nvshmem.core = nvshmem.bindings = processes
    cuda.core = SimpleNamespace(Device=lambda index: SimpleNamespace(set_current=lambda: None))
    modules = {"nvshmem": nvshmem, "nvshmem.core": processes, "nvshmem.bindings": processes}
    for name, module in (modules | {"cuda": cuda, "cuda.core": cuda.core}).items():
        monkeypatch.setitem(sys.modules, name, module)


def on_all_ranks(hosts, one):
    """What each rank's `one(heap, memory)` returned or raised."""
    arrived, results, num_ranks = {}, {}, len(hosts.of_rank)

    def run(rank):
        try:
            heap = NvshmemHeap(Comm(rank, num_ranks, arrived), SETUP_DEADLINE_S, hosts)
            results[rank] = one(heap, Memory())
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(num_ranks)]


def take(heap, memory):
    heap.allocate(LAYOUT.num_bytes, memory)
    segments = list(heap.segments)
    heap.close(lambda: None)
    return segments


def test_ranks_of_a_host_are_mapped_and_others_are_images_behind_the_segment(monkeypatch):
    install(monkeypatch, Processes(TWO_HOSTS))
    seen = on_all_ranks(TWO_HOSTS, take)
    for rank, segments in enumerate(seen):
        own = MEMORY * (1 + rank)
        used = []
        for peer, (address, num_bytes) in enumerate(segments):
            assert num_bytes == LAYOUT.num_bytes
            if TWO_HOSTS.are_apart(rank, peer):
                control = address + LAYOUT.control  # nothing else of an image is ever touched
                used.append(control)
                assert own + LAYOUT.num_bytes <= control <= own + LAYOUT.num_bytes + 3 * CONTROL_BYTES
            else:
                assert address == MEMORY * (1 + peer)
        assert len(set(used)) == len(used) == 2


def test_what_a_rank_shows_lands_where_its_peers_look(monkeypatch):
    install(monkeypatch, Processes(TWO_HOSTS))
    seen = on_all_ranks(TWO_HOSTS, take)
    for rank in range(CONFIG.num_ranks):
        words = wire_words(MEMORY * (1 + rank), LAYOUT, rank)
        assert words[OWN] == seen[rank][rank][0]
        assert (words[CONTROL_AT], words[CONTROL_SIZE]) == (LAYOUT.control, CONTROL_BYTES)
        for peer in range(CONFIG.num_ranks):
            if TWO_HOSTS.are_apart(rank, peer):
                assert MEMORY * (1 + peer) + int(words[IMAGE_AT]) == seen[peer][rank][0] + LAYOUT.control


def test_what_is_shown_late_leaves_the_record_of_who_gave_up_as_it_is():
    """It was taken before there was a record, and lands behind it."""
    words, control = wire_words(MEMORY, LAYOUT, 0), np.zeros(CONTROL_BYTES // 8, np.int64)
    shown = slice(int(words[SHOWN_AT]) // 8, int(words[SHOWN_AT] + words[SHOWN_SIZE]) // 8)
    late = control[shown].copy()
    for word, value in s.record_stores(s.departure(1, 3, s.FAILED, 7)):
        control[word] = value
    control[s.ABORT] = 2
    control[shown] = late
    assert s.record_in(control) == s.departure(1, 3, s.FAILED, 7)
    assert {s.PROGRESS, s.SILENT} == set(range(shown.start, shown.stop)), "what others look at"


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("verb", "error", "told"), [
    ("init", RuntimeError, "init"),
    ("buffer", MemoryError, "NVSHMEM has no 0.00 GiB on stand-in: see NVSHMEM_MAX_MEMORY_PER_GPU"),
    ("module", RuntimeError, "module"),
])  # fmt: skip
def test_where_a_rank_fails_all_are_told_and_none_waits(monkeypatch, rank, verb, error, told):
    processes = Processes(TWO_HOSTS, {rank: verb})
    install(monkeypatch, processes)
    for other, result in enumerate(on_all_ranks(TWO_HOSTS, take)):
        assert isinstance(result, error if other == rank else RuntimeError), result
        assert told in str(result)
        assert other == rank or str(result).startswith(f"another rank could not start: rank {rank}: ")
    freed = sorted(rank for done, rank in processes.log if done == "free")
    assert freed == ([0, 1, 2, 3] if verb == "module" else []), "to give back takes all ranks, or none"


def test_gpus_of_a_host_that_do_not_reach_each_other_are_named(monkeypatch):
    install(monkeypatch, Processes(TWO_HOSTS, apart=(1, 3)))
    results = on_all_ranks(TWO_HOSTS, take)
    assert all(isinstance(results[rank], ValueError) for rank in (1, 3))
    assert str(results[3]).startswith("NVSHMEM maps no memory of rank 1 on this host; GPUs of a host must reach")


def test_memory_is_given_back_when_nobody_looks_any_more(monkeypatch):
    processes = Processes(TWO_HOSTS)
    install(monkeypatch, processes)

    def one(heap, memory):
        heap.allocate(LAYOUT.num_bytes, memory)
        barrier = heap.barrier

        def noted():
            processes.log.append(("forgot" if heap.segments == [] else "has", heap.rank_indices[0]))
            barrier()

        heap.barrier = noted
        heap.close(lambda: None)

    assert on_all_ranks(TWO_HOSTS, one) == [None] * 4
    verbs = [done for done, _ in processes.log]
    before = processes.log[: verbs.index("free")]
    assert {rank for done, rank in before if done == "forgot"} == {0, 1, 2, 3}
    assert "has" not in verbs
    assert verbs.count("free") == 4


def test_a_second_layer_begins_nothing_and_must_have_the_same_ranks(monkeypatch):
    processes = Processes(TWO_HOSTS)
    install(monkeypatch, processes)

    def one(heap, memory):
        heap.allocate(LAYOUT.num_bytes, memory)
        again = Nvshmem(memory.gpu)
        again.begin(heap.rank_indices[0], 4, "00" * 128)
        with pytest.raises(ValueError, match=r"same order.*: this one is rank 0 of 2, and was rank \d of 4 before"):
            again.begin(0, 2, "00" * 128)

    assert on_all_ranks(TWO_HOSTS, one) == [None] * 4
    assert [done for done, _ in processes.log].count("init") == 4


def test_on_one_host_memory_is_mapped_by_ipc_and_nvshmem_is_not_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    taken = []
    monkeypatch.setattr(GpuIpcHeap, "allocate", lambda heap, num_bytes, memory: taken.append((num_bytes, memory)))
    heap = make_heap(CONFIG, Comm(0, 1, {}), "cuda", SETUP_DEADLINE_S)
    heap.allocate(64, "memory")
    assert (heap.hosts, taken) == (Hosts.one(1), [(64, "memory")])


@pytest.mark.parametrize(("of_rank", "heap", "devices"), [
    ((0, 0, 0, 0), "ipc", [None, 1, 0, 1]),
    ((0, 1, 0, 1), "nvshmem", [None, None, 1, 1]),
    ((0, 0, 0, 3), "nvshmem", [None, 1, 0, None]),
])  # fmt: skip
def test_a_rank_takes_the_gpu_of_its_place_on_its_host_and_a_kernel_for_its_hosts(monkeypatch, of_rank, heap, devices):
    class TwoGpus:
        count = staticmethod(lambda: 2)

        def __init__(self, device):
            self.device = device

    monkeypatch.setattr("flashmoe_numba.gpu.gpu.Gpu", TwoGpus)
    monkeypatch.setattr("flashmoe_numba.backends.cuda.CudaBackend", lambda config, gpu, tf32, heap: (gpu.device, heap))
    made = [make_backend("cuda", CONFIG, rank, Hosts(of_rank)) for rank in range(4)]
    assert made == [(device, heap) for device in devices]


def test_without_nvshmem_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    with pytest.raises(ImportError, match=r"need NVSHMEM and nvshmem4py: pip install 'flashmoe-numba\[nvshmem\]'"):
        Nvshmem(SimpleNamespace())


def test_bindings_that_are_too_old_are_named_before_anything_begins(monkeypatch):
    processes = Processes(TWO_HOSTS)
    install(monkeypatch, processes)
    monkeypatch.delattr(Processes, "get_peer_buffer")
    monkeypatch.delattr(Processes, "cumodule_init")
    said = r"must be 0.4 or newer, and this one has no get_peer_buffer, cumodule_init: pip install"
    for result in on_all_ranks(TWO_HOSTS, take):
        assert isinstance(result, ImportError)
        assert re.search(said, str(result))
    assert processes.log == []


def test_a_library_of_another_version_than_the_kernels_headers(monkeypatch):
    processes = Processes(TWO_HOSTS)
    processes.status = 7
    install(monkeypatch, processes)
    for result in on_all_ranks(TWO_HOSTS, take):
        assert "nvshmemx_cumodule_init gave 7; its library must be of the version" in str(result)


def test_memory_that_is_on_no_gpu_is_refused():
    heap = NvshmemHeap(Comm(0, 1, {}), SETUP_DEADLINE_S, Hosts((0, 1)))
    with pytest.raises(TypeError, match="backend must be on a GPU for segments of several hosts, got SimpleNamespace"):
        heap.allocate(64, SimpleNamespace())


def test_nvshmem4py_has_what_the_stand_in_has():
    """Of the real one, as far as it answers without a GPU."""
    pytest.importorskip("nvshmem.bindings", reason="nvshmem4py is not here: pip install 'flashmoe-numba[nvshmem]'")
    nvshmem = Nvshmem(SimpleNamespace())
    core, bindings = nvshmem._core, nvshmem._bindings
    for name in ("get_unique_id", "init", "my_pe", "n_pes", "buffer", "get_peer_buffer", "free"):
        assert callable(getattr(core, name)), name
    for name in ("init_status", "cumodule_init", "putmem_signal_on_stream"):
        assert callable(getattr(bindings, name)), name
    stand_in = Processes(TWO_HOSTS)
    assert int(core.InitStatus.STATUS_IS_INITIALIZED) == stand_in.InitStatus.STATUS_IS_INITIALIZED
    assert int(core.SignalOp.SIGNAL_SET) == stand_in.SignalOp.SIGNAL_SET
    assert issubclass(core.NvshmemError, Exception)
    assert core.get_unique_id(empty=True)._data.view(np.uint8).shape == (128,)
    group_id = nvshmem.new_id()
    assert len(bytes.fromhex(group_id)) == 128
    assert bindings.init_status() < core.InitStatus.STATUS_IS_INITIALIZED
