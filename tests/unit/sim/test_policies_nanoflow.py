"""NanoFlow: chains of nano-batches, beside each other or not, and the weights that each of them reads."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from policy_worlds import kind_nodes, odd_worlds, run_policy, small_world

from sim.engine.kinds import BARRIER, COMBINE, GATE, GEMM0, GEMM1, LAUNCH, SEND
from sim.policies import make_knobs

nanoflow = partial(run_policy, "nanoflow")


def of_batch(graph, kind, batch):
    """Nodes of a batch's products or transfers, which its number is the priority of."""
    nodes = kind_nodes(graph, kind)
    return nodes[graph.nodes["priority"][nodes] == batch]


@pytest.mark.parametrize("name", odd_worlds())
@pytest.mark.parametrize("overlap", [True, False])
def test_a_chain_is_in_order(name, overlap):
    graph, timeline = nanoflow(odd_worlds()[name], nano_batches=2, overlap=overlap)
    begin, end = timeline.start_ns, timeline.done_ns
    for batch in range(2):
        for rank in np.unique(graph.nodes["rank"]):
            up, down = (of_batch(graph, kind, batch) for kind in (GEMM0, GEMM1))
            up, down = (nodes[graph.nodes["rank"][nodes] == rank] for nodes in (up, down))
            sends = of_batch(graph, SEND, batch)
            into = sends[graph.nodes["peer"][sends] == rank]
            out = sends[graph.nodes["rank"][sends] == rank]
            if len(up):
                assert end[up].max() <= begin[down].min()
                came = into[begin[into] < begin[up].min()]
                assert end[came].max() <= begin[up].min()
                assert (begin[out[begin[out] > begin[down].min()]] >= end[down].max()).all()


def test_batches_run_beside_each_other_or_one_after_the_other():
    world = small_world(num_tokens=3000, hidden=1024, ffn=512)
    graph, timeline = nanoflow(world, overlap=True)
    products, sends = (of_batch(graph, GEMM0, 1), of_batch(graph, GEMM1, 1)), of_batch(graph, SEND, 0)
    begin, end = timeline.start_ns[products[0]].min(), timeline.done_ns[products[1]].max()
    back = sends[timeline.start_ns[sends] >= timeline.done_ns[of_batch(graph, GEMM1, 0)].min()]
    assert ((timeline.start_ns[back] < end) & (timeline.done_ns[back] > begin)).any()
    graph, timeline = nanoflow(world, overlap=False, nano_batches=3)
    combines, gates = kind_nodes(graph, COMBINE), kind_nodes(graph, GATE)
    for rank in range(world.num_ranks):
        done = np.sort(timeline.done_ns[combines[graph.nodes["rank"][combines] == rank]])
        next_begins = np.sort(timeline.start_ns[gates[graph.nodes["rank"][gates] == rank]])[1:]
        assert (done[:-1] <= next_begins).all()


def test_each_batch_has_its_kernels_and_all_tokens_are_in_one():
    world = small_world(num_tokens=67)
    for number in (1, 2, 3, 4):
        graph, _ = nanoflow(world, nano_batches=number)
        assert len(kind_nodes(graph, LAUNCH)) == 6 * number * world.num_ranks
        assert len(kind_nodes(graph, BARRIER)) == 2 * number
        gates = kind_nodes(graph, GATE)
        assert graph.nodes["count"][gates].sum() >= world.num_ranks * 67 / 32
    assert len(kind_nodes(nanoflow(small_world(num_tokens=2), nano_batches=4)[0], GATE)) == 2 * world.num_ranks


def test_every_batch_reads_the_weights_again():
    world = small_world("even", num_ranks=1, num_tokens=64, hidden=4096, ffn=4096)
    work = []
    for number in (1, 2, 4):
        graph, _ = nanoflow(world, nano_batches=number, overlap=False)
        time = graph.nodes["duration_ns"] * graph.nodes["count"]
        work.append(sum(time[kind_nodes(graph, kind)].sum() for kind in (GEMM0, GEMM1)))
    assert all(later > 1.8 * earlier for earlier, later in pairwise(work))


def test_shares_are_slots():
    graph, _ = nanoflow(small_world(), compute_share=0.5, transfer_share=0.25)
    slots = {server.name: server.slots for server in graph.servers}
    assert slots["SM slots"] == 66 and slots["transfer SMs"] == 33
    sends, products = kind_nodes(graph, SEND), kind_nodes(graph, GEMM0)
    names = [{graph.servers[server].name for server in graph.nodes["server"][nodes]} for nodes in (sends, products)]
    assert names == [{"transfer SMs"}, {"SM slots"}]


def test_products_slow_down_with_their_share_and_links_do_not():
    world = small_world("even", num_tokens=4096, hidden=1024, ffn=1024)
    spans = {}
    for compute in (0.8, 0.4):
        graph, timeline = nanoflow(world, nano_batches=1, compute_share=compute, transfer_share=0.2, rate=0.3)
        spans[compute] = [
            timeline.done_ns[nodes].max() - timeline.start_ns[nodes].min()
            for nodes in (kind_nodes(graph, GEMM0), kind_nodes(graph, SEND))
        ]
    assert spans[0.4][0] > 1.8 * spans[0.8][0]
    dispatch = []
    for transfer in (0.2, 0.1):
        graph, timeline = nanoflow(world, nano_batches=1, transfer_share=transfer, compute_share=0.8)
        sends = kind_nodes(graph, SEND)
        first = sends[timeline.done_ns[sends] <= timeline.start_ns[kind_nodes(graph, GEMM0)].min()]
        dispatch.append(timeline.done_ns[first].max() - timeline.start_ns[first].min())
    assert dispatch[1] < 1.1 * dispatch[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nano_batches": 5}, r"nano_batches must be in \[1, 4\], got 5"),
        ({"nano_batches": 0}, r"nano_batches must be at least 1, got 0"),
        ({"compute_share": 0.0}, r"compute_share must be in \(0, 1\], got 0.0"),
        ({"transfer_share": 1.5}, r"transfer_share must be in \(0, 1\], got 1.5"),
        ({"compute_share": 0.7, "transfer_share": 0.4}, r"must be at most 1 together, got 0.7 and 0.4"),
    ],
)
def test_wrong_values_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        make_knobs("nanoflow", values)
