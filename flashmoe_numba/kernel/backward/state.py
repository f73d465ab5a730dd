"""What a backward works on beside the groups of a forward (kernel/state.py).

Kept rows are those that a rank's experts received in the forward, packet after packet: `received.first` says where each
packet's begin. All arrays of kept rows have the same index. An array is empty where there is nothing of the kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Back(NamedTuple):
    """Gradients that come in and go out, what is made of them on the way, and weights in the other direction."""

    dy: np.ndarray  # elements [num_tokens, hidden]
    dx: np.ndarray  # elements, likewise
    said: np.ndarray  # accumulator [num_tokens, num_choices]: gradients of logits by way of other losses
    logits_gradient: np.ndarray  # accumulator, likewise: all of them
    bias_rows: np.ndarray  # accumulator, likewise: those by way of weights, where logits have a bias
    kept_logits: np.ndarray  # accumulator, likewise: the logits, before routing spent them
    weight_gradients: np.ndarray  # accumulator [pairs]: of topk_weights
    norms: np.ndarray  # accumulator [pairs]: what results were divided by in the forward; or empty
    norm_dots: np.ndarray  # accumulator, likewise: dy times what results were then, before their weights
    router_rows: np.ndarray  # accumulator [num_tokens, hidden]: the part of dx that comes by the router
    up_again: Any  # the up matrices as a forward has them, for rows that were kept or are sent again
    up: Any  # [experts, hidden, parts * ffn]: the up matrices transposed, side by side
    down: Any  # [experts, ffn, hidden]: the down matrices transposed
    shared_up: Any
    shared_down: Any
    router: Any  # [hidden, num_choices]
    down_bias: np.ndarray  # accumulator [experts_per_rank, hidden]
    shared_down_bias: np.ndarray  # accumulator [hidden]
    shared_gate: np.ndarray  # accumulator [hidden]
    dy_rows: np.ndarray  # elements [kept rows, hidden]: dy as it came
    factors: np.ndarray  # accumulator [kept rows]: of the rows' results in the forward
    no_factors: np.ndarray  # accumulator, empty: of rows that have none
    up_gradients: np.ndarray  # elements [kept rows, parts * ffn]: of the products with the up matrices
    active: np.ndarray  # elements [kept rows, ffn]: factor times hidden row
    dots: np.ndarray  # accumulator [kept rows, up tiles]: parts of the factors' gradients
    shared_up_gradients: np.ndarray  # elements [num_tokens, shared_parts * shared_ffn]
    shared_active: np.ndarray  # elements [num_tokens, shared_ffn]
    shared_dots: np.ndarray  # accumulator [num_tokens, shared up tiles]
    gate_gradients: np.ndarray  # accumulator [num_tokens]: of the logits of the shared expert's gate
    done: np.ndarray  # int64 [3]: COMBINEs, row tiles of the shared expert, and DISPATCHes that have ended
    no_first: np.ndarray  # int64 [1]: 0, and
    num_rows: np.ndarray  # int64 [1]: the number of tokens: all of them as one run of rows


class WeightGradients(NamedTuple):
    """Gradients of weights, in the accumulator's type; what a call adds goes on with the sums. Empty: not wanted."""

    router: np.ndarray  # [num_choices, hidden]
    logit_bias: np.ndarray  # [num_choices]
    expert_scale: np.ndarray  # [num_choices]
    result_scale: np.ndarray  # [hidden]
    up: np.ndarray  # [experts_per_rank, parts * ffn, hidden]
    up_bias: np.ndarray  # [experts_per_rank, parts * ffn]
    down: np.ndarray  # [experts_per_rank, hidden, ffn]
    down_bias: np.ndarray  # [experts_per_rank, hidden]
    shared_up: np.ndarray  # [shared_parts * shared_ffn, hidden]
    shared_up_bias: np.ndarray  # [shared_parts * shared_ffn]
    shared_down: np.ndarray  # [hidden, shared_ffn]
    shared_down_bias: np.ndarray  # [hidden]
    shared_gate: np.ndarray  # [hidden]


COMBINES, SHARED_TILES, DISPATCHES = range(3)  # indices of `Back.done`
