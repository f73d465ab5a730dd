"""One run of a world under the explorer, every atomic access heard, and which of the cases that matter it was."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from cuts import IDLE, LAST, Cuts

from flashmoe_numba.explore.run.memory import STORES
from flashmoe_numba.explore.search import Explorer
from flashmoe_numba.kernel.queue import TASK_WORDS
from flashmoe_numba.kernel.signals import ROWS_MASK
from reference import Layout, make_packets, tile_height


class Signal(NamedTuple):
    """A flag was stored to: by whom in which of its calls, whose flag, and the rows that it tells of at that moment."""

    writer: int
    call: int
    reader: int
    i: int
    word: int
    rows: np.ndarray


class Story:
    """What the atomic accesses of a run tell."""

    def __init__(self, world):
        self.world, self.config = world, world.spec.config
        self.names = {region: self._name(region) for region in world.regions.values()}
        self._cuts = Cuts(self.config)
        world.memory.listener = self.hear
        self.begin()

    @staticmethod
    def _name(region):
        """(rank, array); the table of a grid is no rank's."""
        _, rank, array = region.name.split(" ", 2) if " " in region.name else ("", -1, region.name)
        return int(rank), array

    def begin(self):
        self._cuts.begin()
        self.begun = [0] * self.config.num_ranks  # calls that each rank has begun
        self.most_apart = 0  # of them, at any moment
        self.ahead = False  # a rank was in a call after that of another
        self.at_a_time = 0  # signals that were seen when the next call's was there, too
        self.signals = {"dispatch": [], "result": []}
        self.stamps = Counter()  # of (rank, call, place)
        self.last = {}  # value of each word: by the rank whose it is, call, array and index

    @property
    def reasons(self):
        """Why row tiles were cut."""
        return {why for _, _, why in self._cuts.cuts}

    def hear(self, actor, verb, region, i, value):
        self._cuts(actor, verb, region, i, value)
        owner, array = self.names[region]
        self._hear_call(actor)
        if verb == "acquires" and array == "segments.dispatch_flag":
            next_one = self.world.ranks[owner].segments.dispatch_flag[i ^ 1]
            self.at_a_time += next_one >> 32 > actor.epoch
        if verb not in STORES:
            return
        self.last[owner, actor.epoch, array, i] = value
        if array == "queue.tasks":
            self.stamps[owner, value, i // TASK_WORDS] += 1
        if array.endswith("_flag"):
            kind = array.removeprefix("segments.").removesuffix("_flag")
            self.signals[kind].append(
                Signal(actor.rank, actor.epoch, owner, i, value, self._rows(kind, owner, i, value))
            )

    def _hear_call(self, actor):
        if actor.epoch > self.begun[actor.rank]:
            self.begun[actor.rank] = actor.epoch
            self.most_apart = max(self.most_apart, max(self.begun) - min(self.begun))
        self.ahead |= max(self.begun) > min(self.begun) > 0

    def _rows(self, kind, owner, i, word):
        """`[rows, hidden]` that lie where the flag says, now."""
        c, segments = self.config, self.world.ranks[owner].segments
        region = getattr(segments, kind).view(c.numpy_dtype).reshape(c.num_experts, c.slots, c.hidden)
        num_rows = word & ROWS_MASK
        if kind == "dispatch":
            return region[i // 2, :num_rows].copy()
        e, m = divmod(i, Layout(c).row_blocks)
        height = tile_height(int(self.world.ranks[owner].tokens.sent[e]), c.tile_m_min, c.tile_m)
        return region[e, m * height : m * height + num_rows].copy()


class WatchedRun:
    """A run that has ended, beside the reference: `packets[call][source]`, calls from 0."""

    def __init__(self, explorer, story, run):
        self.world, self.spec, self.story = explorer.world, explorer.world.spec, story
        self.config, self.reports = self.spec.config, explorer.checker.check(run)
        self.calls = [list(calls) for calls in zip(*run.calls, strict=False)]
        self.ended = all(len(calls) == self.spec.epochs for calls in run.calls)

    @property
    def packets(self):
        return [[make_packets(call.routing.topk_idx, self.config) for call in calls] for calls in self.calls]

    def sent(self, packets):
        """`[source, owner, expert there]` rows."""
        c = self.config
        return np.array([packet.sent for packet in packets]).reshape(c.num_ranks, c.num_ranks, -1)

    def row_tiles(self, calls):
        """(expert of the layer, row tile) of all ranks in a call."""
        by_expert = [of_expert for call in calls for of_expert in call.tiles]
        return [(expert, tile) for expert, tiles in enumerate(by_expert) for tile in tiles]


def watch_run(kernel, search, seed):
    """Run it once, heard from the beginning."""
    explorer = Explorer(search, kernel)
    story = Story(explorer.world)

    make = explorer.strategy(seed)

    def begin():  # twice, where there is something to report
        story.begin()
        return make()

    return WatchedRun(explorer, story, explorer.world.run(begin, explorer.late_seed(seed)))


# ---- what happened in a run, to show that the properties were asked where they matter


CASES = (
    "a rank sends nothing", "a rank receives nothing", "nobody sends anything", "token counts change",
    "all tokens go to one expert", "pairs are dropped", "a token loses all its experts",
    "a packet has several row tiles", "a row tile has rows of several sources", "a rest is cut with the last packet",
    "a rest is cut for idle processors", "a rank is a call ahead of another", "two calls tell of an empty packet",
)  # fmt: skip


REASONS = {LAST: "a rest is cut with the last packet", IDLE: "a rest is cut for idle processors"}


def happened(run):
    """Which of `CASES` this run is one of."""
    by_call = [_cases(run, calls, packets) for calls, packets in zip(run.calls, run.packets, strict=True)]
    found = {case for cases in by_call for case, is_so in cases.items() if is_so}
    found |= {"token counts change"} if len({call.counts for call in run.spec.given}) > 1 else set()
    found |= {"a rank is a call ahead of another"} if run.story.ahead else set()
    if run.spec.packing == "sources":
        found |= {REASONS[why] for why in run.story.reasons if why in REASONS}
    return found | ({"two calls tell of an empty packet"} if run.story.at_a_time else set())


def _cases(run, calls, packets):
    c, sent, chosen = run.config, run.sent(packets), sum(packet.counts for packet in packets)
    tokens = [len(packet.slot) for packet in packets]
    return {
        "a rank sends nothing": 0 in tokens and any(tokens),
        "a rank receives nothing": sent.any() and (sent.sum(axis=(0, 2)) == 0).any(),
        "nobody sends anything": not any(tokens),
        "all tokens go to one expert": c.num_experts > 1 and sum(tokens) > 1 and max(chosen) == sum(tokens),
        "pairs are dropped": any(packet.dropped for packet in packets),
        "a token loses all its experts": any((packet.slot < 0).all(axis=1).any() for packet in packets),
        "a row tile has rows of several sources": any(len(tile.runs) > 1 for _, tile in run.row_tiles(calls)),
        "a packet has several row tiles": sent.max() > c.tile_m,
    }
