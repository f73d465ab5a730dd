"""The version of this package. The only place where it is written is setup.cfg."""

from __future__ import annotations

import configparser
import importlib.metadata
from pathlib import Path

NAME = "flashmoe-numba"
SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"  # of a checkout


def version() -> str:
    """Of the checkout that this file is in, whatever is installed beside it; else of the installed package."""
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read(SETUP, encoding="utf-8")
    if metadata.get("metadata", "name", fallback=None) == NAME:
        return metadata.get("metadata", "version")
    return importlib.metadata.version(NAME)
