"""What `flashmoe check` says: a table of all properties, and for each that fails the smallest case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .inputs import Kind
from .search import Result
from .target import Target


def headline(target: Target, kind: Kind, examples: int, seed: int) -> str:
    """What is checked, in one line."""
    gated = "gated" if kind.gated else "plain"
    bias = " with biases" if kind.bias else ""
    sizes = f", sizes in multiples of {kind.multiple}" if kind.multiple > 1 else ""
    experts = f"{kind.dtype}, {gated} {kind.activation} experts{bias}{sizes}"
    return f"{target.name}: {experts}; {examples} cases of each property, seed {seed}"


def table(results: Sequence[Result]) -> Iterator[str]:
    """A line for each property; errors are in units of an element's terms, `bits` stands for none allowed."""
    yield f"{'property':16}{'verdict':13}{'cases':>5}{'error':>10}{'allowed':>10}  what must hold"
    for each in results:
        numbers = f"{each.cases:5}{_number(each.worst.deviation):>10}{_number(each.worst.tolerance):>10}"
        yield f"{each.asked.name:16}{each.verdict:13}{numbers}  {each.asked.claim}"


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def failures(results: Sequence[Result], scripts: dict[str, Path]) -> Iterator[str]:
    """What is wrong, with the smallest case, and how it is run again; once for several properties if it is the same."""
    by_story: dict[str | None, list[Result]] = {}
    for each in results:
        if each.case is not None:
            by_story.setdefault(each.worst.wrong, []).append(each)
    for wrong, (first, *others) in by_story.items():
        also = f"and {len(others)} more fail" if others else "fails"
        yield f"{first.asked.name} {also}: {wrong}"
        yield f"    with {first.case}"
        yield f"    again: python {scripts[first.asked.name]}"


def summary(results: Sequence[Result]) -> str:
    """The last line."""
    counts = [sum(each.verdict == verdict for each in results) for verdict in ("holds", "FAILS", "interrupted")]
    words = [f"{n} {word}" for n, word in zip(counts, ("hold", "fail", "not done"), strict=True) if n or word == "hold"]
    return f"of {len(results)} properties {', '.join(words)}"


def as_json(
    target: Target, kind: Kind, examples: int, seed: int, results: Sequence[Result], scripts: dict[str, Path]
) -> dict[str, Any]:
    """What programs read; an error that is not finite is null."""
    return {
        "target": target.name,
        "torch": target.torch,
        "kind": asdict(kind),
        "examples": examples,
        "seed": seed,
        "passed": all(each.verdict == "holds" for each in results),
        "properties": [_property(each, scripts) for each in results],
    }


def _property(each: Result, scripts: dict[str, Path]) -> dict[str, Any]:
    finite = each.worst.deviation < float("inf")
    return {
        "name": each.asked.name,
        "claim": each.asked.claim,
        "verdict": each.verdict.lower(),
        "cases": each.cases,
        "deviation": each.worst.deviation if finite else None,
        "tolerance": each.worst.tolerance,
        "wrong": each.worst.wrong,
        "case": asdict(each.case) if each.case else None,
        "script": str(scripts[each.asked.name]) if each.asked.name in scripts else None,
    }
