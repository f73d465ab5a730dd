"""The tree of all choices of who runs next, and the strategy that walks it: a run for each class of interleavings.

A thread runs from one atomic access to the next, so plain accesses are not interleaved: while none of them race, which
every run checks, no order of them can be told from another.

**Polls.** A poll is what a thread looks at between taking the time, or a pause, and the next pause. A poll that fails
only looks, so a run with it ends like the run without it: it is taken back, and the thread waits until one of the words
it looked at has been written. What it looked at in vain still counts as a race with the writes before. A thread that is
made to look at a word before its write may wait in the midst of its poll, for the words that come later in it; when
none does, it is left waiting, and a run in which it is cannot be completed: it would have to look again, and runs in
which it looks later only are others of the tree. A greenlet cannot go back into the midst of a poll, so a run that
comes to that by itself is made again (RETRY).

Memory is sequentially consistent here, and a block has one lane: barriers would be events of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from ...device.fibers import Deadlock, Fiber
from ..run.memory import LOADS, STORES, Actor, Memory, Region
from ..run.reports import Stopped
from .source_sets import Event, Look, Node, Order, WordName, add_reversals, next_branch

COMPLETE = "complete"  # all threads have ended
REDUNDANT = "redundant"  # all that could go on is as good as a run that has been made
UNFINISHED = "unfinished"  # a thread was made to look too early to go on
DEADLOCK = "deadlock"
RETRY = "retry"  # the same choices have to be made once more


@dataclass
class _Thread:
    """How far a thread is in this run."""

    name: str
    fiber: Fiber
    parents: list[str]  # threads that had ended before it began
    ended: bool = False
    poll: int = -1  # number of the poll that `looks` are of
    pauses: int = 0
    looks: list[tuple[int, Look]] = field(default_factory=list)  # of this poll, and which event each is
    rest: list[Look] | None = None  # of a poll that fails (or would) until one of these has another version
    failed: list[Look] = field(default_factory=list)  # all that the poll looked at
    clock: list[int] | None = None  # the detector's, after its last event
    clock_before_poll: list[int] | None = None


class ChoiceTree:
    """A strategy for one run after the other: `begin` before each, `end` after it, until `turn` finds nothing new.

    Args:
        memory: tells the tree of every atomic access.
        family: fibers of one family that are added in a run begin after all earlier ones of it have ended.
    """

    def __init__(self, memory: Memory, family: Callable[[Fiber], Hashable] = lambda fiber: fiber) -> None:
        self._memory, self._family = memory, family
        self.nodes: list[Node] = []  # the choices of this run
        self._branch = 0  # the first of them that is not the last run's

    def replay(self) -> ChoiceTree:
        """A strategy that makes this run again, once."""
        again = ChoiceTree(self._memory, self._family)
        again.nodes = list(self.nodes)
        return again.begin()

    def begin(self) -> ChoiceTree:
        """Make ready for a run."""
        self._memory.listener = self._heard
        self._fixed = len(self.nodes)  # these choices are made
        self._depth = 0  # events so far
        self._threads: dict[str, _Thread] = {}
        self._versions: Counter[WordName] = Counter()
        self._running: _Thread | None = None
        self._event: Event | None = None
        self._poll = 0  # that the event is of
        self._is_load = self._told = False
        self._end = ""
        return self

    def end(self) -> str:
        """How the run ended; now the tree knows what else has to be tried."""
        if not self._end:
            self._settle()
            self._end = COMPLETE
        if self._end != RETRY:
            events = [node.event for node in self.nodes if node.event is not None]
            parents = {name: thread.parents for name, thread in self._threads.items()}
            order = Order([*events, *self._last_looks()], parents)
            add_reversals(self.nodes, order, self._branch)
        return self._end

    def turn(self) -> bool:
        """Turn to a run that has not been made; False when there is none."""
        if self._end == RETRY:
            return True
        more = next_branch(self.nodes)
        self._branch = len(self.nodes) - 1
        return more

    # ---- what the scheduler asks

    def added(self, fiber: Fiber) -> None:
        family = [t for t in self._threads.values() if self._family(t.fiber) == self._family(fiber)]
        ended = [t.name for t in family if t.ended or t is self._running]
        call = 1 + sum(t.fiber.name == fiber.name for t in self._threads.values())
        name = f"{fiber.name} call {call}"
        self._threads[name] = _Thread(name, fiber, ended)

    def take_next(self, ready: list[Fiber]) -> Fiber:
        self._settle()
        thread = self._threads[self.nodes[self._depth].thread] if self._depth < self._fixed else self._choose()
        self._running, self._told = thread, False
        ready.remove(thread.fiber)
        return thread.fiber

    def switches(self, fiber: Fiber, ready: list[Fiber]) -> bool:
        """Before the access that comes after the first one. Verbs that write ask once more just after it."""
        if self._event is None:
            return False
        if self._is_load or self._told:
            return True
        self._told = True
        return False

    def _heard(self, actor: Actor, verb: str, region: Region, i: int, value: int) -> None:
        """An atomic access was made."""
        assert self._running is not None
        self._is_load = verb in LOADS
        self._event = Event(self._running.name, (region.name, i), verb in STORES)
        self._poll = actor.poll

    # ---- after a thread has run

    def _settle(self) -> None:
        thread = self._running
        if thread is None:
            return
        if self._event is not None:
            self._note(thread, self._event)
            self._event = None
        thread.ended = thread.fiber.dead
        actor: Actor | None = thread.fiber.actor
        if actor is not None:
            thread.clock = actor.clock
            if actor.pauses != thread.pauses:
                thread.pauses = actor.pauses
                self._poll_failed(thread, actor)

    def _note(self, thread: _Thread, event: Event) -> None:
        """One more event of the run."""
        i = self._depth
        if i == len(self.nodes):
            self.nodes.append(Node(thread.name, self._asleep(), event, {thread.name}))
        elif self.nodes[i].event is None:
            self.nodes[i].event = event
        elif self.nodes[i].event != event:
            raise RuntimeError(f"the kernel does not replay: {event} where {self.nodes[i].event} was")
        if event.writes:
            self._versions[event.word] += 1
            thread.looks = []
        else:
            if thread.poll != self._poll:
                thread.looks = []
            if not thread.looks:
                thread.poll, thread.clock_before_poll = self._poll, thread.clock
            thread.looks.append((i, (event.word, self._versions[event.word])))
        thread.rest = None
        self._depth += 1
        for name, rest in self.nodes[i].rests.items():
            other = self._threads[name]
            other.rest, other.failed = rest, [look for _, look in other.looks] + rest

    def _poll_failed(self, thread: _Thread, actor: Actor) -> None:
        if thread.poll != actor.poll or not thread.looks:
            return
        looks, thread.looks = thread.looks, []
        new = [look for i, look in looks if i >= self._fixed]
        del self.nodes[len(self.nodes) - len(new) :]
        self._depth -= len(new)
        thread.failed = [look for _, look in looks]
        thread.rest = new  # if it was made to look too early, and nothing comes that could help, it waits for ever
        if len(new) == len(looks):
            if thread.clock_before_poll is not None:
                thread.clock = actor.clock = thread.clock_before_poll
        elif new and self._awake():  # it should stand before these looks while others go on
            self.nodes[-1].rests[thread.name] = new
            self._stop(RETRY)

    def _choose(self) -> _Thread:
        """The thread that ran, if it can, else the first that can; one that looked early comes last."""
        awake = self._awake()
        if awake:
            return min(awake, key=lambda thread: (self._looked_early(thread), thread is not self._running))
        asleep = self._asleep()
        live = self._live()
        able = [thread for thread in live if not self._waits(thread)]
        if able:
            self._look_early(live, asleep)
            self._stop(REDUNDANT)
        if any(self._versions[word] != version for thread in live for word, version in thread.failed):
            self._stop(UNFINISHED)
        self._end = DEADLOCK
        raise Deadlock("every live thread polls and nobody writes")

    def _live(self) -> list[_Thread]:
        return [thread for thread in self._threads.values() if not thread.ended]

    def _waits(self, thread: _Thread) -> bool:
        return thread.rest is not None and all(self._versions[word] == version for word, version in thread.rest)

    def _awake(self) -> list[_Thread]:
        asleep = self._asleep()
        return [thread for thread in self._live() if thread.name not in asleep and not self._waits(thread)]

    def _looked_early(self, thread: _Thread) -> bool:
        """It was made to, and its poll is likely to be in vain: then it could not go on where it stands now."""
        return bool(thread.looks) and thread.looks[0][0] < self._fixed

    def _look_early(self, live: list[_Thread], asleep: dict[str, Event]) -> None:
        """If a thread that waits looks at a word that one asleep writes next, that look, kept, wakes the writer."""
        for thread in live:
            if thread.name in asleep or not self._waits(thread):
                continue
            for n, (word, _) in enumerate(thread.rest or []):
                look = Event(thread.name, word, False)
                if any(look.depends_on(event) for event in asleep.values()):
                    self._keep_looks(thread, n + 1)

    def _keep_looks(self, thread: _Thread, number: int) -> None:
        assert thread.rest is not None
        for word, _ in thread.rest[:number]:
            self.nodes.append(Node(thread.name, self._asleep(), Event(thread.name, word, False), {thread.name}))
            self._depth += 1
        self.nodes[-1].rests[thread.name] = thread.rest[number:]
        self._stop(RETRY)

    def _asleep(self) -> dict[str, Event]:
        return self.nodes[self._depth - 1].asleep_after() if self._depth else {}

    def _stop(self, end: str) -> None:
        self._end = end
        raise Stopped

    def _last_looks(self) -> Iterator[Event]:
        """What threads that still wait at the end of a run looked at in vain."""
        for thread in self._live():
            yield from (Event(thread.name, word, False) for word, _ in thread.rest or [])
