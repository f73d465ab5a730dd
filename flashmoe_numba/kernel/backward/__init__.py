"""The backward pass of a layer as one more persistent kernel: the same queue, packets and signals, other tasks."""

from .grid import grid_block_backward
from .persistent import persistent_backward

__all__ = ["grid_block_backward", "persistent_backward"]
