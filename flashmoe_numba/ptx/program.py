"""Instructions as rows of numbers, which the interpreter runs (interpret.py).

A row is one step: code, target slot, up to three slots, a number, and the instruction that it comes from. Some
instructions take two steps: one with a guard is a branch around it, a comparison combined with a predicate is both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reference.arrays import Array

from . import opcodes as op
from .listing import Instruction, Listing, PtxSyntaxError, parse, split
from .state import NAMED_BARRIERS

CODE, TARGET, A, B, C, NUMBER, SOURCE = range(7)  # columns of a row
ROW = 8
THREAD, BLOCK, BLOCK_THREADS, DYNAMIC_BYTES, PARAMETERS = 0, 1, 2, 3, 4  # slots that a launch fills
NUM_PARAMETERS = 2
SHARED_BEGIN = 1024  # a block's variables lie behind what the driver keeps for itself
SHARED_WINDOW = 1 << 56  # where shared memory lies among generic addresses: beyond any of this process
NEVER_WRITTEN = 0x7FFD7FFD7FFD7FFD  # what a register holds at first: NaN in every format, and no address
_SPECIAL = {"%tid.x": THREAD, "%ctaid.x": BLOCK, "%ntid.x": BLOCK_THREADS, "%dynamic_smem_size": DYNAMIC_BYTES}
_ADDRESS = re.compile(r"\[([%$@\w]+)(?:\+(-?\d+))?\]")
_COMPARISON = re.compile(r"setp\.(\w+)(\.and)?\.(\w+)")
_LOAD = re.compile(r"ld(?:\.(global|shared))?\.([bsuf])(16|32|64)")
_STORE = re.compile(r"st(?:\.(global|shared))?\.[bsuf](16|32|64)")
_ATOMIC = re.compile(r"(ld|st|atom\.add|atom\.cas)\.(relaxed|acquire|release|acq_rel)\.(cta|gpu|sys)\.[bu]64")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(f32\.\w+\.\w+)")
_COPY = re.compile(r"cp\.async\.bulk\.tensor\.([23])d\.shared::cluster\.global\.mbarrier::complete_tx::bytes")
_UNARY, _TERNARY = (
    ("mov", "cvt", "cvta", "neg", "not", "abs", "rcp", "sqrt", "ex2"),
    ("mad", "fma"),
)  # others have two values
_SPACES = {None: op.GENERIC, "global": op.GLOBAL, "shared": op.SHARED}
_ATOMICS = {"ld": op.LOAD_WORD, "st": op.STORE_WORD, "atom.add": op.ATOMIC_ADD, "atom.cas": op.ATOMIC_CAS}
_SAME_AS = {  # where no order or scope is said
    "ld.volatile.u64": "ld.relaxed.sys.b64", "ld.volatile.global.u64": "ld.relaxed.sys.b64",
    "atom.cas.b64": "atom.cas.relaxed.gpu.b64", "atom.global.cas.b64": "atom.cas.relaxed.gpu.b64",
}  # fmt: skip
_LONE = {
    "wgmma.fence.sync.aligned": op.WGMMA_FENCE, "wgmma.commit_group.sync.aligned": op.WGMMA_COMMIT,
    "fence.proxy.async": op.FENCE_ASYNC, "fence.mbarrier_init.release.cluster": op.FENCE_MBARRIER_INIT,
    "ret": op.RETURN,
}  # fmt: skip


@dataclass
class Program:
    """A kernel as the interpreter takes it.

    Args:
        code: int32 [steps, ROW].
        first_slots: int64 [slots], what a thread's registers hold at first: constants, and what nobody wrote.
        static_end, dynamic_at: where a block's own shared variables end, and what the launch adds begins.
        extra: int32, operands of steps that have more than fit a row.
    """

    listing: Listing
    code: Array
    first_slots: Array
    static_end: int
    dynamic_at: int
    extra: Array

    def instruction(self, step: int) -> Instruction:
        return self.listing.instructions[int(self.code[step, SOURCE])]


def load(text: str) -> Program:
    """The program of a module's text.

    Raises:
        ValueError: there is no entry, or not all of it. PtxSyntaxError: what the machine does not know.
    """
    listing = parse(text)
    if not listing.is_whole:
        raise ValueError("the text must be a PTX module of one entry, to its closing brace")
    return program_of(listing)


def program_of(listing: Listing) -> Program:
    """The same of what has been parsed."""
    return _Loader(listing).program()


@dataclass
class _Loader:
    listing: Listing
    rows: list[list[Any]] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)
    constants: dict[int, int] = field(default_factory=dict)  # slot by value
    values: list[int] = field(default_factory=list)  # of all slots

    def __post_init__(self) -> None:
        self.values = [0] * (PARAMETERS + NUM_PARAMETERS)
        for name, kind in self.listing.registers.items():
            self.slots[name] = self._new_slot(1 if kind == "pred" else NEVER_WRITTEN)
        self.temporary = self._new_slot(0)
        self.symbols, self.static_end, self.dynamic_at = _addresses(self.listing)
        self.sums = {slot for i in self.listing.instructions if _WGMMA.fullmatch(i.name) for slot in self._vector(i, 0)}

    def program(self) -> Program:
        at = []
        for index, instruction in enumerate(self.listing.instructions):
            at.append(len(self.rows))
            self._source = index
            self._checked(instruction)
        at.append(len(self.rows))
        for row in self.rows:
            if isinstance(row[NUMBER], str):
                row[NUMBER] = at[self.listing.labels[row[NUMBER]]]
        code = np.array(self.rows, np.int32)
        values = np.array([value & (1 << 64) - 1 for value in self.values], np.uint64).view(np.int64)
        extra = np.array([*self.extra, 0], np.int32)
        return Program(self.listing, code, values, self.static_end, self.dynamic_at, extra)

    # operands

    def _new_slot(self, value: int) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _constant(self, value: int) -> int:
        if value not in self.constants:
            self.constants[value] = self._new_slot(value)
        return self.constants[value]

    def _slot(self, i: Instruction, operand: str) -> int:
        """Of a register, or of a constant that never changes."""
        if operand in self.slots:
            return self.slots[operand]
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand in self.symbols:
            return self._constant(self.symbols[operand])
        if match := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", operand):
            return self._constant(int(match[1], 16))
        if re.fullmatch(r"-?\d+", operand):
            value = int(operand)
            if not -(1 << 63) <= value < 1 << 64:
                raise PtxSyntaxError(i.line, i.text, f"a number of more than 64 bits, {operand}")
            return self._constant(abs(value) if ".pred" in i.name else value)
        raise PtxSyntaxError(i.line, i.text, f"an operand that is not known here, {operand}")

    def _vector(self, i: Instruction, position: int) -> list[int]:
        """Slots of `{a, b, ...}`, which lie side by side because they were declared so."""
        found = [self._slot(i, name) for name in split(i.operands[position].strip("{}"))]
        if found != list(range(found[0], found[0] + len(found))):
            raise PtxSyntaxError(i.line, i.text, "registers of a vector must be declared side by side")
        return found

    def _address(self, i: Instruction, operand: str) -> tuple[int, int]:
        """(slot, offset) of `[register+offset]`."""
        match = _ADDRESS.fullmatch(operand)
        if not match:
            raise PtxSyntaxError(i.line, i.text, f"an address that is not known here, {operand}")
        return self._slot(i, match[1]), int(match[2] or 0)

    # instructions

    def _emit(self, code: int, target: int = 0, a: int = 0, b: int = 0, c: int = 0, number: int | str = 0) -> None:
        self.rows.append([code, target, a, b, c, number, self._source, 0])

    def _checked(self, i: Instruction) -> None:
        try:
            self._instruction(i)
        except PtxSyntaxError:
            raise
        except (IndexError, KeyError, ValueError) as error:
            raise PtxSyntaxError(i.line, i.text, f"operands that are not understood ({error})") from None

    def _instruction(self, i: Instruction) -> None:
        if i.guard and i.name != "bra":
            guard = self.slots[i.guard]
            self._emit(op.BRANCH_IF if i.negated else op.BRANCH_UNLESS, a=guard)
            branch = self.rows[-1]
            self._unguarded(i)
            branch[NUMBER] = len(self.rows)
        else:
            self._unguarded(i)

    def _unguarded(self, i: Instruction) -> None:
        if not i.name.startswith("wgmma"):
            self._watch_sums(i)
        self._step(i)

    def _watch_sums(self, i: Instruction) -> None:
        """Note the use of registers that products sum in: what comes first is written, unless it is stored."""
        for position, operand in enumerate(i.operands):
            names = re.findall(r"[%$\w@]+", operand)
            for slot in sorted(self.sums.intersection(self.slots[name] for name in names if name in self.slots)):
                written = position == 0 and not i.name.startswith("st")
                self._emit(op.WRITES_SUM if written else op.READS_SUM, a=slot)

    def _step(self, i: Instruction) -> None:
        if i.name in op.PLAIN:
            return self._plain(i)
        if i.name == "membar.sys":  # nothing is taken for ordered by it: more races than there are, none fewer
            return None
        for pattern, method in _FORMS:
            if match := pattern.fullmatch(_SAME_AS.get(i.name, i.name)):
                return method(self, i, match)
        raise PtxSyntaxError(i.line, i.text, "an instruction that the machine does not know")

    def _plain(self, i: Instruction) -> None:
        if i.operands[1].startswith("%globaltimer"):
            return self._emit(op.TIMER, self._slot(i, i.operands[0]))
        if "{" in "".join(i.operands):
            return self._halves(i)
        target, *values = (self._slot(i, operand) for operand in i.operands)
        stem = i.name.split(".")[0]
        if len(values) != (1 if stem in _UNARY else 3 if stem in _TERNARY else 2) or i.operands[0] not in self.slots:
            raise PtxSyntaxError(i.line, i.text, "other operands than the instruction has")
        self._emit(op.PLAIN[i.name], target, *values)
        return None

    def _halves(self, i: Instruction) -> None:
        """64 or 32 bits from two halves, or to them; one of these may not be wanted."""
        if i.name == "mov.b32":
            return self._halves_of_32(i)
        if i.name != "mov.b64":
            raise PtxSyntaxError(i.line, i.text, "an instruction that the machine does not know")
        if i.operands[1].startswith("{"):
            low, high = split(i.operands[1].strip("{}"))
            return self._emit(op.PACK64, self._slot(i, i.operands[0]), self._slot(i, low), self._slot(i, high))
        low, high = split(i.operands[0].strip("{}"))
        whole = self._slot(i, i.operands[1])
        if low != "_":
            self._emit(op.ZERO_EXTEND32, self._slot(i, low), whole)
        if high != "_":
            self._emit(op.SHR_U64, self._slot(i, high), whole, self._constant(32))
        return None

    def _halves_of_32(self, i: Instruction) -> None:
        if i.operands[1].startswith("{"):
            low, high = split(i.operands[1].strip("{}"))
            target = self._slot(i, i.operands[0])
            self._emit(op.SHL32, self.temporary, self._slot(i, high), self._constant(16))
            self._emit(op.ZERO_EXTEND16, target, self._slot(i, low))
            return self._emit(op.OR, target, target, self.temporary)
        low, high = split(i.operands[0].strip("{}"))
        whole = self._slot(i, i.operands[1])
        if low != "_":
            self._emit(op.ZERO_EXTEND16, self._slot(i, low), whole)
        if high != "_":
            self._emit(op.SHR_U32, self._slot(i, high), whole, self._constant(16))
        return None

    def _select(self, i: Instruction, match: re.Match[str]) -> None:
        target, a, b, condition = (self._slot(i, operand) for operand in i.operands)
        self._emit(op.SELECT, target, a, b, condition)

    def _insert(self, i: Instruction, match: re.Match[str]) -> None:
        """9.7.1.20, of constant bits: so many of `a`, from the first one on, in the place of some of `b`."""
        first, length = (int(operand) for operand in i.operands[3:])
        taken = (1 << length) - 1
        replaced = (taken << first) & (1 << 64) - 1
        target, a, b = (self._slot(i, operand) for operand in i.operands[:3])
        self._emit(op.AND, self.temporary, a, self._constant(taken))
        self._emit(op.SHL64, self.temporary, self.temporary, self._constant(first))
        self._emit(op.AND, target, b, self._constant(replaced ^ (1 << 64) - 1))
        self._emit(op.OR, target, target, self.temporary)

    def _compare(self, i: Instruction, match: re.Match[str]) -> None:
        found = op.COMPARISONS.get((match[1], match[3]))
        if found is None:
            raise PtxSyntaxError(i.line, i.text, "a comparison that the machine does not know")
        code, exchanged = found
        target, a, b, *other = (self._slot(i, operand) for operand in i.operands)
        if exchanged:
            a, b = b, a
        self._emit(code, self.temporary if other else target, a, b)
        if other:
            self._emit(op.AND_PRED, target, self.temporary, other[0])

    def _branch(self, i: Instruction, match: re.Match[str]) -> None:
        code = op.BRANCH if not i.guard else op.BRANCH_UNLESS if i.negated else op.BRANCH_IF
        if i.operands[0] not in self.listing.labels:
            raise PtxSyntaxError(i.line, i.text, f"no label {i.operands[0]}")
        self._emit(code, a=self.slots[i.guard] if i.guard else 0, number=i.operands[0])

    def _load_parameter(self, i: Instruction, match: re.Match[str]) -> None:
        parameter = self.listing.parameters.index(i.operands[1].strip("[]"))
        self._emit(op.MOVE, self._slot(i, i.operands[0]), PARAMETERS + parameter)

    def _load(self, i: Instruction, match: re.Match[str]) -> None:
        code = {"16": op.LOAD16, "32": op.LOAD32, "64": op.LOAD64}[match[3]]
        target = self._slot(i, i.operands[0])
        slot, offset = self._address(i, i.operands[1])
        self._emit(code, target, slot, c=_SPACES[match[1]], number=offset)
        if match[2] == "s" and match[3] == "32":
            self._emit(op.SIGN_EXTEND32, target, target)

    def _store(self, i: Instruction, match: re.Match[str]) -> None:
        code = {"16": op.STORE16, "32": op.STORE32, "64": op.STORE64}[match[2]]
        slot, offset = self._address(i, i.operands[0])
        value = self._slot(i, i.operands[1])
        self._emit(code, 0, slot, value, _SPACES[match[1]], offset)

    def _load_vector(self, i: Instruction, match: re.Match[str]) -> None:
        slot, offset = self._address(i, i.operands[1])
        self._emit(op.LOAD128, self._vector(i, 0)[0], slot, c=op.GLOBAL, number=offset)

    def _store_vector(self, i: Instruction, match: re.Match[str]) -> None:
        slot, offset = self._address(i, i.operands[0])
        self._emit(op.STORE128, 0, slot, self._vector(i, 1)[0], op.GLOBAL, offset)

    def _atomic(self, i: Instruction, match: re.Match[str]) -> None:
        code, order, scope = _ATOMICS[match[1]], match[2], op.SCOPES[match[3]]
        memory = next(position for position, operand in enumerate(i.operands) if operand.startswith("["))
        slot, offset = self._address(i, i.operands[memory])
        target = self._slot(i, i.operands[0]) if memory else 0
        value, other, *_ = [*(self._slot(i, operand) for operand in i.operands[memory + 1 :]), 0, 0]
        if offset:
            raise PtxSyntaxError(i.line, i.text, "an atomic access with an offset")
        self._emit(code, target, slot, value, other, scope | op.ORDERS[order])

    def _barrier(self, i: Instruction, match: re.Match[str]) -> None:
        barrier, *count = (int(operand) for operand in i.operands)
        if not 0 <= barrier < NAMED_BARRIERS:
            raise PtxSyntaxError(i.line, i.text, f"a barrier that is not in [0, {NAMED_BARRIERS})")
        self._emit(op.BARRIER, a=barrier, number=count[0] if count else 0)

    def _mbarrier(self, i: Instruction, match: re.Match[str]) -> None:
        verb = match[1]
        position = {"init": 0, "inval": 0}.get(verb, 1)
        slot, offset = self._address(i, i.operands[position])
        if verb == "init":
            self._emit(op.MBARRIER_INIT, 0, slot, self._slot(i, i.operands[1]), number=offset)
        elif verb == "inval":
            self._emit(op.MBARRIER_INVALIDATE, 0, slot, number=offset)
        elif verb == "arrive.expect_tx":
            self._emit(op.MBARRIER_ARRIVE, 0, slot, self._slot(i, i.operands[2]), number=offset)
        else:
            self._emit(
                op.MBARRIER_TRY_WAIT, self._slot(i, i.operands[0]), slot, self._slot(i, i.operands[2]), number=offset
            )

    def _copy(self, i: Instruction, match: re.Match[str]) -> None:
        to, offset = self._address(i, i.operands[0])
        name, _, places = i.operands[1].strip("[]").partition(",")
        where = [self._slot(i, place) for place in split(places.strip(" {}"))]
        barrier, barrier_offset = self._address(i, i.operands[2])
        zero = self._constant(0)
        self._emit(op.COPY_BOX, len(where), to, self._slot(i, name), barrier, len(self.extra))
        self.extra += [*where, *[zero] * (3 - len(where)), offset, barrier_offset]

    def _fence_map(self, i: Instruction, match: re.Match[str]) -> None:
        slot, offset = self._address(i, i.operands[0])
        self._emit(op.FENCE_TENSOR_MAP, 0, slot, number=offset)

    def _multiply(self, i: Instruction, match: re.Match[str]) -> None:
        rows, kind = int(match[1]), op.KINDS.get(match[3])
        flags = [split(" ".join(i.operands[4:]).replace(" ", ","))]
        if (
            kind is None
            or any(flag not in ("0", "1") for flag in flags[0])
            or flags[0][:2] != ["1", "1"]
            or "1" in flags[0][2:]
        ):
            raise PtxSyntaxError(i.line, i.text, "a form of wgmma that the machine does not know")
        a, b, scale = (self._slot(i, operand) for operand in i.operands[1:4])
        self._emit(op.WGMMA, self._vector(i, 0)[0], a, b, scale, rows << 4 | kind)

    def _lone(self, i: Instruction, match: re.Match[str]) -> None:
        self._emit(_LONE[i.name])

    def _wait(self, i: Instruction, match: re.Match[str]) -> None:
        self._emit(op.WGMMA_WAIT, number=int(i.operands[0]))

    def _sleep(self, i: Instruction, match: re.Match[str]) -> None:
        self._emit(op.SLEEP, a=self._slot(i, i.operands[0]))


_FORMS: list[tuple[re.Pattern[str], Callable[[_Loader, Instruction, re.Match[str]], None]]] = [
    (re.compile(r"selp\.\w+"), _Loader._select),
    (re.compile(r"bfi\.b64"), _Loader._insert),
    (_COMPARISON, _Loader._compare),
    (re.compile(r"bra(\.uni)?"), _Loader._branch),
    (re.compile(r"ld\.param\.[bsu]64"), _Loader._load_parameter),
    (_LOAD, _Loader._load),
    (_STORE, _Loader._store),
    (re.compile(r"ld\.global\.v4\.b32"), _Loader._load_vector),
    (re.compile(r"st\.global\.v4\.b32"), _Loader._store_vector),
    (_ATOMIC, _Loader._atomic),
    (re.compile(r"bar\.sync"), _Loader._barrier),
    (re.compile(r"mbarrier\.(init|inval|arrive\.expect_tx|try_wait\.parity)\.shared::cta\.b64"), _Loader._mbarrier),
    (_COPY, _Loader._copy),
    (re.compile(r"fence\.proxy\.tensormap::generic\.acquire\.sys"), _Loader._fence_map),
    (_WGMMA, _Loader._multiply),
    (re.compile(r"wgmma\.wait_group\.sync\.aligned"), _Loader._wait),
    (re.compile("|".join(map(re.escape, _LONE))), _Loader._lone),
    (re.compile(r"nanosleep\.u32"), _Loader._sleep),
]


def _addresses(listing: Listing) -> tuple[dict[str, int], int, int]:
    """(address of every shared variable by name, end of the block's own, address of what the launch adds)"""
    addresses, static_end = {}, SHARED_BEGIN
    for variable in listing.shared:
        if variable.num_bytes is not None:
            addresses[variable.name] = _aligned(static_end, variable.alignment)
            static_end = addresses[variable.name] + variable.num_bytes
    dynamic = [variable for variable in listing.shared if variable.num_bytes is None]
    dynamic_at = _aligned(static_end, max((variable.alignment for variable in dynamic), default=1))
    return addresses | {variable.name: dynamic_at for variable in dynamic}, static_end, dynamic_at


def _aligned(address: int, alignment: int) -> int:
    return -(-address // alignment) * alignment
