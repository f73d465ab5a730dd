"""The kinds of tasks: those of `reference` and of the kernel's traces under the same numbers, then the simulator's own.

RECEIVE is the OS block's work on a packet. In a backward a kind gives the gradients of what it gives in a forward, and
WEIGHTS, ROUTER_WEIGHTS and SHARED_WEIGHTS those of weights. Only rival schedules have the rest: LAUNCH is the host
starting a kernel, BARRIER a meeting of ranks, SEND a transfer that is no packet (a collective's, a copy engine's),
PERMUTE a kernel that moves rows within a GPU, ELEMENTWISE an activation in a kernel of its own, DENSE work beside the
MoE layer. LOAD and EPILOGUE are the parts of a tile before and after its product, where these run beside other tiles'
products. JOIN holds no slot: it names the moment at which several tasks are done, or something that was held back goes
on.
"""

from __future__ import annotations

from reference.task_kinds import COMBINE as COMBINE
from reference.task_kinds import DISPATCH as DISPATCH
from reference.task_kinds import GATE as GATE
from reference.task_kinds import GEMM0 as GEMM0
from reference.task_kinds import GEMM1 as GEMM1
from reference.task_kinds import RECEIVE as RECEIVE
from reference.task_kinds import ROUTER_WEIGHTS as ROUTER_WEIGHTS
from reference.task_kinds import SHARED0 as SHARED0
from reference.task_kinds import SHARED1 as SHARED1
from reference.task_kinds import SHARED_WEIGHTS as SHARED_WEIGHTS
from reference.task_kinds import WEIGHTS as WEIGHTS
from reference.traces import TRACE_KIND_NAMES

_OWN = ("LAUNCH", "BARRIER", "SEND", "PERMUTE", "ELEMENTWISE", "DENSE", "JOIN", "LOAD", "EPILOGUE")
KIND_NAMES = (*TRACE_KIND_NAMES, *_OWN)
LAUNCH, BARRIER, SEND, PERMUTE, ELEMENTWISE, DENSE, JOIN, LOAD, EPILOGUE = range(len(TRACE_KIND_NAMES), len(KIND_NAMES))
