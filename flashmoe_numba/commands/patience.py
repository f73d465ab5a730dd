"""What is shown while a simulation lasts: how many of its tasks are done, on stderr."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sim.engine.progress import tasks_done

SHOWN_AFTER_S = 5.0
EVERY_S = 1.0


@contextmanager
def shown_when_slow(policy: str, always: bool) -> Iterator[None]:
    """A bar for what is simulated inside, if it lasts: where stderr ends at a terminal, or `always`."""
    if not (always or sys.stderr.isatty()):
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_show, args=(policy, over), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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
