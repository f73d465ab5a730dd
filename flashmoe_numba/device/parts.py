"""Kernel functions as parts of a kernel: compiled to LLVM's intermediate code, which the kernel's entry takes in.

By itself Numba optimises every function, together with all that it calls, and makes machine code of it. In a kernel
whose innermost loop is eight calls away from its entry that was two thirds of the time that compiling took, and only
the entry's machine code is ever run. So it alone is made, of one module that holds all parts.
"""

from __future__ import annotations

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


class PartCompiler(CompilerBase):
    """Numba's compiler with that one pass in place of its own: `njit(pipeline_class=PartCompiler)`."""

    def define_pipelines(self):
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [(LowerPart if made is NativeLowering else made, name) for made, name in pipeline.passes]
        pipeline.finalize()
        return [pipeline]


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
