"""Linked kernels of layers on GPUs of several hosts, executed: with a stand-in for NVSHMEM's device code that copies.

All that is ours runs as it is: the verbs of the network, what they call, and where everything lies. When NVSHMEM brings
what was put, and what a lost rank does to it, is not shown here.
"""

import importlib.util

import numpy as np
import pytest

if not importlib.util.find_spec("numba_cuda"):
    pytest.skip("numba-cuda is not installed: pip install 'flashmoe-numba[compile]'", allow_module_level=True)

from cases import assert_equals_oracle, assert_same_bits, random_tokens, tiny_config
from nightly import at_night, at_night_only
from ptx_hosts import layer_on_hosts

from flashmoe_numba.bench.backward import of_ranks
from flashmoe_numba.bench.check_gradients import check_gradients
from flashmoe_numba.build.variants import Variant
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.kernel import control as s
from flashmoe_numba.kernel.queue import COUNTER_STRIDE, GATES_DONE, NUM_COUNTERS
from flashmoe_numba.ptx.faults import PtxFault
from reference import Hosts, Weights, Workload
from reference.layout import CONTROL_WORDS

pytestmark = pytest.mark.timeout(600)  # the first one compiles the machine, a minute or two

LANES = Variant(dtype="float32", architecture="sm_80", tensor_cores=False, heap="nvshmem")
TENSOR = Variant(dtype="float16", architecture="sm_90a", tensor_cores=True, heap="nvshmem")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of kernels with the stand-in, which nobody else wants."""
    return tmp_path_factory.mktemp("kernels")


def config_for(variant, num_ranks, **sizes):
    """Rows of whole 16 bytes for tensor cores, which choose a variant; others for lanes."""
    columns = dict(hidden=24, ffn=16, tile_n=128, tile_m=16, tile_m_min=8) if variant.tensor_cores else {}
    sizes = dict(num_ranks=num_ranks, num_experts=num_ranks, num_tokens=5, dtype=variant.dtype) | columns | sizes
    return tiny_config(**sizes)


@pytest.mark.parametrize("which", [
    (TENSOR, (0, 0, 1, 1)), (LANES, (0, 1, 0)), *at_night_only((TENSOR, (0, 1)), (LANES, (0, 1)))
], ids=str)  # fmt: skip
def test_a_layer_equals_the_oracle_with_the_bits_of_one_host(which, folder):
    variant, of_rank = which
    config = config_for(variant, len(of_rank), num_topk=2)
    weights, rng = Weights.random(config, 1, bias=True), np.random.default_rng(len(of_rank))
    calls = [random_tokens(config, rng.integers(0, 6, len(of_rank)), call) for call in range(3)]

    def results(hosts, seed):
        with layer_on_hosts(variant, folder, config, weights, hosts, seed=seed) as (layer, gpu):
            for x in calls:
                y = [gpu.cupy.asnumpy(part) for part in layer([gpu.cupy.asarray(part) for part in x])]
                assert_equals_oracle(y, x, weights, config, layer.routing)
                yield y

    for y, one in zip(results(Hosts(of_rank), 3), results(Hosts.one(len(of_rank)), 0), strict=True):
        assert_same_bits(y, one)


@pytest.mark.parametrize(("variant", "save"), [
    (LANES, "nothing"), pytest.param(TENSOR, "rows+up", marks=at_night("links for half a minute"))
], ids=str)  # fmt: skip
def test_gradients_equal_the_oracles(variant, save, folder):
    """Factors, dots and rows that are sent again go as puts without a flag."""
    config = config_for(variant, 3)
    weights, counts = Weights.random(config, 1, bias=True), [5, 0, 3]
    x, dy = random_tokens(config, counts, 1), random_tokens(config, counts, 2)
    how = dict(save=save, seed=1)
    with layer_on_hosts(variant, folder, config, weights, Hosts((0, 1, 0)), **how) as (layer, gpu):
        _, saved = layer.forward([gpu.cupy.asarray(part) for part in x])
        routing = layer.routing
        found = layer.backward(saved, [gpu.cupy.asarray(part) for part in dy])
        gradients = of_ranks(found, list, gpu.cupy.asnumpy)
    shares = check_gradients(config, weights, Workload(x), routing, dy, gradients).shares
    assert shares and max(shares.values()) <= 1, f"shares of what gradients may be off: {shares}"


@pytest.mark.parametrize("seed", [2, 5])
def test_the_record_of_who_gives_up_comes_to_the_other_host_before_its_abort_word(seed, folder):
    """The last rank's gate never opens. It gives up, or the first one does, which misses its packets, or both."""
    config = config_for(LANES, 2, num_topk=1)
    how = dict(seed=seed, deadline_s=1e-4)
    with layer_on_hosts(LANES, folder, config, Weights.random(config), Hosts((0, 1)), **how) as (layer, gpu):
        ranks, heap, at = layer._ranks, layer._parts.heap, layer._parts.layout.control
        ranks[1].queue.counters[(NUM_COUNTERS + GATES_DONE) * COUNTER_STRIDE] = 1000  # of an odd epoch
        seen = [[part[at:].view(np.int64) for part in heap.segments_of(rank)] for rank in range(2)]
        with pytest.raises(FlashMoEError, match=r"gave up in epoch 1: waited for the (gate|dispatch flag of rank 1)"):
            call_and_wait(layer, gpu)
        for rank in range(2):
            own, image = (
                gpu.cupy.asnumpy(control)[:CONTROL_WORDS] for control in (seen[rank][rank], seen[1 - rank][rank])
            )
            named = int(own[s.ABORT]) - 1
            assert s.record_in(gpu.cupy.asnumpy(seen[rank][named])), f"rank {rank} names {named}"
            assert s.record_in(own) == s.record_in(image)


def in_function(name, old, new):
    """A change of the text in the body of a function."""

    def change(text):
        begin = text.index(f" {name}(")
        end = text.index("\n}", begin)
        assert old in text[begin:end]
        return text[:begin] + text[begin:end].replace(old, new) + text[end:]

    return change


@pytest.mark.parametrize(("function", "old", "new"), [
    ("flashmoe_put_signal", "st.release.sys", "st.release.gpu"), ("flashmoe_put_signal", "st.release", "st.relaxed"),
    ("flashmoe_acquire", "ld.acquire", "ld.relaxed"),
])  # fmt: skip
def test_a_fault_in_what_the_verbs_call_is_found(function, old, new, folder):
    with pytest.raises(PtxFault):
        make_a_call(folder, seed=3, change=in_function(function, old, new))


def make_a_call(folder, **how):
    config = config_for(LANES, 2)
    with layer_on_hosts(LANES, folder, config, Weights.random(config), Hosts((0, 1)), **how) as (layer, gpu):
        call_and_wait(layer, gpu)


def call_and_wait(layer, gpu):
    layer([gpu.cupy.asarray(part) for part in random_tokens(layer.config)])
    layer.synchronize()
