"""Kernels built without a GPU, each once: they are kept in the folder of compiled code, under a hash of their sources.

The fast profile builds one of each kind and architecture (some 30 s each); with HYPOTHESIS_PROFILE=ci or nightly all.
"""

import pytest
from built_variants import VARIANTS

from reference.cache_folder import usable_cache_folder


@pytest.fixture(scope="session")
def folder():
    return usable_cache_folder()


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def kernel(request, folder):
    """A linked kernel, one after the other."""
    from flashmoe_numba.build.build import build

    return build(request.param, folder)


@pytest.fixture(scope="module")
def sass(kernel):
    from flashmoe_numba.build.sass import disassemble

    return disassemble(kernel.path)


@pytest.fixture(scope="module")
def ptx(kernel, folder):
    """The same kernel as PTX."""
    from flashmoe_numba.ptx.linked import linked_ptx

    return linked_ptx(kernel.variant, folder)
