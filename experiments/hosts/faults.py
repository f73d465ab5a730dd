"""What is done to the ranks and hosts of a trial, and which ranks may be named for it by which others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .namespaces import Hosts, send

FIRST = 1  # the first host that has ranks: mpirun runs on host 0, and the others outlive it no longer


@dataclass(frozen=True)
class World:
    """A running trial, as who harms it sees it."""

    hosts: Hosts
    pids: list[int]  # by rank
    ranks_per_host: int
    deadline_s: float

    def ranks_of(self, host: int) -> set[int]:
        first = (host - FIRST) * self.ranks_per_host
        return set(range(first, first + self.ranks_per_host))

    @property
    def num_hosts(self) -> int:
        return len(self.pids) // self.ranks_per_host


@dataclass(frozen=True)
class Harm:
    """What has become of a world.

    Args:
        lost: ranks that cannot say anything any more.
        apart: {rank: those of which it must name one}. A rank that is neither here nor lost goes on.
        begun: when, by `time.monotonic`.
        at_once: mpirun may end all of them before they can say anything.
    """

    lost: set[int]
    apart: dict[int, set[int]]
    begun: float
    at_once: bool = False


def _lose(world: World, lost: set[int], begun: float, at_once: bool = False) -> Harm:
    others = set(range(len(world.pids))) - lost
    return Harm(lost=lost, apart=dict.fromkeys(others, lost), begun=begun, at_once=at_once)


def _rank(signum: int) -> Callable[[World, np.random.Generator], Harm]:
    def harm(world: World, rng: np.random.Generator) -> Harm:
        victim, begun = int(rng.integers(len(world.pids))), time.monotonic()
        os.kill(world.pids[victim], signum)
        return _lose(world, {victim}, begun)

    return harm


def _ranks_of_host(signum: int) -> Callable[[World, np.random.Generator], Harm]:
    """All at once, while mpirun's part there lives on."""

    def harm(world: World, rng: np.random.Generator) -> Harm:
        victims, begun = world.ranks_of(_host(world, rng)), time.monotonic()
        send([world.pids[victim] for victim in victims], signum)
        return _lose(world, victims, begun)

    return harm


def _power_off(world: World, rng: np.random.Generator) -> Harm:
    host, begun = _host(world, rng), time.monotonic()
    world.hosts.power_off(host)
    return _lose(world, world.ranks_of(host), begun)


def _host_dies(world: World, rng: np.random.Generator) -> Harm:
    """With mpirun's part, and the others' systems are told."""
    host, begun = _host(world, rng), time.monotonic()
    world.hosts.kill(host)
    return _lose(world, world.ranks_of(host), begun, at_once=True)


def _cut(world: World, rng: np.random.Generator) -> Harm:
    host, begun = _host(world, rng), time.monotonic()
    world.hosts.cut(host)
    inside, everybody = world.ranks_of(host), set(range(len(world.pids)))
    return Harm(set(), {rank: everybody - inside if rank in inside else inside for rank in everybody}, begun)


def _for_a_moment(
    begin: Callable[[Hosts, int], None], end: Callable[[Hosts, int], None], least: float, most: float
) -> Callable[[World, np.random.Generator], Harm]:
    """It befalls a host, and passes after a part of the deadline between these."""

    def harm(world: World, rng: np.random.Generator) -> Harm:
        host, begun = _host(world, rng), time.monotonic()
        begin(world.hosts, host)
        time.sleep(rng.uniform(least, most) * world.deadline_s)
        end(world.hosts, host)
        return Harm(set(), {}, begun)

    return harm


def _slow(world: World, rng: np.random.Generator) -> Harm:
    begun = time.monotonic()
    world.hosts.limit(float(rng.uniform(10, 200)))
    return Harm(set(), {}, begun)


def _host(world: World, rng: np.random.Generator) -> int:
    return FIRST + int(rng.integers(world.num_hosts))


FAULTS: dict[str, Callable[[World, np.random.Generator], Harm]] = {
    "rank-kill": _rank(signal.SIGKILL),
    "rank-stop": _rank(signal.SIGSTOP),
    "host-kill": _ranks_of_host(signal.SIGKILL),
    "host-stop": _ranks_of_host(signal.SIGSTOP),
    "power-off": _power_off,
    "host-dies": _host_dies,
    "cut": _cut,
    # It stands still for longer than carriers are silent between two signs of life; a cable is out.
    "pause": _for_a_moment(lambda hosts, i: hosts.stop(i), lambda hosts, i: hosts.go_on(i), 0.1, 0.5),
    "blink": _for_a_moment(lambda hosts, i: hosts.cut(i), lambda hosts, i: hosts.mend(i), 0.05, 0.15),
    "slow": _slow,
}
