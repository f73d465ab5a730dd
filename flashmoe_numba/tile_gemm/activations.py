"""Activation kinds as kernel code knows them: indices into `reference.ACTIVATIONS`."""

from __future__ import annotations

from reference.config import ACTIVATIONS

IDENTITY, RELU, GELU, SILU = (ACTIVATIONS.index(name) for name in ("identity", "relu", "gelu", "silu"))
