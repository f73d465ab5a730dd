"""What a layer is asked to be, and what is wrong with that, said before any rank starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from reference import MoEConfig, Weights
from reference.layout import SAVES
from reference.runs import PACKINGS
from reference.scalars import check_name, make_plain, number, plain, whole

from ..backends import check_backend
from ..heap.protocols import Heap
from ..kernel.signals import ROWS_MASK
from ..processes.meeting import SETUP_DEADLINE_S, argument_of
from ..processes.mpi_environment import why_alone
from ..tile_gemm.arithmetic import AUTO, choose

DEADLINE_S = 30.0
MOST_PROCESSORS = 512  # threads of one rank: with thousands, most never get to run


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Arguments of a layer as its user gave them (see `FlashMoE`), of which any may be wrong until `check` was called.

    `backend` is None where it is no name but an object.
    """

    config: MoEConfig
    weights: Weights
    comm: Any = None
    backend: str | None = None
    backend_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_processors: int | None = None
    deadline_s: float = DEADLINE_S
    setup_deadline_s: float = SETUP_DEADLINE_S
    trace: bool = False
    packing: str = PACKINGS[0]
    save: str | None = None

    def __post_init__(self) -> None:
        """NumPy's scalars are numbers, too."""
        make_plain(self)
        settings = {name: plain(value) for name, value in self.backend_settings.items()}
        object.__setattr__(self, "backend_settings", settings)

    def check(self, heap: Heap | None = None) -> None:
        """Find out what a layer can know to be wrong before it takes memory.

        Args:
            heap: the one that the user gave, or that was made for these settings.

        Raises:
            TypeError, ValueError: naming the argument, its value and the rule.
        """
        if not isinstance(self.config, MoEConfig):
            raise TypeError(f"config must be a MoEConfig, got {type(self.config).__name__}")
        if not isinstance(self.weights, Weights):
            raise TypeError(f"weights must be Weights, got {type(self.weights).__name__}")
        self.weights.check(self.config)
        if self.config.slots > ROWS_MASK:
            name = "num_tokens" if self.config.capacity is None else "capacity"
            rule = f"config.{name} must be at most {ROWS_MASK}, which is what the signal of a packet can count"
            raise ValueError(f"{rule}, got {self.config.slots}")
        if self.config.router_kind.norm_order not in (1, 2):
            rule = "config.router must have norm_order 1 or 2: kernels have no powers"
            raise ValueError(f"{rule}, got {self.config.router_kind.norm_order}")
        if self.backend is not None:
            check_backend(self.backend, self.backend_settings)
        self._arithmetic()
        if self.num_processors is not None:
            _check_processors(self.num_processors)
        check_flags(trace=self.trace)
        check_name("packing", self.packing, PACKINGS)
        if self.save is not None:
            check_name("save", self.save, SAVES)
        _check_seconds("deadline_s", self.deadline_s)
        _check_seconds("setup_deadline_s", self.setup_deadline_s)
        self._check_comm()
        if heap is not None and heap.num_ranks != self.config.num_ranks:
            raise ValueError(f"heap must have config.num_ranks={self.config.num_ranks} ranks, got {heap.num_ranks}")
        for rank_idx in range(self.config.num_ranks) if self.comm is None else [self.comm.rank]:
            self.weights.shard(rank_idx, self.config.num_ranks)  # raises if its experts are not there

    def _check_comm(self) -> None:
        if self.comm is None:
            return
        if self.backend == "fibers":
            raise ValueError(f"backend 'fibers' runs all ranks in this process: leave {argument_of(self.comm)} out")
        if self.comm.size != self.config.num_ranks:
            name = argument_of(self.comm)
            hint = why_alone(self.config.num_ranks) if self.comm.size == 1 and name == "comm" else ""
            rule = f"{name} must have config.num_ranks={self.config.num_ranks} ranks"
            raise ValueError(f"{rule}, got {self.comm.size}{hint}")

    def patience_s(self) -> float:
        """`setup_deadline_s`, or the default where it is wrong: the other ranks must hear of that, too."""
        try:
            _check_seconds("setup_deadline_s", self.setup_deadline_s)
        except (TypeError, ValueError):
            return SETUP_DEADLINE_S
        return float(self.setup_deadline_s)

    def shared(self) -> dict[str, Any]:
        """What must not differ between ranks, by name; after `check`."""
        sizes = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        multiplied = {"tf32": self.backend_settings.get("tf32", False), "arithmetic": self._arithmetic()}
        return sizes | {"backend": self.backend, "save": self.save} | multiplied

    def _arithmetic(self) -> str | None:
        """The one that this process uses; None where CPUs do not multiply."""
        if self.backend != "cpu":
            return None
        return choose(self.backend_settings.get("arithmetic", AUTO), self.config.dtype)


def check_flags(**flags: Any) -> None:
    """Nothing, if all are True or False; else a TypeError that names the argument."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def communicator(comm: Any, process_group: Any) -> Any:
    """What a layer's ranks meet by, whichever of the two was given; None: neither.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    if process_group is not None:
        if comm is not None:
            raise ValueError(f"comm must be None where process_group is given, got {type(comm).__name__}")
        from ..processes.process_group import GroupCommunicator

        return GroupCommunicator(process_group)
    if comm is not None and not hasattr(comm, "Idup"):
        raise TypeError(f"comm must be an mpi4py communicator or None, got {type(comm).__name__}")
    return comm


def _check_processors(wanted: int) -> None:
    if not 1 <= whole("num_processors", wanted) <= MOST_PROCESSORS:
        raise ValueError(f"num_processors must be in [1, {MOST_PROCESSORS}], got {wanted}")


def _check_seconds(name: str, value: Any) -> None:
    if not 0 < number(name, value) <= 86400:
        raise ValueError(f"{name} must be in (0, 86400], got {value}")
