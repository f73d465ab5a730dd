"""Rules that files and values of several kinds share, and who is named when one is broken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from reference import scalars


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Whatever does not fit inside is a ValueError that begins with `where`."""
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"{where}: {error}") from None


def check_keys(where: str, table: object, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(table, Mapping):
        raise TypeError(f"{where} must be a table, got {table!r}")
    required = tuple(required)
    known = (*required, *optional)
    unknown = [str(name) for name in table if name not in known]
    missing = [name for name in required if name not in table]
    if missing:
        misspelt = f"; unknown: {', '.join(unknown)}" if unknown else ""
        raise ValueError(f"{where} must have {', '.join(required)}; missing: {', '.join(missing)}{misspelt}")
    if unknown:
        raise ValueError(f"{where} must have only {', '.join(known)}; unknown: {', '.join(unknown)}")


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {value!r}")
    if not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, got {value!r}")


def check_positive(name: str, value: object, whole: bool = False) -> None:
    found = scalars.whole(name, value) if whole else scalars.number(name, value)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
