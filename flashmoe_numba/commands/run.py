"""Run one layer here or on several hosts, check every result against the float64 reference, time it beside plain BLAS.

With several ranks each is a process, and mpirun is started for them; inside an mpirun its ranks are used, wherever they
are. With --hosts they are spread over hosts, which need the same files in the same places (docs/clusters.md). With
--backward each call that is timed is followed by one that keeps, and by its backward. The exit status is 0 only if the
routing, the results and the gradients are right and all calls gave the same bits.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from reference import Layout, MoEConfig, make_workload
from reference.layout import SAVES
from reference.runs import PACKINGS

from ..errors import UsageError
from ..processes import launch
from ..processes.mpi_environment import unless_left_over
from ..processes.shared_memory import Shortage
from ..tile_gemm.arithmetic import AUTO, NAMES, choose
from .flags import blaming, check_backend_flag, in_flags, integer, seconds
from .hosts import add_hosts_arguments, between, check_clocks, check_run_on, hosts_from, report_from
from .outputs import add_json_argument, check_outputs, give
from .plan import describe
from .sizes import (
    MODEL_TOKENS,
    add_size_arguments,
    at_capacity_factor,
    check_memory,
    config_from,
    family_from,
    given_fields,
)

if TYPE_CHECKING:
    from ..processes.destinations import Destinations
    from ..processes.together import LocalRanks, MpiRanks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `flashmoe run`."""
    add_source = add_size_arguments(parser)
    add_source("--checkpoint", metavar="DIR", help="folder of a published model: run its --layer, with its weights")
    add = parser.add_argument
    recorded = "or a recording: *.npz, *.safetensors"
    add("--workload", default="text", metavar="NAME", help=f"text, uniform, zipf:S, hot, {recorded} [text]")
    add("--processors", type=integer(1), metavar="N", help="blocks of a rank beside its OS block [cores / ranks]")
    shared = "row tiles hold rows of several ranks, or of one each: the same results"
    add("--packing", choices=PACKINGS, default=PACKINGS[0], help=f"{shared} [{PACKINGS[0]}]")
    bits = "how CPUs multiply bfloat16: each has bits of its own; auto is the fastest that this one has"
    add("--arithmetic", choices=NAMES, default=AUTO, help=f"{bits} [{AUTO}]")
    then = "then time a call that keeps and its backward, too, and check all gradients"
    add("--backward", action="store_true", help=then)
    kept = "what calls keep for backwards: rows and their products with the up matrices, rows, or no rows"
    add("--save", choices=SAVES, help=f"{kept} [{SAVES[0]}]")
    add("--iterations", type=integer(1), default=10, metavar="N", help="measured calls, after one that warms up [10]")
    add("--seed", type=integer(0), default=0, metavar="N", help="of weights, tokens and fibers [0]")
    patience = "give up after S seconds without progress, once ranks run [30]"
    add("--deadline-s", type=seconds, default=30.0, metavar="S", help=patience)
    interpreted = "interpreted in this process, for tiny sizes: try --preset laptop-tiny"
    backends = f"compiled for CPUs, compiled for GPUs, or {interpreted} [cpu]"
    add("--backend", choices=("cpu", "cuda", "fibers"), default="cpu", help=backends)
    add("--virtual-ranks", type=integer(1), metavar="N", help="this many ranks in one launch on one GPU (cuda)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--threads", action="store_true", help="all ranks in this process")
    where.add_argument("--mpi", action="store_true", help="a process for every rank, even for a single one")
    add_hosts_arguments(where, add, "ranks there, as many on each")
    add_json_argument(parser)
    last = "the last call, which is a backward if there are any"
    add("--trace", metavar="FILE", help=f"write {last}, for https://ui.perfetto.dev; costs a little time")
    add("--plot", metavar="FILE", help=f"draw {last}; as PNG, or .pdf, .svg")


def main(args: argparse.Namespace) -> int:
    """Run what the flags describe, here or under mpirun."""
    hosts = hosts_from(args)
    if args.backend == "fibers" and args.mpi:
        raise UsageError("argument --mpi: fibers run all ranks in one process, so --backend must be cpu")
    _take_virtual_ranks(args)
    _take_save(args)
    if launch.inside_mpirun():
        return _run_as_rank(args)
    config = _validate(args, args.ranks)
    in_process = args.threads or args.backend == "fibers" or (config.num_ranks == 1 and not args.mpi)
    if hosts is not None:
        return _run_on(hosts, args, config)
    if args.backend == "cuda" and not in_process:
        _check_gpus(config.num_ranks)
    if not in_process:
        return _run_under_mpirun(args, config)
    check_memory(config, args.save)
    _check_outputs(args)
    return _run_here(args, config)


def _run_under_mpirun(args: argparse.Namespace, config: MoEConfig) -> int:
    """Start the ranks, with the shared memory for their segments kept until they take it."""
    needed = 0 if args.backend == "cuda" else Layout(config, args.save).num_bytes
    command = [sys.executable, "-Pm", "flashmoe_numba", *args.argv]
    try:
        with launch.shared_memory_for(config.num_ranks, needed):
            check_memory(config, args.save)
            _check_outputs(args)
            return launch.start(config.num_ranks, command, args.deadline_s)
    except Shortage as error:
        raise UsageError(str(error)) from None


def _run_on(hosts: Destinations, args: argparse.Namespace, config: MoEConfig) -> int:
    """Start the ranks there, and say here what they found."""
    from ..bench.report import table

    check_run_on(hosts, config, args)
    _check_outputs(args)
    code, report = report_from(hosts, config.num_ranks, args, args.deadline_s)
    if report is not None:
        give(args.json, table(report, describe(config)), report)
    return code


def _take_virtual_ranks(args: argparse.Namespace) -> None:
    """`--virtual-ranks N` is N ranks in this process."""
    if args.virtual_ranks is None:
        return
    if args.backend != "cuda" or args.mpi or args.ranks is not None:
        raise UsageError("argument --virtual-ranks: goes with --backend cuda, and without --ranks or --mpi")
    args.ranks, args.threads = args.virtual_ranks, True


def _take_save(args: argparse.Namespace) -> None:
    """`save` is None where there are no backwards."""
    if not args.backward:
        if args.save is not None:
            raise UsageError(f"argument --save: goes with --backward, got {args.save} without")
        return
    args.save = args.save or SAVES[0]


def _check_gpus(num_ranks: int) -> None:
    from ..gpu.gpu import Gpu

    if Gpu.count() < num_ranks:
        rule = f"needs a GPU for each of {num_ranks} ranks, and {Gpu.count()} can be used here"
        raise UsageError(f"argument --backend: cuda {rule}: try --virtual-ranks, or ask `flashmoe doctor`")


def _validate(args: argparse.Namespace, num_ranks: int | None) -> MoEConfig:
    """The config, if nothing is wrong that can be known before a rank starts."""
    from ..layer.arguments import MOST_PROCESSORS

    config = _config(args, num_ranks)
    if config.router_kind.choice == "given":
        raise UsageError("the layer: router must choose its experts, got choice 'given': they come from token ids")
    if (args.processors or 1) > MOST_PROCESSORS:
        raise UsageError(f"argument --processors: must be in [1, {MOST_PROCESSORS}], got {args.processors}")
    check_backend_flag(args.backend)
    _check_arithmetic(args, config)
    try:
        make_workload(args.workload, config, _num_tokens(args), args.seed, ranks=[])
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise UsageError(f"argument --workload: {in_flags(str(error))}") from None
    return config


def _check_arithmetic(args: argparse.Namespace, config: MoEConfig) -> None:
    if args.arithmetic != AUTO and args.backend != "cpu":
        raise UsageError(f"argument --arithmetic: goes with --backend cpu, got {args.backend}")
    with blaming("argument --arithmetic"):
        choose(args.arithmetic, config.dtype)


def _config(args: argparse.Namespace, num_ranks: int | None) -> MoEConfig:
    """Of the checkpoint's layer, if there is one: everything that can be wrong with it is found out here."""
    if args.checkpoint is None:
        return config_from(args, num_ranks=num_ranks)
    from ..checkpoints import Checkpoint

    family = family_from(args)
    with blaming("argument --checkpoint"), Checkpoint(args.checkpoint, family) as checkpoint:
        fields = {"num_tokens": MODEL_TOKENS, **given_fields(args, num_ranks=num_ranks)}
        return at_capacity_factor(args, checkpoint.config(args.layer or 0, **fields))


def _check_outputs(args: argparse.Namespace) -> None:
    """The last check: it makes folders."""
    check_outputs({f"--{flag}": getattr(args, flag) for flag in ("json", "trace", "plot")})


def _num_tokens(args: argparse.Namespace) -> int | None:
    """Of each rank; a recording brings its own number."""
    return args.tokens if args.workload.endswith((".npz", ".safetensors")) else None


def _run_here(args: argparse.Namespace, config: MoEConfig) -> int:
    """All ranks in this process."""
    from ..errors import FlashMoEError
    from ..processes.together import LocalRanks

    try:
        return _run(args, config, LocalRanks())
    except (FlashMoEError, ImportError, MemoryError, RuntimeError, ValueError) as error:
        if args.backend != "cuda" and not isinstance(error, FlashMoEError):
            raise
        print(f"flashmoe run: error: {error}", file=sys.stderr)
        return 1


def _run_as_rank(args: argparse.Namespace) -> int:
    """This process is one rank of many."""
    launch.guard_this_rank(args.deadline_s)
    from ..processes.together import MpiRanks

    world = MpiRanks(args.deadline_s)
    try:
        if args.threads or args.backend == "fibers":
            rule = "--threads and fibers run all ranks in one process: start this without mpirun"
            raise UsageError(rule + unless_left_over(world.num_ranks))
        if args.ranks not in (None, world.num_ranks):
            rule = f"must be the number of ranks of this mpirun, {world.num_ranks}, got {args.ranks}"
            raise UsageError(f"argument --ranks: {rule}{unless_left_over(world.num_ranks)}")
        config = _validate(args, world.num_ranks)
        if len(world.machines) > 1:
            check_clocks(args)
        if world.rank_idx < world.num_ranks_here:  # so rank 0 and those beside it: it writes
            _check_outputs(args)
        return _run(args, config, world)
    except UsageError:
        raise  # all ranks have it
    except BaseException as error:
        world.abandon(error)


def _run(args: argparse.Namespace, config: MoEConfig, world: LocalRanks | MpiRanks) -> int:
    from ..bench.measure import Settings, measure
    from .outcome import conclude

    settings = Settings(
        config=config,
        checkpoint=args.checkpoint,
        layer=args.layer or 0,
        family=args.family,
        workload=args.workload,
        num_tokens=_num_tokens(args),
        backend=args.backend,
        in_process=world.comm is None,
        num_processors=args.processors,
        iterations=args.iterations,
        seed=args.seed,
        deadline_s=args.deadline_s,
        trace=bool(args.trace or args.plot),
        packing=args.packing,
        arithmetic=args.arithmetic,
        save=args.save,
        **between(world),
    )
    terminal = sys.stderr.isatty() or bool(os.environ.get(launch.TERMINAL_VARIABLE))
    parts = world.gather(measure(settings, world, show=terminal and world.rank_idx == 0))
    return world.agree(conclude(settings, parts, args.json, args.trace, args.plot) if parts else 0)
