"""What a world is: a layer, its blocks, and the calls that it makes; a value, so that it can be drawn, shrunk, kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from reference import Hosts, Layout, MoEConfig, Routing, Weights, external_routing
from reference.runs import PACKINGS
from reference.scalars import check_one_of
from reference.task_kinds import NORM_WEIGHTS, ROUTER_WEIGHTS, SHARED_WEIGHTS, WEIGHTS

from .program import FORWARD, Astray, Program, check_program

LEAST_DEADLINE = 100  # kernel/waits.py looks at the time sixteen times in it
NO_CHOICE_SHARE = 1 / 8  # of the pairs that a routing from outside has
OF_BACKWARDS = ("logits_gradient", "frozen_experts", "frozen_router")  # fields
MOST_FIBERS, MOST_EPOCHS, MOST_BYTES = 1000, 1000, 1 << 22  # every access is a Python call, every cell has its history


@dataclass(frozen=True)
class GivenCall:
    """One call of all ranks.

    Args:
        counts: tokens of each rank.
        experts: `[num_ranks][num_tokens of the rank][num_topk]`, a routing from outside; None: the gate decides.
    """

    counts: tuple[int, ...]
    experts: tuple[tuple[tuple[int, ...], ...], ...] | None = None


class Lost(NamedTuple):
    """A rank that is lost in a call, as a process that is killed: none of its blocks goes on.

    Args:
        tasks: that it has finished in that call when it is lost; 0: it never begins the call.
    """

    rank: int
    call: int
    tasks: int = 0


@dataclass(frozen=True, kw_only=True)
class WorldSpec:
    """What runs: a layer, and calls whose tokens and routing are drawn from `data_seed`.

    The first call has all tokens and the gate's routing; later ones have 0, 1, some or all tokens on a rank, and are
    routed by the gate, at random, or all to the same experts, and then some pairs choose none. With `given` calls, only
    the values of tokens and of outside factors are drawn.

    Args:
        leavers: the hosts of these ranks give up some time in the last call, and all must stop.
        lost: all others must come to their end.
        deadline: of every wait, on a clock that counts switches; None: waits that nobody can end are found at once.
        grid: the blocks of all ranks are one launch, as on a GPU, and a call begins when all have left the last one.
        ties: every other expert has the logits of the one before it.
        hosts: on which ranks are spread out evenly; a network carries puts between them (network.py).
        packing: as `FlashMoE` has it.
        save: likewise.
        program: which calls are forwards and which backwards (program.py); none: all are forwards. A backward has dy of
            normal numbers. A rank's first one begins the gradients of weights, and the others go on with them.
        logits_gradient: backwards are given gradients of the logits, too, where a routing was not.
        frozen_experts, frozen_router: no gradients of these weights are wanted.
        astray: ranks whose last call is another one than the program's: all must give up.

    Raises:
        ValueError: leavers, lost or astray ranks are no ranks, a given call does not fit the layer, there are not
            `epochs` of them, the deadline is too short or missing, the program cannot be made, or the world is larger
            than an interpreter could run.
    """

    config: MoEConfig
    num_processors: int = 2
    lanes: int = 1
    epochs: int = 1
    data_seed: int = 0
    leavers: tuple[int, ...] = ()
    given: tuple[GivenCall, ...] = ()
    lost: tuple[Lost, ...] = ()
    deadline: int | None = None
    grid: bool = False
    ties: bool = False
    hosts: int = 1
    packing: str = PACKINGS[0]
    save: str | None = None
    program: Program = ()
    logits_gradient: bool = False
    frozen_experts: bool = False
    frozen_router: bool = False
    astray: tuple[Astray, ...] = ()

    def __post_init__(self) -> None:
        self._check_size()
        self._check_ranks("leavers", self.leavers)
        self._check_ranks("lost", [lost.rank for lost in self.lost])
        self._check_lost()
        check_one_of("packing", self.packing, PACKINGS)
        check_program(self.program, self.save, self.astray, self.epochs)
        self._check_ranks("astray", [own.rank for own in self.astray])
        for name in OF_BACKWARDS:
            if getattr(self, name) and not self.program:
                raise ValueError(f"{name} needs a program, whose backwards it changes")
        if self.given and len(self.given) != self.epochs:
            raise ValueError(f"epochs must be the number of given calls, {len(self.given)}, got {self.epochs}")
        c = self.config
        for call in self.given:
            if len(call.counts) != c.num_ranks or not all(0 <= count <= c.num_tokens for count in call.counts):
                rule = f"num_ranks={c.num_ranks} numbers in [0, num_tokens={c.num_tokens}]"
                raise ValueError(f"counts of a given call must be {rule}, got {call.counts}")

    def _check_ranks(self, name: str, given: Sequence[int]) -> None:
        ranks = range(self.config.num_ranks)
        if len(set(given)) < len(given) or not set(given) <= set(ranks):
            raise ValueError(f"{name} must be different ranks in [0, {ranks[-1]}], got {', '.join(map(str, given))}")

    def _check_lost(self) -> None:
        for lost in self.lost:
            if not 1 <= lost.call <= self.epochs or lost.tasks < 0:
                rule = f"lost must be in a call in [1, epochs={self.epochs}], after 0 tasks or more"
                raise ValueError(f"{rule}, got call {lost.call}, {lost.tasks} tasks")
            if lost.rank in self.leavers:
                raise ValueError(f"lost must be none of the leavers, got {lost.rank}")
        if self.lost and self.deadline is None:
            raise ValueError("lost needs a deadline, which ends the others' waits")
        if self.deadline is not None and self.deadline < LEAST_DEADLINE:
            raise ValueError(f"deadline must be at least {LEAST_DEADLINE} switches, got {self.deadline}")
        if not 1 <= self.hosts <= self.config.num_ranks:
            raise ValueError(f"hosts must be in [1, num_ranks={self.config.num_ranks}], got {self.hosts}")
        if self.grid and self.hosts > 1:
            raise ValueError(f"grid must be on one host, got hosts={self.hosts}")
        if self.grid and (self.leavers or self.deadline is not None):
            raise ValueError("grid must be without leavers and without a deadline")
        if self.astray and (self.leavers or self.lost):
            raise ValueError("astray must be without leavers and lost ranks")

    def _check_size(self) -> None:
        c = self.config
        fibers = c.num_ranks * (self.num_processors + 1) * self.lanes
        if fibers > MOST_FIBERS:
            rule = f"num_ranks * (num_processors + 1) * lanes must be at most {MOST_FIBERS}"
            raise ValueError(f"{rule}, got {c.num_ranks} * ({self.num_processors} + 1) * {self.lanes}")
        if self.epochs > MOST_EPOCHS:
            raise ValueError(f"epochs must be at most {MOST_EPOCHS}, got {self.epochs}")
        weights = c.hidden * (c.num_experts * c.ffn + c.num_ranks * c.shared_ffn)
        num_bytes = c.num_ranks * Layout(c, self.save, self.hosts > 1).num_bytes + weights
        if num_bytes > MOST_BYTES:
            raise ValueError(f"segments and weights must be at most {MOST_BYTES:,} bytes, got {num_bytes:,}")

    @property
    def of_hosts(self) -> Hosts:
        """Which ranks share one."""
        num_ranks = self.config.num_ranks
        return Hosts(tuple(rank * self.hosts // num_ranks for rank in range(num_ranks)))

    @property
    def pairs_apart(self) -> list[tuple[int, int]]:
        """Ranks on different hosts, in both orders."""
        ranks = range(self.config.num_ranks)
        return [(a, b) for a in ranks for b in ranks if self.of_hosts.are_apart(a, b)]

    def weights(self) -> Weights:
        """Of all experts."""
        weights = Weights.random(self.config, seed=self.data_seed, bias=True)
        if not self.ties:
            return weights
        twins = np.arange(self.config.num_choices) // 2 * 2
        return replace(weights, router=weights.router[twins])

    def forward_of(self, rank: int, call: int) -> int:
        """The forward that a rank's call is the backward of; 0: it is a forward itself."""
        own = dict(self.astray) if call == self.epochs else {}
        return own.get(rank, self.program[call - 1] if self.program else FORWARD)

    def keeps(self, call: int) -> bool:
        """Is there a backward of it?"""
        return call in self.program or call in [own.call for own in self.astray]

    def begins_sums(self, rank: int, call: int) -> bool:
        """Is this rank's call its first backward?"""
        backwards = [number for number in range(1, call + 1) if self.forward_of(rank, number)]
        return backwards == [call]

    @property
    def frozen_kinds(self) -> set[int]:
        """Kinds of tasks that its backwards have not."""
        of_experts = {WEIGHTS, SHARED_WEIGHTS, NORM_WEIGHTS} if self.frozen_experts else set()
        return of_experts | ({ROUTER_WEIGHTS} if self.frozen_router else set())

    def logits_gradients(self, call: int, routing: Routing | None, rank: int, num_tokens: int) -> np.ndarray | None:
        """`[num_tokens, num_choices]` that a rank's backward is given, whose forward had this routing from outside."""
        if not self.logits_gradient or routing is not None:
            return None
        draw = np.random.default_rng([self.data_seed, call, rank, 0])
        return draw.standard_normal((num_tokens, self.config.num_choices)).astype(self.config.accumulator)

    @property
    def can_stop(self) -> bool:
        """May a call be given up?"""
        return bool(self.leavers or self.astray) or self.deadline is not None

    def calls(self) -> list[tuple[list[np.ndarray], list[Routing | None]]]:
        """(tokens, routing from outside or None) of each rank, for each call; of a backward, (dy, None)."""
        make = self._given_call if self.given else self._call
        calls = [make(epoch) for epoch in range(self.epochs)]
        for call, (x, routings) in enumerate(calls, start=1):
            for rank in range(self.config.num_ranks):
                forward = self.forward_of(rank, call)
                if forward:
                    draw = np.random.default_rng([self.data_seed, call, rank, forward])
                    (x[rank],), routings[rank] = self._tokens(draw, [len(calls[forward - 1][0][rank])]), None
        return calls

    def _given_call(self, epoch: int) -> tuple[list[np.ndarray], list[Routing | None]]:
        c, call, draw = self.config, self.given[epoch], np.random.default_rng([self.data_seed, epoch])
        x = self._tokens(draw, call.counts)
        if call.experts is None:
            return x, [None] * c.num_ranks
        return x, [self._outside(draw, *part) for part in zip(call.experts, call.counts, strict=True)]

    def _outside(self, draw: np.random.Generator, experts: tuple[tuple[int, ...], ...], count: int) -> Routing:
        idx = np.array(experts, np.int64).reshape(len(experts), self.config.num_topk)
        return external_routing(idx, draw.uniform(0.1, 1, idx.shape), self.config, count)

    def _tokens(self, draw: np.random.Generator, counts: Sequence[int]) -> list[np.ndarray]:
        c = self.config
        return [draw.standard_normal((count, c.hidden)).astype(c.numpy_dtype) for count in counts]

    def _call(self, epoch: int) -> tuple[list[np.ndarray], list[Routing | None]]:
        c, choose = self.config, random.Random(self.data_seed * 1000 + epoch)
        draw = np.random.default_rng([self.data_seed, epoch])
        some = [0, 1, c.num_tokens // 2, c.num_tokens, c.num_tokens]
        counts = [choose.choice(some) if epoch else c.num_tokens for _ in range(c.num_ranks)]
        x = self._tokens(draw, counts)
        bias = choose.choice([None, 0.0, 50.0]) if epoch else None
        if bias is None:
            return x, [None] * c.num_ranks
        favour = bias * draw.standard_normal(c.num_choices)
        return x, [self._routing(draw, count, favour) for count in counts]

    def _routing(self, draw: np.random.Generator, count: int, favour: np.ndarray) -> Routing:
        c = self.config
        order = np.argsort(draw.standard_normal((count, c.num_choices)) + favour, axis=1)
        factors = draw.uniform(0.1, 1, (count, c.num_topk)).astype(c.accumulator)
        chosen = draw.random(factors.shape) >= NO_CHOICE_SHARE
        return Routing(np.where(chosen, order[:, : c.num_topk], -1).astype(np.int32), np.where(chosen, factors, 0))
