"""What `flashmoe sim` prints: the table of reports, and the list of what there is to choose from."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields

import sim
from reference import MoEConfig
from sim.drafting.trust import trust
from sim.policies import describe

WIDTH = 120
INDENT = "      "
Column = tuple[str, str, Callable[[sim.Report], str]]


def _share(name: str) -> Callable[[sim.Report], str]:
    return lambda report: f"{100 * getattr(report, name):.1f}"


def _idle(cause: str) -> Callable[[sim.Report], str]:
    return lambda report: f"{100 * report.idle[cause]:.1f}"


def _error(report: sim.Report) -> str:
    found = trust(report.policy, report.hardware, report.tokens)
    return "-" if found is None else f"{100 * found:.0f}"


COLUMNS: tuple[Column, ...] = (  # name, unit, text
    ("policy", "", lambda report: report.policy),
    ("tokens", "/rank", lambda report: f"{report.tokens:,}"),
    ("latency", "us", lambda report: f"{report.latency_us:,.1f}"),
    ("tokens", "M/s", lambda report: f"{report.tokens_per_s / 1e6:,.2f}"),
    ("tensor", "%", _share("tensor_busy")),
    ("useful", "%", _share("useful")),
    ("resident", "%", _share("resident")),
    *((cause.replace("dependency", "depend."), "% idle", _idle(cause)) for cause in sim.IDLE_CAUSES),
    ("exposed", "us", lambda report: f"{report.exposed_communication_us:,.1f}"),
    ("NVLink", "MB", lambda report: f"{report.nvlink_bytes_max / 1e6:,.1f}"),
    ("NIC", "MB", lambda report: f"{report.nic_bytes_max / 1e6:,.1f}"),
    ("rate", "", lambda report: f"{report.rate:.3f}{'' if report.rate_fitted else '*'}"),
    ("error", "+-%", lambda report: _error(report)),
)
OVERLAP: Column = ("T(2)/T", "", lambda report: f"{report.overlap_efficiency:.3f}")


def table(preset: str, config: MoEConfig, seed: int, reports: Sequence[sim.Report]) -> Iterator[str]:
    """Lines for people; the reports differ in policy and tokens."""
    first = reports[0]
    gated = " gated" if config.expert_kind.gated else ""
    sizes = f"hidden {config.hidden}, ffn {config.ffn}{gated}, {config.num_experts} experts, top-{config.num_topk}"
    yield f"simulated on {first.hardware}: {preset} on {first.ranks} ranks, {sizes}"
    yield f"{first.precision}, routing {first.routing}, seed {seed}"
    yield ""
    columns = [column for column in COLUMNS if column[0] != "NIC" or any(report.nic_bytes_max for report in reports)]
    columns += [OVERLAP] if first.overlap_efficiency is not None else []
    cells = [[name for name, _, _ in columns], [unit for _, unit, _ in columns]]
    cells += [[text(report) for _, _, text in columns] for report in reports]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield " ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
    if not all(report.rate_fitted for report in reports):
        yield "* not fitted to measurements of this policy on this GPU"
    yield "error: mean of published measurements of the policy on the GPU, with about as many tokens, that no fit saw;"
    yield "- no measurement"


def catalogue() -> Iterator[str]:
    """Policies with their knobs, hardware, routings, precisions."""
    yield "policies, with their knobs and the defaults"
    for policy in sim.POLICY_NAMES:
        yield f"  {policy:10} {describe(policy)}"
        yield from textwrap.wrap(", ".join(_knobs(policy)), WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
    yield "hardware: 8xKIND is one node, 2x8xKIND two; or the path of a .toml file"
    yield from (f"  {name}" for name in sim.hardware_names())
    yield "routings"
    yield from (f"  {name}" for name in sim.ROUTING_NAMES)
    yield "precisions"
    yield from (f"  {name}" for name in sim.PRECISIONS)


def _knobs(policy: str) -> Iterator[str]:
    knobs = sim.make_knobs(policy, {})
    for field in fields(knobs):
        words = knobs.choices.get(field.name, ())
        yield f"{field.name}={asdict(knobs)[field.name]}" + (f" ({'|'.join(words)})" if words else "")
