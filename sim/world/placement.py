"""Which expert lives on which rank, with copies of busy ones: a transform of a routing (DeepSeek's EPLB, its idea).

Copies go one by one to the expert with the most rows per copy. Then all copies are placed, the busiest first, each on
the rank with the fewest rows so far. The routing is renumbered to copies: a source uses the copy on its own rank if
there is one; its other rows take the copies in turn.

Invariants: every rank holds equally many copies, and never two of one expert; nothing else about the routing changes.
Leaves out: groups of experts and nodes, the cost of moving weights, loads that are only forecast.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np

from reference.arrays import Array
from reference.scalars import whole

from .routing import SimRouting, blocked_owner, packet_slots


def balance(routing: SimRouting, replicas: int = 0) -> SimRouting:
    """`routing` to the copies of experts that `place_copies` makes for its own loads.

    Expert `i` of the result is a copy of expert `place_copies(...).ravel()[i]` of `routing`.

    Args:
        replicas: copies beside the first one of each expert, over all ranks; num_experts + replicas must be a multiple
            of num_ranks, and at most num_experts * num_ranks.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    logical = place_copies(routing.counts.sum(axis=0), routing.num_ranks, replicas)
    return replace(
        routing,
        name=f"{routing.name}, {replicas} replicas" if replicas else f"{routing.name}, placed",
        num_experts=logical.size,
        topk_idx=_renumber(routing, logical),
        owner=blocked_owner(logical.size, routing.num_ranks),
    )


def place_copies(load: Array, num_ranks: int, replicas: int = 0) -> Array:
    """`[num_ranks, copies per rank]`: the experts that each rank holds, ascending; `load` is `[num_experts]` rows.

    Without replicas the busiest rank is never busier than with experts in blocks: where greed does worse, blocks stay.
    With replicas nothing compares the two, and greed may do worse on loads that were level.
    """
    replicas = whole("replicas", replicas)
    _check_replicas(replicas, len(load), num_ranks)
    copies = _num_copies(load, num_ranks, replicas)
    _, experts = np.nonzero(_place(load / copies, copies, num_ranks).T)
    placed: Array = experts.reshape(num_ranks, -1)
    if replicas == 0:
        blocks = np.arange(len(load)).reshape(num_ranks, -1)
        return min(placed, blocks, key=lambda experts: load[experts].sum(axis=1).max())
    return placed


def _check_replicas(replicas: int, num_experts: int, num_ranks: int) -> None:
    most = num_experts * (num_ranks - 1)
    if not 0 <= replicas <= most:
        raise ValueError(f"replicas must be in [0, num_experts * (num_ranks - 1) = {most}], got {replicas}")
    if (num_experts + replicas) % num_ranks:
        rule = f"num_experts={num_experts} + replicas must be a multiple of num_ranks={num_ranks}"
        raise ValueError(f"{rule}, got replicas={replicas}")


def _num_copies(load: Array, num_ranks: int, replicas: int) -> Array:
    """`[num_experts]`: one each, and the replicas where the load per copy is highest; at most one copy per rank."""
    copies = np.ones(len(load), np.int64)
    heap = [(-float(rows), 1, expert) for expert, rows in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(replicas):
        _, count, expert = heapq.heappop(heap)
        copies[expert] = count + 1
        if count + 1 < num_ranks:
            heapq.heappush(heap, (-float(load[expert]) / (count + 1), count + 1, expert))
    return copies


def _place(share: Array, copies: Array, num_ranks: int) -> Array:
    """`[num_experts, num_ranks]` bool, who holds what: longest processing time first, with limited room on each rank.

    Args:
        share: `[num_experts]`, load of each copy.
        copies: `[num_experts]`.
    """
    holds = np.zeros((len(share), num_ranks), bool)
    total = np.zeros(num_ranks)
    room = np.full(num_ranks, copies.sum() // num_ranks)
    for expert in np.argsort(-share, kind="stable").tolist():
        for _ in range(copies[expert]):
            free = (room > 0) & ~holds[expert]
            rank = int(np.where(free, total, np.inf).argmin())
            if not free.any():
                rank = _make_room(expert, holds, total, room, share)
            holds[expert, rank] = True
            total[rank] += share[expert]
            room[rank] -= 1
    return holds


def _make_room(expert: int, holds: Array, total: Array, room: Array, share: Array) -> int:
    """A rank for one more copy of `expert` where all ranks with room hold one: another expert moves from it to those.

    There is always one to move: the full rank holds at least two experts that the rank with room does not.
    """
    receiver = int(np.where(room > 0, total, np.inf).argmin())
    movable = holds & ~holds[:, [receiver]] & ~holds[expert]
    after = np.maximum(total[receiver] + share[:, None], total + share[expert] - share[:, None])
    moved, rank = np.unravel_index(np.where(movable, after, np.inf).argmin(), holds.shape)
    for place, change in ((int(rank), -1), (receiver, 1)):
        holds[moved, place] = change > 0
        total[place] += change * share[moved]
        room[place] -= change
    return int(rank)


def _renumber(routing: SimRouting, logical: Array) -> Array:
    """`routing.topk_idx` with each expert replaced by one of its copies."""
    own = _own_copy(logical, routing.num_experts)
    by_expert = np.argsort(logical.ravel(), kind="stable")  # copies of expert 0, of expert 1, ...
    copies = np.bincount(logical.ravel(), minlength=routing.num_experts)
    first = np.cumsum(copies) - copies
    remote = np.where(own < 0, routing.counts, 0)
    turn = np.cumsum(remote, axis=0) - remote  # rows of earlier sources that take the copies in turn
    topk_idx = routing.topk_idx.copy()
    for rank, choices in enumerate(topk_idx):
        sent = choices >= 0
        expert = choices[sent]
        slot = packet_slots(choices[None], routing.num_experts)[0][sent]
        in_turn = by_expert[first[expert] + (turn[rank, expert] + slot) % copies[expert]]
        choices[sent] = np.where(own[rank, expert] < 0, in_turn, own[rank, expert])
    return topk_idx


def _own_copy(logical: Array, num_experts: int) -> Array:
    """`[num_ranks, num_experts]`: the copy on the rank itself, or -1."""
    own = np.full((len(logical), num_experts), -1)
    np.put_along_axis(own, logical, np.arange(logical.size).reshape(logical.shape), axis=1)
    return own
