"""Is what a run computed right? Each call against the float64 oracle, its tasks against the reference's graph.

The same world computes the same bits under every seed, so what one run of a process was found to be right need not be
computed again: later ones are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reference import MoEConfig, Packets, Routing, Weights, Workload, make_packets
from reference.runs import result_chunks

from ...bench.check import check_layer
from ...kernel.signals import EPOCH_SHIFT
from .calls import Call
from .counts import Counts
from .gradients import Reference
from .reports import Report
from .world import Run, WatchedWorld

WRONG = "wrong result"


class Checker:
    """Judges runs of one world."""

    def __init__(self, world: WatchedWorld) -> None:
        self.world = world
        self._right: dict[int, list[Call]] = {}  # by call: of all ranks, found to be right
        self._packets: dict[int, list[Packets]] = {}  # the same
        self._counts = Counts(world.spec.config, world.spec.frozen_kinds)
        self._reference = Reference(world)
        rows = world.weights.router
        self._twins = [{low for low in range(e) if np.array_equal(rows[low], rows[e])} for e in range(len(rows))]

    def check(self, run: Run[Any]) -> list[Report]:
        """Everything that is wrong with a run; the memory's reports are among them."""
        reports = list(run.reports)
        with np.errstate(over="ignore", invalid="ignore"):  # as in the kernel: wrong numbers are a report, no warning
            for epoch in range(1, self._ended(run) + 1):
                calls = [calls[epoch - 1] for calls in run.calls]
                if epoch in self._right:
                    reports += self._differences(epoch, calls)
                else:
                    forward = self._forward_of(epoch)
                    before = [own[forward - 1] for own in run.calls] if forward else []
                    reports += self._judge_backward(epoch, calls, before) if forward else self._judge(epoch, calls)
        return reports

    def _ended(self, run: Run[Any]) -> int:
        """Calls that ended on all ranks, and were the same there."""
        spec = self.world.spec
        return min(min(map(len, run.calls)), spec.epochs - 1 if spec.astray else spec.epochs)

    def _forward_of(self, epoch: int) -> int:
        """The forward that a call which ended is the backward of, or 0: no rank of it was astray."""
        return self.world.spec.program[epoch - 1] if self.world.spec.program else 0

    def _differences(self, epoch: int, calls: Sequence[Call]) -> Iterator[Report]:
        for rank, (call, right) in enumerate(zip(calls, self._right[epoch], strict=True)):
            case = f"rank {rank}, call {epoch}:"
            if not np.array_equal(bits(call.y), bits(right.y)):
                rows = np.flatnonzero((bits(call.y) != bits(right.y)).any(axis=1)).tolist()
                yield Report(WRONG, f"{case} rows {rows} have other bits than under another seed")
            for name, array in call.gradients.items():
                other = np.flatnonzero(bits(array) != bits(right.gradients[name])).tolist()
                if other:
                    yield Report(WRONG, f"{case} gradient {name}{other} has other bits than under another seed")
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
        for rank, (case, call) in enumerate(zip(cases, calls, strict=True)):
            x = self.world.data[epoch - 1][0][rank]
            wrong = np.argwhere(bits(call.y) != bits(ordered_sums(call, x, packets[rank], self.world.weights, config)))
            if len(wrong):
                text = f"{case} y{wrong[0].tolist()} is not the sum of its results in the order of choices"
                reports.append(Report(WRONG, text))
        return self._judge_packets(epoch, calls, packets, reports)

    def _judge_backward(self, epoch: int, calls: Sequence[Call], forwards: Sequence[Call]) -> list[Report]:
        """Routed as its forward was, and with the reference's gradients."""
        reports = [Report(WRONG, text) for text in self._reference.wrong(epoch, calls)]
        packets = [make_packets(call.routing.topk_idx, self.world.spec.config) for call in forwards]
        for rank, (call, forward) in enumerate(zip(calls, forwards, strict=True)):
            now, then = call.routing, forward.routing
            if (
                not np.array_equal(now.topk_idx, then.topk_idx)
                or (bits(now.topk_weights) != bits(then.topk_weights)).any()
            ):
                reports.append(Report(WRONG, f"rank {rank}, call {epoch}: routed otherwise than in its forward"))
        return self._judge_packets(epoch, calls, packets, reports)

    def _judge_packets(
        self, epoch: int, calls: Sequence[Call], packets: list[Packets], reports: list[Report]
    ) -> list[Report]:
        """All reports of a call, these among them; where there are none, it is right."""
        config = self.world.spec.config
        sent = np.array([packet.sent for packet in packets]).reshape(config.num_ranks, config.num_ranks, -1)
        for rank, call in enumerate(calls):
            case = f"rank {rank}, call {epoch}:"
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
        forward, packing = self._forward_of(epoch), self.world.spec.packing
        routed = None not in self.world.data[forward - 1][1] if forward else None
        yield from self._counts.wrong(epoch, calls, packets, packing, routed)

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


def ordered_sums(call: Call, x: np.ndarray, packets: Packets, weights: Weights, config: MoEConfig) -> np.ndarray:
    """`[num_tokens, hidden]`: results summed in the accumulator's type in the order of choices, rounded once.

    The shared expert's come last, and a zero-computation expert's are the tokens `x` themselves. Where results have a
    norm, their sum is scaled as a whole, and those of zero-computation experts follow.
    """
    sums, scale = np.zeros((len(call.y), config.hidden), config.accumulator), weights.result_scale
    for token in range(len(sums)):
        pairs = list(_added(call, x, packets, config, token))
        if scale is not None:
            for factor, row, is_result in pairs:
                sums[token] += factor / _norm(row, scale, config) * row if is_result else 0
            sums[token] *= scale
            pairs = [pair for pair in pairs if not pair[2]]
        for factor, row, _ in pairs:
            sums[token] += factor * row
    if config.shared_ffn:
        sums += call.factors[:, None] * call.shared.astype(config.accumulator)
    return sums.astype(config.numpy_dtype)


def _added(
    call: Call, x: np.ndarray, packets: Packets, config: MoEConfig, token: int
) -> Iterator[tuple[Any, np.ndarray, bool]]:
    """(factor, row, is it a result?) of each choice of a token that adds something, in order."""
    one, choices = config.accumulator.type(1), (call.routing.topk_idx[token], call.routing.topk_weights[token])
    for j, (expert, factor) in enumerate(zip(*choices, strict=True)):
        if packets.slot[token, j] >= 0 and factor != 0:
            owner, local = divmod(int(expert), config.num_experts_per_rank)
            row = call.results[owner, local, packets.slot[token, j]].astype(config.accumulator)
            yield one if config.router_kind.weight_input else factor, row, True
        elif expert >= config.num_experts and factor != 0 and config.zero == "identity":
            yield factor, x[token].astype(config.accumulator), False


def _norm(row: np.ndarray, scale: np.ndarray, config: MoEConfig) -> Any:
    """Of a result, summed in the order of columns."""
    total, number = config.accumulator.type(0), config.accumulator.type
    for value in scale * row:
        total += value * value
    return np.sqrt(total / number(config.hidden) + number(config.expert_kind.norm_eps))


def bits(array: np.ndarray) -> np.ndarray:
    """The same shape of unsigned integers: NaNs of the same bits are equal."""
    return array.view(f"u{array.itemsize}")
