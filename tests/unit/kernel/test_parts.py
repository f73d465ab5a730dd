"""Kernel functions are parts of a kernel (device/parts.py): machine code is made of its entries alone."""

import itertools
import math

import numpy as np
import pytest
from numba.core.bytecode import FunctionIdentity
from numba.core.codegen import CPUCodeLibrary

from flashmoe_numba.device import jit
from flashmoe_numba.device.compilation import compile_for


@jit
def add(words, i, more):
    words[i] += more


@jit
def add_twice(words, i):
    add(words, i, 1)
    add(words, i + 1, min(words[i], 10))


@jit(inline=True)
def middle(words):
    return words[1:]


@jit(entry=True)
def forwards(words):
    for i in range(words.size - 1):
        add_twice(words, i)


@jit(entry=True)
def backwards(words):
    for i in range(words.size - 2, 0, -1):
        add_twice(middle(words), i - 1)


@pytest.fixture(scope="module")
def optimised(tmp_path_factory):
    """Names of all functions that were optimised by themselves while the two entries were compiled."""
    names, optimise = [], CPUCodeLibrary._optimize_final_module

    def noted(library):
        names.append(library.name)
        optimise(library)

    words = np.zeros(4, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUCodeLibrary, "_optimize_final_module", noted)
        for entry in (forwards, backwards):
            compile_for(entry, (words,), tmp_path_factory.mktemp("cache"))
    return names


def test_entries_that_share_parts_compute_what_their_source_says(optimised):
    words = np.array([3, 40, 0, 7])
    forwards(words)
    assert words.tolist() == [4, 45, 11, 17]
    backwards(words)
    assert words.tolist() == [4, 46, 22, 27]


def test_only_entries_are_optimised_and_made_machine_code_of(optimised):
    assert {"forwards", "backwards"} <= set(optimised)
    assert not {"add", "add_twice"} & set(optimised), "a part was optimised for itself"
    for function in (add, add_twice):
        for made in function.overloads.values():
            engine = made.library.codegen._engine
            assert not engine.is_symbol_defined(made.fndesc.llvm_func_name), f"machine code of {function}"
    for made in forwards.overloads.values():
        assert made.library.codegen._engine.is_symbol_defined(made.fndesc.llvm_func_name)


def test_python_cannot_call_a_part(optimised):
    """Also not for arguments that it was compiled for."""
    for function, arguments in ((add, (0, 1)), (add_twice, (0,)), (middle, ())):
        with pytest.raises(TypeError, match=f"^{function.__name__} is a part of kernels: only kernels can call it"):
            function(np.zeros(4, np.int64), *arguments)
    assert middle.py_func([1, 2]) == [2]


def test_parts_do_not_take_over_that_an_entry_is_always_inlined(optimised):
    for function in (add, add_twice):
        for made in function.overloads.values():
            assert "alwaysinline" not in made.library.get_llvm_str()


def entry_with_a_part(number):
    """An entry that stores `number` twice by way of a part that is too long to be inlined, and has a namesake."""

    @jit
    def store_sum(words, i):
        total = 1.0 * i - i
        for _ in range(2):
            total = math.sin(math.exp(math.cos(math.log1p(math.sinh(math.tan(math.asinh(math.atan(total))))))))
            total = math.sin(math.exp(math.cos(math.log1p(math.sinh(math.tan(math.asinh(math.atan(total))))))))
            total = math.sin(math.exp(math.cos(math.log1p(math.sinh(math.tan(math.asinh(math.atan(total))))))))
        words[i] = number if total < 2 else 0

    @jit(entry=True)
    def store_both(words):
        store_sum(words, 0)
        store_sum(words, words.size - 1)

    return store_both


def test_kernels_that_other_processes_compiled_keep_their_parts(tmp_path, monkeypatch):
    """Numba counts functions, and parts of two kernels from two processes may have one number and so one name."""
    found = []
    for number in (3, 4):
        monkeypatch.setattr(FunctionIdentity, "_unique_ids", itertools.count(10**6))
        entry, words = entry_with_a_part(number), np.zeros(2, np.int64)
        compile_for(entry, (words,), tmp_path / str(number))
        entry(words)
        found.append(words.tolist())
    assert found == [[3, 3], [4, 4]]
