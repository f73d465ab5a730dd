"""The rule by which owners cut row tiles, said again: a machine with a clock, at whose ticks everybody looks."""

from collections import Counter

from sim.drafting.cuts import Cut
from sim.engine.graph import NONE


class Ticking:
    """One rank: its packets, what else its processors do, and the rules (`sim.drafting.owner`); times are small."""

    def __init__(self, packets, others, rules):
        self.packets, self.others, self.rules = list(packets), list(others), rules
        self.queue = []  # [priority, tile or None, product, duration]: single tasks, in the order of their coming
        self.busy = []  # [when it ends, tile, product]
        self.left = {}  # (tile, product): tasks that have not ended
        self.handing = []  # (when, tile)
        self.tiles = []  # (expert, rows, held_ns)
        self.waiting, self.last = Counter(), {}
        self.missing = Counter(packet.expert for packet in packets)

    def run(self):
        time = 0
        while self.packets or self.others or self.queue or self.busy or self.handing or any(self.waiting.values()):
            self.come(time)
            self.end(time)
            self.take(time)
            self.look(time)
            time = self.next_tick(time)
        return [Cut(*tile) for tile in self.tiles]

    def next_tick(self, time):
        """Nothing happens between two of these."""
        ticks = [packet.time for packet in self.packets] + [work.ready for work in self.others]
        ticks += [task[0] for task in self.busy] + [when for when, _ in self.handing]
        ticks += [last + self.rules.settle_ns for last in self.last.values()]
        return min((tick for tick in ticks if tick > time), default=time + 1)

    def come(self, time):
        for work in [work for work in self.others if work.ready == time]:
            self.others.remove(work)
            self.queue += [[work.priority, None, None, work.duration]] * work.number
        for packet in [packet for packet in self.packets if packet.time == time]:
            self.packets.remove(packet)
            self.waiting[packet.expert] += packet.rows
            self.missing[packet.expert] -= 1
            tiles = []
            while self.waiting[packet.expert] >= self.rules.tile_m:
                tiles.append(self.tile(packet.expert, self.rules.tile_m, NONE))
            if not self.missing[packet.expert] and self.waiting[packet.expert]:
                tiles.append(self.tile(packet.expert, self.waiting[packet.expert], NONE))
            self.last[packet.expert] = time + len(tiles) * self.rules.hand_ns
            self.handing += [(self.last[packet.expert], tile) for tile in tiles]

    def tile(self, expert, rows, held_ns):
        self.waiting[expert] -= rows
        self.tiles.append((expert, rows, held_ns))
        return len(self.tiles) - 1

    def begin(self, tile, product):
        expert, rows, _ = self.tiles[tile]
        number = self.left[tile, product] = self.rules.tiles[product]
        self.queue += [[0, tile, product, self.rules.tile_ns[product][expert][rows]]] * number

    def end(self, time):
        done = [task for task in self.busy if task[0] == time]
        self.busy = [task for task in self.busy if task[0] > time]
        for _, tile, product in done:
            if tile is not None:
                self.left[tile, product] -= 1
                if self.left[tile, product] == 0 and product == 0:
                    self.begin(tile, 1)
        for tile in [tile for when, tile in self.handing if when == time]:
            self.begin(tile, 0)
        self.handing = [(when, tile) for when, tile in self.handing if when > time]

    def take(self, time):
        while self.queue and len(self.busy) < self.rules.slots:
            task = min(self.queue, key=lambda task: task[0])  # the first of the most urgent
            self.queue.remove(task)
            self.busy.append((time + task[3], task[1], task[2]))

    def look(self, time):
        for expert in sorted(self.waiting):
            idle = self.rules.slots - len(self.busy) - len(self.handing) * self.rules.tiles[0]
            settled = self.waiting[expert] and time >= self.last[expert] + self.rules.settle_ns
            if settled and idle > 0 and not self.queue:
                held_ns = time + self.rules.hand_ns - self.last[expert]
                self.handing.append((time + self.rules.hand_ns, self.tile(expert, self.waiting[expert], held_ns)))
