"""The persistent kernel, as plain functions over the device vocabulary."""

from .persistent import persistent

__all__ = ["persistent"]
