"""What MPI uses between hosts is named from the environment and from what MPI says of itself."""

from types import SimpleNamespace

import pytest

from flashmoe_numba.processes.netmod import PROVIDER_VARIABLES, SURVIVING, netmod

BOTH = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\nMPICH configure:    --with-device=ch4:ucx,ofi\n"


@pytest.mark.parametrize(("vendor", "said", "variables", "name", "survives"), [
    ("MPICH", BOTH, {}, "ucx", False),  # the first is the default
    ("MPICH", BOTH, SURVIVING, "ofi/tcp", True),
    ("MPICH", BOTH, {"MPIR_CVAR_CH4_NETMOD": "ofi"}, "ofi/any", False),
    ("MPICH", BOTH, {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "verbs;ofi_rxm"}, "ofi/verbs;ofi_rxm", False),
    ("MPICH", BOTH, {"MPIR_CVAR_CH4_NETMOD": "ofi", "MPIR_CVAR_OFI_USE_PROVIDER": "tcp"}, "ofi/tcp", True),
    ("MPICH", BOTH, {"FI_PROVIDER": "tcp"}, "ucx", False),
    ("MPICH", BOTH.replace("ucx ofi", "ofi"), {"FI_PROVIDER": "tcp"}, "ofi/tcp", True),
    ("MPICH", "MPICH Device:  ch3:nemesis\n", SURVIVING, "MPICH", False),
    ("Open MPI", "Open MPI v5.0.9", SURVIVING, "Open MPI", False),
])  # fmt: skip
def test_the_netmod_is_named(monkeypatch, vendor, said, variables, name, survives):
    for variable in (*SURVIVING, *PROVIDER_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    found = netmod(SimpleNamespace(get_vendor=lambda: (vendor, (5, 0)), Get_library_version=lambda: said))
    assert found == (name, survives)
    assert (name in found.warning() and "MPIR_CVAR_CH4_NETMOD=ofi FI_PROVIDER=tcp" in found.warning()) != survives
