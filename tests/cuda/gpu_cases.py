"""What the tests on a GPU share: arrays of every kind, small layers for tensor cores, and calls that are checked."""

import importlib.util
import os

import numpy as np
import pytest
from cases import Regions, assert_equals_oracle
from worlds import check_stats

from flashmoe_numba import FlashMoE
from flashmoe_numba.gpu.driver import ask_driver
from reference import MoEConfig

DEVICE_TEST_S = 600  # the first test of a variant builds its kernel, 20 s
DEADLINE_S = 20.0
TILE_M_MIN, TILE_M = 16, 128


def why_not():
    """Why the tests here cannot run; None if they can."""
    for module, package in (("cupy", "CuPy"), ("numba_cuda", "numba-cuda")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install 'flashmoe-numba[cuda]'"
    driver = ask_driver()
    if not driver.devices:
        return f"no GPU: {driver.error or 'the driver knows of none'}; see `flashmoe doctor`"
    return None


def tensor_config(**changes):
    """A small layer for tensor cores: no size is a multiple of a tile or of a block of the depth."""
    sizes = dict(
        num_ranks=1, num_tokens=300, hidden=200, ffn=136, num_experts=8, num_topk=2, gated=True, activation="silu",
        dtype="float16", tile_m=TILE_M, tile_m_min=TILE_M_MIN, tile_n=128,
    )  # fmt: skip
    return MoEConfig(**(sizes | changes))


def make_layer(config, weights, **how):
    return FlashMoE(config, weights, backend="cuda", **({"deadline_s": DEADLINE_S} | how))


# arrays


def bit_type(dtype):
    """The integer type as wide as a dtype."""
    return {2: np.int16, 4: np.int32, 8: np.int64}[np.dtype(dtype).itemsize]


def to_gpu(array, kind="cupy"):
    """A NumPy array on the GPU, of a kind; bfloat16 travels as bits."""
    import cupy

    bits = cupy.asarray(np.ascontiguousarray(array).view(bit_type(array.dtype)))
    if kind == "cupy":
        return bits.view(array.dtype)
    if kind == "torch":
        import torch

        return torch.from_dlpack(bits).view(getattr(torch, array.dtype.name))
    if array.dtype.name == "bfloat16":
        pytest.skip("Numba device arrays have no bfloat16")
    from flashmoe_numba.device.cuda_api import cuda

    return cuda.as_cuda_array(bits.view(array.dtype))


def to_host(array, dtype):
    """A NumPy array of `dtype`, whatever the kind; all work on the GPU is done by then."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()
    if type(array).__module__.startswith("torch"):
        import torch

        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[np.dtype(dtype).itemsize]
        return array.view(whole).cpu().numpy().view(dtype)
    return cupy.asnumpy(cupy.asarray(array).view(bit_type(dtype))).view(dtype)


def kind_of(array):
    return {"cupy": "cupy", "torch": "torch", "numba": "numba", "numba_cuda": "numba"}[
        type(array).__module__.split(".")[0]
    ]


def call(layer, x, kind="cupy", **routing):
    """A call with NumPy arrays in and out, done when this returns."""
    y = layer([to_gpu(part, kind) for part in x], **routing)
    layer.synchronize()
    assert [kind_of(part) for part in y] == [kind] * len(x)
    return [to_host(part, layer.config.numpy_dtype) for part in y]


def differing(a, b):
    """How many elements of two arrays on the GPU differ in their bits, as an array on the GPU."""
    bits = bit_type(a.dtype)
    return (a.view(bits) != b.view(bits)).sum()


# checked calls


class GpuRegions(Regions):
    """The segments of a layer on one GPU. A combine is compared with the oracle only: it fuses its multiply-adds."""

    def __init__(self, layer):
        super().__init__(layer)
        self.memory = self.segments

    def poison(self):
        for segment in self.memory:
            segment[: self.layout.dispatch_flag] = 0xFF
        self.layer._backend.gpu.synchronize()

    def check(self, x, y, routings, epoch):
        self.segments = [self.layer._backend.to_host(segment) for segment in self.memory]
        super().check(x, y, routings, epoch)

    def _check_combine(self, source, y, routing, packet):
        pass


def run_world(world, **how):
    """Every call of a world on one layer, each checked."""
    with make_layer(world.config, world.weights, num_processors=world.num_processors, **how) as layer:
        regions = GpuRegions(layer)
        for epoch, (x, routing) in enumerate(world.calls(), start=1):
            regions.poison()
            y, routings = call(layer, x, **routing), layer.routing
            if routing:
                for given, used in zip(routing["topk_idx"], routings, strict=True):
                    np.testing.assert_array_equal(used.topk_idx, given)
            assert_equals_oracle(y, x, world.weights, world.config, routings, external=bool(routing))
            regions.check(x, y, routings, epoch)
            check_stats(layer, x, routings, epoch)


def has_torch():
    return importlib.util.find_spec("torch") is not None


def environment(root):
    """Of a process that this one starts."""
    return dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, [root, root / "tests", root / "tests" / "cuda"])))
