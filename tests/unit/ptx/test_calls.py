"""Functions that a kernel calls: their bodies in the place of each call, with registers and labels of its own."""

import numpy as np
import pytest
from ptx_kernels import Bench, text_of

from flashmoe_numba.ptx.calls import without_calls
from flashmoe_numba.ptx.listing import PtxSyntaxError, parse, statements
from flashmoe_numba.ptx.program import load

# 2 * a + b, but -1 where a is 3
TWICE = """
.func (.param .b64 func_retval0) twice(
	.param .b64 twice_param_0,
	.param .b32 twice_param_1
)
{
	.reg .pred 	%p<2>;
	.reg .b32 	%r<2>;
	.reg .b64 	%rd<5>;

	ld.param.u64 	%rd1, [twice_param_0];
	ld.param.u32 	%r1, [twice_param_1];
	setp.ne.s64 	%p1, %rd1, 3;
	@%p1 bra 	$L__BB0_2;
	mov.u64 	%rd2, -1;
	st.param.b64 	[func_retval0+0], %rd2;
	ret;

$L__BB0_2:
	cvt.u64.u32 	%rd3, %r1;
	add.s64 	%rd4, %rd1, %rd1;
	add.s64 	%rd4, %rd4, %rd3;
	st.param.b64 	[func_retval0+0], %rd4;
	ret;
}
"""
STORE = """
.func store(.param .b64 store_param_0, .param .b64 store_param_1)
{
	.reg .b64 	%rd<3>;
	ld.param.u64 	%rd1, [store_param_0];
	ld.param.u64 	%rd2, [store_param_1];
	st.u64 	[%rd1], %rd2;
	ret;
}
"""
CALL_TWICE = """
{ // callseq 0, 0
.reg .b32 temp_param_reg;
.param .b64 param0;
st.param.b64 	[param0+0], %rd4;
.param .b32 param1;
st.param.b32 	[param1+0], %r0;
.param .b64 retval0;
call.uni (retval0),
twice,
(
param0,
param1
);
ld.param.b64 	%rd10, [retval0+0];
} // callseq 0
"""
CALL_STORE = """
{
.param .b64 param0;
st.param.b64 	[param0+0], %rd11;
.param .b64 param1;
st.param.b64 	[param1+0], %rd10;
call.uni
store,
(
param0,
param1
);
}
"""
ADDRESS = "mad.lo.s64 %rd11, %rd4, 8, %rd0;\n"


def with_functions(body, functions=TWICE + STORE):
    return text_of(body).replace(".visible", f"{functions}.visible", 1)


def run(text, array, threads):
    bench = Bench()
    out = bench.array(len(array), values=array)
    bench.machine.launch(text, "kernel", 1, threads, [out.ctypes.data, 0], 0)
    return out.tolist()


def test_results_come_back_and_arguments_are_left_alone():
    again = "add.s64 %rd4, %rd10, 1;\n" + CALL_TWICE  # of what it gave before
    found = run(with_functions(ADDRESS + CALL_TWICE + again + CALL_STORE), np.zeros(8, np.int64), 8)

    def twice(a, b):
        return -1 if a == 3 else 2 * a + b

    assert found == [twice(twice(i, i) + 1, i) for i in range(8)]


def test_a_function_may_be_said_to_exist_before_it_is_there():
    text = text_of(ADDRESS + CALL_TWICE + CALL_STORE)
    declared = ".func (.param .b64 func_retval0) twice(.param .b64 twice_param_0, .param .b32 twice_param_1);\n"
    text = text.replace(".visible", declared + ".visible", 1) + TWICE + STORE
    assert run(text, np.zeros(2, np.int64), 2) == [0, 3]


def test_lines_are_those_of_the_text():
    text = with_functions(ADDRESS + CALL_TWICE)
    lines, found = text.split("\n"), parse(text).instructions
    for name in ("setp.ne.s64", "cvt.u64.u32", "mad.lo.s64"):
        assert any(i.name == name for i in found)
        assert all(name in lines[i.line - 1] for i in found if i.name == name)


def test_without_functions_nothing_changes():
    text = text_of("bra A;\nA: mov.u64 %rd5, 1;")
    assert list(without_calls(statements(text))) == list(statements(text))


@pytest.mark.parametrize(("body", "functions", "said"), [
    (CALL_TWICE, STORE, "an instruction that the machine does not know: call.uni"),
    (CALL_TWICE.replace("call.uni", "@%p0 call.uni"), TWICE, "an instruction that the machine does not know"),
    (CALL_STORE, TWICE + STORE.replace("st.u64", "call.uni twice, (a, b);\n\tst.u64"), "does not know: call.uni"),
])  # fmt: skip
def test_calls_that_are_not_understood_are_quoted(body, functions, said):
    with pytest.raises(PtxSyntaxError, match=said):
        load(with_functions(body, functions))
