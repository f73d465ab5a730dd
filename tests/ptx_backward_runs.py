"""Backwards run through `FlashMoE` on `simulated_gpu`, late stores on, the gradients of each checked by the oracle."""

import time
from dataclasses import dataclass, replace

import numpy as np
from backward_cases import arrays_of
from cases import assert_same_bits, random_routing, random_tokens
from ptx_backward_worlds import make_world
from ptx_runs import DEADLINE_S, LATE_NS, MULTIPROCESSORS
from ptx_same_bits import RANKS, SCHEDULES

from flashmoe_numba import FlashMoE
from flashmoe_numba.bench.backward import of_ranks
from flashmoe_numba.bench.check_gradients import check_gradients
from flashmoe_numba.ptx.linked import is_backward
from flashmoe_numba.ptx.simulated import simulated_gpu
from reference import Workload
from reference.weights import EXPERT_ARRAYS, SHARED_ARRAYS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave: the gradients of each rank for every backward, and what its kernel did."""

    gradients: list[list[object]]
    text: str
    executed: np.ndarray  # int64 [steps]: how often each ran
    steps: int
    poisoned_rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A call that is kept."""

    x: list[np.ndarray]
    dy: list[np.ndarray]
    saved: object
    given: dict[str, list[np.ndarray]]
    routing: list[object]


def run_world(world, *, text=None, seed=None, num_processors=None, own_gpus=None, late_ns=LATE_NS):
    """Run all calls of a world, and their backwards.

    Args:
        text: PTX to run in place of the backward's own.
        seed, num_processors, own_gpus: in place of the world's.

    Raises:
        AssertionError: a gradient is wrong.
        PtxFault: what the machine found wrong.
    """
    started = time.monotonic()
    world = replace(
        world,
        seed=world.seed if seed is None else seed,
        num_processors=num_processors or world.num_processors,
        own_gpus=world.own_gpus if own_gpus is None else own_gpus,
    )
    own = world.num_processors + 1 if world.own_gpus else None
    how = dict(seed=world.seed, late_ns=late_ns, blocks_per_gpu=own, text=text, multiprocessors=MULTIPROCESSORS)
    with simulated_gpu(world.variant.architecture, **how) as gpu:
        gradients = _run_calls(world, gpu)
        ((text, executed),) = ((text, ran) for text, ran in gpu.machine.executed.items() if is_backward(text))
        return Outcome(
            gradients=gradients, text=text, executed=executed, steps=gpu.machine.steps,
            poisoned_rows=gpu.machine.poisoned_rows, seconds=time.monotonic() - started,
        )  # fmt: skip


def _run_calls(world, gpu):
    settings = dict(backend="cuda", num_processors=world.num_processors, tf32=world.tf32, save=world.save)
    wanted, found = dict(experts=world.experts, router=world.router), []
    with FlashMoE(world.config, world.weights, deadline_s=DEADLINE_S, packing=world.packing, **settings) as layer:
        chosen = replace(layer._backend.variant, backward=True)
        assert chosen == world.variant, f"{world}: {chosen.name} was chosen"
        for kept in [_keep(world, gpu, layer, call) for call in range(len(world.counts))][::-1]:
            dy = [gpu.cupy.asarray(part) for part in kept.dy]
            first = layer.backward(kept.saved, dy, retain=True, **wanted)
            one = of_ranks(first, list, gpu.cupy.asnumpy)
            _check(world, kept, one)
            twice = layer.backward(kept.saved, dy, into=first, **wanted)  # goes on with the sums, which are then double
            _check(world, kept, list(map(_halved, of_ranks(twice, list, gpu.cupy.asnumpy))))
            found.append(one)
        layer.synchronize()
    return found


def _keep(world, gpu, layer, call):
    """Call number `call`, whose routing and tokens are gone from the host's arrays by the time of its backward."""
    c, counts, seed = world.config, world.counts[call], 100 * world.number + call
    x, dy = random_tokens(c, counts, seed), random_tokens(c, counts, seed + 50)
    given = {}
    if world.routed:
        given = dict(zip(("topk_idx", "topk_weights"), random_routing(c, counts, seed, 2.0), strict=True))
    tokens = [gpu.cupy.asarray(part) for part in x]
    _, saved = layer.forward(tokens, **given)
    routing = layer.routing
    for part in tokens:
        part[...] = np.zeros(1, part.dtype)
    return Kept(x=x, dy=dy, saved=saved, given=given, routing=routing)


# ---- checking one


def _check(world, kept, found):
    """Each gradient by its own bound; TF32 has the ten bits of float16's mantissa."""
    judged_as = replace(world.config, dtype="float16") if world.tf32 else world.config
    filled = [_filled(world, rank, of_rank) for rank, of_rank in enumerate(found)]
    verdict = check_gradients(judged_as, world.weights, Workload(kept.x, **kept.given), kept.routing, kept.dy, filled)
    wrong = {name: share for name, share in verdict.shares.items() if share > 1 and not _is_frozen(world, name)}
    assert not wrong, f"{world}, {world.config}: shares of what gradients may be off: {wrong}"


def _is_frozen(world, name):
    """Are these weights ones whose gradients are not wanted?"""
    if name in (*EXPERT_ARRAYS, *SHARED_ARRAYS, "shared_gate_weight"):
        return not world.experts
    return name in ("router", "router_bias", "expert_scale") and not world.router


def _filled(world, rank, found):
    """With zeros for gradients that were not wanted, which must not be there."""
    wanted, has = arrays_of(world.weights.shard(rank, world.config.num_ranks)), arrays_of(found.weights)
    frozen = {name: np.zeros(array.shape) for name, array in wanted.items() if _is_frozen(world, name)}
    assert not any(name in has and has[name].size for name in frozen), f"{world}: {sorted(has)}"
    return replace(found, weights=replace(found.weights, **frozen))


def _halved(found):
    return replace(found, weights=replace(found.weights, **{n: a / 2 for n, a in arrays_of(found.weights).items()}))


# ---- the same bits


def check_schedules(variant, text=None):
    """Of threads and late stores by the seed, of blocks by their number, of fences by which ranks share a GPU.

    Raises:
        AssertionError: naming world and schedule.
    """
    world = make_world(variant, 0)
    expected = run_world(world, text=text).gradients
    for seed, num_processors, own_gpus in SCHEDULES:
        how = dict(seed=seed, num_processors=num_processors, own_gpus=own_gpus)
        for got, wanted in zip(run_world(world, text=text, **how).gradients, expected, strict=True):
            for rank, (one, other) in enumerate(zip(got, wanted, strict=True)):
                _assert_same(one.arrays(), other.arrays(), f"{world}, {how}, rank {rank}")


def check_ranks(variant, text=None):
    """Eight tokens of one, two or four ranks, by the same experts: gradients of tokens and of experts.

    Raises:
        AssertionError: naming the number of ranks.
    """
    expected, *others = (_eight_tokens(variant, text, *how) for how in RANKS)
    for got, (num_ranks, *_) in zip(others, RANKS[1:], strict=True):
        _assert_same(got, expected, f"{variant.name} on {num_ranks} ranks, and on one")


def _eight_tokens(variant, text, num_ranks, num_processors, own_gpus):
    small, each = make_world(variant, 0), 8 // num_ranks
    sizes = dict(num_experts=4, num_topk=2, capacity=None, hidden=40, ffn=24, num_zero=0, shared_ffn=0)
    sizes |= dict(tile_n=128 if variant.tensor_cores else 64)  # by which the variant is chosen
    world = replace(
        small,
        config=replace(small.config, num_ranks=num_ranks, num_tokens=each, **sizes),
        counts=((each,) * num_ranks,),
        num_processors=num_processors,
        own_gpus=own_gpus,
    )
    (of_call,) = run_world(world, text=text).gradients
    arrays = [arrays_of(of_rank.weights) for of_rank in of_call]
    names = ("x", "topk_weights", "logits")
    joined = [np.concatenate([getattr(of_rank, name) for of_rank in of_call]) for name in names]
    return joined + [np.concatenate([each[name] for each in arrays]) for name in ("up_proj", "down_proj")]


def _assert_same(got, wanted, case):
    for one, other in zip(got, wanted, strict=True):
        assert_same_bits(one, other, case)


CHECKS = {"schedules": check_schedules, "ranks": check_ranks}
