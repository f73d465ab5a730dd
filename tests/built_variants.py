"""Which kernels the tests build: in the fast profile one of each kind and architecture, else all."""

import os
from dataclasses import replace

from flashmoe_numba.build.variants import ARCHITECTURES, Variant
from flashmoe_numba.commands.compile import all_variants

FAST = [
    Variant(dtype="float16", architecture="sm_90a", tensor_cores=True),
    *(Variant(dtype="float32", architecture=architecture, tensor_cores=False) for architecture in ARCHITECTURES),
]
ALL = [variant for architecture in ARCHITECTURES for variant in all_variants(architecture)]
IS_FAST = os.environ.get("HYPOTHESIS_PROFILE", "fast") == "fast"
VARIANTS = FAST if IS_FAST else ALL
BACKWARDS = [replace(variant, backward=True) for variant in (FAST[:2] if IS_FAST else ALL)]  # tensor cores and lanes
LINKED_BACKWARDS = BACKWARDS[:1] if IS_FAST else BACKWARDS  # to machine code, which takes longest
