"""Which ranks share a host, and the theorem where not all do."""

from itertools import pairwise

import numpy as np
import pytest

from reference import Hosts, Layout, MoEConfig, make_packets, write_conflicts
from reference.backward_tiles import backward_writes
from reference.layout import DISPATCH, RESULT, SAVES, Write, staged_writes


def test_ranks_on_hosts_worked_out_by_hand():
    hosts = Hosts.even(5, 2)
    assert hosts.of_rank == (0, 0, 1, 1, 2) and hosts.most_apart == 4 and not hosts.is_one
    assert [hosts.sharing(rank) for rank in range(5)] == [[0, 1], [0, 1], [2, 3], [2, 3], [4]]
    assert hosts.are_apart(1, 2) and not hosts.are_apart(2, 3)
    assert Hosts.one(3).is_one and Hosts.even(3, 4).is_one
    assert Hosts((7, 0, 7)).sharing(2) == [0, 2] and Hosts((7, 0, 7)).are_apart(0, 1)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_number_of_ranks_is_checked(value, error):
    with pytest.raises(error, match="ranks_per_host must be"):
        Hosts.even(4, value)


def packets_of(config, seed):
    rng = np.random.default_rng(seed)
    draws = [rng.random((config.num_tokens, config.num_experts)) for _ in range(config.num_ranks)]
    return [make_packets(np.argsort(draw, axis=1)[:, : config.num_topk].astype(np.int32), config) for draw in draws]


CONFIG = MoEConfig(num_ranks=6, num_tokens=5, hidden=3, ffn=4, num_experts=12, num_topk=3, capacity=4)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("hosts", [Hosts.even(6, 2), Hosts.even(6, 4), Hosts((0, 1, 0, 1, 2, 2))])
def test_staged_writes_are_valid_and_meet_no_others(hosts, save):
    """By their bytes too: a row of a stage lies in no other row, and none in the flags."""
    layout, packets = Layout(CONFIG, save, staged=True), packets_of(CONFIG, 1)
    plain = list(backward_writes(packets, CONFIG, save=save))
    writes = list(staged_writes(plain, hosts))
    apart = [write for write in plain if hosts.are_apart(write.writer, write.segment)]
    assert len(writes) == len(plain) + len(apart) and 0 < len(apart) < len(plain)
    assert all(layout.is_valid(write) for write in writes) and write_conflicts(layout, writes) == []
    at = sorted((*layout.offset(write), layout.row_bytes(write.round)) for write in writes)
    for (segment, first, size), (other, following, _) in pairwise(at):
        assert segment < other or first + size <= following
    assert all(first + size <= layout.dispatch_flag for _, first, size in at)
    for write in writes:
        if write.staged:
            assert write.segment == write.writer and layout.stage <= layout.offset(write)[1]
            there = write._replace(segment=write.peer, peer=write.writer, staged=False)
            assert there in apart
    assert list(staged_writes(plain, Hosts.one(6))) == plain


def test_who_may_write_into_a_stage():
    layout, good = Layout(CONFIG, None, staged=True), Write(1, 1, RESULT, 4, 0, 3, staged=True)
    assert layout.is_valid(good)
    for field, value in (("segment", 4), ("writer", 4), ("peer", 1), ("peer", 6), ("peer", -1), ("slot", 4)):
        assert not layout.is_valid(good._replace(**{field: value})), field
    assert not Layout(CONFIG).is_valid(good), "there is no stage on one host"
    other = good._replace(round=DISPATCH)
    assert write_conflicts(layout, [good, other, good._replace(writer=0)]) == [(good, good._replace(writer=0))]


def test_a_stage_lies_between_regions_and_flags():
    for save in (None, *SAVES):
        one, apart = Layout(CONFIG, save), Layout(CONFIG, save, staged=True)
        assert one.stage_bytes == 0 and one.stage == one.dispatch_flag
        assert apart.stage == one.stage == apart.stage_bytes
        assert apart.num_bytes == one.num_bytes + apart.stage and apart.dispatch_flag == 2 * apart.stage
