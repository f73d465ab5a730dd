"""Which ranks share a host: those reach each other's memory, ranks of different hosts reach each other by puts.

A config does not know it: the same layer runs on any hosts, with the same bits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .scalars import check_whole, plain


@dataclass(frozen=True)
class Hosts:
    """Of all ranks of a layer.

    Args:
        of_rank: `[num_ranks]`, any number for each host.
    """

    of_rank: tuple[int, ...]

    @classmethod
    def one(cls, num_ranks: int) -> Hosts:
        """All ranks on one host."""
        return cls((0,) * num_ranks)

    @classmethod
    def even(cls, num_ranks: int, ranks_per_host: int) -> Hosts:
        """So many ranks on each host, in their order; fewer on the last one, if they do not divide.

        Raises:
            TypeError, ValueError: `ranks_per_host` is no integer of at least 1.
        """
        check_whole("ranks_per_host", ranks_per_host, 1)
        return cls(tuple(rank // plain(ranks_per_host) for rank in range(num_ranks)))

    def are_apart(self, a: int, b: int) -> bool:
        """Are these ranks on different hosts?"""
        return self.of_rank[a] != self.of_rank[b]

    def sharing(self, rank: int) -> list[int]:
        """The ranks of this one's host, in order."""
        return [other for other, host in enumerate(self.of_rank) if host == self.of_rank[rank]]

    @property
    def is_one(self) -> bool:
        return self.most_apart == 0

    @property
    def ranks(self) -> list[list[int]]:
        """Those of each host."""
        hosts = dict.fromkeys(self.of_rank)
        return [[rank for rank, host in enumerate(self.of_rank) if host == each] for each in hosts]

    @property
    def most_apart(self) -> int:
        """The most that any rank has."""
        return len(self.of_rank) - min(Counter(self.of_rank).values(), default=0)
