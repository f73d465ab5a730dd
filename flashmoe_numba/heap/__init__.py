"""Symmetric heaps: one segment per rank, all of one size, all visible to every rank.

A heap has `num_ranks`, `rank_indices` (the ranks that live in this process), `segments` (rank -> uint8 array, of all
ranks), `agree`, `barrier` and `close`.
"""

from .threads import ThreadHeap

__all__ = ["ThreadHeap"]
