"""What can be changed about a schedule: the knobs that every policy has, and the rules for those that it adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, ClassVar, Self, get_args, get_type_hints

from reference.scalars import check_one_of, make_plain

from ..world.world import World

MOST = 2**31 - 1  # of a whole number: what a graph's counts hold, and 2 s as a time

_hints: Callable[[type], dict[str, Any]] = cache(get_type_hints)  # which evaluates every annotation anew


@dataclass(frozen=True, kw_only=True)
class PolicyKnobs:
    """Knobs of every policy; each policy adds its own.

    Args:
        rate: share of the tensor peak that tiles reach; None: the fitted one of this policy on this GPU. Default:
            fitted to published tables; where nobody measured the policy 0.6, an assumption.
        tile_latency_ns: fixed part of a tile, for filling and draining its pipeline. Default: assumption.
        token_block: tokens per gate task and per combine task. Default: assumption: what this project's kernel has, for
            all.

    Raises:
        TypeError, ValueError: naming the knob, its value and the rule.
    """

    rate: float | None = None
    tile_latency_ns: int = 1000
    token_block: int = 32

    choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # of knobs that are words

    def __post_init__(self) -> None:
        make_plain(self)
        for name, value in vars(self).items():
            self._check_type(name, value)
            if name in self.choices and value is not None:
                check_one_of(name, value, self.choices[name])
            least = 0 if name.endswith("_ns") else 1
            if type(value) is int and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if type(value) is int and value > MOST:
                raise ValueError(f"{name} must be at most {MOST}, got {value}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate}")

    def in_world(self, world: World) -> Self:
        """The same, with what a policy chooses by the layer chosen, so that results can say it; most leave nothing."""
        return self

    def _check_type(self, name: str, value: object) -> None:
        kind = _hints(type(self))[name]
        kinds = get_args(kind) or (kind,)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            nouns = " or ".join(option.__name__ for option in kinds if option is not NoneType)
            raise TypeError(f"{name} must be of type {nouns}, got {value!r}")
