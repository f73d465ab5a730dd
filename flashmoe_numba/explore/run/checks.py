"""Is what a run computed right? Each call against the float64 oracle, its tasks against the reference's graph.

The same world computes the same bits under every seed, so what one run of a process was found to be right need not be
computed again: later ones are compared with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reference import GATE, KIND_NAMES, MoEConfig, Packets, Routing, Task, Workload, make_packets, task_graph
from reference.runs import RowTile, result_chunks, row_tiles, tiling_problem

from ...bench.check import check_layer
from ...kernel.signals import EPOCH_SHIFT
from .hosts import Call
from .reports import Report
from .world import Run, WatchedWorld

MOST_TASKS = 4  # named in a report
WRONG = "wrong result"


class Checker:
    """Judges runs of one world."""

    def __init__(self, world: WatchedWorld) -> None:
        self.world = world
        self._right: dict[int, list[Call]] = {}  # by call: of all ranks, found to be right
        self._packets: dict[int, list[Packets]] = {}  # the same
        self._tasks: dict[tuple[Any, ...], list[Counter[Task]]] = {}  # by call and tiles: of all ranks
        rows = world.weights.router
        self._twins = [{low for low in range(e) if np.array_equal(rows[low], rows[e])} for e in range(len(rows))]

    def check(self, run: Run[Any]) -> list[Report]:
        """Everything that is wrong with a run; the memory's reports are among them."""
        reports = list(run.reports)
        with np.errstate(over="ignore", invalid="ignore"):  # as in the kernel: wrong numbers are a report, no warning
            for epoch in range(1, min(map(len, run.calls)) + 1):
                calls = [calls[epoch - 1] for calls in run.calls]
                reports += self._differences(epoch, calls) if epoch in self._right else self._judge(epoch, calls)
        return reports

    def _differences(self, epoch: int, calls: Sequence[Call]) -> Iterator[Report]:
        for rank, (call, right) in enumerate(zip(calls, self._right[epoch], strict=True)):
            case = f"rank {rank}, call {epoch}:"
            if not np.array_equal(bits(call.y), bits(right.y)):
                rows = np.flatnonzero((bits(call.y) != bits(right.y)).any(axis=1)).tolist()
                yield Report(WRONG, f"{case} rows {rows} have other bits than under another seed")
            if not np.array_equal(call.routing.topk_idx, right.routing.topk_idx):
                yield Report(WRONG, f"{case} routed otherwise than under another seed")
            if not np.array_equal(call.rows, right.rows):
                yield Report("count", f"{case} packets of other rows than under another seed")
            if not np.array_equal(call.flags, right.flags):
                yield Report(WRONG, f"{case} other result flags than under another seed")
        yield from self._miscounts(epoch, calls, self._packets[epoch])

    def _judge(self, epoch: int, calls: Sequence[Call]) -> list[Report]:
        """Against the reference, everything; or the routing alone, where nothing can follow from it."""
        given = self.world.data[epoch - 1][1]
        cases = [f"rank {rank}, call {epoch}:" for rank in range(len(calls))]
        illegal = [r for part in zip(cases, calls, given, strict=True) for r in self._illegal_experts(*part)]
        if illegal:
            return illegal
        reports = [report for part in zip(cases, calls, given, strict=True) for report in self._wrong_ties(*part)]
        reports += self._compare_with_oracle(epoch, calls)
        config = self.world.spec.config
        packets = [make_packets(call.routing.topk_idx, config) for call in calls]
        sent = np.array([packet.sent for packet in packets]).reshape(config.num_ranks, config.num_ranks, -1)
        for rank, (case, call) in enumerate(zip(cases, calls, strict=True)):
            x = self.world.data[epoch - 1][0][rank]
            wrong = np.argwhere(bits(call.y) != bits(ordered_sums(call, x, packets[rank], config)))
            if len(wrong):
                text = f"{case} y{wrong[0].tolist()} is not the sum of its results in the order of choices"
                reports.append(Report(WRONG, text))
            reports += self._wrong_flags(case, epoch, call, packets[rank])
            if not np.array_equal(call.rows, sent[:, rank]):
                text = f"{case} packets of {call.rows.tolist()} rows, wanted {sent[:, rank].tolist()}"
                reports.append(Report("count", text))
        reports += self._miscounts(epoch, calls, packets)
        if not reports:
            self._right[epoch], self._packets[epoch] = list(calls), packets
        return reports

    def _miscounts(self, epoch: int, calls: Sequence[Call], packets: Sequence[Packets]) -> Iterator[Report]:
        """Row tiles that may not be, or tasks that are not those of these tiles."""
        config, packing = self.world.spec.config, self.world.spec.packing
        tiles = [of_expert for call in calls for of_expert in call.tiles]
        key = epoch, *map(tuple, tiles)
        if key not in self._tasks:
            wrong = list(_wrong_tiles(epoch, tiles, packets, config, packing))
            if wrong:
                yield from wrong
                return
            graph = task_graph(packets, config, tiles)
            self._tasks[key] = [_tasks_of(rank, graph) for rank in range(config.num_ranks)]
        for rank, (call, tasks) in enumerate(zip(calls, self._tasks[key], strict=True)):
            yield from _miscounts(f"rank {rank}, call {epoch}:", call, tasks)

    def _illegal_experts(self, case: str, call: Call, given: Routing | None) -> Iterator[Report]:
        """The first token whose experts are not distinct ones of the layer; no choice (-1) may be given only."""
        num_choices = self.world.spec.config.num_choices
        for token, experts in enumerate(call.routing.topk_idx.tolist()):
            chosen = [e for e in experts if given is None or e != -1]
            bad = [e for i, e in enumerate(chosen) if not 0 <= e < num_choices or e in chosen[:i]]
            if bad:
                text = f"token {token} goes to expert {bad[0]} of {experts}: not in [0, {num_choices}), or twice"
                yield Report(WRONG, f"{case} {text}")
                return

    def _wrong_ties(self, case: str, call: Call, given: Routing | None) -> Iterator[Report]:
        """The first token that the gate sends to an expert before one of the same logits and a lower index."""
        for token, experts in enumerate(call.routing.topk_idx.tolist() if given is None else []):
            for j, e in enumerate(experts):
                if not self._twins[e] <= set(experts[:j]):
                    text = f"token {token} goes to expert {e} of {experts}, where a lower one has the same logits"
                    yield Report(WRONG, f"{case} {text}")
                    return

    def _wrong_flags(self, case: str, epoch: int, call: Call, packets: Packets) -> Iterator[Report]:
        """Result flags of this call: one for each result chunk of each packet, with its rows."""
        config, wanted = self.world.spec.config, np.full_like(call.flags, -1)
        for e, rows in enumerate(packets.sent.tolist()):
            for m, chunk in enumerate(result_chunks(rows, config)):
                wanted[e, m] = epoch << EPOCH_SHIFT | len(chunk)
        found = np.where(call.flags >> EPOCH_SHIFT == epoch, call.flags, -1)
        for e, m in np.argwhere(found != wanted)[:1].tolist():  # the first
            text = f"the result flag of expert {e}, chunk {m} is {found[e, m]}, wanted {wanted[e, m]}"
            yield Report(WRONG, f"{case} {text}")

    def _compare_with_oracle(self, epoch: int, calls: Sequence[Call]) -> list[Report]:
        x, given = self.world.data[epoch - 1]
        idx = [routing.topk_idx for routing in given if routing]
        factors = [routing.topk_weights for routing in given if routing]
        workload = Workload(x, idx or None, factors or None)
        routing, y = [call.routing for call in calls], [call.y for call in calls]
        verdict = check_layer(self.world.spec.config, self.world.weights, workload, routing, y)
        return [Report(WRONG, f"call {epoch}: {failure}") for failure in verdict.failures]


def ordered_sums(call: Call, x: np.ndarray, packets: Packets, config: MoEConfig) -> np.ndarray:
    """`[num_tokens, hidden]`: results summed in the accumulator's type in the order of choices, rounded once.

    The shared expert's come last, and a zero-computation expert's are the tokens `x` themselves.
    """
    sums, one = np.zeros((len(call.y), config.hidden), config.accumulator), config.accumulator.type(1)
    for token, (experts, factors) in enumerate(zip(call.routing.topk_idx, call.routing.topk_weights, strict=True)):
        for j, (expert, factor) in enumerate(zip(experts.tolist(), factors, strict=True)):
            if packets.slot[token, j] >= 0 and factor != 0:
                owner, local = divmod(expert, config.num_experts_per_rank)
                row = call.results[owner, local, packets.slot[token, j]]
                sums[token] += (one if config.router_kind.weight_input else factor) * row.astype(config.accumulator)
            elif expert >= config.num_experts and factor != 0 and config.zero == "identity":
                sums[token] += factor * x[token].astype(config.accumulator)
    if config.shared_ffn:
        sums += call.factors[:, None] * call.shared.astype(config.accumulator)
    return sums.astype(config.numpy_dtype)


def bits(array: np.ndarray) -> np.ndarray:
    """The same shape of unsigned integers: NaNs of the same bits are equal."""
    return array.view(f"u{array.itemsize}")


def _wrong_tiles(
    epoch: int, tiles: list[list[RowTile]], packets: Sequence[Packets], config: MoEConfig, packing: str
) -> Iterator[Report]:
    """The first expert whose rows are not cut as they may be."""
    for expert, of_expert in enumerate(tiles):
        rows = [int(packet.sent[expert]) for packet in packets]
        problem = tiling_problem(of_expert, rows, config)
        if problem is None and packing == "none" and of_expert != row_tiles(rows, config):
            problem = "a packet must have tiles of its own, cut where its chunks are"
        if problem:
            yield Report("tiles", f"call {epoch}, expert {expert}: {problem}")
            return


def _name(task: Task) -> str:
    """A spoilt queue may hold tasks of no kind there is."""
    return str(task) if 0 <= task.kind < len(KIND_NAMES) else f"kind {task.kind}{tuple(task[1:])}"


def _tasks_of(rank: int, graph: Mapping[Task, list[Task]]) -> Counter[Task]:
    tasks = Counter(task for task in graph if task.rank == rank)
    tasks[Task(GATE, rank)] = 1  # a rank without tokens runs one, too, which tells every peer so
    return tasks


def _miscounts(case: str, call: Call, tasks: Counter[Task]) -> Iterator[Report]:
    """Tasks against what they should be."""
    if call.tasks != tasks:
        wrong = [task for task in sorted(call.tasks | tasks) if call.tasks[task] != tasks[task]]
        texts = [f"{_name(task)} ran {call.tasks[task]} times, wanted {tasks[task]}" for task in wrong[:MOST_TASKS]]
        texts += [f"and {len(wrong) - MOST_TASKS} more"] if len(wrong) > MOST_TASKS else []
        yield Report("count", f"{case} {'; '.join(texts)}")
