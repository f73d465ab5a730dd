"""One run from its start to what is to be said of it."""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .run import Hang, running
from .verdict import Verdict, judge
from .world import Trial


def lose_one(world: Trial, fault: Fault, rng: np.random.Generator, slack_s: float) -> Verdict:
    """Start ranks, do this to a random one of them at a random moment, wait for the end of all, and judge it."""
    with running(world, rng) as run:
        victim = int(rng.integers(run.num_ranks))
        try:
            run.wait_for_moment(victim)
            fault(run, victim)
            run.wait_for_all()
            run.end()
        except Hang as hang:
            return Verdict(problems=[f"hang\n{hang}"])
        return judge(run, run.lost | {victim}, slack_s)
