"""A simulated world as one value of names and numbers, which a file, flags and tables can hold; and how it is made.

Everything that simulates makes its worlds here, so sizes are checked before a routing is made of more rows than fit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from reference import MoEConfig
from reference.scalars import check_one_of

from .hardware import Hardware
from .machine_files import load_hardware
from .placement import balance
from .precision import Precision, precision
from .rounding import WAYS, round_tokens
from .routing import SimRouting, make_routing
from .world import FORWARD, PARTS, World, check_sent_rows

Blame = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What a `World` is made of: each part by its name, or the part itself.

    Args:
        seed: of the routing, where it is drawn, and of its rounding.
        layer: of a recorded routing that has several.
        round_to: round each expert's rows to a multiple of it, `round_how` (one of `rounding.WAYS`); None: do not.
        replicas: copies of busy experts, which are placed by load (`placement.balance`); None: experts stay in blocks.
        passes: one of `world.PASSES`.

    Raises:
        TypeError: a part is of another kind; ValueError: `round_how` is no way.
    """

    config: MoEConfig
    hardware: str | Hardware
    precision: str | Precision
    routing: str | SimRouting = "uniform"
    seed: int = 0
    layer: int | None = None
    round_to: int | None = None
    round_how: str = "nearest"
    replicas: int | None = None
    passes: str = FORWARD

    def __post_init__(self) -> None:
        for name, kind in PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, kind if name == "config" else (str, kind)):
                by_name = "" if name == "config" else "a name, or "
                raise TypeError(f"{name} must be {by_name}of type {kind.__name__}, got {value!r}")
        check_one_of("round_how", self.round_how, WAYS)

    def make(self, blame: Blame = lambda part: nullcontext()) -> World:
        """The world.

        Args:
            blame: a context manager for each part ("hardware", "precision", "tokens", "routing", "rounding",
                "replicas", "layer") in which it is made, so that errors can be told of whatever named the part.

        Raises:
            TypeError, ValueError, FileNotFoundError: a part does not exist, or they do not go together.
        """
        with blame("hardware"):
            hardware = load_hardware(self.hardware) if isinstance(self.hardware, str) else self.hardware
        with blame("precision"):
            formats = precision(self.precision) if isinstance(self.precision, str) else self.precision
        with blame("tokens"):
            check_sent_rows(self.config, hardware, formats)
        routing = self._make_routing(blame)
        with blame("layer"):
            return World(config=self.config, hardware=hardware, routing=routing, precision=formats, passes=self.passes)

    def _make_routing(self, blame: Blame) -> SimRouting:
        with blame("routing"):
            routing = self.routing
            made = make_routing(routing, self.config, self.seed, self.layer) if isinstance(routing, str) else routing
        if self.round_to is not None:
            with blame("rounding"):
                made = round_tokens(made, self.round_to, self.round_how, self.seed)
        if self.replicas is not None:
            with blame("replicas"):
                made = balance(made, self.replicas)
        return made
