"""What a layer needs, without running it: bytes of every region per rank, packets, tiles, padding, operations.

All ranks bring all their tokens, spread evenly over the experts. With --save also what its backwards need, and with
--ranks-per-host what tells ranks on other hosts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from reference import Hosts, MoEConfig, Plan, make_plan
from reference.backward_plan import BackwardPlan
from reference.layout import SAVES

from ..errors import UsageError
from ..processes import launch, shared_memory
from .flags import integer
from .outputs import add_json_argument, check_outputs, give
from .sizes import add_size_arguments, config_from, layer_name

MOST_PACKETS = 2**24  # a minute to count, and each takes some ten bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_size_arguments(parser)
    add_json_argument(parser)
    kept = "with backwards, for which a call keeps these: rows and their products with the up matrices, rows, no rows"
    parser.add_argument("--save", choices=SAVES, help=f"{kept} [no backwards]")
    what = "ranks that share a host; others are reached by puts, from a stage [all]"
    parser.add_argument("--ranks-per-host", type=integer(1), metavar="N", help=what)


def main(args: argparse.Namespace) -> int:
    """Print the plan of the config that the flags describe."""
    config = config_from(args)
    if config.num_ranks * config.num_experts > MOST_PACKETS:
        rule = f"--ranks x --experts, the packets, must be at most {MOST_PACKETS:,}"
        raise UsageError(f"{rule}, got {config.num_ranks:,} x {config.num_experts:,}")
    ranks_per_host = args.ranks_per_host or config.num_ranks
    if ranks_per_host > config.num_ranks:
        raise UsageError(f"argument --ranks-per-host: must be at most --ranks={config.num_ranks}, got {ranks_per_host}")
    hosts = Hosts.even(config.num_ranks, ranks_per_host)
    check_outputs({"--json": args.json})
    plan = make_plan(config, save=args.save, hosts=hosts)
    value = {"preset": layer_name(args), "config": asdict(config), **asdict(plan)}
    give(args.json, lines(layer_name(args), config, plan), value)
    return 0


def lines(preset: str, config: MoEConfig, plan: Plan) -> Iterator[str]:
    """The table that people read."""
    yield f"{preset} on {config.num_ranks} ranks: {describe(config)}"
    yield "tokens spread evenly over the experts"
    yield ""
    yield "bytes of one rank"
    for region, num_bytes in plan.segment_bytes.items():
        yield _row(f"  segment: {region}", readable(num_bytes))
    yield _row("  segment", readable(plan.segment_total_bytes))
    yield _row("  weights", readable(plan.weight_bytes))
    yield _row("  between the two products", f"{readable(plan.hidden_bytes)}, {plan.hidden_rows:,} rows at most")
    if plan.shared_bytes:
        yield _row("  rows of the shared expert", readable(plan.shared_bytes))
    if plan.max_puts:
        yield _row("  puts to other hosts", f"{readable(plan.ring_bytes)}, {plan.max_puts:,} in a call at most")
    if plan.backward is not None:
        yield from _of_backwards(plan.backward)
    yield "all ranks"
    yield from (_row(f"  {name}", value) for name, value in memory(config, plan))
    yield _row("  packets with rows", f"{plan.num_packets:,}")
    yield _row("  rows", f"{plan.real_rows:,}, and {plan.num_dropped:,} pairs dropped")
    packed = f"{plan.packed_row_tiles:,} ({plan.packed_padded_share:.1%} padding) where sources share them"
    yield _row("  row tiles", f"{plan.row_tiles:,}, {plan.padded_share:.1%} of their rows are padding; {packed}")
    for kind, number in plan.num_tasks.items():
        most = " at most" if kind in ("GEMM0", "GEMM1") else ""
        yield _row(f"  tasks: {kind}", f"{number:,}{most}")
    yield _row("  operations", f"{plan.total_flops / 1e9:,.3f} GFLOP, padded {plan.padded_flops / 1e9:,.3f} GFLOP")
    yield _row("  operations, busiest rank", f"{plan.busiest_rank_flops / 1e9:,.3f} GFLOP")
    yield _row("tasks of one rank, at most", f"{plan.max_tasks:,}")
    if plan.backward is not None:
        yield _row("  of a backward", f"{plan.backward.max_tasks:,}")


def _of_backwards(plan: BackwardPlan) -> Iterator[str]:
    yield _row("  kept of each call", f"{readable(plan.kept_bytes)}, saving {plan.save}")
    yield _row("  transposed weights", readable(plan.transposed_bytes))
    yield _row("  gradients of weights", readable(plan.gradient_bytes))
    yield _row("  backwards work on", f"{readable(plan.working_bytes)} at most")


def memory(config: MoEConfig, plan: Plan) -> Iterator[tuple[str, str]]:
    """What all ranks need together, if they are on this machine."""
    ranks = config.num_ranks
    yield "bytes", readable(plan.total_bytes)
    more = readable(plan.total_bytes + ranks * plan.weight_bytes)
    yield "bytes, weights twice", f"{more}: the layer has its own copy, and the caller may keep the originals"
    shared = launch.shared_memory_bytes(ranks, plan.segment_total_bytes)
    yield f"{shared_memory.FOLDER} with mpirun", f"{readable(shared)} at most, taken as it is touched"


def describe(config: MoEConfig) -> str:
    """The sizes in one line."""
    kind = config.expert_kind
    gated = "gated " if kind.gated else ""
    capacity = "dropless" if config.capacity is None else f"capacity {config.capacity}"
    return (
        f"{config.num_tokens:,} tokens per rank, hidden {config.hidden}, ffn {config.ffn} {gated}{kind.activation}, "
        f"{config.num_experts} experts, top-{config.num_topk}, {capacity}, {config.dtype}"
    )


def readable(num_bytes: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


def _row(name: str, value: str) -> str:
    return f"{name:28}{value}"
