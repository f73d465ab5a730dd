"""Why row tiles were cut in a run: they were full, the expert's last packet was here, or processors ran idle."""

from collections import Counter

from flashmoe_numba.explore.run.cells import split_name, word

FULL, LAST, IDLE = "full", "last packet", "idle"


class Cuts:
    """Listens to a world's memory, as its `listener`: `cuts` counts (rank, call, why), over runs until `begin`.

    A lane of the OS block that cuts a tile takes its hidden rows from a counter. Just before it has acquired a packet's
    signal or cut another tile of it, unless it found processors idle: then it has looked at the queue's TAIL.
    """

    def __init__(self, config):
        self.tile_m = config.tile_m
        self.begin()

    def begin(self):
        self.cuts = Counter()
        self._given = Counter()  # hidden rows by rank and call
        self._before = {}  # the word that each actor touched last

    def __call__(self, actor, verb, region, i, value):
        name = word(region.name, i)
        before, self._before[actor] = self._before.get(actor), name
        if name != "HIDDEN_ROWS" or verb != "adds to":
            return
        key = split_name(region.name)[0], actor.epoch
        if value <= self._given[key]:  # the first one of another run
            self._given[key] = 0
        rows, self._given[key] = value - self._given[key], value
        why = FULL if rows == self.tile_m else IDLE if before == "TAIL" else LAST
        self.cuts[(*key, why)] += 1
