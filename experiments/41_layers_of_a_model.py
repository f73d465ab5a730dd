"""Question: what do 48 layers of one model cost as objects of their own, and as one that packs 48 times?

Command:  python experiments/41_layers_of_a_model.py
          mpirun -n 2 python -m mpi4py experiments/41_layers_of_a_model.py
Expected: `shared` has the threads of one layer, and hardly more memory than its weights. Some minutes on two cores,
          most of them for setting up `apart`.

Each way runs in the process in turn, `shared` first. `threads`, `mib` (resident) and `virtual_mib` are what a rank's
process grew by until all layers were called once; `weights_mib` of it are a rank's packed weights. `setup_s` includes
loading compiled kernels. Numbers are rank 0's.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, machine, parser_of, program, show, store

from flashmoe_numba import FlashMoE
from flashmoe_numba.commands.flags import integer
from reference import MoEConfig, Weights

SIZES = dict(num_tokens=256, hidden=256, ffn=128, num_experts=16, num_topk=2, gated=True, activation="silu")
COLUMNS = {"ways": "", "ranks": "d", "layers": "d", "threads": "d", "mib": ".0f", "weights_mib": ".0f"}
COLUMNS |= {"virtual_mib": ".0f", "setup_s": ".1f"}
Calls = list[Callable[[Any], Any]]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=integer(1), default=48, metavar="N", help="of the model [48]")
    args = parser.parse_args()
    comm = _world()
    config = MoEConfig(num_ranks=1 if comm is None else comm.size, **SIZES)
    layers = 3 if args.smoke else args.layers
    rows = [row_of(way, config, layers, comm) for way in WAYS]
    if comm is None or comm.rank == 0:
        show(rows, COLUMNS)
        store([row | machine() | program(("numpy", "numba")) for row in rows], args.json)
    return 0


def _world() -> Any:
    """The communicator under mpirun."""
    if "PMI_SIZE" not in os.environ:
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD


def row_of(way: str, config: MoEConfig, num_layers: int, comm: Any) -> Row:
    """Make the layers in this way, and call each once."""
    rank_idx = 0 if comm is None else comm.rank
    weights = [Weights.random(config, seed).shard(rank_idx, config.num_ranks) for seed in range(num_layers)]
    tokens = np.random.default_rng(rank_idx).standard_normal((config.num_tokens, config.hidden), np.float32)
    gc.collect()
    before, began = _status(), time.perf_counter()
    made, calls = WAYS[way](config, weights, comm)
    setup_s = time.perf_counter() - began
    for call in calls:
        call(tokens if comm is not None else [tokens])
    after = _status()
    for layer in made:
        layer.close()
    grew = {name: after[name] - before[name] for name in after}
    sizes = dict(mib=grew["VmRSS"] / 1024, virtual_mib=grew["VmSize"] / 1024)
    weights_mib = sum(of_layer.num_bytes for of_layer in weights) / 2**20
    row: Row = dict(ways=way, ranks=config.num_ranks, layers=num_layers, threads=grew["Threads"], setup_s=setup_s)
    return row | sizes | dict(weights_mib=weights_mib)


def _status() -> dict[str, int]:
    """Of this process; sizes in KiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) for name in ("Threads", "VmRSS", "VmSize")}


def _apart(config: MoEConfig, weights: list[Weights], comm: Any) -> tuple[list[FlashMoE], Calls]:
    layers = [FlashMoE(config, of_layer, comm=comm) for of_layer in weights]
    return layers, list(layers)


def _shared(config: MoEConfig, weights: list[Weights], comm: Any) -> tuple[list[FlashMoE], Calls]:
    layer = FlashMoE(config, weights[0], comm=comm)
    packed = [layer.packed, *map(layer.pack, weights[1:])]
    return [layer], [lambda x, one=one: layer(x, weights=one) for one in packed]


WAYS = {"shared": _shared, "apart": _apart}

if __name__ == "__main__":
    sys.exit(main())
