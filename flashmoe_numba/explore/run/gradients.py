"""The gradients that a backward should make: the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from reference import Weights
from reference.backward import Gradients, moe_layer_backward

from .calls import Call
from .world import WatchedWorld

TOLERANCE = 1e-12  # of float64, times the largest element
Arrays = dict[str, np.ndarray]  # by the names that kernel/backward/state.py has for them


class Reference:
    """Gradients of a world's backwards, those of weights summed up as its ranks do."""

    def __init__(self, world: WatchedWorld) -> None:
        self._world, self._spec = world, world.spec
        self._found: dict[int, Gradients] = {}  # by call

    def wrong(self, call: int, ranks: Sequence[Call]) -> Iterator[str]:
        """A sentence for each array that is not what it should be; of float64 worlds, others have no bound yet."""
        if self._spec.config.dtype != "float64":
            return
        config, exact = self._spec.config, self._of(call)
        replicated: Arrays = {}
        for rank, own in enumerate(ranks):
            wanted = {"x": exact.x[rank], "topk_weights": exact.topk_weights[rank]}
            wanted |= {"logits": exact.logits[rank]} if exact.logits is not None else {}
            wanted |= self._sum(call, lambda of: _of_experts(of.shard(rank, config.num_ranks)))  # noqa: B023
            yield from _differences(f"rank {rank}, call {call}", own.gradients | {"x": own.y}, wanted)
            for name in own.gradients.keys() - wanted.keys():
                replicated[name] = replicated.get(name, 0) + own.gradients[name]
        yield from _differences(f"call {call}", replicated, self._sum(call, _of_all))

    def _of(self, call: int) -> Gradients:
        if call not in self._found:
            (x, given), (dy, _) = (self._world.data[i - 1] for i in (self._spec.program[call - 1], call))
            outside = [routing for routing in given if routing is not None]  # of all ranks, or of none
            idx, factors = [routing.topk_idx for routing in outside], [routing.topk_weights for routing in outside]
            weights, config = self._world.weights, self._spec.config
            self._found[call] = moe_layer_backward(x, dy, weights, config, idx or None, factors or None)
        return self._found[call]

    def _sum(self, call: int, arrays_of: Callable[[Weights], Arrays]) -> Arrays:
        """Of all backwards up to this one."""
        calls = [i for i, forward in enumerate(self._spec.program[:call], start=1) if forward]
        parts = [arrays_of(self._of(i).weights) for i in calls]
        return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


def _differences(case: str, found: Arrays, wanted: Arrays) -> Iterator[str]:
    for name, exact in wanted.items():
        values, exact = found[name].reshape(-1), exact.reshape(-1)
        if values.shape != exact.shape:
            yield f"{case}: gradient {name} has {values.size} elements, wanted {exact.size}"
            continue
        error = np.abs(values - exact)
        limit = TOLERANCE * np.abs(exact).max(initial=0) + TOLERANCE
        for i in np.flatnonzero(~(error <= limit))[:1].tolist():
            yield f"{case}: gradient {name}[{i}] is {values[i]}, wanted {exact[i]}, within {limit:.1e}"


def _of_experts(weights: Weights) -> Arrays:
    """As kernels lay them out: the gate's rows before those of up."""
    assert weights.down_bias is not None, "worlds have biases"
    matrices, biases = ([part for part in parts if part is not None] for parts in zip(*weights.ups, strict=True))
    ups = {"up": np.concatenate(matrices, axis=1), "up_bias": np.concatenate(biases, axis=1)}
    return ups | {"down": weights.down_proj, "down_bias": weights.down_bias}


def _of_all(weights: Weights) -> Arrays:
    """Of the router and the shared expert, which every rank has."""
    extras = {"logit_bias": weights.router_bias, "expert_scale": weights.expert_scale}
    extras |= {"shared_gate": weights.shared_gate_weight}
    shared = {} if weights.shared is None else _of_experts(weights.shared)
    found = {"router": weights.router} | {f"shared_{name}": array for name, array in shared.items()}
    return found | {name: array for name, array in extras.items() if array is not None}
