"""Planted faults (ptx_fault_rules.py) run: does the machine find each?

A plant runs in small worlds (ptx_worlds.py) that execute its line, the quickest first, under several schedules, until
it shows: a fault of the machine, a result that is wrong or not always the same, or no end.
"""

import contextlib
import functools
import re
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
from ptx_fault_rules import PREDICATES, SCOPES, Plant
from ptx_faults_explained import reason
from ptx_runs import run_world
from ptx_worlds import Call, make_world

from flashmoe_numba.build.variants import Variant
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.ptx import faults, machine, simulated
from flashmoe_numba.ptx.linked import linked_ptx
from flashmoe_numba.ptx.listing import parse
from flashmoe_numba.ptx.machine import Machine
from flashmoe_numba.ptx.program import SOURCE, load, program_of
from reference.cache_folder import usable_cache_folder

VARIANTS = [
    Variant(dtype="float32", architecture="sm_90a", tensor_cores=False),
    Variant(dtype="float16", architecture="sm_90a", tensor_cores=True),
]
WORLDS_A_PLANT, FEW = 8, 3  # at most, and the one with many tiles; few for what a reason says cannot show
MANY_TILES = 1000
TRIES = ((0, None), (1, 3))  # what is added to a world's seed, and its processors; None: its own
FAULT, WRONG, HANG = "fault", "result", "no end"
ALONE, SURVIVED, NOT_EXECUTED = "each block alone", "survived", "not executed"
WORD = r"[%$\w.@]+"
NO_END = (faults.STEP_LIMIT, faults.DEADLOCK)


@dataclass(frozen=True)
class Healthy:
    """How a world runs without a fault.

    Args:
        reached, lines: of the text: where some thread comes by, and what some thread does as no predicate forbids.
    """

    number: int
    reached: frozenset
    lines: frozenset
    steps: int
    seconds: float
    results: list


@contextlib.contextmanager
def machines(program, most_steps, lonely_blocks):
    """Machines run this program, and stop after so many steps of a launch. Lonely: every block is a GPU of its own."""

    def make(**options):
        return Machine(**options | dict(most_steps=most_steps) | (dict(blocks_per_gpu=1) if lonely_blocks else {}))

    with mock.patch.object(simulated, "Machine", make), mock.patch.object(machine, "load", return_value=program):
        yield


@functools.cache
def text_of(name):
    return linked_ptx(next(variant for variant in VARIANTS if variant.name == name), usable_cache_folder())


@functools.cache
def world_of(name, number):
    variant = next(variant for variant in VARIANTS if variant.name == name)
    return with_many_tiles(variant) if number == MANY_TILES else make_world(variant, number)


def with_many_tiles(variant):
    """Several column tiles and processors, so that one block waits for what others have done."""
    tiles = dict(hidden=9, ffn=6, tile_n=4, tile_m=4, tile_m_min=2)
    if variant.tensor_cores:
        tiles = dict(hidden=264, ffn=264, tile_n=128, tile_m=128, tile_m_min=16)
    sizes = dict(num_ranks=2, num_tokens=7, num_experts=8, num_topk=3, gated=True, capacity=None, token_block=3)
    world = make_world(variant, 0)
    config = replace(world.config, **sizes, **tiles)
    return replace(world, number=MANY_TILES, config=config, num_processors=3, calls=(Call(counts=(7, 7), seed=1),))


class UnhealthyWorld(RuntimeError):
    """A world does not end well without a plant, so that it could not tell what a plant does."""


def healthy(name, number):
    """A world of a variant's own text, under all TRIES.

    Raises:
        UnhealthyWorld: naming the world and the schedule under which it fails.
    """
    text, world = text_of(name), world_of(name, number)
    outcomes = [without_plant(world, text, number + more, processors) for more, processors in TRIES]
    for other, (more, processors) in zip(outcomes, TRIES, strict=True):
        if not all(same(*pair) for pair in zip(outcomes[0].results, other.results, strict=True)):
            raise UnhealthyWorld(f"{_told(world, number + more, processors)}: bits differ from those of its own seed")
    program, executed = load(text), np.minimum.reduce([outcome.executed for outcome in outcomes])
    source = program.code[:, SOURCE]
    first, last = np.append(True, source[1:] != source[:-1]), np.append(source[1:] != source[:-1], True)
    reached, lines = (
        frozenset(program.instruction(k).line for k in np.flatnonzero(executed * w)) for w in (first, last)
    )
    return Healthy(
        number=number, reached=reached, lines=lines, results=outcomes[0].results,
        steps=max(outcome.steps for outcome in outcomes), seconds=outcomes[0].seconds,
    )  # fmt: skip


def without_plant(world, text, seed, num_processors):
    try:
        return run_world(world, text=text, seed=seed, num_processors=num_processors)
    except (AssertionError, FlashMoEError, faults.PtxFault) as error:
        how = _told(world, seed, num_processors)
        raise UnhealthyWorld(f"{how}: {type(error).__name__}: {error}") from error


def _told(world, seed, num_processors):
    processors = num_processors or world.num_processors
    return f"{world} fails without a plant on seed {seed}, {processors} processors"


@functools.cache
def listing_of(name):
    return parse(text_of(name))


def planted(plant):
    """The program of a planted text. Only its line is read again, where that is one instruction or none."""
    listing = listing_of(plant.variant)
    at = [index for index, i in enumerate(listing.instructions) if i.line == plant.line]
    if len(at) != 1 or plant.instead.startswith("{"):
        return load(plant.text(text_of(plant.variant)))
    (k,) = at
    instructions = listing.instructions[:k] + like(listing.instructions[k], plant) + listing.instructions[k + 1 :]
    moved = len(listing.instructions) - len(instructions)
    labels = {label: index - moved * (index > k) for label, index in listing.labels.items()}
    return program_of(replace(listing, instructions=instructions, labels=labels))


def like(instruction, plant):
    """What stands there instead, its registers by the unique names that the instruction has."""
    (was,), instead = parse(plant.was).instructions, parse(plant.instead).instructions
    names = dict(zip(words(was), words(instruction), strict=True))
    return [
        replace(
            i, line=plant.line, guard=names.get(i.guard, i.guard),
            operands=tuple(re.sub(WORD, lambda word: names.get(word[0], word[0]), operand) for operand in i.operands),
        )
        for i in instead
    ]  # fmt: skip


def words(instruction):
    return [instruction.guard, *re.findall(WORD, " ".join(instruction.operands))]


def shows(plant, program, world, seed, num_processors, lonely_blocks):
    """(FAULT, WRONG or HANG, how) of one run of a planted text, or None."""
    own_gpus = True if plant.rule == SCOPES else None
    options = dict(text=plant.text(text_of(plant.variant)), seed=seed, num_processors=num_processors, own_gpus=own_gpus)
    try:
        with machines(program, 4 * world.steps + 1_000_000, lonely_blocks):
            outcome = run_world(world_of(plant.variant, world.number), **options)
    except faults.PtxFault as fault:
        return (HANG if fault.code in NO_END else FAULT), faults.RULES[fault.code]
    except FlashMoEError as error:
        return HANG, f"the deadline: {error}"[:120]
    except Exception as error:  # a test's, or of a host that reads nonsense
        return WRONG, f"{type(error).__name__}: {error}".split("\n")[0][:120]
    if any(not same(a, b) for a, b in zip(world.results, outcome.results, strict=True)):
        return WRONG, "bits differ between schedules"
    return None


def same(results, others):
    """Of all ranks of a call."""
    return all(one["y"].tobytes() == other["y"].tobytes() for one, other in zip(results, others, strict=True))


def can_show(plant, world):
    """Where a predicate is removed, its instruction must be reached; any other must be done."""
    return plant.line in (world.reached if plant.rule == PREDICATES else world.lines)


@dataclass(frozen=True)
class Verdict:
    """What became of a plant: in which world under which seed it showed, and how."""

    plant: Plant
    verdict: str
    how: str = ""
    world: int = -1
    seed: int = -1


def judge(plant, worlds):
    """What becomes of a plant in the quickest worlds that execute its line."""
    able = sorted((world for world in worlds if can_show(plant, world)), key=lambda world: world.steps)
    if not able:
        return Verdict(plant, NOT_EXECUTED)
    few = plant.rule == SCOPES or reason(plant, text_of(plant.variant).split("\n"))
    most = FEW if few else WORLDS_A_PLANT
    able = able[:most] + [world for world in able[most:] if world.number == MANY_TILES]
    program = planted(plant)
    for lonely_blocks in (False, True) if plant.rule == SCOPES else (False,):
        for more, num_processors in TRIES[:1] if few else TRIES:
            for world in able:
                if found := shows(plant, program, world, world.number + more, num_processors, lonely_blocks):
                    verdict = ALONE if lonely_blocks else found[0]
                    return Verdict(plant, verdict, found[1], world.number, world.number + more)
    return Verdict(plant, SURVIVED)
