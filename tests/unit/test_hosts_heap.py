"""What a heap of several hosts asks of MPI before anything starts, and what it warns of."""

import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from flashmoe_numba.heap import carrier_thread, hosts
from reference import Hosts
from reference.sizes import PUT_BYTES, RING_HEAD_BYTES

LEVELS = {f"THREAD_{name}": number for number, name in enumerate(["SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE"])}


@pytest.mark.parametrize("level", LEVELS)
def test_threads_must_be_allowed(level, monkeypatch):
    mpi = SimpleNamespace(Query_thread=lambda: LEVELS[level], **LEVELS)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    if level == "THREAD_MULTIPLE":
        hosts._require_threads()
        return
    with pytest.raises(ValueError, match="comm must be of an MPI that threads may call") as caught:
        hosts._require_threads()
    assert str(caught.value).endswith(f"got {level}")


@pytest.mark.parametrize(("netmod", "warns"), [("ofi", False), ("ucx", True)])
def test_a_netmod_that_ends_the_others_is_named(netmod, warns, monkeypatch, recwarn):
    described = SimpleNamespace(get_vendor=lambda: ("MPICH",), Get_library_version=lambda: "Device: ch4:ucx,ofi\n")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=described))
    monkeypatch.setenv("MPIR_CVAR_CH4_NETMOD", netmod)
    monkeypatch.setenv("FI_PROVIDER", "tcp")
    if not warns:
        hosts._warn_of_losses()
        assert not recwarn.list
        return
    with pytest.warns(RuntimeWarning, match="ucx.*FI_PROVIDER=tcp"):
        hosts._warn_of_losses()


@pytest.mark.parametrize(("puts_to_a_peer", "num_bytes", "most"), [
    (10, 2**20 - 1, 10 + 10 + 0 + 8), (24, 0, 24 + 24 + 1 + 8), (3, 50 * 2**20, 53 + 3 + 2 + 8),
])  # fmt: skip
@pytest.mark.parametrize("of_rank", [(0, 1), (0, 0, 1, 1), (0, 1, 1, 2)])  # 1, 2 and 3 ranks apart from one
def test_mpi_must_keep_all_messages_of_a_call_to_one_peer(puts_to_a_peer, num_bytes, most, of_rank, monkeypatch):
    """Rows in pieces of 1 MiB, a letter for each put and each 24 pieces, and what is beside them."""
    asked = []
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI="MPI"))
    monkeypatch.setattr(hosts, "require_saved", lambda *arguments: asked.append(arguments))
    there = Hosts(of_rank)
    apart = len(of_rank) - min(of_rank.count(host) for host in of_rank)
    ring = np.zeros((RING_HEAD_BYTES + apart * puts_to_a_peer * PUT_BYTES) // 8, np.int64)
    hosts._require_saved(ring, num_bytes, there)
    assert asked == [("MPI", most)]


class Idle:
    """A carrier that carries nothing."""

    has_words, is_given_up = False, False

    def __init__(self, is_busy):
        self.is_busy = is_busy

    def step(self):
        return False

    def send_puts(self):
        """None are there."""


@pytest.mark.parametrize("is_busy", [False, True])
def test_what_is_still_under_way_keeps_its_memory(is_busy, monkeypatch):
    """MPI may read and write it as long as the process lives."""
    kept = []
    monkeypatch.setattr(carrier_thread, "_LEFT", kept)
    carrier = Idle(is_busy)
    thread = carrier_thread.CarrierThread(carrier)
    thread.stop(0.05)
    thread.stop(0.05)
    assert kept == [carrier] * is_busy


def carried(carrier, body, patience_s=5.0):
    """The error that a call with this carrier ends with; its body is given the carrier's thread."""
    thread = carrier_thread.CarrierThread(carrier)
    try:
        with thread.carrying(patience_s):
            body(thread._thread)
    except BaseException as error:
        return error
    return None


class Broken(Idle):
    """MPI fails."""

    def step(self):
        raise RuntimeError("no fabric")


def interrupted(thread):
    thread.join()
    raise KeyboardInterrupt


def test_a_call_ends_with_the_error_of_its_carrier_and_with_its_own_first():
    error = carried(Broken(is_busy=False), threading.Thread.join)
    assert re.fullmatch("messages .* were not: RuntimeError: no fabric", str(error))
    assert isinstance(carried(Broken(is_busy=False), interrupted), KeyboardInterrupt)


class Stuck(Idle):
    """MPI does not come back."""

    def __init__(self, is_given_up):
        super().__init__(is_busy=False)
        self.is_given_up = is_given_up
        self.is_in, self.over = threading.Event(), threading.Event()

    def step(self):
        self.is_in.set()
        self.over.wait()
        return False


@pytest.mark.parametrize("is_given_up", [False, True])
def test_a_call_waits_for_mpi_no_longer_than_it_is_patient(is_given_up, monkeypatch):
    """And where it was given up, for its last words only: there may be a rank that does not answer."""
    monkeypatch.setattr(carrier_thread, "LOOK_S", 0.01)
    monkeypatch.setattr(carrier_thread, "LAST_WORDS_S", 0.03)
    carrier = Stuck(is_given_up)
    error = carried(carrier, lambda _: carrier.is_in.wait(), 1000.0 if is_given_up else 0.05)
    carrier.over.set()
    assert error is None if is_given_up else "MPI must come back from messages to ranks" in str(error)
