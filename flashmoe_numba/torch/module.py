"""`MoE`: a layer as a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from reference import MoEConfig, Weights
from reference.layout import SAVES
from reference.scalars import check_name, check_one_of

from ..checkpoints.entries import STORED, arrays_of
from ..heap.tensors import as_tensor
from ..layer.arguments import check_flags
from .description import describe_config, training
from .losses import check_losses, load_balancing_loss, router_z_loss
from .ownership import OWNERS, Owner, check_sums, check_training, give_to_kernel, operands
from .ranks import Ranks
from .session import SESSION, as_weights
from .training import layer_of

ARRAYS = tuple(name for name in STORED if arrays_of(name) == (name,))


class MoE(Owner):
    """One MoE layer; its parameters have the names and shapes of `Weights`.

    Tokens of any shape `[..., hidden]`, more than `config.num_tokens` too: then the layer is called several times,
    which changes no bit; with a `config.capacity`, which counts by call, they are refused. All modules of equal configs
    share threads and segments.

    Args:
        config: sizes of the layer, of one rank, or of as many as there are in `comm` or `process_group`.
        weights: `Weights`, whose memory becomes the parameters', or tensors by the names of its arrays. Tensors made
            under `torch.inference_mode()` are copied, because a change in place of them could not be noticed.
        train: are there gradients? Then parameters ask for them, all but a bias that only chooses, and a second packed
            copy of the matrices is kept, transposed. Without, a call that gradients are asked of is an error.
        save: what a call with gradients keeps, as `FlashMoE` has it: "rows+up", "rows" or "nothing".
        fused_accumulation: a backward goes on with the sums that `.grad` of experts' parameters holds, where it is, in
            place of adding a sum of its own to it: so micro-batches give the bits of one batch, on any number of ranks.
            Parameters in float32 or float64 only, in eager mode and by `backward()` only: `torch.autograd.grad` adds to
            `.grad`, too, where there is one, and returns no sums. Hooks on parameters see a gradient where there
            was no `.grad` only.
        return_aux: a call returns (output, loss), for a training that balances experts: `load_balancing` times
            `load_balancing_loss` plus `router_z` times `router_z_loss` of this call's tokens; needs train=True.
        load_balancing, router_z: these coefficients.
        own: "parameters": they stay, beside a packed copy that follows their changes; "packed": the matrices of the
            experts are kept in the kernel's order only, and `state_dict` and `load_state_dict` convert.
        comm, process_group: the ranks that compute the layer together, as `FlashMoE` takes them. All ranks make the
            same modules in the same order and call them equally often (but see `join`), each with its own tokens, as
            many as it has. A rank packs its own experts only; `weights` are those of all experts or of its own.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: Weights | Mapping[str, torch.Tensor],
        *,
        train: bool = False,
        save: str = SAVES[0],
        fused_accumulation: bool = False,
        return_aux: bool = False,
        load_balancing: float = 0.01,
        router_z: float = 0.0,
        own: str = OWNERS[0],
        comm: Any = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_name("own", own, OWNERS)
        check_training(train, save, fused_accumulation, own)
        check_flags(return_aux=return_aux)
        if not isinstance(config, MoEConfig):
            raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}")
        ranks = SESSION.ranks(comm, process_group)
        _check_ranks(config, ranks)
        self._return_aux, self._coefficients = return_aux, (load_balancing, router_z)
        if return_aux:
            check_losses(config, train, load_balancing, router_z)
        self.config, self._ranks, self._train = config, None if ranks is None else ranks.name, train
        with torch.inference_mode(False):  # tensors made under it count no versions
            if ranks is not None and isinstance(weights, Weights):
                weights.shard(ranks.rank_idx, ranks.num_ranks)  # raises if its own experts are not there
            tensors = _tensors(weights, config)
            num_present = _check_present(as_weights(tensors, config, ranks), config, ranks)
            for name, tensor in tensors.items():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=train and name != "selection_bias"))
        self._names = tuple(tensors)
        self._description = describe_config(self._names, config, num_present)
        if train:
            check_sums(fused_accumulation, tensors)
            self._description = training(self._description, save, fused_accumulation)
        if own == "packed":
            give_to_kernel(self, self._names, self._names, self._description, self._ranks)
        self._operands()  # it has its number among the ranks' modules now, before any call

    def _operands(self) -> tuple[list[torch.Tensor], str]:
        return operands(self, self._names, self._description, self._ranks)

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> Any:
        """The layer's output, shaped like `hidden_states` `[..., hidden]` and of its type; with `return_aux`, and the
        loss.

        Args:
            topk_idx, topk_weights: `[..., num_topk]`, a routing from outside, as `FlashMoE` takes it.
            logits: `[..., num_choices]`, in place of the router's products, as `FlashMoE` takes them.

        Raises:
            TypeError, ValueError: naming the argument, its shape and the rule.
            RuntimeError: gradients are asked for, without `train`.
        """
        c = self.config
        x = _rows("hidden_states", hidden_states, c.hidden)
        idx, factors = _rows("topk_idx", topk_idx, c.num_topk), _rows("topk_weights", topk_weights, c.num_topk)
        tensors, description = self._operands()
        own = x, idx, factors, _rows("logits", logits, c.num_choices), tensors, description
        y, made, choices = layer_of(*own, train=self._train, show=self._return_aux)
        y = y.reshape(hidden_states.shape)
        return (y, self._loss(made, choices)) if self._return_aux else y

    def _loss(self, logits: Any, choices: Any) -> torch.Tensor:
        if logits.shape[1] != self.config.num_choices:
            raise ValueError(
                "topk_weights must be None with return_aux=True: a routing from outside has no logits here"
            )
        if self.config.router_kind.logit_bias:
            logits = logits + self.router_bias
        balancing, router_z = self._coefficients
        loss = balancing * load_balancing_loss(logits, choices, self.config.router_kind.score)
        return loss + router_z * router_z_loss(logits) if router_z else loss


def _check_ranks(config: MoEConfig, ranks: Ranks | None) -> None:
    if ranks is None and config.num_ranks != 1:
        rule = "config.num_ranks must be 1 without comm and process_group"
        raise ValueError(f"{rule}, because a module is one rank, got {config.num_ranks}")
    if ranks is not None and config.num_ranks != ranks.num_ranks:
        raise ValueError(f"config.num_ranks must be {ranks.num_ranks}, that of the ranks, got {config.num_ranks}")


def _check_present(weights: Weights, config: MoEConfig, ranks: Ranks | None) -> int:
    """The number of experts that are there: all, or the rank's own."""
    if ranks is None or weights.num_experts != config.num_experts_per_rank:
        weights.check_all(config)
    weights.check(config)
    return weights.num_experts


def _rows(name: str, tensor: Any, width: int) -> torch.Tensor | None:
    """`[num_tokens, width]` of `[..., width]`: reshaping alone would take any shape with as many elements."""
    if tensor is None:
        return None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() == 0 or tensor.shape[-1] != width:
        raise ValueError(f"{name} must have shape [..., {width}], got {list(tensor.shape)}")
    return tensor.reshape(-1, width)


def _tensors(weights: Weights | Mapping[str, torch.Tensor], config: MoEConfig) -> dict[str, torch.Tensor]:
    """By the names of `Weights`, those that are there."""
    if isinstance(weights, Mapping):
        _check_names(weights)
        there = {name: tensor.detach() for name, tensor in weights.items() if tensor is not None}
        return {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in there.items()}
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be Weights or tensors by name, got {type(weights).__name__}")
    weights.check(config)
    arrays = {name: getattr(weights, name) for name in ARRAYS}
    return {
        name: as_tensor(array if array.flags.writeable else array.copy())
        for name, array in arrays.items()
        if array is not None
    }


def _check_names(weights: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        check_one_of("a name in weights", name, ARRAYS)
        if not isinstance(tensor, torch.Tensor | None):
            raise TypeError(f"weights[{name!r}] must be a tensor or None, got {type(tensor).__name__}")
    for name in ("router", "up_proj", "down_proj"):
        if weights.get(name) is None:
            raise ValueError(f"weights must have {name!r}, got {list(weights)}")
