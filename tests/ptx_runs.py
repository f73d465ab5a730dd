"""Worlds run through `FlashMoE` on `simulated_gpu`, late stores on, every call checked against the oracle.

Calls that end badly must be given up, and say why.
"""

import contextlib

import numpy as np
from cases import assert_equals_oracle, random_routing, random_tokens, with_no_choices
from ptx_endings import ENDINGS, expect_given_up
from ptx_simulated import DEADLINE_S, simulated
from worlds import check_stats

from flashmoe_numba import FlashMoE
from flashmoe_numba.seeing.trace import decode
from reference import GATE, KIND_NAMES, Task, make_packets, task_graph, tolerance

TF32_STEP = 2.0**-10  # of a mantissa of 10 bits: what cutting the others off may take, relatively
STEEPEST = 1.13  # of all activations (gelu); none is further from 0 than its argument
HUGE = 1 << 33
HUGE_SIZES = ("token_block", "tile_m_min", "tile_m", "tile_ffn", "tile_hidden", "tile_experts")


def run_world(world, **how):
    """Run all calls of a world, each checked against the oracle.

    Args:
        how: of `simulated`.

    Raises:
        AssertionError: a result is wrong, or a call that should end badly did not.
        PtxFault: what the machine found wrong.
    """
    return simulated(world, _run, **how)


def _run(world, gpu):
    results = _run_calls(world, gpu)
    for ending in world.endings:
        _run_ending(world, gpu, ending)
    return results


@contextlib.contextmanager
def _layer(world, weights, deadline_s):
    settings = dict(backend="cuda", num_processors=world.num_processors, trace=world.trace, tf32=world.tf32)
    settings |= dict(packing=world.packing)
    with FlashMoE(world.config, weights, deadline_s=deadline_s, **settings) as layer:
        assert layer._backend.variant == world.variant, f"{world}: {layer._backend.variant.name} was chosen"
        if world.huge:
            for rank in layer._ranks:
                rank.problem = rank.problem._replace(**dict.fromkeys(HUGE_SIZES, HUGE))
        yield layer


def _run_calls(world, gpu):
    weights, results, epoch = world.weights, [], 0
    with _layer(world, weights, DEADLINE_S) as layer:
        for call in world.calls:
            x, routing = _tokens(world.config, call), _routing(world.config, call)
            tokens = [_on_gpu(gpu, part, world.offset) for part in x]
            for y in (_replayed if call.captured else _called)(gpu, layer, tokens, routing):
                epoch += 1
                _check(world, weights, layer, x, y, call, epoch)
                results.append([{"y": part} for part in y])
    return results


def _run_ending(world, gpu, ending):
    if ENDINGS[ending].ranks > world.config.num_ranks:
        return
    with _layer(world, world.weights, ENDINGS[ending].deadline_s) as layer:
        tokens = [gpu.cupy.asarray(part) for part in _tokens(world.config, world.calls[0])]
        expect_given_up(ending, layer, tokens)


def _on_gpu(gpu, part, offset):
    """`offset`: an element behind the beginning of an allocation."""
    if not offset:
        return gpu.cupy.asarray(part)
    room = gpu.cupy.empty(part.size + 1, part.dtype)
    room[1:] = gpu.cupy.asarray(part.reshape(-1))
    return room[1:].reshape(part.shape)


def _tokens(config, call):
    x = [(part * call.scale).astype(part.dtype) for part in random_tokens(config, call.counts, call.seed)]
    if call.spoiled:
        for part, value in zip(x, (np.nan, np.inf, -np.inf, np.nan), strict=False):
            part[len(part) // 2 : len(part) // 2 + 1, -1] = value
    return x


def _routing(config, call):
    if call.bias is None:
        return {}
    routing = random_routing(config, call.counts, call.seed, call.bias)
    if call.padded:
        routing = with_no_choices(config, routing, call.seed)
        routing[0][0][: -(-call.counts[0] // 2)] = -1  # some token blocks of the first rank send nothing
    return dict(zip(("topk_idx", "topk_weights"), routing, strict=True))


def _called(gpu, layer, tokens, routing):
    y = layer(tokens, **routing)
    layer.synchronize()
    yield [gpu.cupy.asnumpy(part) for part in y]


def _replayed(gpu, layer, tokens, routing):
    """The call, recorded and then launched twice."""
    stream = gpu.cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        y = layer(tokens, **routing)
        graph = stream.end_capture()
    for _ in range(2):
        graph.launch(stream)
        layer.synchronize()
        yield [gpu.cupy.asnumpy(part) for part in y]


# ---- checking one


def _check(world, weights, layer, x, y, call, epoch):
    y = [part.view(world.config.numpy_dtype) for part in y]
    relative = tf32_tolerance(world.config) if world.tf32 else None
    try:
        with np.errstate(invalid="ignore"):
            assert_equals_oracle(y, x, weights, world.config, layer.routing, call.bias is not None, relative)
        if not world.huge:  # its tiles are taller than its config says
            if not call.spoiled:
                check_stats(layer, x, layer.routing, epoch)
            if world.trace:
                check_traces(layer)
    except AssertionError as error:
        raise AssertionError(f"{world}, call {epoch}: {error}") from None


def check_traces(layer):
    """Every task of the call is recorded once, by some block, and nothing else but packets that came."""
    config = layer.config
    try:
        records = decode(layer.traces)
    except ValueError as error:
        raise AssertionError(f"{config}: {error}") from error
    packets = [make_packets(routing.topk_idx, config) for routing in layer.routing]
    tiles = [of_expert for of_rank in layer.row_tiles for of_expert in of_rank]
    tasks = [*task_graph(packets, config, tiles)]
    tasks += [Task(GATE, rank=i) for i, routing in enumerate(layer.routing) if len(routing.topk_idx) == 0]
    seen = [Task(r.kind, r.rank, r.peer, r.expert, r.m, r.n) for r in records if r.kind < len(KIND_NAMES)]
    assert sorted(seen) == sorted(tasks), f"{config}: tasks in the traces"
    assert len(records) - len(seen) == config.num_ranks * config.num_experts, f"{config}: packets in the traces"
    assert all(0 < r.start_ns <= r.end_ns for r in records), f"{config}: times in the traces"


def tf32_tolerance(config):
    """How far a layer may be off whose expert products take float32 as TF32, beside the layer on absolute values.

    The machine cuts off the bits that TF32 has not, so that a factor loses up to 2^-10 of itself, always towards zero:
    such errors add up and do not walk. A sum of products is then off by twice that of the sum of its absolute terms.
    That of an activation is so much times its steepest slope; a gate and an up projection bring theirs each, and the
    down projection one more. All other roundings are those of `tolerance`.
    """
    products = STEEPEST + config.gated + 1
    return 1.01 * products * 2 * TF32_STEP + tolerance(config)
