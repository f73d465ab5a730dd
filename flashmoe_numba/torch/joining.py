"""`join`: ranks that make different numbers of calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .operator import serve
from .ranks import Ranks
from .session import SESSION


@contextmanager
def join(*, comm: Any = None, process_group: Any = None) -> Iterator[None]:
    """While it lasts ranks need not make equally many calls: whoever leaves serves the others' until all have left.

    So a rank may generate fewer tokens than the others, or none at all. Every rank enters and leaves. A rank serves by
    calls without tokens and without gradients, so it is none for trainings; modules that a rank has neither made nor
    called (those of `register`) it cannot serve.

    Args:
        comm, process_group: that of the modules.

    Raises:
        ValueError: neither is given.
        FlashMoEError: a rank is missing, or ranks call different modules.
    """
    ranks = SESSION.ranks(comm, process_group)
    if ranks is None:
        raise ValueError("comm or process_group must be given: those are joined whose modules have the same")
    with SESSION.ending(ranks):
        yield
        while _serve_next(ranks):
            pass


def _serve_next(ranks: Ranks) -> bool:
    """Take part in the others' next call, if there is one; no thread of this process comes between."""
    with ranks.calling:
        call = ranks.next_of_others()
        if call is not None:
            serve(ranks, *call)
    return call is not None
