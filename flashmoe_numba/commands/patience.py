"""What is shown on stderr while work lasts: how many tasks of a simulation are done, and that time goes on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sim.engine.progress import tasks_done

SHOWN_AFTER_S = 5.0
EVERY_S = 1.0


@contextmanager
def shown_when_slow(policy: str, always: bool) -> Iterator[None]:
    """A bar for what is simulated inside, if it lasts: where stderr ends at a terminal, or `always`."""
    if not (always or sys.stderr.isatty()):
        yield
        return
    with _beside(_show, policy):
        yield


@contextmanager
def ticking(bar: Any) -> Iterator[None]:
    """A bar whose clock goes on while the next of its items lasts; nothing if it is not shown."""
    if bar.disable:
        yield
        return
    with _beside(_tick, bar):
        yield


@contextmanager
def clock(what: str) -> Iterator[None]:
    """The time that something has lasted which has no parts to count, where stderr ends at a terminal."""
    from tqdm import tqdm

    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar, ticking(bar):
        yield


@contextmanager
def _beside(show: Callable[[Any, threading.Event], None], what: Any) -> Iterator[None]:
    """`show(what, over)` in a thread of its own, until `over` is set."""
    over = threading.Event()
    thread = threading.Thread(target=show, args=(what, over), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tick(bar: Any, over: threading.Event) -> None:
    while not over.wait(EVERY_S):
        bar.refresh()


def _show(policy: str, over: threading.Event) -> None:
    """Nothing for a while, then the bar, anew every second. There are no numbers while a graph is drawn."""
    from tqdm import tqdm

    if over.wait(SHOWN_AFTER_S):
        return
    shown = {"desc": f"{policy}, simulated", "unit": " tasks", "unit_scale": True, "leave": False}
    with tqdm(file=sys.stderr, dynamic_ncols=True, **shown) as bar:
        while not over.wait(EVERY_S):
            done = tasks_done()
            if done is not None:
                bar.n, bar.total = done
            bar.refresh()
