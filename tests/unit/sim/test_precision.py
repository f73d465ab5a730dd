"""Bytes by precision, against the counts that follow from the shapes; the rules of one of the user's own."""

from dataclasses import replace

import pytest

from reference import DTYPES, element_dtype
from sim.world.machine_files import load_hardware
from sim.world.machine_schema import MMA_TYPES
from sim.world.precision import PRECISIONS, precision, with_results

FIELDS = ("weight_bytes", "token_bytes", "hidden_bytes", "result_bytes")


@pytest.mark.parametrize("name", DTYPES)
def test_the_types_of_a_config_move_their_own_size(name):
    found = precision(name)
    assert (found.name, found.mma_type) == (name, name)
    assert {getattr(found, field) for field in FIELDS} == {element_dtype(name).itemsize}


def test_fp8_counts_every_scale_of_a_deepseek_expert():
    hidden, ffn, fp8 = 7168, 2048, precision("fp8")
    row = hidden + hidden // 128 * 4
    assert fp8.token_bytes * hidden == row == 7392
    assert fp8.hidden_bytes * ffn == ffn + ffn // 128 * 4
    assert fp8.weight_bytes * hidden * ffn == hidden * ffn + (hidden // 128) * (ffn // 128) * 4
    assert fp8.result_bytes == 2, "combine moves bfloat16"


def test_fp4_weights_halve_the_stream_and_not_the_time():
    hidden, mixed = 7168, precision("fp8xfp4")
    assert mixed.weight_bytes * hidden == hidden // 2 + hidden // 32
    assert mixed.token_bytes * hidden == hidden + hidden // 32
    assert mixed.hidden_bytes == mixed.token_bytes
    assert mixed.result_bytes == 2
    tflops, best = load_hardware("B200").tflops, 2438  # MegaMoE's best, data/megamoe.csv
    assert best < tflops[mixed.mma_type] == tflops["fp8"] < tflops["fp4"]


def test_every_precision_runs_on_some_gpu():
    assert set(DTYPES) < set(PRECISIONS)
    known = set(load_hardware("B200").tflops)
    assert {precision(name).mma_type for name in PRECISIONS} == set(MMA_TYPES) & known


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"precision must be one of bfloat16, .*, fp8, fp8xfp4, mxfp8, nvfp4; got 'int8'"
    ):
        precision("int8")


def test_results_may_travel_in_another_format():
    narrow = with_results(precision("nvfp4"), "mxfp8")
    assert (narrow.name, narrow.result_bytes, narrow.token_bytes) == ("nvfp4, mxfp8 results", 1 + 1 / 32, 0.5 + 1 / 16)
    assert with_results(precision("nvfp4"), "bfloat16") is precision("nvfp4"), "as they do anyway"


@pytest.mark.parametrize("field", FIELDS)
def test_sizes_are_positive_numbers(field):
    with pytest.raises(ValueError, match=f"{field} must be positive and finite, got 0"):
        replace(precision("fp8"), **{field: 0})
    with pytest.raises(TypeError, match=f"{field} must be a number, got '1'"):
        replace(precision("fp8"), **{field: "1"})


def test_name_and_mma_type_are_checked():
    with pytest.raises(ValueError, match=r"mma_type must be one of float64, .*, fp4; got 'fp8xfp4'"):
        replace(precision("fp8"), mma_type="fp8xfp4")
    with pytest.raises(ValueError, match="name must be a text that is not empty"):
        replace(precision("fp8"), name="")
