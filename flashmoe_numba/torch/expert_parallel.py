"""transformers' expert parallelism with the layer in it: DistributedConfig(ep_implementation="flashmoe").

transformers loads each rank's own experts, and calls what stands here in place of their forward, on every rank at once
and with the same tokens. For ranks with tokens of their own it has FSDP, whose parameters come and go with every call,
so that nothing packed could stay: for these `register` and `replace_moe_blocks` take a process group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed.expert_parallel import EPImplementation

from .experts import describe_experts
from .operator import moe_layer
from .ownership import operands
from .session import SESSION


class FlashMoEParallel(EPImplementation):
    """How the experts of one module get their tokens: by the layer's own dispatch and combine.

    Args:
        experts: a decorated experts module, of this rank's own experts.
        ep_mesh: the ranks with the experts.
        tp_mesh: the ranks that come with the same tokens as this one; the same ranks, or transformers raises a
            ValueError.
    """

    needs_shared_batch = True

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        ranks = SESSION.ranks(None, ep_mesh.get_group())
        assert ranks is not None, "a group was given"
        self._experts, self._ranks = experts, ranks.name

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[num_tokens, hidden]`, the weighted results of tokens of which all ranks have the same.

        Each rank's own tokens, in the words of the layer, are its share of them.

        Args:
            top_k_index: `[num_tokens, num_topk]`, global; -1 and the number of all experts are no choice.

        Raises:
            NotImplementedError: naming what these experts compute that the layer does not.
            RuntimeError: gradients are asked for.
        """
        paths, description = describe_experts(self._experts, self.ep_mesh.size())
        tensors, description = operands(self._experts, paths, description, self._ranks)
        size, rank_idx = self.ep_mesh.size(), self.ep_mesh.get_local_rank()
        share = -(-len(hidden_states) // size)
        rows = slice(share * rank_idx, share * (rank_idx + 1))
        y = moe_layer(hidden_states[rows], top_k_index[rows], top_k_weights[rows], None, tensors, description)
        mine, whole = y.new_zeros((share, y.shape[1])), y.new_empty((share * size, y.shape[1]))
        mine[: len(y)] = y  # the last shares may be smaller, or empty
        dist.all_gather_single(whole, mine, group=self.ep_mesh.get_group())
        return whole[: len(hidden_states)]
