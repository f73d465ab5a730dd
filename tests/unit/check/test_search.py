"""Cases come from the seed alone, and one that fails is made as small as it can be."""

from dataclasses import replace

import numpy as np
import planted_layers
import pytest
from cases import assert_same_bits
from test_properties import BY_NAME, examined

from flashmoe_numba.commands.check.inputs import MOST_COLUMNS, MOST_EXPERTS, MOST_TOKENS, Case, Kind, draw_case
from flashmoe_numba.commands.check.search import Result, look
from flashmoe_numba.commands.check.subject import TimeLimit
from reference.arrays import stream


def test_a_case_is_made_as_small_as_it_can_be():
    result = examined("wide_and_many", "oracle")
    assert replace(result.case, seed=0) == Case(num_tokens=1, hidden=7, ffn=1, num_experts=3, num_topk=1, seed=0)
    smallest = BY_NAME["oracle"].inputs(result.case, Kind())
    y = planted_layers.wide_and_many(*smallest.call()[:3], smallest.weights)
    assert np.allclose(y, 2 * smallest.expected, rtol=1e-3), "the finding is the smallest case's"
    assert f"{float(y.ravel()[0]):.4g}"[:5] in result.worst.wrong or y.size > 1


@pytest.mark.parametrize("multiple", [8, 48])
def test_sizes_stay_multiples(multiple):
    result = examined("wide_and_many", "oracle", kind=Kind(multiple=multiple))
    assert (result.case.hidden, result.case.ffn) == (multiple, multiple)


def test_the_seed_decides_everything():
    first, again = (examined("sums_by_batch", "batch", seed=3) for _ in range(2))
    assert (first.case, first.worst, first.cases) == (again.case, again.worst, again.cases)
    assert examined("sums_by_batch", "batch", seed=4).case.seed != first.case.seed


def test_cases_are_of_all_sizes():
    rng = stream(0)
    cases = [draw_case(rng, Kind()) for _ in range(2000)]
    for name, most in dict(
        num_tokens=MOST_TOKENS, hidden=MOST_COLUMNS, ffn=MOST_COLUMNS, num_experts=MOST_EXPERTS
    ).items():
        assert {getattr(case, name) for case in cases} == set(range(1, most + 1)), name
    assert any(1 < case.num_topk < case.num_experts for case in cases)
    assert all(case.num_topk <= case.num_experts for case in cases)


def test_a_case_that_hangs_is_not_called_again():
    calls = []

    def hang(weights, given):
        calls.append(given)
        raise TimeLimit("no answer within 1 s")

    result = Result(BY_NAME["oracle"])
    look(result, Kind(), hang, examples=20, seed=0)
    assert (result.verdict, len(calls), result.worst.wrong) == ("FAILS", 1, "no answer within 1 s")


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_inputs_are_the_cases_alone(name):
    """So that a case that is told can be made again."""
    case = BY_NAME[name].sizes(draw_case(stream(5), Kind()))
    one, other = (BY_NAME[name].inputs(case, Kind(bias=True)) for _ in range(2))
    assert_same_bits(list(one.call()[:3]), list(other.call()[:3]), name)
    assert_same_bits(one.weights.down_bias, other.weights.down_bias)


@pytest.mark.parametrize(
    ("dtype", "gated"), [("float16", True), ("float16", False), ("float32", True), ("bfloat16", False)]
)
def test_large_and_tiny_rows_come_near_the_ends_of_the_range(dtype, gated):
    kind, results = Kind(dtype=dtype, gated=gated), {"large-values": [], "subnormals": []}
    rng = stream(7)
    cases = [replace(draw_case(rng, kind), num_tokens=9) for _ in range(10)]
    for name, found in results.items():
        for case in cases:
            inputs = BY_NAME[name].inputs(case, kind)
            assert np.isfinite(inputs.terms).all() and np.isfinite(inputs.expected).all()
            found.append(np.abs(inputs.expected).ravel())
    numbers = inputs.config.format
    largest, normal = (float(np.nextafter(numbers.dtype.type(np.inf), numbers.dtype.type(0))), None)
    normal = float(np.nextafter(numbers.dtype.type(0), numbers.dtype.type(1))) * 2**numbers.fraction_bits
    large, tiny = (np.concatenate(found) for found in results.values())
    assert large.max() > largest / 2**8
    assert (tiny < normal).mean() > 0.1 and (tiny > normal).mean() > 0.1
