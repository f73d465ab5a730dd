"""Checkpoints for tests, written by hand: the format's library for NumPy does not know all of its types."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int64": "I64"}
TYPES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_file(path, tensors):
    """Arrays by name, as one file."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        header[name] = dict(dtype=TYPES[array.dtype.name], shape=array.shape, data_offsets=(at, at + array.nbytes))
        at += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))


def write_folder(folder, config, tensors, num_files=1):
    """A checkpoint; with several files, tensors are dealt out like cards, so that a layer's lie in all of them."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[i::num_files])
        write_file(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random(rng, *shape, dtype="float32"):
    """Normal numbers of a type by its name."""
    return rng.standard_normal(shape, dtype=np.float32).astype(BFLOAT16 if dtype == "bfloat16" else dtype)


def counted(function):
    """What a function returns, and the bytes that it got from read calls, as the operating system counts them."""
    before = Path("/proc/self/io").read_bytes()
    value = function()
    after = Path("/proc/self/io").read_bytes()
    return value, _read(after) - _read(before) - len(before)


def _read(io):
    return int(io.split(b"rchar: ")[1].split()[0])
