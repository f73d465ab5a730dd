"""Calls of functions that the optimiser left as such (build/nvshmem.cu), each replaced by the function's body.

A parameter becomes a register of the call's braces, and a return a branch behind the body. Functions call no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Statement = tuple[int, str, str]  # line, text, and what ends it: ";", "{" or "}"

_FUNCTION = re.compile(r"\.func\s+(?:\(\.param\s+\.b\d+\s+(\w+)\)\s*)?(\w+)\s*\((.*)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.b\d+\s+(\w+)")
_DECLARED = re.compile(r"\.param\s+\.b(32|64)\s+(\w+)")
_CALL = re.compile(r"call\.uni\s+(?:\((\w+)\),\s*)?(\w+),\s*\((.*)\)", re.DOTALL)
_GIVES = re.compile(r"st\.param\.b(32|64)\s+\[(\w+)\+0\],\s*(\S+)")
_TAKES = re.compile(r"ld\.param\.[bu](32|64)\s+(\S+),\s*\[(\w+)(?:\+0)?\]")
_LABEL = re.compile(r"\$L\w+")


@dataclass
class _Function:
    parameters: list[str]
    result: str | None
    body: list[Statement]


def without_calls(statements: Iterable[Statement]) -> Iterator[Statement]:
    """The same with the bodies of functions in the place of their calls. Their lines are those of the bodies."""
    left, functions = _split(statements)
    names: set[str] = set()  # parameters that calls give
    for number, (line, text, end) in enumerate(left):
        if declared := _DECLARED.fullmatch(text):
            names.add(declared[2])
            yield line, f".reg .b{declared[1]} {declared[2]}", end
        elif (call := _CALL.fullmatch(text)) and call[2] in functions:
            yield from _expand(functions[call[2]], re.findall(r"\w+", call[3]), call[1], line, number)
        else:
            yield line, _moved(text, {name: name for name in names}), end


def _split(statements: Iterable[Statement]) -> tuple[list[Statement], dict[str, _Function]]:
    """(all but functions, functions by name)"""
    left: list[Statement] = []
    functions: dict[str, _Function] = {}
    body, depth = left, 0
    for statement in statements:
        _, text, end = statement
        if (found := _FUNCTION.match(text)) and depth == 0:
            if end == "{":
                body, depth = [], 1
                functions[found[2]] = _Function(_PARAMETER.findall(found[3]), found[1], body)
            continue  # a declaration says nothing new
        body.append(statement)
        if body is not left:
            depth += (end == "{") - (end == "}")
            if depth == 0:
                body = left
    return left, functions


def _expand(function: _Function, given: list[str], result: str | None, line: int, number: int) -> Iterator[Statement]:
    """The body, for call `number` with these parameters."""
    names = dict(zip(function.parameters, given, strict=True))
    if function.result is not None and result is not None:
        names[function.result] = result
    behind = f"$L_behind_call_{number}"
    yield line, "", "{"
    for at, text, end in function.body:
        moved = _LABEL.sub(lambda label: f"{label[0]}_of_call_{number}", _moved(text, names))
        yield at, re.sub(r"(^|\s)ret$", rf"\1bra.uni {behind}", moved), end
    yield line, f"{behind}:", ";"


def _moved(text: str, names: dict[str, str]) -> str:
    """Stores to parameters and loads of them as moves, where these are registers."""
    if (gives := _GIVES.search(text)) and gives[2] in names:
        return f"{text[: gives.start()]}mov.b{gives[1]} {names[gives[2]]}, {gives[3]}"
    if (takes := _TAKES.search(text)) and takes[3] in names:
        return f"{text[: takes.start()]}mov.b{takes[1]} {takes[2]}, {names[takes[3]]}"
    return text
