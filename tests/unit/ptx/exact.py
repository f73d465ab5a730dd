"""What instructions of PTX make of numbers, by Python's integers and exact rationals (for test_instructions.py).

Integers are given as bits, and so are results; floating-point numbers are those of NumPy.
"""

import math
import operator
from fractions import Fraction

import numpy as np

FLOATS = {"f32": np.float32, "f64": np.float64}


def width(kind):
    return 1 if kind == "pred" else int(kind[1:])


def number(bits, kind):
    """The integer that bits are as s64, u32 and so on."""
    bits &= (1 << width(kind)) - 1
    return bits - (1 << width(kind)) if kind[0] == "s" and bits >> width(kind) - 1 else bits


def quotient(a, b):
    """Toward zero (PTX says no more than `a / b`; so do C and the hardware)."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shifted_left(a, b):
    return a << b if b < 64 else 0


def shifted_right(a, b):
    """Python's shift repeats the sign, as s32 and s64 do; what is shifted is known to be unsigned otherwise."""
    return a >> min(b, 64)


INTEGERS = {
    "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "mad.lo": lambda a, b, c: a * b + c,
    "mul.wide": operator.mul, "neg": operator.neg, "div": quotient, "rem": lambda a, b: a - b * quotient(a, b),
    "min": min, "max": max, "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert,
    "shl": shifted_left, "shr": shifted_right, "mov": lambda a: a,
}  # fmt: skip


# floating point


def neighbours(value, kind):
    """Numbers about a rational, in order, with what they are exactly; beyond the largest comes infinity."""
    largest = np.finfo(kind).max
    inside = max(min(value, Fraction(float(largest))), -Fraction(float(largest)))
    with np.errstate(all="ignore"):
        near = np.clip(kind(float(inside)), -largest, largest)
        found = [np.nextafter(near, kind(-np.inf)), near, np.nextafter(near, kind(np.inf))]
    beyond = Fraction(2) ** {np.float16: 16, np.float32: 128, np.float64: 1024}[kind]
    return [(n, Fraction(float(n)) if np.isfinite(n) else beyond * int(np.sign(n))) for n in found]


def nearest(value, kind):
    """A rational rounded to nearest even; what rounds to beyond the largest number is infinite (IEEE 754, 4.3.1)."""
    best, _ = min(neighbours(value, kind), key=lambda n: (abs(n[1] - value), is_odd(n[0])))
    return best


def is_odd(value):
    return int(np.array(value).view(f"u{value.itemsize}")) & 1


def below(value, kind):
    """A rational rounded toward minus infinity: the largest number is the last that is not above."""
    found = [n for n, exact in neighbours(value, kind) if exact <= value and n != np.inf]
    return found[-1] if found else kind(-np.inf)


def sum_of_products(a, b, c, kind, rounding=nearest):
    """a * b + c, rounded once. The sign of an exact zero: IEEE 754, 6.3."""
    if not np.isfinite([a, b, c]).all():
        with np.errstate(all="ignore"):
            return c if np.isfinite([a, b]).all() else a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact:
        return with_sign(rounding(exact, kind), exact)
    negative = bool(np.signbit(a)) != bool(np.signbit(b))
    if negative == bool(np.signbit(c)):
        return kind(-0.0 if negative else 0.0)
    return kind(-0.0 if rounding is below else 0.0)


def with_sign(value, exact):
    """What is too small to be a number keeps its sign."""
    return np.copysign(value, type(value)(1 if exact > 0 else -1)) if value == 0 else value


def divided(a, b, kind):
    if not np.isfinite(a) or not np.isfinite(b) or a == 0 or b == 0:
        with np.errstate(all="ignore"):
            return kind(a) / kind(b)
    exact = Fraction(float(a)) / Fraction(float(b))
    return with_sign(nearest(exact, kind), exact)


def root(a, kind):
    """To nearest: by the whole root of a << 1400, with one bit that says whether there is a rest."""
    if not np.isfinite(a) or a <= 0:
        with np.errstate(invalid="ignore"):
            return kind(np.sqrt(a))
    exact = Fraction(float(a)) * 2**1400
    whole = math.isqrt(int(exact))
    return nearest(Fraction(2 * whole + (whole * whole != exact), 2**701), kind)


def smaller(a, b):
    """A NaN loses, and -0 is below +0 (9.7.3.11)."""
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return min(a, b, key=lambda x: (x, not np.signbit(x)))


def larger(a, b):
    """Likewise (9.7.3.12)."""
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return max(a, b, key=lambda x: (x, not np.signbit(x)))


def saturated(a):
    """Into [0, 1], NaN to 0 (9.7.9.21)."""
    return type(a)(0 if not a > 0 else min(a, 1))


def to_half(a):
    return np.float16(a) if not np.isfinite(a) or a == 0 else with_sign(nearest(Fraction(float(a)), np.float16), a)


def to_bfloat_bits(a):
    """bfloat16 numbers are the float32 numbers whose low half is zero; after the largest comes infinity."""
    if not np.isfinite(a):
        return int(np.float32(a).view(np.uint32)) >> 16
    size = abs(Fraction(float(a)))
    low = int(abs(a).view(np.uint32)) >> 16
    exact = [Fraction(2) ** 128 if bits == 0x7F80 else bfloat(bits) for bits in (low, low + 1)]
    up = (size - exact[0], low & 1) > (exact[1] - size, (low + 1) & 1)
    return low + up | bool(np.signbit(a)) << 15


def bfloat(bits):
    return Fraction(float(np.uint32(bits << 16).view(np.float32)))


def float_meaning(stem, kind):
    """The function of an instruction such as fma.rn, on numbers of its kind."""
    kind, one = FLOATS[kind], FLOATS[kind](1)
    return {
        "add": lambda a, b: sum_of_products(a, one, b, kind), "add.rn": lambda a, b: sum_of_products(a, one, b, kind),
        "sub": lambda a, b: sum_of_products(a, one, -b, kind),
        "mul": lambda a, b: sum_of_products(a, b, kind(-0.0 if np.signbit(a) != np.signbit(b) else 0.0), kind),
        "fma.rn": lambda a, b, c: sum_of_products(a, b, c, kind),
        "fma.rm": lambda a, b, c: sum_of_products(a, b, c, kind, below),
        "div.rn": lambda a, b: divided(a, b, kind), "rcp.rn": lambda a: divided(one, a, kind),
        "sqrt.rn": lambda a: root(a, kind),
        "neg": lambda a: np.copysign(a, -np.copysign(one, a)), "abs": lambda a: np.copysign(a, one),
        "min": smaller, "max": larger, "mov": lambda a: a,
    }[stem]  # fmt: skip


# comparisons (9.7.6)

ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def compared(operation, a, b):
    """The names that end in u hold for a NaN, the others do not; num and nan ask for one."""
    either = math.isnan(a) or math.isnan(b)
    if operation in ("num", "nan"):
        return either == (operation == "nan")
    if operation[:2] in ORDERED and operation.endswith("u"):
        return either or ORDERED[operation[:2]](a, b)
    return not either and ORDERED[operation](a, b)
