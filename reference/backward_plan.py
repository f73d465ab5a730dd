"""What a layer needs for backwards beside what `plan` counts for a forward: bytes and tasks, before anything runs.

Everything here is arithmetic on sizes, and on the rows of a routing for what is kept. Leaves out: biases, norms and
scales of weights, padding of packed matrices, the gradients that go in and out with tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .backward_tiles import GRADIENT_TILE
from .config import MoEConfig
from .layout import FLAG_BYTES, SAVES
from .scalars import check_one_of
from .sizes import hidden_rows, max_tasks, num_normed, num_weights, weight_bytes
from .tiles import num_token_blocks, shared_tiles_n0, tiles_n0

INDEX_BYTES = 4  # of what a rank notes of its own pairs
COUNTERS = 5  # that tasks of a backward share


@dataclass(frozen=True, kw_only=True)
class BackwardPlan:
    """Of one rank, but for `kept_total_bytes`.

    Args:
        save: what is kept of a call, one of SAVES.
        kept_bytes: of one call, from its forward to its backward, by the rank that keeps most.
        kept_total_bytes: of one call, by all ranks.
        transposed_bytes: of the weights' other copy, which gradients of rows are multiplied by.
        gradient_bytes: of the sums for the gradients of all weights, in the type of sums. When nobody has them any
            more, they are the next ones'.
        working_bytes: bound on the working memory that all backwards share; on a CPU the part of it that no row used
            takes none.
        max_tasks: bound on the tasks of one backward, whatever the routing.
    """

    save: str
    kept_bytes: int
    kept_total_bytes: int
    transposed_bytes: int
    gradient_bytes: int
    working_bytes: int
    max_tasks: int

    @property
    def fixed_bytes(self) -> int:
        """Of what one rank has whatever is kept of how many calls."""
        return self.transposed_bytes + self.gradient_bytes + self.working_bytes


def make_backward_plan(
    config: MoEConfig, save: str, num_tokens: Sequence[int], num_rows: Sequence[int]
) -> BackwardPlan:
    """The plan for ranks with these tokens, whose experts receive these rows.

    Raises:
        ValueError: there is no such `save`.
    """
    check_one_of("save", save, SAVES)
    kept = [kept_bytes(config, save, *of_rank) for of_rank in zip(num_tokens, num_rows, strict=True)]
    return BackwardPlan(
        save=save,
        kept_bytes=max(kept),
        kept_total_bytes=sum(kept),
        transposed_bytes=weight_bytes(config),
        gradient_bytes=sum(num_weights(config)) * config.format.sums.num_bytes,
        working_bytes=working_bytes(config, save),
        max_tasks=max_tasks(config) + max_weight_tasks(config),
    )


def kept_bytes(config: MoEConfig, save: str, num_tokens: int, num_rows: int) -> int:
    """Bytes that a rank keeps of a call for its backward.

    Args:
        save: one of SAVES.
        num_tokens: of the rank.
        num_rows: that its experts received.
    """
    c, element, sums = config, config.format.num_bytes, config.format.sums.num_bytes
    ups = save == "rows+up"
    pairs, blocks = c.num_tokens * c.num_topk, num_token_blocks(c.num_tokens, c)
    routing = pairs * (3 * INDEX_BYTES + sums) + (3 * blocks + 1) * c.num_experts * INDEX_BYTES
    token = c.hidden * element + c.num_choices * sums
    if c.shared_ffn:
        token += ups * c.shared_ffn * c.shared_kind.num_ups * element + sums
    if num_normed(c):
        token += c.num_topk * c.hidden * element
    row = (save != "nothing") * c.hidden + ups * c.ffn * c.expert_kind.num_ups
    return routing + c.num_experts * FLAG_BYTES + num_tokens * token + num_rows * row * element


def working_bytes(config: MoEConfig, save: str) -> int:
    """Bytes of the arrays that all backwards of a rank use in turn, made for all the rows that it can receive."""
    c, element, sums = config, config.format.num_bytes, config.format.sums.num_bytes
    again = save != "rows+up"  # products with the up matrices are made again
    ups, shared_ups = c.ffn * c.expert_kind.num_ups, c.shared_ffn * c.shared_kind.num_ups
    row = (c.hidden * (1 + (save == "nothing")) + c.ffn + ups * (1 + again)) * element + (1 + tiles_n0(c)) * sums
    shared = (c.shared_ffn + shared_ups * (1 + again)) * element + (shared_tiles_n0(c) + c.shared_gate) * sums
    token = shared + (c.num_choices * c.router_kind.logit_bias + c.hidden) * sums
    norms = 2 * num_normed(c) * sums
    return hidden_rows(c) * row + c.num_tokens * token + norms + COUNTERS * FLAG_BYTES


def gradient_shapes(config: MoEConfig) -> dict[str, list[tuple[int, int]]]:
    """Rows and columns of the matrices whose gradients have tasks: of one expert, of the router, of the shared, and of
    the norm of results, whose scale is a row.
    """
    c = config
    ups, shared_ups = c.expert_kind.num_ups * c.ffn, c.shared_kind.num_ups * c.shared_ffn
    shared = [(shared_ups, c.hidden), (c.hidden, c.shared_ffn), *[(1, c.hidden)] * c.shared_gate]
    return {
        "expert": [(ups, c.hidden), (c.hidden, c.ffn)],
        "router": [(c.num_choices, c.hidden)],
        "shared": shared if c.shared_ffn else [],
        "norm": [(1, c.hidden)] if num_normed(c) else [],
    }


def gradient_tiles(shapes: Sequence[tuple[int, int]]) -> int:
    """Tasks that make the gradients of matrices with these shapes."""
    height, width = GRADIENT_TILE
    return sum(-(-rows // height) * -(-columns // width) for rows, columns in shapes)


def max_weight_tasks(config: MoEConfig) -> int:
    """Most tasks of one backward of a rank, beside those that a forward has, too."""
    tiles = {name: gradient_tiles(shapes) for name, shapes in gradient_shapes(config).items()}
    here = config.num_experts_per_rank
    return here * tiles["expert"] + tiles["router"] + tiles["shared"] + tiles["norm"]
