"""A rank is lost at a chosen moment. As a program: `flashmoe`, `losing.py MOMENT FOLDER ARGUMENT...`.

Rank VICTIM sends itself a signal in call EPOCH. "before its blocks" have begun: the others wait in the kernel for its
dispatch flags. "after its dispatch": it is in the kernel, and the others enter when it is lost, so that they wait for
its result flags. Or "before a meeting" of `flashmoe run`: the others wait for it outside the kernel.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from flashmoe_numba import cli
from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.processes import launch
from flashmoe_numba.processes.together import MpiRanks

VICTIM, EPOCH = 1, 4
TRAVEL_S = 0.3  # packets to other hosts are under way for less
MEETING = "before call 3 "  # the first call warms up


def wait_for(condition, limit_s=60):
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit_s:
            raise TimeoutError("what the scenario waits for did not come")
        time.sleep(0.01)


def state(pid):
    """As in `ps`: R, S, T (stopped), Z; or "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def write(file, text):
    """All at once."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").rename(file)


def lose(moment, folder, signum):
    """Prepare this process, whatever its rank. The victim leaves its pid in `folder`."""
    honest_run, honest_meet, victim = CpuBackend.run, MpiRanks.meet, folder / "victim"

    def run(self, records, stop):
        problem, segments = records[0].problem, records[0].segments
        here = problem.epoch == EPOCH and problem.rank_idx == VICTIM
        if here:
            write(victim, str(os.getpid()))
        if here and moment == "before its blocks":
            os.kill(os.getpid(), signum)
        if here and moment == "after its dispatch":
            threading.Thread(target=end_after_dispatch, args=(problem, segments, signum), daemon=True).start()
        if problem.epoch == EPOCH and not here and moment == "after its dispatch":
            wait_for(lambda: victim.exists() and state(victim.read_text()) in ("T", "Z", ""))
        honest_run(self, records, stop)

    def meet(self, what):
        if moment == "before a meeting" and self.rank_idx == VICTIM and what.startswith(MEETING):
            os.kill(os.getpid(), signum)
        honest_meet(self, what)

    CpuBackend.run, MpiRanks.meet = run, meet


def end_after_dispatch(problem, segments, signum):
    words, addresses = ctypes.c_int64 * (2 * problem.num_experts), segments.address[segments.remote == 0]
    flags = [np.ctypeslib.as_array(words.from_address(a + problem.dispatch_flag_at)) for a in addresses.tolist()]
    mine = slice(2 * VICTIM * problem.experts_per_rank + EPOCH % 2, 2 * (VICTIM + 1) * problem.experts_per_rank, 2)
    wait_for(lambda: all((there[mine] >> 32 == EPOCH).all() for there in flags))
    if segments.remote.any():
        time.sleep(TRAVEL_S)
    os.kill(os.getpid(), signum)


def last_words(moment, rank, deadline_s):
    """What another rank says, as a regular expression: it gave up, or stopped because a third one did."""
    silence = rf"for (about )?{deadline_s:g} s"
    if moment == "before a meeting":
        begin = rf"rank {rank} (gave up|stopped) {MEETING}of \d+, while it waited for rank {VICTIM} to come to meeting"
        return rf"{begin} \d+: (no rank made progress {silence}|rank (?!{rank}|{VICTIM})\d gave up)"
    absent = (
        rf"; rank {VICTIM} came as far as call {EPOCH - 1}, this one is at call {EPOCH}: it makes fewer calls "
        r"\(every rank must make the same calls\), was later than deadline_s allows, or is gone"
    )
    flag = {
        "before its blocks": rf"the dispatch flag of rank {VICTIM} for expert \d+ here",
        "after its dispatch": rf"the result flag of rank {VICTIM}, its expert \d+, row tile \d+",
    }[moment]
    return (
        rf"rank {rank}(| stopped: rank (?!{rank}|{VICTIM})\d), block \d+ \(OS block\) gave up in epoch {EPOCH}: "
        rf"waited for {flag}; it holds epoch {EPOCH - 1}; \d+ flags missing, and no rank finished a task {silence}"
        rf"{absent if moment == 'before its blocks' else ''}"
    )


def main(moment, folder, *arguments):
    start = launch.start
    again = [sys.executable, *sys.argv[:3]]  # in place of `python -m flashmoe_numba`
    launch.start = lambda num_ranks, command, deadline_s: start(num_ranks, again + command[3:], deadline_s)
    lose(moment, Path(folder), signal.SIGSTOP)
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
