"""The syntax of PTX, as far as kernels use it: statements, scopes, labels, guards, vectors; errors quote their line."""

import pytest

from flashmoe_numba.ptx.listing import PtxSyntaxError, Shared, parse, split
from flashmoe_numba.ptx.program import load

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n\n"
ENTRY = ".visible .entry kernel(\n\t.param .u64 kernel_param_0,\n\t.param .u64 kernel_param_1\n)\n.maxntid 128, 1, 1\n"
FIRST_LINE = (HEAD + ENTRY).count("\n") + 2  # of a body


def module(body):
    return HEAD + ENTRY + "{\n" + body + "\n}\n"


def listing(body):
    return parse(module(body))


def test_an_entry_has_its_name_and_parameters():
    found = listing("ret;")
    assert (found.entry, found.parameters) == ("kernel", ["kernel_param_0", "kernel_param_1"])
    assert [i.name for i in found.instructions] == ["ret"] and found.instructions[0].operands == ()


def test_registers_come_one_by_one_and_by_families():
    found = listing(".reg .b32 %r<3>, x;\n.reg .pred done;")
    assert found.registers == {"%r0": "b32", "%r1": "b32", "%r2": "b32", "x": "b32", "done": "pred"}


def test_shared_variables_have_size_and_alignment():
    text = ".extern .shared .align 1024 .b8 dynamic[];\n.shared .align 8 .b8 room[100];\n"
    found = parse(HEAD + text + ENTRY + "{\n.shared .align 4 .f32 sums[6];\n.shared .align 8 .u64 bar;\nret;\n}")
    assert found.shared == [
        Shared("dynamic", None, 1024),
        Shared("room", 100, 8),
        Shared("sums", 24, 4),
        Shared("bar", 8, 8),
    ]


def test_instructions_know_their_lines_whatever_lies_between():
    body = "// mov.u32 a, b;\n\nmov.u32 x, 1;  // ; {\n  add.s32 x,\n    x, 2; sub.s32 x, x, 1;\n.loc 1 2 3\n\nret;"
    found = listing(".reg .b32 x;\n" + body).instructions
    assert [(i.line - FIRST_LINE, i.text) for i in found] == [
        (3, "mov.u32 x, 1"), (4, "add.s32 x, x, 2"), (5, "sub.s32 x, x, 1"), (8, "ret")
    ]  # fmt: skip


def test_a_guard_and_its_negation():
    plain, guarded, negated = listing(".reg .pred p;\nbra A;\n@p bra A;\n@!p bra A;\nA: ret;").instructions[:3]
    assert [(i.guard, i.negated, i.name) for i in (plain, guarded, negated)] == [
        ("", False, "bra"), ("p", False, "bra"), ("p", True, "bra")
    ]  # fmt: skip


def test_labels_are_those_of_the_next_instruction():
    found = listing("$L__BB0_1:\nA: mov.u32 x, 1;\nB:\nC:\nret;\nEND:")
    assert found.labels == {"$L__BB0_1": 0, "A": 0, "B": 1, "C": 1, "END": 2}
    found = listing(".reg .b32 x;\nmov.u32 x, 1;\nA:\n{ .reg .b32 x; mov.u32 x, 2; }")
    assert found.labels == {"A": 1}


def test_an_inner_name_hides_the_outer_one_until_its_brace():
    found = listing(
        ".reg .b32 x, y;\nmov.u32 x, 1;\n"
        "{\n.reg .pred x;\n@x mov.u32 y, 2;\n{\n.reg .b64 x;\nmov.u64 x, 3;\n}\n@x mov.u32 y, 4;\n}\n"
        "{\n.reg .b32 x;\nmov.u32 x, 5;\n}\nmov.u32 x, 6;"
    )
    one, two, three, four, five, six = found.instructions
    outer, predicate, wide, other = one.operands[0], two.guard, three.operands[0], five.operands[0]
    assert outer == six.operands[0] == "x" and four.guard == predicate
    assert len({outer, predicate, wide, other}) == 4
    assert [found.registers[name] for name in (outer, predicate, wide, other)] == ["b32", "pred", "b64", "b32"]
    assert two.operands[0] == four.operands[0] == "y"


def test_vectors_and_addresses_stay_together():
    text = "{{a,b , c}},\n [p, {x, 1}], [q+16], -3"
    assert split(text) == ["{{a,b , c}}", "[p, {x, 1}]", "[q+16]", "-3"]
    found = listing(
        ".reg .b32 %r<4>;\n.reg .b64 p;\n{\n.reg .b64 p;\nld.global.v4.b32 {%r0, %r1, %r2, %r3}, [p+16];\n}"
    )
    assert found.instructions[0].operands == ("{%r0, %r1, %r2, %r3}", "[p@2+16]")


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (".func (.reg .b32 r) f()", "a directive that is not known here"),
        (".visible .entry another()", "a directive that is not known here"),
        ("@p 5", "no instruction"),
    ],
)
def test_what_is_not_understood_is_quoted(statement, why):
    with pytest.raises(PtxSyntaxError) as error:
        listing(f"ret;\n\n{statement};")
    assert str(error.value) == f"PTX line {FIRST_LINE + 2}: {why}: {statement}"


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("shf.l.wrap.b32 %r0, %r1, %r2, 3", "an instruction that the machine does not know"),
        ("add.s32 %r0, %r1, %q2", "an operand that is not known here, %q2"),
        ("bra NOWHERE", "no label NOWHERE"),
        ("ld.global.u32 %r0, [%rd0+%r1]", "an address that is not known here, [%rd0+%r1]"),
        ("ld.global.v4.b32 {%r0, %r2, %r1, %r3}, [%rd0]", "registers of a vector must be declared side by side"),
        ("setp.hi.u32 %p0, %r0, %r1", "a comparison that the machine does not know"),
    ],
)
def test_what_the_machine_does_not_know_is_quoted(statement, why):
    with pytest.raises(PtxSyntaxError) as error:
        load(module(f".reg .b32 %r<4>; .reg .b64 %rd<2>; .reg .pred %p<2>;\n{statement};"))
    assert str(error.value) == f"PTX line {FIRST_LINE + 1}: {why}: {statement}"
