"""What each instruction makes of its operands, against exact arithmetic (exact.py)."""

import itertools
import random
import re

import exact
import numpy as np
import pytest
from ptx_kernels import Bench, text_of

from flashmoe_numba.ptx import opcodes as op
from flashmoe_numba.ptx.listing import parse
from flashmoe_numba.ptx.program import load

REGISTERS = {"pred": "p", "b16": "rs", "b32": "r", "f32": "f", "b64": "rd", "f64": "fd"}
ROWS = 640  # of operands, one a thread
EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 1000003]
FLOAT_EDGES = [0.0, 1.0, 1.5, 3.0, 1 / 3, 0.1, 16777215.0, 1e-3, 1e30, 1e-30, np.inf, np.nan]


def register_type(kind):
    """How a register is declared that holds u32, s64 and so on."""
    return kind if kind == "pred" or (kind[0] == "f" and kind != "f16") else f"b{kind[1:]}"


def integers(bits):
    """Numbers of so many bits: small ones, large ones, and some between."""
    chance = random.Random(bits)
    odd = [(1 << bits - 1) - 1, 1 << bits - 1, (1 << bits - 1) + 1, (1 << bits) // 3, (1 << bits) // 3 * 2]
    return [*EDGES, *odd, *(-e % (1 << bits) for e in EDGES), *(chance.getrandbits(bits) for _ in range(8))]


def floats(kind):
    """Bits of numbers of either sign: plain, subnormal, at the ends, infinite, NaN, and neighbours of others."""
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]
    limits, chance = np.finfo(dtype), random.Random(kind)
    ends = [
        limits.max,
        limits.tiny,
        limits.smallest_subnormal,
        limits.tiny - limits.smallest_subnormal,
        5.960464e-8,
        65519.0,
    ]
    anywhere = [chance.uniform(1, 2) * 2.0 ** chance.randint(-14, 15) for _ in range(8)]
    with np.errstate(all="ignore"):
        values = np.array([*FLOAT_EDGES, *ends, *anywhere, *(2.0**-k for k in (14, 24, 25, 133))], dtype)
        values = np.concatenate([values, np.nextafter(values[:4], dtype(9)), np.nextafter(values[12:13], dtype(0))])
        return np.concatenate([values, -values]).view(f"u{dtype().itemsize}").tolist()


def some_of(kind):
    return [0, 1] if kind == "pred" else floats(kind) if kind[0] == "f" else integers(int(kind[1:]))


def rows_of(kinds):
    """ROWS rows of operands' bits: all pairs and so on if these are few, else some."""
    chance = random.Random(str(kinds))
    lists = [some_of(kind) for kind in kinds]
    everything = list(itertools.product(*lists)) if len(kinds) < 3 else []
    if 0 < len(everything) <= ROWS:
        return [everything[i % len(everything)] for i in range(ROWS)]
    if everything:
        return chance.sample(everything, ROWS)
    rows = [tuple(chance.choice(values) for values in lists) for _ in range(ROWS)]
    if kinds[0] in exact.FLOATS and kinds[0] == kinds[-1]:  # a * 1 - a and a * -1 + a are exact zeros
        size, lists[1] = int(kinds[0][1:]), [bits_of(exact.FLOATS[kinds[0]](sign), kinds[0]) for sign in (1, -1)]
        rows[:64] = [(a, one, a ^ (1 - i) << size - 1) for a in lists[0][:32] for i, one in enumerate(lists[1])]
    return rows


def moved(verb, kind, register, address):
    """Between memory, where each operand has 8 bytes, and a register."""
    if kind == "pred":
        number = "selp.u64 %rd30, 1, 0, {r}; st.global.u64 {a}, %rd30;"
        return (number if verb == "st" else "ld.global.u64 %rd30, {a}; setp.ne.s64 {r}, %rd30, 0;").format(
            r=register, a=address
        )
    values = f"{register}, {address}" if verb == "ld" else f"{address}, {register}"
    return f"{verb}.global.{register_type(kind)} {values};"


def results(instruction, kinds, result, rows):
    """Bits that one instruction makes of each row; `instruction` has {d}, {a}, {b} and {c} for registers."""
    bench = Bench()
    operands = np.zeros((ROWS, 4), np.uint64)
    operands[:, : len(kinds)] = np.array(rows, np.uint64)
    given = bench.array(4 * ROWS, np.uint64, values=operands.reshape(-1))
    made = bench.array(ROWS, np.uint64, values=0)
    names = [f"%{REGISTERS[register_type(kind)]}{20 + i}" for i, kind in enumerate([*kinds, result])]
    body = "shl.b64 %rd10, %rd4, 5; add.s64 %rd10, %rd10, %rd0; shl.b64 %rd11, %rd4, 3; add.s64 %rd11, %rd11, %rd1;\n"
    body += "".join(moved("ld", kind, names[i], f"[%rd10+{8 * i}]") for i, kind in enumerate(kinds))
    body += "\n" + instruction.format(d=names[-1], **dict(zip("abc", names, strict=False))) + ";\n"
    body += moved("st", result, names[-1], "[%rd11]")
    bench.run(body, given, made, blocks=5, threads=128)
    return [int(bits) for bits in made]


def as_float(bits, kind):
    size = int(kind[1:]) // 8
    return np.array(bits, f"u{size}").view(f"f{size}")[()]


def bits_of(value, kind):
    if kind in exact.FLOATS or kind == "f16":
        return int(np.array(value).view(f"u{value.itemsize}"))
    return int(value) & (1 << exact.width(kind)) - 1


def is_same(found, wanted, kind):
    """NaNs of any bits are the same."""
    if kind in exact.FLOATS or kind == "f16":
        return found == wanted or (np.isnan(as_float(found, kind)) and np.isnan(as_float(wanted, kind)))
    return found == wanted


def assert_means(instruction, kinds, result, meaning, allowed=lambda *row: True):
    """An instruction makes of all rows what `meaning` says, which takes bits and returns bits."""
    rows = [row if allowed(*row) else (1,) * len(kinds) for row in rows_of(kinds)]
    for row, found in zip(rows, results(instruction, kinds, result, rows), strict=True):
        wanted = meaning(*row)
        assert is_same(found, wanted, result), f"{instruction} of {[hex(v) for v in row]}: {found:#x}, not {wanted:#x}"


def call_of(name, num_operands):
    return f"{name} {{d}}, " + ", ".join(f"{{{letter}}}" for letter in "abc"[:num_operands])


# all instructions of one operation and one type

PLAIN = sorted(name for name in op.PLAIN if not name.startswith("cvt"))
UNARY = ("neg", "not", "abs", "rcp", "sqrt", "mov", "ex2")


@pytest.mark.parametrize("name", [n for n in PLAIN if n.split(".")[0] != "ex2"])
def test_an_instruction_of_one_type(name):
    stem, kind = name.rsplit(".", 1)
    result = f"b{2 * int(kind[1:])}" if "wide" in stem else kind
    num_operands = 1 if stem.split(".")[0] in UNARY else 3 if stem[:3] in ("mad", "fma") else 2
    kinds = [kind] * num_operands
    if stem in ("shl", "shr"):
        kinds[1] = "u32"
    if kind in exact.FLOATS:
        function = exact.float_meaning(stem, kind)
        meaning = lambda *row: bits_of(function(*(as_float(bits, kind) for bits in row)), kind)  # noqa: E731
    else:
        function = exact.INTEGERS[stem]
        meaning = lambda *row: bits_of(function(*map(exact.number, row, kinds)), result)  # noqa: E731
    divides = stem in ("div", "rem")
    assert_means(call_of(name, num_operands), kinds, result, meaning, lambda *row: not divides or row[1] != 0)


@pytest.mark.parametrize(("operation", "kind"), sorted(op.COMPARISONS))
def test_a_comparison_alone_and_with_another_predicate(operation, kind):
    read = as_float if kind in exact.FLOATS else exact.number

    def meaning(a, b):
        return int(exact.compared(operation, read(a, kind), read(b, kind)))

    assert_means(f"setp.{operation}.{kind} {{d}}, {{a}}, {{b}}", [kind] * 2, "pred", meaning)
    both = f"setp.{operation}.and.{kind} {{d}}, {{a}}, {{b}}, {{c}}"
    assert_means(both, [kind, kind, "pred"], "pred", lambda a, b, c: meaning(a, b) & c)


# conversions (9.7.9.21)


@pytest.mark.parametrize("name", sorted(n for n in op.PLAIN if re.fullmatch(r"cvt\.[us]\d+\.[us]\d+", n)))
def test_integers_are_extended_and_cut(name):
    _, result, kind = name.split(".")
    assert_means(call_of(name, 1), [kind], result, lambda a: bits_of(exact.number(a, kind), result))


def test_floating_point_numbers_are_rounded_to_16_bits_and_back():
    assert_means("cvt.f32.f16 {d}, {a}", ["f16"], "f32", lambda a: bits_of(np.float32(as_float(a, "f16")), "f32"))
    to_half = lambda a: bits_of(exact.to_half(as_float(a, "f32")), "f16")  # noqa: E731
    assert_means("cvt.rn.f16.f32 {d}, {a}", ["f32"], "f16", to_half)
    to_bfloat = lambda a: exact.to_bfloat_bits(as_float(a, "f32"))  # noqa: E731
    not_a_number = lambda a: not np.isnan(as_float(a, "f32"))  # noqa: E731
    assert_means("cvt.rn.bf16.f32 {d}, {a}", ["f32"], "b16", to_bfloat, not_a_number)


def test_ties_of_16_bits_go_to_even():
    ties = {1 + 2**-11: 1, 1 + 3 * 2**-11: 1 + 2**-9, 65519.996: 65504, 65520: np.inf, 2**-25: 0, 1.5 * 2**-24: 2**-23}
    rows = [(bits_of(np.float32(list(ties)[i % len(ties)]), "f32"),) for i in range(ROWS)]
    found = results("cvt.rn.f16.f32 {d}, {a}", ["f32"], "f16", rows)
    assert [float(as_float(bits, "f16")) for bits in found[: len(ties)]] == list(ties.values())
    rows = [(bits,) for bits in (0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000, 0x7FFFFFFF)] * (ROWS // 5)
    assert results("cvt.rn.bf16.f32 {d}, {a}", ["f32"], "b16", rows)[:5] == [0x3F80, 0x3F82, 0x7F80, 0, 0x7FFF]


def test_a_number_is_saturated():
    wanted = lambda a: bits_of(exact.saturated(as_float(a, "f32")), "f32")  # noqa: E731
    assert_means("cvt.sat.f32.f32 {d}, {a}", ["f32"], "f32", wanted)


# the rest


def test_a_power_of_two_is_near_and_not_always_the_nearest():
    """Within 2 units of the last place, and what 9.7.3.21 says of infinities, zeros and subnormal numbers."""
    chance = random.Random(1)
    values = np.array([chance.uniform(-127, 128) for _ in range(ROWS)], np.float32)
    values[:9] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 2.0, 1000.0, -127.5]
    bits = results("ex2.approx.ftz.f32 {d}, {a}", ["f32"], "f32", [(int(b),) for b in values.view(np.uint32)])
    found = np.array(bits, np.uint32).view(np.float32)
    assert (
        found[:4].tolist() == [1, 1, np.inf, 0]
        and np.isnan(found[4])
        and found[5] == 1
        and found[7:9].tolist() == [np.inf, 0]
    )
    normal = slice(9, None)
    wanted = np.exp2(values[normal].astype(np.float64))
    off = np.abs(found[normal] - wanted) / np.spacing(wanted.astype(np.float32))
    normal_result = wanted >= 2.0**-126
    assert off[normal_result].max() <= 2.5  # half a unit of the nearest, and 2 from there
    assert (off[normal_result] > 0.5).any()
    assert not found[normal][~normal_result].any()


def test_a_choice_takes_the_first_where_the_predicate_holds():
    for kind in ("b32", "f32", "b64", "f64"):
        assert_means(
            f"selp.{kind} {{d}}, {{a}}, {{b}}, {{c}}", [kind, kind, "pred"], kind, lambda a, b, c: a if c else b
        )


@pytest.mark.parametrize(("first", "length"), [(1, 63), (0, 5), (60, 8), (0, 64), (64, 3), (7, 0)])
def test_bits_are_put_in_the_place_of_others(first, length):
    place = ((1 << length) - 1) << first & (1 << 64) - 1
    instruction = f"bfi.b64 {{d}}, {{a}}, {{b}}, {first}, {length}"
    assert_means(instruction, ["b64", "b64"], "b64", lambda a, b: a << first & place | b & ~place)


def test_halves_are_packed_and_taken_apart():
    assert_means("mov.b64 {d}, {{{a}, {b}}}", ["b32", "b32"], "b64", lambda a, b: a | b << 32)
    assert_means("mov.b64 {{{d}, _}}, {a}", ["b64"], "b32", lambda a: a & (1 << 32) - 1)
    assert_means("mov.b64 {{_, {d}}}, {a}", ["b64"], "b32", lambda a: a >> 32)
    assert_means("mov.b32 {d}, {{{a}, {b}}}", ["b16", "b16"], "b32", lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16)
    assert_means("mov.b32 {{{d}, _}}, {a}", ["b32"], "b16", lambda a: a & (1 << 16) - 1)
    assert_means("mov.b32 {{_, {d}}}, {a}", ["b32"], "b16", lambda a: a >> 16)


def test_a_shared_address_is_generic_and_back():
    there_and_back = "cvta.shared.u64 %rd31, {a}; cvta.to.shared.u64 {d}, %rd31"
    assert_means(there_and_back, ["u64"], "b64", lambda a: a)


def test_every_code_of_arithmetic_is_made_by_some_instruction():
    """So nothing that the interpreter can do is missing above."""
    made = set(op.PLAIN.values()) | {code for code, _ in op.COMPARISONS.values()}
    others = {op.SELECT, op.PACK64}
    assert made | others == set(range(op.LOAD16))


def test_narrow_loads_extend_as_their_type_says():
    bench = Bench()
    given, made = bench.array(4, np.int32, values=[-5, 7, -1, 3]), bench.array(8, values=0)
    bench.run(
        "ld.global.s32 %r10, [%rd0]; cvt.s64.s32 %rd10, %r10; st.global.u64 [%rd1], %rd10;"
        "ld.global.u32 %r11, [%rd0]; cvt.u64.u32 %rd11, %r11; st.global.u64 [%rd1+8], %rd11;"
        "ld.global.u16 %rs10, [%rd0]; cvt.u64.u16 %rd12, %rs10; st.global.u64 [%rd1+16], %rd12;"
        "ld.global.s32 %rd13, [%rd0]; st.global.u64 [%rd1+48], %rd13;"
        "ld.global.u32 %rd14, [%rd0]; st.global.u64 [%rd1+56], %rd14;"
        "ld.global.v4.b32 {%r12, %r13, %r14, %r15}, [%rd0]; st.global.v4.b32 [%rd1+32], {%r12, %r13, %r14, %r15};",
        given, made, threads=1,
    )  # fmt: skip
    assert made[:3].tolist() == [-5, (1 << 32) - 5, (1 << 16) - 5]
    assert made[6:].tolist() == [-5, (1 << 32) - 5]  # into wider registers
    assert made[4:6].view(np.int32).tolist() == [-5, 7, -1, 3]


def test_an_instruction_that_is_not_known_is_quoted():
    with pytest.raises(ValueError, match=r"does not know: sin\.approx\.f32 %f1, %f2"):
        load(text_of("sin.approx.f32 %f1, %f2;"))


def test_an_instruction_knows_its_line():
    text = text_of("// a comment\nA:\nB: add.s64 %rd10, %rd0, 1; // more\n\n{\n@%p0 bra\n A;\n}")
    found = {i.text: i.line for i in parse(text).instructions}
    lines = text.split("\n")
    for begin, line in found.items():
        assert begin.split()[0] in lines[line - 1]
    assert lines[found["@%p0 bra A"] - 1] == "@%p0 bra" and "cvt.u64.u32 %rd4, %r3" in found
