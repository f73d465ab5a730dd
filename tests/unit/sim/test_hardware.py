"""Presets are consistent and sourced, names have a grammar, and files of the user's own are checked key by key."""

import math
import pickle
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sim.world import hardware as module
from sim.world.machine_files import load_hardware, to_toml
from sim.world.machine_names import hardware_names
from sim.world.machine_schema import MMA_TYPES, VALUES

NVLINK_PEAK = {"A100": 300, "B200": 900, "GB200": 900, "GB300": 900, "H100": 450, "H20": 450, "H200": 450, "H800": 200}
NIC_PEAK = {"A100": 25, "GB300": 100}  # HDR 200, XDR 800; the others have NDR 400
PUBLISHED = {  # sms, HBM GB/s, bfloat16 TFLOPS, achieved NVLink GB/s, GPUs of the usual node
    "A100": (108, 2039, 312, 246, 8),
    "B200": (148, 8000, 2250, 669, 8),
    "GB200": (152, 8000, 2500, 669, 72),
    "GB300": (152, 8000, 2500, 669, 72),
    "H100": (132, 3350, 989.4, 370, 8),
    "H20": (78, 4000, 148, 370, 8),
    "H200": (132, 4800, 989.4, 370, 8),
    "H800": (132, 3350, 989, 160, 8),
}


def write(folder: Path, change: str = "", to: str = "", text: str | None = None) -> str:
    """A file of the user's own: 2 nodes of 8 H100, with one place changed."""
    text = to_toml(load_hardware("2x8xH100")) if text is None else text
    assert change in text
    path = folder / "mine.toml"
    path.write_text(text.replace(change, to, 1) if change else text, encoding="utf-8")
    return str(path)


# ---- presets ----


def test_published_values():
    found = {kind: load_hardware(kind) for kind in hardware_names()}
    assert list(found) == sorted(PUBLISHED)
    values = {
        kind: (h.sms, h.hbm_gbps, h.tflops["bfloat16"], h.nvlink_gbps, h.gpus_per_node) for kind, h in found.items()
    }
    assert values == PUBLISHED


@pytest.mark.parametrize("kind", PUBLISHED)
def test_what_is_achieved_is_below_the_datasheet(kind):
    machine = load_hardware(kind)
    assert machine.nvlink_gbps < NVLINK_PEAK[kind]
    assert machine.nic_gbps < NIC_PEAK.get(kind, 50) < machine.nvlink_gbps
    assert machine.hbm_achieved < 1
    assert machine.hbm_gbps < machine.l2_gbps
    assert machine.sm_write_gbps <= machine.sm_read_gbps
    assert machine.sm_write_gbps * machine.sms > machine.nvlink_gbps, "all SMs together must saturate the links"
    assert machine.flag_ns <= machine.nvlink_latency_ns < machine.barrier_ns < machine.nic_latency_ns
    assert machine.graph_launch_ns < machine.launch_ns < machine.host_sync_ns


@pytest.mark.parametrize("kind", PUBLISHED)
def test_narrow_mma_types_are_faster(kind):
    tflops = load_hardware(kind).tflops
    order = [tflops[name] for name in MMA_TYPES if name in tflops]
    assert order == sorted(order)
    assert tflops["float16"] == tflops["bfloat16"]
    assert tflops["bfloat16"] / tflops["float32"] == pytest.approx(2, rel=0.01)
    assert tflops.get("fp8", 2 * tflops["bfloat16"]) == pytest.approx(2 * tflops["bfloat16"], rel=0.01)
    assert ("fp4" in tflops) == (kind in ("B200", "GB200", "GB300"))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_value_has_a_source_and_guesses_say_so(kind):
    machine = load_hardware(kind)
    assert set(machine.sources) == {*VALUES, "clock_ghz", *(f"tflops.{name}" for name in machine.tflops)}
    assert machine.sources["hbm_achieved"].startswith("assumption: ")
    assert all(text.startswith("assumption: ") or "assum" not in text for text in machine.sources.values())
    assert all(len(text) > 10 for text in machine.sources.values())
    guessed = machine.sources["l2_gbps"].startswith("assumption: ")
    assert guessed == (kind != "H100"), "only H100's is measured"


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_file_is_named_like_its_kind(kind):
    text = tomllib.loads((Path(module.__file__).parents[1] / "presets" / f"{kind}.toml").read_text(encoding="utf-8"))
    assert (text["schema"], text["name"]) == (1, kind)
    assert kind in text["description"]


# ---- names ----


@pytest.mark.parametrize(
    ("name", "canonical", "nodes", "gpus"),
    [
        ("H100", "8xH100", 1, 8),
        ("h100", "8xH100", 1, 8),
        ("1xH100", "1xH100", 1, 1),
        ("4xh800", "4xH800", 1, 4),
        ("1x8xH100", "8xH100", 1, 8),
        ("2X8XH100", "2x8xH100", 2, 8),
        ("128x8xA100", "128x8xA100", 128, 8),
        ("GB200", "72xGB200", 1, 72),
        ("2x36xgb200", "2x36xGB200", 2, 36),
        (" 8xB200 ", "8xB200", 1, 8),
    ],
)
def test_names(name, canonical, nodes, gpus):
    machine = load_hardware(name)
    assert (machine.name, machine.num_nodes, machine.gpus_per_node) == (canonical, nodes, gpus)
    assert machine.num_gpus == nodes * gpus


@pytest.mark.parametrize("name", ["16xH100", "2x9xH100", "0xH100", "0x8xH100"])
def test_no_more_gpus_than_an_nvlink_domain_has(name):
    rule = 'H100 has at least one node and 1 to 8 GPUs in a node .*; good names: "8xH100", "2x8xH100"'
    with pytest.raises(ValueError, match=f"hardware '{name}': {rule}"):
        load_hardware(name)


def test_the_domain_of_gb200_has_72():
    with pytest.raises(ValueError, match=r'1 to 72 GPUs in a node .*; good names: "72xGB200", "2x72xGB200"'):
        load_hardware("73xGB200")


@pytest.mark.parametrize("name", ["H300", "", "8x", "8xH100x2", "2x2x8xH100", "8 x H100", "-1xH100", "9999999xH100"])
def test_unknown_names_list_the_good_ones(name):
    rule = rf"a GPU kind \(A100, B200, .*\), NxKIND, MxNxKIND or .*; got {name!r}"
    with pytest.raises(ValueError, match=rf'hardware must be {rule}; good names: "8xH100", "2x8xH100"'):
        load_hardware(name)


def test_a_name_is_a_string():
    with pytest.raises(TypeError, match=r"hardware must be a name or the path of a \.toml file, got 8"):
        load_hardware(8)  # type: ignore[arg-type]


# ---- values ----


def test_one_value_may_be_replaced():
    machine = load_hardware("8xH100")
    slower = replace(machine, nvlink_gbps=160.0)
    assert (slower.nvlink_gbps, slower.hbm_gbps) == (160.0, machine.hbm_gbps)
    assert slower != machine
    assert pickle.loads(pickle.dumps(slower)) == slower
    assert hash(load_hardware("8xH100")) == hash(machine)


@pytest.mark.parametrize("name", ["num_nodes", "gpus_per_node", *VALUES])
@pytest.mark.parametrize("value", [0, -1])
def test_every_value_is_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        replace(load_hardware("H100"), **{name: value})


@pytest.mark.parametrize("name", ["num_nodes", "gpus_per_node", *VALUES])
@pytest.mark.parametrize("value", ["8", True, None])
def test_every_value_is_a_number(name, value):
    with pytest.raises(TypeError, match=f"{name} must be (an integer|a number), got {value!r}"):
        replace(load_hardware("H100"), **{name: value})


@pytest.mark.parametrize("name", ["num_nodes", "sms", "launch_ns", "nvlink_latency_ns"])
def test_counts_and_times_are_integers(name):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 1.5"):
        replace(load_hardware("H100"), **{name: 1.5})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hbm_achieved": 1.01}, ValueError, r"hbm_achieved must be a share in \(0, 1\], got 1.01"),
        ({"hbm_gbps": math.nan}, ValueError, "hbm_gbps must be positive and finite, got nan"),
        ({"l2_gbps": math.inf}, ValueError, "l2_gbps must be positive and finite, got inf"),
        ({"nvlink_gbps": 1e-300}, ValueError, "nvlink_gbps must be at least 1e-06, got 1e-300"),
        ({"flag_ns": 10**20}, ValueError, "flag_ns must be at most 1000000000, got 100000000000000000000"),
        ({"tflops": {"fp8": 1e-300}}, ValueError, "tflops.fp8 must be at least 1e-06, got 1e-300"),
        ({"name": " "}, ValueError, "name must be a text that is not empty, got ' '"),
        ({"name": 8}, TypeError, "name must be a text, got 8"),
        ({"tflops": {}}, ValueError, "tflops must have at least one of float64, .*, got none"),
        ({"tflops": [989]}, TypeError, r"tflops must be a mapping .*, got \[989\]"),
        ({"tflops": {"int8": 2000}}, ValueError, "tflops must have keys from float64, .*; got 'int8'"),
        ({"tflops": {"fp8": 0}}, ValueError, "tflops.fp8 must be positive and finite, got 0"),
        ({"tflops": {"fp8": "fast"}}, TypeError, "tflops.fp8 must be a number, got 'fast'"),
        ({"sources": "a datasheet"}, TypeError, "sources must be a mapping .*, got 'a datasheet'"),
        ({"sources": {}}, ValueError, "sources must have .*; missing: sms, .*tflops.fp8"),
    ],
)
def test_rules_of_values(change, error, message):
    with pytest.raises(error, match=message):
        replace(load_hardware("H100"), **change)


def test_sources_name_values_and_say_something():
    machine = load_hardware("H100")
    with pytest.raises(ValueError, match=r"sources must have only .*; unknown: hmb_gb"):
        replace(machine, sources={**machine.sources, "hmb_gb": "typing error"})
    with pytest.raises(ValueError, match="sources of sms must be a text that is not empty"):
        replace(machine, sources={**machine.sources, "sms": ""})
    with pytest.raises(ValueError, match=r"sources must have .*; missing: tflops\.fp4"):
        replace(machine, tflops={**machine.tflops, "fp4": 4000.0})


# ---- files of the user's own ----


@pytest.mark.parametrize("name", ["8xH100", "2x8xA100", "GB200", "3x5xh20"])
def test_round_trip(name, tmp_path):
    machine = load_hardware(name)
    assert load_hardware(write(tmp_path, text=to_toml(machine))) == machine


def test_round_trip_of_odd_texts_and_numbers(tmp_path):
    odd = 'this "machine", 4 ranks\\ \t\n\x00\x1f\x7f é 日本 😀 # = [x]'
    machine = load_hardware("4xH100")
    values = {"hbm_gbps": 1e21, "nvlink_gbps": 0.1 + 0.2, "nic_gbps": 1e-6, "l2_gbps": np.float64(0.1)}
    machine = replace(machine, name=odd, sources={**machine.sources, "sms": odd}, **values)
    assert load_hardware(write(tmp_path, text=to_toml(machine))) == machine


def test_the_file_of_a_preset_is_a_file_like_any_other():
    path = Path(module.__file__).parents[1] / "presets" / "H100.toml"
    assert load_hardware(str(path)) == replace(load_hardware("8xH100"), name="H100")


def test_a_clock_may_be_left_out(tmp_path):
    machine = load_hardware("H20")
    without = {name: text for name, text in machine.sources.items() if name != "clock_ghz"}
    unknown = replace(machine, clock_ghz=None, sources=without)
    assert load_hardware(write(tmp_path, text=to_toml(unknown))) == unknown
    with pytest.raises(ValueError, match="clock_ghz must be positive and finite, got 0"):
        replace(machine, clock_ghz=0)
    with pytest.raises(ValueError, match=r"sources must have .*; missing: clock_ghz"):
        replace(machine, sources=without)


def test_nodes_may_be_left_out(tmp_path):
    assert load_hardware(write(tmp_path, "nodes = 2\n", "")).num_nodes == 1


@pytest.mark.parametrize(
    ("change", "to", "rule"),
    [
        ("schema = 1", "schema = 2", "schema must be 1, got 2"),
        ("schema = 1", "schema = true", "schema must be 1, got True"),
        ("schema = 1\n", "", "schema must be 1, got 'none'"),
        ("nodes = 2", "nodes = 0", "nodes must be positive and finite, got 0"),
        ("nodes = 2", "nodes = 2.0", "nodes must be an integer, got 2.0"),
        ("nodes = 2", "noodles = 2", r"unknown: noodles \(it may have nodes, chip, "),
        ("gpus = 8", "gpus = 0", "gpus must be positive and finite, got 0"),
        ("gpus = 8", "gpus = 8\nmax_gpus = 4", r"gpus must be in \[1, max_gpus=4\], got 8"),
        ("gpus = 8\n", "", r"missing: \[node\] gpus$"),
        ("sms = 132\n", "", r"missing: \[gpu\] sms$"),
        ("sms = 132", "sms = 132\nsmx = 3", r"unknown: \[gpu\] smx \(it may have clock_ghz\)$"),
        ("sms = 132", 'sms = "132"', "sms must be an integer, got '132'"),
        ("nic_gbps = 48.5", "nic_gbps = -1", "nic_gbps must be positive and finite, got -1"),
        ("nic_gbps = 48.5", "nic_gbps = nan", "nic_gbps must be positive and finite, got nan"),
        ("launch_ns = 5000", "launch_ns = 5.0", "launch_ns must be an integer, got 5.0"),
        ("[gpu.tflops]", "[gpu.tflop]", r"missing: \[gpu\] tflops; unknown: \[gpu\] tflop \(it"),
        ("fp8 = 1978.9", "fp9 = 1978.9", r"unknown: \[gpu.tflops\] fp9 \(it may have float64, "),
        ("[host]", "[hosts]", r"missing: \[host\] launch_ns, \[host\] graph_launch_ns, .*; unknown: hosts "),
        ('"sms" = ', '"smx" = ', r"missing: \[sources\] sms; unknown: \[sources\] smx$"),
        ('"tflops.fp8" = ', '"tflops.fp4" = ', r"missing: \[sources\] tflops.fp8; unknown: \[sources\] tflops.fp4$"),
        ('"sms" = "', '"sms" = 3 # "', "sources of sms must be a text, got 3"),
        ('name = "2x8xH100"', 'name = ""', "name must be a text that is not empty, got ''"),
        ("description = ", "description = 3 # ", "description must be a text, got 3"),
        ("nodes = 2", "nodes 2", "not a TOML file: "),
        ("nodes = 2", "nodes = 2\nnodes = 3", "not a TOML file: "),
    ],
)
def test_an_error_names_file_key_and_rule_in_one_line(tmp_path, change, to, rule):
    path = write(tmp_path, change, to)
    with pytest.raises(ValueError, match=f"hardware file {re.escape(path)}: {rule}") as caught:
        load_hardware(path)
    assert "\n" not in str(caught.value)


def test_a_value_in_place_of_a_table(tmp_path):
    path = write(tmp_path, text='schema = 1\nname = "a"\ndescription = "b"\ngpu = 3\nnode = 3\nnetwork = 3\n')
    with pytest.raises(ValueError, match=r"mine.toml: \[gpu\] must be a table, got 3"):
        load_hardware(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hardware file .*none.toml: no such file; good names .* \"8xH100\""):
        load_hardware(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_hardware(str(tmp_path / "folder.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ValueError, match=r"bytes.toml: not a TOML file: "):
        load_hardware(str(tmp_path / "bytes.toml"))


def test_all_that_is_missing_is_told_at_once(tmp_path):
    """A file that has nothing but its schema is told every key that a preset has."""
    preset = tomllib.loads((Path(module.__file__).parents[1] / "presets" / "H100.toml").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="missing: ") as caught:
        load_hardware(write(tmp_path, text="schema = 1\n[gpu.tflops]\nfp8 = 3\n"))
    told = set(str(caught.value).partition("missing: ")[2].split(", "))
    tables = {f"[{table}] {key}" for table in ("gpu", "node", "network", "host") for key in preset[table]}
    sources = {f"[sources] {key}" for key in preset["sources"] if not key.startswith(("tflops", "clock"))}
    assert told == (tables - {"[gpu] tflops", "[gpu] clock_ghz", "[node] max_gpus"}) | sources | {
        "name", "description", "[sources] tflops.fp8"
    }  # fmt: skip


# ---- nodes, chips and links of the user's own ----


@pytest.mark.parametrize(("prefix", "name", "nodes", "gpus"), [
    ("", "box", 1, 8), ("1x", "8xbox", 1, 8), ("2x", "2x8xbox", 2, 8), ("3X4X", "3x4xbox", 3, 4),
    ("1x4x", "4xbox", 1, 4),
])  # fmt: skip
def test_nodes_of_a_file(tmp_path, monkeypatch, prefix, name, nodes, gpus):
    write(tmp_path, text=to_toml(replace(load_hardware("8xH100"), name="box")))
    monkeypatch.chdir(tmp_path)
    for path in ("mine.toml", str(tmp_path / "mine.toml")):
        machine = load_hardware(prefix + path)
        assert (machine.name, machine.num_nodes, machine.gpus_per_node) == (name, nodes, gpus)
        assert machine.chip == "H100"


def test_a_file_whose_name_begins_with_a_number_is_itself(tmp_path, monkeypatch):
    write(tmp_path)
    (tmp_path / "2xmine.toml").write_text(to_toml(replace(load_hardware("4xA100"), name="other")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_hardware("2xmine.toml").name == "other"
    assert load_hardware("3xmine.toml").name == "3x8xH100"


def test_nodes_of_a_file_that_is_not_there_or_has_fewer_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hardware file none\.toml: no such file"):
        load_hardware("2xnone.toml")
    write(tmp_path)
    for name in ("2x9xmine.toml", "0xmine.toml"):
        with pytest.raises(ValueError, match=rf"{name}': H100 has .* 1 to 8 GPUs .*; good names: \"2xmine.toml\", "):
            load_hardware(name)


def test_a_changed_machine_keeps_its_chip_and_a_file_may_name_one(tmp_path):
    machine = replace(load_hardware("2x8xH800"), name="renamed", nvlink_gbps=50.0)
    assert machine.chip == "H800"
    assert load_hardware(write(tmp_path, text=to_toml(machine))).chip == "H800"
    path = write(tmp_path, 'chip = "H100"', 'chip = "H20"')
    assert load_hardware(path).chip == "H20"
    assert load_hardware(write(tmp_path, 'chip = "H100"\n', "")).chip == "H100", "by its name, 2x8xH100"


@pytest.mark.parametrize(("change", "message"), [
    ({"node_link": "NIC"}, "nic_gbps must be nvlink_gbps=370, as network_link and node_link are one, 'NIC'; got 48.5"),
    (
        {"node_link": "NIC", "nic_gbps": 370, "gpus_per_link": 2},
        "gpus_per_nic must be gpus_per_link=2, as network_link and node_link are one, 'NIC'; got 1",
    ),
    ({"node_link": ""}, "node_link must be a text that is not empty"),
    ({"chip": " "}, "chip must be a text that is not empty"),
    ({"gpus_per_link": 3}, "gpus_per_link must divide gpus_per_node=8, got 3"),
    ({"gpus_per_nic": 16}, "gpus_per_nic must divide gpus_per_node=8, got 16"),
    ({"gpus_per_nic": 0}, "gpus_per_nic must be positive and finite, got 0"),
    ({"core_gbps": 0.0}, "core_gbps must be positive and finite, got 0.0"),
    ({"core_gbps": 1.5}, "sources must have .*; missing: core_gbps"),
])  # fmt: skip
def test_rules_of_links(change, message):
    with pytest.raises(ValueError, match=message):
        replace(load_hardware("2x8xH100"), **change)


def test_links_of_a_file(tmp_path):
    machine = replace(
        load_hardware("2x8xH100"), node_link='PCIe "5"', network_link="RoCE", gpus_per_link=4, gpus_per_nic=2
    )
    assert load_hardware(write(tmp_path, text=to_toml(machine))) == machine
    carried = replace(machine, core_gbps=1.5, sources={**machine.sources, "core_gbps": "a test"})
    text = to_toml(carried)
    assert load_hardware(write(tmp_path, text=text)) == carried
    with pytest.raises(ValueError, match=r"missing: \[sources\] core_gbps"):
        load_hardware(write(tmp_path, text=text.replace('"core_gbps" = "a test"\n', "")))
