"""What every experiment needs: its flags, its rows on disk, and its table; and what several share."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from flashmoe_numba.commands.outputs import check_outputs
from flashmoe_numba.errors import UsageError
from flashmoe_numba.processes.cores import count_cores

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


def leave(reason: str, args: argparse.Namespace) -> NoReturn:
    """End here, for want of something: as a smoke run with success, because nothing is wrong; else with an error."""
    if args.smoke:
        print(f"skipped: {reason}")
        sys.exit(0)
    print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    sys.exit(2)


def ranks() -> tuple[int, int, dict[str, Any]]:
    """(rank, number of ranks, the argument that says so to flashmoe_numba.torch): of mpirun, of torchrun, or one."""
    if "PMI_SIZE" in os.environ:
        from mpi4py import MPI

        return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, dict(comm=MPI.COMM_WORLD)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        return dist.get_rank(), dist.get_world_size(), dict(process_group=dist.group.WORLD)
    return 0, 1, {}


def machine() -> Row:
    """Where and when a row was measured."""
    cpu = re.search(r"model name\s*: (.*)", _cpuinfo())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": count_cores(),
    }


def cpu_has(flags: Iterable[str]) -> list[str]:
    """Those of the flags in /proc/cpuinfo that this CPU has."""
    found = re.search(r"^flags\s*: (.*)", _cpuinfo(), re.MULTILINE)
    return [flag for flag in flags if found and flag in found[1].split()]


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def program(packages: Iterable[str]) -> Row:
    """What a row was measured with: the command, the commit, and versions of those packages that are installed.

    The command without --json, which says only where the row is kept.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": re.sub(r" --json[ =]\S+", "", " ".join(["python", *sys.argv])),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def flashmoe_run(**flags: object) -> Row:
    """The report of one `flashmoe run` with these flags, a process of its own."""
    arguments = [part for name, value in {**flags, "json": "-"}.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-Pm", "flashmoe_numba", "run", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if not done.stdout:  # it has said why
        sys.exit(done.returncode)
    report: Row = json.loads(done.stdout)
    return report
