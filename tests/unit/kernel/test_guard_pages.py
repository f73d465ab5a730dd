"""The compiled tile GEMM between pages that nobody may touch: it reads and writes its arrays and nothing beside them.

It runs in a forked child, because the proof to the contrary is a segmentation fault.
"""

import ctypes
import faulthandler
import mmap
import os
import signal
import traceback
import warnings
from functools import partial

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, usable_arithmetics
from test_tile_gemm import make_product

from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.tile_gemm.arithmetic import PAIRED_DTYPE
from reference import MoEConfig

PROT_NONE = 0


def at_the_end(array):
    """A copy of a 1-D array that ends just before a page without any rights."""
    return guarded(array, True)


def at_the_start(array):
    """A copy of a 1-D array that begins just after a page without any rights."""
    return guarded(array, False)


def guarded(array, at_end):
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (0, page + size):
        failed = ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + at), ctypes.c_size_t(page), PROT_NONE)
        assert failed == 0, f"no guard page at {address + at:#x}"
    start = page + (size - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, array.dtype, array.size, start)
    copy[:] = array
    return copy


def in_a_child(function):
    """Run it in a forked process: AssertionError if that ends otherwise than by returning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child calls nothing that other threads may hold
        child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, "wrong, see stderr" if status > 0 else signal.Signals(-status).name


def products_of_a_rank(config, arithmetic):
    """[(product, columns of a tile, tallest tile)] of gate, up and down projections, as rank.py sizes them."""
    c = config
    gate_rows, seed = min(c.token_block, c.num_tokens), 5
    router = make_product(c.dtype, gate_rows, c.hidden, c.num_experts, False, "identity", seed)
    up = make_product(c.dtype, c.num_tokens, c.hidden, c.ffn, c.gated, "silu", seed, arithmetic)
    down = make_product(c.dtype, c.num_tokens, c.ffn, c.hidden, False, "identity", seed, arithmetic)
    return [
        (router, min(c.tile_n, c.num_experts), gate_rows),
        (up, min(c.tile_ffn, c.ffn), c.tile_m),
        (down, min(c.tile_n, c.hidden), c.tile_m),
    ]


# Rows that fill no group of rows, columns that fill no panel, deeper and shallower than a depth block.
BASE = dict(num_ranks=1, num_tokens=29, hidden=301, ffn=75, num_experts=5, num_topk=1, gated=True)
SIZES = [
    dict(tile_m=16, tile_n=67, token_block=29),  # a gate's block of rows is taller than a tile
    dict(tile_m=16, tile_n=67, token_block=3),  # the two halves of a tile are 33 columns: a panel and one more
    dict(tile_m=16, tile_n=65, token_block=3),  # a tile of 65 columns takes more panels than two of 32
    dict(tile_m=16, tile_n=128, token_block=16),
    dict(tile_m=13, tile_m_min=13, tile_n=1, token_block=1),
    dict(tile_m=32, tile_n=131, token_block=200, gated=False, num_experts=200, hidden=3),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_touches_its_own_memory_only(dtype):
    for arithmetic in usable_arithmetics() if dtype == PAIRED_DTYPE else ["fma"]:
        for sizes in SIZES:
            check_tiles(MoEConfig(**(BASE | sizes), dtype=dtype), arithmetic)


def check_tiles(config, arithmetic):
    backend, products = CpuBackend(), products_of_a_rank(config, arithmetic)
    scratch = backend.make_scratch(config)
    backend.close()
    assert scratch.sums.size >= config.hidden, f"{config}: a combine needs a row"
    expected = [product.run(tile_n, tile_m) for product, tile_n, tile_m in products]

    def check():
        for place in (at_the_end, at_the_start):
            for (product, tile_n, tile_m), result in zip(products, expected, strict=True):
                got = product.run(tile_n, tile_m, scratch=scratch, place=place)
                assert_same_bits(got, result, f"{config}, tiles of {tile_m} by {tile_n}")

    in_a_child(check)


def test_guard_pages_work():
    array = np.arange(5, dtype=np.int16)
    for place, beyond in ((at_the_end, array.nbytes), (at_the_start, -1)):
        copy = place(array)
        assert copy.tolist() == array.tolist()
        with pytest.raises(AssertionError, match=r"SIGSEGV|SIGBUS"):
            in_a_child(partial(ctypes.string_at, copy.ctypes.data + beyond, 1))
