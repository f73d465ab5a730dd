"""A kernel as linked PTX: what the linker's optimiser leaves, before the driver's assembler makes machine code of it.

Its last line, a comment, says which variant it is. Kept in the cache folder beside the cubin, under the same name; the
file has one more line, a digest of all others, by which half a file is told from a whole one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from reference.cache_folder import note_use

from ..build.build import compiled, found_or_made, stem_of
from ..build.variants import BACKWARD, Variant

SUFFIX = ".ptx"
DIGEST, VARIANT = "// sha256 ", "// variant "


def linked_ptx(variant: Variant, folder: Path) -> str:
    """The variant's kernel as PTX, from `folder` if it is there, else compiled (some 15 s) and kept there.

    Raises:
        ImportError: numba-cuda is missing; names the extra.
        RuntimeError: the linker refused, and what it said; or the compiler is switched off.
    """
    path = stem_of(variant, folder).with_suffix(SUFFIX)

    def make() -> Iterator[tuple[Path, bytes]]:
        yield path, _signed(_link(variant))

    return found_or_made(folder, lambda: _read(path), make)


def check_text(text: str, variant: Variant) -> None:
    """Nothing, if this PTX may be that of a variant, by what it says of itself: its target, and the variant's name.

    Raises:
        ValueError: it is another one's; names both.
    """
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.MULTILINE)
    if target is not None and target[1] != variant.architecture:
        raise ValueError(f"text must be PTX for {variant.architecture}, as this layer's kernel, got {target[1]}")
    name = name_in(text)
    if name is not None and name != variant.name:
        raise ValueError(f"text must be this layer's kernel, {variant.name}, got {name}")


def name_in(text: str) -> str | None:
    """Of the variant that this PTX is of, by what it says of itself."""
    name = re.search(rf"^{VARIANT}(\S+)$", text, re.MULTILINE)
    return None if name is None else name[1]


def is_backward(text: str) -> bool:
    """Is it a kernel of gradients? What says nothing of itself is none."""
    return (name_in(text) or "").endswith(BACKWARD)


def _link(variant: Variant) -> bytes:
    codes = compiled(variant, extra="compile")
    from ..device.cuda_api import link_to_ptx

    return link_to_ptx(codes, variant.architecture) + f"{VARIANT}{variant.name}\n".encode()


def _signed(text: bytes) -> bytes:
    return text + f"{DIGEST}{hashlib.sha256(text).hexdigest()}\n".encode()


def _read(path: Path) -> str:
    data = path.read_bytes()
    text = data[: data.rfind(DIGEST.encode())]
    if _signed(text) != data:
        raise ValueError(f"{path} is damaged")
    note_use([path])
    return text.decode()
