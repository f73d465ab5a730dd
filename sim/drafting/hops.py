"""The way of a token's row that crosses each link once: to a relay in each node it goes to, from there to each rank.

A token that goes to several experts of a rank is sent to that rank once, and one that goes to several ranks of another
node crosses the network once: to the relay, the rank of that node with the sender's own place in it, which forwards it
within the node. Results take the same way back, summed where they meet. Rows travel in chunks: those of one source to
one node, in the order of tokens.

Source: DeepEP's normal kernels. Leaves out: channels, which divide a source's tokens first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.graph import Array
from ..world.routing import SimRouting
from ..world.world import World


@dataclass(frozen=True, eq=False)
class Hops:
    """Chunks `[num_chunks]`, and what of each goes to one rank, `[num_shares]`.

    Args:
        source, relay: of each chunk; the source is its own relay in its own node.
        number: of each chunk among those of (source, node).
        rows: of each chunk.
        share_chunk, share_rank, share_rows: of each share; those of a chunk follow each other.
        block_source, block, block_chunk: the chunks that hold rows of each block of a source's tokens.
        visits, copies: `[num_ranks, num_blocks]`: over the tokens of a block, the nodes they go to, and the ranks.
    """

    source: Array
    relay: Array
    number: Array
    rows: Array
    share_chunk: Array
    share_rank: Array
    share_rows: Array
    block_source: Array
    block: Array
    block_chunk: Array
    visits: Array
    copies: Array


def make_hops(world: World, chunk_rows: int, token_block: int) -> Hops:
    """The chunks of all sources, those of `chunk_rows` rows but for the last of each (source, node)."""
    ranks, tokens, per_node = world.num_ranks, world.routing.num_tokens, world.hardware.gpus_per_node
    nodes, blocks, most = world.num_nodes, -(-tokens // token_block), -(-tokens // chunk_rows)
    source, token, rank = token_copies(world.routing)
    copies = np.bincount(source * blocks + token // token_block, minlength=ranks * blocks)
    visit, visit_of = np.unique((source * nodes + rank // per_node) * tokens + token, return_inverse=True)
    stream, token = np.divmod(visit, tokens)
    visits = np.bincount(stream // nodes * blocks + token // token_block, minlength=ranks * blocks)
    slot = np.arange(len(visit)) - np.searchsorted(stream, stream)
    chunk, chunk_of, rows = np.unique(stream * most + slot // chunk_rows, return_inverse=True, return_counts=True)
    share, share_rows = np.unique(chunk_of[visit_of] * ranks + rank, return_counts=True)
    block_chunk, block = np.divmod(np.unique(chunk_of * blocks + token // token_block), blocks)
    origin, node = np.divmod(chunk // most, nodes)
    return Hops(
        origin, relay(world, origin, node), chunk % most, rows,
        share // ranks, share % ranks, share_rows, origin[block_chunk], block, block_chunk,
        visits.reshape(ranks, blocks), copies.reshape(ranks, blocks),
    )  # fmt: skip


def token_copies(routing: SimRouting) -> tuple[Array, Array, Array]:
    """(source, token, rank), sorted: each token once for each rank that has some of its experts."""
    keys = []
    for choices in routing.topk_idx:  # many short sorts take less time and memory than a long one
        token, choice = np.nonzero(choices >= 0)
        keys.append(np.unique(token * routing.num_ranks + routing.owner[choices[token, choice]]))
    token, rank = np.divmod(np.concatenate(keys), routing.num_ranks)
    return np.repeat(np.arange(routing.num_ranks), [len(key) for key in keys]), token, rank


def relay(world: World, source: Array, node: Array) -> Array:
    """The rank of each `node` that has the place of `source` in it, or the next place that a last, smaller node has."""
    per_node = world.hardware.gpus_per_node
    first = node * per_node
    result: Array = first + source % per_node % np.minimum(per_node, world.num_ranks - first)
    return result
