"""The thread in which a rank's carrier works: during calls, and afterwards until all is carried; else it sleeps.

When nothing moves it naps, longer and longer. Each look takes a core for some 15 us, perhaps from a processor: where
ranks share cores, shorter naps cost more than messages gain by them (experiments/06_two_hosts.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import FlashMoEError
from .carrier import Carrier

NAP_PART = 2  # of the time since anything has moved
SHORTEST_NAP_S, LONGEST_NAP_S = 5e-4, 2e-3
LOOK_S = 0.05
LAST_WORDS_S = 2.0  # for what is still to be said where a call is given up
_LEFT: list[Carrier] = []  # with messages under way for good: MPI may still read and write their memory


class CarrierThread:
    """One thread, from the first call on. It holds the carrier, and nothing of the layer."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._turn = threading.Lock()  # whose turn it is to have the carrier work
        self._wanted, self._ending = False, False
        self._stir = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="flashmoe_carrier", daemon=True)
        self._thread.start()

    @contextmanager
    def carrying(self, patience_s: float, beat_s: float | None = None) -> Iterator[None]:
        """Carry while this lasts, and take all puts that were posted in it.

        Args:
            beat_s: from news to news, from now on; None: as before.

        Raises:
            FlashMoEError: MPI does not come back for `patience_s`, or has failed.
        """
        if beat_s is not None:
            self._carrier.beat_s = beat_s
        self._wanted = True
        self._stir.set()
        try:
            try:
                yield
            except BaseException:
                with suppress(FlashMoEError):  # what has happened is the error
                    self._take_rest(patience_s)
                raise
            self._take_rest(patience_s)
        finally:
            self._wanted = False

    def _take_rest(self, patience_s: float) -> None:
        """Of a call that was given up: if MPI comes back. There may be a rank that does not answer."""
        if self._error is not None:
            rule = "messages to ranks of other hosts must be carried, and were not"
            raise FlashMoEError(f"{rule}: {type(self._error).__name__}: {self._error}") from self._error
        start = time.monotonic()
        while not self._turn.acquire(timeout=LOOK_S):
            silent_s = time.monotonic() - start
            if self._carrier.is_given_up and silent_s > LAST_WORDS_S:
                return
            if silent_s > patience_s:
                rule = "MPI must come back from messages to ranks of other hosts"
                raise FlashMoEError(f"{rule}, and has not for {silent_s:.1f} s")
        try:
            self._carrier.send_puts()
        finally:
            self._turn.release()

    def part(self, patience_s: float) -> None:
        """Let no message be under way any more. All ranks call it, behind their last call, while they carry.

        Raises:
            TimeoutError: some rank does not.
        """
        with self._turn:
            self._carrier.say_goodbye()
        if not self._wait(lambda: not (self._carrier.staying or self._carrier.is_busy), patience_s):
            raise TimeoutError(f"ranks {sorted(self._carrier.staying)} do not close their layer")

    def stop(self, patience_s: float = LAST_WORDS_S) -> None:
        """End, when all has left, or at the latest in `patience_s`. Where MPI keeps the thread it is left alone."""
        if threading.current_thread() is self._thread:  # it happened to collect a layer that was never closed
            self._ending = True
            return
        until = time.monotonic() + patience_s
        self._wanted = True
        self._stir.set()
        self._wait(lambda: not self._carrier.has_words, patience_s)
        self._ending = True
        self._stir.set()
        self._thread.join(max(LONGEST_NAP_S, until - time.monotonic()))
        if self._carrier.is_busy and self._carrier not in _LEFT:
            _LEFT.append(self._carrier)

    def _wait(self, done: Callable[[], bool], patience_s: float) -> bool:
        """Did it come to that while the thread was at work?"""
        until = time.monotonic() + patience_s
        while not done():
            if time.monotonic() > until or not self._thread.is_alive():
                return False
            time.sleep(LONGEST_NAP_S)
        return True

    def _work(self) -> None:
        try:
            while not self._ending:
                self._stir.clear()
                if not (self._wanted or self._carrier.is_busy):
                    self._stir.wait()
                self._carry()
        except BaseException as error:
            self._error = error

    def _carry(self) -> None:
        """Until nothing is wanted and nothing under way."""
        moved_at = time.monotonic()
        while (self._wanted or self._carrier.is_busy) and not self._ending:
            with self._turn:
                moved = self._carrier.step()
            now = time.monotonic()
            if moved:
                moved_at = now
            else:
                time.sleep(min(max((now - moved_at) / NAP_PART, SHORTEST_NAP_S), LONGEST_NAP_S))
