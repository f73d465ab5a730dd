"""One simulation of a sweep, as a value of numbers and names that a line of a file can hold.

What came later than the first files (`LATER`) is part of a point's key only where it is not as it was, so that rows
which were there before stay the rows of their points.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from reference import load_preset
from reference.config import expert_capacity

from ..drafting.knobs import PolicyKnobs
from ..policies import make_knobs, row_tile
from ..policies.outside import is_file
from ..world.machine_files import load_hardware
from ..world.machine_names import hardware_file
from ..world.recorded import is_recorded, recorded_path
from ..world.scenario import Scenario
from ..world.world import FORWARD, World

SIZES = {"tokens": "num_tokens", "experts": "num_experts", "topk": "num_topk", "hidden": "hidden", "ffn": "ffn"}
DEFAULTS: dict[str, Any] = {"routing": "uniform", "capacity_factor": None, "precision": "bfloat16", "seed": 0}
LATER: dict[str, Any] = {"seeds": 1, "layer": None, "replicas": None, "rounding": None, "terms": "system"}
LATER |= {"passes": FORWARD, "capacity": None}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One simulation's parameters, all as numbers and names that a file can hold.

    Args:
        tokens: of each rank.
        capacity_factor: the most rows from one source to one expert are this many times
            `ceil(tokens / experts) * topk`.
        capacity: the most rows from one source to one expert; at most one of the two is given, and without both nothing
            is dropped, whatever the preset says.
        seed, seeds: of the routing; of several from `seed` on, the row is that of the median, with the spread.
        layer: of a recorded routing.
        replicas: copies of busy experts, all placed by load; None: experts in blocks.
        rounding: of each expert's rows to the policy's row tile, one of `rounding.WAYS`.
        terms: one of `policies.TERMS`.
        passes: one of `world.PASSES`.
        knobs: those that differ from the policy's defaults on these terms.
    """

    policy: str
    hardware: str
    preset: str
    tokens: int
    experts: int
    topk: int
    hidden: int
    ffn: int
    gated: bool
    routing: str
    capacity_factor: float | None
    precision: str
    seed: int
    seeds: int
    layer: int | None
    replicas: int | None
    rounding: str | None
    terms: str
    passes: str
    capacity: int | None
    knobs: dict[str, Any] = field(hash=False)

    @cached_property
    def key(self) -> str:
        """The same for the same parameters, on every machine; those that are files count by what they hold."""
        told = {name: value for name, value in asdict(self).items() if name not in LATER or value != LATER[name]}
        text = json.dumps(told, sort_keys=True).encode()
        return hashlib.sha256(text + b"".join(map(_digest, self._files()))).hexdigest()[:16]

    def _files(self) -> list[Path]:
        """The files that parameters name, where they are there."""
        machine = hardware_file(self.hardware)
        named = [Path(self.policy)] if is_file(self.policy) else []
        named += [recorded_path(self.routing)] if is_recorded(self.routing) else []
        named += [machine] if machine else []
        return [path for path in named if path.is_file()]

    def row(self) -> dict[str, Any]:
        """What a line of a sweep's file begins with."""
        return {"key": self.key, "ranks": load_hardware(self.hardware).num_gpus, **asdict(self)}

    def policy_knobs(self) -> PolicyKnobs:
        """All knobs of the policy."""
        return make_knobs(self.policy, self.knobs, self.terms)

    def world(self, seed: int | None = None) -> World:
        """Where the policy runs, with this seed or its own.

        Raises:
            ValueError: an impossible combination.
        """
        hardware = load_hardware(self.hardware)
        sizes = {name: getattr(self, axis) for axis, name in SIZES.items()}
        sizes |= {"num_ranks": hardware.num_gpus, "gated": self.gated, "capacity": self.capacity}
        config = load_preset(self.preset, **sizes)
        if self.capacity_factor is not None:
            config = replace(config, capacity=expert_capacity(config, self.capacity_factor))
        scenario = Scenario(
            config=config,
            hardware=hardware,
            precision=self.precision,
            routing=self.routing,
            seed=self.seed if seed is None else seed,
            layer=self.layer,
            round_to=row_tile(self.policy, self.policy_knobs()) if self.rounding else None,
            round_how=self.rounding or "nearest",
            replicas=self.replicas,
            passes=self.passes,
        )
        return scenario.make()


def _digest(path: Path) -> bytes:
    """Of what a file holds, read again only if it was written since."""
    state = path.stat()
    return _digest_of(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _digest_of(path: Path, *_: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
