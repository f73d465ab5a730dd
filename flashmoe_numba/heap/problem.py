"""A layer's sizes as the integers that its blocks read (kernel/state.py: `Problem`)."""

from __future__ import annotations

from reference import Layout, MoEConfig
from reference.layout import DISPATCH, FACTORS

from ..kernel.state import Problem


def fixed_problem(
    config: MoEConfig, rank_idx: int, num_processors: int, packed: bool, save: str | None, staged: bool
) -> Problem:
    """With no call's numbers in it.

    Args:
        packed: may a row tile hold rows of several sources?
        save: what is kept of a call for its backward.
        staged: are ranks on several hosts?
    """
    c, layout = config, Layout(config, save, staged)
    return Problem(
        epoch=0,
        call=0,
        keeps=False,
        recomputes=False,
        resends=False,
        fresh=False,
        weight_tasks=0,
        router_weight_tasks=0,
        shared_weight_tasks=0,
        norm_weight_tasks=0,
        rank_idx=rank_idx,
        num_ranks=c.num_ranks,
        num_processors=num_processors,
        num_tokens=0,
        hidden=c.hidden,
        ffn=c.ffn,
        parts=c.expert_kind.num_ups,
        shared_ffn=c.shared_ffn,
        shared_parts=c.shared_kind.num_ups,
        num_experts=c.num_experts,
        num_choices=c.num_choices,
        experts_per_rank=c.num_experts_per_rank,
        num_topk=c.num_topk,
        slots=c.slots,
        row_blocks=layout.row_blocks,
        tile_m_min=c.tile_m_min,
        tile_m=c.tile_m,
        tile_ffn=min(c.tile_ffn, c.ffn),
        tile_hidden=min(c.tile_n, c.hidden),
        tile_shared=min(c.tile_ffn, max(c.shared_ffn, 1)),
        tile_experts=min(c.tile_n, c.num_choices),
        token_block=c.token_block,
        weight_input=c.router_kind.weight_input,
        routed=False,
        shared_gate=c.shared_gate,
        adds_input=c.num_zero > 0 and c.zero == "identity",
        has_logits=False,
        dispatch_at=layout.dispatch,
        result_at=layout.result,
        dispatch_flag_at=layout.dispatch_flag,
        result_flag_at=layout.result_flag,
        control_at=layout.control,
        again_at=layout.again,
        factors_at=layout.factors,
        dots_at=layout.dots,
        stage_at=layout.stage,
        row_bytes=layout.row_bytes(DISPATCH),
        factor_bytes=layout.row_bytes(FACTORS),
        deadline_ns=0,
        packed=packed,
    )
