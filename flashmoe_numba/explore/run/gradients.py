"""The gradients that a backward should make: the reference's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from reference import Weights
from reference.backward import Gradients, moe_layer_backward
from reference.gradient_bounds import gradient_tolerance

from .calls import Call
from .world import WatchedWorld

TOLERANCE = 1e-12  # of float64, times the largest element, or 1
OF_ROUTER = ("router", "logit_bias", "expert_scale")
Arrays = dict[str, np.ndarray]  # by the names that kernel/backward/state.py has for them


class Reference:
    """Gradients of a world's backwards, those of weights summed up as its ranks do."""

    def __init__(self, world: WatchedWorld) -> None:
        self._world, self._spec = world, world.spec
        self._found: dict[int, tuple[Gradients, Gradients | None]] = {}  # by call: exact, and what may be off

    def wrong(self, call: int, ranks: Sequence[Call]) -> Iterator[str]:
        """A sentence for each array that is not what it should be.

        Where elements are rounded, of the arrays that `gradient_tolerance` has a bound for: not of those that the
        router has a part in, nor of the shared expert's, which lie beside the router's.
        """
        if call not in self._found:
            self._found[call] = self._make(call, ranks)
        exact, bounds = self._found[call]
        num_ranks, names = self._spec.config.num_ranks, ["topk_weights"]
        if bounds is None or None not in self._world.data[self._spec.program[call - 1] - 1][1]:
            names.append("x")
        if bounds is None and exact.logits is not None:
            names.append("logits")
        replicated: Arrays = {}
        for rank, own in enumerate(ranks):
            wanted = _of_rank(exact, names, rank) | self._sum(call, rank, num_ranks)
            limits = None
            if bounds is not None:
                limits = _of_rank(bounds, names, rank) | self._sum(call, rank, num_ranks, of_bounds=True)
            yield from _differences(f"rank {rank}, call {call}", own.gradients | {"x": own.y}, wanted, limits)
            for name in own.gradients.keys() - wanted.keys():
                replicated[name] = replicated.get(name, 0) + own.gradients[name]
        if bounds is None:
            yield from _differences(f"call {call}", replicated, self._sum(call), None)

    def _make(self, call: int, ranks: Sequence[Call]) -> tuple[Gradients, Gradients | None]:
        (x, given), (dy, _) = (self._world.data[i - 1] for i in (self._spec.program[call - 1], call))
        weights, config = self._world.weights, self._spec.config
        rounds = config.dtype != "float64"
        routings = [own.routing for own in ranks] if rounds else [part for part in given if part is not None]
        idx, factors = [part.topk_idx for part in routings], [part.topk_weights for part in routings]
        said = [self._world.said(rank, call) for rank in range(0 if rounds else config.num_ranks)]
        logits = [part for part in said if part is not None] or None
        exact = moe_layer_backward(x, dy, weights, config, idx or None, factors or None, logits_gradient=logits)
        return exact, gradient_tolerance(x, dy, weights, config, idx, factors) if rounds else None

    def _sum(self, call: int, rank: int = -1, num_ranks: int = 0, of_bounds: bool = False) -> Arrays:
        """Of all backwards up to this one: of a rank's experts, or of what all ranks have."""
        parts = []
        for i in (i for i in self._found if i <= call):
            found = self._found[i][int(of_bounds)]
            assert found is not None, "a world has one element type"
            parts.append(_of_all(found.weights) if rank < 0 else _of_experts(found.weights.shard(rank, num_ranks)))
        return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0] if self._is_wanted(name)}

    def _is_wanted(self, name: str) -> bool:
        return not (self._spec.frozen_router if name in OF_ROUTER else self._spec.frozen_experts)


def _of_rank(of_ranks: Gradients, names: Sequence[str], rank: int) -> Arrays:
    return {name: getattr(of_ranks, name)[rank] for name in names}


def _differences(case: str, found: Arrays, wanted: Arrays, limits: Arrays | None) -> Iterator[str]:
    for name, exact in wanted.items():
        values, exact = found[name].reshape(-1).astype(np.float64), exact.reshape(-1)
        if values.shape != exact.shape:
            yield f"{case}: gradient {name} has {values.size} elements, wanted {exact.size}"
            continue
        limit = np.full(exact.shape, TOLERANCE * max(1, np.abs(exact).max(initial=0)))
        if limits is not None:
            limit = limits[name].reshape(-1)
        for i in np.flatnonzero(~(np.abs(values - exact) <= limit))[:1].tolist():
            yield f"{case}: gradient {name}[{i}] is {values[i]}, wanted {exact[i]}, within {limit[i]:.1e}"


def _of_experts(weights: Weights) -> Arrays:
    """As kernels lay them out: the gate's rows before those of up."""
    assert weights.down_bias is not None, "worlds have biases"
    matrices, biases = ([part for part in parts if part is not None] for parts in zip(*weights.ups, strict=True))
    ups = {"up": np.concatenate(matrices, axis=1), "up_bias": np.concatenate(biases, axis=1)}
    return ups | {"down": weights.down_proj, "down_bias": weights.down_bias}


def _of_all(weights: Weights) -> Arrays:
    """Of the router, the shared expert and the norm of results, which every rank has."""
    extras = {"logit_bias": weights.router_bias, "expert_scale": weights.expert_scale}
    extras |= {"shared_gate": weights.shared_gate_weight, "result_scale": weights.result_scale}
    shared = {} if weights.shared is None else _of_experts(weights.shared)
    found = {"router": weights.router} | {f"shared_{name}": array for name, array in shared.items()}
    return found | {name: array for name, array in extras.items() if array is not None}
