"""What a rank has for backwards beside its arrays for forwards: weights transposed, working memory, gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference import MoEConfig, Weights
from reference.arrays import Array
from reference.backward_plan import gradient_shapes, gradient_tiles
from reference.sizes import hidden_rows, num_normed
from reference.tiles import shared_tiles_n0, tiles_n0

from ..kernel.backward.state import Back, WeightGradients
from ..kernel.state import Experts
from .kept import Kept
from .protocols import Memory


class Transposed(NamedTuple):
    """The fields of `Back` that are weights: `[in, out]` in place of `[out, in]`, as gradients go through them."""

    up_again: Any  # but for this one, as a forward multiplies by it
    up: Any
    down: Any
    shared_up: Any
    shared_down: Any
    router: Any
    down_bias: Array
    shared_down_bias: Array
    shared_gate: Array


class BackCall(NamedTuple):
    """A backward of one rank.

    Args:
        dy: `[num_tokens, hidden]`, as `check_tokens` of the memory returns it.
        said: gradients of logits by way of other losses, or None.
        kept, forward: what was kept, and the epoch of the call that did.
        experts, transposed: the weights that it had.
        gradients: to be added to; empty: not wanted.
        fresh: do their sums begin here, whatever there is where they lie?
    """

    dy: Any
    said: Array | None
    kept: Kept
    forward: int
    experts: Experts
    transposed: Transposed
    gradients: WeightGradients
    fresh: bool = False


def pack_transposed(
    config: MoEConfig,
    memory: Memory,
    weights: Weights,
    experts: Experts,
    dy: Array,
    working: Working,
    into: Transposed | None = None,
) -> Transposed:
    """Weights of one rank's experts.

    Args:
        experts: the same, packed for forwards.
        dy: its rows as they come in, which the down matrices multiply; the shared expert's lie elsewhere in each call.
        working: has the rows that the up matrices multiply.
        into: what this returned for other weights, to be filled anew.
    """
    old = into or Transposed(*[None] * len(Transposed._fields))  # type: ignore[arg-type]
    made = _Transposing(config, memory, dy)
    up, down = made.both(weights, working.up_gradients, (old.up, old.down))
    shared_up, shared_down = up, down
    if weights.shared is not None:
        rows = working.shared_up_gradients
        shared_up, shared_down = made.both(weights.shared, rows, (old.shared_up, old.shared_down))
    return Transposed(
        up_again=memory.beside(experts.up) if into is None else into.up_again,
        up=up,
        down=down,
        shared_up=shared_up,
        shared_down=shared_down,
        router=made.router(weights.router, old.router),
        down_bias=made.numbers(weights.down_bias, old.down_bias),
        shared_down_bias=made.numbers(weights.shared_down_bias, old.shared_down_bias),
        shared_gate=made.numbers(weights.shared_gate_weight, old.shared_gate),
    )


class _Transposing:
    """What makes the parts of `Transposed`, each in the memory that an old one had, if there is one."""

    def __init__(self, config: MoEConfig, memory: Memory, dy: Array) -> None:
        self._config, self._memory, self._dy = config, memory, dy

    def both(self, of: Weights, up_gradients: Array, old: tuple[Any, Any]) -> tuple[Any, Any]:
        """(up, down) of these experts."""
        c = self._config
        ups = np.concatenate([matrix.transpose(0, 2, 1) for matrix, _ in of.ups], axis=2)
        up = self._pack(ups, c.tile_n, up_gradients, old[0])
        return up, self._pack(of.down_proj.transpose(0, 2, 1), c.tile_ffn, self._dy, old[1])

    def router(self, router: Array, old: Any) -> Any:
        matrix = np.ascontiguousarray(router.T.astype(self._config.accumulator))[None]
        return self._pack(matrix, self._config.tile_n, None, old)

    def _pack(self, matrix: Array, tile_n: int, rows: Array | None, old: Any) -> Any:
        return self._memory.pack([matrix], [None], tile_n, self._config.accumulator, rows, old)

    def numbers(self, values: Array | None, old: Array | None) -> Array:
        """In the type of sums; empty, if there are none."""
        array = np.array([] if values is None else values.reshape(-1), self._config.accumulator)
        if old is None:
            return self._memory.array(array)
        self._memory.store(old, array)
        return old


class Working(NamedTuple):
    """Arrays that all backwards of a rank use in turn; on a CPU only what was used takes memory."""

    bias_rows: Array
    norms: Array
    norm_dots: Array
    router_rows: Array
    dy_rows: Array
    factors: Array
    no_factors: Array
    up_gradients: Array
    active: Array
    dots: Array
    shared_up_gradients: Array
    shared_active: Array
    shared_dots: Array
    gate_gradients: Array
    done: Array
    no_first: Array
    num_rows: Array
    kept_rows: Array  # where a call keeps none
    kept_ups: Array
    shared_ups: Array


def make_working(config: MoEConfig, save: str, memory: Memory) -> Working:
    c, element, sums = config, config.format.storage, config.accumulator
    rows, tokens, parts = hidden_rows(c), c.num_tokens, c.expert_kind.num_ups
    logits = tokens * c.num_choices
    shared = tokens * c.shared_ffn
    return Working(
        bias_rows=memory.empty(logits if c.router_kind.logit_bias else 0, sums),
        norms=memory.empty(num_normed(c), sums),
        norm_dots=memory.empty(num_normed(c), sums),
        router_rows=memory.empty(tokens * c.hidden, sums),
        dy_rows=memory.empty(rows * c.hidden, element),
        factors=memory.empty(rows, sums),
        no_factors=memory.empty(0, sums),
        up_gradients=memory.empty(rows * parts * c.ffn, element),
        active=memory.empty(rows * c.ffn, element),
        dots=memory.empty(rows * tiles_n0(c), sums),
        shared_up_gradients=memory.empty(shared * c.shared_kind.num_ups, element),
        shared_active=memory.empty(shared, element),
        shared_dots=memory.empty(tokens * shared_tiles_n0(c), sums),
        gate_gradients=memory.empty(tokens if c.shared_gate else 0, sums),
        done=memory.zeros(3, np.int64),
        no_first=memory.zeros(1, np.int64),
        num_rows=memory.zeros(1, np.int64),
        kept_rows=memory.empty(rows * c.hidden if save == "nothing" else 0, element),
        kept_ups=memory.empty(rows * parts * c.ffn if save != "rows+up" else 0, element),
        shared_ups=memory.empty(shared * c.shared_kind.num_ups if save != "rows+up" else 0, element),
    )


def back_of(working: Working, transposed: Transposed, **of_call: Array) -> Back:
    """The group of one backward.

    Args:
        of_call: all other fields, which are of this one only.
    """
    own = {name: array for name, array in working._asdict().items() if name in Back._fields}
    return Back(**own, **transposed._asdict(), **of_call)


def zero_gradients(
    config: MoEConfig, weights: Weights, memory: Memory, experts: bool = True, router: bool = True
) -> WeightGradients:
    """Zeros for the gradients of one rank's weights; arguments as `gradient_sizes` has them."""
    sizes = gradient_sizes(config, weights, experts, router)
    return WeightGradients(**{name: memory.zeros(size, config.accumulator) for name, size in sizes.items()})


def gradient_sizes(config: MoEConfig, weights: Weights, experts: bool = True, router: bool = True) -> dict[str, int]:
    """Elements of the arrays in `WeightGradients` of one rank's weights.

    Args:
        weights: those that there are; which experts' biases, say.
        experts: are gradients of the experts' own weights wanted, the shared one's and their norm's among them?
        router: are those of the router, its biases and scales?
    """
    c = config
    ups = c.expert_kind.num_ups * c.ffn
    shared_ups = c.shared_kind.num_ups * c.shared_ffn
    here, shared = (c.num_experts_per_rank, weights.shared_up_proj is not None) if experts else (0, False)
    choices = c.num_choices if router else 0
    return dict(
        router=choices * c.hidden,
        logit_bias=choices if c.router_kind.logit_bias else 0,
        expert_scale=choices if c.router_kind.expert_scale else 0,
        result_scale=c.hidden if experts and c.expert_kind.norm_eps is not None else 0,
        up=here * ups * c.hidden,
        up_bias=here * ups if weights.up_bias is not None or weights.gate_bias is not None else 0,
        down=here * c.hidden * c.ffn,
        down_bias=here * c.hidden if weights.down_bias is not None else 0,
        shared_up=shared * shared_ups * c.hidden,
        shared_up_bias=shared * shared_ups
        if weights.shared_up_bias is not None or weights.shared_gate_bias is not None
        else 0,
        shared_down=shared * c.hidden * c.shared_ffn,
        shared_down_bias=shared * c.hidden if weights.shared_down_bias is not None else 0,
        shared_gate=shared * c.hidden if c.shared_gate else 0,
    )


def num_weight_tasks(config: MoEConfig, gradients: WeightGradients, kept: Kept) -> dict[str, Any]:
    """How many tasks make the gradients that are wanted: fields of `Problem`."""
    has_tokens, shapes = kept.num_tokens > 0, gradient_shapes(config)
    router = gradients.router.size > 0 and has_tokens and not (kept.routed or kept.has_logits)
    return {
        "weight_tasks": (gradients.up.size > 0) * gradient_tiles(shapes["expert"]),
        "router_weight_tasks": router * gradient_tiles(shapes["router"]),
        "shared_weight_tasks": (gradients.shared_up.size > 0 and has_tokens) * gradient_tiles(shapes["shared"]),
        "norm_weight_tasks": (gradients.result_scale.size > 0 and has_tokens) * gradient_tiles(shapes["norm"]),
    }
