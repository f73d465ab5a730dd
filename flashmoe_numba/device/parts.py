"""Kernel functions as parts of a kernel: compiled to LLVM's intermediate code, which the kernel's entry takes in.

By itself Numba optimises every function, together with all that it calls, and makes machine code of it. In a kernel
whose innermost loop is eight calls away from its entry that was two thirds of the time that compiling took, and only
the entry's machine code is ever run. So it alone is made, of one module that holds all parts.

Parts are the module's own. Numba names them by numbers that count a process's functions and lets modules share what has
one name, so of two kernels that were compiled in different processes and are loaded from the disk in one, one would
call parts of the other.
"""

from __future__ import annotations

from llvmlite.binding import Linkage
from numba import _dynfunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import NativeLowering


class PartLibrary(JITCodeLibrary):
    """A function's code and that of the parts that it calls, to be linked into its callers'."""

    def finalize(self):
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True


class EntryLibrary(JITCodeLibrary):
    """An entry's code with all of its parts."""

    def _optimize_final_module(self):
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = "internal"
        super()._optimize_final_module()


@register_pass(mutates_CFG=True, analysis_only=False)
class LowerEntry(NativeLowering):
    """`NativeLowering` into such a library."""

    _name = "lower_entry"

    def run_pass(self, state):
        state.library = EntryLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return super().run_pass(state)


@register_pass(mutates_CFG=True, analysis_only=False)
class LowerPart(NativeLowering):
    """`NativeLowering` without machine code. Callers find a function by what Python would call, which nothing does."""

    _name = "lower_part"

    def run_pass(self, state):
        state.library = library = PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        lowered, no_address = state.cr, 0
        fndesc, env = lowered.fndesc, lowered.env
        never_called = _dynfunc.make_function(fndesc.lookup_module(), fndesc.qualname, "", no_address, env, (library,))
        state.targetctx.insert_user_function(never_called, fndesc, [library])
        state.reload_init.extend(library._reload_init)
        state.cr = lowered._replace(cfunc=never_called)
        return True


class _KernelCompiler(CompilerBase):
    """Numba's compiler with another pass in the place of `NativeLowering`."""

    lowering: type[NativeLowering]

    def define_pipelines(self):
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [(self.lowering if made is NativeLowering else made, name) for made, name in pipeline.passes]
        pipeline.finalize()
        return [pipeline]


class PartCompiler(_KernelCompiler):
    """Of parts: `njit(pipeline_class=PartCompiler)`."""

    lowering = LowerPart


class EntryCompiler(_KernelCompiler):
    """Of entries."""

    lowering = LowerEntry


class Part(CPUDispatcher):
    """What kernels call and Python may not, which would jump to no address and end the process."""

    def __call__(self, *args, **kwargs):
        rule = "only kernels can call it, because it has no machine code of its own"
        raise TypeError(f"{self.py_func.__qualname__} is a part of kernels: {rule}; from Python call its py_func")


def as_part(made):
    """What `njit` made with that pipeline, so that Python cannot call it; where it made nothing, the function."""
    if isinstance(made, CPUDispatcher):
        made.__class__ = Part  # `njit` takes no class
    return made
