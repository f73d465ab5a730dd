"""What every experiment needs: its flags, its rows on disk, and its table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashmoe_numba.commands.sizes import check_outputs
from flashmoe_numba.errors import UsageError

Row = dict[str, Any]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """`--smoke` and `--json`, under the experiment's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest case only, in seconds")
    parser.add_argument("--json", type=_rows_file, metavar="FILE", help="append the rows as JSON lines")
    return parser


def _rows_file(text: str) -> Path:
    """An argparse type: a file that can be written, which is seen before anything runs."""
    try:
        check_outputs({"--json": str(Path(text).absolute())})
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("argument --json: ")) from None
    return Path(text)


def store(rows: Iterable[Row], file: Path | None) -> None:
    """Append the rows to the file, one JSON object per line."""
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)


def show(rows: Sequence[Row], formats: dict[str, str]) -> None:
    """Print the columns of `formats` (heading -> format specification; the heading's first word is the row's key)."""
    columns = [[heading, *(format(row[heading.split()[0]], spec) for row in rows)] for heading, spec in formats.items()]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)
