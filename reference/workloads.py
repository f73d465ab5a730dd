"""Tokens, and routings where a kind has its own, to run a layer on.

    text      the words of the documentation inside Python, in order; one random embedding per word
    uniform   independent normal rows
    zipf:s    token types drawn with probability ~ rank^-s, s >= 0; one random embedding per type
    hot       uniform rows with a routing from outside: every token's first choice is expert 0
    *.npz, *.safetensors   recorded: x `[tokens, hidden]`, optional topk_idx and topk_weights `[tokens, num_topk]`, each
                           possibly with a leading index of ranks; all finite, but for weights of no choice (index -1
                           or num_choices)

Invariant: token i of all tokens depends on (kind, seed, i) only, not on the ranks they are split over; and a rank can
make its own part alone. Leaves out: positions, attention, trained embeddings; text depends on the version of Python.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from .arrays import Array, check_array, check_floating, stream
from .config import MoEConfig
from .routers import Routing, external_routing
from .scalars import plain

WORKLOAD_NAMES = ("text", "uniform", "zipf:s (s a number >= 0)", "hot", "a path ending in .npz or .safetensors")
VOCABULARY = 32768
BLOCK = 64  # tokens per random stream
TEXT_STREAM, TYPE_STREAM, ROW_STREAM, ZIPF_STREAM, HOT_IDX_STREAM, HOT_WEIGHT_STREAM = range(2, 8)  # see weights.py


@dataclass(frozen=True, eq=False)
class Workload:
    """The parts of the ranks asked for, in their order; the routing lists are None where the router is to decide.

    Args:
        x: `[num_tokens_of_rank, hidden]` each, in `config.numpy_dtype`.
        topk_idx: `[num_tokens_of_rank, num_topk]` each, int32.
        topk_weights: `[num_tokens_of_rank, num_topk]` each, in `config.accumulator`.
    """

    x: list[Array]
    topk_idx: list[Array] | None = None
    topk_weights: list[Array] | None = None


def make_workload(
    name: str,
    config: MoEConfig,
    num_tokens: int | Sequence[int] | None = None,
    seed: int = 0,
    ranks: Sequence[int] | None = None,
) -> Workload:
    """The workload `name` (see the module's table), or the parts of it that belong to `ranks`.

    Args:
        num_tokens: of each rank: one number for all, or one per rank. Default: `config.num_tokens`; for a recorded
            workload all that the file has, split evenly.
        ranks: whose parts to make, default all. Under MPI: `make_workload(..., ranks=[rank_idx]).x[0]`.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule; FileNotFoundError: no such recording.
    """
    if is_recording(name):
        rows = _load(Path(name), config)
        counts = _even(len(rows["x"]), config.num_ranks) if num_tokens is None else num_tokens
        part = _recorded_part(name, rows, config)
    else:
        counts = config.num_tokens if num_tokens is None else num_tokens
        part = _synthetic_part(name, config, seed)
    spans = _spans(counts, config)
    parts = [part(spans[rank]) for rank in _check_ranks(ranks, config)]
    routings = [routing for _, routing in parts if routing is not None]
    x = [tokens.astype(config.numpy_dtype) for tokens, _ in parts]
    if not routings:
        return Workload(x)
    return Workload(x, [routing.topk_idx for routing in routings], [routing.topk_weights for routing in routings])


Part = Callable[[range], tuple[Array, Routing | None]]


def _synthetic_part(name: str, config: MoEConfig, seed: int) -> Part:
    """The function from a range of token indices to those tokens and their routing."""
    exponent = zipf_exponent(name)
    if exponent is not None:
        return lambda span: (_zipf(span, config, seed, exponent), None)
    others: dict[str, Part] = {
        "text": lambda span: (_text(span, config, seed), None),
        "uniform": lambda span: (_uniform(span, config, seed), None),
        "hot": lambda span: (_uniform(span, config, seed), _hot_routing(span, config, seed)),
    }
    if name not in others:
        raise ValueError(f"name must be one of: {', '.join(WORKLOAD_NAMES)}; got {name!r}")
    return others[name]


def is_recording(name: str) -> bool:
    """Is it the path of a recorded workload?"""
    return name.endswith((".npz", ".safetensors"))


def zipf_exponent(name: str) -> float | None:
    """s of "zipf:s"; None of other names."""
    match = re.fullmatch(r"zipf:(\d+(?:\.\d*)?|\.\d+)", name)
    return float(match[1]) if match else None


def _uniform(span: range, config: MoEConfig, seed: int) -> Array:
    shape = (BLOCK, config.hidden)
    return _rows(span, seed, ROW_STREAM, lambda random: random.standard_normal(shape, dtype=np.float32))


def _text(span: range, config: MoEConfig, seed: int) -> Array:
    from pydoc_data.topics import topics

    words = re.findall(r"\w+", "\n".join(topics[key] for key in sorted(topics)))
    here = [words[token % len(words)] for token in span]
    keys = [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in here]
    return _embeddings(np.array(keys, np.uint64), config, seed, TEXT_STREAM)


def _zipf(span: range, config: MoEConfig, seed: int, exponent: float) -> Array:
    cumulative = np.cumsum(np.arange(1, VOCABULARY + 1, dtype=np.float64) ** -exponent)
    level = _rows(span, seed, ZIPF_STREAM, lambda random: random.random(BLOCK)) * cumulative[-1]
    return _embeddings(np.searchsorted(cumulative, level, side="right"), config, seed, TYPE_STREAM)


def _hot_routing(span: range, config: MoEConfig, seed: int) -> Routing:
    """Expert 0 first, the others uniform and distinct; positive weights with sum 1."""
    order = _rows(span, seed, HOT_IDX_STREAM, lambda random: random.random((BLOCK, config.num_experts)))
    order[:, 0] = -1
    shape = (BLOCK, config.num_topk)
    weights = _rows(span, seed, HOT_WEIGHT_STREAM, lambda random: 1 - random.random(shape))  # in (0, 1]
    idx = np.argsort(order, axis=1)[:, : config.num_topk]
    return external_routing(idx, weights / weights.sum(axis=1, keepdims=True), config, len(span))


def _rows(span: range, seed: int, key: int, draw: Callable[[np.random.Generator], Array]) -> Array:
    """Rows `span` of an endless array of which `draw` makes `BLOCK` rows from each block's own stream."""
    first, last = span.start // BLOCK, max(span.start, span.stop - 1) // BLOCK
    blocks = [draw(stream(seed, key, block)) for block in range(first, last + 1)]
    skip = span.start - first * BLOCK
    return np.concatenate(blocks)[skip : skip + len(span)]


def _embeddings(types: Array, config: MoEConfig, seed: int, key: int) -> Array:
    """`[len(types), hidden]`: a normal row for each type, the same wherever the type occurs."""
    kinds, position = np.unique(types, return_inverse=True)
    table = np.empty((len(kinds), config.hidden), np.float32)
    for row, kind in zip(table, kinds.tolist(), strict=True):
        row[:] = stream(seed, key, kind).standard_normal(config.hidden, dtype=np.float32)
    return table[position]


def _load(path: Path, config: MoEConfig) -> dict[str, Array]:
    """The arrays of a recording, with ranks and tokens flattened: `[rows, ...]`."""
    arrays = read_recording(path)
    given = [key for key in ("x", "topk_idx", "topk_weights") if key in arrays]
    if given not in (["x"], ["x", "topk_idx", "topk_weights"]):
        raise ValueError(f"{path} must have x, and both or none of topk_idx, topk_weights; it has {sorted(arrays)}")
    widths = {"x": config.hidden, "topk_idx": config.num_topk, "topk_weights": config.num_topk}
    return {key: flat_rows(f"{path}: {key}", arrays[key], widths[key]) for key in given}


def read_recording(path: Path) -> dict[str, Array]:
    """All arrays of a .npz or .safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"name is a recorded workload, but there is no file {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        import ml_dtypes  # noqa: F401  makes bfloat16 a name that NumPy, and so safetensors, knows
        from safetensors.numpy import load_file

        return dict(load_file(path))
    except Exception as error:  # each format has errors of its own, and they name neither the file nor its format
        raise ValueError(f"{path} must be a readable {path.suffix} file: {type(error).__name__}: {error}") from error


def flat_rows(name: str, array: Array, width: int) -> Array:
    """`array` as `[rows, width]`, if it is that, possibly with a leading index of ranks."""
    leading = (None, None) if array.ndim > 2 else (None,)
    return check_array(name, array, (*leading, width)).reshape(-1, width)


def _recorded_part(name: str, rows: dict[str, Array], config: MoEConfig) -> Part:
    with np.errstate(over="ignore"):  # becomes infinite, and is refused
        x = check_floating(f"{name}: x", rows["x"]).astype(config.numpy_dtype)
    _check_finite(f"{name}: x", x)
    if "topk_idx" not in rows:
        return lambda span: (_take(name, x, span), None)
    routing = recorded_routing(name, rows["topk_idx"], rows["topk_weights"], config)
    idx, weights = routing.topk_idx, routing.topk_weights
    return lambda span: (_take(name, x, span), Routing(_take(name, idx, span), _take(name, weights, span)))


def recorded_routing(name: str, topk_idx: Array, topk_weights: Array, config: MoEConfig) -> Routing:
    """The routing in the recording `name`, checked: as one from outside, and its weights are finite."""
    with np.errstate(over="ignore"):
        routing = external_routing(topk_idx, topk_weights, config, len(topk_idx))
    _check_finite(f"{name}: topk_weights", routing.topk_weights)
    return routing


def _check_finite(name: str, rows: Array) -> None:
    """NaN spoils its rows, which no comparison looks at then: a recording that has it would pass every check."""
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{name} must be finite in {rows.dtype}, got {rows[row].tolist()} in row {row}"[:400])


def _take(name: str, array: Array, span: range) -> Array:
    if span.stop > len(array):
        raise ValueError(f"num_tokens asks for tokens up to {span.stop} in all, but {name} has {len(array)}")
    return array[span.start : span.stop]


def _even(total: int, num_ranks: int) -> list[int]:
    """`total` tokens over the ranks; where it does not divide, the first ranks have one more."""
    return [total // num_ranks + (rank < total % num_ranks) for rank in range(num_ranks)]


def _spans(num_tokens: int | Sequence[int], config: MoEConfig) -> list[range]:
    """The token indices of each rank."""
    num_tokens = plain(num_tokens)
    counts = [num_tokens] * config.num_ranks if isinstance(num_tokens, int) else [plain(count) for count in num_tokens]
    if len(counts) != config.num_ranks:
        raise ValueError(f"num_tokens must be one number or num_ranks={config.num_ranks} of them, got {counts}")
    for count in counts:
        if not 0 <= count <= config.num_tokens:
            raise ValueError(f"num_tokens must be in [0, config.num_tokens={config.num_tokens}], got {count}")
    ends = list(accumulate(counts, initial=0))
    return [range(start, stop) for start, stop in pairwise(ends)]


def _check_ranks(ranks: Sequence[int] | None, config: MoEConfig) -> Sequence[int]:
    if ranks is None:
        return range(config.num_ranks)
    for rank in ranks:
        if not 0 <= rank < config.num_ranks:
            raise ValueError(f"ranks must be in [0, num_ranks={config.num_ranks}), got {rank}")
    return ranks
