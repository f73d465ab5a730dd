"""All variants on all their worlds, by several processes: `python tests/run_ptx_worlds.py [--json FILE] [--pass PASS]`.

Prints for each variant its worlds, steps, seconds and how many of its instructions ran, then the others by the reason
why no world reaches them. Each must give the same bits on other schedules, processors, ranks and placements, too. Exits
with 1 if anything fails, or if less than 95 % of a variant's instructions ran, of a backward's 90 %; and of forwards
if a reason is missing. With --worlds, which are some of them, it is not asked what ran.
"""

import argparse
import contextlib
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from ptx_coverage import report
from ptx_passes import PASSES, pass_of
from ptx_processes import Processes
from ptx_same_bits import CHECKS
from ptx_simulated import LATE_NS

from flashmoe_numba.build.variants import ARCHITECTURES, BACKWARD
from flashmoe_numba.commands.compile import all_variants
from flashmoe_numba.ptx.linked import linked_ptx
from reference.cache_folder import usable_cache_folder

LEAST_EXECUTED, LEAST_EXECUTED_BACKWARD = 0.95, 0.90


def link(variant):
    """Make its text, which all its worlds read, once; where that fails they say so."""
    with contextlib.suppress(RuntimeError):
        linked_ptx(variant, usable_cache_folder())


def run(task):
    """(variant, number, what went wrong or None, outcome or None)"""
    variant, number = task
    of = pass_of(variant)
    try:
        outcome = of.run_world(of.make_world(variant, number))
    except Exception as error:
        return variant, number, f"{type(error).__name__}: {error}", None
    return variant, number, None, (outcome.executed > 0, outcome.steps, outcome.poisoned_rows, outcome.seconds)


def check(task):
    """(name, what went wrong or None) of a check of the variant's."""
    variant, name = task
    try:
        CHECKS[name](variant)
    except Exception as error:
        return name, f"{type(error).__name__}: {error}"
    return name, None


def row_of(variant, results, checks):
    """What is told of a variant: by the results of `run` and of `check`."""
    good = [outcome for _, _, wrong, outcome in results if not wrong]
    worlds = [pass_of(variant).make_world(variant, number) for _, number, _, _ in results]
    row = dict(
        variant=variant.name,
        worlds=len(results),
        several_ranks=sum(world.config.num_ranks > 1 for world in worlds),
        own_gpus=sum(world.own_gpus for world in worlds),
        endings=sum(len(getattr(world, "endings", ())) for world in worlds),  # of forwards
        seeds=[world.seed for world in worlds],
        steps=sum(steps for _, steps, _, _ in good),
        poisoned_rows=sum(rows for _, _, rows, _ in good),
        seconds=round(sum(seconds for *_, seconds in good), 1),
        wrong={f"world {number}": wrong for _, number, wrong, _ in results if wrong}
        | {f"the same bits, {name}": wrong for name, wrong in checks if wrong},
    )
    if good:
        text = linked_ptx(variant, usable_cache_folder())
        executed = np.any([ran for ran, *_ in good], axis=0)
        instructions, never, reasons, unexplained = report(variant, text, executed)
        row |= dict(instructions=instructions, never=never, reasons=reasons, unexplained=unexplained)
        row["executed"] = round(1 - never / instructions, 4)
    return row


def has_failed(row, all_worlds=True):
    if not all_worlds:
        return bool(row["wrong"])
    if row["variant"].endswith(BACKWARD):
        return bool(row["wrong"] or row["executed"] < LEAST_EXECUTED_BACKWARD)
    return bool(row["wrong"] or row["unexplained"] or row["executed"] < LEAST_EXECUTED)


def tell(row, all_worlds):
    print(
        f"{row['variant']}: {row['worlds']} worlds ({row['several_ranks']} of several ranks, {row['own_gpus']} with a "
        f"GPU for each rank), {row['endings']} calls given up, {row['steps'] / 1e6:.0f} million steps in "
        f"{row['seconds']:.0f} s, {100 * row.get('executed', 0):.2f} % of {row.get('instructions')} instructions"
    )
    if all_worlds:
        tell_reasons(row)
    for where, wrong in row["wrong"].items():
        print(f"    FAILED {where}: {wrong}")
    sys.stdout.flush()


def tell_reasons(row):
    for reason, count in row.get("reasons", {}).items():
        print(f"    {count} never: {reason}")
    failed = "" if row["variant"].endswith(BACKWARD) else "FAILED: "
    for lines in row.get("unexplained", ()):
        print(f"    {failed}never executed, and no reason explains it: {lines}")


def variants_of(arguments):
    """Those that are asked for: all forwards, then all backwards."""
    passes = [arguments.passes] if arguments.passes else PASSES
    wanted = [(name == "backward", architecture) for name in passes for architecture in ARCHITECTURES]
    every = [each for backward, architecture in wanted for each in all_variants(architecture, backward=backward)]
    return [variant for variant in every if not arguments.variants or variant.name in arguments.variants]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to append a row for each variant, as JSON")
    parser.add_argument(
        "--worlds", type=int, nargs="*", metavar="N", help="their numbers; default: all of each variant"
    )
    parser.add_argument("--pass", dest="passes", choices=PASSES, help="only kernels of these; default: both")
    parser.add_argument("--variants", nargs="*", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    variants = variants_of(arguments)
    if unknown := set(arguments.variants) - {variant.name for variant in variants}:
        parser.error(f"--variants: must be names of kernels{' of this pass' * bool(arguments.passes)}, got {unknown}")
    started, rows = time.monotonic(), []
    print(f"worlds by number, each on the seed of its number; stores are up to {LATE_NS} ns late")
    with Processes(arguments.processes, "spawn") as processes:
        list(processes.each(link, variants))
        for variant in variants:
            numbers = arguments.worlds or range(pass_of(variant).num_worlds)
            results = sorted(processes.each(run, [(variant, number) for number in numbers]), key=lambda each: each[1])
            checks = sorted(processes.each(check, [(variant, name) for name in CHECKS]))
            rows.append(row_of(variant, results, checks))
            tell(rows[-1], not arguments.worlds)
            if arguments.json:
                append(arguments.json, rows[-1], arguments.worlds)
    print(f"{sum(row['worlds'] for row in rows)} worlds in {time.monotonic() - started:.0f} s")
    sys.exit(any(has_failed(row, not arguments.worlds) for row in rows))


def append(file, row, numbers):
    """With the command that makes it again, and the day."""
    command = f"python tests/run_ptx_worlds.py --variants {row['variant']}"
    command += f" --worlds {' '.join(map(str, numbers))}" if numbers else ""
    told = dict(command=command, date=f"{datetime.now(UTC):%Y-%m-%d}", late_ns=LATE_NS, **row)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as rows:
        rows.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
