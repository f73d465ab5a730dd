"""Threads that stay between calls and run functions together: for every call the first ones, one function each.

Each thread has a queue, into which a call is put. Futures would do the same, but they are made and waited for by
Python's conditions: for three functions that do nothing 150 us, in place of 40.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue

Function = Callable[[], object]


class Threads:
    """As many threads as the largest call so far had functions. One call at a time."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._dismiss = weakref.finalize(self, _dismiss, self._workers)

    def run(self, functions: Sequence[Function], stop: Callable[[], None]) -> None:
        """Run all at the same time, and return when all have ended, however they end.

        Args:
            stop: makes those that run end early. It is called if one raises, if a thread cannot be started, or if this
                thread is interrupted; those that have not begun by then do not run.

        Raises:
            BaseException: what the first function to fail has raised, or what this thread was interrupted by.
        """
        call = _Call(functions)
        try:
            for number in range(len(functions)):
                if number == len(self._workers):
                    self._workers.append(_Worker(number))
                self._workers[number].queue.put(call)
            call.wait()
        finally:
            if not call.is_over:
                stop()
                call.end()

    def close(self) -> None:
        """End all threads. There may be no further call."""
        self._dismiss()
        _join(self._workers)


class _Worker:
    """Thread `number`, which runs the function of this number of each call that it is given."""

    def __init__(self, number: int) -> None:
        self.queue: SimpleQueue[_Call | None] = SimpleQueue()
        name = f"flashmoe_{number}"
        self.thread = threading.Thread(target=_work, args=(number, self.queue), name=name, daemon=True)
        self.thread.start()


def _work(number: int, queue: SimpleQueue[_Call | None]) -> None:
    while (call := queue.get()) is not None:
        call.run(number)


def _dismiss(workers: Sequence[_Worker]) -> None:
    """When the threads' owner is closed or gone, or the interpreter ends, whose memory running functions still need."""
    for worker in workers:
        worker.queue.put(None)
    if not threading.main_thread().is_alive():
        _join(workers)


def _join(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.thread.join()


class _Call:
    """Functions that are to begin, and how many have not ended.

    A function is taken out of `_waiting` in one step, by its thread or by the caller that will not have it run, so an
    interrupt between any two steps of the caller does no harm.
    """

    def __init__(self, functions: Sequence[Function]) -> None:
        self._waiting = dict(enumerate(functions))
        self._left, self._lock = len(functions), threading.Lock()
        self._news: SimpleQueue[BaseException | None] = SimpleQueue()  # errors, and last None: all have ended
        if not functions:
            self._news.put(None)

    @property
    def is_over(self) -> bool:
        return self._left == 0

    def run(self, number: int) -> None:
        """By the thread of this number."""
        function = self._waiting.pop(number, None)
        if function is None:
            return
        try:
            function()
        except BaseException as error:
            self._news.put(error)
        self._count_down()

    def _count_down(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._news.put(None)

    def wait(self) -> None:
        """Until all have ended; raises what the first one to fail has raised, at once."""
        error = self._news.get()
        if error is not None:
            raise error

    def end(self) -> None:
        """Let none begin any more, and wait for those that have."""
        for number in list(self._waiting):
            if self._waiting.pop(number, None) is not None:
                self._count_down()
        while not self.is_over:
            self._news.get()
