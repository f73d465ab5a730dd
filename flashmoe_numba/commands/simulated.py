"""What `flashmoe sim` prints: the tables of reports, what their columns mean, and the list of what there is."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import sim
from reference import MoEConfig
from sim.policies import SAME, describe

WIDTH = 120
INDENT = "      "
TERMS = {
    "system": "terms system: each policy's own tiles, and the rate fitted to its system",
    "schedule": "terms schedule: tiles of {tile_m} x {tile_n} and a rate of {rate:.3f} for all".format_map(SAME),
}
Rows = Sequence[sim.Report]


def _always(_: Rows) -> bool:
    return True


class Column(NamedTuple):
    """A column of a table; `meaning` has its formula, `shown` says whether these reports have it."""

    name: str
    unit: str
    text: Callable[[sim.Report], str]
    meaning: str
    shown: Callable[[Rows], bool] = _always


def _share(name: str) -> Callable[[sim.Report], str]:
    return lambda report: f"{100 * getattr(report, name):.1f}"


def _us(name: str) -> Callable[[sim.Report], str]:
    return lambda report: f"{getattr(report, name):,.1f}"


def _megabytes(name: str) -> Callable[[sim.Report], str]:
    return lambda report: f"{getattr(report, name) / 1e6:,.1f}"


def _of_seeds(which: str) -> Callable[[sim.Report], str]:
    return lambda report: f"{(report.spread or {})['latency_us'][which]:,.1f}"


def _any(name: str) -> Callable[[Rows], bool]:
    return lambda reports: any(getattr(report, name) not in (None, 0) for report in reports)


def _of_choices(name: str) -> Callable[[sim.Report], str]:
    return lambda report: f"{100 * getattr(report, name) / max(1, report.rows - report.added + report.dropped):.1f}"


def _cut(reports: Rows) -> bool:
    return _any("capacity")(reports) or _any("dropped")(reports) or _any("added")(reports)


def _unfitted(report: sim.Report) -> bool:
    """Neither fitted to its policy on its GPU nor set."""
    return not report.rate_fitted and report.knobs["rate"] is None


POLICY = Column("policy", "", lambda report: report.policy, "the schedule, see --list")
TOKENS = Column("tokens", "/rank", lambda report: f"{report.tokens:,}", "tokens of each rank")
RESULTS: tuple[Column, ...] = (
    POLICY,
    TOKENS,
    Column("latency", "us", _us("latency_us"), "T: from the first task's start to the last one's end on any rank"),
    Column(
        "least", "us", _of_seeds("min"), "the shortest latency of all --seeds; latency is their median", _any("spread")
    ),
    Column("most", "us", _of_seeds("max"), "the longest", _any("spread")),
    Column(
        "tokens",
        "M/s",
        lambda report: f"{report.tokens_per_s / 1e6:,.2f}",
        "computed tokens of all ranks / T; a token that lost all its choices is none",
    ),
    Column("tensor", "%", _share("tensor_busy"), "operations with padding / (P R T); P: tensor peak, R: ranks"),
    Column("useful", "%", _share("useful"), "operations of real rows / (P R T)"),
    Column(
        "rate",
        "",
        lambda report: f"{report.rate:.3f}{'*' if _unfitted(report) else ''}",
        "share of P that tiles reach: fitted to measurements, (*) but not of this policy on this GPU, or set",
    ),
    Column("host", "us", _us("host_us"), "part of T in which the host works and nothing else; mean over ranks"),
    Column(
        "dense",
        "us",
        _us("dense_us"),
        "part of T in which the model's dense work runs and no task of the layer; mean over ranks",
        _any("dense_us"),
    ),
    Column(
        "capacity",
        "rows",
        lambda report: "none" if report.capacity is None else f"{report.capacity:,}",
        "most rows from one rank to one expert",
        _cut,
    ),
    Column("dropped", "%", _of_choices("dropped"), "choices lost to the capacity or to rounding / all choices", _cut),
    Column("added", "%", _of_choices("added"), "choices added by rounding / all choices", _any("added")),
    Column(
        "by rank",
        "max/mean",
        lambda report: f"{report.rank_imbalance:.2f}",
        "imbalance: rows of the busiest rank / mean over ranks",
    ),
    Column(
        "by expert",
        "max/mean",
        lambda report: f"{report.expert_imbalance:.2f}",
        "imbalance: rows of the busiest expert (or copy) / mean over experts",
    ),
    Column("NVLink", "MB", _megabytes("nvlink_bytes_max"), "the most that one GPU's NVLink carries, out or in"),
    Column("NIC", "MB", _megabytes("nic_bytes_max"), "the same of its NIC", _any("nic_bytes_max")),
    Column(
        "T(2)/T",
        "",
        lambda report: f"{report.overlap_efficiency:.3f}",
        "T on 2 ranks with the tokens, the experts per rank and the capacity factor of these, / T",
        _any("overlap_efficiency"),
    ),
)


def _idle(cause: str, meaning: str) -> Column:
    return Column(cause, "% idle", lambda report: f"{100 * report.idle[cause]:.1f}", meaning)


TIMES: tuple[Column, ...] = (
    POLICY,
    TOKENS,
    Column("resident", "%", _share("resident"), "slot time in which tasks hold slots / (T R S); S: slots of a GPU"),
    _idle("launch", "free slots wait for the host to start a kernel"),
    _idle("barrier", "for a meeting of ranks"),
    _idle("waiting", "for rows, results, a signal, or work on another rank"),
    _idle("dependency", "for work on the same GPU"),
    _idle("tail", "nothing more starts on the GPU; these and resident make 100"),
    Column(
        "exposed",
        "us",
        _us("exposed_communication_us"),
        "part of T in which the rank is at an end of a transfer and no product runs on it; mean over ranks",
    ),
)


def column_lines() -> Iterator[str]:
    """What every column means, for the help."""
    named = {column.name + column.unit: column for column in (*RESULTS, *TIMES)}
    for column in named.values():
        head = f"  {column.name} {column.unit}".rstrip()
        yield from textwrap.wrap(f"{head:22}{column.meaning}", WIDTH, subsequent_indent=" " * 22)


def tables(about: Mapping[str, Any], config: MoEConfig, reports: Rows) -> Iterator[str]:
    """Lines for people; the reports differ in policy and tokens.

    `about` has what they share: "preset", "seeds" in words, "terms", "set".
    """
    first = reports[0]
    yield f"simulated on {first.hardware}: {about['preset']} on {first.ranks} ranks, {_sizes(config)}"
    limit = "" if config.capacity is not None else ", no capacity"
    yield f"{first.precision}, routing {first.routing}, {about['seeds']}{limit}"
    yield TERMS[about["terms"]] + (f"; set {', '.join(about['set'])}" if about["set"] else "")
    yield ""
    yield from _table(RESULTS, reports)
    yield ""
    yield from _table(TIMES, reports)
    if any(map(_unfitted, reports)):
        yield "* not fitted to measurements of this policy on this GPU"


def _sizes(config: MoEConfig) -> str:
    gated = " gated" if config.expert_kind.gated else ""
    parts = [f"hidden {config.hidden}", f"ffn {config.ffn}{gated}", f"{config.num_experts} experts"]
    parts += [f"{config.num_zero} zero experts"] if config.num_zero else []
    parts += [f"shared ffn {config.shared_ffn}"] if config.shared_ffn else []
    return ", ".join([*parts, f"top-{config.num_topk}"])


def _table(columns: Iterable[Column], reports: Rows) -> Iterator[str]:
    columns = [column for column in columns if column.shown(reports)]
    cells = [[column.name for column in columns], [column.unit for column in columns]]
    cells += [[column.text(report) for column in columns] for report in reports]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield " ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()


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
