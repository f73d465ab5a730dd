"""Rows of the table of number formats, against what NumPy and ml_dtypes know of their types."""

import ml_dtypes
import numpy as np
import pytest

from reference import DTYPES, MoEConfig
from reference.formats import FORMATS


@pytest.mark.parametrize("name", DTYPES)
def test_a_row_says_what_its_type_says(name):
    row = FORMATS[name]
    assert row.name == row.dtype.name == name
    assert row.num_bytes == row.dtype.itemsize
    assert row.unit_roundoff == ml_dtypes.finfo(row.dtype).eps / 2
    assert row.exchanged == (np.int16 if name == "bfloat16" else row.dtype)
    assert row.sums.num_bytes >= 4 and row.sums.sums is row.sums


def test_a_config_has_the_formats_of_its_dtype():
    config = MoEConfig(num_ranks=1, num_tokens=1, hidden=1, ffn=1, num_experts=1, num_topk=1, dtype="bfloat16")
    assert config.format is config.weight_format is FORMATS["bfloat16"]
    assert config.numpy_dtype == ml_dtypes.bfloat16 and config.accumulator == np.float32
