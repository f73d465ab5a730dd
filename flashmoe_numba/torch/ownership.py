"""Weights that are kept in the kernel's order only: half the memory, and a module's names still work.

The parameters of the matrices become tensors without memory (device "meta"), so that whatever would read them says so.
What stands for them in the operator's arguments is a ticket, a buffer of one number: while it is there, the packed
weights are. `state_dict` unpacks into new tensors; `load_state_dict` unpacks, loads and packs again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import nn

from reference.layout import SAVES
from reference.scalars import check_name

from ..errors import FlashMoEError
from ..layer.arguments import check_flags
from .description import TICKET, among, is_matrix, read, rename, views
from .session import SESSION, as_weights

OWNERS = ("parameters", "packed")
PART = (
    'has own="packed" on several ranks, each of which keeps its own experts only, so that no state_dict of it is '
    'whole: take it before the blocks are replaced, or keep the parameters by own="parameters"'
)


def check_training(train: bool, save: str, fused_accumulation: bool, own: str) -> None:
    """Nothing, if a module can be made with these arguments (see `MoE`).

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    check_flags(train=train, fused_accumulation=fused_accumulation)
    check_name("save", save, SAVES)
    if fused_accumulation and not train:
        raise ValueError("fused_accumulation must be False without train=True: there are no gradients; got True")
    if train and own == "packed":
        raise ValueError("own must be 'parameters' with train=True: there are no parameters to train; got 'packed'")


def check_sums(fused_accumulation: bool, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: sums do not fit into gradients of these tensors' types.
    """
    for name, tensor in tensors.items() if fused_accumulation else ():
        if tensor.dtype not in (torch.float32, torch.float64):
            rule = "fused_accumulation must be False for parameters whose type is not that of sums, float32 or float64"
            raise ValueError(f"{rule}; {name} has {tensor.dtype}".replace("torch.", ""))


class Kept:
    """What became of a module's matrices.

    Args:
        paths: of parameters and buffers, seen from the module.
        names: what these are, in the description's words.
        description: of the layer, with its num_topk.
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str], description: str) -> None:
        self.paths, self.names, self.description = tuple(paths), tuple(names), description
        matrices = [is_matrix(name) for name in names]
        self.matrices = [path for path, matrix in zip(paths, matrices, strict=True) if matrix]
        self.others = [path for path, matrix in zip(paths, matrices, strict=True) if not matrix]
        told = [TICKET, *[name for name, matrix in zip(names, matrices, strict=True) if not matrix]]
        self.told = rename(description, told)

    def pack(self, module: nn.Module) -> None:
        """Pack the parameters as they are, and let go of their memory."""
        tensors = [tensor_at(module, path) for path in self.paths]
        others = [tensor_at(module, path) for path in self.others]
        ticket = torch.zeros(1, dtype=torch.int64, device=tensors[0].device)
        self._entry = SESSION.hand_over((self.description, tensors), (self.told, [ticket, *others]))
        for path in self.matrices:
            _set_parameter(module, path, torch.empty_like(tensor_at(module, path), device="meta"))
        module.register_buffer("flashmoe_ticket", ticket, persistent=False)

    @property
    def is_part(self) -> bool:
        """Are some of the experts in its parameters' shapes other ranks', so that they are kept there only?"""
        _, fields = read(self.description)
        return self._entry.shared.layer.config.num_ranks > 1 and "num_present" not in fields

    def operands(self, module: nn.Module) -> list[torch.Tensor]:
        ticket = module.flashmoe_ticket
        assert isinstance(ticket, torch.Tensor)
        return [ticket, *[tensor_at(module, path) for path in self.others]]

    def unpacked(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The matrices by path, in memory of their own; those of other ranks' experts are zeros."""
        found = {path: tensor_at(module, path).detach() for path in self.paths}
        for path in self.matrices:
            found[path] = torch.zeros_like(found[path], device="cpu")
        _, fields = read(self.description)
        weights, shared = views(self.names, list(found.values()), fields), self._entry.shared
        self._entry.packed.unpack(as_weights(weights, shared.layer.config, shared.ranks))
        return {path: found[path] for path in self.matrices}


class Owner(nn.Module):
    """Base of modules whose weights may be kept in the kernel's order only."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `half`, `cuda` and others do to every tensor.

        Raises:
            TypeError: matrices are no tensors, which would be passed by.
        """
        if hasattr(self, "_flashmoe_kept"):
            rule = 'cannot be moved or converted to another type, because own="packed" keeps no tensors of its experts'
            raise TypeError(f"{type(self).__name__} {rule}: move the module before its weights are handed over")
        return super()._apply(fn, recurse)


def give_to_kernel(
    module: nn.Module, paths: Sequence[str], names: Sequence[str], description: str, ranks: str | None
) -> None:
    """Pack the matrices among these parameters, and keep nothing else of them: see `operands` for `ranks`."""
    kept = Kept(paths, names, _numbered(module, paths, description, ranks))
    kept.pack(module)
    module._flashmoe_kept = kept
    module.register_state_dict_post_hook(_unpack_into)
    module.register_load_state_dict_pre_hook(_before_loading)
    module.register_load_state_dict_post_hook(_after_loading)


def operands(
    module: nn.Module, paths: Sequence[str], description: str, ranks: str | None
) -> tuple[list[torch.Tensor], str]:
    """(tensors, description) that the operator is given for a module with these parameters.

    Args:
        ranks: the name of those that compute it together; None: this process alone.
    """
    kept: Kept | None = getattr(module, "_flashmoe_kept", None)
    if kept is not None:
        return kept.operands(module), kept.told
    tensors = [tensor_at(module, path) for path in paths]
    return tensors, description if ranks is None else _numbered(module, paths, description, ranks)


@torch.compiler.assume_constant_result
def _numbered(module: nn.Module, paths: Sequence[str], description: str, ranks: str | None) -> str:
    """The description, which among several ranks says which of their modules it is."""
    if ranks is None:
        return description
    return among(description, ranks, SESSION.ranks_named(ranks).number_of(module, paths, description))


def tensor_at(module: Any, path: str) -> torch.Tensor:
    """A parameter or a buffer."""
    found: torch.Tensor = reduce(getattr, path.split("."), module)
    return found


def _unpack_into(module: Any, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """
    Raises:
        FlashMoEError: some of its experts are other ranks'.
    """
    if module._flashmoe_kept.is_part:
        raise FlashMoEError(f"{type(module).__name__} {PART}")
    state.update({prefix + path: tensor for path, tensor in module._flashmoe_kept.unpacked(module).items()})


def _before_loading(module: Any, state: Any, prefix: str, *_: Any) -> None:
    """What a state has not, stays."""
    for path, tensor in module._flashmoe_kept.unpacked(module).items():
        _set_parameter(module, path, tensor)


def _after_loading(module: Any, incompatible_keys: Any) -> None:
    module._flashmoe_kept.pack(module)


def _set_parameter(module: nn.Module, path: str, tensor: torch.Tensor) -> None:
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent).register_parameter(name, nn.Parameter(tensor, requires_grad=False))
