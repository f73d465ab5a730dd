"""Kernels for GPUs on several hosts: what the linker and the disassembler say of them. Nothing here runs one."""

import importlib.util

import pytest
from built_variants import IS_FAST

if not importlib.util.find_spec("numba_cuda"):
    reason = "numba-cuda is not installed: pip install 'flashmoe-numba[compile]'"
    pytest.skip(reason, allow_module_level=True)

from flashmoe_numba.build.build import build
from flashmoe_numba.build.nvshmem import CALLED, PUT_SIGNAL, check_version, header_folders
from flashmoe_numba.build.sass import disassemble, failures, read_facts
from flashmoe_numba.build.variants import ARCHITECTURES, Variant
from flashmoe_numba.commands.compile import all_variants
from flashmoe_numba.tile_gemm.hopper import ROWS

try:
    check_version()
    header_folders()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

MOST_REGISTERS = 255  # that an instruction can name
STATE, VERSION = (
    b"nvshmemi_device_state_d",
    b"nvshmemi_device_lib_version_d",
)  # NVSHMEM fills the first as it admits a kernel
FAST = [Variant(dtype="float16", architecture="sm_90a", tensor_cores=True, heap="nvshmem")]
ALL = [
    variant
    for architecture in ARCHITECTURES
    for backward in (False, True)
    for variant in all_variants(architecture, backward=backward, heap="nvshmem")
]
VARIANTS = FAST if IS_FAST else ALL


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def kernel(request, folder):
    return build(request.param, folder)


@pytest.fixture(scope="module")
def facts(kernel):
    return read_facts(disassemble(kernel.path))


def test_it_links_without_spills(kernel):
    assert kernel.spill_bytes == 0
    assert 0 < kernel.registers <= MOST_REGISTERS
    assert kernel.warnings == ()


def test_what_its_verbs_are_is_called(kernel, facts):
    assert failures(kernel, facts) == []
    assert set(CALLED) <= set(facts.calls)
    assert any(PUT_SIGNAL in name for name in facts.calls)


def test_nvshmem_finds_where_to_put_its_state(kernel):
    cubin = kernel.path.read_bytes()
    assert STATE in cubin
    assert VERSION in cubin


def test_its_main_loops_are_those_of_a_kernel_without(kernel, facts):
    if not kernel.variant.tensor_cores or kernel.variant.backward:
        pytest.skip("for forwards with tensor cores")
    assert len(facts.main_loops) == 5 * len(ROWS)
    assert {(loop.products, loop.tensor_loads, loop.waits) for loop in facts.main_loops} == {(8, 3, 1)}
    assert {(loop.local_loads, loop.local_stores) for loop in facts.main_loops} == {(0, 0)}
