"""From sums to gradients of hidden elements: through gating, bounds and the activation."""

from __future__ import annotations

from flashmoe_numba.device import block_sync, formulas, jit, lane, lanes, load, store
from flashmoe_numba.tile_gemm import forms
from flashmoe_numba.tile_gemm import rows as of_rows
from flashmoe_numba.tile_gemm.activations import IDENTITY, SLOPES_BY_INDEX
from flashmoe_numba.tile_gemm.forms import CLAMP, CLAMP_ACTIVATED, SOFTCAP
from flashmoe_numba.tile_gemm.matrices import SUMS_STRIDE
from flashmoe_numba.tile_gemm.stub import tile_sums

from .epilogue import activate, choices

row_of = jit(of_rows.row_of)
at_most, within, sigmoid_slope = jit(forms.at_most), jit(forms.within), jit(forms.sigmoid_slope)
soft_capped, sigmoid = jit(formulas.soft_capped), jit(formulas.sigmoid)
activate_slope = choices(SLOPES_BY_INDEX)


@jit
def derive_tile(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch):
    """`gradients.hidden_gradient` for `Matrices`."""
    first = n * matrices.tile_n
    columns = min(matrices.tile_n, matrices.columns - first)
    tiles = (matrices.columns + matrices.tile_n - 1) // matrices.tile_n
    for group in range(0, rows, matrices.group_rows):
        here = min(matrices.group_rows, rows - group)
        tile_sums(a, group, here, matrices, expert, first, columns, scratch)
        block_sync()
        for turn in range(lane(), here * columns, lanes()):
            r, c = turn // columns, turn % columns
            i = row_of(kept, group + r)
            factor = factors[row_of(a, group + r)]
            derive_one(kept.array, out, active, factor, parts, i, first + c, matrices.columns, form, scratch.sums, r, c)
        block_sync()
        for r in range(lane(), here, lanes()):
            total = load(scratch.sums, r * SUMS_STRIDE)
            for c in range(1, columns):
                total += load(scratch.sums, r * SUMS_STRIDE + c)
            dots[row_of(kept, group + r) * tiles + n] = total
        block_sync()


@jit
def derive_one(kept, out, active, factor, parts, i, column, columns, form, sums, r, c):
    """Of one hidden element; its gradient in the sums becomes its part of the dot product."""
    gradient, at = load(sums, r * SUMS_STRIDE + c), i * parts * columns + column
    one = form.slope / form.slope
    up = load(kept, at + columns) if parts == 2 else one
    hidden, gate_slope, up_slope = hidden_slopes(load(kept, at), up, form, one)
    store(sums, r * SUMS_STRIDE + c, gradient * hidden)
    if factor == 0:
        hidden, gate_slope, up_slope, gradient = factor, factor, factor, factor
    store(out, at, factor * gradient * gate_slope)
    if parts == 2:
        store(out, at + columns, factor * gradient * up_slope)
    store(active, i * columns + column, factor * hidden)


@jit
def hidden_slopes(gate, up, form, one):
    """(A, dA/dgate, dA/dup); where there is no up, it is one, which no form of these changes."""
    if form.shape == SOFTCAP:
        return soft_capped_slopes(gate, up, form, one)
    steeper = (at_most(gate, form.gate_limit) if form.shape == CLAMP else gate) * form.slope
    slope = one if form.activation == IDENTITY else activate_slope(steeper, form.activation)
    return bounded_slopes(gate, up, activate(steeper, form.activation), slope, form, one)


@jit
def bounded_slopes(gate, up, active, slope, form, one):
    """The same from the activation and its slope, of the gate times the form's. At a limit itself slopes are 1."""
    active = active / form.slope
    bounded = gate if form.shape == CLAMP else active
    if form.shape >= CLAMP and bounded > form.gate_limit:
        slope = one - one
    if form.shape == CLAMP_ACTIVATED:
        active = at_most(active, form.gate_limit)
    up_slope = one - one if abs(up) > form.up_limit else one
    up = within(up, form.up_limit) + form.up_offset
    return active * up, slope * up, active * up_slope


@jit
def soft_capped_slopes(gate, up, form, one):
    """The slope of a cap is 1 - tanh^2, which is four times that of a sigmoid at twice the place."""
    two = one + one
    share, capped = sigmoid(form.slope * gate, one), soft_capped(gate, form.gate_limit)
    slope = two * two * sigmoid_slope(two * (gate / form.gate_limit), one) * share
    slope += capped * form.slope * sigmoid_slope(form.slope * gate, one)
    up_slope = two * two * sigmoid_slope(two * (up / form.up_limit), one)
    up = soft_capped(up, form.up_limit) + form.up_offset
    return capped * share * up, slope * up, capped * share * up_slope
