"""Puts between hosts under mpirun, posted by hand: hosts are pretended, messages go as MPI likes, or by TCP."""

import pytest
from nightly import at_night_only
from test_layer_mpi import run

pytestmark = pytest.mark.mpi
pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")

TCP = dict(MPIR_CVAR_NOLOCAL="1", MPIR_CVAR_CH4_NETMOD="ofi", FI_PROVIDER="tcp", FI_TCP_MAX_SAVED="4096")


@pytest.mark.parametrize("environment", [{}, TCP], ids=["shared memory", "tcp"])
@pytest.mark.parametrize(("num_ranks", "ranks_per_host"), [(4, 2), *at_night_only((2, 1), (3, 2))])
@pytest.mark.parametrize("scenario", ["puts", "puts_pile_up", "news", "abort", "carrying"])
def test_puts_land(scenario, num_ranks, ranks_per_host, environment, tmp_path):
    status, err, errors = run(
        scenario, num_ranks, tmp_path, str(ranks_per_host), worker="carrier_worker.py", **environment
    )
    assert status == 0 and not errors, f"{errors}\n{err}"
