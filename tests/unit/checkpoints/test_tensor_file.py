"""One .safetensors file: what the format's own library writes is read; what is not whole or not true is refused."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
from checkpoint_files import BFLOAT16, counted, random, write_file
from safetensors.numpy import save_file

from flashmoe_numba.checkpoints.folder import Folder
from flashmoe_numba.checkpoints.tensor_file import TensorFile

E4M3, E5M2, E8M0 = (np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu))


def file_of(path, header, payload=b"", length=None):
    """A file with this header, a dictionary or bytes, and perhaps another length in front of it than its own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)
    return path


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(rng, dtype, *shape):
    """Any bits, as numbers of that type."""
    return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8).view(dtype)[..., 0]


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def open_folder(folder, write, tensors):
    (folder / "config.json").write_text("{}")
    write(folder / "model.safetensors", tensors)
    return Folder(folder)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "uint8", "int64"])
def test_reads_what_the_library_writes(tmp_path, dtype):
    rng = np.random.default_rng(1)
    tensors = {"z": raw(rng, dtype, 5, 3), "a": random(rng, 7), "empty": random(rng, 0, 4), "one": random(rng, 1)[0:1]}
    with open_folder(tmp_path, lambda path, tensors: save_file(tensors, path), tensors) as folder:
        assert folder.names == tensors.keys()
        assert all(same_bits(folder.read(name, 0, 1), wanted) for name, wanted in tensors.items())


@pytest.mark.parametrize("dtype", [BFLOAT16, E4M3, E5M2, E8M0], ids=str)
def test_reads_types_that_numpy_does_not_know(tmp_path, dtype):
    rng = np.random.default_rng(2)
    tensors = {"before": random(rng, 7), "array": raw(rng, dtype, 5, 3), "scalar": raw(rng, dtype)}
    with open_folder(tmp_path, write_file, tensors) as folder:
        assert all(same_bits(folder.read(name, 0, 1), wanted) for name, wanted in tensors.items())
    by_library = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    assert bytes(by_library["array"]["data"]) == tensors["array"].tobytes()


def test_a_piece_is_all_that_is_read_for_it(tmp_path):
    array = random(np.random.default_rng(3), 6, 5, 3)
    with open_folder(tmp_path, write_file, {"before": random(np.random.default_rng(4), 3), "array": array}) as folder:
        folder.info("array")  # opens the file
        pieces, num_bytes = counted(lambda: [folder.read("array", piece, 6) for piece in (4, 0)])
        assert same_bits(pieces[0], array[4:5]) and same_bits(pieces[1], array[:1])
        assert folder.bytes_read == num_bytes == 2 * array[0].nbytes


@pytest.mark.parametrize(
    ("header", "length", "rule"),
    [
        ({}, 2**63, "header of at most"),
        ({}, 101_000_000, "header of at most"),
        (b"{", None, "header in JSON"),
        (b"\xff\xfe\x00", None, "header in JSON"),
        (b"[" * 100_000, None, "header in JSON"),
        (b"[1]", None, "a JSON object as header, got a list"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', None, "'dtype' is there twice"),
        (b'{"a": 1, "a": 2}', None, "'a' is there twice"),
        ({"a": 7}, None, "'a' must have dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, None, "'a' must have dtype, shape and data_offsets"),
        ({"a": entry(dtype="F33")}, None, "'a' must have a dtype of .*got 'F33'"),
        ({"a": entry(dtype=["F32"])}, None, "'a' must have a dtype of"),
        ({"a": entry(shape=(2, -3))}, None, "'a' must have a shape of numbers"),
        ({"a": entry(shape=(2, 1.5))}, None, "'a' must have a shape of numbers"),
        ({"a": entry(shape=(True, 6))}, None, "'a' must have a shape of numbers"),
        ({"a": entry(shape=(2**40, 2**40))}, None, "'a' must have .* bytes for F32"),
        ({"a": entry(shape=(2, 4))}, None, "'a' must have 32 bytes for F32"),
        ({"a": entry(offsets=(0, 24, 48))}, None, "'a' must have 24 bytes"),
        ({"a": entry(offsets=(24, 0))}, None, "'a' must have 24 bytes"),
        ({"a": entry(offsets=(-24, 0))}, None, "'a' must have a data_offsets of numbers"),
        ({"a": entry(), "b": entry()}, None, "'b' must begin at byte"),
        ({"a": entry(), "b": entry(offsets=(12, 36))}, None, "'b' must begin at byte"),
        ({"a": entry(), "b": entry(offsets=(28, 52))}, None, "'b' must end by byte|'b' must begin at byte"),
        ({"a": entry(offsets=(24, 48))}, None, "'a' must (begin|end)"),
        ({"a": entry(offsets=(10**15, 10**15 + 24))}, None, "'a' must end by byte"),
        ({}, None, "must end with its last tensor"),
    ],
)  # fmt: skip
def test_a_header_that_is_not_true_is_refused(tmp_path, header, length, rule):
    path = file_of(tmp_path / "x.safetensors", header, bytes(48), length)
    with pytest.raises(ValueError, match=rule) as error:
        TensorFile(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 20, -100, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, num_bytes):
    path = tmp_path / "x.safetensors"
    write_file(path, {"a": np.arange(100.0), "b": np.arange(50.0)})
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=str(path)):
        TensorFile(path)


def test_garbage_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for seed in range(200):
        path.write_bytes(np.random.default_rng(seed).bytes(200))
        with pytest.raises(ValueError, match="must"):
            TensorFile(path)


def test_a_file_that_becomes_shorter_while_it_is_open_is_an_error(tmp_path):
    with open_folder(tmp_path, write_file, {"a": np.arange(100.0)}) as folder:
        os.truncate(tmp_path / "model.safetensors", 800)
        with pytest.raises(ValueError, match="became shorter"):
            folder.read("a", 0, 1)


def test_what_the_library_refuses_we_refuse(tmp_path):
    """Flip one byte of the header at a time: the library's verdict is ours, where it has one to give."""
    path = tmp_path / "x.safetensors"
    write_file(path, {"a": np.arange(3.0), "b": np.arange(2.0)})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    refused = 0
    for at in range(8, 8 + length):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            safetensors.deserialize(path.read_bytes())
        except Exception:
            refused += 1
            with pytest.raises(ValueError, match="must"):
                TensorFile(path)
    assert refused > 50
