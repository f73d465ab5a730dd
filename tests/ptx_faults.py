"""Faults planted in the linked PTX, by rule and at every site: does the machine find each?

    make ptx-faults            # all of them, on two processes; writes docs/ptx_faults.md

A rule takes one line of the text and gives what may stand there instead, each with a word for it. A plant runs in small
worlds (ptx_worlds.py) that execute its line, the quickest first, under several schedules, until it shows: a fault of
the machine, a result that is wrong or not always the same, or no end.
"""

import contextlib
import functools
import json
import random
import re
import sys
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
from ptx_faults_explained import reason
from ptx_runs import run_world
from ptx_worlds import WORLDS, Call, make_world

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
SAMPLE = 60  # sites of a rule that fits most lines
WORLDS_A_PLANT, FEW = 8, 3  # at most, and the one with many tiles; few for what a reason says cannot show
MANY_TILES = 1000
TRIES = ((0, None), (1, 3))  # what is added to a world's seed, and its processors; None: its own
FAULT, WRONG, HANG = "fault", "result", "no end"
ALONE, SURVIVED, NOT_EXECUTED = "each block alone", "survived", "not executed"
SCOPES, PREDICATES = "`.sys` made `.gpu`", "a predicate removed"
WORD = r"[%$\w.@]+"
NO_END = (faults.STEP_LIMIT, faults.DEADLOCK)
DESCRIPTOR_FIELDS = {"address": 0, "leading offset": 16, "stride": 32, "base offset": 49, "swizzle": 62}


# ---- rules: line -> [(what, the line instead)]


def without_barrier(line):
    return [("", "")] if re.match(r"\s*bar\.sync", line) else []


def without_proxy_fence(line):
    return [("", "")] if re.match(r"\s*(@\S+ )?fence\.(proxy|mbarrier_init)", line) else []


def without_release(line):
    return exchanged(line, (r"st\.release", "st.relaxed"), (r"(atom\.\w+)\.acq_rel", r"\1.acquire"))


def without_acquire(line):
    return exchanged(line, (r"ld\.acquire", "ld.relaxed"), (r"(atom\.\w+)\.acq_rel", r"\1.release"))


def of_one_gpu(line):
    return exchanged(line, (r"((?:ld|st|atom)[.\w]*)\.sys\.", r"\1.gpu."))


def other_bytes(line):
    match = re.search(r"expect_tx.*, (\d+);", line)
    if not match:
        return []
    return [(f"{more:+}", line.replace(f"{match[1]};", f"{int(match[1]) + more};")) for more in (16, -16)]


def waits_for_fewer(line):
    match = re.match(r"\s*wgmma\.wait_group.* (\d+);", line)
    return [("", line.replace(f"{match[1]};", f"{int(match[1]) + 1};"))] if match else []


def other_parity(line):
    found = exchanged(line, (r"(try_wait.*), parity;", r"\1, 0;"), what="always 0")
    found += exchanged(line, (r"mov\.u32 parity, 0;", "mov.u32 parity, 1;"), what="begins at 1")
    return found + ([("never flipped", "")] if re.search(r"xor\.b32 parity", line) else [])


def other_descriptor(line):
    match = re.match(r"(or\.b64 a, a, )(\d+);", line)
    if not match:
        return []
    return [(name, f"{match[1]}{int(match[2]) ^ 1 << bit};") for name, bit in DESCRIPTOR_FIELDS.items()]


def without_wgmma_fence(line):
    return [("", "")] if "wgmma.fence" in line else []


def without_commit(line):
    return [("", "")] if "wgmma.commit_group" in line else []


def without_zero(line):
    return [("", "")] if re.match(r"mov\.f32 d\d+, 0f00000000;", line) else []


def without_predicate(line):
    """The lanes that a named predicate leaves out do it as well."""
    return exchanged(line, (r"^@(lead|go|done) (?!bra)", ""))


def other_branch(line):
    return exchanged(line, (r"^(\s*)@!(\S+)(\s+bra\b)", r"\1@\2\3")) or exchanged(
        line, (r"^(\s*)@(\S+)(\s+bra\b)", r"\1@!\2\3")
    )


def other_offset(line):
    """One element further, of a load or store."""
    match = re.match(r"(\s*(?:@\S+ )?(?:ld|st)\.(?:global|shared)[.\w]*?(\d+)\s.*\[%\w+)(?:\+(-?\d+))?(\].*)", line)
    if not match:
        return []
    begin, size, offset, end = match.groups()
    return [("", f"{begin}+{int(offset or 0) + int(size) // 8}{end}")]


def not_atomic(line):
    """A load, an addition and a store, between which another thread may come."""
    match = re.match(r"\s*atom\.add\.acq_rel\.(\w+)\.u64\s+(\S+), (\[\S+\]), (\S+);", line)
    if not match:
        return []
    scope, before, at, more = match.groups()
    parts = f"ld.acquire.{scope}.b64 {before}, {at}; add.s64 sum, {before}, {more}; st.release.{scope}.b64 {at}, sum;"
    return [("", f"{{ .reg .b64 sum; {parts} }}")]


def exchanged(line, *pairs, what=""):
    for pattern, instead in pairs:
        other, count = re.subn(pattern, instead, line, count=1)
        if count:
            return [(what, other)]
    return []


RULES = {
    "a barrier removed": without_barrier,
    "a proxy fence removed": without_proxy_fence,
    "`.release` removed": without_release,
    "`.acquire` removed": without_acquire,
    SCOPES: of_one_gpu,
    "an `expect_tx` count changed": other_bytes,
    "a `wait_group` number raised": waits_for_fewer,
    "a parity wrong": other_parity,
    "a descriptor's bit flipped": other_descriptor,
    "`wgmma.fence` removed": without_wgmma_fence,
    "`commit_group` removed": without_commit,
    "a sum not begun at zero": without_zero,
    PREDICATES: without_predicate,
    "a branch inverted": other_branch,
    "an offset wrong": other_offset,
    "an addition not atomic": not_atomic,
}
SAMPLED = ("a sum not begun at zero", "a branch inverted", "an offset wrong")


# ---- sites


@dataclass(frozen=True)
class Plant:
    """A fault in a variant's text: `line` counts from 1."""

    variant: str
    rule: str
    line: int
    what: str
    instead: str
    was: str

    def text(self, text):
        lines = text.split("\n")
        lines[self.line - 1] = self.instead
        return "\n".join(lines)


def sites(text, rule):
    """All (line, what, what stands there instead) that a rule fits."""
    lines = enumerate(text.split("\n"), 1)
    return [(number, what, other) for number, line in lines for what, other in RULES[rule](line)]


def plants(name, text):
    """Of all rules; a seeded sample of those that fit most lines."""
    lines = text.split("\n")
    for rule in RULES:
        found = sites(text, rule)
        if rule in SAMPLED and len(found) > SAMPLE:
            found = sorted(random.Random(zlib.crc32(f"{name} {rule}".encode())).sample(found, SAMPLE))
        for line, what, other in found:
            yield Plant(variant=name, rule=rule, line=line, what=what, instead=other, was=lines[line - 1].strip())


# ---- running them


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
    ys: list


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


def healthy(name, number):
    """A world of a variant's own text, under all TRIES; None where only some schedules end as they should."""
    text, world = text_of(name), world_of(name, number)
    try:
        outcomes = [run_world(world, text=text, seed=number + more, num_processors=n) for more, n in TRIES]
    except (AssertionError, FlashMoEError) as error:
        print(f"left out: {world}: {error}", flush=True)
        return None
    assert all(same(*pair) for other in outcomes for pair in zip(outcomes[0].ys, other.ys, strict=True)), world
    program, executed = load(text), np.minimum.reduce([outcome.executed for outcome in outcomes])
    source = program.code[:, SOURCE]
    first, last = np.append(True, source[1:] != source[:-1]), np.append(source[1:] != source[:-1], True)
    reached, lines = (
        frozenset(program.instruction(k).line for k in np.flatnonzero(executed * w)) for w in (first, last)
    )
    return Healthy(
        number=number, reached=reached, lines=lines, ys=outcomes[0].ys,
        steps=max(outcome.steps for outcome in outcomes), seconds=outcomes[0].seconds,
    )  # fmt: skip


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
    except AssertionError as error:
        return WRONG, str(error).split("\n")[0][:120]
    if any(not same(a, b) for a, b in zip(world.ys, outcome.ys, strict=True)):
        return WRONG, "bits differ between schedules"
    return None


def same(ys, others):
    return all(y.tobytes() == other.tobytes() for y, other in zip(ys, others, strict=True))


def can_show(plant, world):
    """Where a predicate is removed, its instruction must be reached; any other must be done."""
    return plant.line in (world.reached if plant.rule == PREDICATES else world.lines)


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


# ---- all of them


@dataclass(frozen=True)
class Verdict:
    """What became of a plant: in which world under which seed it showed, and how."""

    plant: Plant
    verdict: str
    how: str = ""
    world: int = -1
    seed: int = -1


def judged(name, num_worlds, path, chosen):
    """Verdicts of a variant's plants on two processes, noted in a file of lines as they come."""
    with get_context("fork").Pool(2) as pool:
        worlds = [
            world
            for world in pool.starmap(healthy, [(name, n) for n in (*range(num_worlds), MANY_TILES)], chunksize=1)
            if world
        ]
    print(f"{name}: {len(worlds)} healthy worlds", flush=True)
    found = [plant for plant in plants(name, text_of(name)) if chosen(plant)]
    executed = frozenset().union(*(world.lines for world in worlds))
    with get_context("fork").Pool(2) as pool, path.open("a", encoding="utf-8") as file:
        for verdict in pool.imap_unordered(
            functools.partial(judge, worlds=worlds), in_turn(found, executed), chunksize=1
        ):
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
