"""The columns of `flashmoe sim`'s tables: what each shows of a row of the JSON, and what it means, with its formula."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

WIDTH = 120
Row = Mapping[str, Any]  # the fields of a `sim.Report`, and what is said beside it
Rows = Sequence[Row]


def _always(_: Rows) -> bool:
    return True


class Column(NamedTuple):
    """A column of a table; `meaning` has its formula, `shown` says whether these rows have it."""

    name: str
    unit: str
    text: Callable[[Row], str]
    meaning: str
    shown: Callable[[Rows], bool] = _always


def _share(name: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[name]:.1f}"


def _us(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:,.1f}"


def _megabytes(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name] / 1e6:,.1f}"


def _of_seeds(which: str) -> Callable[[Row], str]:
    return lambda row: f"{row['spread']['latency_us'][which]:,.1f}"


def _any(name: str) -> Callable[[Rows], bool]:
    return lambda rows: any(row.get(name) not in (None, 0) for row in rows)


def _of_choices(name: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[name] / max(1, row['rows'] - row['added'] + row['dropped']):.1f}"


def _cut(rows: Rows) -> bool:
    return _any("capacity")(rows) or _any("dropped")(rows) or _any("added")(rows)


def _idle(cause: str, meaning: str) -> Column:
    return Column(cause, "% idle", lambda row: f"{100 * row['idle'][cause]:.1f}", meaning)


def _four_digits(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:,.0f}" if row[name] >= 1000 else f"{row[name]:.4g}"


def _error(row: Row) -> str:
    if row["knobs"]["rate"] is not None:
        return "-"
    return "no measurement" if row["left_out_error"] is None else f"{100 * row['left_out_error']:.1f}"


def _fitted(rows: Rows) -> bool:
    """Some have no set rate, for which measurements say something."""
    return any(row["knobs"]["rate"] is None for row in rows)


def _place(row: Row) -> str:
    if row.get("over_fastest") is None:
        return "-"
    return f"{row['over_fastest']:.2f}x{ {True: ' tie', None: ' ?', False: ''}[row['tie']] }"


def unfitted(row: Row) -> bool:
    """Neither fitted to its policy on its GPU nor set."""
    return not row["rate_fitted"] and row["knobs"]["rate"] is None


POLICY = Column("policy", "", lambda row: row["policy"], "the schedule, see --list")
TOKENS = Column("tokens", "/rank", lambda row: f"{row['tokens']:,}", "tokens of each rank")
RESULTS: tuple[Column, ...] = (
    POLICY,
    TOKENS,
    Column("latency", "us", _us("latency_us"), "T: from the first task's start to the last one's end on any rank"),
    Column(
        "least", "us", _of_seeds("min"), "the shortest latency of all --seeds; latency is their median", _any("spread")
    ),
    Column("most", "us", _of_seeds("max"), "the longest", _any("spread")),
    Column(
        "error",
        "+-%",
        _error,
        "mean error at measurements that no fit saw: the policy's system, this GPU, about as many tokens",
        _fitted,
    ),
    Column(
        "over",
        "fastest",
        _place,
        "T / the shortest T of these policies; tie: not told apart from it within the errors; ?: an error is not known",
        _any("over_fastest"),
    ),
    Column(
        "tokens",
        "M/s",
        lambda row: f"{row['tokens_per_s'] / 1e6:,.2f}",
        "computed tokens of all ranks / T; a token that lost all its choices is none",
    ),
    Column("tensor", "%", _share("tensor_busy"), "operations with padding / (P R T); P: tensor peak, R: ranks"),
    Column("useful", "%", _share("useful"), "operations of real rows / (P R T)"),
    Column(
        "rate",
        "",
        lambda row: f"{row['rate']:.3f}{'*' if unfitted(row) else ''}",
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
        lambda row: "none" if row["capacity"] is None else f"{row['capacity']:,}",
        "most rows from one rank to one expert",
        _cut,
    ),
    Column("dropped", "%", _of_choices("dropped"), "choices lost to the capacity or to rounding / all choices", _cut),
    Column("added", "%", _of_choices("added"), "choices added by rounding / all choices", _any("added")),
    Column(
        "by rank",
        "max/mean",
        lambda row: f"{row['rank_imbalance']:.2f}",
        "imbalance: rows of the busiest rank / mean over ranks",
    ),
    Column(
        "by expert",
        "max/mean",
        lambda row: f"{row['expert_imbalance']:.2f}",
        "imbalance: rows of the busiest expert (or copy) / mean over experts",
    ),
    Column(
        "NVLink",
        "MB",
        _megabytes("nvlink_bytes_max"),
        "the most that one GPU's NVLink carries, out or in; the table calls it what the machine does",
    ),
    Column("NIC", "MB", _megabytes("nic_bytes_max"), "the same of its NIC", _any("nic_bytes_max")),
    Column(
        "T(2)/T",
        "",
        lambda row: f"{row['overlap_efficiency']:.3f}",
        "T on 2 ranks with the tokens, the experts per rank and the capacity factor of these, / T",
        _any("overlap_efficiency"),
    ),
)
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
BESIDE: tuple[Column, ...] = (  # the parts that `beside.py` adds to a row; nothing of it is there unless asked for
    POLICY,
    TOKENS,
    Column(
        "TPOT",
        "ms",
        lambda row: f"{row['model']['tpot_ms']:,.2f}",
        "--layers: time per output token: T of each MoE layer, and a roofline of attention, dense layers and head",
        _any("model"),
    ),
    Column(
        "tokens",
        "/s/GPU",
        lambda row: f"{row['model']['tokens_per_s_per_gpu']:,.0f}",
        "--layers: tokens of a rank / TPOT",
        _any("model"),
    ),
    Column(
        "energy",
        "J",
        _four_digits("energy_joules"),
        "--watts W: W R T, with --layers W R TPOT",
        _any("energy_joules"),
    ),
    Column(
        "energy",
        "J/Mtok",
        _four_digits("joules_per_million_tokens"),
        "--watts W: 1e6 W T / tokens of a rank, with --layers 1e6 W TPOT / tokens",
        _any("joules_per_million_tokens"),
    ),
    Column(
        "cost",
        "$/Mtok",
        _four_digits("dollars_per_million_tokens"),
        "--dollars-per-gpu-hour D: 1e6 (D / 3600 s) T / tokens of a rank, with --layers TPOT instead of T",
        _any("dollars_per_million_tokens"),
    ),
)
TABLES = (RESULTS, TIMES, BESIDE)


def column_lines() -> Iterator[str]:
    """What every column means, for the help."""
    named = {column.name + column.unit: column for table in TABLES for column in table}
    for column in named.values():
        head = f"  {column.name} {column.unit}".rstrip()
        yield from textwrap.wrap(f"{head:22}{column.meaning}", WIDTH, subsequent_indent=" " * 22)


def table_lines(columns: Iterable[Column], rows: Rows, renamed: Mapping[str, str]) -> Iterator[str]:
    """A table of the columns that these rows have, some under another name; nothing if only the first two are."""
    shown = [column for column in columns if column.shown(rows)]
    if shown == [POLICY, TOKENS]:
        return
    cells = [[renamed.get(column.name, column.name) for column in shown], [column.unit for column in shown]]
    cells += [[column.text(row) for column in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield " ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
