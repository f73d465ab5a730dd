"""Compiled kernels on this machine: where they are, how many, how many bytes, by kind.

They are made again when they are needed: half a minute for a CPU kernel, some ten seconds for one for GPUs or for the
simulator's event loop. When one is made, those that nobody has used for 30 days are removed, and beyond 1 GiB in all
those that were used longest ago. $FLASHMOE_CACHE_DIR names another folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from reference.cache_folder import VARIABLE, cache_folder, our_files

from .plan import readable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove these files, and nothing else")


def main(args: argparse.Namespace) -> int:
    """List the files, or remove them."""
    try:
        folder = cache_folder()
    except OSError as error:
        print(f"nothing is kept: {error}; {VARIABLE} names another folder")
        return 0
    kept = our_files(folder)
    if args.clear:
        files = [file for found in kept.values() for file in found]
        print(f"removed {_clear(files)} from {folder}")
    else:
        print("\n".join(lines(folder, kept)))
    return 0


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
