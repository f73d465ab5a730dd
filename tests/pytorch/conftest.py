"""What tests with PyTorch share. Without it, or without transformers, they are skipped: `make conformance` has both."""

import warnings

import pytest

FOREIGN = "ignore:::(torch|transformers|huggingface_hub).*"  # warnings of theirs about themselves

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in ("torch", "transformers"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(FOREIGN))


@pytest.fixture(autouse=True)
def nothing_stays():
    """Every test begins and ends without layers."""
    yield
    import gc

    from flashmoe_numba.torch import release

    gc.collect()
    release()


@pytest.fixture
def world(tmp_path):
    """A group of this process alone."""
    import gc

    import torch.distributed as dist

    from flashmoe_numba.torch import release

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        gc.collect()
        release(process_group=dist.group.WORLD)
        dist.destroy_process_group()
