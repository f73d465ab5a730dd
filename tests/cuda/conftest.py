"""Everything here needs a GPU, and is skipped with the reason where there is none to use."""

import pytest


def why_not():
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed: pip install 'flashmoe-numba[cuda]'"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU to use: {error}"
    return None if count else "no GPU"


REASON = why_not()


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.path.parts and item.path.parent.name == "cuda":
            item.add_marker(pytest.mark.timeout(300))  # the first of a kind compiles its kernel
            if REASON:
                item.add_marker(pytest.mark.skip(reason=REASON))
