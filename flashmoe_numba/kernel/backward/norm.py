"""The norm of experts' results in a backward. It is where results come home, so its gradients are made there.

A pair added w v / n to its token's sum, with v = scale * result and n = sqrt(mean(v^2) + eps). With dy of that sum

    dot = sum(dy * v) / n                    is the gradient of w,
    d = (dy - v / n * (dot / hidden)) / n    that of v, but for w,

so scale * d goes to the pair's expert where dy does without a norm, beside the same factor w; and w * d * result, over
all pairs, is the gradient of the scale, which each rank has by way of its own tokens. DISPATCH needs the results for
it, which the forward's COMBINE has kept.
"""

from __future__ import annotations

from flashmoe_numba.device import copy_row, jit, lane, lanes, load, store
from flashmoe_numba.tile_gemm import GRADIENT_COLUMNS
from reference.task_kinds import NORM_WEIGHTS

from ..combine import choices_of, result_row, row_norm
from ..gemms import finished_last
from ..queue import QueueTask, reserve
from ..sizes import num_token_blocks
from ..weights import UP, fill_weights
from .state import DISPATCHES


@jit
def make_dots(p, tokens, norm, back, first, end):
    """Norms and dots of the pairs at these places of `order`, a lane for a pair. One of weight 0 has none."""
    for place in range(first + lane(), end, lanes()):
        pair = tokens.order[place]
        if tokens.topk_weights[pair] != 0:
            at, dy_at, total = pair * p.hidden, pair // p.num_topk * p.hidden, norm.eps - norm.eps
            for c in range(p.hidden):
                total += load(back.dy, dy_at + c) * (norm.scale[c] * load(tokens.kept_results, at + c))
            back.norms[pair] = row_norm(p, tokens.kept_results, at, norm)
            back.norm_dots[pair] = total / back.norms[pair]


@jit
def copy_gradient(p, room, room_at, tokens, norm, back, pair):
    """What a pair's expert gets in the place of its token's row of dy, by all lanes."""
    dy_at = pair // p.num_topk * p.hidden
    if norm.scale.size == 0 or tokens.topk_weights[pair] == 0:
        copy_row(room, room_at, back.dy, dy_at, p.hidden)
    else:
        root, mean = back.norms[pair], back.norm_dots[pair] / norm.columns
        for c in range(lane(), p.hidden, lanes()):
            value = norm.scale[c] * load(tokens.kept_results, pair * p.hidden + c)
            store(room, room_at + c, norm.scale[c] * value_gradient(load(back.dy, dy_at + c), value, root, mean))


@jit
def value_gradient(dy, value, root, mean):
    """Of a scaled element of a result, but for the pair's weight.

    Args:
        root, mean: of the result: what it is divided by, and the mean of dy times what it is then.
    """
    return (dy - value / root * mean) / root


@jit
def queue_norm_weights(p, back, queue):
    """One packet more has left; behind the last one, all dots are made."""
    if finished_last(back.done, DISPATCHES, p.num_experts):
        place = reserve(p, queue, p.norm_weight_tasks)
        fill_weights(p, queue, place, QueueTask(NORM_WEIGHTS, UP, 0, 0, 0), 1, p.hidden)


@jit
def norm_weights(p, tokens, experts, back, gradients, task):
    """Some columns of the gradient of the scale: over the rank's pairs in their order, a lane for a column."""
    for token_block in range(num_token_blocks(p)):
        choices = choices_of(p, tokens, token_block)
        first = token_block * p.token_block * p.num_topk
        for pair in range(first, min(first + p.token_block * p.num_topk, p.num_tokens * p.num_topk)):
            if result_row(choices, pair) >= 0:
                add_pair(p, tokens, experts, back, gradients.result_scale, pair, task.n * GRADIENT_COLUMNS)


@jit
def add_pair(p, tokens, experts, back, out, pair, first):
    """To the gradient of the scale, from column `first` on, what a pair adds."""
    norm, at, dy_at = experts.norm, pair * p.hidden, pair // p.num_topk * p.hidden
    root, mean = back.norms[pair], back.norm_dots[pair] / norm.columns
    factor = experts.rule.one if p.weight_input else tokens.topk_weights[pair]
    for c in range(first + lane(), min(first + GRADIENT_COLUMNS, p.hidden), lanes()):
        result = load(tokens.kept_results, at + c)
        out[c] += factor * value_gradient(load(back.dy, dy_at + c), norm.scale[c] * result, root, mean) * result
