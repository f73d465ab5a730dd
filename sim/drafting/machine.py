"""The resources that schedules share out: SM slots, OS block, host and links of every rank, and the path between two.

Links: within a node NVLink's way out of one GPU and into another, between nodes those of their NICs; GPUs beside each
other may share them, and both kinds may be one. The switches in between are taken as non-blocking. Leaves out: rails
that cross nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import NONE, Array, GraphBuilder
from ..world.world import World

SM_SLOTS, OS_BLOCK, HOST = "SM slots", "OS block", "host"  # names by which reports know them


@dataclass(frozen=True, eq=False)
class Machine:
    """Indices `[num_ranks]` of servers and links in a builder; made by `add_machine`."""

    world: World
    sm: Array
    os: Array
    host: Array
    nvlink_out: Array
    nvlink_in: Array
    nic_out: Array
    nic_in: Array

    def path(self, source: ArrayLike, target: ArrayLike) -> dict[str, Array]:
        """The fields of a node whose bytes and signal go from `source` to `target`: nothing at all within a rank."""
        source, target = np.broadcast_arrays(np.asarray(source), np.asarray(target))
        hardware = self.world.hardware
        here = source == target
        near = source // hardware.gpus_per_node == target // hardware.gpus_per_node
        latency = np.where(near, hardware.nvlink_latency_ns, hardware.nic_latency_ns)
        return {
            "egress": np.where(here, NONE, np.where(near, self.nvlink_out[source], self.nic_out[source])),
            "ingress": np.where(here, NONE, np.where(near, self.nvlink_in[target], self.nic_in[target])),
            "latency_ns": np.where(here, 0, latency + hardware.flag_ns),
        }

    def transfer(self, source: ArrayLike, target: ArrayLike, nbytes: ArrayLike) -> dict[str, Array]:
        """`path` with the bytes on it, which is none within a rank."""
        path = self.path(source, target)
        return path | {"nbytes": np.where(path["egress"] == NONE, 0, np.ceil(np.asarray(nbytes)).astype(np.int64))}

    def carried_ns(self, source: ArrayLike, target: ArrayLike, nbytes: ArrayLike) -> Array:
        """What cores take to carry bytes between nodes: nothing within one, or where NICs do it by themselves."""
        hardware = self.world.hardware
        far = np.asarray(source) // hardware.gpus_per_node != np.asarray(target) // hardware.gpus_per_node
        ns_per_byte = 0.0 if hardware.core_gbps is None else 1 / hardware.core_gbps
        time: Array = np.ceil(far * np.asarray(nbytes) * ns_per_byte).astype(np.int64)
        return time


def link_names(name: str) -> tuple[str, str]:
    """What links of this kind are called: those out of a GPU, and those into it."""
    return f"{name} out", f"{name} in"


def add_machine(builder: GraphBuilder, world: World, sm_slots: int) -> Machine:
    """All resources of a world; `sm_slots` tasks run on a GPU's multiprocessors at a time."""
    hardware, ranks = world.hardware, range(world.num_ranks)

    def servers(name: str, slots: int) -> Array:
        return np.array([builder.add_server(name, rank, slots) for rank in ranks])

    def links(name: str, gbps: float, shared_by: int) -> Array:
        made = [builder.add_link(name, rank, gbps, num_ranks=shared_by) for rank in ranks[::shared_by]]
        return np.repeat(made, shared_by)[: world.num_ranks]

    near = [links(name, hardware.nvlink_gbps, hardware.gpus_per_link) for name in link_names(hardware.node_link)]
    far = near
    if not hardware.is_one_link:
        far = [links(name, hardware.nic_gbps, hardware.gpus_per_nic) for name in link_names(hardware.network_link)]
    return Machine(
        world,
        sm=servers(SM_SLOTS, sm_slots),
        os=servers(OS_BLOCK, 1),
        host=servers(HOST, 1),
        nvlink_out=near[0],
        nvlink_in=near[1],
        nic_out=far[0],
        nic_in=far[1],
    )
