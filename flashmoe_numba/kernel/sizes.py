"""How many: tiles and blocks that several actors count alike."""

from __future__ import annotations

from flashmoe_numba.device import jit
from reference import layout

tile_height = jit(layout.tile_height)


@jit
def num_row_blocks(num_rows, shortest, tallest):
    """As in reference/layout.py, which calls a function that is not compiled."""
    height = tile_height(num_rows, shortest, tallest)
    return (num_rows + height - 1) // height


@jit
def num_token_blocks(p):
    return (p.num_tokens + p.token_block - 1) // p.token_block


@jit
def num_gate_tasks(p):
    """A rank without tokens still runs one, which tells every peer so; a backward has its routing, and runs one."""
    return max(num_token_blocks(p), 1) if p.call == 0 else 1


@jit
def up_tiles(p):
    """Column tiles of the up projections: GEMM0 tasks of a row tile."""
    return (p.ffn + p.tile_ffn - 1) // p.tile_ffn


@jit
def down_tiles(p):
    """Column tiles of the down projection: GEMM1 tasks of a row tile."""
    return (p.hidden + p.tile_hidden - 1) // p.tile_hidden


@jit
def shared_row_tiles(p):
    """Row tiles of the shared expert, of `tile_m` tokens each but for the last."""
    return (p.num_tokens + p.tile_m - 1) // p.tile_m if p.shared_ffn > 0 else 0


@jit
def shared_up_tiles(p):
    """Column tiles of its up projections: SHARED0 tasks of a row tile."""
    return (p.shared_ffn + p.tile_shared - 1) // p.tile_shared


@jit
def num_shared_tasks(p):
    return shared_row_tiles(p) * (shared_up_tiles(p) + down_tiles(p))
