"""What can be wrong with a kernel, by number, and how it is said."""

from __future__ import annotations

(
    NONE, OUT_OF_BOUNDS, MISALIGNED, UNINITIALISED, RACE, SCOPE, WRONG_SPACE, BARRIER_DIVERGED, BARRIER_COUNT, DEADLOCK,
    STEP_LIMIT, MBARRIER_STATE, MBARRIER_BYTES, MBARRIER_UNFENCED, MBARRIER_TOUCHED, MAP_UNFENCED, NO_MAP, COPY_PLACE,
    DIVERGED, DESCRIPTOR, WGMMA_UNFENCED, SUM_TOUCHED, SCALE, TOO_MANY, DIVISION, UNFINISHED,
) = range(26)  # fmt: skip

RULES = {
    OUT_OF_BOUNDS: "an access outside of every allocation",
    MISALIGNED: "an address must be a multiple of the access's bytes",
    UNINITIALISED: "a read of bytes that nobody has written",
    RACE: "two accesses of which none happens before the other",
    SCOPE: "atomic accesses whose scopes do not include each other's threads",
    WRONG_SPACE: "an address of another state space than the instruction says",
    BARRIER_DIVERGED: "all threads of a warp must execute the same barrier instruction",
    BARRIER_COUNT: "threads of a barrier must be a multiple of a warp, and the same for all",
    DEADLOCK: "no thread can go on",
    STEP_LIMIT: "still running after the most steps that were allowed",
    MBARRIER_STATE: "no mbarrier there, one too many, or one in use",
    MBARRIER_BYTES: "a copy brings other bytes than the mbarrier was told to expect",
    MBARRIER_UNFENCED: "an mbarrier's making must be fenced before the asynchronous proxy uses it",
    MBARRIER_TOUCHED: "an ordinary access to an mbarrier",
    MAP_UNFENCED: "a tensor map in global memory must be acquired by a proxy fence before its use",
    NO_MAP: "no tensor map there",
    COPY_PLACE: "a box must begin at a multiple of 128 bytes, inside of shared memory",
    DIVERGED: "all threads of a warp, or of a warpgroup, must execute this instruction together, on the same operands",
    DESCRIPTOR: "a matrix descriptor of a form that the machine does not know, or outside of shared memory",
    WGMMA_UNFENCED: "registers that wgmma sums in were written since the last wgmma.fence",
    SUM_TOUCHED: "registers that wgmma sums in are used before the wait for it",
    SCALE: "wgmma that does not add to its sums",
    TOO_MANY: "more at once than the machine has room for",
    DIVISION: "a division by zero",
    UNFINISHED: "a thread ends while products, or a block while copies, are not waited for",
}


class PtxFault(RuntimeError):
    """A kernel did what it must not; the text says where.

    Args:
        code: of RULES.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
