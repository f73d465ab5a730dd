"""The verbs of the network on GPUs. Of which kind a kernel is, the type of `wire` says: uint64 words for one whose
peers on other hosts are reached by NVSHMEM (build/nvshmem.cu); int64 words for one that has no such peers.

Importing this module registers the overloads.
"""

from __future__ import annotations

from . import vocabulary as verbs
from .cuda_api import element_pointer, intrinsic, ir, make_array, overload, types

_POINTER, _I64 = ir.IntType(8).as_pointer(), ir.IntType(64)


def has_network(wire):
    """Is `wire` of the type that kernels with NVSHMEM have?"""
    return wire.dtype == types.uint64


def _call(builder, name, result, arguments):
    """Call a function of nvshmem.cu."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    return builder.call(function, arguments)


def _start(context, builder, array_type, array):
    """Where an array begins."""
    return builder.bitcast(make_array(array_type)(context, builder, array).data, _POINTER)


@intrinsic
def _put_signal(typing, wire, peer, source_at, target_at, num_bytes, flag_at, word):
    def codegen(context, builder, sig, args):
        wire, peer = _start(context, builder, sig.args[0], args[0]), builder.trunc(args[1], ir.IntType(32))
        _call(builder, "flashmoe_put_signal", ir.VoidType(), [wire, peer, *args[2:]])
        return context.get_dummy_value()

    return types.void(wire, *[types.int64] * 6), codegen


@intrinsic
def _acquire(typing, words, i):
    def codegen(context, builder, sig, args):
        flag = element_pointer(context, builder, sig.args[0], args[0], args[1])
        seen = builder.asm(ir.FunctionType(_I64, [flag.type]), "ld.relaxed.sys.b64 $0, [$1];", "=l,l", [flag], True)
        return _call(builder, "flashmoe_acquire", _I64, [builder.bitcast(flag, _POINTER), seen])

    return words.dtype(words, types.intp), codegen


@intrinsic
def _push_control(typing, wire, remote, every_ns):
    def codegen(context, builder, sig, args):
        wire, remote = (_start(context, builder, sig.args[i], args[i]) for i in (0, 1))
        num_ranks = builder.extract_value(make_array(sig.args[1])(context, builder, args[1]).shape, 0)
        _call(builder, "flashmoe_push_control", ir.VoidType(), [wire, remote, num_ranks, args[2]])
        return context.get_dummy_value()

    return types.void(wire, remote, types.int64), codegen


@overload(verbs.send_put)
def _send_put_meaning(wire, put):
    def with_network(wire, put):
        _put_signal(wire, put.peer, put.source_at, put.target_at, put.num_bytes, put.flag_at, put.word)
        return True

    return with_network if has_network(wire) else lambda wire, put: True


@overload(verbs.acquire_told)
def _acquire_told(wire, words, i):
    if has_network(wire):
        return lambda wire, words, i: _acquire(words, i)
    return lambda wire, words, i: verbs.ld_acquire(words, i)


@overload(verbs.push_control)
def _push_control_meaning(wire, remote, every_ns):
    def with_network(wire, remote, every_ns):
        _push_control(wire, remote, every_ns)

    return with_network if has_network(wire) else lambda wire, remote, every_ns: None
