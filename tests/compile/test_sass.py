"""Reading SASS: on texts written by hand, so that it runs everywhere."""

from dataclasses import replace
from pathlib import Path

import pytest

from flashmoe_numba.build import sass as reading
from flashmoe_numba.build.build import Kernel
from flashmoe_numba.build.sass import MainLoop, failures, find_nvdisasm, read_facts
from flashmoe_numba.build.variants import Variant

HGMMA, BF16 = "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24", "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
LOAD, WAIT = "@P1 UTMALDG.3D [UR16], [UR4]", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
GOOD = ["MOV R1, R2", ".L_x_1:", HGMMA, HGMMA, WAIT, LOAD, "@!P0 BRA `(.L_x_1)", "EXIT"]


def listing(*lines):
    """As nvdisasm prints it."""
    text = ["\t.target\tsm_90a", ".text.flashmoe:", "        /*0000*/ \t.byte\t0xff, 0x1f"]
    for at, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * at:04x}*/                   {line} ;")
    return "\n".join(text)


def kernel(tensor_cores=True, warnings=(), heap="ipc"):
    variant = Variant(dtype="float16", architecture="sm_90a", tensor_cores=tensor_cores, heap=heap)
    facts = dict(registers=200, spill_bytes=0, stack_bytes=0, shared_bytes=1024, warnings=warnings)
    return Kernel(variant=variant, path=Path("k.cubin"), entry="k", **facts)


def loops(*lines):
    return read_facts(listing(*lines)).main_loops


def test_a_loop_in_numbers():
    facts = read_facts(listing(*GOOD))
    assert facts.num_instructions == 7
    assert {kind: number for kind, number in facts.counts.items() if number} == {"HGMMA": 2, "UTMALDG": 1}
    shape = "HGMMA.64x128x16.F32"
    numbers = dict(num_instructions=5, products=2, tensor_loads=1, local_loads=0, local_stores=0, waits=1)
    assert facts.main_loops == (MainLoop(label=".L_x_1", shape=shape, **numbers),)


PUT = "nvshmemi_transfer_put_signal_dispatchIL13threadgroup_t0EE"
CALLS = [
    "CALL.REL.NOINC `($flashmoe$flashmoe_put_signal)",
    "@P0 CALL.REL.NOINC `($flashmoe$flashmoe_acquire)",
    "CALL.REL.NOINC `($flashmoe$flashmoe_acquire)",
    "CALL.ABS.NOINC R20 `(flashmoe_push_control)",
    f"CALL.REL.NOINC `($flashmoe$_Z37{PUT}vPvS1_)",
    "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u64)",
    "CALL.REL.NOINC `(.L_x_1)",
]


def test_functions_that_are_called_have_names():
    """Those of the kernel and of NVSHMEM; not the assembler's own, and no jumps."""
    calls = read_facts(listing(*GOOD, *CALLS)).calls
    functions = {"flashmoe_put_signal": 1, "flashmoe_acquire": 2, "flashmoe_push_control": 1, f"_Z37{PUT}vPvS1_": 1}
    assert calls == functions


@pytest.mark.parametrize("lacking", ["flashmoe_put_signal", "flashmoe_acquire", "flashmoe_push_control", PUT])
def test_a_kernel_with_nvshmem_that_does_not_call_it_fails(lacking):
    assert failures(kernel(heap="nvshmem"), read_facts(listing(*GOOD, *CALLS))) == []
    facts = read_facts(listing(*GOOD, *[call for call in CALLS if lacking not in call]))
    assert failures(kernel(heap="nvshmem"), facts) == [
        f"no call of {lacking.removesuffix('_dispatchIL13threadgroup_t0EE')}"
    ]
    assert failures(kernel(), facts) == []


def test_only_innermost_loops_that_multiply_count():
    outer = [".L_x_0:", HGMMA, *GOOD[:-1], "STL [R1], R2", ".L_x_2:", BF16, "@P0 BRA `(.L_x_2)", "BRA.U UP0, `(.L_x_0)"]
    found = loops(*outer, ".L_x_3:", "IADD3 R1, R1, R2, RZ", "BRA `(.L_x_3)")
    assert [loop.label for loop in found] == [".L_x_1", ".L_x_2"]
    assert [loop.shape for loop in found] == ["HGMMA.64x128x16.F32", "HGMMA.64x16x16.F32.BF16"]
    assert [loop.local_stores for loop in found] == [0, 0]


def test_code_moved_out_of_a_loop_makes_none_of_its_own():
    """A wait that is tried again far away jumps back into the middle of its loop."""
    loop = [".L_x_1:", "@!P2 BRA `(.L_x_9)", ".L_x_2:", HGMMA, WAIT, LOAD, "@!P0 BRA `(.L_x_1)", "EXIT"]
    assert [loop.label for loop in loops(*loop, ".L_x_9:", "NOP", "NOP", "BRA `(.L_x_2)")] == [".L_x_1"]


def test_a_loop_of_two_shapes_names_both():
    assert loops(".L_x_1:", HGMMA, BF16, "BRA `(.L_x_1)")[0].shape == "HGMMA.64x128x16.F32+HGMMA.64x16x16.F32.BF16"


def test_forward_branches_and_calls_make_no_loop():
    assert loops("@P0 BRA `(.L_x_1)", HGMMA, "CALL.REL.NOINC `(.L_x_0)", ".L_x_1:", "EXIT") == ()
    assert loops(".L_x_0:", HGMMA, "BSSY B0, `(.L_x_0)") == ()


@pytest.mark.parametrize(("multiply", "products"), [("FFMA.FTZ R1, R2, R3, R1", 2), ("DFMA R2, R4, R6, R2", 2)])
def test_lanes_multiply_where_there_are_no_tensor_instructions(multiply, products):
    found = loops(".L_x_1:", multiply, f"@P0 {multiply}", "BRA `(.L_x_1)")
    assert [loop.products for loop in found] == [products]
    assert (
        loops(".L_x_1:", multiply, "BRA `(.L_x_1)", *GOOD[1:1], ".L_x_5:", HGMMA, "BRA `(.L_x_5)")[0].label == ".L_x_5"
    )


def test_names_that_only_begin_alike_are_not_counted():
    counts = read_facts(listing("STLX R1", "LDLU R1", "HGMMAX R1", "FFMA32I R1, R1, R1", "LDL.LU R1, [R2]")).counts
    assert {kind: number for kind, number in counts.items() if number} == {"LDL": 1}


def test_a_right_kernel_has_no_failures():
    assert failures(kernel(), read_facts(listing(*GOOD))) == []
    lanes = listing(".L_x_1:", "FFMA R1, R2, R3, R1", "BRA `(.L_x_1)")
    assert failures(kernel(tensor_cores=False), read_facts(lanes)) == []


def without(start):
    return [line for line in GOOD if not line.startswith(start)]


IN_LOOP = "main loop .L_x_1 (HGMMA.64x128x16.F32): "
WRONG = [
    (without("HGMMA"), ["no HGMMA", "no main loop with HGMMA"]),
    (without("@P1 UTMALDG"), ["no UTMALDG"]),
    (without("@!P0 BRA"), ["no main loop with HGMMA"]),
    ([*GOOD[:3], "STL.64 [R1], R2", *GOOD[3:]], [IN_LOOP + "spills, 0 LDL and 1 STL"]),
    ([*GOOD[:3], "@P0 LDL R2, [R1+0x10]", *GOOD[3:]], [IN_LOOP + "spills, 1 LDL and 0 STL"]),
    ([*GOOD[:3], WAIT, *GOOD[3:]], [IN_LOOP + "tensor instructions are serialised, 2 waits"]),
    ([*GOOD, "STL [R1], R2"], []),
]


@pytest.mark.parametrize(
    ("lines", "failure"), WRONG, ids=[" ".join(failure) or "spill outside" for _, failure in WRONG]
)
def test_what_is_wrong_is_said(lines, failure):
    assert failures(kernel(), read_facts(listing(*lines))) == failure


def test_warnings_of_the_linker_are_failures():
    warning = "wgmma.mma_async instructions are serialized due to insufficient register resources"
    assert failures(kernel(warnings=(warning,)), read_facts(listing(*GOOD))) == [f"the linker warned: {warning}"]


def test_spills_are_failures_wherever_they_are():
    """Outside of main loops, too; a stack is none."""
    assert failures(replace(kernel(), stack_bytes=8), read_facts(listing(*GOOD))) == []
    found = failures(replace(kernel(), spill_bytes=4, stack_bytes=8), read_facts(listing(*GOOD)))
    assert found == ["4 bytes of registers spilled"]


def test_without_a_disassembler_the_error_names_the_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(reading, "TOOLKIT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nvidia-cuda-nvdisasm"):
        find_nvdisasm()
    (tmp_path / "nvdisasm").touch(mode=0o755)
    assert find_nvdisasm() == tmp_path / "nvdisasm"


def test_what_the_disassembler_refuses_is_said(monkeypatch, tmp_path):
    tool = tmp_path / "nvdisasm"
    tool.write_text("#!/bin/sh\necho 'not a cubin' >&2; exit 3\n")
    tool.chmod(0o755)
    monkeypatch.setattr(reading, "find_nvdisasm", lambda: tool)
    with pytest.raises(RuntimeError, match=r"nvdisasm refused x\.cubin: not a cubin"):
        reading.disassemble(Path("x.cubin"))
