"""The backward pass of a layer as one more persistent kernel: the same queue, packets and signals, other tasks."""

from .persistent import persistent_backward

__all__ = ["persistent_backward"]
