"""What forwards kept for their backwards, for as long as somebody has their tickets.

A ticket is a tensor of one number, known by where it is; what was kept goes when its memory does. So graphs may be
retained, and activation checkpointing lets go of what it makes again.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from ..errors import FlashMoEError
from ..layer.saved import SavedCall
from .session import Entry

LOST = (
    "what a forward kept for its backward is not here: its ticket was copied, by hooks on saved tensors say, or its "
    "graph was moved to another process"
)


@dataclass(eq=False)
class KeptCalls:
    """Of the layer's calls, in their order, of one call of the operator."""

    entry: Entry
    saved: list[SavedCall]


KEPT: dict[int, KeptCalls] = {}  # by where the ticket is


def ticket_for(kept: KeptCalls, device: torch.device) -> torch.Tensor:
    """A ticket, int64 `[1]`, that stands for what was kept."""
    ticket = torch.zeros(1, dtype=torch.int64, device=device)
    place = ticket.data_ptr()
    KEPT[place] = kept
    kept.entry.shared.kept.add(kept)
    weakref.finalize(ticket.untyped_storage(), _forget, place, weakref.ref(kept)).atexit = False
    return ticket


def kept_for(ticket: torch.Tensor) -> KeptCalls:
    """
    Raises:
        FlashMoEError: this is no ticket of a call of this process.
    """
    kept = KEPT.get(ticket.data_ptr())
    if kept is None:
        raise FlashMoEError(LOST)
    return kept


def _forget(place: int, kept: weakref.ref[KeptCalls]) -> None:
    """Unless the place is another ticket's already. The memory of what was kept is for the layer's next calls."""
    if (known := KEPT.get(place)) is not None and known is kept():
        del KEPT[place]
        for saved in known.saved:
            saved.close()
