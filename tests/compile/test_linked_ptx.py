"""Every kernel as linked PTX: one entry, for its architecture, with what its variant promises."""

import importlib.util
import re

import pytest
from children import printed

if not importlib.util.find_spec("numba_cuda"):
    reason = "numba-cuda is not installed: pip install 'flashmoe-numba[compile]'"
    pytest.skip(reason, allow_module_level=True)

from flashmoe_numba.ptx.linked import SUFFIX
from flashmoe_numba.tile_gemm.hopper import INSTRUCTIONS, ROWS


def without_counter(name):
    """Numba counts the functions that it compiles in a process, and a symbol holds the number: flashmoe[v158]."""
    return re.sub(r"B\d+v\d+", "", name)


def test_the_text_is_one_kernel_for_its_architecture(kernel, ptx):
    assert re.findall(r"^\.target (\w+)", ptx, re.MULTILINE) == [kernel.variant.architecture]
    (entry,) = re.findall(r"\.visible \.entry (\w+)\(", ptx)
    assert without_counter(entry) == without_counter(kernel.entry)
    code, _, variant = ptx.rstrip().rpartition("\n")
    assert code.rstrip().endswith("}")
    assert variant == f"// variant {kernel.variant.name}"
    assert ptx.isascii()
    assert "\0" not in ptx


def test_the_products_are_those_of_the_variant(kernel, ptx):
    products = set(re.findall(r"^\s*(wgmma\.mma_async\S+)", ptx, re.MULTILINE))
    copies = "cp.async.bulk.tensor" in ptx
    if not kernel.variant.tensor_cores:
        assert (products, copies) == (set(), False)
        return
    kind, depth, _ = INSTRUCTIONS[kernel.variant.dtype]
    assert products == {f"wgmma.mma_async.sync.aligned.m64n{rows}k{depth}.{kind}" for rows in ROWS}
    assert copies


def test_the_text_lies_beside_the_cubin_and_is_read_without_a_compiler(kernel, ptx, folder):
    file = kernel.path.with_suffix(SUFFIX)
    written = file.stat().st_mtime_ns
    program = (
        "import sys; from pathlib import Path; from flashmoe_numba.ptx.linked import linked_ptx\n"
        "from flashmoe_numba.build.variants import Variant\n"
        f"print(len(linked_ptx({kernel.variant!r}, Path(sys.argv[1]))))\n"
        "print(*sorted({'numba', 'numba_cuda', 'llvmlite', 'cuda', 'cupy'} & set(sys.modules)))"
    )
    assert printed("-c", program, folder) == f"{len(ptx)}\n\n"
    assert file.stat().st_mtime_ns == written
