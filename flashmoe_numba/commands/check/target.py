"""The callable that is checked: how it is named, what it is called with, and its calls in a process of its own.

    layer(x, topk_idx, topk_weights, weights) -> y       a function; or one that makes a layer for several calls,
    make(weights) -> layer(x, topk_idx, topk_weights) -> y

which is what can be called with one argument. Arrays are NumPy's, or tensors of PyTorch on the CPU if the target wants
them. Whatever goes wrong in a target is a `TargetError`, of one line, with the place in the target's own source.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from reference import Weights
from reference.arrays import Array

RULE = "must take (x, topk_idx, topk_weights, weights), or (weights) and return what takes (x, topk_idx, topk_weights)"


class TargetError(Exception):
    """A target that cannot be loaded, or a call of it that gave no result."""


@dataclass(frozen=True)
class Target:
    """A callable by its name.

    Args:
        name: `package.module:name` or `path/file.py:name`.
        torch: it takes and returns tensors.
        folder: where modules are looked for first, and files if their path is relative.
    """

    name: str
    torch: bool
    folder: str


class Call(NamedTuple):
    """What a layer is called with: `[num_tokens, hidden]`, and twice `[num_tokens, num_topk]`.

    `strided`: as views whose rows do not lie in one piece.
    """

    x: Array
    topk_idx: Array
    topk_weights: Array
    strided: bool = False


class Answer(NamedTuple):
    """What came back, and the names of arguments that have other bits now."""

    y: Array
    changed: list[str]


def answers(target: Target, weights: Weights, calls: Sequence[Call]) -> list[Answer]:
    """Make these calls of one layer, one after the other.

    Raises:
        TargetError: one of them failed, or returned no array.
    """
    mine = _copied(weights)
    given = _with_tensors(mine) if target.torch else mine
    layer = _guarded(load(target), given)
    return [_answer(target, layer, call, weights, mine) for call in calls]


def _answer(target: Target, layer: Callable[..., Any], call: Call, weights: Weights, mine: Weights) -> Answer:
    arrays = [_strided(array) if call.strided else array.copy() for array in call[:3]]
    y = _guarded(layer, *map(_as_tensor, arrays)) if target.torch else _guarded(layer, *arrays)
    after = dict(zip(Call._fields, arrays, strict=False)) | arrays_of(mine)
    before = dict(zip(Call._fields, call[:3], strict=False)) | arrays_of(weights)
    return Answer(_as_result(y, target.torch), [name for name, array in after.items() if differs(array, before[name])])


def differs(a: Array, b: Array) -> bool:
    """Are there other bits? Arrays of one shape and type."""
    return a.tobytes() != b.tobytes()


@cache
def load(target: Target) -> Callable[[Any], Callable[..., Any]]:
    """Import the target; returns what makes a layer from weights.

    Raises:
        TargetError: there is none of this name, its import fails, or it takes other arguments.
    """
    place, _, name = target.name.rpartition(":")
    if not place or not name:
        raise TargetError(f"must be package.module:name or path/file.py:name, got {target.name!r}")
    sys.path.insert(0, target.folder)
    module = _guarded(_from_file, Path(target.folder, place)) if place.endswith(".py") else _from_name(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{place!r} has no {name!r}")
        found = getattr(found, part)
    return _maker(found)


def _from_name(place: str) -> ModuleType:
    return _guarded(importlib.import_module, place)  # type: ignore[no-any-return]


def _from_file(file: Path) -> ModuleType:
    """As `python FILE` would, it finds its neighbours, and stands in the way of no module of its name."""
    spec = importlib.util.spec_from_file_location(f"flashmoe_check_{file.stem}", file)
    assert spec is not None and spec.loader is not None, file
    sys.path.insert(0, str(file.parent))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _maker(found: Any) -> Callable[[Any], Callable[..., Any]]:
    if not callable(found):
        raise TargetError(f"{RULE}, got {type(found).__name__}")
    if _takes(found, 1):
        return found  # type: ignore[no-any-return]
    if not _takes(found, 4):
        raise TargetError(f"{RULE}, got {inspect.signature(found)}")
    return lambda weights: partial(_last, found, weights)


def _last(function: Callable[..., Any], weights: Any, *arguments: Any) -> Any:
    return function(*arguments, weights)


def _takes(found: Callable[..., Any], number: int) -> bool:
    """Can it be called with so many arguments? A function that does not tell is taken to be one of four."""
    try:
        inspect.signature(found).bind(*range(number))
    except TypeError:
        return False
    except ValueError:
        return number == 4
    return True


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what belongs to the target; its exceptions become ours, which any process can read."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or ["without a word"]
        raise TargetError(f"{type(error).__name__}: {lines[0]}{_place(error)}") from None


def _place(error: BaseException) -> str:
    """Where it was raised, below this file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


# ---- arrays, tensors, and what shares their memory


def _strided(array: Array) -> Array:
    """The same values, every second column of an array in Fortran's order."""
    wide = np.zeros((array.shape[0], 2 * array.shape[1]), array.dtype, order="F")
    wide[:, ::2] = array
    return wide[:, ::2]


def arrays_of(weights: Weights) -> dict[str, Array]:
    """The arrays of weights that are there, by name."""
    named = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return {name: array for name, array in named.items() if isinstance(array, np.ndarray)}


def _copied(weights: Weights) -> Weights:
    copies: dict[str, Any] = {name: array.copy() for name, array in arrays_of(weights).items()}
    return replace(weights, **copies)


def _with_tensors(weights: Weights) -> Weights:
    tensors: dict[str, Any] = {name: _as_tensor(array) for name, array in arrays_of(weights).items()}
    return replace(weights, **tensors)


def _as_tensor(array: Array) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_result(y: Any, is_torch: bool) -> Array:
    """A copy of a result, which the next call cannot change."""
    if is_torch:
        y = _as_array(y)
    if not isinstance(y, np.ndarray):
        raise TargetError(f"y must be a NumPy array, got {type(y).__name__}")
    return np.array(y)


def _as_array(y: Any) -> Any:
    import torch

    if not isinstance(y, torch.Tensor):
        raise TargetError(f"y must be a tensor, got {type(y).__name__}")
    y = y.detach().cpu().contiguous()
    if y.dtype != torch.bfloat16:
        return y.numpy()
    import ml_dtypes

    return y.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
