"""Bits do not depend on what the caller's thread does with denormals, or how it rounds, while the layer's are made."""

import contextlib
import ctypes
import platform

import numpy as np
import pytest
from cases import assert_same_bits, random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from reference import Weights

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="sets x86's control word through glibc"
)
FLUSH, DOWNWARD, TOWARD_ZERO = 0x8040, 0x2000, 0x6000  # bits of MXCSR: denormals in and out are zero; rounding
MXCSR = 7  # its place in glibc's fenv_t, in words


@contextlib.contextmanager
def control_bits(wanted):
    """This thread's control word with these bits, too."""
    libm, before, changed = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()
    libm.fegetenv(before)
    libm.fegetenv(changed)
    changed[MXCSR] |= wanted
    libm.fesetenv(changed)
    try:
        yield
    finally:
        libm.fesetenv(before)


def calls(config, weights, x, wanted):
    """Results of a layer whose threads begin where the control word has these bits."""
    with control_bits(wanted), FlashMoE(config, weights, num_processors=2) as layer:
        return layer(x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_flushing_and_rounding_of_the_caller_change_no_bit(dtype):
    config = tiny_config(dtype=dtype, activation="identity", gated=False, num_topk=1)
    weights, x = Weights.random(config), random_tokens(config)
    tiny = np.finfo(dtype).smallest_normal
    for scale in (1, tiny):
        tokens = [part * part.dtype.type(scale) for part in x]
        expected = calls(config, weights, tokens, 0)
        for wanted in (FLUSH, DOWNWARD, TOWARD_ZERO, FLUSH | DOWNWARD):
            assert_same_bits(calls(config, weights, tokens, wanted), expected, f"{dtype} x {scale}, {wanted:#x}")
    results = np.concatenate(expected)
    assert ((np.abs(results) < tiny) & (results != 0)).any(), "no denormal result"


def test_the_bits_of_this_test_do_what_they_say():
    tiny, third = np.float32(np.finfo(np.float32).smallest_normal), np.float32(3)
    with control_bits(FLUSH):
        assert np.multiply([tiny], np.float32(0.5))[0] == 0
    with control_bits(DOWNWARD):
        down = np.divide(np.float32([1]), third)[0]
    assert down < np.divide(np.float32([1]), third)[0]
