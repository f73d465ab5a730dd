"""What `flashmoe sim --list` prints: what there is to simulate, and where every default is from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict

import sim
from sim.drafting import comm_sms, cost, draft, rank_draft, rates
from sim.drafting.knob_texts import KnobText, knob_texts
from sim.policies import describe
from sim.policies.outside import is_file
from sim.world.hardware import Hardware
from sim.world.machine_names import gpu_kind, hardware_file
from sim.world.machine_schema import SOURCED, VALUES
from sim.world.precision import SIZES, precision

from ..errors import UsageError
from .columns import WIDTH
from .flags import blaming

INDENT = "      "
MODEL = "model"
ASSUMED = "assumption"
CONSTANTS = {  # of the model of costs: what it is, its value, where it is from
    "weights' share of what the memory streams": (
        cost.WEIGHTS_SHARE,
        "DeepGEMM's products on H800 reach 0.80 of the datasheet's bandwidth, which is this share of 0.9",
    ),
    "bytes that a multiprocessor draws from the L2 in a clock": (cost.PORT_BYTES, ASSUMED),
    "part of the L2 that weights may keep": (cost.L2_SHARE, f"{ASSUMED}: the rest is rows and results in flight"),
    "least depth of a part of a router's product that is split": (rank_draft.SPLIT_DEPTH, ASSUMED),
    "widths of tiles that are tried": (f"{min(draft.TUNED_WIDTHS)} to {max(draft.TUNED_WIDTHS)}", "DeepGEMM's"),
    "most of its tensor peak that a tile reaches on a GPU without measurements": (
        rates.MOST_RATE,
        f"{ASSUMED}: clocks fall under load, and a tile fills and drains; MegaMoE reaches 0.85 on H20",
    ),
    "rate of a policy that nobody measured": (
        rates.DEFAULTS[rates.RATE],
        f"{ASSUMED}: between FlashMoE's third of the peak and the four fifths of large matrix products",
    ),
    "nanoseconds per tile of an OS block that nobody measured": (
        rates.DEFAULTS[rates.SCHEDULE],
        f"{ASSUMED}: a few round trips to the L2",
    ),
    "DeepEP's multiprocessors over those that its links need": (comm_sms.HEADROOM, "DeepEP V2's own model"),
}


def catalogue() -> Iterator[str]:
    """Policies with their knobs, hardware, routings, precisions."""
    yield "* an assumption; of all else --list NAME says the source, of a policy, a machine, a precision, or the model"
    yield "policies, with their knobs and the defaults; or the path of a .py file, which --new-policy begins"
    for policy in sim.policy_names():
        yield f"  {policy:10} {describe(policy)}"
        yield from _wrapped(", ".join(_knobs(policy)))
    yield "hardware: 8xKIND is one node, 2x8xKIND two; or the path of a .toml file, 2xFILE.toml two of its nodes"
    for kind in sim.hardware_names():
        yield f"  {kind}"
        yield from _wrapped(", ".join(f"{name}={value}{mark}" for name, value, mark in _machine(kind)))
    yield "routings"
    yield from (f"  {name}" for name in sim.ROUTING_NAMES)
    yield "precisions"
    yield from (f"  {name}" for name in sim.PRECISIONS)
    yield f"the {MODEL} of costs"
    yield from (f"  {name}: {value}{_mark(source)}" for name, (value, source) in CONSTANTS.items())


def details(name: str) -> Iterator[str]:
    """One of them: each of its values with what it is and where it is from.

    Raises:
        UsageError: there is no such thing.
    """
    if name == MODEL:
        yield "the model of costs (sim/drafting/cost.py)"
        for what, (value, source) in CONSTANTS.items():
            yield from _entry(f"{what}: {value}", source)
    elif name in sim.policy_names() or is_file(name):
        with blaming("argument --list"):
            yield from _policy(name)
    elif name in sim.PRECISIONS:
        yield from _precision(name)
    else:
        yield from _hardware(name)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)


def _mark(source: str) -> str:
    return "*" if source.startswith(ASSUMED) else ""


def _entry(head: str, text: str) -> Iterator[str]:
    yield f"  {head}"
    yield from _wrapped(text)


# ---- policies


def _knobs(policy: str) -> Iterator[str]:
    knobs = sim.make_knobs(policy, {})
    texts = knob_texts(type(knobs))
    for name, value in asdict(knobs).items():
        words = knobs.choices.get(name, ())
        yield f"{name}={value}{_mark(texts[name].default)}" + (f" ({'|'.join(words)})" if words else "")


def _policy(policy: str) -> Iterator[str]:
    knobs = sim.make_knobs(policy, {})
    yield f"{policy}: {describe(policy)}"
    for name, text in knob_texts(type(knobs)).items():
        yield from _entry(f"{name} = {getattr(knobs, name)}", "; ".join(_of_knob(policy, name, text)))


def _of_knob(policy: str, name: str, text: KnobText) -> Iterator[str]:
    if text.meaning:
        yield text.meaning
    yield f"default: {text.default}"
    fitted = {gpu: values[name] for gpu, values in rates.fitted_rates().get(policy, {}).items() if name in values}
    if fitted:
        yield f"fitted: {', '.join(f'{value} on {gpu}' for gpu, value in fitted.items())}"


# ---- machines and precisions


def _machine(kind: str) -> Iterator[tuple[str, float, str]]:
    """Its values, and whether they are assumptions."""
    hardware = sim.load_hardware(kind)
    return ((name, value, _mark(hardware.sources[name])) for name, value in _values(hardware).items())


def _values(hardware: Hardware) -> dict[str, float]:
    """All that have a source, in the order of the file."""
    plain = {name: getattr(hardware, name) for name in (*VALUES, *SOURCED)}
    peaks = {f"tflops.{mma_type}": value for mma_type, value in hardware.tflops.items()}
    return {name: value for name, value in {**plain, **peaks}.items() if value is not None}


def _hardware(name: str) -> Iterator[str]:
    try:
        hardware = sim.load_hardware(name)
    except (OSError, ValueError) as error:
        if hardware_file(name) is not None or gpu_kind(name).upper() in sim.hardware_names():
            raise UsageError(f"argument --list: {error}") from None
        known = [f"a policy ({', '.join(sim.policy_names())}, or a .py file)"]
        known += [f"hardware ({', '.join(sim.hardware_names())}, or a .toml file)"]
        known += [f"a precision ({', '.join(sim.PRECISIONS)})"]
        raise UsageError(f"argument --list: must be {', '.join(known)}, or {MODEL}; got {name!r}") from None
    yield f"{hardware.name}: {hardware.num_nodes} x {hardware.gpus_per_node} GPUs, fitted rates of {hardware.chip}"
    for value_name, value in _values(hardware).items():
        yield from _entry(f"{value_name} = {value}", hardware.sources[value_name])


def _precision(name: str) -> Iterator[str]:
    formats = precision(name)
    sizes = ", ".join(f"{size.removesuffix('_bytes')} {getattr(formats, size):.5g}" for size in SIZES)
    yield f"{name}: products at the rate of {formats.mma_type}; bytes per element, scales included: {sizes}"
    yield from _wrapped(
        "scales: of fp8 DeepSeek-V3's, of fp8xfp4 DeepGEMM's (tests/test_mega_moe.py), of mxfp8 OCP's microscaling "
        "formats, of nvfp4 NVIDIA's; results of narrow formats travel as bfloat16, as in DeepEP"
    )
