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

from .graph import Array
from .world import World


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
    nodes, blocks, most = -(-ranks // per_node), -(-tokens // token_block), -(-tokens // chunk_rows)
    source, token, rank = _copies(world)
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
        origin, _relay(origin, node, ranks, per_node), chunk % most, rows,
        share // ranks, share % ranks, share_rows, origin[block_chunk], block, block_chunk,
        visits.reshape(ranks, blocks), copies.reshape(ranks, blocks),
    )  # fmt: skip


def _copies(world: World) -> tuple[Array, Array, Array]:
    """(source, token, rank), each once, sorted."""
    source, token, choice = np.nonzero(world.routing.topk_idx >= 0)
    rank = world.routing.owner[world.routing.topk_idx[source, token, choice]]
    shape = (world.num_ranks, world.routing.num_tokens, world.num_ranks)
    source, token, rank = np.unravel_index(np.unique(np.ravel_multi_index((source, token, rank), shape)), shape)
    return source, token, rank


def _relay(source: Array, node: Array, num_ranks: int, per_node: int) -> Array:
    """The rank of the node in the source's place, or in the next that a last, smaller node has."""
    relay: Array = node * per_node + source % per_node % np.minimum(per_node, num_ranks - node * per_node)
    return relay
