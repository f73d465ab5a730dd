"""The persistent kernel, as plain functions over the device vocabulary."""

from .backward import grid_block_backward, persistent_backward
from .grid import grid_block
from .network import Channel
from .persistent import persistent
from .waits import leave

__all__ = ["Channel", "grid_block", "grid_block_backward", "leave", "persistent", "persistent_backward"]
