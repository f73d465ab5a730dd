"""Integers in a range: what is refused, by which rule."""

import numpy as np
import pytest

from reference import RouterKind
from reference.scalars import check_whole, number


@pytest.mark.parametrize("value", [1, 3, np.int8(2), np.array(3)])
def test_what_is_in_the_range_is_taken(value):
    check_whole("lanes", value, 1, 3)
    check_whole("lanes", value, 1)


@pytest.mark.parametrize(
    ("value", "most", "error", "rule"),
    [
        (0, None, ValueError, r"lanes must be at least 1, got 0"),
        (0, 3, ValueError, r"lanes must be in \[1, 3\], got 0"),
        (np.int64(4), 3, ValueError, r"lanes must be in \[1, 3\], got 4"),
        (True, None, TypeError, "lanes must be an integer, got True"),
        (2.0, None, TypeError, r"lanes must be an integer, got 2\.0"),
    ],
)
def test_what_is_not_is_refused(value, most, error, rule):
    with pytest.raises(error, match=rule):
        check_whole("lanes", value, 1, most)


def test_an_integer_that_no_float_holds_is_refused():
    assert number("scale", 2**1023 - 1) == 2**1023 - 1
    with pytest.raises(ValueError, match="scale must be in the range of float64, got an integer of 1,329 bits"):
        number("scale", -(10**400))
    with pytest.raises(ValueError, match="scale must be in the range of float64"):
        RouterKind(scale=10**400)
