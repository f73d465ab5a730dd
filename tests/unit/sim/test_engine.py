"""The two engines agree event for event, and what they say obeys the laws of schedules; SimPy is the oracle."""

import ast
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import simpy
from graphs import KIND, graphs
from hypothesis import given
from hypothesis import strategies as st

from sim.engine import compiled, heaps, loop, plain
from sim.engine.graph import NONE, GraphBuilder
from sim.engine.timeline import DeadlockError


def assert_same(one, other):
    for field in fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


class Ledger(plain.Instrument):
    """Everything that happened, and how many slots of each node's server were in use."""

    def __init__(self, graph):
        self.graph = graph
        self.running = [0] * len(graph.servers)
        self.peak = [0] * len(graph.servers)
        self.done = []
        self.sent = [Counter() for _ in graph.links]  # bytes by (node, time at which a run of it ended)

    def on_start(self, time, node, count):
        server = self.graph.nodes["server"][node]
        if server != NONE:
            self.running[server] += count
            self.peak[server] = max(self.peak[server], self.running[server])

    def on_end(self, time, node, count):
        server = self.graph.nodes["server"][node]
        if server != NONE:
            self.running[server] -= count

    def on_done(self, time, node):
        self.done.append(node)

    def on_transfer(self, time, node, link, nbytes):
        self.sent[link][node, time] += nbytes


def test_room_is_made_for_tasks_not_for_slots():
    builder = GraphBuilder()
    server = builder.add_server("huge", 0, 2**31)
    builder.add(KIND, 0, server=server, count=3, duration_ns=7)
    graph = builder.build()
    assert_same(plain.run(graph), compiled.run(graph))


@given(graph=graphs())
def test_the_engines_agree(graph):
    assert_same(plain.run(graph), compiled.run(graph))


@given(graph=graphs(), seed=st.integers(0, 2**63 - 1))
def test_the_engines_agree_with_ties_shuffled(graph, seed):
    assert_same(plain.run(graph, tie_seed=seed), compiled.run(graph, tie_seed=seed))


@given(graph=graphs(), seed=st.one_of(st.none(), st.integers(0, 2**63 - 1)))
def test_forgetting_runs_changes_nothing_else(graph, seed):
    kept, forgotten = compiled.run(graph, tie_seed=seed), compiled.run(graph, tie_seed=seed, keep_runs=False)
    assert not forgotten.run_node.size
    for field in fields(kept):
        if not field.name.startswith("run_"):
            np.testing.assert_array_equal(getattr(kept, field.name), getattr(forgotten, field.name), field.name)


def critical_path_ns(graph):
    """The time that remains with no server and no link ever shared."""
    nodes = graph.nodes
    rate = np.array([min(link.gbps, link.flow_gbps) for link in graph.links] + [np.inf])
    alone = nodes["nbytes"] / np.minimum(rate[nodes["egress"]], rate[nodes["ingress"]])
    own = held_ns(graph) + np.floor(alone).astype(np.int64) + nodes["latency_ns"]
    begin = np.zeros(graph.num_nodes, np.int64)
    preds = graph.num_preds.copy()
    ready = list(np.flatnonzero(preds == 0))
    while ready:
        node = ready.pop()
        for after in graph.successors(node):
            begin[after] = max(begin[after], begin[node] + own[node])
            preds[after] -= 1
            if preds[after] == 0:
                ready.append(after)
    return int((begin + own).max())


def held_ns(graph):
    """How long each node's tasks hold their slots at least."""
    pace = 1 / graph.memory.task_gbps if graph.memory else 0
    return np.maximum(graph.nodes["duration_ns"], np.floor(graph.nodes["streamed"] * pace).astype(np.int64))


def work_ns(graph):
    """The most that one server, one link or one memory has to do."""
    nodes = graph.nodes
    work = [0.0]
    for index, server in enumerate(graph.servers):
        mine = nodes["server"] == index
        work.append((nodes["count"] * held_ns(graph))[mine].sum() / server.slots)
    if graph.memory:
        work.append(np.bincount(nodes["rank"], nodes["count"] * nodes["streamed"]).max() / graph.memory.gbps)
    for index, link in enumerate(graph.links):
        mine = (nodes["egress"] == index) | (nodes["ingress"] == index)
        work.append((nodes["count"] * nodes["nbytes"])[mine].sum() / link.gbps)
    return max(work)


def sent_by_run(time, nodes, mine):
    """Bytes by (node, time) that the runs of these nodes put on their way, each when it ended."""
    sent = Counter()
    for node, count, end_ns in zip(time.run_node, time.run_count, time.run_end_ns, strict=True):
        if mine[node] and nodes["nbytes"][node]:
            sent[int(node), int(end_ns)] += int(count) * int(nodes["nbytes"][node])
    return sent


@given(graph=graphs(), seed=st.one_of(st.none(), st.integers(0, 2**63 - 1)))
def test_laws_of_a_schedule(graph, seed):
    ledger = Ledger(graph)
    time = plain.run(graph, tie_seed=seed, instruments=[ledger])
    nodes = graph.nodes
    # Every task once, no slot too many, none kept.
    np.testing.assert_array_equal(np.bincount(time.run_node, time.run_count, graph.num_nodes), nodes["count"])
    assert sorted(ledger.done) == list(range(graph.num_nodes))
    assert all(peak <= server.slots for peak, server in zip(ledger.peak, graph.servers, strict=True))
    assert ledger.running == [0] * len(graph.servers)
    # Bytes of links are those of the nodes.
    sent = nodes["count"].astype(np.int64) * nodes["nbytes"]
    for index in range(len(graph.links)):
        mine = (nodes["egress"] == index) | (nodes["ingress"] == index)
        assert time.link_bytes[index] == sent[mine].sum()
        assert ledger.sent[index] == sent_by_run(time, nodes, mine)
        assert time.link_bytes[index] <= time.link_busy_ns[index] * graph.links[index].gbps * (1 + 1e-9)
    # Nobody starts before what it waits for, and bounds from below hold.
    for node in range(graph.num_nodes):
        for after in graph.successors(node):
            assert time.done_ns[node] <= time.ready_ns[after]
    assert (time.ready_ns <= time.start_ns).all()
    assert (time.start_ns + held_ns(graph) + nodes["latency_ns"] <= time.done_ns).all()
    assert time.makespan_ns >= critical_path_ns(graph)
    assert time.makespan_ns >= work_ns(graph) * (1 - 1e-9)


@given(graph=graphs(links=False, max_nodes=15), seed=st.integers(0, 2**32 - 1))
def test_work_conserving_is_within_twice_the_bound(graph, seed):
    """Graham: no slot idles while a task waits, so a makespan is at most work + critical path, per server."""
    time = plain.run(graph, tie_seed=seed)
    nodes = graph.nodes
    work = sum(
        (nodes["count"] * nodes["duration_ns"])[nodes["server"] == index].sum() / server.slots
        for index, server in enumerate(graph.servers)
    )
    assert time.makespan_ns <= work + critical_path_ns(graph)


def anomaly(slots):
    """R. L. Graham's example (1969): nine tasks of which one frees four, and the last is long."""
    builder = GraphBuilder()
    server = builder.add_server("desk", 0, slots)
    nodes = builder.add(KIND, 0, server=server, duration_ns=[3, 2, 2, 2, 4, 4, 4, 4, 9], expert=np.arange(9))
    builder.edge(nodes[0], nodes[8])
    builder.edge(nodes[3], nodes[4:8])
    return compiled.run(builder.build()).makespan_ns


def test_a_slot_more_can_take_longer_within_grahams_bound():
    assert (anomaly(3), anomaly(4)) == (12, 15)


@given(graph=graphs(links=False, max_nodes=15), factor=st.integers(2, 3))
def test_more_slots_never_take_longer_than_the_bound_of_anomalies(graph, factor):
    """Graham: with at least as many slots everywhere no more than twice the time, for one kind of server."""
    servers = tuple(server._replace(slots=server.slots * factor) for server in graph.servers)
    one_kind = replace(graph, nodes=graph.nodes | {"server": np.zeros_like(graph.nodes["server"])})
    usual = compiled.run(one_kind).makespan_ns
    assert compiled.run(replace(one_kind, servers=servers)).makespan_ns <= (1 + 1 - 1 / servers[0].slots) * usual


@given(graph=graphs(max_nodes=15), factor=st.integers(2, 3))
def test_without_queues_faster_links_never_hurt(graph, factor):
    """Nothing waits for a slot, so no order changes: every node is done no later."""
    free = replace(graph, nodes=graph.nodes | {"server": np.full_like(graph.nodes["server"], NONE)})
    links = tuple(link._replace(gbps=link.gbps * factor, flow_gbps=link.flow_gbps * factor) for link in graph.links)
    assert compiled.run(replace(free, links=links)).makespan_ns <= compiled.run(free).makespan_ns


def queue_graph(arrivals, services, sizes, slots):
    """Parties of a queue: each arrives by a delay, and then each of its members is served."""
    builder = GraphBuilder()
    server = builder.add_server("desk", 0, slots)
    come = builder.add(KIND, 0, duration_ns=arrivals)
    builder.edge(come, builder.add(KIND, 0, duration_ns=services, count=sizes, server=server))
    return builder.build()


def ends_in_simpy(arrivals, services, sizes, slots):
    """When each of the queue's customers has been served, in no order."""
    ends = []
    world = simpy.Environment()
    desk = simpy.Resource(world, slots)

    def customer(arrival, service):
        yield world.timeout(arrival)
        with desk.request() as turn:
            yield turn
            yield world.timeout(service)
        ends.append(world.now)

    for arrival, service, size in zip(arrivals.tolist(), services.tolist(), sizes.tolist(), strict=True):
        for _ in range(size):
            world.process(customer(arrival, service))
    world.run()
    return ends


@pytest.mark.parametrize("run", [plain.run, compiled.run])
@given(
    parties=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=30),
    slots=st.integers(1, 12),
)
def test_a_queue_is_that_of_simpy(run, parties, slots):
    arrivals, services, sizes = np.array(parties).T
    arrivals = np.sort(arrivals)
    time = run(queue_graph(arrivals, services, sizes, slots))
    served = time.run_node >= len(parties)
    ends = np.repeat(time.run_end_ns[served], time.run_count[served])
    # Customers who arrive together and are served for the same time may swap: compare the ends as sets of a moment.
    assert sorted(ends.tolist()) == sorted(ends_in_simpy(arrivals, services, sizes, slots))


@pytest.mark.parametrize("run", [plain.run, compiled.run])
@pytest.mark.parametrize("counts", [[1], [2, 3], [4], [7], [1] * 4, [1] * 11, [5, 1, 9]])
def test_slots_whose_tasks_end_together_are_all_free_again(run, counts):
    """Rounds that fill the server to the last slot: each lasts as long as one task."""
    builder = GraphBuilder()
    server = builder.add_server("desk", 0, sum(counts))
    builder.add(KIND, 0, server=server, duration_ns=10, count=counts * 3)
    assert run(builder.build()).done_ns.tolist() == np.repeat([10, 20, 30], len(counts)).tolist()


def test_priorities_come_first_and_equal_ones_in_turn():
    builder = GraphBuilder()
    server = builder.add_server("desk", 0, 1)
    builder.add(KIND, 0, server=server, duration_ns=10, priority=[5, 5, 1, 5, 1])
    assert compiled.run(builder.build()).start_ns.tolist() == [0, 30, 10, 40, 20]


def test_a_link_is_shared_evenly_and_capped():
    """Two transfers of 100 and 300 bytes at 2 bytes per ns: 1 each until 100, then the cap of 1.5 for the rest."""
    builder = GraphBuilder()
    link = builder.add_link("wire", 0, 2.0, 1.5)
    builder.add(KIND, 0, nbytes=[100, 300], egress=link, latency_ns=[0, 7])
    time = plain.run(builder.build())
    assert time.done_ns.tolist() == [100, 100 + 134 + 7]  # ceil(200 / 1.5)
    assert (time.link_bytes[0], time.link_busy_ns[0], time.link_peak[0]) == (400, 234, 2)


@pytest.mark.parametrize("run", [plain.run, compiled.run])
def test_a_memory_is_shared_by_tasks_that_hold_their_slots(run):
    """Three tasks stream at 2 bytes per ns, two of them of one node: 2 / 3 each, and then the last one its cap of 1.5.

    A task that computes for longer than it streams leaves the memory to others before it ends; other ranks have theirs.
    """
    builder = GraphBuilder()
    builder.set_memory(2.0, 1.5)
    server = builder.add_server("desk", 0, 3)
    builder.add(KIND, 0, server=server, count=[2, 1], streamed=[100, 300], duration_ns=[170, 10])
    builder.add(KIND, 0, server=server, duration_ns=1)
    builder.add(KIND, 1, streamed=150)
    time = run(builder.build())
    assert time.run_end_ns.tolist() == [170, 150 + 134, 100, 171]  # ceil(200 / 1.5)
    assert time.done_ns.tolist() == [170, 284, 171, 100]


def test_nothing_is_streamed_without_a_memory():
    builder = GraphBuilder()
    builder.add(KIND, 0, streamed=7)
    with pytest.raises(ValueError, match="streamed must be 0 without a memory, got 7"):
        builder.build()
    with pytest.raises(ValueError, match="gbps and task_gbps of the memory must be positive, got 0 and 1"):
        builder.set_memory(0, 1)


def test_the_slower_of_two_links_decides():
    builder = GraphBuilder()
    ways = [builder.add_link(f"wire {number}", 0, gbps) for number, gbps in enumerate([4.0, 1.0])]
    builder.add(KIND, 0, nbytes=100, egress=ways[0], ingress=ways[1])
    assert compiled.run(builder.build()).done_ns.tolist() == [100]


def test_tasks_of_a_node_start_as_slots_come_free():
    builder = GraphBuilder()
    server = builder.add_server("desk", 0, 3)
    builder.add(KIND, 0, server=server, duration_ns=10, count=8)
    time = compiled.run(builder.build())
    assert time.run_count.tolist() == [3, 3, 2]
    assert time.run_start_ns.tolist() == [0, 10, 20]


def test_events_of_a_moment_go_by_rank_and_then_by_sequence():
    builder = GraphBuilder()
    nodes = builder.add(KIND, [2, 0, 1, 0], duration_ns=5)
    after = builder.add(KIND, 0)
    builder.edge(nodes, after)

    class Order(plain.Instrument):
        def __init__(self):
            self.done = []

        def on_done(self, time, node):
            self.done.append(node)

    order = Order()
    time = plain.run(builder.build(), instruments=[order])
    assert order.done == [1, 3, 2, 0, 4]
    assert time.cause[4] == 0


def test_a_cycle_is_a_deadlock_that_says_who_waits():
    builder = GraphBuilder()
    nodes = builder.add(KIND, 0, expert=[0, 1, 2])
    for before, after in pairwise([*nodes, nodes[0]]):
        builder.edge(before, after)
    for run in (plain.run, compiled.run):
        with pytest.raises(DeadlockError, match=r"3 of 3 nodes can never run\n.*expert 0.* waits for .*expert 2"):
            run(builder.build())


def test_growing_arrays_change_nothing(monkeypatch):
    """With room for hardly any run at first, the loop stops and goes on many times."""
    builder = GraphBuilder()
    server = builder.add_server("desk", 0, 1)
    link = builder.add_link("wire", 0, 1.0)
    builder.add(KIND, 0, server=server, duration_ns=3, count=[500] * 3, nbytes=2, egress=link)
    graph = builder.build()
    whole, longer = compiled._state, compiled.State.longer
    grown = []
    monkeypatch.setattr(compiled, "_state", lambda graph, room: whole(graph, 8))
    monkeypatch.setattr(compiled.State, "longer", lambda state: grown.append(state) or longer(state))
    assert_same(compiled.run(graph), plain.run(graph))
    assert len(grown) > 5


@pytest.mark.parametrize("run", [plain.run, compiled.run])
@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(run, seed):
    """-1 is how the compiled engine says "none"."""
    with pytest.raises(ValueError, match=rf"tie_seed must be in \[0, 2\*\*63\), got {seed}"):
        run(GraphBuilder().build(), tie_seed=seed)


def test_the_cache_of_the_compiled_loop_knows_all_its_sources():
    """Numba inlines functions and constants of other modules and does not notice when these change."""
    sources = {"loop.py", "heaps.py"}
    for module in (loop, heaps):
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                sources.add(f"{node.module}.py")
    assert sources == set(heaps.SOURCES)
    assert loop.loop._cache.sources == heaps._source_hash()


def test_an_empty_graph_takes_no_time():
    graph = GraphBuilder().build()
    assert plain.run(graph).makespan_ns == compiled.run(graph).makespan_ns == 0
