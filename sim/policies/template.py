"""My schedule: what it does, in one line, for `flashmoe sim --list`.

What happens after what, in a paragraph. Here it is the simplest of all: the shared expert if the layer has one, the
gate, an all-to-all of the rows, the two products of all experts in kernels of their own, an all-to-all of the results,
and a kernel that adds them up.

Source: where the schedule is published.
Knobs: see `Knobs`. Leaves out: what the graph does not have, such as the launches of framework code here.
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.drafting.blocks import blocks_per_expert
from sim.drafting.draft import Draft
from sim.drafting.knobs import PolicyKnobs
from sim.drafting.shared import shared_kernels
from sim.engine.graph import TaskGraph
from sim.world.world import World


@dataclass(frozen=True, kw_only=True)
class Knobs(PolicyKnobs):
    """What `--set NAME=VALUE`, a grid's [knobs] and what-if can change; those of `PolicyKnobs` come on top.

    Each says where its default is from, for `flashmoe sim --list`: a source, or an assumption or a choice.

    Args:
        tile_m, tile_n: rows and columns of a tile of either product. Default: assumption: the usual tile of large
            products.
    """

    tile_m: int = 128
    tile_n: int = 128


def build(world: World, knobs: Knobs) -> TaskGraph:
    """The schedule as a graph: pieces of `Draft` add nodes of all ranks, and return what the next ones wait for."""
    draft = Draft(world, knobs, __name__, world.hardware.sms)
    blocks = blocks_per_expert(world.routing.counts, knobs.tile_m)  # row blocks, of the rows of all sources
    shared = shared_kernels(draft, None, (knobs.tile_m, knobs.tile_n))
    gated = draft.gate(draft.begin(shared))
    arrived = draft.collective(draft.begin(gated), world.dispatch_bytes)
    _, multiplied = draft.ffn(arrived, blocks, knobs.tile_n)
    returned = draft.collective(draft.begin(multiplied), world.combine_bytes)
    draft.combine_kernel(draft.begin(returned))
    return draft.builder.build()
