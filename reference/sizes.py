"""What one rank has to hold: its weights, and bounds that kernels allocate by, whatever the routing."""

from __future__ import annotations

from .config import MoEConfig
from .hosts import Hosts
from .layout import Layout
from .tiles import num_token_blocks, shared_row_tiles, shared_tiles_n0, tiles_n0, tiles_n1

RING_HEAD_BYTES, PUT_BYTES = 128, 64  # of a ring of puts, before its first place, and of a place


def hidden_rows(config: MoEConfig) -> int:
    """Rows of one rank's buffer between the two products: all that it can receive, whatever the routing."""
    return config.num_ranks * _source_rows(config)


def num_normed(config: MoEConfig) -> int:
    """Results that a rank keeps of a call for its backward: one of each pair, where they go through a norm."""
    return config.num_tokens * config.num_topk if config.expert_kind.norm_eps is not None else 0


def max_row_blocks(config: MoEConfig) -> int:
    """Bound on the row tiles of one rank, whatever the routing and whatever came when.

    Cut on its own a packet of r rows has at most 1 + r // tile_m tiles, and the r of one source sum to at most
    `_source_rows`. Packets that share tiles have no more: one that is not full ends at the end of a packet.
    """
    return config.num_ranks * _source_row_blocks(config)


def _source_row_blocks(config: MoEConfig) -> int:
    """Of the rows of one source; likewise its result chunks, which are the tiles of packets that are cut alone."""
    packets = _source_packets(config)
    by_rows = packets + _source_rows(config) // config.tile_m
    return min(packets * Layout(config).row_blocks, by_rows)


def max_tasks(config: MoEConfig) -> int:
    """Bound on the tasks of one rank, whatever the routing: gates, dispatches, tiles, combines."""
    tiles = max_row_blocks(config) * (tiles_n0(config) + tiles_n1(config))
    shared = len(shared_row_tiles(config.num_tokens, config)) * (shared_tiles_n0(config) + tiles_n1(config))
    return 2 * num_token_blocks(config.num_tokens, config) + config.num_experts + tiles + shared


def max_puts(config: MoEConfig, hosts: Hosts, save: str | None = None) -> int:
    """Bound on the puts of one rank in one call, whatever the routing; 0 where all ranks are on one host.

    For each rank of another host: one of each packet and one of each result chunk, to which a backward adds those of
    factors and their gradients, and of rows that are sent again; and one that says that this rank gave up.
    """
    of_packet = 1 + (save is not None) + (save == "nothing")
    of_chunk = 1 + (save is not None)
    puts = config.num_experts_per_rank * of_packet + _source_row_blocks(config) * of_chunk + 1
    return hosts.most_apart * puts


def max_put_bytes(config: MoEConfig, save: str | None = None) -> int:
    """Bound on the bytes of rows that a rank puts to another in one call: tokens, results, and what is beside them."""
    row = config.hidden * config.numpy_dtype.itemsize * (2 + (save == "nothing"))
    beside = 2 * config.accumulator.itemsize if save is not None else 0
    return _source_rows(config) * (row + beside)


def ring_bytes(config: MoEConfig, hosts: Hosts, save: str | None = None) -> int:
    """Bytes of one rank's ring of puts, which has room for all of a call."""
    return RING_HEAD_BYTES + max_puts(config, hosts, save) * PUT_BYTES if not hosts.is_one else 0


def _source_rows(config: MoEConfig) -> int:
    """Most rows that one source sends to one rank's experts: a token goes to an expert at most once."""
    here = config.num_experts_per_rank
    return min(config.num_tokens * min(config.num_topk, here), here * config.slots)


def _source_packets(config: MoEConfig) -> int:
    """Most packets with rows that one source sends to one rank."""
    return min(config.num_experts_per_rank, _source_rows(config))


def num_weights(config: MoEConfig) -> tuple[int, int]:
    """Elements of one rank's expert matrices, the shared ones too, and of the router with the shared expert's gate."""
    columns = config.num_experts_per_rank * config.ffn + config.shared_ffn
    experts = columns * config.expert_kind.num_matrices * config.hidden
    return experts, (config.num_choices + config.shared_gate) * config.hidden


def weight_bytes(config: MoEConfig) -> int:
    """Bytes of the same (the router is float32 for 16-bit elements)."""
    experts, router = num_weights(config)
    return experts * config.weight_format.num_bytes + router * config.format.sums.num_bytes
