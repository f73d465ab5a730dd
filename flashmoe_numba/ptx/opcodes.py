"""What the machine can do, as numbers, and which instruction of PTX is which (sections are those of the PTX ISA 9.1).

A register is a 64-bit slot of its thread, of which a narrow type uses the low bits; a predicate is 0 or 1. Names end in
the width of what is computed; S and U are signed and unsigned, F floating. `a > b` is written as `b < a`, so there is
no code for greater.
"""

from __future__ import annotations

(
    ADD64, SUB64, MUL64, MAD64, NEG64, DIV_S64, DIV_U64, REM_S64, REM_U64, MIN_S64, MAX_S64, MIN_U64, MAX_U64,
    ADD32, SUB32, MUL32, MAD32, DIV_U32, REM_U32, MUL_WIDE_S32, MUL_WIDE_U32, ADD16, DIV_U16,
    AND, OR, XOR, NOT64, AND_PRED, OR_PRED, XOR_PRED, NOT_PRED, SHL64, SHR_S64, SHR_U64, SHL32, SHR_S32, SHR_U32,
    EQ64, NE64, LT_S64, LE_S64, LT_U64, LE_U64, EQ32, NE32, LT_S32, LE_S32, LT_U32, LE_U32, EQ16, NE16, LT_S16, LE_S16,
    EQ_F32, EQU_F32, NE_F32, NEU_F32, LT_F32, LE_F32, LTU_F32, LEU_F32, NAN_F32, NUM_F32,
    EQ_F64, EQU_F64, NE_F64, NEU_F64, LT_F64, LE_F64, LTU_F64, LEU_F64, NAN_F64, NUM_F64, SELECT,
    ADD_F32, SUB_F32, MUL_F32, FMA_F32, FMA_DOWN_F32, NEG_F32, ABS_F32, MIN_F32, MAX_F32, DIV_F32, RCP_F32, SQRT_F32,
    EX2_F32, SATURATE_F32,
    ADD_F64, SUB_F64, MUL_F64, FMA_F64, NEG_F64, ABS_F64, MIN_F64, MAX_F64, DIV_F64, RCP_F64, SQRT_F64,
    MOVE, PACK64, ZERO_EXTEND32, SIGN_EXTEND32, ZERO_EXTEND16, F32_OF_F16, F16_OF_F32, BF16_OF_F32,
    TO_SHARED, FROM_SHARED,
    LOAD16, LOAD32, LOAD64, LOAD128, STORE16, STORE32, STORE64, STORE128,
    LOAD_WORD, STORE_WORD, ATOMIC_ADD, ATOMIC_CAS, BARRIER,
    MBARRIER_INIT, MBARRIER_INVALIDATE, MBARRIER_ARRIVE, MBARRIER_TRY_WAIT,
    FENCE_ASYNC, FENCE_MBARRIER_INIT, FENCE_TENSOR_MAP,
    COPY_BOX, WGMMA_FENCE, WGMMA, WGMMA_COMMIT, WGMMA_WAIT, READS_SUM, WRITES_SUM,
    BRANCH, BRANCH_IF, BRANCH_UNLESS, RETURN, SLEEP, TIMER,
) = range(142)  # fmt: skip
NAMES = {code: name for name, code in dict(globals()).items() if name.isupper()}

GENERIC, GLOBAL, SHARED = range(3)  # state spaces
SCOPES = {"cta": 0, "gpu": 1, "sys": 2}
NO_ACQUIRE, NO_RELEASE = 4, 8  # what an atomic access lacks, beside its scope
ORDERS = {"relaxed": NO_ACQUIRE | NO_RELEASE, "acquire": NO_RELEASE, "release": NO_ACQUIRE, "acq_rel": 0}
F16, BF16, TF32 = range(3)  # kinds of wgmma's operands
KINDS = {"f32.f16.f16": F16, "f32.bf16.bf16": BF16, "f32.tf32.tf32": TF32}

# Instructions whose operands are a target and up to three values, by name without the type of bits alone.
PLAIN = {
    "add.s64": ADD64, "add.u64": ADD64, "sub.s64": SUB64, "mul.lo.s64": MUL64, "mad.lo.s64": MAD64, "neg.s64": NEG64,
    "div.s64": DIV_S64, "div.u64": DIV_U64, "rem.s64": REM_S64, "rem.u64": REM_U64,
    "min.s64": MIN_S64, "max.s64": MAX_S64, "min.u64": MIN_U64, "max.u64": MAX_U64,
    "add.s32": ADD32, "add.u32": ADD32, "sub.s32": SUB32, "mul.lo.s32": MUL32, "mul.lo.u32": MUL32,
    "mad.lo.s32": MAD32, "mad.lo.u32": MAD32, "div.u32": DIV_U32, "rem.u32": REM_U32,
    "mul.wide.s32": MUL_WIDE_S32, "mul.wide.u32": MUL_WIDE_U32, "add.s16": ADD16, "div.u16": DIV_U16,
    "and.b64": AND, "and.b32": AND, "and.b16": AND, "or.b64": OR, "or.b32": OR, "xor.b64": XOR, "xor.b32": XOR,
    "not.b64": NOT64,
    "and.pred": AND_PRED, "or.pred": OR_PRED, "xor.pred": XOR_PRED, "not.pred": NOT_PRED,
    "shl.b64": SHL64, "shr.s64": SHR_S64, "shr.u64": SHR_U64, "shl.b32": SHL32, "shr.s32": SHR_S32, "shr.u32": SHR_U32,
    "add.f32": ADD_F32, "sub.f32": SUB_F32, "mul.f32": MUL_F32, "fma.rn.f32": FMA_F32, "fma.rm.f32": FMA_DOWN_F32,
    "neg.f32": NEG_F32, "abs.f32": ABS_F32, "min.f32": MIN_F32, "max.f32": MAX_F32,
    "div.rn.f32": DIV_F32, "rcp.rn.f32": RCP_F32,
    "sqrt.rn.f32": SQRT_F32, "sqrt.rn.f64": SQRT_F64,
    "ex2.approx.ftz.f32": EX2_F32, "cvt.sat.f32.f32": SATURATE_F32,
    "add.f64": ADD_F64, "add.rn.f64": ADD_F64, "sub.f64": SUB_F64, "mul.f64": MUL_F64, "fma.rn.f64": FMA_F64,
    "neg.f64": NEG_F64, "abs.f64": ABS_F64, "min.f64": MIN_F64, "max.f64": MAX_F64,
    "div.rn.f64": DIV_F64, "rcp.rn.f64": RCP_F64,
    "cvt.u32.u64": ZERO_EXTEND32, "cvt.u64.u32": ZERO_EXTEND32, "cvt.s64.s32": SIGN_EXTEND32,
    "cvt.u16.u32": ZERO_EXTEND16, "cvt.u16.u64": ZERO_EXTEND16,
    "cvt.u64.u16": ZERO_EXTEND16, "cvt.u32.u16": ZERO_EXTEND16, "cvt.f32.f16": F32_OF_F16,
    "cvt.rn.f16.f32": F16_OF_F32, "cvt.rn.bf16.f32": BF16_OF_F32,
    "cvta.to.global.u64": MOVE, "cvta.to.shared.u64": TO_SHARED, "cvta.shared.u64": FROM_SHARED,
    "mov.b64": MOVE, "mov.u64": MOVE, "mov.f64": MOVE, "mov.b32": MOVE, "mov.u32": MOVE, "mov.f32": MOVE,
    "mov.u16": MOVE, "mov.b16": MOVE, "mov.pred": MOVE,
}  # fmt: skip

# Comparisons by operator and type: (code, are the operands exchanged).
COMPARISONS = {
    **{("eq", kind): (EQ64, False) for kind in ("b64", "s64", "u64")},
    **{("ne", kind): (NE64, False) for kind in ("b64", "s64", "u64")},
    **{("eq", kind): (EQ32, False) for kind in ("b32", "s32", "u32")},
    **{("ne", kind): (NE32, False) for kind in ("b32", "s32", "u32")},
    **{("eq", kind): (EQ16, False) for kind in ("b16", "s16", "u16")},
    **{("ne", kind): (NE16, False) for kind in ("b16", "s16", "u16")},
    **{
        (operator, kind): (code, operator[0] == "g")
        for kind, less, at_most in (("s64", LT_S64, LE_S64), ("u64", LT_U64, LE_U64), ("s32", LT_S32, LE_S32),
                                    ("u32", LT_U32, LE_U32), ("s16", LT_S16, LE_S16),
                                    ("f32", LT_F32, LE_F32), ("f64", LT_F64, LE_F64))
        for operator, code in (("lt", less), ("gt", less), ("le", at_most), ("ge", at_most))
    },
    **{
        (operator, kind): (code, operator[0] == "g")
        for kind, less, at_most in (("f32", LTU_F32, LEU_F32), ("f64", LTU_F64, LEU_F64))
        for operator, code in (("ltu", less), ("gtu", less), ("leu", at_most), ("geu", at_most))
    },
    ("equ", "f32"): (EQU_F32, False), ("equ", "f64"): (EQU_F64, False),
    ("ne", "f32"): (NE_F32, False), ("ne", "f64"): (NE_F64, False),
    ("neu", "f32"): (NEU_F32, False), ("neu", "f64"): (NEU_F64, False),
    ("eq", "f32"): (EQ_F32, False), ("nan", "f32"): (NAN_F32, False), ("num", "f32"): (NUM_F32, False),
    ("eq", "f64"): (EQ_F64, False), ("nan", "f64"): (NAN_F64, False), ("num", "f64"): (NUM_F64, False),
}  # fmt: skip
