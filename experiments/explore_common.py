"""Searches of the explorer, given by the flags of `flashmoe explore`."""

from __future__ import annotations

import argparse
import shlex

from flashmoe_numba.commands import explore as command
from flashmoe_numba.explore.search import Search


def search_of(flags: str) -> Search:
    """The search of one world."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    (search,) = command.make_searches(parser.parse_args(shlex.split(flags))).values()
    return search
