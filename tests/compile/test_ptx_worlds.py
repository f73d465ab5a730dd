"""Linked kernels, executed on small worlds: equal to the oracle, given up where they must be, the same bits always.

The fast profile runs a few worlds of some variants; nightly runs all. `make ptx-worlds` does so in two processes, and
tells which instructions ran.
"""

import importlib.util
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from cases import assert_same_bits
from conftest import VARIANTS

if not importlib.util.find_spec("numba_cuda"):
    reason = "numba-cuda is not installed: pip install 'flashmoe-numba[compile]'"
    pytest.skip(reason, allow_module_level=True)

from ptx_coverage import DIVISION, report
from ptx_runs import run_world
from ptx_worlds import WORLDS, Call, make_world

from flashmoe_numba.build.variants import Variant
from flashmoe_numba.ptx.faults import PtxFault
from flashmoe_numba.ptx.linked import linked_ptx
from flashmoe_numba.ptx.program import SOURCE, load

pytestmark = pytest.mark.timeout(600)  # the first one compiles the machine, a minute or two

FAST_NUMBERS = (2, 7, 23)  # a replay with a trace on two ranks, many tokens, calls that are given up
NUMBERS = {"nightly": range(WORLDS), "ci": range(0, WORLDS, 8)}.get(os.environ.get("HYPOTHESIS_PROFILE"), FAST_NUMBERS)
LANES = Variant(dtype="float32", architecture="sm_80", tensor_cores=False)
TENSOR = Variant(dtype="float16", architecture="sm_90a", tensor_cores=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("number", NUMBERS)
def test_equals_the_oracle(variant, number, folder):
    outcome = run_world(make_world(variant, number), text=linked_ptx(variant, folder))
    assert outcome.steps > 0
    assert variant.tensor_cores or outcome.poisoned_rows == 0, "only TMA reads rows that nobody wrote, beyond a packet"


# ---- worlds are what they promise


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_what_the_worlds_of_a_variant_have(variant):
    worlds = [make_world(variant, number) for number in range(WORLDS)]
    configs = [world.config for world in worlds]
    assert {config.num_ranks for config in configs} >= {1, 2, 3, 4, 5}
    assert sum(config.num_ranks > 1 for config in configs) >= WORLDS // 2
    assert sum(world.own_gpus for world in worlds) >= WORLDS // 2
    assert {(config.gated, config.activation) for config in configs} >= {
        (gated, activation) for gated in (False, True) for activation in ("gelu", "silu")
    }
    assert {config.activation for config in configs} == {"identity", "relu", "gelu", "silu"}
    assert any(config.num_topk == config.num_experts > 1 for config in configs)
    assert any(config.capacity for config in configs)
    calls = [call for world in worlds for call in world.calls]
    assert any(0 in call.counts for call in calls)
    assert any(call.padded for call in calls) and any(call.captured for call in calls)
    assert any(call.spoiled for call in calls) and sum(len(world.endings) for world in worlds) >= WORLDS


def test_a_number_gives_the_same_world_always():
    assert make_world(TENSOR, 5) == make_world(TENSOR, 5)
    assert make_world(TENSOR, 5) != make_world(replace(TENSOR, dtype="bfloat16"), 5)


# ---- the same bits


@pytest.mark.parametrize("variant", [LANES, TENSOR], ids=lambda variant: variant.name)
def test_bits_do_not_depend_on_the_schedule(variant, folder):
    """Of threads and late stores by the seed, of blocks by their number, of fences by which ranks share a GPU."""
    world, text = make_world(variant, 2), linked_ptx(variant, folder)
    expected = run_world(world, text=text).ys
    for seed, num_processors, own_gpus in ((101, 1, True), (102, 3, False), (103, 2, True)):
        how = dict(seed=seed, num_processors=num_processors, own_gpus=own_gpus)
        for got, wanted in zip(run_world(world, text=text, **how).ys, expected, strict=True):
            assert_same_bits(got, wanted, f"{world}, {how}")


@pytest.mark.parametrize("variant", [LANES, TENSOR], ids=lambda variant: variant.name)
def test_bits_do_not_depend_on_the_ranks(variant, folder):
    """Eight tokens of one, two or four ranks, by the same experts."""
    small, text, results = make_world(variant, 0), linked_ptx(variant, folder), []
    config = replace(small.config, num_experts=4, num_topk=2, capacity=None, hidden=40, ffn=24, tile_n=128)
    for num_ranks in (1, 2, 4):
        world = replace(
            small,
            config=replace(config, num_ranks=num_ranks, num_tokens=8 // num_ranks),
            calls=(Call(counts=(8 // num_ranks,) * num_ranks, seed=3),),
            num_processors=1,
        )
        results.append(np.concatenate(run_world(world, text=text).ys[0]))
    for got in results[1:]:
        assert_same_bits(got, results[0])


# ---- faults in the text show


def test_a_wrong_product_is_not_equal_to_the_oracle(folder):
    text = re.sub(r"fma\.rn\.f32 \t(%\w+), (%\w+), %\w+,", r"fma.rn.f32 \t\1, \2, \2,", linked_ptx(LANES, folder))
    assert text != linked_ptx(LANES, folder)
    with pytest.raises(AssertionError):
        run_world(make_world(LANES, 2), text=text)


def test_signals_that_do_not_reach_another_gpu_are_found(folder):
    text = linked_ptx(LANES, folder).replace("st.release.sys", "st.release.gpu")
    world = make_world(LANES, 2)
    assert world.own_gpus and world.config.num_ranks > 1
    with pytest.raises(PtxFault):
        run_world(world, text=text)


# ---- what never ran


def test_a_division_that_never_ran_is_explained(folder):
    text = linked_ptx(LANES, folder)
    program = load(text)
    names = np.array([i.name for i in program.listing.instructions])[program.code[:, SOURCE]]
    executed = np.ones(len(program.code), np.int64)
    assert report(text, executed)[1:] == (0, {}, [])
    (first, *_), _ = np.flatnonzero(names == "div.s64"), None
    executed[first : first + 4] = 0  # quotient, product, remainder, and the way on
    _, never, reasons, unexplained = report(text, executed)
    assert (never, reasons, unexplained) == (4, {DIVISION: 4}, [])
