"""The text of a linked kernel as a list of instructions (PTX ISA 4, syntax).

What nvJitLink emits for one entry is understood, where that calls no functions but such as can be put in their place
(calls.py); anything else is an error that quotes the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .calls import without_calls

_GUARD = re.compile(r"@(!?)([%$\w]+)\s+")
_LABEL = re.compile(r"([$\w]+):(?!:)\s*")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.[bsuf](\d+)\s+([$\w]+)(?:\[(\d*)\])?")
_ENTRY = re.compile(r"\.visible\s+\.entry\s+([$\w]+)\s*\((.*?)\)\s*[.\w\s,]*", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.[bsu]64\s+([$\w]+)")
_HEADER = re.compile(r"^[ \t]*\.(version|target|address_size|file|loc)\b[^\n]*$", re.MULTILINE)
_NOT_SPACE = re.compile(r"\S")
_OPCODE = re.compile(r"[a-z][\w.:]*")


class PtxSyntaxError(ValueError):
    """A line that is not understood."""

    def __init__(self, line: int, text: str, why: str) -> None:
        super().__init__(f"PTX line {line}: {why}: {_one_line(text)}")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        line: in the text, from 1.
        text: as it stands there.
        guard: the predicate's unique name, or "".
        negated: run where the guard is false.
        name: with all modifiers.
        operands: split at commas outside of brackets and braces; registers by their unique names.
    """

    line: int
    text: str
    guard: str
    negated: bool
    name: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Shared:
    """A variable in shared memory; `num_bytes` is None where the launch says how many there are."""

    name: str
    num_bytes: int | None
    alignment: int


@dataclass
class Listing:
    """One entry.

    Args:
        registers: type by unique name, such as "b32", in the order of declaration.
        labels: index of the instruction that follows.
        is_whole: there was an entry, to its closing brace.
    """

    entry: str = ""
    parameters: list[str] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    is_whole: bool = True


def parse(text: str) -> Listing:
    """The listing of a module of one entry.

    Raises:
        PtxSyntaxError: a statement that is not understood, or a second entry.
    """
    parser = _Parser()
    for line, statement, end in without_calls(statements(text)):
        parser.take(line, statement, end)
    parser.listing.is_whole = bool(parser.listing.entry) and not parser.is_inside
    return parser.listing


def statements(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, statement, what ends it) with ";", "{" and "}"; braces of operands belong to the statement."""
    text = _HEADER.sub("", re.sub(r"//[^\n]*", "", text.split("\0", 1)[0]))
    begin, counted, line, operand = 0, 0, 1, False
    for match in re.finditer(r"[;{}]", text):
        statement, end = text[begin : match.start()].strip(), match[0]
        if end == "{" and statement and not statement.startswith((".visible", ".func")) and not statement.endswith(":"):
            operand = True
        elif end == "}" and operand:
            operand = False
        else:
            first = _NOT_SPACE.search(text, begin).start()  # type: ignore[union-attr]  # the terminator at the latest
            line, counted = line + text.count("\n", counted, first), first
            yield line, statement, end
            begin = match.end()
    if text[begin:].strip():
        yield line, text[begin:].strip(), ""


class _Parser:
    def __init__(self) -> None:
        self.listing = Listing()
        self._scopes: list[dict[str, str]] = [{}]  # a name's unique one; inner braces declare anew
        self._num_scopes = 0

    @property
    def is_inside(self) -> bool:
        """Is a brace still open?"""
        return len(self._scopes) > 1

    def take(self, line: int, statement: str, end: str) -> None:
        while label := _LABEL.match(statement):
            if label[1] in self.listing.labels:
                raise PtxSyntaxError(line, statement, f"a second label {label[1]}")
            self.listing.labels[label[1]] = len(self.listing.instructions)
            line += label[0].count("\n")
            statement = statement[label.end() :]
        if statement:
            self._statement(line, statement)
        if end == "{":
            self._num_scopes += 1
            self._scopes.append({})
        elif end == "}":
            self._scopes.pop()

    def _statement(self, line: int, statement: str) -> None:
        if statement.startswith(".pragma"):  # hints for the assembler
            return
        if not statement.startswith("."):
            self.listing.instructions.append(self._instruction(line, statement))
        elif match := _REGISTERS.fullmatch(statement):
            self._declare(match[1], match[2])
        elif match := _SHARED.fullmatch(statement):
            extern, alignment, bits, name, count = match.groups()
            num_bytes = None if extern else int(bits) // 8 * int(count or 1)
            self.listing.shared.append(Shared(name, num_bytes, int(alignment)))
        elif (match := _ENTRY.fullmatch(statement)) and not self.listing.entry:
            self.listing.entry, self.listing.parameters = match[1], _PARAMETER.findall(match[2])
        else:
            raise PtxSyntaxError(line, statement, "a directive that is not known here")

    def _declare(self, kind: str, names: str) -> None:
        for name in re.split(r"\s*,\s*", names.strip()):
            family, _, count = name.rstrip(">").partition("<")
            for one in [f"{family}{i}" for i in range(int(count))] if count else [family]:
                unique = f"{one}@{self._num_scopes}" if len(self._scopes) > 2 else one
                self._scopes[-1][one] = unique
                self.listing.registers[unique] = kind

    def _instruction(self, line: int, statement: str) -> Instruction:
        rest, guard, negated = statement, "", False
        if match := _GUARD.match(rest):
            negated, guard, rest = bool(match[1]), self._unique(match[2]), rest[match.end() :]
        match = _OPCODE.match(rest)
        if not match:
            raise PtxSyntaxError(line, statement, "no instruction")
        operands = tuple(
            re.sub(r"[%$\w.]+", lambda name: self._unique(name[0]), part) for part in split(rest[match.end() :])
        )
        return Instruction(line, _one_line(statement), guard, negated, match[0], operands)

    def _unique(self, name: str) -> str:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return name


def split(operands: str) -> list[str]:
    """At commas outside of brackets and braces."""
    parts, depth = [""], 0
    for character in operands:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [_one_line(part) for part in parts if part.strip()]


def _one_line(text: str) -> str:
    return " ".join(text.split())
