"""Layers of published models: their weights from .safetensors files, or from a block in memory, without PyTorch."""

from __future__ import annotations

from .checkpoint import Checkpoint, from_state_dict, load, read_config

__all__ = ["Checkpoint", "from_state_dict", "load", "read_config"]
