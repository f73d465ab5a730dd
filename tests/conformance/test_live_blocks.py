"""Public blocks as the installed library has them, with other numbers than the records': skipped without it.

.venv/bin/pip install torch transformers
.venv/bin/python -m pytest tests/conformance
"""

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from golden.make_golden import cases, make
from golden.checks import assert_same


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", cases())
def test_a_layer_computes_what_the_block_does(case):
    assert_same(make(*cases()[case], salt="live"))
