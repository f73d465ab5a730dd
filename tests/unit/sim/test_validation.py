"""Published tables: what becomes of a row, errors of tables, and that a fit finds the numbers that made the figures."""

import json
import tomllib
from collections import Counter
from dataclasses import replace

import pytest

from flashmoe_numba import cli
from sim.drafting import rates, trust
from sim.policies import make_knobs
from sim.simulation import simulate
from sim.validation.cases import Case, Reason, make_case, sort_rows
from sim.validation.compare import compare, mean_error
from sim.validation.fit import Fit, fit_all
from sim.validation.folds import leave_out, write_trust
from sim.validation.reasons import known_reason
from sim.validation.tables import COLUMNS, Row, read_folder, read_table
from sim.validation.written import write_rates
from sim.world.machine_files import load_hardware

SCOUT = dict(
    source="README", hardware="8x H100", system="FlashMoE", dtype="bf16", metric="layer_fwd_latency_v012", unit="ms",
    exactness="exact", notes="Llama-4-Scout, swiglu, bf16", tokens_per_rank=128, hidden=5120, intermediate=8192,
    experts=16, topk=1, ep=8, tp=None, value=2.5,
)  # fmt: skip


def row(**changes) -> Row:
    return Row(**{"file": "made.csv", "line": 2, **SCOUT, **changes})


def write(folder, *rows, columns=COLUMNS, name="made.csv"):
    """A table with these rows, each given as what differs from `SCOUT`."""
    cells = [[str({**SCOUT, **changes}[column] or "") for column in columns] for changes in rows]
    lines = [columns, *([f'"{cell}"' for cell in line] for line in cells)]
    (folder / name).write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8")
    return folder / name


# ---- rows


def test_a_row_is_what_it_says():
    case = make_case(row())
    assert isinstance(case, Case)
    assert (case.rule.policy, case.rate_key, case.measured) == ("flashmoe", ("flashmoe", "H100"), 2500.0)
    config = case.world.config
    assert (config.num_ranks, config.num_tokens, config.hidden, config.ffn) == (8, 128, 5120, 8192)
    assert (config.num_experts, config.num_topk, config.gated) == (16, 1, True)
    assert (case.world.hardware.name, case.world.precision.name) == ("8xH100", "bfloat16")
    assert (case.world.routing.name, case.knobs["gate"]) == ("even", False)


@pytest.mark.parametrize(("changes", "policy", "knobs"), [
    ({}, "flashmoe", {"gate": False, "packing": "per_source"}),
    (dict(metric="layer_fwd_latency"), "flashmoe", {"tile_n": 64, "packing": "per_source"}),
    (dict(system="Megatron-LM"), "bulk", {}),
    (dict(system="Megatron-CUTLASS", metric="layer_fwd_latency"), "bulk", {"num_ops": 85}),
    (dict(system="Megatron-TE", metric="layer_fwd_latency"), "bulk", {}),
    (dict(system="COMET"), "comet", {"gate": False}),
    (dict(system="Comet", metric="layer_fwd_latency"), "comet", {}),
    (dict(system="FasterMoE", metric="layer_fwd_latency"), "fastermoe", {}),
    (dict(system="flux(COMET)", metric="moe_layer0_ag_scatter_gemm", hardware="8x H800", ep=1, tp=8), "comet",
     {"stages": "layer0", "tensor_parallel": 8}),
    (dict(system="MegaMoE SM90 split (2 kernels)", metric="layer_latency", dtype="fp8"), "megamoe", {"split": True}),
    (dict(system="MegaMoE SM90 fused", metric="layer_latency", dtype="fp8"), "megamoe", {"gate": False}),
    (dict(system="MegaMoE SM90 one-kernel (sgl-project PR 36)", metric="layer_latency", dtype="fp8"), "megamoe",
     {"gate": False}),
    (dict(system="DeepGEMM MegaMoE (via FlashInfer moe_ep)", metric="kernel_latency", dtype="fp8xfp4",
          hardware="8x B200"), "megamoe", {"cuda_graph": True}),
    (dict(system="FlashInfer CuTeDSL MegaMoE", metric="layer_latency"), "megamoe", {"tile_m": 256}),
    (dict(system="FlashInfer CuTeDSL MegaMoE +in-kernel fc2 reduce", metric="layer_latency", dtype="nvfp4",
          hardware="8x B200"), "megamoe", {"reduce": "add"}),
    (dict(system="DeepEP high-throughput + DeepGEMM", metric="layer_latency", dtype="fp8"), "deepep", {}),
    (dict(system="DeepEP + DeepGEMM (baseline of PR 352)", metric="layer_latency", dtype="fp8"), "deepep", {}),
    (dict(system="DeepEP (V1) as HybridEP baseline", metric="dispatch_algo_bw_torch_api_28sms", unit="GB/s",
          intermediate=None), "deepep", {"mode": "normal", "stages": "dispatch", "comm_sms": 28}),
    (dict(system="DeepEP HybridEP", metric="combine_algo_bw_kernel_only_16sms", unit="GB/s", intermediate=None),
     "deepep", {"mode": "normal", "stages": "combine", "comm_sms": 16}),
])  # fmt: skip
def test_each_system_has_its_policy(changes, policy, knobs):
    case = make_case(row(**changes))
    assert isinstance(case, Case), case
    assert case.rule.policy == policy
    assert knobs.items() <= case.knobs.items()


@pytest.mark.parametrize(("text", "ep", "tp", "name"), [
    ("8x H100", 8, None, "8xH100"),
    ("4x H100-80GB NVLink", 4, None, "4xH100"),
    ("1x H100", 1, None, "1xH100"),
    ("8x SM100 (B200-class)", None, None, "8xB200"),
    ("8x H800", 2, 4, "8xH800"),
    ("H800 NVLink~160GB/s + CX7 400Gb", 16, None, "2x8xH800"),
    ("2x8xH200", None, None, "2x8xH200"),
    ("8x4 A100 (supercomputer)", None, None, "4x8xA100"),
])  # fmt: skip
def test_hardware_is_read_from_its_text(text, ep, tp, name):
    case = make_case(row(hardware=text, ep=ep, tp=tp, experts=64))
    assert isinstance(case, Case), case
    assert case.world.hardware.name == name


@pytest.mark.parametrize(("dtype", "name"), [
    ("bf16", "bfloat16"), ("bf16/fp16", "bfloat16"), ("fp16", "float16"), ("tf32", "float32"), ("fp8", "fp8"),
    ("fp8xfp4", "fp8xfp4"), ("mxfp8", "mxfp8"), ("nvfp4", "nvfp4"),
])  # fmt: skip
def test_number_formats(dtype, name):
    assert make_case(row(dtype=dtype, hardware="8x B200")).world.precision.name == name


@pytest.mark.parametrize(("notes", "name", "result_bytes"), [
    ("nvfp4 x nvfp4, bf16 combine", "nvfp4", 2), ("nvfp4 x nvfp4, mxfp8 combine", "nvfp4, mxfp8 results", 1 + 1 / 32),
    ("nvfp4 x nvfp4, nvfp4 combine", "nvfp4, nvfp4 results", 0.5 + 1 / 16), ("dispatch..combine", "nvfp4", 2),
])  # fmt: skip
def test_notes_say_in_what_format_results_travel(notes, name, result_bytes):
    formats = make_case(row(dtype="nvfp4", hardware="8x B200", notes=notes)).world.precision
    assert (formats.name, formats.result_bytes) == (name, result_bytes)


def test_notes_say_whether_experts_are_gated():
    assert not make_case(row(notes="DeepSeek-V2-Lite, vanilla FFN")).world.config.gated
    assert not make_case(row(notes="")).world.config.gated
    megamoe = row(notes="", system="MegaMoE", metric="layer_latency", hardware="8x B200", dtype="fp8 act x fp4 weight")
    assert make_case(megamoe).world.config.gated


@pytest.mark.parametrize(("changes", "why"), [
    (dict(system="Tutel"), "no policy stands for the system"),
    (dict(metric="power_draw"), "the quantity is not simulated"),
    (dict(hardware="8x L20"), "no hardware preset"),
    (dict(hardware="H100", ep=None), "the number of ranks is not stated, or not whole"),
    (dict(ep=12), "its ranks do not fill their nodes"),
    (dict(dtype="int4"), "its number format is not known"),
    (dict(dtype=""), "its number format is not known"),
    (dict(unit="fortnights"), "its unit is not one of the quantity's"),
    (dict(value=None), "its value is not positive"),
    (dict(value=0.0), "its value is not positive"),
    (dict(hidden=None), "a size is not stated, or not whole"),
    (dict(intermediate=1.38 * 1024), "a size is not stated, or not whole"),
    (dict(ep=2.5), "the number of ranks is not stated, or not whole"),
    (dict(experts=12), "it cannot be simulated"),
    (dict(intermediate=10**7), "it cannot be simulated"),
])  # fmt: skip
def test_what_cannot_be_compared_has_a_reason(changes, why):
    reason = make_case(row(**changes))
    assert isinstance(reason, Reason)
    assert reason.why == why


@pytest.mark.parametrize(("changes", "why"), [
    (dict(system="NCCL-EP low-latency dispatch+combine, identity experts", metric="dispatch_plus_combine_latency"),
     "host launches and a kernel of identity experts are in it, without a time"),
    (dict(system="DeepEP", metric="combine_latency", hardware="8 GPUs per node, CX7"), "its GPU is not named"),
    (dict(system="FlashInfer CuTeDSL MegaMoE", metric="phase_tail_nvlink_drain", dtype="nvfp4"),
     "the simulation starts from it: knobs exchange_ns, tail_ns, num_ops"),
    (dict(system="ScatterMoE", metric="moe_bwd_throughput"), "no policy stands for the system"),
    (dict(system="COMET", metric="e2e_latency_reduction_vs_Tutel"), "a summary over layers without names"),
])  # fmt: skip
def test_what_is_known_of_a_row_is_its_reason(changes, why):
    made = row(**changes)
    assert make_case(made) == Reason(why, made.system)


def test_no_reason_is_given_for_rows_that_are_compared():
    assert not [case.row for case in sort_rows(read_folder())[0] if known_reason(case.row)]


@pytest.mark.parametrize(("stage", "dtype", "size"), [("dispatch", "fp8", 1 + 4 / 128), ("combine", "bf16", 2)])
def test_algorithm_bandwidth_has_each_token_once_for_each_rank_it_goes_to(stage, dtype, size):
    """As HybridEP's test counts it: received rows of all sources, the own rank among them; and by fewer SMs slower."""
    about = dict(system="DeepEP (V1) as HybridEP baseline", hardware="8x B200", dtype=dtype, unit="GB/s", topk=8)
    about |= dict(intermediate=None, hidden=7168, experts=64, ep=8, tokens_per_rank=512)
    cases = [make_case(row(**about, metric=f"{stage}_algo_bw_torch_api_{sms}sms")) for sms in (8, 32)]
    few, many = (case.simulated() for case in cases)
    world = cases[1].world
    copies = sum(len({int(expert) // 8 for expert in choices}) for choices in world.routing.topk_idx.reshape(-1, 8))
    time_ns = simulate("deepep", world, make_knobs("deepep", cases[1].knobs)).timeline.makespan_ns
    assert many == pytest.approx(copies / 8 * 7168 * size / time_ns, rel=1e-3)
    assert few < 0.6 * many


def test_no_row_of_the_published_tables_is_lost():
    rows = read_folder()
    cases, rest = sort_rows(rows)
    assert len(cases) + len(rest) == len(rows)
    assert {id(case.row) for case in cases} | {id(row) for row, _ in rest} == {id(row) for row in rows}
    fitted = Counter(case.rate_key for case in cases if case.rule.fitted)
    assert (fitted["flashmoe", "H100"], fitted["flashmoe", "A100"]) == (11, 12)
    assert (fitted["megamoe", "H200"], fitted["megamoe", "B200"], fitted["megamoe", "H20"]) == (22, 76, 11)
    assert fitted["deepep", "H200"] == 36
    paper = [case for case in cases if case.row.metric == "layer_fwd_latency"]
    assert len(paper) == 15
    assert not any(case.rule.fitted for case in paper)


def test_what_a_policy_refuses_has_a_reason():
    flux = dict(system="flux(COMET)", metric="moe_layer0_ag_scatter_gemm")
    made = [make_case(row(**flux, ep=2, tp=3, experts=18)), make_case(row(**flux, ep=1, tp=8))]
    ((group,), ((refused, reason),)) = compare(made)
    assert (len(group.results), refused.tp, reason.why) == (1, 3, "it cannot be simulated")
    assert "tensor_parallel must divide" in reason.what


# ---- tables


def test_a_table_is_read_cell_by_cell(tmp_path):
    (first, second) = read_table(write(tmp_path, {}, dict(hidden="2K", value="1.5e3", tp="")))
    assert first == replace(row(), file="made.csv")
    assert (second.line, second.hidden, second.value, second.tp) == (3, 2048, 1500.0, None)


def test_more_columns_and_another_order_are_fine(tmp_path):
    columns = ("colour", *reversed(COLUMNS))
    (tmp_path / "made.csv").write_text(
        ",".join(columns) + "\n" + ",".join(str({**SCOUT, "colour": "red"}[c] or "").replace(",", ";") for c in columns)
    )
    (read,) = read_table(tmp_path / "made.csv")
    assert (read.system, read.value) == ("FlashMoE", 2.5)


def test_missing_columns_are_named(tmp_path):
    file = write(tmp_path, {}, columns=[name for name in COLUMNS if name not in ("topk", "unit")])
    with pytest.raises(ValueError, match=r"made\.csv: must have the columns .*; missing: unit, topk$"):
        read_table(file)


@pytest.mark.parametrize("cell", ["2.5 ms", "2,5", "nan", "inf", "1e999", "0x10", "K", "--3", "٣"])
def test_a_malformed_number_is_an_error_with_its_place(tmp_path, cell):
    file = write(tmp_path, {}, dict(value=cell))
    with pytest.raises(ValueError, match=r"made\.csv, line 3, column value: must be a number, got "):
        read_table(file)


def test_broken_files_are_errors_that_name_them(tmp_path):
    with pytest.raises(ValueError, match=r"data must be a folder with \.csv files, got"):
        read_folder(tmp_path)
    file = write(tmp_path, {})
    file.write_bytes(file.read_bytes() + b"\xff")
    with pytest.raises(ValueError, match=r"made\.csv: not a CSV file in UTF-8"):
        read_folder(tmp_path)
    file = write(tmp_path, {})
    file.write_text(file.read_text() + "1," * len(COLUMNS) + "1\n")
    with pytest.raises(ValueError, match=r"made\.csv, line 3: must have 16 cells, got more"):
        read_folder(tmp_path)
    file = write(tmp_path, {})
    file.write_text(file.read_text() + "alone\n")
    with pytest.raises(ValueError, match=r"made\.csv, line 3: must have 16 cells, got 1"):
        read_folder(tmp_path)


# ---- fitting


def test_a_fit_finds_the_numbers_that_made_the_figures():
    """A large layer is bound by products, and one of small experts by the scheduler."""
    small = dict(hidden=1024, intermediate=512, experts=32, topk=4, tokens_per_rank=64)
    rows = [row(tokens_per_rank=2048), row(tokens_per_rank=2048, hidden=4096), row(**small), row(**small | {"topk": 2})]
    made = [make_case(one) for one in rows]
    values = {"rate": 0.317, "schedule_ns": 350}
    made = [replace(case, measured=case.simulated(values)) for case in made]
    (fit,) = fit_all(made)
    assert (fit.policy, fit.gpu, fit.num_rows) == ("flashmoe", "H100", 4)
    assert fit.values["rate"] == pytest.approx(0.317, rel=0.06)
    assert fit.values["schedule_ns"] == pytest.approx(350, rel=0.06)
    assert fit.error < 0.03 < fit.old_error
    groups, refused = compare(made, {("flashmoe", "H100"): values})
    assert refused == []
    assert [group.mean_error for group in groups] == [0.0]


def test_a_backward_multiplies_twice_and_is_not_fitted():
    sizes = dict(hardware="1x H100", ep=1, tokens_per_rank=512, hidden=256, intermediate=128, experts=8, topk=2)
    case = make_case(row(system="SonicMoE", metric="moe_bwd_throughput", unit="TFLOPS", value=100, **sizes))
    assert isinstance(case, Case) and case.world.passes == "backward" and not case.rule.fitted
    latency_us = simulate("sonic", case.world).latency_us
    operations = 2 * (2 * 1024 * 256 * 3 * 128)
    assert case.simulated() == pytest.approx(operations / latency_us / 1e6)
    assert fit_all([case]) == []


def test_rows_that_are_off_any_model_are_not_fitted():
    assert fit_all([make_case(row(metric="layer_fwd_latency"))]) == []


@pytest.fixture
def rates_file(tmp_path, monkeypatch):
    """A file of rates of its own."""
    file = tmp_path / "rates.toml"
    monkeypatch.setattr(rates, "FILE", file)
    rates.fitted_rates.cache_clear()
    yield file
    rates.fitted_rates.cache_clear()


def fit(policy="flashmoe", gpu="H100", **values):
    return Fit(policy=policy, gpu=gpu, num_rows=1, old_values={}, old_error=1.0, values=values, error=0.25)


def test_written_rates_are_those_that_are_read(rates_file):
    assert rates.fitted_values("flashmoe", "8xH100") == {"rate": 0.6, "schedule_ns": 400}
    write_rates([fit(rate=0.3, schedule_ns=500), fit(gpu="A100", rate=0.2, schedule_ns=40)])
    a100, h100 = {"rate": 0.2, "schedule_ns": 40}, {"rate": 0.3, "schedule_ns": 500}
    assert tomllib.loads(rates_file.read_text()) == {"flashmoe": {"A100": a100, "H100": h100}}
    assert rates.fitted_values("flashmoe", "2x8xH100") == h100
    assert rates.fitted_rate("flashmoe", "8xH100") == 0.3
    assert "H100 = { rate = 0.3, schedule_ns = 500 } # 1 row, 25.0%\n" in rates_file.read_text()


def test_rates_that_other_tables_gave_stay_if_asked(rates_file):
    write_rates([fit(rate=0.3), fit(gpu="A100", rate=0.2)])
    before = rates_file.read_text()
    write_rates([], keep=True)
    assert rates_file.read_text() == before
    write_rates([fit(rate=0.4)], keep=True)
    assert tomllib.loads(rates_file.read_text()) == {"flashmoe": {"A100": {"rate": 0.2}, "H100": {"rate": 0.4}}}
    write_rates([])
    assert tomllib.loads(rates_file.read_text()) == {}


def test_tables_of_ones_own_leave_other_rates_alone(rates_file, tmp_path):
    rates_file.write_text("[comet]\nH100 = { rate = 0.5 }\n")
    write(tmp_path)
    assert cli.main(["validate", "--data", str(tmp_path), "--fit"]) == 0
    assert tomllib.loads(rates_file.read_text()) == {"comet": {"H100": {"rate": 0.5}}}


def test_a_gpu_without_numbers_gets_the_mean_of_the_others_and_says_so(rates_file):
    rates_file.write_text("[comet]\nH100 = { rate = 0.5 }\nA100 = { rate = 0.3 }\n")
    assert rates.fitted_rate("comet", "2x8xH100") == 0.5
    for name in ("8xB200", "box", "a machine of fastxH100"):  # a name that only ends like one
        assert rates.fitted_rate("comet", name) == 0.4
        assert not rates.is_fitted("comet", name)
    assert rates.is_fitted("comet", "1xA100") and not rates.is_fitted("bulk", "1xA100")


def test_a_gpu_without_numbers_is_as_those_of_its_chip(rates_file):
    """Or a DGX of H100s would be slower because A100s are."""
    rates_file.write_text(
        "[comet]\nH800 = { rate = 0.5 }\nA100 = { rate = 0.1 }\n"
        "[megamoe]\nB200 = { rate = 0.6 }\nH200 = { rate = 0.4 }\n"
    )
    assert rates.fitted_rate("comet", "8xH200") == pytest.approx(0.5, rel=1e-3)
    assert rates.fitted_rate("megamoe", "8xH100") == pytest.approx(0.4)
    assert rates.fitted_rate("megamoe", "8xA100") == 0.5, "between chips the share of the peak carries over"
    assert not rates.is_fitted("megamoe", "8xH100")


def test_on_a_gpu_of_the_same_chip_a_multiprocessor_does_as_much_per_clock(rates_file):
    """H20 has the multiprocessors of H100 with a quarter of the tensor cores: what bound H100 does not bind it."""
    rates_file.write_text("[megamoe]\nH100 = { rate = 0.1 }\n")
    h100, h20 = (load_hardware(kind) for kind in ("H100", "H20"))
    per_clock = 0.1 * h100.tflops["bfloat16"] / h100.sms / 1.83
    assert rates.fitted_rate("megamoe", "8xH20") == pytest.approx(per_clock * h20.sms * 1.98 / h20.tflops["bfloat16"])
    rates.fitted_rates.cache_clear()
    rates_file.write_text("[megamoe]\nH100 = { rate = 0.4 }\n")
    assert rates.fitted_rate("megamoe", "8xH20") == rates.MOST_RATE


def test_a_scheduler_is_as_fast_as_its_clock_and_mma_sync_as_everywhere(rates_file):
    rates_file.write_text("[flashmoe]\nA100 = { rate = 0.4, schedule_ns = 400 }\n")
    found = rates.fitted_values("flashmoe", "8xH100")
    assert found["schedule_ns"] == round(400 * 1.41 / 1.83)
    a100, h100 = (load_hardware(kind) for kind in ("A100", "H100"))
    reached = [
        rate * hardware.tflops["bfloat16"] / hardware.sms / hardware.clock_ghz
        for rate, hardware in ((0.4, a100), (found["rate"], h100))
    ]
    assert reached[0] == pytest.approx(reached[1])


# ---- leaving out


def folds_of(made, **left_out):
    (fold,) = [fold for fold in leave_out(made) if left_out.items() <= vars(fold).items()]
    return fold


def test_rows_left_out_are_simulated_with_what_the_others_say():
    """Figures made with one number for one source, and with another for the other."""
    rows = {name: [make_case(row(system="COMET", source=name, tokens_per_rank=t)) for t in (2048, 4096)]
            for name in ("one", "two")}  # fmt: skip
    slow, fast = {"rate": 0.13}, {"rate": 0.38}
    made = [replace(case, measured=case.simulated(slow)) for case in rows["one"]]
    made += [replace(case, measured=case.simulated(fast)) for case in rows["two"]]
    fold = folds_of(made, source="one")
    assert fold.values["rate"] == pytest.approx(0.38, rel=0.06)
    assert (fold.seen, fold.donors) == (2, ())
    assert [result.case for result in fold.results] == made[:2]
    assert [result.simulated for result in fold.results] == [case.simulated(fold.values) for case in made[:2]]
    assert mean_error(fold.results) == pytest.approx(1 - 0.13 / 0.38, abs=0.05), "products bound it"


def test_where_nothing_of_a_gpu_is_left_others_speak_for_it():
    made = [make_case(row(hardware="8x A100")), make_case(row(source="two"))]
    fold = folds_of(made, gpu="H100")
    assert (fold.seen, fold.donors) == (0, ("A100",))
    alone = folds_of(made[:1], gpu="A100")
    assert (alone.donors, dict(alone.values)) == ((), {"rate": 0.6, "schedule_ns": 400})


def test_trust_is_the_error_of_what_was_left_out(tmp_path, monkeypatch):
    file = tmp_path / "trust.toml"
    monkeypatch.setattr(trust, "FILE", file)
    trust.left_out_errors.cache_clear()
    made = [make_case(row(source=name, tokens_per_rank=t)) for name in ("one", "two") for t in (128, 2048)]
    folds = leave_out(made)
    write_trust(folds)
    small = mean_error([fold.results[0] for fold in folds])
    assert trust.trust("flashmoe", "2x8xH100", 1) == trust.trust("flashmoe", "8xH100", 128) == round(small, 3)
    assert trust.trust("flashmoe", "8xH100", 129) is None
    large = mean_error([fold.results[1] for fold in folds])
    assert trust.trust("flashmoe", "8xH100", 1025) == round(large, 3)
    assert trust.trust("flashmoe", "8xA100", 1) is None and trust.trust("bulk", "8xH100", 1) is None
    trust.left_out_errors.cache_clear()


def test_what_is_published_has_a_trust():
    assert trust.trust("megamoe", "8xB200", 64) is not None
    assert trust.trust("t3", "8xB200", 64) is None


# ---- the command


def test_the_command_says_what_it_compared(tmp_path, capsys, rates_file):
    write(tmp_path, {}, dict(tokens_per_rank=4096, value=5.2), dict(system="Tutel"))
    assert cli.main(["validate", "--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("simulated beside measured: 2 of 3 published rows\n")
    assert "flashmoe on H100, latency: FlashMoE, README\n" in out
    assert "not compared: 1 rows\n     1  no policy stands for the system: Tutel\n" in out
    assert not rates_file.exists()


def test_json_has_every_row(tmp_path, capsys, rates_file):
    write(tmp_path, {}, dict(tokens_per_rank=4096, value=5.2), dict(system="Tutel"))
    assert cli.main(["validate", "--data", str(tmp_path), "--fit", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    ((group,), (left,), (fit,)) = report["groups"], report["not_compared"], report["fits"]
    assert (left["system"], left["line"], left["reason"]) == ("Tutel", 4, "no policy stands for the system")
    assert [result["row"]["line"] for result in group["results"]] == [2, 3]
    errors = [result["error"] for result in group["results"]]
    assert errors == [result["simulated"] / result["measured"] - 1 for result in group["results"]]
    assert group["mean_error"] == pytest.approx(sum(map(abs, errors)) / 2) == pytest.approx(fit["error"])
    assert abs(group["worst_error"]) == max(map(abs, errors))
    assert rates_file.exists()


def test_folds_are_printed_with_what_they_stand_on(tmp_path, capsys, rates_file):
    write(tmp_path, {}, dict(source="other", value=3.0))
    assert cli.main(["validate", "--data", str(tmp_path), "--folds", "--json", "-"]) == 0
    first, second = json.loads(capsys.readouterr().out)["folds"]
    assert (first["source"], second["source"]) == ("README", "other")
    assert first["rows_seen"] == 1 and set(first["values"]) == {"rate", "schedule_ns"}
    assert cli.main(["validate", "--data", str(tmp_path), "--folds"]) == 0
    out = capsys.readouterr().out
    assert "  flashmoe on H100: README, 5120 x 8192 gated, 16 experts, top-1\n    1 row: in sample " in out
    assert " } from 1 other row\n" in out


def test_bad_tables_are_one_line(tmp_path, capsys):
    assert cli.main(["validate", "--data", str(tmp_path / "nowhere")]) == 2
    assert "--data must be a folder with .csv files" in capsys.readouterr().err
    write(tmp_path, dict(value="many"))
    assert cli.main(["validate", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashmoe validate: error: ")
    assert error.endswith("made.csv, line 2, column value: must be a number, got 'many'\n")
