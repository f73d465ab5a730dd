"""What `flashmoe doctor` says of NVSHMEM, whether or not it is here, and where its headers are looked for."""

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest

from flashmoe_numba.build.nvshmem import HEADERS, check_version, header_folders
from flashmoe_numba.commands.doctor import nvshmem as doctor
from flashmoe_numba.commands.doctor.host import NO, OK, can_run


def install(monkeypatch, versions=None, found=HEADERS, nvrtc=(0, 13, 5)):
    """Packages of these versions, whose headers are found; NVRTC answers this."""
    modules = {name: ModuleType(name) for name in ("nvidia", "nvidia.nvshmem", "nvshmem", "nvshmem.bindings", "cuda")}
    folders = {name: f"/include/{name}" for name in found}
    modules["cuda.pathfinder"] = SimpleNamespace(find_nvidia_header_directory=folders.get)
    modules["cuda.bindings"] = ModuleType("cuda.bindings")
    modules["cuda.bindings.nvrtc"] = SimpleNamespace(nvrtcVersion=lambda: nvrtc)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    versions = {"nvidia-nvshmem-cu13": "3.8.0", "nvshmem4py-cu13": "0.4.1"} | (versions or {})
    versions = {name: number for name, number in versions.items() if number}
    monkeypatch.setattr(metadata, "version", version)


def test_all_is_there(monkeypatch):
    install(monkeypatch)
    checks = list(doctor.check_nvshmem())
    assert [(check.name, check.status, check.found) for check in checks] == [
        ("NVSHMEM", OK, "3.8.0"),
        ("nvshmem4py", OK, "0.4.1"),
        ("CUDA headers", OK, "of nvshmem, cudart, cccl"),
        ("NVRTC", OK, "13.5"),
    ]
    assert can_run(checks, "nvshmem")


@pytest.mark.parametrize(("lacking", "name", "found"), [
    (dict(versions={"nvidia-nvshmem-cu13": None}), "NVSHMEM", "not installed"),
    (dict(versions={"nvidia-nvshmem-cu13": "3.4.5"}), "NVSHMEM", "3.4.5, older than 3.8"),
    (dict(versions={"nvshmem4py-cu13": None}), "nvshmem4py", "not installed"),
    (dict(found=HEADERS[:2]), "CUDA headers", "kernels for several hosts need the headers of cccl, not found here"),
    (dict(nvrtc=(6, 0, 0)), "NVRTC", "0.0"),
])  # fmt: skip
def test_what_is_missing_is_named_with_the_fix(monkeypatch, lacking, name, found):
    install(monkeypatch, **lacking)
    checks = list(doctor.check_nvshmem())
    assert [check.name for check in checks if check.status == NO] == [name]
    (check,) = (check for check in checks if check.name == name)
    assert (check.found, check.fix) == (found, "pip install 'flashmoe-numba[cuda,nvshmem]'")
    assert not can_run(checks, "nvshmem")
    assert all(can_run(checks, use) for use in ("cpu", "mpi", "compile", "cuda")), "others do without"


def test_a_part_that_cannot_be_imported(monkeypatch):
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "nvshmem.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    found = {check.name: check for check in doctor.check_nvshmem()}
    assert "cannot be imported" in found["nvshmem4py"].found
    assert found["NVRTC"].status == NO


def test_headers_that_are_missing_name_the_extra(monkeypatch):
    install(monkeypatch, found=("cudart",))
    with pytest.raises(ImportError, match=r"headers of nvshmem, cccl, .*'flashmoe-numba\[compile,nvshmem\]'"):
        header_folders()
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(ImportError, match=r"found by cuda.pathfinder: .*'flashmoe-numba\[compile,nvshmem\]'"):
        header_folders()


@pytest.mark.parametrize("version", ["3.7.9", "2.10"])
def test_nvshmem_that_is_too_old_for_kernels_is_named(monkeypatch, version):
    install(monkeypatch, {"nvidia-nvshmem-cu13": version})
    with pytest.raises(ImportError, match=rf"need NVSHMEM 3.8 or newer, found {version}: .*compile,nvshmem"):
        check_version()


@pytest.mark.parametrize("version", ["3.8", "3.10.1", None])
def test_nvshmem_that_is_new_enough_or_of_elsewhere(monkeypatch, version):
    install(monkeypatch, {"nvidia-nvshmem-cu13": version})
    check_version()
