"""Who is fastest, and who cannot be told apart from it: by hand, and by sampling the ranges of the errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.reading.places import compared, places

errors = st.none() | st.sampled_from([0.0, 0.02, 0.1, 0.3])
found_ones = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(90, 140).map(float), errors), min_size=1, max_size=6
)


def test_places_by_hand():
    """110 us at most of the fastest; 107.1 and 112.5 at least of the others; nobody measured the last."""
    found = places({"bulk": (125.0, 0.1), "comet": (119.0, 0.1), "t3": (180.0, None), "sonic": (100.0, 0.1)})
    assert list(found) == ["sonic", "comet", "bulk", "t3"]
    assert {name: place.ratio for name, place in found.items()} == {"sonic": 1, "comet": 1.19, "bulk": 1.25, "t3": 1.8}
    assert {name: place.tie for name, place in found.items()} == {
        "sonic": True, "comet": True, "bulk": False, "t3": None
    }  # fmt: skip


def test_whether_the_next_one_ties_may_not_be_known():
    assert places({"a": (100.0, 0.1), "b": (150.0, None)})["a"].tie is None
    assert places({"a": (100.0, None), "b": (150.0, 0.1), "c": (101.0, 0.1)})["a"].tie is True, "by c alone"
    assert places({"a": (100.0, 0.1), "b": (150.0, 0.1), "c": (900.0, None)})["a"].tie is False


@given(found_ones)
def test_ties_are_ranges_that_meet(found):
    """Of known errors; with one that is not known a tie is one without it, too, and else nothing is known."""
    ranges = {name: np.linspace(t * (1 - (e or 0)), t * (1 + (e or 0)), 3001) for name, (t, e) in found.items()}
    first, *others = (placed := places(found))
    assert [placed[name].ratio for name in placed] == sorted(time / found[first][0] for time, _ in found.values())
    for name in others:
        meet = bool(ranges[first].max() > ranges[name].min())
        unknown = None in (found[first][1], found[name][1])
        assert placed[name].tie is (meet or (None if unknown else False)), (name, found)
    assert (placed[first].tie is True) == any(placed[name].tie is True for name in others)


@given(found_ones)
def test_nothing_is_in_doubt_where_nobody_asked(found):
    unmeasured = {name: (time, None) for name, (time, _) in found.items()}
    assert not any(place.tie is None for place in places(unmeasured, judged=False).values())


def row(tokens, latency, error):
    return {"tokens": tokens, "latency_us": latency, "left_out_error": error}


def test_rows_are_compared_with_those_of_their_world():
    rows = [row(1, 50.0, 0.1), row(2, 10.0, 0.1), row(1, 40.0, 0.2), row(3, 7.0, None), row(2, 100.0, "poor")]
    got = compared(rows, lambda row: row["tokens"])
    assert [(one.get("over_fastest"), one.get("tie")) for one in got] == [
        (1.25, True), (1.0, None), (1.0, True), (None, None), (10.0, None)
    ]  # fmt: skip
    assert "over_fastest" not in got[3] and "tie" not in got[3], "alone"
    assert [{name: one[name] for name in row(0, 0, 0)} for one in got] == rows


@pytest.mark.parametrize("error", [None, 0.1])
def test_nothing_takes_no_time(error):
    assert {place.ratio for place in places({"a": (0.0, error), "b": (0.0, error)}).values()} == {1.0}
