"""The arena: where allocations lie, what is between them, and what is known of every granule."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_numba.ptx.memory import GRANULES, HOST, LINE, READ0, RED_ZONE, UNALLOCATED, WROTE, Arena

ROOM = 64 * LINE


def cell_of(arena, address):
    """The cell of a byte, found as the machine does."""
    line, byte = divmod(address - arena.base, LINE)
    cell, shift = int(arena.lines["cell"][line]), int(arena.lines["shift"][line])
    return arena.cells[cell + (byte >> shift)]


def words_of(arena, address, num_bytes):
    return [int(cell_of(arena, address + i)[WROTE]) for i in range(num_bytes)]


@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("num_bytes", [0, 1, 2, 7, 8, LINE - 1, LINE, LINE + 1])
def test_bytes_behind_an_allocation_are_nobodys(num_bytes, granule):
    arena = Arena(ROOM)
    address = arena.allocate(num_bytes, granule, "a")
    whole = max(LINE, -(-num_bytes // LINE) * LINE)
    inside = -(-num_bytes // granule) * granule  # a granule is watched as one
    assert words_of(arena, address, whole) == [0] * inside + [UNALLOCATED] * (whole - inside)
    red_zone = (address - arena.base + whole) // LINE
    assert address % LINE == 0 and arena.lines["shift"][red_zone] == 0


def test_the_first_place_that_is_large_enough_is_taken():
    arena = Arena(ROOM)
    first, second, third = (arena.allocate(lines * LINE, 8, "a") for lines in (3, 1, 2))
    assert [second - first, third - second] == [3 * LINE + RED_ZONE, LINE + RED_ZONE]
    arena.free(first)
    assert arena.allocate(4 * LINE, 8, "too large for the gap") > third
    assert arena.allocate(LINE, 8, "b") == first
    assert arena.allocate(LINE, 8, "c") == first + LINE + RED_ZONE
    arena.free(second)
    assert arena.allocate(2 * LINE, 8, "d") > third, "the gap has one line"


def test_neighbours_that_are_free_become_one():
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1]):
        arena = Arena(ROOM)
        addresses = [arena.allocate(LINE, 8, "a") for _ in range(3)]
        arena.allocate(1, 8, "behind them")
        for i in order:
            arena.free(addresses[i])
        assert arena.allocate(3 * LINE + 2 * RED_ZONE, 8, "all of it") == addresses[0]


def test_when_there_is_no_room_it_says_so():
    arena = Arena(4 * LINE)
    with pytest.raises(MemoryError, match=f"{4 * LINE} bytes more are needed, and the machine has {4 * LINE} in all"):
        arena.allocate(4 * LINE, 8, "its red zone has no place")
    address = arena.allocate(3 * LINE, 8, "a")
    with pytest.raises(MemoryError):
        arena.allocate(1, 8, "b")
    arena.free(address)
    assert arena.allocate(3 * LINE, 8, "c") == address


@pytest.mark.parametrize("granule", [1, 3, 16])
def test_other_granules_are_refused(granule):
    with pytest.raises(ValueError, match=rf"granule must be one of \(2, 4, 8\), got {granule}"):
        Arena(ROOM).allocate(8, granule, "a")


def test_what_was_freed_is_nobodys_and_comes_back_unwritten():
    arena = Arena(ROOM)
    address = arena.allocate(100, 4, "a")
    arena.wrote(address, 100)
    arena.free(address)
    assert "in no allocation" in arena.describe(address)
    assert arena.lines["shift"][(address - arena.base) // LINE] == 0
    with pytest.raises(ValueError, match="must be inside an allocation, got 1 bytes at"):
        arena.view(address, 1)
    assert arena.allocate(50, 2, "b") == address
    assert words_of(arena, address, 52) == [0] * 50 + [UNALLOCATED] * 2


def test_a_view_is_the_memory_itself_and_stays_inside():
    arena = Arena(ROOM)
    address = arena.allocate(10, 2, "a")
    arena.view(address + 4, 6)[:] = np.arange(6)
    assert arena.view(address, 10)[4:].tolist() == list(range(6))
    assert arena.view(address + 4, 6).ctypes.data == address + 4
    for at, num_bytes in ((0, 11), (-1, 2), (8, 3), (10, 1)):
        with pytest.raises(ValueError, match="must be inside an allocation"):
            arena.view(address + at, num_bytes)


def test_an_address_is_told_by_its_allocation():
    arena = Arena(ROOM)
    first, second = arena.allocate(10, 2, "one array"), arena.allocate(300, 8, "another array")
    assert arena.describe(first + 9) == "byte 9 of 10 of one array"
    assert arena.describe(second + 299) == "byte 299 of 300 of another array"
    assert arena.describe(first + 10).endswith("which is in no allocation")


@given(st.sampled_from(GRANULES), st.integers(0, 299), st.integers(0, 300))
def test_the_host_writes_exactly_the_granules_of_its_bytes(granule, at, num_bytes):
    arena = Arena(ROOM)
    address, num_bytes = arena.allocate(300, granule, "a"), min(num_bytes, 300 - at)
    arena.wrote(address + at, num_bytes)
    touched = {i // granule for i in range(at, at + num_bytes)}
    assert words_of(arena, address, 300) == [HOST if i // granule in touched else 0 for i in range(300)]


def test_after_a_launch_all_that_was_written_is_the_hosts():
    arena = Arena(ROOM)
    address = arena.allocate(12, 4, "a")
    cell_of(arena, address)[:] = (5 << 32 | 7, 1, 2, 3)
    cell_of(arena, address + 4)[READ0] = 9  # read, never written
    cell_of(arena, address + 8)[WROTE] = UNALLOCATED
    arena.forget_order()
    assert [cell_of(arena, address + i).tolist() for i in (0, 4, 8)] == [
        [HOST, 0, 0, 0], [0, 0, 0, 0], [UNALLOCATED, 0, 0, 0]
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 700), st.sampled_from(GRANULES), st.booleans()), max_size=30))
def test_allocations_never_meet(steps):
    """Whatever comes and goes: a red zone lies behind each, and the same memory is there when all is given back."""
    arena, held = Arena(ROOM), {}
    for num_bytes, granule, let_go in steps:
        if let_go and held:
            arena.free(held.popitem()[0])
            continue
        try:
            held[arena.allocate(num_bytes, granule, "a")] = num_bytes
        except MemoryError:
            continue
        places = sorted(held.items())
        assert all(a + length + RED_ZONE <= b for (a, length), (b, _) in pairwise(places))
        assert all(a >= arena.base and a + length <= arena.base + ROOM for a, length in places)
    for address in held:
        arena.free(address)
    assert arena.allocate(ROOM - RED_ZONE, 8, "all of it") == arena.base


def test_a_closed_arena_has_nothing_left():
    """But for the bytes of arrays that somebody has; who gives back afterwards is not told."""
    arena = Arena(ROOM)
    address = arena.allocate(8, 8, "a")
    array = arena.view(address, 8)
    array[:] = 3
    arena.close()
    assert (array == 3).all() and arena.bytes.size == arena.cells.size == arena.lines.size == 0
    arena.free(address)
    with pytest.raises(MemoryError, match="and the machine has 0 in all"):
        arena.allocate(1, 8, "b")
    with pytest.raises(ValueError, match="address must be inside an allocation"):
        arena.view(address, 8)
