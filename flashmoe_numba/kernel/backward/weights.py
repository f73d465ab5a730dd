"""Tasks for the gradients of weights: a tile of a matrix each, over all rows that there are; biases with the first."""

from __future__ import annotations

from flashmoe_numba.device import jit, lane, lanes, load
from flashmoe_numba.tile_gemm import GRADIENT_COLUMNS, GRADIENT_ROWS, Runs, weight_gradient

from ..router_gradient import scale_gradient
from ..weights import DOWN, UP


@jit
def weights(p, received, back, gradients, scratch, task):
    """Of an expert: of its up matrices (peer UP), gradients of products times rows; of its down matrix, dy times hidden
    rows with their factors.
    """
    runs = Runs(received.first, received.rows, task.expert, p.experts_per_rank, p.num_ranks)
    ups = p.parts * p.ffn
    if task.peer == UP:
        at = task.expert * ups
        add_tile(gradients.up, at, back.up_gradients, ups, received.kept_rows, p.hidden, task, runs, scratch, p.fresh)
        add_biases(gradients.up_bias, at, back.up_gradients, ups, back.no_factors, task, runs)
    else:
        at = task.expert * p.hidden
        add_tile(gradients.down, at, back.dy_rows, p.hidden, back.active, p.ffn, task, runs, scratch, p.fresh)
        add_biases(gradients.down_bias, at, back.dy_rows, p.hidden, back.factors, task, runs)


@jit
def shared_weights(p, tokens, back, gradients, scratch, task):
    """The same of the shared expert, and of its gate."""
    runs, ups = all_tokens(back), p.shared_parts * p.shared_ffn
    if task.peer == UP:
        add_tile(
            gradients.shared_up, 0, back.shared_up_gradients, ups, tokens.x, p.hidden, task, runs, scratch, p.fresh
        )
        add_biases(gradients.shared_up_bias, 0, back.shared_up_gradients, ups, back.no_factors, task, runs)
    elif task.peer == DOWN:
        add_tile(
            gradients.shared_down, 0, back.dy, p.hidden, back.shared_active, p.shared_ffn, task, runs, scratch, p.fresh
        )
        add_biases(gradients.shared_down_bias, 0, back.dy, p.hidden, tokens.shared_factors, task, runs)
    else:
        add_tile(gradients.shared_gate, 0, back.gate_gradients, 1, tokens.x, p.hidden, task, runs, scratch, p.fresh)


@jit
def router_weights(p, tokens, experts, back, gradients, scratch, task):
    """Of the router: gradients of logits times tokens."""
    runs, choices = all_tokens(back), p.num_choices
    add_tile(gradients.router, 0, back.logits_gradient, choices, tokens.x, p.hidden, task, runs, scratch, p.fresh)
    add_biases(gradients.logit_bias, 0, back.bias_rows, choices, back.no_factors, task, runs)
    if gradients.expert_scale.size > 0 and task.m == 0 and task.n == 0:
        scale_gradient(p, tokens, experts.rule, back, gradients.expert_scale)


@jit
def all_tokens(back):
    return Runs(back.no_first, back.num_rows, 0, 1, 1)


@jit
def add_tile(out, first_row, left, num_left, right, num_right, task, runs, scratch, fresh):
    """Tile (m, n) of left.T @ right, added to rows from `first_row` on of an array `[.., num_right]`, or stored."""
    row, column = task.m * GRADIENT_ROWS, task.n * GRADIENT_COLUMNS
    weight_gradient(
        out, (first_row + row) * num_right + column, num_right,
        left, num_left, row, min(GRADIENT_ROWS, num_left - row),
        right, num_right, column, min(GRADIENT_COLUMNS, num_right - column), runs, fresh, scratch,
    )  # fmt: skip


@jit
def add_biases(out, at, left, num_left, factors, task, runs):
    """Sums of columns of `left`, each row times its factor if it has one, by the task of the first column tile."""
    if out.size == 0 or task.n != 0:
        return
    first = task.m * GRADIENT_ROWS
    end = min(first + GRADIENT_ROWS, num_left)
    for run in range(runs.number):
        i = runs.at + run * runs.step
        for row in range(runs.first[i], runs.first[i] + runs.rows[i]):
            for c in range(first + lane(), end, lanes()):
                value = load(left, row * num_left + c)
                if factors.size > 0:
                    value = value * factors[row] if factors[row] != 0 else factors[row]
                out[at + c] += value
