"""Linked PTX in the cache folder, with a linker that is none: tests/compile links real kernels."""

import sys
from pathlib import Path

import pytest

from flashmoe_numba.build.build import build
from flashmoe_numba.build.variants import Variant
from flashmoe_numba.ptx import linked

VARIANT = Variant(dtype="float32", architecture="sm_80", tensor_cores=False)
TEXT = ".version 9.1\n.visible .entry k()\n{\n\tret;\n}\n\n"


@pytest.fixture
def links(monkeypatch):
    """The variants that were linked."""
    made = []
    monkeypatch.setattr(linked, "_link", lambda variant: made.append(variant) or TEXT.encode())
    return made


def test_the_second_time_nothing_is_linked(links, tmp_path):
    folder = tmp_path / "new"
    assert linked.linked_ptx(VARIANT, folder) == TEXT
    assert linked.linked_ptx(VARIANT, folder) == TEXT
    assert links == [VARIANT]


def test_the_kept_file_is_ptx_whose_lines_are_those_of_the_text(links, tmp_path):
    linked.linked_ptx(VARIANT, tmp_path)
    (file,) = tmp_path.iterdir()
    *lines, digest = file.read_text().splitlines()
    assert lines == TEXT.splitlines()
    assert digest.startswith("// ")


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_the_last_byte(file):
    file.write_bytes(file.read_bytes()[:-1])


def change_a_letter(file):
    file.write_bytes(file.read_bytes().replace(b"ret", b"net"))


def without_the_digest(file):
    file.write_text(TEXT)


def with_more_behind(file):
    file.write_bytes(file.read_bytes() + bytes(3))


DAMAGES = [
    halve,
    without_the_last_byte,
    change_a_letter,
    without_the_digest,
    with_more_behind,
    Path.unlink,
    lambda file: file.write_bytes(b""),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(links, tmp_path, damage):
    linked.linked_ptx(VARIANT, tmp_path)
    (file,) = tmp_path.iterdir()
    right = file.read_bytes()
    damage(file)
    assert linked.linked_ptx(VARIANT, tmp_path) == TEXT
    assert len(links) == 2
    assert file.read_bytes() == right
    assert list(tmp_path.iterdir()) == [file]


def test_a_text_of_another_variant_is_refused():
    other = Variant(dtype="float16", architecture="sm_80", tensor_cores=False)

    def text(target, name):
        return f".version 9.1\n.target {target}\n{TEXT}// variant {name}\n"

    linked.check_text(TEXT, VARIANT)
    linked.check_text(text("sm_80", VARIANT.name), VARIANT)
    with pytest.raises(ValueError, match="text must be PTX for sm_80, as this layer's kernel, got sm_90a"):
        linked.check_text(text("sm_90a", VARIANT.name), VARIANT)
    with pytest.raises(ValueError, match="text must be this layer's kernel, sm_80-float32-lanes, got sm_80-float16-"):
        linked.check_text(text("sm_80", other.name), VARIANT)


def test_without_numba_cuda_the_error_names_the_extra_that_is_enough(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flashmoe_numba.device.cuda_api", None)
    with pytest.raises(ImportError, match=r"flashmoe-numba\[compile\]"):
        linked.linked_ptx(VARIANT, tmp_path)
    with pytest.raises(ImportError, match=r"flashmoe-numba\[cuda\]"):
        build(VARIANT, tmp_path)


def test_a_linker_that_refuses_leaves_nothing(monkeypatch, tmp_path):
    def refuse(variant):
        raise RuntimeError("ERROR_NVVM_COMPILE")

    monkeypatch.setattr(linked, "_link", refuse)
    with pytest.raises(RuntimeError, match="ERROR_NVVM_COMPILE"):
        linked.linked_ptx(VARIANT, tmp_path)
    assert list(tmp_path.iterdir()) == []
