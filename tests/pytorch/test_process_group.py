"""Ranks that meet in a store of torch.distributed; with threads as ranks, and a world of this process alone."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from flashmoe_numba.heap.mpi import MpiHeap
from flashmoe_numba.processes.meeting import wait_for
from flashmoe_numba.processes.process_group import GONE, Duplicate
from reference import Weights

CONFIG = tiny_config(num_ranks=1)


def of_threads(num_ranks, step):
    """What `step(communicator)` returns on each rank, and the store they met in."""
    store = dist.HashStore()
    with ThreadPoolExecutor(num_ranks) as pool:
        found = list(pool.map(lambda rank: step(Duplicate(store, "test", rank, num_ranks)), range(num_ranks)))
    return found, store


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_everybody_gets_what_everybody_brings(num_ranks, dtype):
    def step(comm):
        rounds = []
        for number in range(20):
            time.sleep(0.001 * ((comm.rank + number) % 3))
            mine, everybody = (
                np.full(number % 4, 10 * comm.rank + number, dtype),
                np.empty((num_ranks, number % 4), dtype),
            )
            wait_for(comm.Iallgather(mine, everybody), 30)
            rounds.append(everybody)
        wait_for(comm.Ibarrier(), 30)
        return rounds

    found, store = of_threads(num_ranks, step)
    for number in range(20):
        expected = np.repeat(10 * np.arange(num_ranks) + number, number % 4).reshape(num_ranks, number % 4)
        assert all(np.array_equal(rounds[number], expected) for rounds in found)
    assert [key for key in store.list_keys() if "test" in key] == []


def test_a_gathering_is_done_when_the_last_has_come_and_for_the_first_when_all_have_read():
    store = dist.HashStore()
    first, second = (Duplicate(store, "test", rank, 2) for rank in range(2))
    of_first = first.Ibarrier()
    assert not of_first.Test()
    of_second = second.Ibarrier()
    assert not of_first.Test() and of_second.Test() and of_first.Test()


def test_a_store_that_is_gone_is_an_error():
    class Gone:
        def set(self, key, value):
            raise RuntimeError("Broken pipe\nat a place")

    with pytest.raises(ConnectionError) as caught:
        Duplicate(Gone(), "test", 0, 2).Ibarrier()
    assert str(caught.value) == f"{GONE} (Broken pipe)"


def test_a_heap_of_several_processes_stands_on_it():
    """Its setting up has every kind of step that a layer's has."""

    def step(comm):
        comm.Idup = lambda: (comm, comm.Ibarrier())
        heap = MpiHeap(comm, 30.0)
        heap.allocate(100, None)
        heap.segments[comm.rank][:] = comm.rank + 1
        heap.barrier()
        seen = [int(segment.sum()) for segment in heap.segments]
        heap.close(lambda: None)
        return seen

    found, _ = of_threads(3, step)
    assert found == [[100, 200, 300]] * 3


def test_a_layer_of_a_group_is_the_layer_without(world):
    weights, x = Weights.random(CONFIG), random_tokens(CONFIG)[0]
    with FlashMoE(CONFIG, weights) as layer:
        expected = layer([x])[0]
    for _ in range(2):
        with FlashMoE(CONFIG, weights, process_group=world) as layer:
            assert torch.equal(layer(torch.from_numpy(x)), torch.from_numpy(expected))


def refused(**arguments):
    with pytest.raises((TypeError, ValueError)) as caught:
        FlashMoE(**dict(config=CONFIG, weights=Weights.random(CONFIG)) | arguments)
    return str(caught.value)


def test_says_what_is_wrong_with_a_group(world):
    config = tiny_config(num_ranks=2)
    two = dict(config=config, weights=Weights.random(config))
    assert refused(process_group=world, **two) == "process_group must have config.num_ranks=2 ranks, got 1"
    assert refused(process_group=world, comm=world) == (
        "comm must be None where process_group is given, got ProcessGroup"
    )
    assert refused(process_group="gloo") == "process_group must be a group of torch.distributed or None, got str"
    assert refused(process_group=dist.GroupMember.NON_GROUP_MEMBER) == (
        "process_group must have this process among its ranks, got NON_GROUP_MEMBER of new_group"
    )
    assert refused(process_group=world, backend="fibers") == (
        "backend 'fibers' runs all ranks in this process: leave process_group out"
    )
    dist.destroy_process_group()
    assert refused(process_group=world).startswith(
        "torch.distributed must be initialised before process_group is given"
    )
