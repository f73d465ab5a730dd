"""The exhaustive search against an oracle that tries every interleaving, on random programs; then on the kernel."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from greenlet import getcurrent
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nightly import at_night

from flashmoe_numba.device.fibers import Deadlock, RandomStrategy, Scheduler, current
from flashmoe_numba.explore.choose.choice_tree import COMPLETE, ChoiceTree
from flashmoe_numba.explore.choose.source_sets import Event, Order
from flashmoe_numba.explore.exhaustive import explore_all, rank_of
from flashmoe_numba.explore.run import watched
from flashmoe_numba.explore.run.memory import STORES, Actor, Memory
from flashmoe_numba.explore.run.reports import Stopped
from flashmoe_numba.explore.run.spec import WorldSpec
from flashmoe_numba.explore.run.world import WatchedWorld
from flashmoe_numba.explore.search import Search, watched_kernel
from reference import MoEConfig

NUM_WORDS = 3
STORE, LOAD, ADD, SWAP, ALL, ANY = "store", "load", "add", "swap", "all", "any"

words = st.integers(0, NUM_WORDS - 1)
looks = st.lists(st.tuples(words, st.integers(1, 2)), min_size=1, max_size=3).map(tuple)
plain_steps = st.one_of(
    st.tuples(st.just(STORE), words, st.integers(0, 2)),
    st.tuples(st.just(LOAD), words),
    st.tuples(st.just(ADD), words),
    st.tuples(st.just(SWAP), words, st.integers(0, 1), st.integers(0, 2)),
)
steps = st.one_of(plain_steps, st.tuples(st.sampled_from([ALL, ANY]), looks))


def programs(step, most_threads, most_steps):
    """One list of steps for each thread."""
    return st.lists(st.lists(step, min_size=1, max_size=most_steps), min_size=2, max_size=most_threads)


# ---- a program on watched memory


class Thread:
    """Runs one program's thread; `log` is all that it has seen, but for polls in vain."""

    def __init__(self, steps):
        self.steps, self.log = steps, []

    def __call__(self, region):
        for kind, *rest in self.steps:
            getattr(self, kind)(region, *rest)

    def store(self, region, word, value):
        watched.st_release(region, word, value)

    def load(self, region, word):
        self.log.append(watched.ld_acquire(region, word))

    def add(self, region, word):
        self.log.append(watched.fetch_add(region, word, 1))

    def swap(self, region, word, expected, value):
        self.log.append(watched.cas(region, word, expected, value))

    def all(self, region, looks):
        self._wait(region, looks, stop_at=False)

    def any(self, region, looks):
        self._wait(region, looks, stop_at=True)

    def _wait(self, region, looks, stop_at):
        """Look at one word after the other, until one that is large enough is (any) or is not (all) there."""
        watched.now()
        attempt, hit = 0, not stop_at
        while True:
            seen = []
            for word, least in looks:
                seen.append(watched.ld_acquire(region, word))
                hit = seen[-1] >= least
                if hit is stop_at:
                    break
            if hit:
                break
            attempt = watched.pause(attempt)
        watched.now()
        self.log.append(tuple(seen))


class Program:
    """A program's memory, and its runs."""

    def __init__(self, program):
        self.program = program
        self.memory = Memory(len(program))
        self.region = self.memory.region("words", np.zeros(NUM_WORDS, np.int64))

    def run(self, strategy):
        """(logs and words if all threads ended, else None, whether it was a deadlock)."""
        self.memory.begin()
        self.region.array[:] = 0
        threads = [Thread(steps) for steps in self.program]
        scheduler, fibers, dead = Scheduler(strategy=strategy), [], False
        for i, thread in enumerate(threads):
            scheduler.add_block(f"thread {i}", self._enter, (i, thread, fibers))
        try:
            scheduler.run()
        except Stopped:
            pass
        except Deadlock:
            dead = True
        live = [fiber for fiber in fibers if not fiber.dead]
        for fiber in live:
            fiber.parent = getcurrent()
            fiber.throw()
        logs = tuple(tuple(thread.log) for thread in threads)
        ended = scheduler.live == 0
        return (logs, tuple(self.region.array.tolist())) if ended else None, dead

    def _enter(self, i, thread, fibers):
        fiber = current()
        fibers.append(fiber)
        fiber.actor = Actor(self.memory, i, f"thread {i}", i, 1, [0] * len(self.program))
        thread(self.region)

    def explore(self):
        """(outcomes of all complete runs, their classes, whether there is a deadlock)."""
        tree, outcomes, classes, dead, more = ChoiceTree(self.memory), [], [], False, True
        while more:
            outcome, was_dead = self.run(tree.begin())
            if tree.end() == COMPLETE:
                outcomes.append(outcome)
                classes.append(class_of([node.event for node in tree.nodes]))
            dead |= was_dead
            more = tree.turn()
        return outcomes, classes, dead


# ---- classes of interleavings


def class_of(events):
    """Equal for two runs that differ only in the order of independent events, and only for those."""
    made, words = Counter(), {}  # of each word its stores, and the loads after each
    for event in events:
        name = event.thread, made[event.thread]
        made[event.thread] += 1
        stores = words.setdefault(event.word, [(None, set())])
        if event.writes:
            stores.append((name, set()))
        else:
            stores[-1][1].add(name)
    return frozenset((word, tuple((store, frozenset(loads)) for store, loads in words[word])) for word in words)


# ---- the oracle: all states that any interleaving can come to


def step_of(program, state, t):
    """The state after thread t has made one access; None if it has ended."""
    memory, threads = state
    at, seen, log = threads[t]
    if at == len(program[t]):
        return None
    kind, *rest = program[t][at]
    memory, word = list(memory), rest[0]
    if kind in (ALL, ANY):
        word, least = rest[0][len(seen)]
        seen, hit, last = (*seen, memory[word]), memory[word] >= least, len(seen) + 1 == len(rest[0])
        ends = last or hit is (kind == ANY)
        at, log = (at + 1, (*log, seen)) if ends and hit else (at, log)
        after = at, () if ends else seen, log
    else:
        old = memory[word]
        if kind != LOAD:
            memory[word] = {STORE: rest[-1], ADD: old + 1, SWAP: rest[-1] if old == rest[1 % len(rest)] else old}[kind]
        after = at + 1, (), log if kind == STORE else (*log, old)
    return tuple(memory), (*threads[:t], after, *threads[t + 1 :])


def all_states(program):
    start = (0,) * NUM_WORDS, ((0, (), ()),) * len(program)
    states, todo = {start}, [start]
    while todo:
        state = todo.pop()
        for t in range(len(program)):
            after = step_of(program, state, t)
            if after is not None and after not in states:
                states.add(after)
                todo.append(after)
    return states


def outcomes_of(program):
    """(what all complete interleavings end with, whether some cannot be completed)."""
    ended, dead = set(), False
    for memory, threads in all_states(program):
        live = [t for t, (at, *_) in enumerate(threads) if at < len(program[t])]
        if not live:
            ended.add((tuple(log for *_, log in threads), memory))
        else:
            dead |= all(threads[t][1] == () and polls_in_vain(program[t][threads[t][0]], memory) for t in live)
    return ended, dead


def polls_in_vain(step, memory):
    kind, *rest = step
    if kind not in (ALL, ANY):
        return False
    hits = [memory[word] >= least for word, least in rest[0]]
    return not (all(hits) if kind == ALL else any(hits))


def interleavings(lengths):
    """All orders of threads of these lengths."""
    if not any(lengths):
        yield ()
    for t, length in enumerate(lengths):
        if length:
            for rest in interleavings([n - (i == t) for i, n in enumerate(lengths)]):
                yield (t, *rest)


# ---- random programs


@settings(deadline=None)
@given(programs(steps, most_threads=3, most_steps=3))
@example([[(STORE, 0, 2)], [(LOAD, 2), (ANY, ((0, 1), (0, 2)))]])  # looks early, and sees two values of one word
@example([[(STORE, 0, 1), (STORE, 0, 2)], [(ALL, ((0, 2),))]])
@example([[(STORE, 0, 1)], [(STORE, 0, 0)], [(ALL, ((0, 1),))]])  # a deadlock, or none
def test_every_outcome_of_every_interleaving_is_found(program):
    outcomes, classes, dead = Program(program).explore()
    wanted, can_be_dead = outcomes_of(program)
    assert set(outcomes) == wanted
    assert dead == can_be_dead
    assert len(set(classes)) == len(classes), "a class was run twice"


@settings(deadline=None)
@given(programs(plain_steps.filter(lambda step: step[0] != SWAP), most_threads=3, most_steps=3))
def test_there_is_one_run_for_each_class(program):
    """Without swaps and waits, events are known beforehand: all their orders are tried, and classes counted."""
    _, classes, _ = Program(program).explore()
    wanted = set()
    for order in interleavings([len(steps) for steps in program]):
        position, events = Counter(), []
        for t in order:
            kind, word, *_ = program[t][position[t]]
            events.append(Event(f"thread {t} call 1", ("words", word), kind != LOAD))
            position[t] += 1
        wanted.add(class_of(events))
    assert Counter(classes) == Counter(wanted)


# ---- source sets


def test_what_comes_before_what():
    a, b, c = "abc"
    events = [Event(a, 0, True), Event(b, 1, True), Event(b, 0, False), Event(c, 1, False), Event(c, 0, True)]
    order = Order(events, {})
    assert [[order.before(i, j) for j in range(i + 1, 5)] for i in range(4)] == [
        [False, True, False, True],
        [True, True, True],
        [False, True],
        [True],
    ]
    assert order.races == [(0, 2), (1, 3), (2, 4)]
    assert order.first_to_run(0, 2) == [b]
    assert order.first_to_run(2, 4) == [c]


def test_a_thread_comes_after_its_parents():
    order = Order([Event("a", 0, True), Event("b", 0, True)], {"b": ["a"]})
    assert order.before(0, 1)
    assert order.races == []


# ---- the kernel

SMALL = dict(
    num_ranks=1, num_tokens=1, hidden=2, ffn=2, num_experts=2, num_topk=1, gated=True, activation="silu",
    tile_m=4, tile_m_min=2, tile_n=4, token_block=2,
)  # fmt: skip


def small_world(epochs=1, **changes):
    return WorldSpec(config=MoEConfig(**SMALL | changes), num_processors=1, lanes=1, epochs=epochs)


@pytest.mark.parametrize(
    "spec", [small_world(), small_world(num_topk=2), small_world(num_experts=1, epochs=2)], ids=["one", "two", "calls"]
)
def test_the_kernel_is_clean_whatever_the_interleaving(spec):
    """And every class that random runs come to is among those that were covered."""
    with watched_kernel(None) as kernel:
        world = WatchedWorld(spec, kernel)
        tree, covered, more = ChoiceTree(world.memory, rank_of), [], True
        while more:
            run = world.run(tree.begin)
            assert run.reports == []
            if tree.end() == COMPLETE:
                assert [len(calls) for calls in run.calls] == [spec.epochs]
                covered.append(class_of([node.event for node in tree.nodes]))
            more = tree.turn()
        assert len(covered) == len(set(covered)) > 1
        met = {random_class(world, seed) for seed in range(80)}
    assert met <= set(covered)
    assert len(met) > len(covered) / 4


@at_night("ten thousand runs")
def test_two_sources_in_a_row_tile_whatever_the_interleaving():
    """Both tokens go to expert 1: their rows share a tile, or idle processors get each in a tile of its own."""
    spec, met = replace(small_world(num_ranks=2), data_seed=2), Counter()
    with watched_kernel(None) as kernel:
        world = WatchedWorld(spec, kernel)
        tree, more = ChoiceTree(world.memory, rank_of), True
        while more:
            run = world.run(tree.begin)
            assert run.reports == []
            if tree.end() == COMPLETE:
                (idle,), (busy,) = (calls[0].tiles for calls in run.calls)
                assert idle == [] and sorted(one.source for tile in busy for one in tile.runs) == [0, 1]
                met[tuple(len(tile.runs) for tile in busy)] += 1
            more = tree.turn()
    assert set(met) == {(2,), (1, 1)} and min(met.values()) > 10, f"{met}"


def random_class(world, seed):
    """Of a run under a random strategy, what was looked at in vain left out."""
    events, made = [], {}  # the events of each actor since its last store: index, poll and pauses then

    def heard(actor, verb, region, i, value):
        last = made.setdefault(actor, [])
        if last and actor.pauses == last[-1][2] + 1 and actor.poll == last[-1][1] + 2:  # just this poll was in vain
            for index, poll, _ in last:
                if poll == last[-1][1]:
                    events[index] = None
        made[actor] = [] if verb in STORES else [*last, (len(events), actor.poll, actor.pauses)]
        events.append(Event(f"{actor.name} call {actor.epoch}", (region.name, i), verb in STORES))

    world.memory.listener = heard
    world.run(lambda: RandomStrategy(seed))
    return class_of([event for event in events if event])


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        ("task-not-acquired", "race"),
        ("bound-long", "deadlock"),
        ("bound-short", "count"),
        ("last-finisher-late", "deadlock"),
    ],
)
def test_a_planted_bug_is_found(plant, kind):
    spec = small_world(ffn=6, hidden=6)  # of two column tiles
    for outcome in explore_all(Search(spec=spec, strategy="exhaustive", weak=False, plant=plant)):
        if outcome.reports:
            assert kind in {report.kind for report in outcome.reports}, outcome.reports
            return
    pytest.fail(f"{plant} should be found")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lanes=2), "exhaustive search needs lanes=1, got 2"),
        (dict(leavers=(0,)), r"exhaustive search needs leavers=\(\), got \(0,\)"),
    ],
)
def test_what_cannot_be_searched(changes, message):
    with pytest.raises(ValueError, match=message):
        next(explore_all(Search(spec=replace(small_world(), **changes), weak=False)))


def test_late_loads_cannot_be_searched():
    with pytest.raises(ValueError, match="exhaustive search needs weak=False, got True"):
        next(explore_all(Search(spec=small_world())))
