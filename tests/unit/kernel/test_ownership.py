"""A layer belongs to the process and the object that made it: forked children and copies get an error at once."""

import copy
import multiprocessing
import os
import pickle
import signal
import warnings

import pytest
from cases import assert_same_bits, bits, random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.cuda import CudaBackend
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.gpu.gpu import Gpu
from flashmoe_numba.heap.gpus import GpuHeap, GpuIpcHeap
from flashmoe_numba.heap.mpi import MpiHeap
from flashmoe_numba.kernel import control as s
from reference import Weights

CONFIG = tiny_config()
WEIGHTS, X = Weights.random(CONFIG), random_tokens(CONFIG)
HANGS_S = 20  # a child that is still there then hangs


def make_layer(**settings):
    return FlashMoE(CONFIG, WEIGHTS, num_processors=1, **settings)


def said_by_child(step):
    """What `step()` says in a forked child: its result, or its error."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads, and they are right
        child = os.fork()
    if child == 0:
        signal.alarm(HANGS_S)
        try:
            said = str(step())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child hung"
    return said


def assert_names_the_fork(said):
    for part in ("FlashMoEError", f"made in process {os.getpid()}", "fork", "make a FlashMoE in each process", "spawn"):
        assert part in said, said


@pytest.fixture(scope="module")
def layer():
    with make_layer() as layer:
        layer(X)
        yield layer


USES = {
    "call": lambda layer: layer(X),
    "stats": lambda layer: layer.stats,
    "routing": lambda layer: layer.routing,
    "traces": lambda layer: layer.traces,
    "synchronize": lambda layer: layer.synchronize(),
    "a call in a child of the child": lambda layer: said_by_child(lambda: layer(X)),
}


@pytest.mark.parametrize("use", USES)
def test_a_forked_child_is_told(layer, use):
    said = said_by_child(lambda: USES[use](layer))
    assert_names_the_fork(said)


def test_a_forked_child_is_told_also_if_another_thread_was_in_a_call(layer):
    with layer._calls._lock:  # as that thread has it; nobody in the child will give it back
        assert_names_the_fork(said_by_child(lambda: layer(X)))
        assert said_by_child(layer.close) == "None"


def test_workers_of_a_pool_are_told():
    global of_the_workers
    with make_layer() as of_the_workers, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_the_workers(X)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for said in pool.map_async(call_in_worker, range(3)).get(HANGS_S):
                assert_names_the_fork(said)


def call_in_worker(_):
    try:
        return of_the_workers(X)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_closing_in_a_child_is_quiet_and_takes_nothing_from_the_parent():
    def close():
        with layer:
            layer.close()
        return "closed"

    with make_layer() as layer:
        y = layer(X)
        assert said_by_child(close) == "closed"
        assert [int(rank.control[s.ABORT]) for rank in layer._ranks] == [0, 0]
        assert_same_bits(layer(X), y, "the parent's next call")


def test_a_child_may_make_a_layer_of_its_own(layer):
    def of_its_own():
        with make_layer() as own:
            return [bits(part).tolist() for part in own(X)]

    assert said_by_child(of_its_own) == str([bits(part).tolist() for part in layer(X)])


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickle.dumps}


@pytest.mark.parametrize("how", COPIES)
def test_what_holds_threads_or_shared_memory_cannot_be_copied(layer, how):
    with make_layer(backend="fibers") as fibers:
        parts = [layer, fibers, layer._backend, fibers._backend, layer._parts.heap, layer._ranks[0]]
        parts += [cls.__new__(cls) for cls in (MpiHeap, GpuHeap, GpuIpcHeap, CudaBackend, Gpu)]
        for part in parts:
            with pytest.raises(TypeError, match=f"a {type(part).__name__} cannot be copied or pickled.*make another"):
                COPIES[how](part)
        with pytest.raises(TypeError, match="a FlashMoE cannot be copied"):
            pickle.dumps({"model": [layer]}) if how == "pickle" else copy.deepcopy({"model": [layer]})
    before = layer(X)
    assert_same_bits(layer(X), before, "the layer after it")


def test_errors_travel_between_processes():
    assert str(pickle.loads(pickle.dumps(FlashMoEError("why")))) == "why"
