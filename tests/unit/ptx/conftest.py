"""A stand-in for CuPy on an arena that is only memory."""

import pytest
from stand_ins import PlainArena, make_stand_in


@pytest.fixture
def arena():
    return PlainArena()


@pytest.fixture
def cupy(arena):
    stand_in = make_stand_in(arena=arena)
    yield stand_in
    stand_in.close()


@pytest.fixture
def stream(cupy):
    return cupy.cuda.Stream(non_blocking=True)
