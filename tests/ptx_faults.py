"""Faults planted in the linked PTX, by rule and at every site: does the machine find each?

    make ptx-faults            # all of them, on two processes; writes docs/ptx_faults.md

Rules are in ptx_fault_rules.py; how a plant is judged is in ptx_fault_runs.py.
"""

import functools
import json
import random
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from ptx_fault_rules import RULES, Plant, plants
from ptx_fault_runs import MANY_TILES, VARIANTS, Verdict, healthy, judge, text_of
from ptx_processes import Processes
from ptx_worlds import WORLDS


def judged(name, num_worlds, path, chosen):
    """Verdicts of a variant's plants on two processes, noted in a file of lines as they come."""
    with Processes(2, "fork") as processes, path.open("a", encoding="utf-8") as file:
        numbers = [*range(num_worlds), MANY_TILES]
        worlds = sorted(processes.each(functools.partial(healthy, name), numbers), key=lambda world: world.number)
        print(f"{name}: {len(worlds)} healthy worlds", flush=True)
        found = [plant for plant in plants(name, text_of(name)) if chosen(plant)]
        executed = frozenset().union(*(world.lines for world in worlds))
        for verdict in processes.each(functools.partial(judge, worlds=worlds), in_turn(found, executed)):
            file.write(json.dumps(asdict(verdict)) + "\n")
            file.flush()
            yield verdict


def in_turn(found, executed):
    """First what is executed, one of each rule in turn, so that a run that is stopped has looked at all rules."""
    chance, ordered = random.Random(0), []
    for rule in RULES:
        own = [plant for plant in found if plant.rule == rule]
        chance.shuffle(own)
        own.sort(key=lambda plant: plant.line not in executed)
        ordered += [(plant.line not in executed, i, plant) for i, plant in enumerate(own)]
    return [plant for _, _, plant in sorted(ordered, key=lambda row: row[:2])]


def read(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [Verdict(**row | dict(plant=Plant(**row["plant"]))) for row in rows]


def main(path, num_worlds=WORLDS):
    """Judge what the file does not know yet."""
    path = Path(path)
    known = {verdict.plant for verdict in read(path)}
    for variant in reversed(VARIANTS):
        counts = Counter()
        for verdict in judged(variant.name, int(num_worlds), path, lambda plant: plant not in known):
            counts[verdict.verdict] += 1
            print(dict(counts), verdict.plant.rule, verdict.plant.line, verdict.verdict, verdict.how[:60], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
