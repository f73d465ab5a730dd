"""From sums to results: bias, activation, gating, rounding."""

from __future__ import annotations

from flashmoe_numba.device import array_at, block_sync, formulas, jit, lane, lanes, load, store
from flashmoe_numba.tile_gemm import forms
from flashmoe_numba.tile_gemm import rows as of_rows
from flashmoe_numba.tile_gemm.activations import BY_INDEX
from flashmoe_numba.tile_gemm.forms import CLAMP, CLAMP_ACTIVATED, PLAIN, SOFTCAP
from flashmoe_numba.tile_gemm.matrices import MAX_TILE_COLUMNS, SUMS_STRIDE
from flashmoe_numba.tile_gemm.stub import tile_sums

room_row, room_address, is_local = map(jit, (of_rows.room_row, of_rows.room_address, of_rows.is_local))
at_most, within = jit(forms.at_most), jit(forms.within)
soft_capped, sigmoid = jit(formulas.soft_capped), jit(formulas.sigmoid)


def choices(kinds):
    """activate(x, activation): by the one of these kinds that it is, or x itself."""
    if not kinds:
        return jit(lambda x, activation: x)
    (index, verb), *others = kinds
    rest = choices(others)
    return jit(lambda x, activation: verb(x) if activation == index else rest(x, activation))


activate = choices(BY_INDEX)


@jit
def multiply_tile(out, kept, a, rows, matrices, expert, n, form, scratch):
    """`stub.tile_gemm` for `Matrices`."""
    first = n * matrices.tile_n
    columns = min(matrices.tile_n, matrices.columns - first)
    for group in range(0, rows, matrices.group_rows):
        here = min(matrices.group_rows, rows - group)
        tile_sums(a, group, here, matrices, expert, first, columns, scratch)
        block_sync()
        finish(out, kept, group, here, matrices, expert, first, columns, form, scratch.sums)
        block_sync()


@jit
def finish(out, kept, first_row, rows, matrices, expert, first, columns, form, sums):
    """Lanes side by side take columns side by side, and several rows if there are more lanes than columns."""
    bits = 0  # of a column among lanes, which are a power of two: divisions are slow, and so are loops of any step
    while (1 << bits) < min(lanes(), matrices.tile_n):
        bits += 1
    column = lane() & ((1 << bits) - 1)
    r = lane() >> bits
    while r < rows:
        at = room_row(out, first_row + r) * matrices.columns + first
        kept_at = first
        if kept.array.size > 0:
            kept_at += room_row(kept, first_row + r) * matrices.parts * matrices.columns
        room = out.array if is_local(out) else array_at(room_address(out, first_row + r), out.array.size, out.array)
        if lanes() >= MAX_TILE_COLUMNS:  # known when a kernel is compiled: a lane has one column at most, and no loop
            if column < columns:
                finish_one(room, at, kept.array, kept_at, r, column, matrices, expert, first, form, sums)
        else:
            for c in range(column, columns, 1 << bits):
                finish_one(room, at, kept.array, kept_at, r, c, matrices, expert, first, form, sums)
        r += lanes() >> bits


@jit
def finish_one(room, at, kept, kept_at, r, c, matrices, expert, first, form, sums):
    """The result of row r of these, column c of the tile."""
    keeps = kept.size > 0
    bias_at = expert * matrices.parts * matrices.columns + first + c
    value = load(sums, r * SUMS_STRIDE + c) + load(matrices.bias, bias_at)
    if keeps:
        store(kept, kept_at + c, value)
    if matrices.parts == 1:
        store(room, at + c, activate(value, form.activation))
    else:
        up = load(sums, r * SUMS_STRIDE + matrices.tile_n + c) + load(matrices.bias, bias_at + matrices.columns)
        if keeps:
            store(kept, kept_at + matrices.columns + c, up)
        store(room, at + c, gated(value, up, form))


@jit
def gated(gate, up, form):
    """Of one hidden element: as reference/experts.py has it."""
    if form.shape == PLAIN:
        return activate(gate, form.activation) * up
    if form.shape == SOFTCAP:
        active = soft_capped(gate, form.gate_limit) * sigmoid(form.slope * gate, form.slope / form.slope)
        up = soft_capped(up, form.up_limit)
    else:
        bound = at_most(gate, form.gate_limit) if form.shape == CLAMP else gate
        active = activate(bound * form.slope, form.activation) / form.slope
        active = at_most(active, form.gate_limit) if form.shape == CLAMP_ACTIVATED else active
        up = within(up, form.up_limit)
    return active * (up + form.up_offset)
