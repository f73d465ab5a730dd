"""A backward's own tasks in a persistent kernel: tiles in the queue in which all its tiles are.

Source: flashmoe_numba/kernel/backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engine.graph import Array
from ..engine.kinds import GATE
from .backward import GradientTile, expert_gradients, router_gradients, shared_gradients
from .blocks import Blocks
from .draft import Draft


def reopen_gate(draft: Draft, launched: Array) -> Array:
    """`[num_ranks]`: one task says that the routing is the forward's."""
    time = draft.cost.tile_latency_ns
    return draft.after(launched, draft.builder.add(GATE, draft.ranks, server=draft.machine.sm, duration_ns=time))


def router_product(draft: Draft) -> dict[str, Array | float]:
    """What a COMBINE does for the router, as arguments of `Draft.combine`: gradients of logits times its matrix."""
    config, tokens = draft.world.config, draft.world.routing.num_tokens
    number = -(-tokens // draft.token_block)
    per_token = 2 * config.num_choices * config.hidden
    return {
        "beside_ns": draft.cost.tile(draft.token_block, config.hidden, config.num_choices, number, number),
        "flops": draft.token_block * per_token,
        "useful_flops": tokens / number * per_token,
    }


def expert_tiles(
    draft: Draft, tile: GradientTile, blocks: Blocks, hidden: Array, received: Array, ended: Array
) -> None:
    """Gradients of experts' weights, behind all packets and first products of an expert.

    Args:
        hidden: `[num_blocks]`, the first products.
        received: `[num_ranks, num_experts]`, the packets that have rows.
        ended: `[num_ranks]`, what waits for all tasks of a rank.
    """
    routing = draft.world.routing
    source, packet = np.nonzero(routing.counts)
    nodes, expert = expert_gradients(draft, tile)
    place = np.searchsorted(expert, np.arange(routing.num_experts))
    draft.builder.edge(hidden, nodes[:, place[blocks.expert]])
    draft.builder.edge(received[source, packet], nodes[:, place[packet]])
    draft.builder.edge(nodes, ended[routing.owner[expert]])


def router_tiles(draft: Draft, tile: GradientTile, combined: Array, ended: Array) -> None:
    """The router's gradients, behind all token blocks of a rank, `combined` `[num_ranks, num_token_blocks]`."""
    draft.builder.edge(draft.after(combined.T, router_gradients(draft, tile, split=False)), ended)


def shared_gradient_tiles(draft: Draft, tile: GradientTile, hidden: Sequence[Array], ended: Array) -> None:
    """Those of the shared expert, behind all its first products, `[num_ranks, some]` each."""
    nodes = shared_gradients(draft, tile)
    for some in hidden:
        draft.builder.edge(some, nodes[..., None])
    draft.builder.edge(nodes, ended)
