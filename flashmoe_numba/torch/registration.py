"""`register`: the layer by name in transformers, which is imported here only when it is called."""

from __future__ import annotations

from functools import partial
from typing import Any

from reference.layout import SAVES

from .experts import flashmoe_experts
from .ownership import check_training
from .session import SESSION

NAME = "flashmoe"


def register(
    name: str = NAME,
    *,
    train: bool = False,
    save: str = SAVES[0],
    fused_accumulation: bool = False,
    comm: Any = None,
    process_group: Any = None,
) -> None:
    """Let transformers find the layer: `from_pretrained(..., experts_implementation="flashmoe")`, or later
    `model.set_experts_implementation("flashmoe")`; and in its own expert parallelism, which brings its own ranks,
    `from_pretrained(..., distributed_config=DistributedConfig(..., ep_implementation="flashmoe"))`.

    Only families with decorated experts ask for it; `replace_moe_blocks` is for the others, which do not say that they
    ignore the name. What experts of a decorated family compute beyond `ExpertKind` is refused at the first call.

    Args:
        train, save, fused_accumulation: for gradients: see `MoE`. transformers' own expert parallelism has none.
        comm, process_group: the ranks that compute such experts together, each for its own tokens: see `MoE`.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, got {name!r}")
    check_training(train, save, fused_accumulation, own="parameters")
    from transformers.distributed.expert_parallel import EPImplementationInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from .expert_parallel import FlashMoEParallel

    ranks = SESSION.ranks(comm, process_group)
    EPImplementationInterface.register(name, FlashMoEParallel)
    kept = (save, fused_accumulation) if train else None
    function = partial(flashmoe_experts, ranks=None if ranks is None else ranks.name, train=kept)
    ALL_EXPERTS_FUNCTIONS.register(name, function)
