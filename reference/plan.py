"""What a configuration costs before anything runs: bytes, tasks, operations.

Everything here is arithmetic on sizes and routing counts. Leaves out: time (the simulator's), the scratch of a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Array, check_array
from .backward_plan import BackwardPlan, make_backward_plan
from .config import MoEConfig
from .hosts import Hosts
from .layout import CONTROL_WORDS, FLAG_BYTES, Layout
from .runs import packet_row_blocks, packet_tile_height
from .sizes import hidden_rows, max_puts, max_tasks, ring_bytes, weight_bytes
from .task_kinds import KIND_NAMES
from .tiles import num_token_blocks, shared_row_tiles, shared_tiles_n0, tiles_n0, tiles_n1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one layer; `dataclasses.asdict` makes it JSON.

    Args:
        segment_bytes: of one rank's segment, by region; regions are aligned, so they sum to a little less than
            `segment_total_bytes`.
        weight_bytes: of one rank's experts without biases, the shared one among them, and the router.
        hidden_rows, hidden_bytes: bound on one rank's buffer between the two products.
        shared_bytes: of one rank's buffers for the hidden rows and results of the shared expert.
        max_puts, ring_bytes: bound on the puts of one rank in a call, and the ring that holds them; 0 on one host.
        total_bytes: segments, weights and buffers of all ranks, and what `backward` counts of them, with one call kept.
        num_packets: (source, expert) pairs with at least one row, over all ranks.
        num_dropped: (token, expert) pairs beyond the capacity, over all ranks.
        num_tasks: by kind, over all ranks.
        max_tasks: bound on the tasks of one rank, whatever the routing.
        row_tiles, real_rows, padded_rows: of all packets, each in tiles of its own; padded to whole tiles. There
            cannot be more tiles; a CPU multiplies no padding.
        padded_share: share of rows in row tiles that are padding.
        packed_row_tiles, packed_padded_share: the same if every expert's packets are all there before its first tile is
            cut: the fewest tiles. As heights double, fewer tiles may have more padding.
        busiest_rank_flops, total_flops: of real rows, gate and shared expert included.
        padded_flops: as total_flops, for padded rows.
        backward: what backwards need besides; None, if there are none. Tasks and operations are of a forward.
    """

    segment_bytes: dict[str, int]
    segment_total_bytes: int
    weight_bytes: int
    hidden_rows: int
    hidden_bytes: int
    shared_bytes: int
    max_puts: int
    ring_bytes: int
    total_bytes: int
    num_packets: int
    num_dropped: int
    num_tasks: dict[str, int]
    max_tasks: int
    row_tiles: int
    real_rows: int
    padded_rows: int
    padded_share: float
    packed_row_tiles: int
    packed_padded_share: float
    busiest_rank_flops: int
    total_flops: int
    padded_flops: int
    backward: BackwardPlan | None


def make_plan(
    config: MoEConfig,
    routing_counts: Array | None = None,
    num_tokens: Sequence[int] | None = None,
    save: str | None = None,
    hosts: Hosts | None = None,
) -> Plan:
    """The plan for `routing_counts` `[num_ranks, num_experts]`, pairs routed by each source to each expert.

    Without counts: every rank has all its `num_tokens`, spread evenly over the experts.

    Args:
        num_tokens: tokens of each rank, for counts of a routing in which some pairs chose no expert; without it every
            token has all its `num_topk`.
        save: what the layer keeps of a call for its backward, one of SAVES; None: there is no backward.
        hosts: which ranks share one; None: all do.

    Raises:
        TypeError, ValueError: the counts have another shape, are no integers, or no routing can give them; there is no
            such `save`.
    """
    counts = _even_counts(config) if routing_counts is None else _check_counts(routing_counts, config, num_tokens)
    sent = np.minimum(counts, config.slots)
    blocks = np.array([packet_row_blocks(rows, config) for rows in sent.flat], np.int64).reshape(sent.shape)
    tokens = counts.sum(axis=1) // config.num_topk if num_tokens is None else np.array(num_tokens, np.int64)
    real_rows, padded_rows = int(sent.sum()), sum(_padded(rows, config) for rows in sent.ravel().tolist())
    packed = [row for row in sent.sum(axis=0).tolist() if row]
    packed_rows = sum(_padded(rows, config) for rows in packed)
    token_flops, flops = _token_flops(config), row_flops(config)
    hidden_bytes = hidden_rows(config) * config.ffn * config.format.num_bytes
    rows_of_owner = sent.reshape(config.num_ranks, config.num_ranks, -1).sum(axis=(0, 2)).tolist()
    backward = None if save is None else make_backward_plan(config, save, tokens.tolist(), rows_of_owner)
    hosts = hosts or Hosts.one(config.num_ranks)
    layout, ring = Layout(config, save, not hosts.is_one), ring_bytes(config, hosts, save)
    of_rank = layout.num_bytes + weight_bytes(config) + hidden_bytes + shared_bytes(config) + ring
    of_rank += backward.fixed_bytes if backward else 0
    return Plan(
        segment_bytes=_segment_bytes(layout),
        segment_total_bytes=layout.num_bytes,
        weight_bytes=weight_bytes(config),
        hidden_rows=hidden_rows(config),
        hidden_bytes=hidden_bytes,
        shared_bytes=shared_bytes(config),
        max_puts=max_puts(config, hosts, save),
        ring_bytes=ring,
        total_bytes=config.num_ranks * of_rank + (backward.kept_total_bytes if backward else 0),
        num_packets=int((sent > 0).sum()),
        num_dropped=int((counts - sent).sum()),
        num_tasks=_num_tasks(tokens, int(blocks.sum()), config),
        max_tasks=max_tasks(config),
        row_tiles=int(blocks.sum()),
        real_rows=real_rows,
        padded_rows=padded_rows,
        padded_share=1 - real_rows / padded_rows if padded_rows else 0.0,
        packed_row_tiles=sum(-(-rows // config.tile_m) for rows in packed),
        packed_padded_share=1 - real_rows / packed_rows if packed_rows else 0.0,
        busiest_rank_flops=max(  # integers of Python, which do not overflow
            rows * flops + own * token_flops for rows, own in zip(rows_of_owner, tokens.tolist(), strict=True)
        ),
        total_flops=real_rows * flops + int(tokens.sum()) * token_flops,
        padded_flops=padded_rows * flops + int(tokens.sum()) * token_flops,
        backward=backward,
    )


def _padded(num_rows: int, config: MoEConfig) -> int:
    """Rows with padding of one expert's rows, cut into the fewest tiles."""
    full, rest = divmod(num_rows, config.tile_m)
    return full * config.tile_m + (packet_tile_height(rest, config) if rest else 0)


def shared_bytes(config: MoEConfig) -> int:
    """Bytes of one rank's hidden rows, results and factors of the shared expert."""
    if config.shared_ffn == 0:
        return 0
    row = (config.shared_ffn + config.hidden) * config.format.num_bytes + config.format.sums.num_bytes
    return config.num_tokens * row


def row_flops(config: MoEConfig) -> int:
    """Operations of one row through an expert's matrices, 2 per multiply-add."""
    return 2 * config.expert_kind.num_matrices * config.ffn * config.hidden


def _token_flops(config: MoEConfig) -> int:
    """Operations of one token where it lies: its logits, and its row through the shared expert."""
    router = config.num_choices + config.shared_gate
    return 2 * config.hidden * (router + config.expert_kind.num_matrices * config.shared_ffn)


def _segment_bytes(layout: Layout) -> dict[str, int]:
    region = layout.region_elements * layout.config.format.num_bytes
    factors = layout.factor_elements * layout.config.format.sums.num_bytes
    rows = {"dispatch": region, "result": region}
    rows |= {"again": region} if layout.save == "nothing" else {}
    rows |= {} if layout.save is None else {"factors": factors, "dots": factors}
    rows |= {"stage": sum(rows.values())} if layout.staged else {}
    return rows | {
        "dispatch_flag": layout.num_dispatch_flags * FLAG_BYTES,
        "result_flag": layout.num_result_flags * FLAG_BYTES,
        "control": CONTROL_WORDS * FLAG_BYTES,
    }


def _num_tasks(tokens: Array, row_blocks: int, config: MoEConfig) -> dict[str, int]:
    """By kind, in the order of `KIND_NAMES`, over all ranks."""
    blocks = sum(num_token_blocks(count, config) for count in tokens.tolist())
    dispatches = config.num_ranks * config.num_experts
    shared = sum(len(shared_row_tiles(count, config)) for count in tokens.tolist())
    gemms = row_blocks * tiles_n0(config), row_blocks * tiles_n1(config)
    numbers = (blocks, dispatches, *gemms, blocks, shared * shared_tiles_n0(config), shared * tiles_n1(config))
    return dict(zip(KIND_NAMES, numbers, strict=True))


def _even_counts(config: MoEConfig) -> Array:
    """All ranks' tokens spread evenly; what does not divide goes to other experts on each rank."""
    pairs, experts = config.num_tokens * config.num_topk, config.num_experts
    turn = (np.arange(experts) - np.arange(config.num_ranks)[:, None] * pairs) % experts
    return pairs // experts + (turn < pairs % experts)


def _check_counts(counts: Array, config: MoEConfig, num_tokens: Sequence[int] | None) -> Array:
    check_array("routing_counts", counts, (config.num_ranks, config.num_experts))
    if counts.dtype.kind not in "iu":
        raise TypeError(f"routing_counts must have an integer dtype, got {counts.dtype}")
    counts = counts.astype(np.int64)
    for rank, row in enumerate(counts):
        tokens, rest = divmod(int(row.sum()), config.num_topk)
        if num_tokens is not None:
            tokens, rest = num_tokens[rank], int(row.sum()) > num_tokens[rank] * config.num_topk
        if rest or tokens > config.num_tokens:
            rule = f"num_topk={config.num_topk} times at most num_tokens={config.num_tokens}"
            raise ValueError(f"routing_counts[{rank}] must sum to {rule}, got {int(row.sum())}")
        if row.min() < 0 or row.max() > tokens:
            raise ValueError(f"routing_counts[{rank}] must be in [0, {tokens} tokens of that rank], got {row.tolist()}")
    return counts
