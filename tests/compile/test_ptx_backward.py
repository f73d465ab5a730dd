"""Linked kernels of backwards, executed on small worlds: gradients equal to the oracle's, the same bits always.

The fast profile runs a few worlds of two kernels, ci every sixth of each variant, nightly all (`make ptx-worlds`).
"""

import importlib.util
import os
import re

import pytest
from built_variants import BACKWARDS

if not importlib.util.find_spec("numba_cuda"):
    pytest.skip("numba-cuda is not installed: pip install 'flashmoe-numba[compile]'", allow_module_level=True)

from kinds import ROUTERS
from ptx_backward_runs import run_world
from ptx_backward_worlds import TALL, WORLDS, make_world
from ptx_same_bits import CHECKS

from flashmoe_numba.build.variants import Variant
from flashmoe_numba.ptx.faults import PtxFault
from flashmoe_numba.ptx.linked import linked_ptx
from reference.activations import ACTIVATIONS
from reference.layout import SAVES
from reference.runs import packet_tile_height

pytestmark = pytest.mark.timeout(600)  # the first one compiles the machine, a minute or two

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fast")
LANES = Variant(dtype="float32", architecture="sm_80", tensor_cores=False, backward=True)
TENSOR = Variant(dtype="float16", architecture="sm_90a", tensor_cores=True, backward=True)
FAST = [(LANES, 1), (LANES, 4), (TENSOR, 2), (TENSOR, 4), (TENSOR, 18)]
NUMBERS = {"nightly": range(WORLDS), "ci": range(0, WORLDS, 6)}.get(PROFILE, ())
CASES = [(variant, number) for variant in BACKWARDS for number in NUMBERS] or FAST
SAME_BITS = [(variant, what) for variant in BACKWARDS for what in CHECKS]
if PROFILE != "nightly":
    SAME_BITS = [(LANES, "ranks"), (TENSOR, "schedules")]


@pytest.mark.parametrize(("variant", "number"), CASES, ids=lambda part: getattr(part, "name", part))
def test_gradients_equal_the_oracles(variant, number, folder):
    outcome = run_world(make_world(variant, number), text=linked_ptx(variant, folder))
    assert outcome.steps > 0 and outcome.executed.sum() > 0
    assert variant.tensor_cores or outcome.poisoned_rows == 0, "only TMA reads rows that nobody wrote, beyond a packet"


@pytest.mark.parametrize(("variant", "what"), SAME_BITS, ids=lambda part: getattr(part, "name", part))
def test_bits_do_not_depend_on(variant, what, folder):
    CHECKS[what](variant, linked_ptx(variant, folder))


@pytest.mark.parametrize("variant", BACKWARDS, ids=lambda variant: variant.name)
def test_what_the_worlds_of_a_variant_have(variant):
    worlds = [make_world(variant, number) for number in range(WORLDS)]
    configs = [world.config for world in worlds]
    assert {config.num_ranks for config in configs} >= {1, 2, 3, 4}
    assert {(world.save, world.config.shared_ffn > 0) for world in worlds} >= {(s, t) for s in SAVES for t in (0, 1)}
    assert {config.activation for config in configs} == set(ACTIVATIONS)
    assert {config.router_kind for config in configs} >= {k for k in ROUTERS.values() if k.choice != "given"}
    assert {config.expert_kind.bound for config in configs} >= {"none", "clamp", "clamp_activated", "softcap"}
    normed = [config.num_ranks for config in configs if config.expert_kind.norm_eps is not None]
    assert max(normed) > 1, "what a norm takes away comes home from another rank"
    assert any(config.capacity for config in configs) and any(config.zero == "identity" for config in configs)
    assert any(world.routed for world in worlds) and not all(world.experts and world.router for world in worlds)
    assert any(0 in counts for world in worlds for counts in world.counts)
    tall = [make_world(variant, number) for number in TALL]
    for alone in (True, False):  # in order, and of several sources
        of_kind = [world for world in tall if (world.config.num_ranks == 1) == alone and world.packing == "sources"]
        rows = [part for world in of_kind for part in tile_rows(sum(world.counts[0]))]
        assert {packet_tile_height(r, tall[0].config) for r in rows} == {16, 32, 64, 128}


def tile_rows(rows):
    """Of the tiles of an expert that has all its rows."""
    return [128] * (rows // 128) + ([rows % 128] if rows % 128 else [])


def test_a_wrong_product_is_not_equal_to_the_oracles(folder):
    text = linked_ptx(LANES, folder)
    wrong = re.sub(r"fma\.rn\.f32 \t(%\w+), (%\w+), %\w+,", r"fma.rn.f32 \t\1, \2, \2,", text)
    assert wrong != text
    with pytest.raises(AssertionError, match="shares of what gradients may be off"):
        run_world(make_world(LANES, 1), text=wrong)


def test_signals_that_do_not_reach_another_gpu_are_found(folder):
    text = linked_ptx(LANES, folder).replace("st.release.sys", "st.release.gpu")
    world = next(w for w in (make_world(LANES, n) for n in range(WORLDS)) if w.own_gpus and w.config.num_ranks > 1)
    with pytest.raises(PtxFault):
        run_world(world, text=text)


def test_a_proxy_fence_is_needed_where_gradients_were_just_stored(folder):
    text = linked_ptx(TENSOR, folder)
    assert "fence.proxy.async;" in text
    with pytest.raises(PtxFault):
        run_world(make_world(TENSOR, 4), text=text.replace("fence.proxy.async;", ""))
