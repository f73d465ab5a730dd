"""Layers on fibers whose ranks are on several hosts, as far as they can tell."""

from functools import partial

from hypothesis import strategies as st

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.fibers import FiberBackend
from flashmoe_numba.heap.threads import ThreadHeap
from reference import Hosts


def apart(hosts, **fibers):
    """Makes layers like `FlashMoE`, on these hosts; with settings of the fibers."""
    return partial(_make, hosts, fibers)


def _make(hosts, fibers, config, weights, **settings):
    heap = ThreadHeap(config.num_ranks, hosts)
    return FlashMoE.from_parts(config, weights, heap, FiberBackend(**fibers), **settings)


def hosts_of(num_ranks):
    """On two hosts or more: of any numbers of ranks, also with ranks of others in between."""
    numbers = st.lists(st.integers(0, min(num_ranks, 3) - 1), min_size=num_ranks, max_size=num_ranks)
    return numbers.map(tuple).filter(lambda of_rank: len(set(of_rank)) > 1).map(Hosts)
