"""Routings from files: recorded choices, or a histogram of the tokens of each expert.

    choices     `[tokens, num_topk]` integers: the first num_ranks * num_tokens rows, rank after rank; or by rank,
                `[num_ranks, tokens, num_topk]`: the first num_tokens of each. -1 and num_choices are no choice.
    histogram   `[num_choices]`: tokens of each expert, all ranks together; or by rank, `[num_ranks, num_choices]`.
                Numbers or shares of any sum: as many tokens as are asked for are drawn to these shares, each with
                num_topk distinct experts.

Either may have a leading index of layers, of which `layer` is one. Without it a leading index means ranks, and must be
as long as there are ranks.

Files: .npz and .safetensors, whose array is called topk_idx, or is the only one, or the only one of integers, or is
named: FILE:KEY. .npy. .csv: a line per token, rank or expert; or with a header, `[layer,][rank,]expert,tokens`, a line
for each number that is not 0. Weights beside topk_idx, topk_weights, must be finite, and cost nothing.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from reference.arrays import Array, check_array
from reference.config import MoEConfig
from reference.workloads import read_recording, recorded_routing

from .checks import naming

MOST = 10**7  # numbers of a table
INDICES = ("layer", "rank", "expert")  # columns of a .csv with a header, in this order
_NAME = re.compile(r"(?P<path>.*\.(?P<kind>npz|safetensors|npy|csv))(?::(?P<key>[^:/]+))?")


def is_recorded(name: str) -> bool:
    """Is it the path of a file with a routing?"""
    return _NAME.fullmatch(name) is not None


def recorded_path(name: str) -> Path:
    """The file of such a name."""
    return Path(_parts(name)["path"])


def read_routing(name: str, config: MoEConfig, layer: int | None, random: np.random.Generator) -> tuple[str, Array]:
    """What it is called, and `[num_ranks * num_tokens, num_topk]`: the choices of all tokens, -1 where there is none.

    Raises:
        TypeError, ValueError: naming the file, what it has and the rule; FileNotFoundError: no such file.
    """
    array, weights = _arrays(name, config)
    histogram = _is_histogram(name, array, config)
    if layer is not None:
        if array.ndim == 2 - histogram:
            raise ValueError(f"{name} has no layers, so layer must not be given; got {layer}")
        name = f"{name}, layer {layer}"
        array, weights = _layer(name, array, layer), None if weights is None else _layer(name, weights, layer)
    by_rank = _is_by_rank(name, array, 2 - histogram, config)
    title = ", ".join([name, *(["histogram"] if histogram else []), *(["by rank"] if by_rank else [])])
    choices = _drawn(name, array, config, random) if histogram else _choices(name, array, weights, config)
    return title, choices


def has_layers(name: str, config: MoEConfig) -> bool:
    """Whether `layer` can be given: there is an index before that of tokens or experts."""
    array, _ = _arrays(name, config)
    return array.ndim > 2 - _is_histogram(name, array, config)


def _parts(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return match


# ---- files


def _arrays(name: str, config: MoEConfig) -> tuple[Array, Array | None]:
    """The choices or the histogram, and the weights of choices."""
    parts = _parts(name)
    arrays = _read(Path(parts["path"]), parts["kind"], config.num_choices)
    key = parts["key"] or _key(name, arrays)
    if key not in arrays:
        raise ValueError(f"{parts['path']} must have {key}; it has {sorted(arrays)}")
    array = arrays[key]
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must have numbers, got {array.dtype}")
    if parts["kind"] == "csv" and array.ndim == 1 and config.num_topk == 1 and len(array) != config.num_choices:
        array = array[:, None]  # a choice in each line
    return array, arrays.get("topk_weights") if key == "topk_idx" else None


def _read(path: Path, kind: str, num_experts: int) -> Mapping[str, Array]:
    if kind in ("npz", "safetensors"):
        return read_recording(path)
    if not path.is_file():
        raise FileNotFoundError(f"name is a recorded routing, but there is no file {path}")
    try:
        return {"": np.load(path, allow_pickle=False) if kind == "npy" else _read_csv(path, num_experts)}
    except (ValueError, EOFError) as error:  # which name no file
        raise ValueError(f"{path} must be a readable .{kind} file: {error}") from None


def _read_csv(path: Path, num_experts: int) -> Array:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [[cell.strip() for cell in line] for line in csv.reader(file) if any(line)]
    header = [cell.lower() for cell in lines[0]] if lines else []
    if header[-2:-1] == ["expert"] and header[:-1] == [name for name in INDICES if name in header]:
        return _table(np.array(lines[1:], float).reshape(-1, len(header)), num_experts)
    numbers = np.array(lines, float)
    if numbers.ndim == 2 and 1 in numbers.shape:
        numbers = numbers.ravel()
    whole = (numbers == np.round(numbers)).all()
    return numbers.astype(np.int64) if whole else numbers


def _table(lines: Array, num_experts: int) -> Array:
    """`[layers, ranks, experts]`, those of these that lines have: their last numbers by the others; else 0."""
    given = lines[:, :-1]
    if not ((given >= 0) & (given < MOST) & (given == np.floor(given))).all():
        raise ValueError(f"indices must be integers in [0, {MOST})")
    index = given.astype(np.int64)
    if len(np.unique(index, axis=0)) < len(index):
        raise ValueError("every number must be named once")
    shape = index.max(axis=0, initial=-1) + 1
    shape[-1] = max(shape[-1], num_experts)
    if prod(shape.tolist()) > MOST:
        raise ValueError(f"indices must be of at most {MOST} numbers, got {shape.tolist()}")
    result = np.zeros(shape)
    result[tuple(index.T)] = lines[:, -1]
    return result


def _key(name: str, arrays: Mapping[str, Array]) -> str:
    whole = [key for key, array in arrays.items() if array.dtype.kind in "iu"]
    for found in (["topk_idx"] if "topk_idx" in arrays else [], list(arrays), whole):
        if len(found) == 1:
            return found[0]
    raise ValueError(f"{name} must have topk_idx, or one array; name one with FILE:KEY; it has {sorted(arrays)}")


# ---- axes


def _is_histogram(name: str, array: Array, config: MoEConfig) -> bool:
    if array.ndim == 1 or (array.ndim > 1 and array.shape[-1] == config.num_choices != config.num_topk):
        return True
    if array.ndim < 2 or array.shape[-1] != config.num_topk:
        widths = f"num_topk={config.num_topk} choices or num_choices={config.num_choices} tokens of experts"
        raise ValueError(f"{name} must have rows of {widths}, got shape {list(array.shape)}")
    return False


def _layer(name: str, array: Array, layer: int) -> Array:
    if not 0 <= layer < len(array):
        raise ValueError(f"{name}: layer must be in [0, {len(array)}), got {layer}")
    result: Array = array[layer]
    return result


def _is_by_rank(name: str, array: Array, num_axes: int, config: MoEConfig) -> bool:
    if array.ndim == num_axes:
        return False
    if array.ndim > num_axes + 1:
        raise ValueError(
            f"{name} has indices of layers and ranks: say which by layer (--layer); got shape {list(array.shape)}"
        )
    if len(array) != config.num_ranks:
        rule = f"num_ranks={config.num_ranks}, for it means ranks; where it means layers, say which by layer (--layer)"
        raise ValueError(f"{name} must have a leading index of {rule}; got shape {list(array.shape)}")
    return True


# ---- choices


def _choices(name: str, array: Array, weights: Array | None, config: MoEConfig) -> Array:
    if array.dtype.kind == "f":
        raise TypeError(f"{name} must have integers as choices, got {array.dtype}")
    name = f"{name}: topk_idx"
    weights = np.zeros(array.shape) if weights is None else check_array(f"{name}, topk_weights", weights, array.shape)
    flat = _flat(name, array, config), _flat(name, weights, config)
    with naming(name.removesuffix(": topk_idx")):
        return recorded_routing("the recording", *flat, config).topk_idx


def _flat(name: str, array: Array, config: MoEConfig) -> Array:
    """`[num_ranks * num_tokens, num_topk]`, of a rank its own where the array has ranks."""
    ranks, tokens = config.num_ranks, config.num_tokens
    need, rule = ranks * tokens, f"num_ranks={ranks} times num_tokens={tokens} rows"
    if array.ndim == 3:
        need, rule = tokens, f"num_tokens={tokens} rows of each rank"
    if array.shape[-2] < need:
        raise ValueError(f"{name} must have at least {rule}, got {array.shape[-2]}")
    result: Array = array[..., :need, :].reshape(ranks * tokens, -1)
    return result


def _drawn(name: str, array: Array, config: MoEConfig, random: np.random.Generator) -> Array:
    """Choices whose numbers by expert are those of the histogram, scaled to the tokens asked for."""
    if array.shape[-1] != config.num_choices:
        raise ValueError(f"{name} must have num_choices={config.num_choices} experts, got {array.shape[-1]}")
    with np.errstate(over="ignore"):
        total = array.sum(axis=-1)
    if not (np.isfinite(total).all() and (array >= 0).all() and (total > 0).all()):
        raise ValueError(f"{name} must have finite numbers of tokens >= 0, and some for each rank")
    rows = np.atleast_2d(array)
    tokens = config.num_ranks * config.num_tokens // len(rows)
    return np.concatenate([_drawn_to(name, row, tokens, config.num_topk, random) for row in rows])


def _drawn_to(name: str, histogram: Array, tokens: int, num_topk: int, random: np.random.Generator) -> Array:
    """`[tokens, num_topk]`, distinct: each expert's tokens in a row, in a random order of experts, cut into columns.

    No expert has more than a column's tokens, so a token meets it once, even where its row goes on in the next column.
    """
    exact = histogram / histogram.sum() * tokens * num_topk
    if (exact > tokens * (1 + 1e-9)).any():
        expert = int(exact.argmax())
        most = f"at most 1 / num_topk={num_topk} of all choices, as a token chooses it once"
        raise ValueError(
            f"{name}: expert {expert} must have {most}; got {exact[expert] / tokens / num_topk:.3g} of them"
        )
    counts = np.minimum(np.floor(exact + 1e-9), tokens).astype(np.int64)
    left = tokens * num_topk - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1  # the largest remainders
    order = random.permutation(len(counts)).astype(np.int32)
    columns = np.repeat(order, counts[order]).reshape(num_topk, tokens)
    choices: Array = random.permuted(columns.T[random.permutation(tokens)], axis=1)
    return choices
