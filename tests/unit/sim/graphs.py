"""Random task graphs and what they become in time, as Hypothesis strategies."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from sim.engine import plain
from sim.engine.graph import NONE, GraphBuilder
from sim.engine.kinds import GEMM0, KIND_NAMES
from sim.simulation import Simulation

KIND = GEMM0


@st.composite
def graphs(draw, max_nodes=30, links=True):
    """A graph of up to `max_nodes` nodes; times and sizes are small, so that many events coincide."""
    builder = GraphBuilder()
    num_ranks = draw(st.integers(1, 3))
    for rank in range(num_ranks):
        builder.add_server(f"server {rank}", rank, draw(st.integers(1, 4)))
    for rank in range(2 * num_ranks if links else 0):
        gbps = draw(st.sampled_from([0.5, 1.0, 3.0, 7.3]))
        builder.add_link(f"link {rank}", rank % num_ranks, gbps, draw(st.sampled_from([0.4, 1.0, 10.0])))
    num_nodes = draw(st.integers(1, max_nodes))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    size = (num_nodes,)
    path = random.permuted(np.tile(np.arange(len(builder.links)), (num_nodes, 1)), axis=1)[:, :2] if links else None
    if links and draw(st.booleans()):
        builder.set_memory(draw(st.sampled_from([0.7, 2.0, 9.1])), draw(st.sampled_from([0.3, 1.0, 20.0])))
    streams = random.random(num_nodes) < (0.5 if builder.memory else 0)
    sends = random.random(num_nodes) < 0.5 if links else np.zeros(size, bool)
    two = random.random(num_nodes) < 0.7
    builder.add(
        KIND,
        random.integers(0, num_ranks, size),
        count=random.integers(1, 7, size),
        server=random.integers(NONE, num_ranks, size),
        priority=random.integers(-2, 3, size),
        duration_ns=random.integers(0, 6, size),
        streamed=np.where(streams, random.integers(0, 20, size), 0),
        nbytes=np.where(sends, random.integers(0, 20, size), 0),
        egress=path[:, 0] if links else NONE,
        ingress=np.where(two, path[:, 1], NONE) if links else NONE,
        latency_ns=random.integers(0, 3, size),
        flops=1.0,
    )
    before, after = random.integers(0, num_nodes, (2, draw(st.integers(0, 2 * num_nodes))))
    order = random.permutation(num_nodes)  # an order of which every edge is part: no cycles
    low, high = np.minimum(before, after), np.maximum(before, after)
    builder.edge(order[low[low < high]], order[high[low < high]])
    return builder.build()


def simulation_of(graph, num_ranks, sms=1):
    """A simulation of any graph; the world has no more than what reports of times need."""
    world = SimpleNamespace(num_ranks=num_ranks, hardware=SimpleNamespace(sms=sms, name="none"))
    return Simulation(policy="none", knobs=None, world=world, graph=graph, timeline=plain.run(graph))


@st.composite
def simulations(draw):
    """Random graphs with tasks of all kinds, on servers of which some are no multiprocessors."""
    graph = draw(graphs())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    graph.nodes["kind"][:] = random.integers(0, len(KIND_NAMES), graph.num_nodes)
    num_ranks = len(graph.servers)
    graph.nodes["peer"][:] = random.integers(0, num_ranks, graph.num_nodes)
    names = random.choice(["SM slots", "SM slots", "pull engines", "OS block", "host"], num_ranks)
    servers = [server._replace(name=name) for server, name in zip(graph.servers, names, strict=True)]
    return simulation_of(replace(graph, servers=tuple(servers)), num_ranks, sms=draw(st.integers(1, 3)))
