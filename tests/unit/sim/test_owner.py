"""What an owner cuts when, against a machine with a clock that ticks and processors that look at it one by one."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ticking import Ticking

from sim.drafting.cuts import Cut
from sim.drafting.owner import Packet, Rules, Work, cut_as_they_arrive


@st.composite
def loads(draw):
    tile_m = draw(st.integers(1, 6))
    durations = st.lists(st.integers(1, 30), min_size=tile_m + 1, max_size=tile_m + 1)
    rules = Rules(
        slots=draw(st.integers(1, 5)),
        tile_m=tile_m,
        tiles=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        tile_ns=tuple([draw(durations) for _ in range(3)] for _ in range(2)),
        poll_ns=0,
        settle_ns=draw(st.integers(0, 20)),
        hand_ns=draw(st.integers(1, 5)),
    )
    pairs = st.tuples(st.integers(0, 3), st.integers(0, 2))
    packets = [Packet(draw(st.integers(0, 120)), *pair, draw(st.integers(1, 9)))
               for pair in draw(st.lists(pairs, max_size=9, unique=True))]  # fmt: skip
    work = st.builds(Work, st.integers(0, 120), st.sampled_from([-1, 0]), st.integers(1, 4), st.integers(1, 30))
    return sorted(packets), draw(st.lists(work, max_size=5)), rules


FLAT = ([[7] * 9] * 3, [[5] * 9] * 3)
ONE = Rules(slots=1, tile_m=8, tiles=(1, 1), tile_ns=FLAT, poll_ns=0, settle_ns=3, hand_ns=2)


@given(load=loads())
@example(load=([Packet(0, 0, 0, 5), Packet(1, 1, 0, 5), Packet(90, 2, 0, 1)], [], ONE))
def test_cuts_are_those_of_a_ticking_machine(load):
    packets, others, rules = load
    assert sorted(cut_as_they_arrive(packets, others, rules)) == sorted(Ticking(packets, others, rules).run())


@pytest.mark.parametrize(
    ("packets", "others", "cuts"),
    [
        # of two packets the second fills a tile, and what is left goes with the third, which is the last
        ([(0, 0, 0, 5), (1, 1, 0, 5), (9, 2, 0, 1)], [(0, 0, 1, 99)], [Cut(0, 8), Cut(0, 3)]),
        # the processor is idle from the start: rows go 3 ns after they came, and 2 later they are handed out
        ([(0, 0, 0, 5), (50, 1, 0, 5)], [], [Cut(0, 5, 5), Cut(0, 5)]),
        # it is busy until 30, and takes what has come by then
        ([(0, 0, 0, 2), (10, 1, 0, 2), (50, 2, 0, 5)], [(0, 0, 1, 30)], [Cut(0, 4, 22), Cut(0, 5)]),
        # of two experts the first gets the one idle processor, and the other goes when it is idle again
        ([(0, 0, 0, 1), (0, 0, 1, 1), (70, 1, 0, 1), (80, 1, 1, 1)], [],
         [Cut(0, 1, 5), Cut(1, 1, 19), Cut(0, 1), Cut(1, 1)]),
        # a packet that comes while a rest settles starts the time anew
        ([(0, 0, 0, 1), (2, 1, 0, 1), (40, 2, 0, 1)], [], [Cut(0, 2, 5), Cut(0, 1)]),
    ],
)  # fmt: skip
def test_by_hand(packets, others, cuts):
    assert cut_as_they_arrive([Packet(*p) for p in packets], [Work(*w) for w in others], ONE) == cuts
