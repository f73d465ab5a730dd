"""The network of a world on several hosts: channels that carry puts, as fibers whose accesses are watched.

A channel is two actors: one takes puts out of the ring, the other carries them. The host begins its rank's next call
when all puts of the last one have been taken, and knows what was taken then, and nothing of what became of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from ...device.fibers import Fiber, Scheduler, clock, current, idle
from .arrays import CHANNEL_ACTORS, NO_DEADLINE, Arrays
from .memory import Actor
from .watched import pause

TAKES, CARRIES = range(CHANNEL_ACTORS)


def channel_name(rank: int, peer: int) -> str:
    return f"rank {rank} network to rank {peer}"


class Sender(Protocol):
    """What is asked of the host of a rank whose puts are carried (hosts.py)."""

    is_lost: bool

    @property
    def epoch(self) -> int: ...

    @property
    def is_over(self) -> bool:
        """Will its rank put nothing more?"""


class Side(NamedTuple):
    """What a channel needs of a rank."""

    problem: Any
    segments: Any


class WatchedChannel:
    """One channel, from its rank's first call to the last; it is lost with its rank."""

    def __init__(self, world: Arrays, index: int, sides: tuple[Side, Side], draw: Callable[[], float] | None) -> None:
        source, target = sides
        self._rank, peer = source.problem.rank_idx, target.problem.rank_idx
        self.name = channel_name(self._rank, peer)
        self._world, self._wire = world, source.segments.wire
        self.channel = world.kernel.Channel(source, target, 0, draw)
        nothing = [0] * world.memory.num_actors
        self._actors = [
            Actor(world.memory, index + role, self.name, self._rank, 1, nothing) for role in range(CHANNEL_ACTORS)
        ]
        self.known = nothing  # what a host knows when it has waited for this channel
        self._of: dict[Any, tuple[int, list[int]]] = {}  # of a put under way: its call, and what was known of it

    def carry(self, host: Sender) -> None:
        """In a fiber of its own."""
        if self._world.spec.deadline is not None:
            self._actors[CARRIES].time = clock()
        attempt = 0
        while not host.is_lost:
            over = host.is_over  # before the ring is looked at
            if self._take(host) | self._move() | self._push():
                attempt = 0
            elif over and self.has_taken_all():  # it may look too early otherwise
                return
            else:
                current().actor = self._actors[TAKES]
                attempt = pause(attempt)

    def _take(self, host: Sender) -> bool:
        current().actor = taker = self._as(TAKES, self._call_of(host))
        before, flight = self.channel.taken, self.channel.take()
        if flight is not None:  # while it looked, the host may have come to the call that this is of
            self._of[flight] = self._call_of(host), taker.clock
        if self.channel.taken != before:
            self.known = taker.clock
            taker.tick()  # what it does from now on is not known
        return flight is not None

    def _move(self) -> bool:
        flight = self.channel.next()
        if flight is not None:
            epoch, clock_then = self._of[flight]
            current().actor = carrier = self._as(CARRIES, epoch)
            carrier.join(clock_then)
            self.channel.move(flight)
        return flight is not None

    def _push(self) -> bool:
        current().actor = self._actors[CARRIES]
        return bool(self.channel.beat())

    def _call_of(self, host: Sender) -> int:
        return min(host.epoch, self._world.spec.epochs)

    def _as(self, role: int, epoch: int) -> Actor:
        """This actor, at work for a call of its rank."""
        actor = self._actors[role]
        if actor.epoch != epoch:  # who has it in a note of an access means the call of then
            self._actors[role] = Actor(actor.memory, actor.index, self.name, self._rank, epoch, actor.clock)
            self._actors[role].time = actor.time
        return self._actors[role]

    def has_taken_all(self) -> bool:
        return bool(self.channel.taken == self._wire.cells[0])


class Network:
    """All channels of a run."""

    def __init__(self, world: Arrays, draw: Callable[[], float] | None) -> None:
        sides = [
            Side(rank.problem._replace(deadline_ns=world.spec.deadline or NO_DEADLINE), world.watched(rank.segments))
            for rank in world.ranks
        ]
        self.fibers: list[Fiber] = []
        self._channels: dict[int, list[WatchedChannel]] = {rank: [] for rank in range(len(sides))}
        for i, (source, target) in enumerate(world.spec.pairs_apart):
            index = world.first_channel + CHANNEL_ACTORS * i
            self._channels[source].append(WatchedChannel(world, index, (sides[source], sides[target]), draw))

    def begin(self, scheduler: Scheduler, hosts: Mapping[int, Sender]) -> None:
        """Start all; `hosts` by rank."""
        for rank, channels in self._channels.items():
            for each in channels:
                self.fibers += scheduler.add_block(each.name, each.carry, (hosts[rank],))

    def wait_until_taken(self, rank: int) -> list[list[int]]:
        """Until all puts of this rank have been taken; clocks of those who did."""
        while not all(each.has_taken_all() for each in self._channels[rank]):
            idle()
        return [each.known for each in self._channels[rank]]
