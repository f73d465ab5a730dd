"""Calibration: known rates are found again in made-up slices, and what the command writes can be simulated on."""

import shlex
from itertools import pairwise, product

import pytest

import sim
from flashmoe_numba import FlashMoEError, cli
from flashmoe_numba.bench import calibrate as bench
from flashmoe_numba.bench.calibrate import ROWS, Call, Rates, Settings, fit_tiles, rates
from flashmoe_numba.commands import calibrate as command
from reference import COMBINE, DISPATCH, GATE, GEMM0, GEMM1, MoEConfig
from reference.task_kinds import RECEIVE
from reference.traces import Slice
from sim.world.machine_schema import VALUES

UNIT = 6
GFLOPS, LATENCY_NS, READ_GBPS, PUT_GBPS, MOVE_GBPS, COMBINE_GBPS = 80.0, 1500.0, 20.0, 7.0, 9.0, 13.0
SIGNAL_NS, RECEIVE_NS, GATE_NS, OUTSIDE_NS = 800, 50, 17_000, 600_000
FOUND = Rates(
    processors=3, gflops=80.0, tile_latency_ns=1500.4, read_gbps=20.0, fit_error=0.01, put_gbps=7.0, move_gbps=9.0,
    combine_gbps=13.0, signal_ns=800.0, receive_ns=50.4, gate_ns=17_000.0, outside_ns=600_000.0,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("outside_mpirun")


# ---- made-up slices


def config_of(hidden, ffn, num_ranks=2):
    return MoEConfig(num_ranks=num_ranks, num_tokens=256, hidden=hidden, ffn=ffn, num_experts=2 * num_ranks, num_topk=1)


def tile_ns(rows, depth, columns):
    flops = 2 * -(-rows // UNIT) * UNIT * depth * columns
    return LATENCY_NS + flops / GFLOPS + 4 * depth * (rows + columns) / READ_GBPS


def fake_call(config, rows):
    """One rank after the other does everything by itself; one slice of each kind of tile was interrupted."""
    records, now = [], 1000

    def slice_of(rank, block, kind, peer, expert, n, duration, rows=0):
        nonlocal now
        start, now = now, now + round(duration)
        records.append(Slice(rank, block, kind, peer, expert, 0, rows or n, start, now))

    for rank in range(config.num_ranks):
        slice_of(rank, 0, GATE, 0, 0, 0, GATE_NS)
    for source, owner, expert in product(range(config.num_ranks), range(config.num_ranks), range(2)):
        nbytes = (rows or 1) * config.hidden * 4
        slice_of(source, 0, DISPATCH, owner, expert, 0, nbytes / (MOVE_GBPS if source == owner else PUT_GBPS))
        now += SIGNAL_NS
        slice_of(owner, 1, RECEIVE, source, expert, 0, RECEIVE_NS, rows)
        for kind, depth, width in ((GEMM0, config.hidden, config.ffn), (GEMM1, config.ffn, config.hidden)):
            for n in range(width // 128):
                stolen = 9_000_000 if (source, owner, expert, n) == (0, 0, 0, 0) else 0
                slice_of(owner, 0, kind, source, expert, n, stolen + tile_ns(rows or 32, depth, 128))
    for rank in range(config.num_ranks):
        slice_of(rank, 0, COMBINE, 0, 0, 0, 2 * 32 * config.hidden * 4 / COMBINE_GBPS)
    return Call(config, rows, records, now - 1000 + OUTSIDE_NS)


def fake_calls(num_ranks=2):
    probes = product(((384, 1280), (640, 256)), ROWS)
    return [fake_call(config_of(*depths, num_ranks), rows) for depths, rows in probes] + [
        fake_call(config_of(384, 1280, num_ranks), None)
    ]


def test_known_rates_are_found_again():
    found = rates(fake_calls(), 3, UNIT)
    assert found.processors == 3
    assert found.gflops == pytest.approx(GFLOPS, rel=1e-3)
    assert found.tile_latency_ns == pytest.approx(LATENCY_NS, rel=1e-2)
    assert found.read_gbps == pytest.approx(READ_GBPS, rel=1e-3)
    assert found.fit_error < 1e-3
    assert found.put_gbps == pytest.approx(PUT_GBPS, rel=1e-3)
    assert found.move_gbps == pytest.approx(MOVE_GBPS, rel=1e-3)
    assert found.combine_gbps == pytest.approx(COMBINE_GBPS, rel=1e-3)
    assert found.signal_ns == SIGNAL_NS
    assert found.receive_ns == RECEIVE_NS
    assert found.gate_ns == GATE_NS
    assert found.outside_ns == OUTSIDE_NS


def test_whole_tiles_are_padded_to_the_lowest_height_there_is():
    """On a GPU a packet of 4 rows computes 16."""
    [tile] = {tile.flops for tile in bench._tiles([fake_call(config_of(256, 256), 4)], None)}
    assert tile == 2 * 16 * 256 * 128


def test_one_rank_puts_nothing_to_another():
    found = rates(fake_calls(num_ranks=1), 3, UNIT)
    assert found.put_gbps is None
    assert found.move_gbps == pytest.approx(MOVE_GBPS, rel=1e-3)


def test_the_fit_knows_that_rows_are_multiplied_in_units():
    """With the wrong unit the same slices do not fit."""
    assert rates(fake_calls(), 3, 2 * UNIT).fit_error > 0.01


def signals(*packets):
    """(dispatch end, receive start) of packets to one rank whose gate ended at 100."""
    records = [Slice(0, 0, GATE, 0, 0, 0, 0, 0, 100)]
    for expert, (sent, seen) in enumerate(packets):
        records += [
            Slice(0, 0, DISPATCH, 0, expert, 0, 0, sent - 5, sent),
            Slice(0, 1, RECEIVE, 0, expert, 0, 16, seen, seen + 10),
        ]
    return list(bench._signals(records))


def test_a_signal_counts_only_where_the_os_block_was_idle():
    assert signals((110, 140), (120, 150), (200, 260)) == [30, 60]  # the second came while the first was awaited
    assert signals((90, 140)) == []  # before the gate was open nobody looks
    assert signals((110, 108)) == [1]  # seen before its sender took the time


@pytest.mark.parametrize(("latency", "gflops", "gbps"), [(0.0, 50.0, None), (3000.0, 50.0, None), (0.0, 50.0, 5.0)])
def test_terms_that_are_not_there_are_not_found(latency, gflops, gbps):
    shapes = list(product((256, 1024), ROWS))
    tiles = []
    for depth, rows in shapes:
        flops, nbytes = 2 * depth * rows * 128, 4 * depth * (rows + 128)
        tiles.append(bench.Tile(flops, nbytes, latency + flops / gflops + (nbytes / gbps if gbps else 0)))
    found = fit_tiles(tiles)
    wanted = (latency, 1 / gflops, 1 / gbps if gbps else 0.0)
    assert min(found) >= 0
    assert found[:3] == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_times_that_do_not_grow_with_the_work_are_refused():
    tiles = [bench.Tile(1e6 * rows, 1e3, 1e6 / rows) for rows in ROWS]
    with pytest.raises(ValueError, match="the times of tiles must grow with their operations"):
        fit_tiles(tiles)


def test_the_probes_are_the_ladder_of_the_default_config():
    config = MoEConfig(num_ranks=1, num_tokens=1, hidden=1, ffn=1, num_experts=1, num_topk=1)
    assert (ROWS[1], ROWS[-1]) == (config.tile_m_min, config.tile_m)
    assert all(2 * low == high for low, high in pairwise(ROWS[1:]))


# ---- the machine and the knobs


def test_the_simulated_tile_takes_what_was_measured():
    """Rates become a machine and knobs, and a tile of the policy on them takes the time of the fit."""
    settings = Settings(num_ranks=2)
    knobs = sim.make_knobs("flashmoe", command.knobs_of(FOUND, settings) | {"row_unit": UNIT, "packing": "per_source"})
    config = config_of(384, 1280)
    world = sim.World(
        config=config,
        hardware=command.hardware_of(FOUND, settings),
        routing=sim.make_routing("even", config),
        precision=sim.precision("float32"),
    )
    graph = sim.simulate("flashmoe", world, knobs).graph
    for kind, depth in ((GEMM0, 384), (GEMM1, 1280)):
        times = graph.nodes["duration_ns"][graph.nodes["kind"] == kind]
        assert times == pytest.approx(tile_ns(64, depth, 128), rel=1e-3)  # 256 tokens, 4 experts: 64 rows each


def test_every_value_says_how_it_was_measured_or_assumed():
    hardware = command.hardware_of(FOUND, Settings(num_ranks=4, repeats=7, dtype="float64"))
    assert hardware.name == "4 ranks of this machine"
    assert (hardware.num_gpus, hardware.sms, hardware.launch_ns) == (4, 4, 600_000)
    assert hardware.tflops == {"float64": pytest.approx(0.32)}
    for name in (
        "sms",
        "hbm_gbps",
        "l2_gbps",
        "nvlink_gbps",
        "sm_write_gbps",
        "flag_ns",
        "launch_ns",
        "tflops.float64",
    ):
        assert "by flashmoe calibrate, cpu, median over 7 calls" in hardware.sources[name]
    for name in ("sm_read_gbps", "barrier_ns", "nic_gbps", "graph_launch_ns", "host_sync_ns"):
        assert hardware.sources[name].startswith("assumption:")
    assert set(VALUES) < set(hardware.sources)


def test_reading_that_hides_leaves_the_memory_to_combine():
    hidden = Rates(**vars(FOUND) | {"read_gbps": None, "put_gbps": None})
    hardware = command.hardware_of(hidden, Settings())
    assert hardware.hbm_gbps == pytest.approx(3 * COMBINE_GBPS)
    assert hardware.sm_write_gbps == MOVE_GBPS
    assert command.knobs_of(hidden, Settings())["async_loads"] is True
    assert command.knobs_of(FOUND, Settings())["async_loads"] is False
    assert command.knobs_of(FOUND, Settings(backend="cuda"))["row_unit"] is None


# ---- the command


def test_what_the_command_writes_and_prints_can_be_simulated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "DEPTHS", ((128, 384), (256, 128)))
    monkeypatch.setattr(bench, "GATE_TOKENS", 64)
    file = tmp_path / "new" / "here.toml"
    assert cli.main(["calibrate", "--out", str(file), "--repeats", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("1 rank of this machine, ")
    hardware = sim.load_hardware(str(file))
    assert (hardware.name, hardware.num_gpus) == ("1 rank of this machine", 1)
    flags = shlex.split(printed[-1])
    assert flags[:2] == ["flashmoe", "sim"]
    assert file.read_text().splitlines()[0].endswith(" ".join(flags[flags.index("--set") :]))
    assert cli.main(flags[1:]) == 0
    assert "simulated on 1 rank of this machine" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    ([], "the following arguments are required: --out"),
    (["--out", "here.json"], "argument --out: must end in .toml, got 'here.json'"),
    (["--out", "/proc/no/here.toml"], "argument --out: cannot write '/proc/no/here.toml'"),
    (["--out", "here.toml", "--ranks", "0"], "argument --ranks: must be an integer >= 1, got '0'"),
    (["--out", "here.toml", "--processors", "0"], "argument --processors: must be an integer >= 1, got '0'"),
    (["--out", "here.toml", "--repeats", "0"], "argument --repeats: must be an integer >= 1, got '0'"),
    (["--out", "here.toml", "--backend", "fibers"], "argument --backend: invalid choice: 'fibers'"),
    (["--out", "here.toml", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
])  # fmt: skip
def test_errors(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_inside_mpirun_it_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PMI_RANK", "0")
    assert cli.main(["calibrate", "--out", str(tmp_path / "here.toml")]) == 2
    assert "start this without mpirun" in capsys.readouterr().err


def test_a_kernel_that_gives_up_leaves_no_file(capsys, monkeypatch, tmp_path):
    def give_up(settings):
        raise FlashMoEError("rank 0 gave up")

    monkeypatch.setattr(bench, "calibrate", give_up)
    assert cli.main(["calibrate", "--out", str(tmp_path / "here.toml")]) == 1
    assert capsys.readouterr().err.endswith("flashmoe calibrate: error: rank 0 gave up\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ranks", "processors", "chosen", "warns"), [
    (1, None, 7, False),
    (2, None, 3, False),
    (4, None, 1, False),
    (8, None, 1, True),
    (2, 4, 4, True),
    (2, 3, 3, False),
])  # fmt: skip
def test_a_core_for_each_block_or_a_warning(ranks, processors, chosen, warns, capsys, monkeypatch):
    monkeypatch.setattr("flashmoe_numba.processes.cores.default_processors", lambda ranks: 8 // ranks)
    settings = command.settings_from(ranks, processors, "cpu", "float32", 5)
    assert settings.num_processors == chosen
    error = capsys.readouterr().err
    assert ("threads on 8 cores: times include waiting for a core" in error) == warns


def test_on_a_gpu_the_layer_chooses_its_blocks(capsys):
    assert command.settings_from(64, None, "cuda", "float16", 5).num_processors is None
    assert capsys.readouterr().err == ""
