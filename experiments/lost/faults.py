"""What is done to one rank of a run (or two), from a moment on that is drawn from the run's generator."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from . import memory as m
from .rank import giving_up
from .run import Run

Fault = Callable[[Run, int], None]


def none(run: Run, victim: int) -> None:
    """Nothing: all results are right."""


def kill(run: Run, victim: int) -> None:
    """SIGKILL."""
    run.send(victim, signal.SIGKILL)


def stop(run: Run, victim: int) -> None:
    """SIGSTOP, and nothing after it."""
    run.send(victim, signal.SIGSTOP)
    run.lost.add(victim)


def stop_until_given_up(run: Run, victim: int) -> None:
    """SIGSTOP, and SIGCONT when all others have ended."""
    run.send(victim, signal.SIGSTOP)
    run.wait_for_others(victim)
    run.send(victim, signal.SIGCONT)


def pause(run: Run, victim: int) -> None:
    """SIGSTOP, and SIGCONT after 0.05 to 1.6 deadlines: some when others are giving up."""
    run.send(victim, signal.SIGSTOP)
    _sleep(run, 0.05, 1.6)
    run.send(victim, signal.SIGCONT)


def pulses(run: Run, victim: int) -> None:
    """Twenty times SIGSTOP and SIGCONT, up to a tenth of a deadline each."""
    for _ in range(20):
        run.send(victim, signal.SIGSTOP)
        _sleep(run, 0, 0.1)
        run.send(victim, signal.SIGCONT)
        time.sleep(run.rng.uniform(0, 2e-3))


def delay(run: Run, victim: int) -> None:
    """The rank comes to its next call late, by 0.1 to 2 deadlines."""
    run.memory.words[victim, m.DELAY_NS] = int(1e9 * run.rng.uniform(0.1, 2) * run.world.deadline_s)


def die_giving_up(run: Run, victim: int) -> None:
    """The rank leaves because of an error of its own, and is killed between two stores of saying so."""
    steps = len(giving_up(run.memory, victim, 1))
    run.lost.add(victim)
    run.memory.words[victim, m.LAST_STEP] = run.rng.integers(1, steps + 1)


def raise_error(run: Run, victim: int) -> None:
    """Code of the rank's own raises an error, in the midst of whatever it is at."""
    run.send(victim, signal.SIGSTOP)  # to see what that is
    run.send(victim, signal.SIGUSR1)
    run.send(victim, signal.SIGCONT)
    run.raised.add(victim)


def kill_two(run: Run, victim: int) -> None:
    """SIGKILL; and another one for the first rank that gives up because of it, as soon as it begins to."""
    run.send(victim, signal.SIGKILL)
    second = run.wait_for_giving_up()
    if second is not None:
        run.send(second, signal.SIGKILL)
        run.faults_ns.pop()  # the others have no more time because of it


FAULTS: dict[str, Fault] = {
    "none": none,
    "kill": kill,
    "stop": stop,
    "stop-continue": stop_until_given_up,
    "pause": pause,
    "pulses": pulses,
    "delay": delay,
    "die-giving-up": die_giving_up,
    "raise": raise_error,
    "kill-two": kill_two,
}


def _sleep(run: Run, least: float, most: float) -> None:
    """For a random time between these, in deadlines."""
    time.sleep(run.rng.uniform(least, most) * run.world.deadline_s)
