"""PyTorch is imported by those who use it only."""

from children import printed


def test_the_layer_imports_no_torch():
    program = "import sys, flashmoe_numba; flashmoe_numba.FlashMoE; print('torch' in sys.modules)"
    assert printed("-c", program).strip() == "False"


def test_the_module_imports_no_transformers():
    program = "import sys, flashmoe_numba.torch; print('transformers' in sys.modules)"
    assert printed("-c", program).strip() == "False"
