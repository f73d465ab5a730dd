"""Hypothesis profiles, chosen by $HYPOTHESIS_PROFILE (fast, ci, nightly, mutants); `max_examples` scales with them.

Examples are derandomised and not stored, so that a run is the same everywhere; nightly draws new ones each time.
For mutants (tests/mutants) a failure is enough: nobody reads its smallest example.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from nightly import IS_NIGHT

# A world is slow to draw and to run on a loaded machine; that says nothing about its strategy.
common = dict(database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("fast", max_examples=60, derandomize=True, **common)
settings.register_profile("ci", max_examples=100, derandomize=True, **common)
settings.register_profile("nightly", max_examples=1000, derandomize=False, **common)
settings.register_profile("mutants", settings.get_profile("fast"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

COMPILES_S = 600  # the first test that runs a kernel compiles it, a minute for each element type
NIGHT_S = 4 * 3600  # of a test that draws some thousand worlds
RUN_KERNELS = {"property", "kernel", "mpi", "hosts", "ptx", "test_cli.py", "test_trace.py"}  # folders and files


def pytest_collection_modifyitems(items):
    for item in items:
        parts = item.path.relative_to(item.config.rootpath).parts
        if (IS_NIGHT or RUN_KERNELS.intersection(parts)) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(NIGHT_S if IS_NIGHT else COMPILES_S))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files that start many processes go to one of xdist's, one after the other: deadlines run in them."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "of many processes" if file.startswith(("tests/hosts/", "tests/mpi/")) else file

    return Scheduling(config, log)


@pytest.fixture
def outside_mpirun(monkeypatch):
    """An environment in which this process is no rank of an mpirun."""
    from flashmoe_numba.processes.mpi_environment import RANK_VARIABLES, SIZE_VARIABLES

    for name in (*RANK_VARIABLES, *SIZE_VARIABLES, "PMI_FD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    from matplotlib.figure import Figure

    made, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (made.append(self), save(self, *a, **k)))
    return made
