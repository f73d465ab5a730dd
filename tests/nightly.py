"""What is left to nights (HYPOTHESIS_PROFILE=nightly): long forms of tests that have a short one, which always runs."""

import os

import pytest

IS_NIGHT = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def at_night(reason):
    """A mark of tests, or of their parameters, that are skipped by day."""
    return pytest.mark.skipif(not IS_NIGHT, reason=f"{reason}: a nightly test")


def at_night_only(*values):
    """Parameters of a test that also has others; a tuple is several of them."""
    mark = at_night("a size more")
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark) for value in values]
