"""Which word of the protocol, or which field of a rank's arguments, a line of linked PTX is about."""

import functools
import re

from flashmoe_numba.build.likeness import like_arguments
from flashmoe_numba.build.variants import Variant
from flashmoe_numba.device.records import record_words
from flashmoe_numba.kernel.control import ABORT, PROGRESS, RECORD, SILENT
from flashmoe_numba.kernel.grid import HEADER_WORDS
from flashmoe_numba.kernel.queue import (
    COUNTER_STRIDE,
    GATE_OPEN,
    GATES_DONE,
    GEMM_TASKS,
    HEAD,
    HIDDEN_ROWS,
    PACKETS_SEEN,
    TAIL,
    TOTAL,
)

COUNTERS = {
    HEAD: "HEAD", TAIL: "TAIL", GATES_DONE: "GATES_DONE", GATE_OPEN: "GATE_OPEN", PACKETS_SEEN: "PACKETS_SEEN",
    GEMM_TASKS: "GEMM_TASKS", HIDDEN_ROWS: "HIDDEN_ROWS", TOTAL: "TOTAL",
}  # fmt: skip
CONTROL = {
    ABORT: "ABORT",
    RECORD.start if hasattr(RECORD, "start") else RECORD: "RECORD",
    PROGRESS: "PROGRESS",
    SILENT: "SILENT",
}
# Fields of a rank's record of arguments that hold, or lead to, arrays of words.
ARRAYS = {
    "segments.dispatch_flag": "dispatch_flag", "segments.result_flag": "result_flag", "segments.control": "control",
    "tokens.needs_left": "needs_left", "received.up_done": "up_done", "received.down_done": "down_done",
    "queue.tasks": "stamp", "queue.counters": "counters", "left": "left", "traces": "trace",
    "problem.dispatch_flag_at": "dispatch_flag of a peer", "problem.result_flag_at": "result_flag of a peer",
    "problem.control_at": "control of a peer",
}  # fmt: skip


def places(record, prefix="", at=0):
    """(byte offset, dotted name) of each field of a record; an array takes two words."""
    for name, field in zip(record._fields, record, strict=True):
        if isinstance(field, tuple):
            yield from places(field, f"{prefix}{name}.", at)
        else:
            yield at, prefix + name
        at += 8 * len(record_words(field, id))


@functools.cache
def fields_of(name):
    """The fields of a variant's arguments, by their offset from where the table's header would be."""
    architecture, dtype, kind = name.split("-")
    variant = Variant(dtype=dtype, architecture=architecture, tensor_cores=kind != "lanes")
    return {8 * HEADER_WORDS + at: field for at, field in places(like_arguments(variant))}


@functools.cache
def names_of(name):
    """What they lead to, of those that are about words."""
    return {at: ARRAYS[field] for at, field in fields_of(name).items() if field in ARRAYS}


def word_of(lines, number, variant):
    """The protocol's name of the word that an atomic access of a line is about, or ""."""
    match = re.search(r"(?:atom|ld\.acquire|ld\.relaxed|st\.release)\S*\s.*?\[(%\w+)\]", lines[number - 1])
    if not match:
        return ""
    fields, added = origin(lines, number - 2, match[1])
    names = {names_of(variant).get(field) for field in fields} - {None}
    if "counters" in names:
        return COUNTERS.get(added // 8 // COUNTER_STRIDE, "")
    if names & {"control", "control of a peer"}:
        return CONTROL.get(added // 8, "")
    return names.pop() if names else ""


def origin(lines, at, register, depth=6):
    """(offsets of the fields, the constant) that an address is the sum of, by the instructions before a line."""
    for k in range(at, -1, -1):
        match = re.match(rf"\s*(?:@\S+ )?([\w.]+)\s+{re.escape(register)}, (.*);", lines[k])
        if not match or match[1].startswith(("st.", "setp")):
            continue
        name, operands = match[1], match[2].split(", ")
        if name.startswith("ld."):
            return {int(re.search(r"\+(\d+)", operands[0])[1]) if "+" in operands[0] else 0}, 0
        if name == "mov.u64" and depth:
            return origin(lines, k - 1, operands[0], depth - 1)
        if name == "add.s64" and depth:
            return both(lines, k, operands, depth - 1)
        return set(), 0
    return set(), 0


def both(lines, k, operands, depth):
    fields, added = set(), 0
    for operand in operands:
        if re.fullmatch(r"-?\d+", operand):
            added += int(operand)
        else:
            more, constant = origin(lines, k - 1, operand, depth)
            fields, added = fields | more, added + constant
    return fields, added
