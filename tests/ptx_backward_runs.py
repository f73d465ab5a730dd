"""Backwards run through `FlashMoE` on `simulated_gpu`, late stores on, the gradients of each checked by the oracle."""

from dataclasses import dataclass, replace

import numpy as np
from backward_cases import arrays_of
from cases import random_routing, random_tokens
from ptx_simulated import DEADLINE_S, simulated

from flashmoe_numba import FlashMoE
from flashmoe_numba.bench.backward import of_ranks
from flashmoe_numba.bench.check_gradients import check_gradients
from reference import Workload
from reference.weights import EXPERT_ARRAYS, SHARED_ARRAYS


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A call that is kept."""

    x: list[np.ndarray]
    dy: list[np.ndarray]
    saved: object
    given: dict[str, list[np.ndarray]]
    routing: list[object]


def run_world(world, **how):
    """Run all calls of a world, and their backwards, each once alone and once going on with the first one's sums.

    Args:
        how: of `simulated`.

    Raises:
        AssertionError: a gradient is wrong.
        PtxFault: what the machine found wrong.
    """
    return simulated(world, _run_calls, **how)


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
            found.append(list(map(_by_name, one)))
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


def _by_name(gradients):
    """The arrays that a rank's gradients have."""
    return {name: array for name, array in vars(gradients).items() if isinstance(array, np.ndarray)} | arrays_of(
        gradients.weights
    )


# ---- checking one


def _check(world, kept, found):
    """Each gradient by its own bound."""
    filled = [_filled(world, rank, of_rank) for rank, of_rank in enumerate(found)]
    workload = Workload(kept.x, **kept.given)
    verdict = check_gradients(world.config, world.weights, workload, kept.routing, kept.dy, filled, world.tf32)
    wrong = {name: share for name, share in verdict.shares.items() if share > 1 and not _is_frozen(world, name)}
    assert not wrong, f"{world}, {world.config}: shares of what gradients may be off: {wrong}"


def _is_frozen(world, name):
    """Are these weights ones whose gradients are not wanted?"""
    if name in (*EXPERT_ARRAYS, *SHARED_ARRAYS, "shared_gate_weight", "result_scale"):
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
