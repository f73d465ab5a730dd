"""Worlds of several hosts: what they are, what their network does, and what becomes of puts that are wrong."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from small_worlds import flashmoe

from flashmoe_numba.device.fibers import RandomStrategy
from flashmoe_numba.explore.host_worlds import ALONE, FOUR, HOST_WORLDS
from flashmoe_numba.explore.run.spec import Lost, WorldSpec
from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from flashmoe_numba.explore.tell.cases import Case, load, save
from flashmoe_numba.explore.tell.shrink import smaller
from flashmoe_numba.explore.worlds import WORLDS
from flashmoe_numba.kernel.control import PROGRESS
from flashmoe_numba.kernel.signals import EPOCH_SHIFT
from flashmoe_numba.kernel.wire import FIRST, PUT_WORDS, STAMP
from reference import Hosts, MoEConfig
from reference.layout import SAVES

TWO = HOST_WORLDS["two hosts"]


@pytest.fixture(scope="module")
def kernel():
    with watched_kernel(None) as kernel:
        yield kernel


def one_run(kernel, spec, seed=0, late_seed=0):
    explorer = Explorer(Search(spec=spec), kernel)
    return explorer, explorer.world.run(lambda: RandomStrategy(seed), late_seed)


# ---- worlds as values


def test_ranks_are_spread_out_evenly():
    spread = {hosts: replace(TWO, hosts=hosts).of_hosts for hosts in (1, 2, 3, 4)}
    assert spread == {1: Hosts.one(4), 2: Hosts((0, 0, 1, 1)), 3: Hosts((0, 0, 1, 2)), 4: Hosts((0, 1, 2, 3))}
    assert len(TWO.pairs_apart) == 8 and (0, 2) in TWO.pairs_apart and (0, 1) not in TWO.pairs_apart
    assert replace(TWO, hosts=1).pairs_apart == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hosts=0), "hosts must be in [1, num_ranks=4], got 0"),
        (dict(hosts=5), "hosts must be in [1, num_ranks=4], got 5"),
        (dict(grid=True), "grid must be on one host, got hosts=2"),
    ],
)
def test_hosts_that_there_cannot_be(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TWO, **changes)


def test_named_worlds_have_what_they_should():
    found = HOST_WORLDS.values()
    assert len(found) >= 6 and {spec.hosts for spec in found} == {2, 3}
    assert all(WORLDS[name] is spec for name, spec in HOST_WORLDS.items())
    assert {spec.config.num_ranks for spec in found} == {2, 3, 4} and {spec.lanes for spec in found} == {1, 2, 3}
    assert {spec.save for spec in found} == {None, *SAVES}
    assert {len(spec.leavers) for spec in found} == {0, 1, 4}
    assert sum(bool(spec.lost) for spec in found) >= 3 and any(spec.astray for spec in found)
    assert any(0 in call.counts for spec in found for call in spec.given)
    assert any(spec.config.capacity for spec in found) and any(spec.config.shared_ffn for spec in found)
    alone = HOST_WORLDS["a host is lost"]
    assert alone.of_hosts.ranks[alone.of_hosts.of_rank[alone.lost[0].rank]] == [alone.lost[0].rank]


def test_smaller_worlds_have_fewer_hosts():
    spec = HOST_WORLDS["three hosts"]
    assert {replace(spec, hosts=1), replace(spec, hosts=2)} <= set(smaller(spec))
    assert all(each.hosts <= each.config.num_ranks for each in smaller(spec))


def test_a_file_holds_hosts_and_turns_of_the_network(tmp_path, kernel):
    choice = ("rank 0 processor 0", 1, "rank 0 network to rank 2")
    case = Case(spec=TWO, plant=None, late_seed=None, schedule=(choice,), report="")
    save(case, tmp_path / "case.json")
    assert load(tmp_path / "case.json") == case
    save(replace(case, spec=replace(TWO, hosts=1)), tmp_path / "case.json")
    with pytest.raises(ValueError, match="this world has no such fibers"):
        load(tmp_path / "case.json")


def test_flags_put_ranks_on_hosts(capsys):
    status, out, _ = flashmoe(capsys, "--world", "plain", "--hosts", "2", "--seeds", "2")
    assert status == 0 and "on 2 hosts" in out and "clean" in out
    status, out, _ = flashmoe(capsys, "--hosts", "2", "--seeds", "1")
    assert status == 0 and "worlds: plain," in out and ": alone" not in out and ", grid" not in out
    status, _, err = flashmoe(capsys, "--world", "alone", "--hosts", "2")
    assert status == 2 and "--hosts must be in [1, --ranks=1], got 2" in err
    status, _, err = flashmoe(capsys, "--world", "plain", "--hosts", "2", "--strategy", "exhaustive")
    assert status == 2 and "exhaustive search needs hosts=1, got 2" in err


# ---- runs


@pytest.mark.parametrize("name", [name for name, spec in HOST_WORLDS.items() if not spec.can_stop])
def test_calls_have_the_bits_of_one_host(name, kernel):
    """Results, gradients, flags: whatever a call leaves that does not depend on who came first."""
    spec = HOST_WORLDS[name]
    _, run = one_run(kernel, spec)
    _, one = one_run(kernel, replace(spec, hosts=1))
    assert run.reports == one.reports == []
    for calls, others in zip(run.calls, one.calls, strict=True):
        assert len(calls) == len(others) == spec.epochs
        for call, other in zip(calls, others, strict=True):
            assert call.y.tobytes() == other.y.tobytes() and call.rows.tolist() == other.rows.tolist()
            assert call.flags.tolist() == other.flags.tolist()
            assert {n: a.tobytes() for n, a in call.gradients.items()} == {
                n: a.tobytes() for n, a in other.gradients.items()
            }


@pytest.mark.parametrize("strategy", ["pct", "round-robin"])
def test_worlds_are_clean_under_other_strategies(strategy, kernel):
    for seed, spec in enumerate(HOST_WORLDS.values()):
        assert Explorer(Search(spec=spec, strategy=strategy), kernel).run(seed).reports == [], spec


class Heard:
    """What the network of a world does, put by put."""

    def __init__(self, world):
        self.rows, self.signals, self.stamps, self.pushes = [], [], Counter(), Counter()
        self._names = {id(region): region.name for region in world.regions.values()}
        world.memory.listener, world.memory.plain_listener = self.atomic, self.plain

    def atomic(self, actor, verb, region, i, value):
        if " network to " in actor.name:
            if verb == "releases" and region.name.endswith("_flag"):
                self.signals.append((actor.name, region.name, i, value))
            elif "image of rank" in region.name:
                self.pushes[region.name, i] += 1
        elif region.name.endswith("segments.wire") and verb == "releases":
            self.stamps[region.name, i, value] += 1

    def plain(self, access, verb, region, i):
        if " network to " in access[0].name and verb == "writes" and region.name.endswith(("dispatch", "result")):
            self.rows.append((access[0].name, region.name, i, len(self.signals)))


def test_a_network_carries_rows_before_their_signals_and_late(kernel):
    """Of rank 0's packets to rank 2 in the first call: rows of a later one land before the signal of an earlier one."""
    spec = replace(TWO, config=MoEConfig(**FOUR | dict(num_experts=8, num_topk=4)), epochs=1)
    early = 0
    for seed in range(8):
        explorer = Explorer(Search(spec=spec), kernel)
        heard = Heard(explorer.world)
        run = explorer.world.run(lambda seed=seed: RandomStrategy(seed), seed, with_places=True)
        assert run.reports == []
        per_expert = spec.config.slots * spec.config.hidden
        channel, region = "rank 0 network to rank 2", "rank 2 segments.dispatch"
        order = [(i // per_expert, told) for name, where, i, told in heard.rows if (name, where) == (channel, region)]
        told = [k for k, signal in enumerate(heard.signals) if signal[:2] == (channel, f"{region}_flag")]
        flags = [heard.signals[k][2] // 2 for k in told]
        at = dict(zip(flags, told, strict=True))
        assert len(flags) == len(set(flags)) == 2
        assert all(told <= at[packet] for packet, told in order), "rows after their own signal"
        first = min(at, key=lambda packet: at[packet])
        early += any(packet != first and told <= at[first] for packet, told in order)
    assert early > 0, "no rows of the later packet were early in any run"


def test_signals_of_two_calls_come_in_either_order(kernel):
    """An empty packet's, which nobody answers, behind that of the same packet in the next call."""
    search, overtaken = Search(spec=HOST_WORLDS["ahead across hosts"], strategy="pct"), 0
    for seed in range(40):
        explorer = Explorer(search, kernel)
        heard = Heard(explorer.world)
        run = explorer.world.run(explorer.strategy(seed), explorer.late_seed(seed), with_places=True)
        assert run.reports == []
        last = {}
        for _, flags, i, word in heard.signals:
            if flags.endswith("dispatch_flag"):
                packet, call = (flags, i // 2), word >> EPOCH_SHIFT
                assert call % 2 == i % 2
                assert call > last.get((*packet, i), 0), "in one flag they come in the order of calls"
                overtaken += call < last.get(packet, 0)
                last[packet], last[*packet, i] = max(call, last.get(packet, 0)), call
    assert overtaken > 0, "no signal was late enough in any run"


def test_each_put_has_its_place(kernel):
    explorer = Explorer(Search(spec=TWO), kernel)
    heard = Heard(explorer.world)
    explorer.world.run(lambda: RandomStrategy(3), 3, with_places=True)
    for rank in explorer.world.ranks:
        wire = rank.segments.wire
        places = (wire.size - FIRST) // PUT_WORDS
        name = f"rank {rank.rank_idx} segments.wire"
        stamps = sorted(value for where, i, value in heard.stamps if where == name)
        assert stamps == list(range(1, int(wire[0]) + 1)) and max(heard.stamps.values()) == 1
        for where, i, value in heard.stamps:
            if where == name:
                assert i == FIRST + (value - 1) % places * PUT_WORDS + STAMP


def test_a_network_pushes_progress_only_where_deadlines_run(kernel):
    spec = WorldSpec(config=MoEConfig(**ALONE), num_processors=1, hosts=3)
    for deadline, pushed in ((None, False), (2000, True)):
        explorer = Explorer(Search(spec=replace(spec, deadline=deadline)), kernel)
        heard = Heard(explorer.world)
        assert explorer.world.run(lambda: RandomStrategy(1), 1, with_places=True).reports == []
        assert bool(heard.pushes) == pushed
        assert {i for _, i in heard.pushes} <= {PROGRESS}


def test_a_lost_rank_puts_nothing_more_and_its_host_is_named(kernel):
    spec = WorldSpec(
        config=MoEConfig(**ALONE), num_processors=1, epochs=2, lost=(Lost(2, 1, 1),), deadline=2000, hosts=2
    )
    explorer, run = one_run(kernel, spec)
    assert run.reports == [] and [len(calls) for calls in run.calls][2] == 0
    named = [int(rank.control[0]) - 1 for rank in explorer.world.ranks[:2]]
    assert set(named) <= {0, 1}, "ranks 0 and 1 are on one host, and give up together"


def test_a_put_into_a_part_that_is_not_its_ranks_is_told(kernel):
    """The memory knows whose stage it is, and that a place is written once in a call."""
    explorer, _ = one_run(kernel, TWO)
    stage = explorer.world.memory.at(explorer.world.ranks[1].segments.room[2], 1)
    assert stage.name == "rank 1 segments.staged_dispatch" and (stage.first_writer, stage.writer_cells) == (
        1,
        stage.size,
    )
    image = explorer.world.images[1, 3]
    assert image.name == "rank 1 image of rank 3" and not np.shares_memory(
        image.array, explorer.world.ranks[3].segments.control
    )
