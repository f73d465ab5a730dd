"""The machine that is simulated: one GPU kind, how many there are, and what joins them.

A `Hardware` is a frozen value without I/O, checked when it is made; `machine_files.py` reads and writes it.
Rates are GB/s (1e9 bytes), one direction, per GPU, or per link where GPUs share one; times are integer nanoseconds.
Every value says where it is from: a text that starts with "assumption:" is a guess with its reason, and no measurement
stands behind it.

Leaves out: several NICs per GPU, congestion in switches, clocks that fall under load; what a path crosses beside one
link at each end, such as a NIC and the root port behind it: take the narrower one, and as many GPUs as go through it.
Source: data/hardware.csv, data/nccl_nvshmem.csv and vendors' datasheets, as each file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reference.scalars import make_plain, plain

from .checks import check_keys, check_positive, check_text
from .machine_names import gpu_kind
from .machine_schema import MMA_TYPES, SOURCED, VALUES

COUNTS = ("num_nodes", "gpus_per_node", "gpus_per_link", "gpus_per_nic")
LEAST_RATE, MOST_WHOLE = 1e-6, 10**9  # so that times of whatever fits a GPU's memory fit 64 bits


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine. Change a value with `dataclasses.replace`, its text in `sources` with it.

    Args:
        name: what reports show beside simulated numbers.
        num_nodes, gpus_per_node: the GPUs of a node form one NVLink domain; nodes are joined by NICs.
        chip: the GPU kind whose fitted rates count (`drafting/rates.py`), by default the name without its numbers:
            a machine whose name or values are changed keeps it.
        node_link, network_link: what reports and traces call the links within a node and between nodes. Of one name
            they are one link, such as a root port with GPUs and a NIC behind it, and must be alike.
        gpus_per_link, gpus_per_nic: GPUs of a node that go through one link out and one in, such as a root port, and
            share its bandwidth; those beside each other share. Two of them that talk to each other use it as well.
        sms: streaming multiprocessors of a GPU.
        hbm_gbps, hbm_achieved: the datasheet's bandwidth, and the share in (0, 1] of it that streaming reaches.
        hbm_gb, l2_mb, l2_gbps: memory, second-level cache, and what all SMs together read from that cache.
        tflops: dense peak by MMA type, keys from `MMA_TYPES`; what the GPU cannot do is left out.
        clock_ghz: of its multiprocessors while they multiply; None if unknown. What is known of one GPU is taken for
            another by it (`drafting/rates.py`).
        nvlink_gbps, nvlink_latency_ns: of one link, achieved to all peers together; a small one-sided put.
        sm_write_gbps, sm_read_gbps: the most that one SM stores to peers and loads from them.
        nic_gbps, nic_latency_ns: of one NIC, achieved between nodes; a small put.
        core_gbps: what a core carries between nodes, where blocks have none beside theirs and so wait meanwhile: bytes
            over the time of cores at both ends, for all of which the sender's are taken. None: NICs read and write
            memory by themselves, as those of GPUs.
        flag_ns: from the store of a signal until a spinning reader on a peer has seen it.
        barrier_ns: a barrier over the GPUs of a node inside a kernel.
        launch_ns, graph_launch_ns: the host submits one kernel; the gap between two nodes of a CUDA graph.
        host_sync_ns: the host reads a value back, for instance the token counts.
        sources: where each value is from: one text per name in `VALUES` and per "tflops.<mma_type>".

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    name: str
    num_nodes: int
    gpus_per_node: int
    sms: int
    hbm_gbps: float
    hbm_achieved: float
    hbm_gb: float
    l2_mb: float
    l2_gbps: float
    tflops: Mapping[str, float] = field(hash=False)
    nvlink_gbps: float
    nvlink_latency_ns: int
    sm_write_gbps: float
    sm_read_gbps: float
    nic_gbps: float
    nic_latency_ns: int
    flag_ns: int
    launch_ns: int
    graph_launch_ns: int
    host_sync_ns: int
    barrier_ns: int
    sources: Mapping[str, str] = field(hash=False)
    chip: str = ""
    node_link: str = "NVLink"
    network_link: str = "NIC"
    gpus_per_link: int = 1
    gpus_per_nic: int = 1
    clock_ghz: float | None = None
    core_gbps: float | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if isinstance(self.tflops, Mapping):
            object.__setattr__(self, "tflops", {key: plain(value) for key, value in self.tflops.items()})
        check_text("name", self.name)
        if self.chip == "":
            object.__setattr__(self, "chip", gpu_kind(self.name))
        for name in (*COUNTS, *VALUES):
            whole = name in COUNTS or name == "sms" or name.endswith("_ns")
            _check_value(name, getattr(self, name), whole)
        if self.hbm_achieved > 1:
            raise ValueError(f"hbm_achieved must be a share in (0, 1], got {self.hbm_achieved}")
        for name in SOURCED:
            if getattr(self, name) is not None:
                _check_value(name, getattr(self, name))
        self._check_links()
        self._check_tflops()
        self._check_sources()

    def _check_links(self) -> None:
        for name in ("chip", "node_link", "network_link"):
            check_text(name, getattr(self, name))
        pairs = {"nic_gbps": "nvlink_gbps", "gpus_per_nic": "gpus_per_link"} if self.is_one_link else {}
        for name, other in pairs.items():
            mine, its = getattr(self, name), getattr(self, other)
            if mine != its:
                why = f"as network_link and node_link are one, {self.node_link!r}"
                raise ValueError(f"{name} must be {other}={its}, {why}; got {mine}")
        for name in ("gpus_per_link", "gpus_per_nic"):
            if self.gpus_per_node % getattr(self, name):
                raise ValueError(f"{name} must divide gpus_per_node={self.gpus_per_node}, got {getattr(self, name)}")

    def _check_tflops(self) -> None:
        if not isinstance(self.tflops, Mapping):
            raise TypeError(f"tflops must be a mapping from MMA types to TFLOPS, got {self.tflops!r}")
        if not self.tflops:
            raise ValueError(f"tflops must have at least one of {', '.join(MMA_TYPES)}, got none")
        for mma_type, value in self.tflops.items():
            if mma_type not in MMA_TYPES:
                raise ValueError(f"tflops must have keys from {', '.join(MMA_TYPES)}; got {mma_type!r}")
            _check_value(f"tflops.{mma_type}", value)

    def _check_sources(self) -> None:
        if not isinstance(self.sources, Mapping):
            raise TypeError(f"sources must be a mapping from value to text, got {self.sources!r}")
        known = [name for name in SOURCED if getattr(self, name) is not None]
        check_keys("sources", self.sources, (*VALUES, *known, *(f"tflops.{mma_type}" for mma_type in self.tflops)))
        for name, text in self.sources.items():
            check_text(f"sources of {name}", text)

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def is_one_link(self) -> bool:
        """Whether what leaves a node goes through the same links as what stays in it."""
        return self.node_link == self.network_link

    @property
    def nvlink_share_gbps(self) -> float:
        """What a GPU has of its link within the node when all use theirs."""
        return self.nvlink_gbps / self.gpus_per_link

    @property
    def nic_share_gbps(self) -> float:
        """What a GPU has of its NIC when all use theirs."""
        return self.nic_gbps / self.gpus_per_nic


def _check_value(name: str, value: float, whole: bool = False) -> None:
    check_positive(name, value, whole)
    if not whole and value < LEAST_RATE:
        raise ValueError(f"{name} must be at least {LEAST_RATE:g}, got {value}")
    if whole and value > MOST_WHOLE:
        raise ValueError(f"{name} must be at most {MOST_WHOLE}, got {value}")
