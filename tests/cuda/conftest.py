"""Tests that need a GPU. Without one, or without what drives it, every test here is skipped, and says why.

Nothing in this folder imports CuPy, numba-cuda or PyTorch before a test runs.
"""

import pytest
from gpu_cases import DEVICE_TEST_S, why_not


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent == item.config.rootpath / "tests" / "cuda"]
    reason = why_not() if here else None
    for item in here:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(DEVICE_TEST_S))


@pytest.fixture(scope="session")
def gpu():
    """The current GPU."""
    from flashmoe_numba.gpu.gpu import Gpu

    return Gpu()


@pytest.fixture
def hopper(gpu):
    """The current GPU, if it has the tensor cores that hopper.py is for."""
    if gpu.capability != (9, 0):
        pytest.skip(f"for compute capability 9.0 (H100, H200), this is {gpu.name} with {gpu.capability}")
    return gpu


@pytest.fixture(params=["cupy", "torch", "numba"])
def kind(request):
    """Every kind of array that a call takes."""
    if request.param == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    return request.param
