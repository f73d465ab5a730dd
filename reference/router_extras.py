"""Arrays that some kinds of router and of experts ask for beside their matrices; every rank holds all of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .arrays import Array, check_array, check_floating, stream
from .config import MoEConfig

EXTRAS = ("router_bias", "selection_bias", "expert_scale", "result_scale")
EXTRAS_STREAM = 3


def asked_extras(config: MoEConfig) -> Iterator[tuple[str, str, tuple[int]]]:
    """(name, what asks for it, shape) of those of EXTRAS that the config's kinds ask for."""
    router, choices = config.router_kind, config.num_choices
    if router.logit_bias:
        yield "router_bias", "router", (choices,)
    if router.selection_bias:
        yield "selection_bias", "router", (choices - router.num_always,)
    if router.expert_scale:
        yield "expert_scale", "router", (choices,)
    if config.expert_kind.norm_eps is not None:
        yield "result_scale", "experts", (config.hidden,)


def check_extra(name: str, array: Array, shape: tuple[int]) -> None:
    """Nothing, if it is finite and has that shape; else a TypeError or ValueError."""
    values = check_floating(name, check_array(name, array, shape)).astype(np.float64)
    if not np.isfinite(values).all():  # or the choice of every token would be spoilt
        raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}")


def random_extras(config: MoEConfig, seed: int) -> dict[str, Array]:
    """Biases of about the size of what they are added to, and scales around 1, in the accumulator's type."""
    kind, extras = config.router_kind, {}
    small = kind.choice == "score" and kind.score == "softmax"  # scores are about one by the number of experts
    for name, _, shape in asked_extras(config):
        normal = stream(seed, EXTRAS_STREAM, EXTRAS.index(name)).standard_normal(shape)
        if name.endswith("_scale"):
            values = 1 + normal / 4
        else:
            values = normal / (config.num_choices if small and name == "selection_bias" else 4)
        extras[name] = values.astype(config.accumulator)
    return extras
