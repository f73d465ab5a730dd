"""What the linker and the disassembler say of every kernel variant: registers, shared memory, tensor instructions."""

import importlib.util

import pytest
from built_variants import LINKED_BACKWARDS
from children import printed

if not importlib.util.find_spec("numba_cuda"):
    reason = "numba-cuda is not installed: pip install 'flashmoe-numba[compile]'"
    pytest.skip(reason, allow_module_level=True)

from flashmoe_numba.backends.cuda import shared_bytes
from flashmoe_numba.build import build as building
from flashmoe_numba.build.sass import disassemble, failures, read_facts
from flashmoe_numba.build.variants import Variant
from flashmoe_numba.tile_gemm.hopper import ROWS
from flashmoe_numba.tile_gemm.matrices import CELLS
from reference import MoEConfig

MOST_REGISTERS = 255  # that an instruction can name
MULTIPROCESSOR_REGISTERS = 65536
MULTIPROCESSOR_SHARED_BYTES = {"sm_80": 167936, "sm_90a": 233472, "sm_100a": 233472}
RESERVED_BYTES = 1024  # of shared memory, by the driver, for each block
WIDEST = 8192  # hidden size of the largest open models
SHAPES = {"float16": "16.F32", "bfloat16": "16.F32.BF16", "float32": "8.F32.TF32"}


@pytest.fixture
def facts(sass):
    return read_facts(sass)


def test_no_registers_are_spilled(kernel):
    assert kernel.spill_bytes == 0
    assert kernel.stack_bytes == 0
    assert 0 < kernel.registers <= MOST_REGISTERS


def test_two_blocks_fit_a_multiprocessor(kernel):
    sizes = dict(num_ranks=8, num_tokens=1024, hidden=WIDEST, ffn=WIDEST, num_experts=8, num_topk=2)
    config = MoEConfig(**sizes, dtype=kernel.variant.dtype)
    block = shared_bytes(config, kernel.variant) + kernel.shared_bytes + RESERVED_BYTES
    assert 2 * block <= MULTIPROCESSOR_SHARED_BYTES[kernel.variant.architecture]
    assert 2 * building.THREADS * kernel.registers <= MULTIPROCESSOR_REGISTERS


def test_nothing_is_wrong_with_the_machine_code(kernel, facts):
    assert failures(kernel, facts) == []
    assert (facts.counts["LDL"], facts.counts["STL"]) == (0, 0)


def test_the_products_are_made_by_the_right_instructions(kernel, facts):
    if not kernel.variant.tensor_cores:
        multiply = "DFMA" if kernel.variant.dtype == "float64" else "FFMA"
        tiles = [loop for loop in facts.main_loops if loop.shape == multiply and loop.products % CELLS**2 == 0]
        assert len(tiles) >= 3, "the gate and both products of an expert"
        assert [facts.counts[name] for name in ("HGMMA", "HMMA", "UTMALDG")] == [0, 0, 0]
        return
    assert facts.counts["HMMA"] == 0
    for rows in ROWS:
        shape = f"HGMMA.64x{rows}x{SHAPES[kernel.variant.dtype]}"
        loops = [loop for loop in facts.main_loops if loop.shape == shape]
        what = "one for each product of an expert and of the shared one, and one for rows of several sources"
        assert len(loops) == 5, f"{what}: {shape}"
        for loop in loops:
            assert (loop.products, loop.tensor_loads, loop.waits) == (8, 3, 1), loop
    assert len(facts.main_loops) == 5 * len(ROWS)


@pytest.mark.parametrize("variant", LINKED_BACKWARDS, ids=lambda variant: variant.name)
def test_a_backward_spills_nothing_and_multiplies_by_the_right_instructions(variant, folder):
    """On Hopper dA, dx and the products that are made again; gradients of weights are made by lanes."""
    kernel = building.build(variant, folder)
    facts = read_facts(disassemble(kernel.path))
    assert (kernel.spill_bytes, kernel.stack_bytes, facts.counts["LDL"], facts.counts["STL"]) == (0, 0, 0, 0)
    assert kernel.registers <= MOST_REGISTERS and failures(kernel, facts) == []
    if not variant.tensor_cores:
        assert [facts.counts[name] for name in ("HGMMA", "HMMA", "UTMALDG")] == [0, 0, 0]
        return
    for rows in ROWS:
        loops = [loop for loop in facts.main_loops if loop.shape == f"HGMMA.64x{rows}x{SHAPES[variant.dtype]}"]
        what = "one for each of an expert's three products, in order and of several sources, and of the shared one's"
        assert len(loops) == 9, what
        assert {(loop.products, loop.tensor_loads, loop.waits) for loop in loops} == {(8, 3, 1)}
    assert len(facts.main_loops) == 9 * len(ROWS)


@pytest.mark.parametrize(("planted", "failure"), [
    ("STL [R1], R2", "spills, 0 LDL and 1 STL"),
    ("@!P0 LDL.64 R2, [R1+0x8]", "spills, 1 LDL and 0 STL"),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "tensor instructions are serialised, 2 waits"),
])  # fmt: skip
def test_a_fault_planted_in_a_main_loop_is_found(kernel, sass, planted, failure):
    if not kernel.variant.tensor_cores:
        pytest.skip("for kernels with tensor cores")
    first = next(line for line in sass.splitlines() if "HGMMA" in line)
    worse = sass.replace(first, f"{first}\n        /*fff0*/                   {planted} ;", 1)
    found = failures(kernel, read_facts(worse))
    assert len(found) == 1
    assert found[0].endswith(failure)


def test_a_kernel_that_really_spills_is_found(tmp_path, monkeypatch):
    """Four blocks on a multiprocessor leave 128 registers for a thread, and the sums of 128 rows take them all."""
    monkeypatch.setattr(building, "BLOCKS_PER_MULTIPROCESSOR", 4)
    kernel = building.build(Variant(dtype="float16", architecture="sm_90a", tensor_cores=True), tmp_path)
    assert kernel.registers <= 128
    assert kernel.spill_bytes > 0
    assert any("spills" in failure for failure in failures(kernel, read_facts(disassemble(kernel.path))))


def test_the_second_build_reads_the_disk_and_imports_no_compiler(kernel, folder):
    program = (
        "import sys; from pathlib import Path; from flashmoe_numba.build.build import build\n"
        "from flashmoe_numba.build.variants import Variant\n"
        f"print(build({kernel.variant!r}, Path(sys.argv[1])).path)\n"
        "print(*sorted({'numba', 'numba_cuda', 'llvmlite', 'cuda', 'cupy'} & set(sys.modules)))"
    )
    written = kernel.path.stat().st_mtime_ns
    assert printed("-c", program, folder) == f"{kernel.path}\n\n"
    assert kernel.path.stat().st_mtime_ns == written
