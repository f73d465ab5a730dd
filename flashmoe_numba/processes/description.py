"""What a host is, and which code it has: what ranks on several hosts must have in common."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from .machine import machine_name

ROOT = Path(__file__).parents[2]


def describe() -> dict[str, str]:
    """What this host says of itself."""
    versions = [f"{name} {metadata.version(name)}" for name in ("numpy", "numba", "mpi4py")]
    return {"machine": machine_name(), "package": ", ".join([f"flashmoe-numba of source {source_of(ROOT)}", *versions])}


def source_of(root: Path) -> str:
    """A hash of the files that ranks run and read: those of a checkout may differ where versions do not."""
    found = hashlib.blake2b(digest_size=6)
    for package in ("flashmoe_numba", "reference"):
        for file in sorted((root / package).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                found.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()
