"""Puts: how many there are, which bytes they move, and that ranks of other hosts hear when one leaves."""

import numpy as np
import pytest
from backward_cases import gradients_of
from cases import random_routing, random_tokens, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended import apart, hosts_of
from worlds import worlds

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.heap.threads import ThreadHeap
from flashmoe_numba.kernel import wire
from flashmoe_numba.kernel.control import ABORT, CLOSED_FLAG, FAILED, RECORD, record_in
from flashmoe_numba.kernel.network import Channel
from reference import Hosts, Layout, Weights, make_packets, make_plan
from reference.layout import SAVES
from reference.runs import result_chunks
from reference.sizes import PUT_BYTES, RING_HEAD_BYTES, max_put_bytes, max_puts

TWO = Hosts.even(4, 2)
FOUR_RANKS = dict(num_ranks=4, num_experts=8)


def puts_of(config, hosts, routings, of_packet, of_chunk):
    """Of each rank: what the packets of a routing need, counted one by one."""
    packets = [make_packets(idx, config) for idx in routings]
    puts = [0] * config.num_ranks
    for source, packet in enumerate(packets):
        for expert, rows in enumerate(packet.sent.tolist()):
            owner = expert // config.num_experts_per_rank
            if hosts.are_apart(source, owner):
                puts[source] += of_packet if rows else 1  # an empty packet is a signal alone
                puts[owner] += len(result_chunks(rows, config)) * of_chunk
    return puts


def posted(layer):
    return [int(rank.segments.wire[0]) for rank in layer._ranks]


@settings(max_examples=max(4, settings().max_examples // 4))
@given(
    worlds(max_ranks=6, max_calls=1).filter(lambda world: world.config.num_ranks > 1),
    st.data(),
    st.sampled_from([None, *SAVES]),
)
def test_a_call_has_as_many_puts_as_packets_and_chunks_need(world, data, save):
    config, hosts = world.config, data.draw(hosts_of(world.config.num_ranks))
    make = apart(hosts)
    (x, routing) = next(world.calls())
    with make(config, world.weights, num_processors=1, save=save) as layer:
        layer(x, **routing)
        chosen = [r.topk_idx for r in layer.routing]
        assert posted(layer) == puts_of(config, hosts, chosen, 1, 1)
        ring = layer._ranks[0].segments.wire
        assert (ring.size - wire.FIRST) // wire.PUT_WORDS == max_puts(config, hosts, save)
        most = max(posted(layer))
    if save is not None:
        for call, _ in gradients_of(world, save, 0, make=counting(make, before := [])):
            chosen = [r.topk_idx for r in call.routings]
            forward = puts_of(config, hosts, chosen, 1, 1)
            backward = puts_of(config, hosts, chosen, 3 if save == "nothing" else 2, 2)
            assert posted(before[0]) == [a + b for a, b in zip(forward, backward, strict=True)]
            most = max(most, *backward)
    assert most <= max_puts(config, hosts, save)


def counting(make, made):
    """The same, noting the layer."""

    def making(*arguments, **settings):
        made.append(make(*arguments, **settings))
        return made[0]

    return making


@pytest.mark.parametrize("save", [None, *SAVES])
def test_the_bound_of_puts_is_reached(save):
    """All tokens to one rank's experts, each packet in as many chunks as tokens allow, and the rank gives up."""
    config = tiny_config(num_ranks=3, num_experts=3, num_topk=1, tile_m=2, tile_m_min=1, num_tokens=7)
    hosts = Hosts((0, 1, 2))
    of_packet = {None: 1, "rows+up": 2, "rows": 2, "nothing": 3}[save]
    routings = [np.zeros((7, 1), np.int32)] * 3
    puts = puts_of(config, hosts, routings, of_packet, 1 if save is None else 2)
    packets_to_others = 2 - 1  # rank 0's own packets to others are empty here, and could have rows
    assert puts[0] == max_puts(config, hosts, save) - 2 - 2 * (of_packet - 1) * packets_to_others


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("save", [None, *SAVES])
def test_the_bound_of_bytes_to_a_rank_is_reached(save, dtype):
    """Every token goes to all experts, in the last call, which is a backward if there is one."""
    config = tiny_config(num_ranks=2, num_experts=4, num_topk=4, num_tokens=7, capacity=None, dtype=dtype)
    x, weights = random_tokens(config), Weights.random(config)
    with apart(Hosts((0, 1)))(config, weights, num_processors=1, save=save) as layer:
        _, saved = (layer(x), None) if save is None else layer.forward(x)
        first = [0, 0] if save is None else posted(layer)
        if save is not None:
            layer.backward(saved, x)
        for rank, begin, end in zip(layer._ranks, first, posted(layer), strict=True):
            places = rank.segments.wire[wire.FIRST :].reshape(-1, wire.PUT_WORDS)
            put_bytes = [int(places[number % len(places), wire.NUM_BYTES]) for number in range(begin, end)]
            assert sum(put_bytes) == max_put_bytes(config, save)


def test_a_plan_has_the_bytes_of_stage_and_ring():
    config = tiny_config(**FOUR_RANKS)
    for save in (None, *SAVES):
        plan, one = make_plan(config, save=save, hosts=TWO), make_plan(config, save=save)
        assert (one.max_puts, one.ring_bytes) == (0, 0) and "stage" not in one.segment_bytes
        with apart(TWO)(config, Weights.random(config), save=save) as layer:
            layout, segments = layer._parts.layout, layer._ranks[1].segments
            assert segments.wire.nbytes == plan.ring_bytes == RING_HEAD_BYTES + plan.max_puts * PUT_BYTES
            assert layer._parts.heap.segments[1].nbytes == plan.segment_total_bytes
            assert layout.stage + layout.stage_bytes == layout.dispatch_flag
            assert layout.stage_bytes == plan.segment_total_bytes - one.segment_total_bytes
            regions = ("dispatch", "result", "again", "factors", "dots")
            assert plan.segment_bytes["stage"] == sum(getattr(segments, name).nbytes for name in regions)
        assert plan.total_bytes - one.total_bytes == 4 * (layout.stage_bytes + plan.ring_bytes)
    assert (PUT_BYTES, RING_HEAD_BYTES) == (8 * wire.PUT_WORDS, 8 * wire.FIRST)


def test_every_rank_hears_of_one_that_leaves_and_finds_its_record():
    config = tiny_config(**FOUR_RANKS)
    with apart(TWO)(config, Weights.random(config)) as layer:
        layer(random_tokens(config))
        heap, (leaver, *_) = layer._parts.heap, layer._ranks
        layer._backend.leave(*leaver.leaving(1), FAILED)
        assert [int(rank.control[ABORT]) for rank in layer._ranks] == [1, 1, 1, 1]
        for reader in range(4):
            words = heap.segments_of(reader)[0][layer._parts.layout.control :].view(np.int64)
            record = record_in(words)
            assert (record.flag, record.peer, record.epoch) == (CLOSED_FLAG, 0, 1)
        assert posted(layer)[0] - 2 * 2 - 2 * 2 <= 2 * 7  # packets to two ranks and chunks for them, and two that tell
        layer._life.closed = "given up"


def test_a_rank_of_another_host_does_not_decide_for_this_one():
    """Ranks 2 and 0 leave one after the other: each host names its own, where it had not heard of the other before."""
    config = tiny_config(**FOUR_RANKS)
    with apart(TWO)(config, Weights.random(config)) as layer:
        ranks = layer._ranks
        ranks[2].control[ABORT] = 4  # of rank 3, which is on its host
        ranks[0].control[ABORT] = 3  # of rank 2, which is not
        layer._backend.leave(*ranks[2].leaving(0), FAILED)
        assert [int(rank.control[ABORT]) for rank in ranks] == [3, 3, 4, 4]
        layer._backend.leave(*ranks[1].leaving(0), FAILED)
        assert [int(rank.control[ABORT]) for rank in ranks] == [3, 3, 4, 4]
        assert [int(rank.control[RECORD]) for rank in ranks] == [0, 2, 2, 0]
        layer._life.closed = "given up"


def test_only_the_first_to_give_up_tells_other_hosts():
    config = tiny_config(**FOUR_RANKS)
    with apart(TWO)(config, Weights.random(config)) as layer:
        for expected in (2, 2):
            layer._backend.leave(*layer._ranks[3].leaving(0), FAILED)
            assert posted(layer) == [0, 0, 0, expected]
        layer._life.closed = "given up"


def test_a_ring_is_gone_round_and_round():
    """More puts than it has places, in calls of one layer."""
    config = tiny_config(num_ranks=2, num_experts=2, num_topk=1)
    with apart(Hosts((0, 1)))(config, Weights.random(config), num_processors=1) as layer:
        places = max_puts(config, Hosts((0, 1)))
        x, wanted = random_tokens(config), None
        while min(posted(layer)) < 5 * places:
            y = [part.tobytes() for part in layer(x)]
            wanted = wanted or y
            assert y == wanted


def test_a_byte_of_no_array_is_refused():
    config = tiny_config(**FOUR_RANKS)
    with apart(TWO)(config, Weights.random(config)) as layer:
        arguments = [rank.first_arguments() for rank in layer._ranks]
        channel = Channel(arguments[0], arguments[2], 0, None)
        end = Layout(config, None, True).num_bytes
        with pytest.raises(IndexError, match=f"byte {end} of a segment is in no array"):
            channel._locate(arguments[2].segments, end)


def test_compiled_blocks_of_several_hosts_in_one_process_are_refused():
    config = tiny_config(**FOUR_RANKS)
    with pytest.raises(ValueError, match="heap must have all ranks of this process on one host"):
        FlashMoE.from_parts(config, Weights.random(config), ThreadHeap(4, TWO), CpuBackend())


def test_hosts_of_other_ranks_are_refused():
    with pytest.raises(ValueError, match="hosts must be of num_ranks=3 ranks, got 4"):
        ThreadHeap(3, TWO)


def test_a_given_routing_crosses_hosts():
    config = tiny_config(**FOUR_RANKS)
    idx, factors = random_routing(config, [7, 0, 3, 7], bias=2.0)
    x, weights = random_tokens(config, [7, 0, 3, 7]), Weights.random(config)
    found = []
    for hosts in (Hosts.one(4), TWO):
        with apart(hosts)(config, weights) as layer:
            found.append([y.tobytes() for y in layer(x, topk_idx=idx, topk_weights=factors)])
    assert found[0] == found[1]
