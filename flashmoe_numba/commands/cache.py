"""Compiled kernels on this machine: where they are, how many, how many bytes, by kind.

They are made again when they are needed: half a minute for a CPU kernel, some ten seconds for one for GPUs. Kernels of
older sources and versions stay until they are cleared. $FLASHMOE_CACHE_DIR names another folder.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from ..device.compilation import cache_folder
from ..gpu.variants import ARCHITECTURES
from .plan import readable

STAMP = "-[0-9a-f]{24}"
KINDS = {  # what each of our files is called; the folder may hold others, which are left alone
    "CPU kernels (*.nbi, *.nbc)": re.compile(rf"[\w.]+{STAMP}\.py\w+(?:\.\d+)?\.nb[ic]"),
    "GPU kernels (*.cubin, *.json)": re.compile(rf"(?:{'|'.join(ARCHITECTURES)})-\w+-\w+{STAMP}\.(?:cubin|json)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove these files, and nothing else")


def main(args: argparse.Namespace) -> int:
    """List the files, or remove them."""
    folder = cache_folder()
    kept = kept_files(folder)
    if args.clear:
        files = [file for found in kept.values() for file in found]
        print(f"removed {_clear(files)} from {folder}")
    else:
        print("\n".join(lines(folder, kept)))
    return 0


def kept_files(folder: Path) -> dict[str, list[Path]]:
    """Our files in a folder, by kind; none if there is no such folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return {kind: [file for file in files if name.fullmatch(file.name)] for kind, name in KINDS.items()}


def lines(folder: Path, kept: dict[str, list[Path]]) -> Iterator[str]:
    """The table that people read."""
    yield f"{folder}{'' if folder.is_dir() else ', which does not exist yet'}"
    for kind, files in kept.items():
        yield f"  {kind:32}{_amount([file.stat().st_size for file in files])}"


def _clear(files: list[Path]) -> str:
    """Remove files; returns how many, and how many bytes. One that another process removed first does not count."""
    sizes = []
    for file in files:
        try:
            size = file.stat().st_size
            file.unlink()
        except FileNotFoundError:
            continue
        sizes.append(size)
    return _amount(sizes)


def _amount(sizes: list[int]) -> str:
    plural = "" if len(sizes) == 1 else "s"
    return f"{len(sizes):,} file{plural}, {sum(sizes):,} bytes ({readable(sum(sizes))})"
