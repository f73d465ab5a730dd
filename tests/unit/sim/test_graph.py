"""Graphs are checked when they are built, and say who is who."""

import numpy as np
import pytest

from sim.engine.graph import NONE, GraphBuilder
from sim.engine.kinds import DISPATCH, GEMM0


def test_arguments_are_broadcast_and_indices_have_their_shape():
    builder = GraphBuilder()
    first = builder.add(DISPATCH, np.arange(2)[:, None], peer=np.arange(3), nbytes=0)
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    second = builder.add(GEMM0, 7, count=4)
    assert second.shape == () and second == 6
    graph = builder.build()
    assert graph.nodes["rank"].tolist() == [0, 0, 0, 1, 1, 1, 7]
    assert graph.nodes["peer"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (graph.num_nodes, graph.num_tasks) == (7, 10)


def test_edges_are_broadcast_and_both_ways_round():
    builder = GraphBuilder()
    nodes = builder.add(GEMM0, 0, expert=np.arange(4))
    builder.edge(nodes[:2][:, None], nodes[2:])
    graph = builder.build()
    assert [graph.successors(node).tolist() for node in range(4)] == [[2, 3], [2, 3], [], []]
    assert graph.predecessors(3).tolist() == [0, 1]
    assert graph.num_preds.tolist() == [0, 0, 2, 2]


def test_a_node_is_described_in_the_words_of_a_task():
    builder = GraphBuilder()
    builder.add(GEMM0, 3, peer=1, expert=2, m=5)
    assert builder.build().describe(0) == "GEMM0 on rank 3, peer 1, expert 2, m 5"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(count=0), r"count must be in \[1, .*\), got 0 at 0"),
        (dict(server=1), r"server must be in \[-1, 1\), got 1 at 0"),
        (dict(duration_ns=-1), "duration_ns must be in .* got -1"),
        (dict(egress=2), r"egress must be in \[-1, 2\), got 2"),
        (dict(nbytes=5), "nbytes=5 but neither egress nor ingress"),
        (dict(nbytes=5, egress=1, ingress=1), "must be two links, got 1 twice"),
        (dict(nbytes=2**33, egress=0, count=2**20), "nbytes of all tasks of a node must be in"),
        (dict(priority=2**20), "priority must be in"),
        (dict(duration_ns=2**61, count=2), "all tasks one after the other must take less than .* ns, got 4.61e"),
        (dict(rank=-1), "rank must be in"),
    ],
)
def test_nodes_out_of_range_are_refused(values, message):
    builder = GraphBuilder()
    builder.add_server("desk", 0, 1)
    builder.add_link("wire", 0, 1.0)
    builder.add_link("wire", 0, 1.0)
    builder.add(GEMM0, **(dict(rank=0) | values))
    with pytest.raises(ValueError, match=message):
        builder.build()


def test_times_that_the_clock_cannot_hold_are_refused():
    """The compiled engine's integers would wrap: a link this slow carried its bytes at once."""
    builder = GraphBuilder()
    builder.add(GEMM0, 0, nbytes=2**52, egress=builder.add_link("wire", 0, 1e-4))
    with pytest.raises(ValueError, match=r"all tasks one after the other must take less than \d+ ns, got 4.5e\+19"):
        builder.build()


@pytest.mark.parametrize("values", [dict(count=np.array([2**32 + 1])), dict(server=np.array(2**33))])
def test_numbers_are_not_wrapped(values):
    """As 32 bits these would be 1 task, and server 0."""
    builder = GraphBuilder()
    builder.add_server("desk", 0, 1)
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name} must fit into int32, got {value.max()}"):
        builder.add(GEMM0, 0, **values)


def test_edges_to_nowhere_are_refused():
    builder = GraphBuilder()
    builder.edge(builder.add(GEMM0, 0), 5)
    with pytest.raises(ValueError, match=r"edge after must be in \[0, 1\), got 5"):
        builder.build()


def test_resources_out_of_range_are_refused():
    builder = GraphBuilder()
    with pytest.raises(ValueError, match="slots of server desk of rank 0 must be at least 1, got 0"):
        builder.add_server("desk", 0, 0)
    for gbps, flow in ((0.0, None), (1.0, 0.0), (float("inf"), None), (float("nan"), None)):
        with pytest.raises(ValueError, match="gbps and flow_gbps of link wire of rank 0 must be positive"):
            builder.add_link("wire", 0, gbps, flow)
    with pytest.raises(TypeError, match=r"a node has the fields kind, .*; got colour"):
        builder.add(GEMM0, 0, colour=1)


def test_no_link_is_the_default():
    builder = GraphBuilder()
    builder.add(GEMM0, 0)
    assert builder.build().nodes["egress"][0] == NONE
