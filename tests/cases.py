"""What the tests of the layer share: small layers to run, the comparison with the oracle, and the memory they hold.

The comparison is element by element, by the yardstick of `reference/error_bounds.py`.
"""

import ctypes
import gc
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from flashmoe_numba.kernel.control import RECORD_FIELDS, AbortRecord
from flashmoe_numba.tile_gemm.arithmetic import ARITHMETICS, PAIRED_DTYPE, why_not
from reference import (
    MoEConfig,
    check_routing,
    make_packets,
    max_rel_error,
    moe_layer,
    num_row_blocks,
    tile_height,
    tolerance,
)
from reference.error_bounds import absolute_terms, underflow

DTYPES = ("float32", "float64", "float16", "bfloat16")
TINY = dict(
    num_ranks=2, num_tokens=7, hidden=9, ffn=6, num_experts=4, num_topk=2, gated=True, activation="silu",
    tile_m=4, tile_m_min=2, tile_n=4, token_block=3,
)  # fmt: skip


def record_words(*fields):
    """Indices of fields of the abort record among the control words."""
    return [RECORD_FIELDS.start + AbortRecord._fields.index(field) for field in fields]


def record_word(field):
    return record_words(field)[0]


def tiny_config(**changes):
    """A layer that even the fibers run in a moment; no size is a multiple of its tile."""
    return MoEConfig(**(TINY | changes))


def random_tokens(config, counts=None, seed=0):
    """`[count, hidden]` for each rank, normal numbers in the config's dtype; default: all the tokens there can be."""
    rng = np.random.default_rng(seed)
    counts = [config.num_tokens] * config.num_ranks if counts is None else counts
    return [rng.standard_normal((count, config.hidden)).astype(config.numpy_dtype) for count in counts]


def random_routing(config, counts, seed=0, bias=0.0):
    """(topk_idx, topk_weights) of each rank. `bias` 0 spreads tokens evenly, 50 sends all to the same experts."""
    rng = np.random.default_rng(seed)
    favour = bias * rng.standard_normal(config.num_choices)
    orders = [np.argsort(rng.standard_normal((count, config.num_choices)) + favour, axis=1) for count in counts]
    idx = [order[:, : config.num_topk].astype(np.int64) for order in orders]
    return idx, [rng.uniform(0.1, 1, part.shape) for part in idx]


def with_no_choices(config, routing, seed=0):
    """The same, but some pairs are no choice, as frameworks pad (-1 or num_choices, NaN), and some factors are 0."""
    rng, parts = np.random.default_rng(seed), []
    for idx, factors in zip(*routing, strict=True):
        kind = rng.integers(8, size=idx.shape)
        none = [kind == 0, kind == 1]
        padded = np.select(none, [-1, config.num_choices], idx)
        parts.append((padded, np.select([*none, kind == 2], [np.nan, 7, 0], factors)))
    return [idx for idx, _ in parts], [factors for _, factors in parts]


def usable_arithmetics():
    """Names of those by which bfloat16 can be multiplied on this CPU."""
    return [name for name in ARITHMETICS if why_not(name) == ""]


def arithmetic_setting(config, name):
    """The setting of a layer on CPUs; none where the element type has only one arithmetic."""
    return {"arithmetic": name} if config.dtype == PAIRED_DTYPE else {}


def bits(array):
    """Bit patterns, so that NaN equals NaN and 0.0 does not equal -0.0."""
    return np.ascontiguousarray(array).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])


def assert_same_bits(got, expected, what=""):
    """The same lists of arrays (or arrays), bit for bit."""
    if isinstance(got, np.ndarray):
        got, expected = [got], [expected]
    assert len(got) == len(expected), f"{what}: {len(got)} parts, expected {len(expected)}"
    for part, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: {a.shape} {a.dtype}, expected {b.shape} {b.dtype}"
        differ = np.argwhere(bits(a) != bits(b))
        at = tuple(differ[0]) if len(differ) else ()
        assert len(differ) == 0, (
            f"{what}: {len(differ)} elements differ, first part {part} {at}: {a[at]!r} is not {b[at]!r}"
        )


def assert_equals_oracle(y, x, weights, config, routings, external=False, relative=None):
    """y is the layer's result for `routings` (the kernel's), which follow from x unless they came from outside.

    `relative`: how far off, beside the same layer on absolute values; None: `tolerance(config)`.
    """
    relative = tolerance(config) if relative is None else relative
    topk_idx, topk_weights = [r.topk_idx for r in routings], [r.topk_weights for r in routings]
    if not external:
        for rank, (routing, part) in enumerate(zip(routings, x, strict=True)):
            wrong = check_routing(routing, part, weights, config)
            assert wrong is None, f"{config}, rank {rank}: {wrong}"
    ref = moe_layer(x, weights, config, topk_idx, topk_weights)
    scale = absolute_terms(x, weights, config, topk_idx, topk_weights)
    for rank, (got, expected, terms) in enumerate(zip(y, ref, scale, strict=True)):
        case = f"{config}, rank {rank}, counts {[len(part) for part in x]}"
        assert got.dtype == config.numpy_dtype and got.shape == expected.shape, f"{case}: {got.dtype} {got.shape}"
        got = got.astype(np.float64)
        finite = np.isfinite(expected).all(axis=1)
        assert (np.isfinite(got).all(axis=1) == finite).all(), (
            f"{case}: finite rows {np.isfinite(got).all(axis=1)}, {finite}"
        )
        error, bound = np.abs(got - expected)[finite], relative * terms[finite] + underflow(config)
        if not (error <= bound).all():
            at = np.unravel_index(np.argmax(error - bound), error.shape)
            row = np.flatnonzero(finite)[at[0]]
            raise AssertionError(
                f"{case}: y[{row}, {at[1]}] = {got[row, at[1]]!r}, expected {expected[row, at[1]]!r} +- {bound[at]:.2e}"
            )


def assert_close_to_oracle(y, x, weights, config, routings):
    """The published measure, for layers of ordinary size: `max_rel_error` within `tolerance`."""
    ref = moe_layer(x, weights, config, [r.topk_idx for r in routings], [r.topk_weights for r in routings])
    error = max_rel_error(y, ref)
    assert error <= tolerance(config), f"{config}: max_rel_error {error:.2e} is above tolerance {tolerance(config):.2e}"


def finfo(dtype):
    """numpy.finfo, for bfloat16 too."""
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


class Regions:
    """The segments of a layer that runs in this process, seen from outside by the layout's own offsets.

    Of ranks on several hosts the stages, too, and what each sees of the others.
    """

    def __init__(self, layer):
        self.layer, self.config, self.layout = layer, layer.config, layer._parts.layout
        self.segments = layer._parts.heap.segments

    def rows(self, rank, round):
        """`[num_ranks, num_experts_per_rank, slots, hidden]` of the dispatch (0) or the result region (1)."""
        c, start = self.config, (self.layout.dispatch, self.layout.result)[round]
        data = self.segments[rank][start : start + self.layout.region_elements * c.numpy_dtype.itemsize]
        return data.view(c.numpy_dtype).reshape(c.num_ranks, c.num_experts_per_rank, c.slots, c.hidden)

    def words(self, rank, start, num_words):
        return self.segments[rank][start : start + 8 * num_words].view(np.int64)

    def packet_flags(self, rank, epoch):
        """`[source, expert here]` of a call, by whether its number is odd."""
        words = self.words(rank, self.layout.dispatch_flag, 2 * self.config.num_experts)
        return words.reshape(self.config.num_ranks, -1, 2)[..., epoch % 2]

    def poison(self):
        """NaN wherever rows may lie: a row read before it was written, or one that was never sent, shows."""
        for segment in self.segments:
            segment[: self.layout.dispatch_flag] = 0xFF

    def check(self, x, y, routings, epoch):
        """After one call on poisoned regions: every row, flag and sum is where and what it should be, bit for bit."""
        c, packets = self.config, [make_packets(routing.topk_idx, self.config) for routing in routings]
        for source, (part, packet) in enumerate(zip(x, packets, strict=True)):
            for expert in range(c.num_experts):
                self._check_packet(source, expert, self._rows_sent(part, routings[source]), packet, epoch)
            self._check_combine(source, part, y[source], routings[source], packet)
        self._check_hosts()

    def _check_hosts(self):
        """Nobody wrote into what it sees of ranks on other hosts, but control words, nor staged rows for its own."""
        heap, layout = self.layer._parts.heap, self.layout
        for rank in range(self.config.num_ranks):
            for peer, seen in enumerate(heap.segments_of(rank)):
                if heap.hosts.are_apart(rank, peer):
                    assert not seen[: layout.control].any(), f"rank {rank} wrote at its image of rank {peer}"
                elif layout.staged:
                    for region in (layout.dispatch, layout.result):
                        part = layout.region_elements * self.config.numpy_dtype.itemsize // self.config.num_ranks
                        first = layout.stage + region + peer * part
                        staged = self.segments[rank][first : first + part]
                        assert (staged == 0xFF).all(), f"rank {rank} staged rows for rank {peer}, which it can reach"

    def check_signal(self, words, i, value):
        """At the moment of a release, on poisoned regions: the rows that the word tells of are all there."""
        c, rows = self.config, value & 0xFFFFFFFF
        for rank, segment in enumerate(self.segments):
            offset = words.ctypes.data - segment.ctypes.data
            if offset == self.layout.dispatch_flag:
                source, local = divmod(i // 2, c.num_experts_per_rank)
                self._check_there(self.rows(rank, 0)[source, local, :rows], f"packet of rank {source}, expert {local}")
            if offset == self.layout.result_flag:
                expert, m = divmod(i, self.layout.row_blocks)
                owner, local = divmod(expert, c.num_experts_per_rank)
                sent = int(self.packet_flags(owner, value >> 32)[rank, local]) & 0xFFFFFFFF
                first = m * tile_height(sent, c.tile_m_min, c.tile_m)
                tile = self.rows(rank, 1)[owner, local, first : first + rows]
                self._check_there(tile, f"results for rank {rank} of expert {expert}, row tile {m}")

    def _check_there(self, rows, what):
        missing = (rows.view(np.uint8).reshape(*rows.shape, rows.itemsize) == 0xFF).all(axis=2)
        assert not missing.any(), f"{self.config}: {what}: signalled before elements {np.argwhere(missing).tolist()}"

    def _check_packet(self, source, expert, rows_of_pairs, packet, epoch):
        c, sent = self.config, int(packet.sent[expert])
        owner, local = divmod(expert, c.num_experts_per_rank)
        case = f"{c}, epoch {epoch}, rank {source} to expert {expert}, {sent} rows"
        there, back = self.rows(owner, 0)[source, local], self.rows(source, 1)[owner, local]
        assert_same_bits(there[:sent], rows_of_pairs[packet.pairs(expert)], f"{case}: dispatched rows")
        for name, rows in (("dispatch", there), ("result", back)):
            assert (rows[sent:].view(np.uint8) == 0xFF).all(), f"{case}: {name} region written beyond the packet"
        flag = self.packet_flags(owner, epoch)[source, local]
        assert divmod(int(flag), 1 << 32) == (epoch, sent), f"{case}: flag {int(flag):#x}"
        flags = self.words(source, self.layout.result_flag, self.layout.num_result_flags)
        flags = flags.reshape(c.num_experts, self.layout.row_blocks)[expert].tolist()
        height = tile_height(sent, c.tile_m_min, c.tile_m)
        tiles = num_row_blocks(sent, c.tile_m_min, c.tile_m)
        expected = [(epoch, min(height, sent - m * height)) for m in range(tiles)]
        assert [divmod(word, 1 << 32) for word in flags[:tiles]] == expected, f"{case}: result flags {flags}"
        assert all(word >> 32 < epoch for word in flags[tiles:]), f"{case}: flags {flags} of tiles that do not exist"

    def _rows_sent(self, x, routing):
        """`[num_tokens * num_topk, hidden]`: the row that is sent for each pair."""
        rows = np.repeat(x, self.config.num_topk, axis=0)
        if not self.config.router_kind.weight_input:
            return rows
        return (rows.astype(self.config.accumulator) * routing.topk_weights.reshape(-1, 1)).astype(x.dtype)

    def _check_combine(self, source, x, y, routing, packet):
        """y is the sum of the results in the accumulator's type in the order of j, then the shared one, rounded."""
        c, results, tokens = self.config, self.rows(source, 1), self.layer._ranks[source].tokens
        shared, x = (part.view(c.numpy_dtype).reshape(-1, c.hidden) for part in (tokens.shared_results, x))
        for token, (experts, factors) in enumerate(zip(routing.topk_idx, routing.topk_weights, strict=True)):
            total = np.zeros(c.hidden, c.accumulator)
            terms = []
            for j, (expert, factor) in enumerate(zip(experts.tolist(), factors, strict=True)):
                if packet.slot[token, j] >= 0:
                    factor = factor / factor if c.router_kind.weight_input and factor != 0 else factor
                    terms.append((factor, results[(*divmod(expert, c.num_experts_per_rank), packet.slot[token, j])]))
                elif expert >= c.num_experts and c.zero == "identity":
                    terms.append((factor, x[token]))
            if c.shared_ffn:
                terms.append((tokens.shared_factors[token], shared[token]))
            for factor, row in terms:
                row = np.where((factor != 0) | np.isfinite(row), row, 0)  # 0 times a finite row changes no bit
                with np.errstate(over="ignore", invalid="ignore"):
                    total += factor * row.astype(c.accumulator)
            with np.errstate(over="ignore", invalid="ignore"):
                expected = total.astype(c.numpy_dtype)
            equal = (bits(y[token]) == bits(expected)) | (np.isnan(y[token]) & np.isnan(expected))
            assert equal.all(), f"{c}, rank {source}: y[{token}] = {y[token]}, its results sum to {expected}"


counts_memory = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, to count what is in use"
)


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and later; it sums over all arenas."""

    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),  # bytes in blocks with a mapping of their own
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),  # bytes in all other blocks given out
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


class Memory(NamedTuple):
    """What this process holds. The first two are exact; the resident size moves by whole arenas of the allocators."""

    python_blocks: int
    malloc_bytes: int
    resident_bytes: int


def held_memory():
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Memory(sys.getallocatedblocks(), info.uordblks + info.hblkhd, 4096 * resident_pages)


def assert_kept_nothing(growth, num_calls):
    """`growth` is what `held_memory` went up by in so many calls."""
    growth = Memory(*map(int, growth))
    assert growth.python_blocks < num_calls / 10, f"a Python object kept per 10 calls or more: {growth}"
    assert growth.malloc_bytes < num_calls * 8, f"8 bytes kept per call or more: {growth}"
    assert growth.resident_bytes < num_calls * 1024, f"a page kept per 4 calls or more: {growth}"
