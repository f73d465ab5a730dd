"""Gated experts whose products are bound, scaled or shifted (forms.py), on CPUs: a loop over a row for each step."""

from __future__ import annotations

from ..device import formulas
from ..device.compilation import jit
from ..device.vocabulary import load, store
from . import forms
from .cpu_activations import activate
from .forms import CLAMP, CLAMP_ACTIVATED, SOFTCAP

at_most, within = jit(forms.at_most), jit(forms.within)
soft_capped, sigmoid = jit(formulas.soft_capped), jit(formulas.sigmoid)


@jit
def activate_bound(sums, gate_at, up_at, columns, form):
    """The two factors of each hidden element, in place of the products with gate and up."""
    if form.shape == SOFTCAP:
        _soft_cap(sums, gate_at, up_at, columns, form)
    else:
        if form.shape == CLAMP:
            _limit(sums, gate_at, columns, form.gate_limit)
        _activate_steeper(sums, gate_at, columns, form)
        if form.shape == CLAMP_ACTIVATED:
            _limit(sums, gate_at, columns, form.gate_limit)
        for c in range(up_at, up_at + columns):
            store(sums, c, within(load(sums, c), form.up_limit) + form.up_offset)


@jit
def _limit(sums, at, columns, limit):
    for c in range(at, at + columns):
        store(sums, c, at_most(load(sums, c), limit))


@jit
def _activate_steeper(sums, at, columns, form):
    for c in range(at, at + columns):
        store(sums, c, load(sums, c) * form.slope)
    activate(sums, at, columns, form.activation)
    for c in range(at, at + columns):
        store(sums, c, load(sums, c) / form.slope)


@jit
def _soft_cap(sums, gate_at, up_at, columns, form):
    one = form.slope / form.slope
    for c in range(columns):
        gate = load(sums, gate_at + c)
        store(sums, gate_at + c, soft_capped(gate, form.gate_limit) * sigmoid(form.slope * gate, one))
        store(sums, up_at + c, soft_capped(load(sums, up_at + c), form.up_limit) + form.up_offset)
