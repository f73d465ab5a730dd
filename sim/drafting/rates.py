"""The fitted numbers of each (policy, GPU): at most two knobs that a policy leaves to measurements.

`rate`, of every policy, is the share of the tensor peak that its tiles reach. FlashMoE has a second, the time per tile
of its scheduler, for which processors wait. (Megatron-LM's host time is another; fitted as well, it made rows that the
fit had not seen worse, because two models of one table ask for numbers that are a factor of two apart.)
`flashmoe validate --fit` fits them to the published tables and writes rates.toml beside this file; nobody does by hand.

A GPU for which nothing is published gets the mean of what the policy has on GPUs of the same chip, and without these on
all its GPUs. On another GPU of a chip a multiprocessor loads, promotes and stores as much per clock, whatever its
tensor cores were cut to: what carries over is the operations per clock and multiprocessor that tiles reach, and no tile
reaches more than `MOST_RATE` of the GPU's own peak. Between chips the share of the peak carries over, unless a system
multiplies by the same instructions on all (`ONE_PRODUCT`). A scheduler's time is taken in clocks. A policy without any
number gets `DEFAULTS`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ..world.hardware import Hardware
from ..world.machine_files import load_hardware
from ..world.machine_names import gpu_kind, hardware_names

RATE = "rate"
SCHEDULE = "schedule_ns"
FITTED = {"flashmoe": (RATE, SCHEDULE)}  # knobs; of the other policies only the rate
DEFAULTS = {  # assumptions, until somebody measures the policy
    RATE: 0.6,  # between FlashMoE's third of the peak and the four fifths of large matrix products
    SCHEDULE: 400,  # a few round trips to the L2, of some 250 clocks each
}
MOST_RATE = 0.9  # assumption: clocks fall under load, and a tile fills and drains; MegaMoE reaches 0.85 on H20
CHIPS = (("H100", "H200", "H800", "H20"), ("B200", "GB200", "GB300"))  # GH100 and GB100; the other presets are alone
ONE_PRODUCT = ("flashmoe",)  # v0.1.2 has mma.sync everywhere, whatever is faster on newer chips
FILE = Path(__file__).with_name("rates.toml")

Values = Mapping[str, float]  # by knob
Table = Mapping[str, Mapping[str, Values]]  # by policy and GPU kind


@cache
def fitted_rates() -> Table:
    """All fitted numbers."""
    return tomllib.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def fitted_knobs(policy: str) -> tuple[str, ...]:
    """The knobs that are fitted."""
    return FITTED.get(policy, (RATE,))


def fitted_values(policy: str, hardware_name: str, table: Table | None = None) -> dict[str, float]:
    """Each fitted knob of a policy on this hardware, by default from the file."""
    kind = gpu_kind(hardware_name)
    known = (fitted_rates() if table is None else table).get(policy, {})
    if kind in known:
        return dict(known[kind])
    donors = donors_of(kind, known)
    if not donors:
        return {knob: DEFAULTS[knob] for knob in fitted_knobs(policy)}
    found = {
        knob: sum(_carried(policy, knob, known[gpu][knob], gpu, kind) for gpu in donors) / len(donors)
        for knob in fitted_knobs(policy)
    }
    return {knob: value if knob == RATE else round(value) for knob, value in found.items()}


def donors_of(kind: str, known: Mapping[str, Values]) -> list[str]:
    """The GPUs whose numbers one without its own gets, in order."""
    others = sorted(gpu for gpu in known if gpu != kind)
    return [gpu for gpu in others if _same_chip(gpu, kind)] or others


def _same_chip(gpu: str, other: str) -> bool:
    return any(gpu in chip and other in chip for chip in CHIPS)


def _carried(policy: str, knob: str, value: float, donor: str, kind: str) -> float:
    """What a number of the donor is on the other GPU."""
    if not {donor, kind} <= set(hardware_names()):
        return value
    here, there = load_hardware(kind), load_hardware(donor)
    if knob == RATE and (_same_chip(donor, kind) or policy in ONE_PRODUCT):
        return min(MOST_RATE, value * _per_clock(there) / _per_clock(here))
    return value if knob == RATE else value * _clock(there) / _clock(here)


def _per_clock(hardware: Hardware) -> float:
    """Operations of a multiprocessor and clock at the peak, in thousands; narrower formats have the same multiple."""
    return hardware.tflops["bfloat16"] / (hardware.sms * _clock(hardware))


def _clock(hardware: Hardware) -> float:
    return hardware.clock_ghz or 1.0


def fitted_rate(policy: str, hardware_name: str) -> float:
    """The rate of a policy on this hardware."""
    return fitted_values(policy, hardware_name)[RATE]


def is_fitted(policy: str, hardware_name: str) -> bool:
    """Whether the numbers were fitted to measurements of this policy on this GPU."""
    return gpu_kind(hardware_name) in fitted_rates().get(policy, {})
