"""What a distributed Mixture-of-Experts layer means, in NumPy: sizes, routing, packets, layout, tiles, the oracle.

Importing it needs NumPy only; bfloat16 needs ml_dtypes, and .safetensors files need safetensors, where they are used.
"""

from .activations import ACTIVATIONS, activation
from .backward import Gradients, moe_layer_backward
from .config import MoEConfig
from .experts import expert_ffn
from .formats import DTYPES, element_dtype
from .gradient_bounds import gradient_tolerance
from .hosts import Hosts
from .layer import moe_layer
from .layer_kinds import ExpertKind, RouterKind
from .layout import Layout, Write, num_row_blocks, tile_height, write_conflicts
from .packets import Packets, make_packets
from .plan import Plan, make_plan
from .presets import load_preset, preset_names, read_preset
from .router_bounds import RouterBounds, router_tolerance
from .routers import Routing, external_routing, route, softmax_topk
from .routing_check import check_routing
from .runs import RowRun, RowTile
from .sizes import hidden_rows, max_row_blocks, max_tasks
from .task_kinds import COMBINE, DISPATCH, GATE, GEMM0, GEMM1, KIND_NAMES, SHARED0, SHARED1
from .tiled_layer import TiledLayer
from .tiles import Task, task_graph, tiles_n0, tiles_n1
from .tolerance import max_rel_error, tolerance
from .weights import Weights
from .workloads import WORKLOAD_NAMES, Workload, make_workload

__all__ = [
    "ACTIVATIONS",
    "COMBINE",
    "DISPATCH",
    "DTYPES",
    "GATE",
    "GEMM0",
    "GEMM1",
    "KIND_NAMES",
    "SHARED0",
    "SHARED1",
    "WORKLOAD_NAMES",
    "ExpertKind",
    "Gradients",
    "Hosts",
    "Layout",
    "MoEConfig",
    "Packets",
    "Plan",
    "RouterBounds",
    "RouterKind",
    "Routing",
    "RowRun",
    "RowTile",
    "Task",
    "TiledLayer",
    "Weights",
    "Workload",
    "Write",
    "activation",
    "check_routing",
    "element_dtype",
    "expert_ffn",
    "external_routing",
    "gradient_tolerance",
    "hidden_rows",
    "load_preset",
    "make_packets",
    "make_plan",
    "make_workload",
    "max_rel_error",
    "max_row_blocks",
    "max_tasks",
    "moe_layer",
    "moe_layer_backward",
    "num_row_blocks",
    "preset_names",
    "read_preset",
    "route",
    "router_tolerance",
    "softmax_topk",
    "task_graph",
    "tile_height",
    "tiles_n0",
    "tiles_n1",
    "tolerance",
    "write_conflicts",
]
