"""The one fitted number per (policy, GPU): the share of the tensor peak that its tiles reach.

`flashmoe validate --fit` fits them to the published tables and writes rates.toml beside this file; nobody does by hand.
A GPU for which nothing is published gets the mean of the policy's GPUs of the same chip, which differ in memory and
clocks, and without these that of all its GPUs; a policy without any `DEFAULT_RATE`.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

from ..world.machine_names import gpu_kind as gpu_kind

DEFAULT_RATE = 0.6  # assumption: between FlashMoE's third of the peak and the four fifths of large matrix products
CHIPS = (("H100", "H200", "H800", "H20"), ("B200", "GB200"))  # GH100 and GB100; the other presets are alone
FILE = Path(__file__).with_name("rates.toml")


@cache
def fitted_rates() -> dict[str, dict[str, float]]:
    """All fitted rates, by policy and GPU kind."""
    return tomllib.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def fitted_rate(policy: str, hardware_name: str) -> float:
    """The rate of a policy on this hardware."""
    rates = fitted_rates().get(policy, {})
    if not rates:
        return DEFAULT_RATE
    kind = gpu_kind(hardware_name)
    same_chip = [rates[gpu] for chip in CHIPS if kind in chip for gpu in chip if gpu in rates]
    others = same_chip or list(rates.values())
    return rates.get(kind, sum(others) / len(others))


def is_fitted(policy: str, hardware_name: str) -> bool:
    """Whether the rate was fitted to measurements of this policy on this GPU."""
    return gpu_kind(hardware_name) in fitted_rates().get(policy, {})
