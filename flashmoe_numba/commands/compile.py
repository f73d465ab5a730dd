"""Build the kernels for GPUs and say what is in them. Needs numba-cuda, and neither a GPU nor a driver.

The exit status is 0 only if every kernel has the instructions that its variant promises, keeps its main loops in
registers, lets its tensor instructions overlap, and with --run does nothing that it must not and equals the oracle.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reference import DTYPES, MoEConfig

from ..build.nvshmem import CALLED, check_version, header_folders
from ..build.sass import TENSOR_LOAD, Facts, MainLoop, disassemble, failures, find_nvdisasm, read_facts
from ..build.variants import ARCHITECTURES, HEAPS, Variant, choose_variant, has_tensor_cores
from ..errors import UsageError
from .outputs import add_json_argument, check_outputs, write_json
from .plan import readable
from .profiled import SMALL, check_sizes, run_variant, shrink, table
from .sizes import DEFAULT_PRESET, add_size_arguments, config_from

if TYPE_CHECKING:
    from ..build.build import Kernel

DEFAULT_ARCHITECTURE = "sm_90a"
COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], object]], ...] = (  # name, alignment, what of a row
    ("variant", "<31", lambda row: row["variant"]),
    ("registers", ">9", lambda row: row["registers"]),
    ("spill B", ">7", lambda row: row["spill_bytes"]),
    ("stack B", ">7", lambda row: row["stack_bytes"]),
    ("static", ">7", lambda row: readable(row["static_shared_bytes"])),
    ("dynamic", ">9", lambda row: readable(row["dynamic_shared_bytes"])),
    ("HGMMA", ">5", lambda row: row["counts"]["HGMMA"]),
    ("HMMA", ">4", lambda row: row["counts"]["HMMA"]),
    ("UTMALDG", ">7", lambda row: row["counts"]["UTMALDG"]),
    ("cubin", ">9", lambda row: readable(row["cubin_bytes"])),
    ("seconds", ">7", lambda row: "cached" if row["seconds"] is None else f"{row['seconds']:.1f}"),
    ("main loops", "", lambda row: row["main_loops_summary"]),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `flashmoe compile`."""
    add = parser.add_argument
    architectures = (*ARCHITECTURES, "all")
    add("--arch", choices=architectures, default=DEFAULT_ARCHITECTURE, help=f"[{DEFAULT_ARCHITECTURE}]")
    add("--heap", choices=HEAPS, default=HEAPS[0], help=f"nvshmem: of layers on GPUs of several hosts [{HEAPS[0]}]")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tf32", action="store_true", help="multiply float32 as TF32, where there are tensor cores")
    which.add_argument("--all", action="store_true", help="every kernel there is; with --dtype, of that type only")
    add("--backward", action="store_true", help="the kernels of gradients; with --all, only these")
    add_size_arguments(parser)
    small = ", ".join(f"--{flag} {size}" for flag, size in SMALL.items())
    add(
        "--run",
        action="store_true",
        help=f"run each kernel's PTX on a layer, and count; without --preset, sizes are then [{small}]",
    )
    add("--sass", metavar="FILE", help="write the disassembly, one kernel after the other")
    add_json_argument(parser)
    parser.set_defaults(preset=None)  # so that one that is given can be told


def main(args: argparse.Namespace) -> int:
    """Build what the flags describe, say what was found, and whether it is what it must be."""
    if args.preset is None:
        args.preset = DEFAULT_PRESET
        if args.run:
            shrink(args)
    config = config_from(args)
    if args.run:
        check_sizes(config)
    if args.run and args.heap != HEAPS[0]:
        raise UsageError(f"argument --run: --heap must be {HEAPS[0]}, because nothing stands for a network there")
    if args.tf32 and config.dtype != "float32":
        raise UsageError(f"argument --tf32: --dtype must be float32, got {config.dtype!r}")
    check_outputs({"--sass": args.sass, "--json": args.json})
    _check_installed(args.heap)
    rows: list[dict[str, Any]] = []
    for variant in variants_of(args, config):
        rows.append(_report(variant, replace(config, dtype=variant.dtype), args.sass, append=bool(rows)))
        _say(rows, as_table=args.json != "-")
        if args.run and "registers" in rows[-1]:
            _run(variant, config, rows[-1], as_table=args.json != "-")
    if args.json:
        write_json(args.json, rows)
    return 0 if all(row["passed"] for row in rows) else 1


def variants_of(args: argparse.Namespace, config: MoEConfig) -> list[Variant]:
    """For each architecture the config's variant, or with --all every one there is."""
    architectures = list(ARCHITECTURES) if args.arch == "all" else [args.arch]
    if not args.all:
        chosen = [choose_variant(config, architecture, args.tf32, args.heap) for architecture in architectures]
        return [replace(variant, backward=args.backward) for variant in chosen]
    dtypes, directions = [args.dtype] if args.dtype else list(DTYPES), (True,) if args.backward else (False, True)
    of_all = [(architecture, direction) for architecture in architectures for direction in directions]
    return [variant for each in of_all for variant in all_variants(each[0], dtypes, each[1], args.heap)]


def all_variants(
    architecture: str, dtypes: Sequence[str] = DTYPES, backward: bool = False, heap: str = HEAPS[0]
) -> Iterator[Variant]:
    """Every variant of an architecture for some element types and a heap: of forwards, or of backwards."""
    for dtype in dtypes:
        for tensor_cores in (False, True) if has_tensor_cores(architecture, dtype) else (False,):
            way = dict(tensor_cores=tensor_cores, backward=backward)
            yield Variant(dtype=dtype, architecture=architecture, heap=heap, **way)


def _check_installed(heap: str) -> None:
    """Raise a UsageError if something is missing, before anything takes time."""
    if not importlib.util.find_spec("numba_cuda"):
        fix = "pip install 'flashmoe-numba[cuda]', or 'flashmoe-numba[compile]' to build only"
        raise UsageError(f"kernels for GPUs are built by numba-cuda, not found here: {fix}")
    try:
        find_nvdisasm()
        if heap == "nvshmem":
            check_version()
            header_folders()
    except (FileNotFoundError, ImportError) as error:
        raise UsageError(str(error)) from None


def _report(variant: Variant, config: MoEConfig, sass_file: str | None, append: bool) -> dict[str, Any]:
    """One kernel's JSON object. A kernel that cannot be linked has failed, and the others are built all the same."""
    head = {"variant": variant.name, **asdict(variant)}
    try:
        kernel, seconds = _build(variant)
        sass = disassemble(kernel.path)
    except RuntimeError as error:
        return {**head, "failures": [" ".join(str(error).split())], "passed": False}
    if sass_file:
        with Path(sass_file).open("a" if append else "w", encoding="utf-8") as file:
            file.write(f"// {variant.name}: {kernel.path.name}\n{sass}")
    facts = read_facts(sass)
    found = failures(kernel, facts)
    return {**head, **_numbers(kernel, config, facts, seconds), "failures": found, "passed": not found}


def _run(variant: Variant, config: MoEConfig, row: dict[str, Any], as_table: bool) -> None:
    """Add what the machine says to a kernel's JSON object, and say it."""
    row["run"] = run_variant(variant, config)
    row["failures"] += row["run"]["failures"]
    row["passed"] = not row["failures"]
    if as_table:
        print("\n".join(table(variant, row["run"])), flush=True)
    for failure in row["run"]["failures"]:
        print(f"FAILED {variant.name}: {failure}", file=sys.stderr)


def _build(variant: Variant) -> tuple[Kernel, float | None]:
    """(the kernel, seconds that it took or None if it was in the cache)."""
    from reference.cache_folder import usable_cache_folder

    from ..build.build import build, kept_kernels

    folder = usable_cache_folder()
    kept = set(kept_kernels(folder))
    began = time.perf_counter()
    try:
        kernel = build(variant, folder)
    except ImportError as error:
        raise UsageError(str(error)) from None
    return kernel, None if kernel.path in kept else time.perf_counter() - began


def _numbers(kernel: Kernel, config: MoEConfig, facts: Facts, seconds: float | None) -> dict[str, Any]:
    from ..backends.cuda import shared_bytes

    return {
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "stack_bytes": kernel.stack_bytes,
        "static_shared_bytes": kernel.shared_bytes,
        "dynamic_shared_bytes": shared_bytes(config, kernel.variant),
        "instructions": facts.num_instructions,
        "counts": facts.counts,
        "calls": facts.calls,
        "main_loops": [asdict(loop) for loop in facts.main_loops],
        "main_loops_summary": summary(facts.main_loops),
        "cubin_bytes": kernel.path.stat().st_size,
        "cubin": str(kernel.path),
        "seconds": seconds,
        "warnings": list(kernel.warnings),
    }


def summary(loops: Sequence[MainLoop]) -> str:
    """The kind that there is most often: the products of a tile. The rest are the gate, epilogues, the combine."""
    if not loops:
        return "none"
    times = Counter((loop.products, _kinds(loop)) for loop in loops)
    products, kinds = max(times, key=lambda kind: (times[kind], *kind))
    alike = [loop for loop in loops if (loop.products, _kinds(loop)) == (products, kinds)]
    lengths = "/".join(map(str, sorted({loop.num_instructions for loop in alike})))
    of_loads = f" and {alike[0].tensor_loads} {TENSOR_LOAD}" if alike[0].tensor_loads else ""
    return f"{len(alike)} of {lengths} instructions, {products} {kinds}{of_loads}"


def _kinds(loop: MainLoop) -> str:
    """Names without modifiers, such as DFMA+FFMA."""
    return "+".join(sorted({name.partition(".")[0] for name in loop.shape.split("+")}))


def _say(rows: Sequence[dict[str, Any]], as_table: bool) -> None:
    """The last row of the table as soon as it is known, and what is wrong with it on stderr."""
    if as_table and len(rows) == 1:
        print("  ".join(f"{name:{alignment}}" for name, alignment, _ in COLUMNS).rstrip(), flush=True)
    row = rows[-1]
    if as_table and "registers" in row:
        print("  ".join(f"{what(row)!s:{alignment}}" for _, alignment, what in COLUMNS).rstrip(), flush=True)
        if row["heap"] == "nvshmem":
            print("  calls", ", ".join(f"{name} ({row['calls'].get(name, 0)} x)" for name in CALLED), flush=True)
    for failure in row["failures"]:
        print(f"FAILED {row['variant']}: {failure}", file=sys.stderr)
