"""Tensors by their names alone: the same numbers everywhere, from integers, so that no file has to keep them.

All are multiples of 2^-14, which float32 and float64 hold exactly.
"""

from __future__ import annotations

import zlib

import numpy as np

VOCAB = 50


def uniform(name: str, shape: tuple[int, ...], size: float = 1.0) -> np.ndarray:
    """`shape` float64 in [-size, size): splitmix64 (Steele et al., 2014) of the name and the place; size: 2^-n."""
    count = int(np.prod(shape, dtype=np.int64))
    word = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word += np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    word ^= word >> np.uint64(31)
    return ((word >> np.uint64(52)).astype(np.float64) / 2048 - 1).reshape(shape) * size


def tensor(name: str, shape: tuple[int, ...], num_experts: int, salt: str = "") -> np.ndarray:
    """What the block's tensor of that name holds: products of about 1, scales around 1, biases that decide."""
    if name.endswith("tid2eid"):
        return np.argsort(uniform(name + salt, (shape[0], num_experts)), axis=1, kind="stable")[:, : shape[1]]
    values = uniform(name + salt, shape, 0.5)
    last = name.split(".")[-1]
    if "norm" in name or "scale" in last:
        return 1 + values / 2
    return values


def state(shapes: dict[str, list[int]], num_experts: int, salt: str = "") -> dict[str, np.ndarray]:
    """All tensors of a block."""
    return {name: tensor(name, tuple(shape), num_experts, salt) for name, shape in shapes.items()}


def tokens(num_tokens: int, hidden: int, name: str = "x") -> np.ndarray:
    """`[num_tokens, hidden]` float64 in [-2, 2)."""
    return uniform(name, (num_tokens, hidden), 2.0)
