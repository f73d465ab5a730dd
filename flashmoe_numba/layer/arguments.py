"""What is wrong with the arguments of a layer, said before any rank starts."""

from __future__ import annotations

from typing import Any

from reference import MoEConfig, Weights
from reference.scalars import number, whole

from ..backends import check_backend
from ..processes.meeting import SETUP_DEADLINE_S
from ..processes.mpi_environment import why_alone

MOST_PROCESSORS = 512  # threads of one rank: with thousands, most never get to run


def _check_arguments(
    config: Any,
    weights: Any,
    comm: Any,
    backend: str,
    backend_settings: dict[str, Any],
    num_processors: int | None,
    deadline_s: float,
    setup_deadline_s: float,
    trace: bool,
) -> None:
    """What a layer can know to be wrong before it takes memory."""
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}")
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be Weights, got {type(weights).__name__}")
    weights.check(config)
    check_backend(backend, backend_settings)
    if num_processors is not None and not 1 <= whole("num_processors", num_processors) <= MOST_PROCESSORS:
        raise ValueError(f"num_processors must be in [1, {MOST_PROCESSORS}], got {num_processors}")
    if not isinstance(trace, bool):
        raise TypeError(f"trace must be True or False, got {trace!r}")
    _check_seconds("deadline_s", deadline_s)
    _check_seconds("setup_deadline_s", setup_deadline_s)
    if comm is not None and backend == "fibers":
        raise ValueError("backend 'fibers' runs all ranks in this process: leave comm out")
    if comm is not None and comm.size != config.num_ranks:
        hint = why_alone(config.num_ranks) if comm.size == 1 else ""
        raise ValueError(f"comm must have config.num_ranks={config.num_ranks} ranks, got {comm.size}{hint}")
    for rank_idx in range(config.num_ranks) if comm is None else [comm.rank]:
        weights.shard(rank_idx, config.num_ranks)  # raises if its experts are not there


def _check_seconds(name: str, value: Any) -> None:
    if not 0 < number(name, value) <= 86400:
        raise ValueError(f"{name} must be in (0, 86400], got {value}")


def patience_s(setup_deadline_s: Any) -> float:
    """It, or the default where it is wrong: the other ranks must hear of that, too."""
    try:
        _check_seconds("setup_deadline_s", setup_deadline_s)
    except (TypeError, ValueError):
        return SETUP_DEADLINE_S
    return float(setup_deadline_s)


def find_problem(
    config: Any,
    weights: Any,
    comm: Any,
    backend: str,
    backend_settings: dict[str, Any],
    num_processors: int | None,
    deadline_s: float,
    setup_deadline_s: float,
    trace: bool,
) -> Exception | None:
    """The error that a layer should raise for these arguments; None if there is none.

    Returned and not raised, because under MPI the other ranks must hear of it first.
    """
    try:
        _check_arguments(
            config, weights, comm, backend, backend_settings, num_processors, deadline_s, setup_deadline_s, trace
        )
    except Exception as error:
        return error
    return None
