"""A correct layer in plain NumPy, one row after the other, and the same with a fault each.

Its sums have an order that depends on nothing but their length, so that its rows have the same bits in any batch.
"""

import contextlib
import itertools
import os
import signal
import time

import numpy as np
from numpy.lib.stride_tricks import as_strided

CALLS = itertools.count()
FOLDER, FILE = os.path.split(__file__)


def product(row, matrix):
    """`[out]`, each element's sum by itself: `matrix` is `[out, in]`."""
    return (matrix * row).sum(axis=1, dtype=np.result_type(row.dtype, np.float32))


def silu(z):
    with np.errstate(over="ignore"):
        return z / (1 + np.exp(-z))


def expert(row, weights, e, act=silu):
    with np.errstate(invalid="ignore"):
        hidden = act(product(row, weights.gate_proj[e])) * product(row, weights.up_proj[e])
        return product(hidden.astype(row.dtype), weights.down_proj[e])


def layer(x, topk_idx, topk_weights, weights, one=expert, skip=-1):
    """Right, if `one` expert's result is; choices equal to `skip` or beyond the experts are none."""
    y = np.zeros(x.shape, np.result_type(x.dtype, np.float32))
    for row, (experts, factors) in enumerate(zip(topk_idx, topk_weights, strict=True)):
        for e, factor in zip(experts.tolist(), factors, strict=True):
            if e != skip and e < len(weights.up_proj):
                y[row] += factor * one(x[row], weights, e)
    return y.astype(x.dtype)


def kept_buffer(weights):
    """Its results are added to those of the call before."""
    sums = {}

    def call(x, topk_idx, topk_weights):
        before = sums.get("y", np.zeros_like(x))
        sums["y"] = layer(x, topk_idx, topk_weights, weights)
        if before.shape != x.shape:
            sums["y"][: len(before)] += before[: len(x)]
        return sums["y"]

    return call


def next_expert(x, topk_idx, topk_weights, weights):
    return layer(x, (topk_idx + 1) % len(weights.up_proj), topk_weights, weights)


def last_row_dropped(x, topk_idx, topk_weights, weights):
    y = layer(x, topk_idx, topk_weights, weights)
    y[-1:] = 0
    return y


def weights_twice(x, topk_idx, topk_weights, weights):
    return layer(x, topk_idx, topk_weights**2, weights)


def weights_normalised(x, topk_idx, topk_weights, weights):
    return layer(x, topk_idx, topk_weights / topk_weights.sum(axis=1, keepdims=True), weights)


def half_precision(x, topk_idx, topk_weights, weights):
    return layer(x.astype(np.float16).astype(x.dtype), topk_idx, topk_weights, weights)


def other_dtype(x, topk_idx, topk_weights, weights):
    return layer(x, topk_idx, topk_weights, weights).astype(np.float64)


def no_array(x, topk_idx, topk_weights, weights):
    return layer(x, topk_idx, topk_weights, weights).tolist()


def raises(x, topk_idx, topk_weights, weights):
    raise RuntimeError("no such kernel\nand more that nobody asked for")


def wide_and_many(x, topk_idx, topk_weights, weights):
    """Wrong from hidden 7 and 3 experts on."""
    return layer(x, topk_idx, topk_weights, weights) * (1 + (x.shape[1] >= 7 and len(weights.up_proj) >= 3))


def one_choice_unweighted(x, topk_idx, topk_weights, weights):
    return layer(x, topk_idx, topk_weights if topk_idx.shape[1] > 1 else np.ones_like(topk_weights), weights)


def last_choice_of_all_lost(x, topk_idx, topk_weights, weights):
    most = max(1, len(weights.up_proj) - 1)
    return layer(x, topk_idx[:, :most], topk_weights[:, :most], weights)


def at_most_twelve_rows(x, topk_idx, topk_weights, weights):
    """Each expert has room for so many."""
    kept = topk_weights.copy()
    for e in range(len(weights.up_proj)):
        rows, choices = np.nonzero(topk_idx == e)
        kept[rows[12:], choices[12:]] = 0
    return layer(x, topk_idx, kept, weights)


def one_token_squeezed(x, topk_idx, topk_weights, weights):
    y = layer(x, topk_idx, topk_weights, weights)
    return y[0] if len(y) == 1 else y


def scale_of_no_tokens(x, topk_idx, topk_weights, weights):
    return layer(x * (x.max() / x.max()), topk_idx, topk_weights, weights)


def padding_is_the_last_expert(x, topk_idx, topk_weights, weights):
    return layer(x, topk_idx, topk_weights, weights, skip=None)


def zero_is_no_weight(x, topk_idx, topk_weights, weights):
    return layer(x, topk_idx, np.where(topk_weights == 0, 1, topk_weights), weights)


def exp_overflows(x, topk_idx, topk_weights, weights):
    def act(z):
        with np.errstate(over="ignore", invalid="ignore"):
            return z * np.exp(z) / (1 + np.exp(z))

    return layer(x, topk_idx, topk_weights, weights, lambda row, w, e: expert(row, w, e, act))


def one_scale_for_all(x, topk_idx, topk_weights, weights):
    """As a quantised layer has it: small rows beside large ones are lost."""
    step = np.abs(x).max(initial=0) * 2**-30
    return layer(np.round(x / (step or 1)).astype(x.dtype) * step, topk_idx, topk_weights, weights)


def flushed(x, topk_idx, topk_weights, weights):
    y = layer(x, topk_idx, topk_weights, weights)
    return np.where(np.abs(y) < np.finfo(y.dtype).tiny, np.zeros_like(y), y)


def nan_leaks(x, topk_idx, topk_weights, weights):
    with np.errstate(invalid="ignore"):
        return layer(x + 0 * x.sum(axis=0), topk_idx, topk_weights, weights)


def nan_hidden(x, topk_idx, topk_weights, weights):
    return layer(np.nan_to_num(x), topk_idx, topk_weights, weights)


def takes_pieces(x, topk_idx, topk_weights, weights):
    """As a kernel does that gets a pointer and the sizes."""
    step = x.itemsize
    return layer(as_strided(x, strides=(step * x.shape[1], step)), topk_idx, topk_weights, weights)


def changes_x(x, topk_idx, topk_weights, weights):
    y = layer(x, topk_idx, topk_weights, weights)
    x += 1
    return y


def changes_weights(x, topk_idx, topk_weights, weights):
    y = layer(x, topk_idx, topk_weights, weights)
    weights.down_proj[0, 0] += 1
    return y


def changes_choices(x, topk_idx, topk_weights, weights):
    y = layer(x, topk_idx, topk_weights, weights)
    topk_idx.sort()
    return y


def other_each_time(x, topk_idx, topk_weights, weights):
    y = layer(x, topk_idx, topk_weights, weights)
    return np.nextafter(y, np.inf, dtype=y.dtype) if next(CALLS) % 2 else y


def sums_by_batch(x, topk_idx, topk_weights, weights):
    """Sums of a large batch run the other way, as another kernel's for its shape may."""
    if len(x) < 4:
        return layer(x, topk_idx, topk_weights, weights)
    return layer(x, topk_idx[:, ::-1], topk_weights[:, ::-1], weights, lambda row, w, e: backward(row, w, e))


def sums_by_place(x, topk_idx, topk_weights, weights):
    """Rows at odd places are summed the other way, in batches of any size."""
    y = layer(x, topk_idx, topk_weights, weights)
    y[1::2] = layer(x[1::2], topk_idx[1::2], topk_weights[1::2], weights, lambda row, w, e: backward(row, w, e))
    return y


def backward(row, weights, e):
    ups = (product(row[::-1], matrix[e, :, ::-1]) for matrix in (weights.gate_proj, weights.up_proj))
    gate, up = ups
    return product((silu(gate) * up)[::-1], weights.down_proj[e][:, ::-1])


def hangs(x, topk_idx, topk_weights, weights):
    """When the batch is large."""
    while len(x) > 8:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(60)
    return layer(x, topk_idx, topk_weights, weights)


def dies(x, topk_idx, topk_weights, weights):
    if len(x) > 8:
        os.kill(os.getpid(), signal.SIGSEGV)
    return layer(x, topk_idx, topk_weights, weights)


def leaves(x, topk_idx, topk_weights, weights):
    raise SystemExit(0)


def prints(x, topk_idx, topk_weights, weights):
    print("a word of the target's")
    return layer(x, topk_idx, topk_weights, weights)


def takes_two(x, weights):
    return x


NO_FUNCTION = 3
