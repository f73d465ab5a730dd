"""What a schedule is asked to do, and where: sizes, routing, number formats, hardware. All policies get the same.

Invariant: a world that exists fits: ranks in the machine, weights and rows in its memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from reference import MoEConfig
from reference.arrays import Array
from reference.scalars import check_one_of

from .hardware import Hardware
from .precision import SIZES, Precision
from .routing import SimRouting

FORWARD, BACKWARD, TRAINING = PASSES = ("forward", "backward", "training")
FORWARDS = {FORWARD: 1, BACKWARD: 2, TRAINING: 3}  # operations, over a forward's
PARTS = {"config": MoEConfig, "hardware": Hardware, "routing": SimRouting, "precision": Precision}


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """One layer call on one machine.

    Args:
        config: the sizes. Its `dtype`, `capacity` and tile sizes are not looked at: `precision`, `routing` and the
            policy's knobs say those.
        routing: may have more experts than `config`, if it has copies of some.
        passes: one of `PASSES`: a "forward"; its "backward", which knows the routing; or "training", a forward, its
            backward, and the sum over ranks of the gradients of what all ranks have, the router and the shared expert.

    Raises:
        TypeError: a part is of another kind; ValueError: they do not go together, or the machine's memory cannot hold
            them.
    """

    config: MoEConfig
    hardware: Hardware
    routing: SimRouting
    precision: Precision
    passes: str = FORWARD

    def __post_init__(self) -> None:
        check_one_of("passes", self.passes, PASSES)
        for name, kind in PARTS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be of type {kind.__name__}, got {getattr(self, name)!r}")
        ranks, gpus = self.config.num_ranks, self.hardware.num_gpus
        if ranks > gpus:
            raise ValueError(f"num_ranks must be at most the {gpus} GPUs of hardware {self.hardware.name}, got {ranks}")
        for name in ("num_ranks", "num_tokens", "num_experts"):
            asked, got = getattr(self.config, name), getattr(self.routing, name)
            fits = got >= asked if name == "num_experts" else got == asked
            if not fits:
                raise ValueError(f"routing must be for {name}={asked}, got one for {got}")
        if self.precision.mma_type not in self.hardware.tflops:
            known = ", ".join(self.hardware.tflops)
            raise ValueError(f"precision {self.precision.name} computes in {self.precision.mma_type}, "
                             f"which {self.hardware.name} has no rate for; it has {known}")  # fmt: skip
        self._check_formats()
        missing = self.memory_bytes - self.hardware.hbm_gb * 1e9
        if missing > 0:
            raise ValueError(
                f"the busiest rank needs {self.memory_bytes / 1e9:.1f} GB (weights {self.weight_bytes / 1e9:.1f}, rows "
                f"{self.row_bytes / 1e9:.1f}), {missing / 1e9:.1f} GB more than the {self.hardware.hbm_gb:g} GB of "
                f"{self.hardware.name}: take more ranks, fewer tokens or a smaller precision"
            )

    def _check_formats(self) -> None:
        formats = {getattr(self.precision, size) for size in SIZES}
        if self.passes != FORWARD and len(formats) > 1:
            rule = f"passes must be {FORWARD} with precision {self.precision.name}, of more than one format"
            raise ValueError(f"{rule}: what its gradients travel in is not modelled; got {self.passes}")

    @property
    def directions(self) -> tuple[str, ...]:
        """The passes one by one."""
        return (FORWARD, BACKWARD) if self.passes == TRAINING else (self.passes,)

    @property
    def num_ranks(self) -> int:
        return self.config.num_ranks

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks fill, the last one maybe in part."""
        return -(-self.num_ranks // self.hardware.gpus_per_node)

    @property
    def up_columns(self) -> int:
        """Columns of the first product: gate and up of a gated expert."""
        return self.config.ffn * self.config.expert_kind.num_ups

    @property
    def experts_per_rank(self) -> int:
        return self.routing.num_experts // self.num_ranks

    @cached_property
    def rows(self) -> Array:
        """`[num_ranks]`, rows that each rank's experts get."""
        rows: Array = self.traffic.sum(axis=0)
        return rows

    @property
    def active_experts(self) -> Array:
        """`[num_ranks]`: experts of each rank that have rows, whose weights must be read."""
        with_rows = self.routing.counts.sum(axis=0) > 0
        return np.bincount(self.routing.owner[with_rows], minlength=self.num_ranks)

    @property
    def weight_bytes(self) -> int:
        """Of one rank's experts, the shared one among them."""
        config = self.config
        columns = config.ffn * self.experts_per_rank + config.shared_ffn
        elements = config.hidden * columns * config.expert_kind.num_matrices
        return int(elements * self.precision.weight_bytes)

    @property
    def row_bytes(self) -> int:
        """What the busiest rank holds of tokens and results, sent and received, and between the two products.

        For a backward also of received rows the tokens, of which gradients of weights are made, and the gradients of
        the first products.

        No policy needs less; those that reserve the worst case need more, which `reference.make_plan` tells.
        """
        precision, config = self.precision, self.config
        sent = int(self.routing.counts.sum(axis=1).max(initial=0))  # not num_topk each: choices are dropped and added
        per_row = config.hidden * (precision.token_bytes + precision.result_bytes)
        received = int(self.rows.max(initial=0))
        shared = self.routing.num_tokens * config.shared_ffn * precision.hidden_bytes
        if config.shared_ffn:
            shared += self.routing.num_tokens * config.hidden * precision.result_bytes
        if self.passes != FORWARD:
            shared += received * (config.hidden + self.up_columns) * precision.token_bytes
        return int((sent + received) * per_row + received * config.ffn * precision.hidden_bytes + shared)

    @property
    def memory_bytes(self) -> int:
        gradients = 0 if self.passes == FORWARD else self.weight_bytes  # in no narrower format than the weights
        return self.weight_bytes + gradients + self.row_bytes

    @cached_property
    def traffic(self) -> Array:
        """`[num_ranks, num_ranks]`, rows from each source to each owner."""
        return self.routing.traffic(self.routing.counts)

    @property
    def dispatch_bytes(self) -> Array:
        """`[num_ranks, num_ranks]`, of rows from each source to each owner."""
        result: Array = self.traffic * self.config.hidden * self.precision.token_bytes
        return result

    @property
    def combine_bytes(self) -> Array:
        """`[num_ranks, num_ranks]`, of results from each owner to each source."""
        result: Array = self.traffic.T * self.config.hidden * self.precision.result_bytes
        return result


def check_sent_rows(config: MoEConfig, hardware: Hardware, precision: Precision) -> None:
    """Nothing, if a GPU can hold the rows that it sends; known before a routing is made of more than fits this machine.

    Raises:
        ValueError: naming what is needed and what there is.
    """
    row = config.hidden * (precision.token_bytes + precision.result_bytes)
    needed = config.num_tokens * config.num_topk * row / 1e9
    if needed > hardware.hbm_gb:
        there = f"and {hardware.name} has {hardware.hbm_gb:g} GB: take fewer"
        raise ValueError(f"the rows that a rank sends need {needed:,.1f} GB, {there}")
