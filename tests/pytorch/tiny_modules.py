"""A tiny `MoE`, and tokens for it."""

from cases import random_tokens, tiny_config

from flashmoe_numba.heap.tensors import as_tensor
from flashmoe_numba.torch import MoE
from reference import Weights

CONFIG = tiny_config(num_ranks=1)


def make_module(config=CONFIG, seed=0, **how):
    return MoE(config, Weights.random(config, seed, bias=True), **how)


def tokens(config=CONFIG, rows=7, seed=0):
    return as_tensor(random_tokens(config, [rows], seed)[0])
