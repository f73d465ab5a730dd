"""Small worlds, and the command that explores them."""

from flashmoe_numba.cli import main
from flashmoe_numba.explore.run.spec import WorldSpec
from reference import MoEConfig

SIZES = dict(
    num_ranks=2, num_tokens=4, hidden=5, ffn=3, num_experts=4, num_topk=2, gated=True, activation="silu",
    tile_m=4, tile_m_min=2, tile_n=4, token_block=2,
)  # fmt: skip


def spec(num_processors=2, lanes=1, epochs=2, data_seed=0, **changes):
    config = MoEConfig(**(SIZES | changes))
    return WorldSpec(config=config, num_processors=num_processors, lanes=lanes, epochs=epochs, data_seed=data_seed)


def flashmoe(capsys, *argv):
    """(exit status, output, errors) of `flashmoe explore`."""
    status = main(["explore", *argv])
    out, err = capsys.readouterr()
    return status, out, err
