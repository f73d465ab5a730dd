"""Layers to take gradients of, and the gradients by central differences of `moe_layer`."""

from dataclasses import dataclass, field, fields

import numpy as np
from hypothesis import assume

from reference import ExpertKind, MoEConfig, Weights, moe_layer, moe_layer_backward
from reference.layer import source_routings

STEP, CLOSE = 1e-5, 1e-6
SHARED = dict(shared_ffn=3, shared_gate=True)


@dataclass
class Case:
    """A layer, its input as lists by rank, and the gradient of its results."""

    config: MoEConfig
    counts: list
    seed: int = 0
    bias: bool = True
    routing: dict = field(default_factory=dict)

    def __post_init__(self):
        rng, c = np.random.default_rng(self.seed), self.config
        self.weights = Weights.random(c, seed=self.seed, bias=self.bias)
        self.x, self.dy = ([rng.standard_normal((n, c.hidden)) for n in self.counts] for _ in range(2))
        if c.router_kind.choice == "given":
            self.routing["topk_idx"] = self.with_gaps(rng)

    def with_gaps(self, rng):
        """Any experts, and here and there none."""
        orders = [np.argsort(rng.random((n, self.config.num_choices)), axis=1) for n in self.counts]
        return [np.where(rng.random(o.shape) < 0.1, -1, o)[:, : self.config.num_topk] for o in orders]

    def give_routing(self):
        """Experts and weights, of both signs, instead of the router's own; some pairs are no choice."""
        rng = np.random.default_rng(self.seed + 1)
        idx = self.with_gaps(rng)
        self.routing = dict(topk_idx=idx, topk_weights=[rng.uniform(0.2, 1, i.shape) * (1 - 2 * (i % 2)) for i in idx])

    def give_logits(self):
        rng = np.random.default_rng(self.seed + 1)
        self.routing["logits"] = [rng.standard_normal((n, self.config.num_choices)) for n in self.counts]

    def gradients(self, **more):
        return moe_layer_backward(self.x, self.dy, self.weights, self.config, **self.routing, **more)

    def loss(self):
        y = moe_layer(self.x, self.weights, self.config, **self.routing)
        return sum((a * b).sum() for a, b in zip(self.dy, y, strict=True))

    def idx(self):
        arguments = (self.routing.get(name) for name in ("topk_idx", "topk_weights", "logits"))
        return [r.topk_idx.tolist() for r in source_routings(self.x, self.weights, self.config, *arguments)]

    def inputs(self, gradients):
        """(name, array, its gradient) of all that has one."""
        yield from ((f"x[{rank}]", *pair) for rank, pair in enumerate(zip(self.x, gradients.x, strict=True)))
        for name in [f.name for f in fields(Weights)]:
            if isinstance(getattr(self.weights, name), np.ndarray):
                yield name, getattr(self.weights, name), getattr(gradients.weights, name)
        for name in ("topk_weights", "logits"):
            for part, gradient in zip(self.routing.get(name, []), getattr(gradients, name) or [], strict=False):
                yield name, part, gradient

    def rise(self, array, way, step):
        """Of the loss along `way`, by a central difference."""
        kept, ends = array.copy(), []
        for sign in (1, -1):
            array[...] = kept + sign * step * way
            ends.append(self.loss())
        array[...] = kept
        return (ends[0] - ends[1]) / (2 * step)

    def check(self, sure=True):
        """All gradients, along a way that is in no direction of its own."""
        rng, gradients, seen = np.random.default_rng(self.seed + 2), self.gradients(), set()
        for name, array, gradient in self.inputs(gradients):
            assert gradient.shape == array.shape and gradient.dtype == np.float64, name
            way = rng.standard_normal(array.shape)
            expected, found = self.rise(array, way, STEP), (gradient * way).sum()
            size = np.abs(gradient * way).sum() + 0.01
            if not sure:  # a choice or a bound that changes on the way
                assume(abs(self.rise(array, way, STEP / 4) - expected) <= CLOSE / 4 * size)
            assert abs(found - expected) <= CLOSE * size, f"{self.config}: {name}: {found}, by differences {expected}"
            seen |= {name} if gradient.any() else set()
        return seen


def make_config(**changes):
    sizes = dict(num_ranks=2, num_tokens=7, hidden=9, ffn=5, num_experts=6, num_topk=3, dtype="float64")
    return MoEConfig(**(sizes | dict(expert=ExpertKind(activation="silu", gated=True)) | changes))


def router_config(kind, **changes):
    more = kind.num_always
    return make_config(**(dict(num_ranks=1, num_experts=12 + more, num_topk=3 + more, router=kind) | changes))
