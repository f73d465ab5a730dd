"""Mutants: small faults made by rule in the functions of a source file, each an edit of the text at one syntax node.

A mutant is named by its function, its rule and the edit with what stands beside it in its statement, as in
`dispatch: off by one: slot += {1 => 2}`; equal names are numbered. So a name outlives a move of the function to another
file, and lines that come and go around it.

Left alone: what no test should look at (docstrings, annotations, decorators, assertions, texts of errors), and what any
test would see (swapped arguments of which one is a group of arrays, a name missing, arguments of `min`).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

Edit = tuple[str, ast.AST, ast.AST, str]  # (rule, from this node, to this one, becomes this text)

NEIGHBOUR = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OTHER = {ast.And: ast.Or, ast.Or: ast.And}
EXPRESSIONS = (ast.expr, ast.keyword, ast.comprehension, ast.withitem)
SYMMETRIC = {"min", "max"}
GROUPS = {  # arrays and objects: where one of these and a number change places, nothing runs
    "p", "segments", "experts", "tokens", "received", "queue", "scratch", "box", "trace", "matrices", "control",
    "words", "nodes", "servers", "links", "expected", "counters", "runs", "marks", "events", "items", "succ", "graph",
    "typing", "context", "builder", "b", "rank", "record", "task", "room", "s", "config",
}  # fmt: skip
CONTEXT = 40  # characters on each side of an edit that a name shows
ORDERINGS = {"acquire", "release", "acq_rel"}  # of LLVM
RELAXED = "\nfrom flashmoe_numba.device import ld_relaxed\n"


@dataclass(frozen=True)
class Mutant:
    """One edit of one file: bytes [start, end) become `new`."""

    name: str
    rule: str
    file: Path
    start: int
    end: int
    new: str

    def edited(self, text: bytes) -> bytes:
        """The file's text with the fault in it."""
        more = RELAXED if self.new == "ld_relaxed" else ""  # which the file may not import
        return text[: self.start] + self.new.encode() + text[self.end :] + more.encode()


def find_mutants(files: list[Path], root: Path) -> list[Mutant]:
    """All mutants of these files of `root`, names made unique."""
    seen: Counter[str] = Counter()
    mutants = []
    for file in files:
        for mutant in mutants_of((root / file).read_text(encoding="utf-8"), file):
            seen[mutant.name] += 1
            number = seen[mutant.name]
            mutants.append(mutant if number == 1 else replace(mutant, name=f"{mutant.name} ({number})"))
    return mutants


def mutants_of(text: str, file: Path) -> Iterator[Mutant]:
    """The mutants of one file, in the order of its text."""
    source = Source(text)
    for function, statement in statements(ast.parse(text)):
        for rule, first, last, new in edits(statement):
            start, end = source.span(first)[0], source.span(last)[1]
            name = f"{function}: {rule}: {source.marked(statement, start, end, new)}"
            yield Mutant(name, rule, file, start, end, new)


class Source:
    """A file's text by syntax nodes, whose columns count bytes."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.line_at = [0]
        for line in self.text.splitlines(keepends=True):
            self.line_at.append(self.line_at[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.line_at[node.lineno - 1] + node.col_offset, self.line_at[node.end_lineno - 1] + node.end_col_offset

    def marked(self, statement: ast.stmt, start: int, end: int, new: str) -> str:
        """What stands before and after the edit in its statement, and `{old => new}` in its place."""
        first, last = self.span(statement)
        inner = getattr(statement, "body", None)
        if inner:
            last = self.text.rindex(b":", first, self.span(inner[0])[0])
        before, old, after = self.line(first, start), self.line(start, end), self.line(end, last)
        return f"{before[-CONTEXT:]}{{{old} => {new}}}{after[:CONTEXT]}".strip()

    def line(self, start: int, end: int) -> str:
        """A piece of the text in one line, without comments."""
        return re.sub(r"\s*\n\s*", " ", re.sub(r"\s*#[^\n\"']*\n", "\n", self.text[start:end].decode()))


# ---- where: statements of functions, and at a file's level those with a lambda


def statements(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """(function, statement), nested statements included."""
    for statement in tree.body:
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and contains(statement, ast.Lambda):
            yield lambda_name(statement), statement
    yield from functions(tree.body, "")


def functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield from inside(node.body, f"{prefix}{node.name}")


def inside(body: list[ast.stmt], function: str) -> Iterator[tuple[str, ast.stmt]]:
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield from functions([statement], f"{function}.")
            continue
        yield function, statement
        for name in ("body", "orelse", "finalbody"):
            yield from inside(getattr(statement, name, []), function)
        for handler in getattr(statement, "handlers", []):
            yield from inside(handler.body, function)


def contains(node: ast.AST, kind: type) -> bool:
    return any(isinstance(inner, kind) for inner in ast.walk(node))


def lambda_name(statement: ast.stmt) -> str:
    """`_ld_acquire` of an assignment, `_meaning(verbs.lane)` of a call."""
    if isinstance(statement, ast.Assign):
        return ast.unparse(statement.targets[0])
    return ast.unparse(getattr(getattr(statement, "value", statement), "func", statement))


# ---- what: the rules


def edits(statement: ast.stmt) -> Iterator[Edit]:
    """Every rule at every node of a statement, but not of those nested in it."""
    yield from whole(statement)
    for node in expressions(statement):
        if isinstance(node, ast.Compare):
            yield from comparisons(node)
        elif isinstance(node, ast.BoolOp):
            yield "comparison", node, node, ast.unparse(changed(node, op=OTHER[type(node.op)]()))
        elif isinstance(node, ast.Constant):
            yield from constants(node)
        elif isinstance(node, ast.Call):
            yield from calls(node)


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes of expressions below this one."""
    if isinstance(node, (ast.Raise, ast.Assert)):
        return
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, EXPRESSIONS) and not isinstance(child, ast.JoinedStr) and field != "annotation":
                yield child
                yield from expressions(child)


def whole(statement: ast.stmt) -> Iterator[Edit]:
    """The statement dropped, if something is left that can run."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        if can_be_missing(statement):
            yield "dropped statement", statement, statement, "pass"
        return
    called = ast.unparse(statement.value.func)
    if called == "st_release":
        array, index, value = map(ast.unparse, statement.value.args)
        yield "weakened order", statement, statement, f"{array}[{index}] = {value}"
    yield "weakened order" if called == "block_sync" else "dropped statement", statement, statement, "pass"


def can_be_missing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):  # without a new name, of which each later use would tell
        return not any(isinstance(target, (ast.Name, ast.Tuple)) for target in statement.targets)
    if isinstance(statement, ast.Return):
        return statement.value is None
    return isinstance(statement, (ast.AugAssign, ast.Raise, ast.Break, ast.Continue))


def comparisons(node: ast.Compare) -> Iterator[Edit]:
    for i, op in enumerate(node.ops):
        ops = [*node.ops[:i], NEIGHBOUR[type(op)](), *node.ops[i + 1 :]]
        yield "comparison", node, node, ast.unparse(changed(node, ops=ops))


def constants(node: ast.Constant) -> Iterator[Edit]:
    if type(node.value) is int:
        yield "off by one", node, node, str(node.value + 1)
    elif node.value in ORDERINGS:
        yield "weakened order", node, node, '"monotonic"'


def calls(node: ast.Call) -> Iterator[Edit]:
    called, args = ast.unparse(node.func), node.args
    if called == "ld_acquire":
        yield "weakened order", node.func, node.func, "ld_relaxed"
    if called == "range":
        stop = args[min(1, len(args) - 1)]
        if not isinstance(stop, ast.Constant):
            yield "off by one", stop, stop, ast.unparse(ast.BinOp(stop, ast.Sub(), ast.Constant(1)))
    if called not in SYMMETRIC:
        yield from swaps(args)


def swaps(args: list[ast.expr]) -> Iterator[Edit]:
    """Neighbours changed, of those that are not groups of arrays."""
    for one, other in pairwise(args):
        texts = ast.unparse(one), ast.unparse(other)
        starred = isinstance(one, ast.Starred) or isinstance(other, ast.Starred)
        if texts[0] != texts[1] and not starred and not GROUPS.intersection(texts):
            yield "swapped argument", one, other, f"{texts[1]}, {texts[0]}"


def changed(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of the node with other fields."""
    made = copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return made
