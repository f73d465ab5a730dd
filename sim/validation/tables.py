"""Published tables: CSV files of one schema, a measurement a row.

Columns: see `COLUMNS`; others may be there and are ignored. A number is digits, possibly with a fraction, an exponent
or a K for 1024. Empty cells are what the source does not state.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "data"
TEXTS = ("source", "hardware", "system", "dtype", "metric", "unit", "exactness", "notes")
NUMBERS = ("tokens_per_rank", "hidden", "intermediate", "experts", "topk", "ep", "tp", "value")
COLUMNS = (*TEXTS, *NUMBERS)

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?(K?)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published measurement; `file` and `line` say where it stands. Numbers are None where the cell is empty."""

    file: str
    line: int
    source: str
    hardware: str
    system: str
    dtype: str
    metric: str
    unit: str
    exactness: str
    notes: str
    tokens_per_rank: float | None
    hidden: float | None
    intermediate: float | None
    experts: float | None
    topk: float | None
    ep: float | None
    tp: float | None
    value: float | None


def read_folder(folder: Path = FOLDER) -> list[Row]:
    """The rows of all CSV files in a folder, file after file by name.

    Raises:
        ValueError: no CSV file, or one that breaks the schema: file, line, column and rule.
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"data must be a folder with .csv files, got {str(folder)!r}, which has none")
    return [row for file in files for row in read_table(file)]


def read_table(file: Path) -> list[Row]:
    """The rows of one file.

    Raises:
        ValueError: naming file, line, column and rule.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return list(_rows(file, csv.DictReader(stream, strict=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not a CSV file in UTF-8: {error}") from None


def _rows(file: Path, reader: csv.DictReader[str]) -> Iterator[Row]:
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{file}: must have the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
    width = len(reader.fieldnames or ())
    for cells in reader:
        line = reader.line_num
        if None in cells or None in cells.values():  # how the reader shows too many and too few
            got = "more" if None in cells else sum(cell is not None for cell in cells.values())
            raise ValueError(f"{file}, line {line}: must have {width} cells, got {got}")
        texts = {name: cells[name].strip() for name in TEXTS}
        numbers = {name: _number(f"{file}, line {line}, column {name}", cells[name]) for name in NUMBERS}
        yield Row(file=file.name, line=line, **texts, **numbers)  # type: ignore[arg-type]


def _number(where: str, cell: str) -> float | None:
    if not cell.strip():
        return None
    match = _NUMBER.fullmatch(cell.strip())
    if match is None:
        raise ValueError(f"{where}: must be a number, got {cell!r}")
    digits = cell.strip().rstrip("kK")
    return float(digits) * (1024 if match[3] else 1)
