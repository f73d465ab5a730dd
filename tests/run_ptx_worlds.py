"""All variants on all their worlds, by several processes: `python tests/run_ptx_worlds.py [--json FILE] [--worlds N]`.

Prints for each variant its worlds, steps, seconds and how many of its instructions ran, then the others by the reason
why no world reaches them. Each must give the same bits on other schedules, processors, ranks and placements, too. Exits
with 1 if anything fails, or if less than 95 % of a variant's instructions ran, of a backward's 90 %; and of forwards
if a reason is missing.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import ptx_backward_runs
import ptx_backward_worlds
from ptx_coverage import report
from ptx_processes import Processes
from ptx_runs import LATE_NS, run_world
from ptx_same_bits import CHECKS
from ptx_worlds import WORLDS, make_world

from flashmoe_numba.build.variants import ARCHITECTURES, BACKWARD
from flashmoe_numba.commands.compile import all_variants
from flashmoe_numba.ptx.linked import linked_ptx
from reference.cache_folder import usable_cache_folder

LEAST_EXECUTED, LEAST_EXECUTED_BACKWARD = 0.95, 0.90


def world_of(variant, number):
    return (ptx_backward_worlds.make_world if variant.backward else make_world)(variant, number)


def checks_of(variant):
    return ptx_backward_runs.CHECKS if variant.backward else CHECKS


def run(task):
    """(variant, number, what went wrong or None, outcome or None)"""
    variant, number = task
    try:
        outcome = (ptx_backward_runs.run_world if variant.backward else run_world)(world_of(variant, number))
    except Exception as error:
        return variant, number, f"{type(error).__name__}: {error}", None
    return variant, number, None, (outcome.executed > 0, outcome.steps, outcome.poisoned_rows, outcome.seconds)


def check(task):
    """(name, what went wrong or None) of a check of the variant's."""
    variant, name = task
    try:
        checks_of(variant)[name](variant)
    except Exception as error:
        return name, f"{type(error).__name__}: {error}"
    return name, None


def row_of(variant, results, checks):
    """What is told of a variant: by the results of `run` and of `check`."""
    good = [outcome for _, _, wrong, outcome in results if not wrong]
    worlds = [world_of(variant, number) for _, number, _, _ in results]
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


def has_failed(row):
    if row["variant"].endswith(BACKWARD):
        return bool(row["wrong"] or row["executed"] < LEAST_EXECUTED_BACKWARD)
    return bool(row["wrong"] or row["unexplained"] or row["executed"] < LEAST_EXECUTED)


def tell(row):
    print(
        f"{row['variant']}: {row['worlds']} worlds ({row['several_ranks']} of several ranks, {row['own_gpus']} with a "
        f"GPU for each rank), {row['endings']} calls given up, {row['steps'] / 1e6:.0f} million steps in "
        f"{row['seconds']:.0f} s, {100 * row.get('executed', 0):.2f} % of {row.get('instructions')} instructions"
    )
    for reason, count in row.get("reasons", {}).items():
        print(f"    {count} never: {reason}")
    failed = "" if row["variant"].endswith(BACKWARD) else "FAILED: "
    for lines in row.get("unexplained", ()):
        print(f"    {failed}never executed, and no reason explains it: {lines}")
    for where, wrong in row["wrong"].items():
        print(f"    FAILED {where}: {wrong}")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write all of it")
    parser.add_argument("--worlds", type=int, default=WORLDS, help="of each variant, at most")
    parser.add_argument("--variants", nargs="*", default=[], help="names; default: all")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    every = [variant for architecture in ARCHITECTURES for variant in all_variants(architecture)]
    every += [replace(variant, backward=True) for variant in every]
    variants = [variant for variant in every if not arguments.variants or variant.name in arguments.variants]
    started, rows = time.monotonic(), []
    print(f"worlds 0 to {arguments.worlds - 1}, each on the seed of its number; stores are up to {LATE_NS} ns late")
    with Processes(arguments.processes, "spawn") as processes:
        for variant in variants:
            most = min(arguments.worlds, ptx_backward_worlds.WORLDS) if variant.backward else arguments.worlds
            tasks = [(variant, number) for number in range(most)]
            results = sorted(processes.each(run, tasks), key=lambda result: result[1])
            checks = sorted(processes.each(check, [(variant, name) for name in checks_of(variant)]))
            rows.append(row_of(variant, results, checks))
            tell(rows[-1])
    seconds = time.monotonic() - started
    print(f"{sum(row['worlds'] for row in rows)} worlds in {seconds:.0f} s")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(dict(late_ns=LATE_NS, seconds=seconds, variants=rows), indent=1))
    sys.exit(any(has_failed(row) for row in rows))


if __name__ == "__main__":
    main()
