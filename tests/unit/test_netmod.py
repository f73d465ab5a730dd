"""What MPI uses between hosts is named from the environment and from what MPI says of itself."""

from types import SimpleNamespace

import pytest

from flashmoe_numba.processes.netmod import (
    PREFERRED,
    PROVIDER_VARIABLES,
    SAVED_VARIABLE,
    SURVIVING,
    netmod,
    require_saved,
)

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


@pytest.mark.parametrize(("variables", "most", "refused"), [
    (SURVIVING, 63, None),
    (SURVIVING, 64, "64 before MPI begins, got none, which is 64: "),
    (SURVIVING | {SAVED_VARIABLE: "lots"}, 70, "70 before MPI begins, got lots: "),  # libfabric keeps its default
    (SURVIVING | {SAVED_VARIABLE: "100"}, 70, None),
    (SURVIVING | {SAVED_VARIABLE: "100"}, 100, "100 before MPI begins, got 100: "),
    (PREFERRED, 4095, None),
    ({"MPIR_CVAR_CH4_NETMOD": "ucx"}, 5000, None),
])  # fmt: skip
def test_as_many_messages_must_be_kept_as_a_call_has(monkeypatch, variables, most, refused):
    for variable in (*PREFERRED, *PROVIDER_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    mpi = SimpleNamespace(get_vendor=lambda: ("MPICH", (5, 0)), Get_library_version=lambda: BOTH)
    if refused is None:
        require_saved(mpi, most)
        return
    with pytest.raises(ValueError, match="so many messages in a call of this layer") as caught:
        require_saved(mpi, most)
    assert str(caught.value).startswith(f"FI_TCP_MAX_SAVED must be more than {refused}")
    assert str(caught.value).endswith("export FI_TCP_MAX_SAVED=4096")
