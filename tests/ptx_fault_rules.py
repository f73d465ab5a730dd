"""Faults that may be planted in a linked kernel, by rule and at every site.

A rule takes one line of the text and gives what may stand there instead, each with a word for it.
"""

import random
import re
import zlib
from dataclasses import dataclass

SAMPLE = 60  # sites of a rule that fits most lines
SCOPES, PREDICATES = "`.sys` made `.gpu`", "a predicate removed"
DESCRIPTOR_FIELDS = {"address": 0, "leading offset": 16, "stride": 32, "base offset": 49, "swizzle": 62}


# ---- rules: line -> [(what, the line instead)]


def without_barrier(line):
    return [("", "")] if re.match(r"\s*bar\.sync", line) else []


def without_proxy_fence(line):
    return [("", "")] if re.match(r"\s*(@\S+ )?fence\.(proxy|mbarrier_init)", line) else []


def without_release(line):
    return exchanged(line, (r"st\.release", "st.relaxed"), (r"(atom\.\w+)\.acq_rel", r"\1.acquire"))


def without_acquire(line):
    return exchanged(line, (r"ld\.acquire", "ld.relaxed"), (r"(atom\.\w+)\.acq_rel", r"\1.release"))


def of_one_gpu(line):
    return exchanged(line, (r"((?:ld|st|atom)[.\w]*)\.sys\.", r"\1.gpu."))


def other_bytes(line):
    match = re.search(r"expect_tx.*, (\d+);", line)
    if not match:
        return []
    return [(f"{more:+}", line.replace(f"{match[1]};", f"{int(match[1]) + more};")) for more in (16, -16)]


def waits_for_fewer(line):
    match = re.match(r"\s*wgmma\.wait_group.* (\d+);", line)
    return [("", line.replace(f"{match[1]};", f"{int(match[1]) + 1};"))] if match else []


def other_parity(line):
    found = exchanged(line, (r"(try_wait.*), parity;", r"\1, 0;"), what="always 0")
    found += exchanged(line, (r"mov\.u32 parity, 0;", "mov.u32 parity, 1;"), what="begins at 1")
    return found + ([("never flipped", "")] if re.search(r"xor\.b32 parity", line) else [])


def other_descriptor(line):
    match = re.match(r"(or\.b64 a, a, )(\d+);", line)
    if not match:
        return []
    return [(name, f"{match[1]}{int(match[2]) ^ 1 << bit};") for name, bit in DESCRIPTOR_FIELDS.items()]


def without_wgmma_fence(line):
    return [("", "")] if "wgmma.fence" in line else []


def without_commit(line):
    return [("", "")] if "wgmma.commit_group" in line else []


def without_zero(line):
    return [("", "")] if re.match(r"mov\.f32 d\d+, 0f00000000;", line) else []


def without_predicate(line):
    """The lanes that a named predicate leaves out do it as well."""
    return exchanged(line, (r"^@(lead|go|done) (?!bra)", ""))


def other_branch(line):
    return exchanged(line, (r"^(\s*)@!(\S+)(\s+bra\b)", r"\1@\2\3")) or exchanged(
        line, (r"^(\s*)@(\S+)(\s+bra\b)", r"\1@!\2\3")
    )


def other_offset(line):
    """One element further, of a load or store."""
    match = re.match(r"(\s*(?:@\S+ )?(?:ld|st)\.(?:global|shared)[.\w]*?(\d+)\s.*\[%\w+)(?:\+(-?\d+))?(\].*)", line)
    if not match:
        return []
    begin, size, offset, end = match.groups()
    return [("", f"{begin}+{int(offset or 0) + int(size) // 8}{end}")]


def not_atomic(line):
    """A load, an addition and a store, between which another thread may come."""
    match = re.match(r"\s*atom\.add\.acq_rel\.(\w+)\.u64\s+(\S+), (\[\S+\]), (\S+);", line)
    if not match:
        return []
    scope, before, at, more = match.groups()
    parts = f"ld.acquire.{scope}.b64 {before}, {at}; add.s64 sum, {before}, {more}; st.release.{scope}.b64 {at}, sum;"
    return [("", f"{{ .reg .b64 sum; {parts} }}")]


def exchanged(line, *pairs, what=""):
    for pattern, instead in pairs:
        other, count = re.subn(pattern, instead, line, count=1)
        if count:
            return [(what, other)]
    return []


RULES = {
    "a barrier removed": without_barrier,
    "a proxy fence removed": without_proxy_fence,
    "`.release` removed": without_release,
    "`.acquire` removed": without_acquire,
    SCOPES: of_one_gpu,
    "an `expect_tx` count changed": other_bytes,
    "a `wait_group` number raised": waits_for_fewer,
    "a parity wrong": other_parity,
    "a descriptor's bit flipped": other_descriptor,
    "`wgmma.fence` removed": without_wgmma_fence,
    "`commit_group` removed": without_commit,
    "a sum not begun at zero": without_zero,
    PREDICATES: without_predicate,
    "a branch inverted": other_branch,
    "an offset wrong": other_offset,
    "an addition not atomic": not_atomic,
}
SAMPLED = ("a sum not begun at zero", "a branch inverted", "an offset wrong")


# ---- sites


@dataclass(frozen=True)
class Plant:
    """A fault in a variant's text: `line` counts from 1."""

    variant: str
    rule: str
    line: int
    what: str
    instead: str
    was: str

    def text(self, text):
        lines = text.split("\n")
        lines[self.line - 1] = self.instead
        return "\n".join(lines)


def sites(text, rule):
    """All (line, what, what stands there instead) that a rule fits."""
    lines = enumerate(text.split("\n"), 1)
    return [(number, what, other) for number, line in lines for what, other in RULES[rule](line)]


def plants(name, text):
    """Of all rules; a seeded sample of those that fit most lines."""
    lines = text.split("\n")
    for rule in RULES:
        found = sites(text, rule)
        if rule in SAMPLED and len(found) > SAMPLE:
            found = sorted(random.Random(zlib.crc32(f"{name} {rule}".encode())).sample(found, SAMPLE))
        for line, what, other in found:
            yield Plant(variant=name, rule=rule, line=line, what=what, instead=other, was=lines[line - 1].strip())
