"""Small worlds for tests of policies, and what a routing demands of any of them, counted on its own."""

from dataclasses import fields, replace

import numpy as np

from reference import MoEConfig
from sim.engine import compiled, plain
from sim.engine.kinds import GATE, GEMM0, GEMM1
from sim.policies import build, make_knobs
from sim.world.routing import make_routing
from sim.world.scenario import Scenario

COUNT_BYTES = 8
ROUTINGS = ("even", "uniform", "zipf:1.2", "hot")


def small_world(
    routing="uniform",
    num_ranks=4,
    num_tokens=67,
    hidden=192,
    ffn=80,
    num_experts=8,
    num_topk=2,
    gated=True,
    hardware=None,
    precision_name="bfloat16",
    seed=0,
    silent_ranks=(),
):
    """A world of odd sizes on H100s; the tokens of `silent_ranks` choose nothing, and no one sends to their experts
    if the routing is "to-rank-0"."""
    config = MoEConfig(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden=hidden,
        ffn=ffn,
        num_experts=num_experts,
        num_topk=num_topk,
        gated=gated,
    )
    made = make_routing("uniform" if routing == "to-rank-0" else routing, config, seed)
    topk_idx = made.topk_idx.copy()
    if routing == "to-rank-0":
        topk_idx[made.owner[topk_idx] != 0] = -1
    topk_idx[list(silent_ranks)] = -1
    routing = replace(made, topk_idx=topk_idx)
    on = hardware or f"{num_ranks}xH100"
    return Scenario(config=config, hardware=on, precision=precision_name, routing=routing).make()


def odd_worlds():
    """Worlds that policies get wrong: one of each kind, by name."""
    return {
        **{name: small_world(name) for name in ROUTINGS},
        "top-1": small_world(num_topk=1, gated=False),
        "silent rank": small_world(silent_ranks=(1,)),
        "ranks that get nothing": small_world("to-rank-0"),
        "nothing at all": small_world(silent_ranks=(0, 1, 2, 3)),
        "one rank": small_world(num_ranks=1),
        "one token": small_world(num_tokens=1),
        "two nodes": small_world(hardware="2x2xH100"),
        "k = E": small_world(num_topk=8, num_tokens=33),
    }


def on_few_sms(world, sms):
    return replace(world, hardware=replace(world.hardware, sms=sms))


def make_graph(policy, world, **knobs):
    return build(policy, world, make_knobs(policy, knobs))


def run_policy(policy, world, **knobs):
    """(graph, timeline)"""
    graph = make_graph(policy, world, **knobs)
    return graph, run_both(graph)


def run_both(graph):
    """The timeline, which both engines must agree on."""
    one, other = plain.run(graph), compiled.run(graph)
    for field in fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)
    return one


def demanded_rows(world):
    """`[num_ranks, num_ranks]`: rows from each source to each owner, choice by choice."""
    rows = np.zeros((world.num_ranks, world.num_ranks), np.int64)
    for source, choices in enumerate(world.routing.topk_idx):
        for expert in choices[choices >= 0]:
            rows[source, world.routing.owner[expert]] += 1
    return rows


def assert_computed_once(graph, world):
    """GEMM0 and GEMM1 multiply every routed row once, and GATE every token, where it is simulated."""
    config, nodes = world.config, graph.nodes
    rows = demanded_rows(world).sum()
    up = config.ffn * (2 if config.gated else 1)
    tokens = world.num_ranks * world.routing.num_tokens * (nodes["kind"] == GATE).any()
    products = [(GEMM0, rows, 2 * config.hidden * up), (GEMM1, rows, 2 * config.hidden * config.ffn)]
    for kind, number, per_row in [*products, (GATE, tokens, 2 * config.hidden * config.num_experts)]:
        mine = nodes["kind"] == kind
        useful = (nodes["useful_flops"] * nodes["count"])[mine].sum()
        np.testing.assert_allclose(useful, number * per_row, rtol=1e-9)
        assert (nodes["flops"][mine] >= nodes["useful_flops"][mine]).all()


def demanded_link_bytes(world, there, back):
    """Bytes out of and into each rank, `there` per row to its owner and `back` per row to its source."""
    rows = demanded_rows(world)
    np.fill_diagonal(rows, 0)
    moved = rows * there + rows.T * back
    return moved.sum(axis=1), moved.sum(axis=0)


def carried_bytes(graph, timeline, num_ranks):
    """`[2, num_ranks]`: bytes that links carried out of and into each rank."""
    carried = np.zeros((2, num_ranks), np.int64)
    for link, nbytes in zip(graph.links, timeline.link_bytes, strict=True):
        carried[0 if link.name.endswith("out") else 1, link.rank] += nbytes
    return carried


def assert_link_bytes(graph, timeline, world, slack=0, counts=False):
    """Links carry every row there and every result back, once.

    Args:
        slack: bytes that rounding may add per transfer.
        counts: each rank tells every other how many rows it has for each of its experts, in eight bytes.
    """
    size, precision = world.config.hidden, world.precision
    demand = np.array(demanded_link_bytes(world, size * precision.token_bytes, size * precision.result_bytes))
    demand += counts * (world.num_ranks - 1) * world.config.num_experts_per_rank * COUNT_BYTES
    moved, room = carried_bytes(graph, timeline, world.num_ranks), slack * graph.num_tasks
    assert (moved >= demand - 1e-6).all() and (moved <= demand + room + 1e-6).all(), (demand, moved)


def kind_nodes(graph, kind, rank=None):
    """Indices of the nodes of a kind, of one rank or of all."""
    mine = graph.nodes["kind"] == kind
    return np.flatnonzero(mine if rank is None else mine & (graph.nodes["rank"] == rank))
