"""Which functions get mutants, and which tests must notice: cheap ones first, and those that compile kernels last.

Tests of planted bugs are left out: an edit at a line that a plant quotes would break them without being noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Stage(NamedTuple):
    """Tests that one process runs in this order, and how long it may compile for them, beyond what they take else."""

    compile_s: int
    tests: str


UNIT, PROPERTY, EXPLORE = "tests/unit/kernel", "tests/property", "tests/unit/explore"

OF_EACH_TYPE = "test_a_closed_layer_stays_closed_after_a_fault"

INTERPRETED = Stage(
    0,
    "tests/quality/test_planted_bugs.py::test_the_kernel_itself_passes "
    "tests/quality/test_explorer.py::test_the_kernel_itself_passes "
    f"{UNIT}/test_tasks.py {UNIT}/test_waits.py {UNIT}/test_giving_up.py {UNIT}/test_fibers.py "
    f"{EXPLORE}/test_deadlines.py {PROPERTY}/test_layer.py::test_kernel_on_fibers_equals_the_oracle "
    f"{PROPERTY}/test_layer_epochs.py::test_ranks_run_ahead_on_fibers {PROPERTY}/test_explored_worlds.py",
)
GRIDS = Stage(0, f"{EXPLORE}/test_explore.py {UNIT}/test_grid.py {UNIT}/test_gpu_calls.py")
COMPILED = Stage(  # for one element type: the others differ in products, not in the protocol
    90,
    f"{UNIT}/test_gate_and_tasks.py {UNIT}/test_faults.py {UNIT}/test_late_source.py tests/unit/test_trace.py "
    + " ".join(f"--deselect={UNIT}/test_faults.py::{OF_EACH_TYPE}[{dtype}]" for dtype in ("float64", "bfloat16")),
)
PRODUCTS = Stage(
    180,
    f"{UNIT}/test_tile_gemm.py {UNIT}/test_micro_kernels.py {UNIT}/test_guard_pages.py {UNIT}/test_arithmetics.py",
)
HOSTS = Stage(0, f"{UNIT}/test_puts.py {PROPERTY}/test_pretended_hosts.py {EXPLORE}/test_hosts_explored.py")
CARRIERS = Stage(
    0,
    f"{UNIT}/test_carrier.py {UNIT}/test_carrier_messages.py tests/unit/test_hosts_heap.py "
    "tests/mpi/test_carrier_mpi.py tests/mpi/test_hosts_mpi.py",
)
NETWORK_HEAP = Stage(0, f"tests/unit/test_nvshmem_heap.py {UNIT}/test_gpu_hosts.py")
BACKWARDS = Stage(
    0,
    f"{UNIT}/test_backward_tasks.py {UNIT}/test_backward_calls.py {EXPLORE}/test_programs.py "
    f"{PROPERTY}/test_layer_backward.py::test_gradients_on_fibers_equal_the_reference "
    f"{PROPERTY}/test_layer_backward.py::test_gradients_of_any_kind_on_fibers_equal_the_reference "
    f"{PROPERTY}/test_layer_backward.py::test_gradients_of_every_type_on_fibers_are_within_the_derived_bounds "
    f"{PROPERTY}/test_backward_invariance.py::test_fibers_give_the_same_gradients_in_every_interleaving "
    f"{PROPERTY}/test_explored_worlds.py::test_backwards_are_clean_and_have_the_same_bits_under_every_schedule "
    "tests/quality/test_barriers_of_backwards.py::test_with_all_barriers_there_is_nothing_to_find",
)
NORMS = Stage(90, f"{UNIT}/test_norm_backward.py")
GPUS = Stage(
    0,
    f"{UNIT}/test_gpu_calls.py {UNIT}/test_gpu_backward.py {UNIT}/test_grid.py {UNIT}/test_gpu_hosts.py "
    "tests/unit/ptx/test_layer_without_gpu.py tests/unit/ptx/test_run_without_gpu.py",
)
SUMS = Stage(0, f"{UNIT}/test_gradient_memory.py")
ROUTERS_BACK = Stage(30, f"{UNIT}/test_router_gradient.py {UNIT}/test_router_gradient_limits.py")
GRADIENTS = Stage(120, f"{UNIT}/test_weight_gradient.py {UNIT}/test_hidden_gradient.py")
VERBS = Stage(30, f"{UNIT}/test_device_verbs.py {UNIT}/test_float_control.py")
LAYERS = Stage(
    0,
    f"{UNIT}/test_arguments.py {UNIT}/test_closing.py {UNIT}/test_ownership.py tests/unit/test_meeting.py "
    f"{UNIT}/test_range.py {UNIT}/test_gate_and_tasks.py {UNIT}/test_gpu_calls.py tests/unit/test_gpu_heap.py "
    f"tests/unit/test_gpu_host.py tests/unit/test_trace.py "
    f"{PROPERTY}/test_layer.py::test_kernel_on_fibers_equals_the_oracle",
)
KEPT = Stage(
    0,
    f"{UNIT}/test_backward_calls.py {UNIT}/test_packed_weights.py {UNIT}/test_loaded_layers.py "
    f"{UNIT}/test_closed_layers.py {UNIT}/test_gradient_memory.py {UNIT}/test_backward_tasks.py "
    f"{UNIT}/test_gpu_backward.py",
)
TRAINED = Stage(0, "tests/mpi/test_training_mpi.py")
PROCESSES = Stage(
    0,
    f"{UNIT}/test_faults.py {UNIT}/test_lost_ranks.py tests/mpi/test_layer_mpi.py tests/mpi/test_small_memory.py",
)
STARTS = Stage(
    0,
    "tests/unit/test_cores.py tests/unit/test_netmod.py tests/unit/test_relay.py tests/unit/test_ending.py "
    "tests/unit/test_words_between_ranks.py tests/unit/test_launch.py tests/unit/test_destinations.py "
    "tests/unit/test_shared_memory.py tests/unit/test_mpi_environment.py",
)
ENDS = Stage(0, "tests/mpi/test_cli_mpi.py")
SPREAD = Stage(0, "tests/unit/test_spread.py tests/unit/test_launch.py tests/mpi/test_spread_mpi.py")
ENGINES = Stage(30, "tests/unit/sim/test_engine.py")
SIMULATOR = Stage(
    30,
    "tests/unit/sim/test_policies_flashmoe.py tests/unit/sim/test_policies_all.py tests/unit/sim/test_report.py "
    "tests/unit/sim/test_explain.py",
)

SUITES = {
    "flashmoe_numba/kernel/*.py": [INTERPRETED, COMPILED],
    "flashmoe_numba/kernel/backward/*.py": [BACKWARDS],
    "flashmoe_numba/kernel/backward/grid.py": [GPUS],
    "flashmoe_numba/kernel/backward/norm.py": [BACKWARDS, NORMS],
    "flashmoe_numba/kernel/carried.py": [CARRIERS],
    "flashmoe_numba/kernel/grid.py": [GRIDS],
    "flashmoe_numba/kernel/network.py": [HOSTS],
    "flashmoe_numba/kernel/peers.py": [INTERPRETED, HOSTS, COMPILED],
    "flashmoe_numba/kernel/router_gradient.py": [ROUTERS_BACK],
    "flashmoe_numba/kernel/slopes.py": [ROUTERS_BACK],
    "flashmoe_numba/kernel/weights.py": [BACKWARDS],
    "flashmoe_numba/kernel/wire.py": [HOSTS],
    "flashmoe_numba/heap/*.py": [LAYERS, PROCESSES],
    "flashmoe_numba/heap/carrier*.py": [CARRIERS],
    "flashmoe_numba/heap/hosts.py": [CARRIERS],
    "flashmoe_numba/heap/messages.py": [CARRIERS],
    "flashmoe_numba/heap/nvshmem.py": [NETWORK_HEAP],
    "flashmoe_numba/heap/sums.py": [SUMS],
    "flashmoe_numba/layer/*.py": [LAYERS, KEPT, PROCESSES],
    "flashmoe_numba/layer/backward.py": [KEPT, TRAINED],
    "flashmoe_numba/layer/gradients.py": [KEPT, TRAINED],
    "flashmoe_numba/layer/packed.py": [KEPT, TRAINED],
    "flashmoe_numba/layer/saved.py": [KEPT, TRAINED],
    "flashmoe_numba/backends/cuda*.py": [GPUS],
    "flashmoe_numba/backends/host.py": [LAYERS, PROCESSES],
    "flashmoe_numba/processes/*.py": [STARTS, ENDS],
    "flashmoe_numba/processes/links.py": [],  # on hosts alone (tests/hosts), as root
    "flashmoe_numba/processes/meeting.py": [LAYERS, PROCESSES],
    "flashmoe_numba/processes/ownership.py": [LAYERS],
    "flashmoe_numba/processes/pools.py": [SPREAD],
    "flashmoe_numba/processes/process_group.py": [],  # with PyTorch alone (tests/pytorch)
    "flashmoe_numba/processes/send_limit.py": [CARRIERS],
    "flashmoe_numba/tile_gemm/cpu.py": [PRODUCTS, COMPILED],
    "flashmoe_numba/tile_gemm/cpu_gradients.py": [GRADIENTS],
    "flashmoe_numba/tile_gemm/micro_kernel.py": [PRODUCTS],
    "flashmoe_numba/tile_gemm/rows.py": [PRODUCTS, COMPILED],
    "flashmoe_numba/tile_gemm/cpu_activations.py": [PRODUCTS],
    "flashmoe_numba/device/cpu.py": [VERBS, PRODUCTS, COMPILED],
    "sim/engine/plain.py": [ENGINES, SIMULATOR],
    "sim/engine/compiled.py": [ENGINES, SIMULATOR],
    "sim/engine/loop.py": [ENGINES, SIMULATOR],
    "sim/engine/heaps.py": [ENGINES, SIMULATOR],
}


def files_with_suites(root: Path) -> dict[Path, list[Stage]]:
    """{file below `root`: its stages, if it has any}; the last pattern that fits a file decides."""
    found: dict[Path, list[Stage]] = {}
    for pattern, stages in SUITES.items():
        files = sorted(root.glob(pattern))
        if not files:
            raise FileNotFoundError(f"no {pattern} in {root}: was it moved? then say so here")
        found |= {file.relative_to(root): stages for file in files}
    return {file: stages for file, stages in found.items() if stages}
