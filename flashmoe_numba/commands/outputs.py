"""What a command gives: lines for people, JSON, and files whose places are checked before anything runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reference.pictures import picture_format

from ..errors import UsageError


def add_json_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; with - to stdout, alone")


def give(path: str | None, lines: Iterable[str], value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """A result by `--json`: lines for people unless JSON goes to stdout, and JSON where it is asked for."""
    if path != "-":
        print("\n".join(lines), flush=True)
    if path:
        write_json(path, value)


def write_json(path: str, value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """To a file that was checked by `check_outputs`, or to stdout for "-"."""
    text = json.dumps(value, indent=1, allow_nan=False)
    if path == "-":
        print(text)
        sys.stdout.flush()
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")


def check_outputs(paths: dict[str, str | None]) -> None:
    """See that a file can be written at each flag's path, before anything runs; "-" is stdout, for JSON only.

    A folder that is not there is made, and said to be. Nothing else is left behind. `--plot` is a picture.

    Raises:
        UsageError: naming the flag and what is wrong.
    """
    given = {flag: path for flag, path in paths.items() if path is not None}
    if "--plot" in given:
        _check_picture(given["--plot"])
    for flag, path in given.items():
        if path == "-" and flag != "--json":
            raise UsageError(f"argument {flag}: must be a file, got '-'")
        same = [other for other in given if other != flag and os.path.realpath(given[other]) == os.path.realpath(path)]
        if same:
            raise UsageError(f"argument {flag}: must not be the file of {same[0]}, got {path!r}")
        if path != "-":
            if path.endswith(os.sep):
                raise UsageError(f"argument {flag}: cannot write {path!r}: it names a folder")
            _check_writable(flag, path)


def _check_picture(path: str) -> None:
    if not importlib.util.find_spec("matplotlib"):
        raise UsageError("argument --plot: needs matplotlib, not found here: pip install 'flashmoe-numba[plots]'")
    try:
        picture_format(path)
    except ValueError as error:
        raise UsageError(f"argument --plot: {error}") from None


def _check_writable(flag: str, path: str) -> None:
    file = Path(path)
    make_folder(flag, path, file.parent)
    try:
        if file.is_fifo():  # to open and close it would tell its reader that this was all
            return
        existed = file.exists()
        file.open("a").close()
        if not existed:
            file.resolve().unlink(missing_ok=True)  # of a link, what it points to; ranks check at the same time
    except OSError as error:
        raise UsageError(f"argument {flag}: cannot write {path!r}: {error.strerror}") from None


def make_folder(flag: str, path: str, folder: Path) -> None:
    """Make the folder for a flag's path, if it is not there, and say so on stderr: it may be a slip of the pen.

    Raises:
        UsageError: it cannot be made, or is something else.
    """
    try:
        folder.mkdir(parents=True)
        print(f"flashmoe: {flag}: made the folder {str(folder)!r}, which was not there", file=sys.stderr)
    except OSError as error:
        if not folder.is_dir():
            raise UsageError(f"argument {flag}: cannot write {path!r}: {error.strerror}") from None
