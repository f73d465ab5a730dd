"""Linked kernels, executed on small worlds: equal to the oracle, given up where they must be, the same bits always.

The fast profile runs four worlds, ci every eighth of each variant, nightly all. `make ptx-worlds` does so in two
processes, and tells which instructions ran.
"""

import contextlib
import gc
import importlib.util
import os
import re
import weakref
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
from built_variants import VARIANTS

if not importlib.util.find_spec("numba_cuda"):
    reason = "numba-cuda is not installed: pip install 'flashmoe-numba[compile]'"
    pytest.skip(reason, allow_module_level=True)

import ptx_same_bits
import run_ptx_worlds
from kinds import EXPERTS, ROUTERS
from ptx_coverage import COLUMN, DIVISION, OTHER, report
from ptx_passes import FORWARD
from ptx_runs import run_world
from ptx_same_bits import CHECKS
from ptx_worlds import WORLDS, Call, make_world
from run_ptx_worlds import has_failed

from flashmoe_numba.build.variants import Variant
from flashmoe_numba.ptx import simulated
from flashmoe_numba.ptx.faults import PtxFault
from flashmoe_numba.ptx.linked import linked_ptx
from flashmoe_numba.ptx.machine import Machine
from flashmoe_numba.ptx.memory import Arena
from flashmoe_numba.ptx.program import SOURCE, load
from reference import MoEConfig
from reference.activations import ACTIVATIONS

pytestmark = pytest.mark.timeout(600)  # the first one compiles the machine, a minute or two

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fast")
LANES = Variant(dtype="float32", architecture="sm_80", tensor_cores=False)
TENSOR = Variant(dtype="float16", architecture="sm_90a", tensor_cores=True)
BLACKWELL = replace(LANES, architecture="sm_100a")
# A replay with a trace on two ranks, many tokens, calls that are given up; a shared expert of tokens at an odd address.
FAST = [(LANES, 23), (TENSOR, 2), (TENSOR, 5), (TENSOR, 7), (BLACKWELL, 2)]
NUMBERS = {"nightly": range(WORLDS), "ci": range(0, WORLDS, 8)}.get(PROFILE, ())
CASES = [(variant, number) for variant in VARIANTS for number in NUMBERS] or FAST
SAME_BITS = VARIANTS if PROFILE == "nightly" else [LANES, TENSOR]


@pytest.mark.parametrize(("variant", "number"), CASES, ids=lambda part: getattr(part, "name", part))
def test_equals_the_oracle(variant, number, folder):
    outcome = run_world(make_world(variant, number), text=linked_ptx(variant, folder))
    assert outcome.steps > 0
    assert variant.tensor_cores or outcome.poisoned_rows == 0, "only TMA reads rows that nobody wrote, beyond a packet"


@pytest.mark.parametrize("variant", [LANES, TENSOR], ids=lambda variant: variant.name)
def test_other_kinds_equal_the_oracle(variant, folder):
    """Each kind of router and of experts, on one rank or two."""
    unit = 8 if variant.tensor_cores else 5
    sizes = dict(num_tokens=5, hidden=5 * unit, ffn=3 * unit, capacity=None, tile_m=16, tile_m_min=8, tile_n=128)
    kinds = [(router, expert) for expert, router in zip(cycle(EXPERTS.values()), ROUTERS.values())]
    for i, (router, expert) in enumerate(kind for kind in kinds if kind[0].choice != "given"):
        sizes |= dict(num_ranks=1 + i % 2, num_experts=12 + router.num_always, num_topk=3 + router.num_always)
        config = MoEConfig(**sizes, dtype=variant.dtype, router=router, expert=expert)
        calls = (Call(counts=(5, 3)[: config.num_ranks], seed=i),)
        world = replace(make_world(variant, 0), config=config, calls=calls, bias=True, num_processors=1)
        assert run_world(world, text=linked_ptx(variant, folder)).steps > 0


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
    assert {config.activation for config in configs} == set(ACTIVATIONS)
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


@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("variant", SAME_BITS, ids=lambda variant: variant.name)
def test_bits_do_not_depend_on(what, variant, folder):
    CHECKS[what](variant, linked_ptx(variant, folder))


@pytest.mark.parametrize("what", CHECKS)
def test_other_bits_are_noticed(what, monkeypatch):
    """A run of other bits than all before it."""
    runs = []

    def run(world, **how):
        runs.append((world, how))
        return SimpleNamespace(results=[[{"y": np.zeros(2) + (len(runs) == 3)}]])

    monkeypatch.setattr(ptx_same_bits, "pass_of", lambda variant: replace(FORWARD, run_world=run))
    with pytest.raises(AssertionError, match="2 elements differ" if what == "schedules" else "on 4 ranks, and on one"):
        CHECKS[what](LANES)


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


# ---- what is left


@pytest.mark.parametrize("fails", [False, True])
def test_the_memory_of_a_gpu_goes_with_it(fails, folder, monkeypatch):
    """At once: Python looks for cycles when many objects are made, which says nothing of how large they are."""
    left = []

    class Watched(Arena):
        def __init__(self, num_bytes):
            super().__init__(num_bytes)
            left.extend(map(weakref.ref, (self.cells, self.lines, self.bytes.base)))

    monkeypatch.setattr(simulated, "Arena", Watched)
    if fails:
        monkeypatch.setattr(simulated, "Machine", lambda **options: Machine(most_steps=1000, **options))
    gc.disable()
    try:
        with pytest.raises(PtxFault) if fails else contextlib.nullcontext():
            run_world(make_world(LANES, 1), text=linked_ptx(LANES, folder))
        assert [memory() for memory in left] == [None] * 3
    finally:
        gc.enable()


# ---- what never ran


def test_a_division_that_never_ran_is_explained(folder):
    text = linked_ptx(LANES, folder)
    program = load(text)
    names = np.array([i.name for i in program.listing.instructions])[program.code[:, SOURCE]]
    executed = np.ones(len(program.code), np.int64)
    assert report(LANES, text, executed)[1:] == (0, {}, [])
    (first, *_), _ = np.flatnonzero(names == "div.s64"), None
    executed[first : first + 4] = 0  # quotient, product, remainder, and the way on
    _, never, reasons, unexplained = report(LANES, text, executed)
    assert (never, reasons, unexplained) == (4, {DIVISION: 4}, [])


@pytest.mark.parametrize(("variant", "reason"), [(TENSOR, COLUMN), (LANES, OTHER)], ids=["tensor cores", "lanes"])
def test_a_part_of_one_column_is_explained_where_there_are_tensor_cores(variant, reason, folder):
    text = linked_ptx(variant, folder)
    program = load(text)
    instructions = program.listing.instructions
    widths = {i.operands[0] for i in instructions if i.name == "min.s64"}
    compared = [i for i in instructions if i.name == "setp.eq.s64" and i.operands[2] == "1"]
    tests = {i.operands[0] for i in compared if i.operands[1] in widths}
    branch = next(i for i in instructions if i.name == "bra" and i.guard in tests)
    executed = np.ones(len(program.code), np.int64)
    executed[program.code[:, SOURCE] == program.listing.labels[branch.operands[0]]] = 0
    assert report(variant, text, executed)[2] == {reason: 1}


def test_what_makes_a_run_of_all_worlds_fail(folder, monkeypatch):
    """A world, a check, or an instruction that never ran and that no reason explains."""
    text = linked_ptx(LANES, folder)
    monkeypatch.setattr(run_ptx_worlds, "linked_ptx", lambda *_: text)
    ran = np.ones(len(load(text).code), bool)

    def row(ran, wrong=None, check=None):
        outcome = None if wrong else (ran, 1, 0, 0.0)
        return run_ptx_worlds.row_of(LANES, [(LANES, 0, wrong, outcome)], [("ranks", check)])

    assert not has_failed(row(ran))
    assert has_failed(row(ran, wrong="another y")) and has_failed(row(ran, wrong="another y"), all_worlds=False)
    assert row(ran, check="other bits")["wrong"] == {"the same bits, ranks": "other bits"}
    assert has_failed(row(ran, check="other bits"))
    ran[0] = False
    (line,) = row(ran)["unexplained"]
    assert re.fullmatch(r"PTX lines \d+ to \d+, where no branch leads", line)
    assert has_failed(row(ran)) and not has_failed(row(ran), all_worlds=False)
