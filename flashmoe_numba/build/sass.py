"""What a cubin really does: its disassembly, the instructions counted in it, and its main loops.

A main loop is a range of instructions that ends with a branch back to its start, is the shortest one around some of the
instructions that multiply, and has no such range inside. Code that the compiler moved out of its loop is not seen.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .build import Kernel
from .nvshmem import CALLED, PUT_SIGNAL

TOOL = "nvdisasm"
TOOLKIT = Path("/usr/local/cuda/bin")
TENSOR, TENSOR_LOAD = "HGMMA", "UTMALDG"
LANES = ("FFMA", "DFMA")
LOCAL = ("LDL", "STL")  # memory of a thread: registers that were spilled, or arrays that are indexed
WAIT = "WARPGROUP.DEPBAR"
COUNTED = (TENSOR, "HMMA", TENSOR_LOAD, *LANES, *LOCAL)

_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"`\(([^)]+)\)")


@dataclass(frozen=True, kw_only=True)
class MainLoop:
    """A loop that multiplies.

    Args:
        label: of its first instruction.
        num_instructions: from there to the branch back.
        products: instructions that multiply, the wider kind: HGMMA, else FFMA and DFMA.
        shape: what they are, such as HGMMA.64x128x16.F32.BF16; several joined by "+".
        tensor_loads: UTMALDG.
        local_loads, local_stores: LDL and STL.
        waits: WARPGROUP.DEPBAR. With more than one, tensor instructions do not overlap.
    """

    label: str
    num_instructions: int
    products: int
    shape: str
    tensor_loads: int
    local_loads: int
    local_stores: int
    waits: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A disassembly in numbers.

    Args:
        num_instructions: of all functions.
        counts: how often each of COUNTED occurs.
        main_loops: in the order of their places.
        calls: how often each function is called, from anywhere.
    """

    num_instructions: int
    counts: dict[str, int]
    main_loops: tuple[MainLoop, ...]
    calls: dict[str, int]


def find_nvdisasm() -> Path:
    """The disassembler: this environment's wheel, else that on the PATH, else the CUDA toolkit's.

    Raises:
        FileNotFoundError: there is none; names the wheel.
    """
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(folder) / "cu13" / "bin" for folder in (spec and spec.submodule_search_locations) or ()]
    on_path = shutil.which(TOOL)
    candidates = [*(folder / TOOL for folder in wheels), *([Path(on_path)] if on_path else []), TOOLKIT / TOOL]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{TOOL} is not found here: pip install 'flashmoe-numba[compile]' (nvidia-cuda-nvdisasm)")


def disassemble(cubin: Path) -> str:
    """The SASS of all functions in a cubin.

    Raises:
        FileNotFoundError: there is no disassembler.
        RuntimeError: it refused, and what it said.
    """
    done = subprocess.run([find_nvdisasm(), "--print-code", cubin], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{TOOL} refused {cubin}: {done.stderr.strip()}")
    return done.stdout


def read_facts(sass: str) -> Facts:
    """Count a disassembly's instructions and find its main loops."""
    instructions, labels = _parse(sass)
    names = [name for name, _ in instructions]
    return Facts(
        num_instructions=len(names),
        counts={kind: _count(names, kind) for kind in COUNTED},
        main_loops=tuple(_main_loops(instructions, labels)),
        calls=dict(Counter(target for name, operands in instructions if (target := _called(name, operands)))),
    )


def failures(kernel: Kernel, facts: Facts) -> list[str]:
    """What is wrong with a kernel, a line each: what its variant promises, read off the linker's log and the SASS."""
    found = []
    if kernel.variant.tensor_cores:
        found += [f"no {kind}" for kind in (TENSOR, TENSOR_LOAD) if not facts.counts[kind]]
    multiplying = (TENSOR,) if kernel.variant.tensor_cores else LANES
    if not any(loop.shape.startswith(multiplying) for loop in facts.main_loops):
        found.append(f"no main loop with {' or '.join(multiplying)}")
    for loop in facts.main_loops:
        found += [f"main loop {loop.label} ({loop.shape}): {wrong}" for wrong in _wrong(loop)]
    if kernel.spill_bytes:  # outside of main loops, too; a stack without spills is that of what is called
        found.append(f"{kernel.spill_bytes} bytes of registers spilled")
    if kernel.variant.heap == "nvshmem":
        missing = [part for part in (*CALLED, PUT_SIGNAL) if not any(part in name for name in facts.calls)]
        found += [f"no call of {part}" for part in missing]
    return found + [f"the linker warned: {warning}" for warning in kernel.warnings]


def _wrong(loop: MainLoop) -> Iterator[str]:
    if loop.local_loads or loop.local_stores:
        yield f"spills, {loop.local_loads} LDL and {loop.local_stores} STL"
    if loop.shape.startswith(TENSOR) and loop.waits > 1:
        yield f"tensor instructions are serialised, {loop.waits} waits"


def _parse(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(name, operands) of every instruction, and the position that each label stands for."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[2]))
    return instructions, labels


def _called(name: str, operands: str) -> str | None:
    """The function that an instruction calls, if it is a call of one, and not of the assembler's own (__...)."""
    target = _TARGET.search(operands) if _is(name, "CALL") else None
    function = target[1].rpartition("$")[2] if target else ""
    return function if function and not function.startswith(("__", ".")) else None


def _main_loops(instructions: Sequence[tuple[str, str]], labels: dict[str, int]) -> Iterator[MainLoop]:
    """Those with tensor instructions; if there is none, those of lanes."""
    names = [name for name, _ in instructions]
    multiplying = (TENSOR,) if _count(names, TENSOR) else LANES
    products = [at for at, name in enumerate(names) if any(_is(name, kind) for kind in multiplying)]
    ranges = {span: label for span, label in _backward_ranges(instructions, labels).items() if _has(span, products)}
    # A branch back from code that was moved out of a loop spans half of it and all between: never the shortest.
    shortest = {
        min(around, key=_length) for at in products if (around := [span for span in ranges if _has(span, [at])])
    }
    for span in sorted(shortest):
        if not any(_inside(other, span) for other in shortest):
            yield _describe(ranges[span], names[span[0] : span[1] + 1], multiplying)


def _backward_ranges(instructions: Sequence[tuple[str, str]], labels: dict[str, int]) -> dict[tuple[int, int], str]:
    """(first, last) of what each branch back spans, to the label that it names."""
    ranges = {}
    for last, (name, operands) in enumerate(instructions):
        target = _TARGET.search(operands) if _is(name, "BRA") else None
        if target and labels.get(target[1], last + 1) <= last:
            ranges[labels[target[1]], last] = target[1]
    return ranges


def _has(span: tuple[int, int], places: Sequence[int]) -> bool:
    return any(span[0] <= at <= span[1] for at in places)


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _describe(label: str, body: Sequence[str], multiplying: Sequence[str]) -> MainLoop:
    products = Counter(name for name in body if any(_is(name, kind) for kind in multiplying))
    return MainLoop(
        label=label,
        num_instructions=len(body),
        products=products.total(),
        shape="+".join(sorted(products)),
        tensor_loads=_count(body, TENSOR_LOAD),
        local_loads=_count(body, "LDL"),
        local_stores=_count(body, "STL"),
        waits=_count(body, WAIT),
    )


def _count(names: Sequence[str], kind: str) -> int:
    return sum(_is(name, kind) for name in names)


def _is(name: str, kind: str) -> bool:
    """Is this instruction of a kind? Modifiers follow after a dot: FFMA.FTZ; FFMA2 is two FFMA."""
    return name == kind or name.startswith(f"{kind}.") or (kind in LANES and name.startswith(f"{kind}2"))
