"""A checkpoint as published: a folder with config.json and .safetensors files, with an index if they are several."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np

from reference.arrays import Array

from .tensor_file import NUMPY_NAMES, TensorFile, TensorInfo, array_dtype

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Folder:
    """Tensors of a folder by name, from whichever file has them. A file is opened when it is first asked for.

    Args:
        path: of the folder.

    Attributes:
        config: what is in config.json.
        bytes_read: of tensors, so far.

    Raises:
        FileNotFoundError, NotADirectoryError: what is not there; ValueError: what is there is not such a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            refuse_pickle(self.path)
            rule = "must be the folder of a checkpoint, with config.json and .safetensors files"
            raise (NotADirectoryError if self.path.exists() else FileNotFoundError)(f"path {rule}, got {str(path)!r}")
        self.config = read_json(self.path / "config.json")
        self.bytes_read = 0
        self._files: dict[str, TensorFile] = {}
        self._file_of = self._read_index()

    @property
    def names(self) -> Set[str]:
        """Of all tensors."""
        return self._file_of.keys()

    def where(self, name: str) -> str:
        """The file of a tensor, for messages."""
        return str(self.path / self._file_of[name])

    def info(self, name: str) -> TensorInfo:
        """What its file says of a tensor.

        Raises:
            FileNotFoundError, ValueError: that file is not there, does not have it, or is not whole.
        """
        return self._info(self._open(self._file_of[name]), name)

    def read(self, name: str, piece: int, num_pieces: int) -> Array:
        """One of `num_pieces` equal pieces of a tensor along its first axis, of which that must be a multiple."""
        file = self._open(self._file_of[name])
        info = self._info(file, name)
        shape = (info.shape[0] // num_pieces, *info.shape[1:]) if info.shape else ()
        array = np.empty(shape, array_dtype(NUMPY_NAMES[info.dtype]))
        file.read_into(array, info.begin + piece * array.nbytes)
        self.bytes_read += array.nbytes
        return array

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _info(self, file: TensorFile, name: str) -> TensorInfo:
        if name not in file.tensors:
            raise ValueError(f"{file.path}: must have tensor {name!r}, which {self.path / INDEX} says, and has not")
        return file.tensors[name]

    def _open(self, file_name: str) -> TensorFile:
        if file_name not in self._files:
            path = self.path / file_name
            if not path.is_file():
                raise FileNotFoundError(f"{path}: not there, but {self.path / INDEX} names it: not all was downloaded?")
            self._files[file_name] = TensorFile(path)
        return self._files[file_name]

    def _read_index(self) -> dict[str, str]:
        """The file of every tensor."""
        if (self.path / INDEX).exists():
            return _checked_index(self.path / INDEX)
        single = self._single_file()
        return dict.fromkeys(self._open(single).tensors, single)

    def _single_file(self) -> str:
        names = sorted(path.name for path in self.path.glob("*.safetensors"))
        if SINGLE in names:
            return SINGLE
        if len(names) == 1:
            return names[0]
        for path in sorted(self.path.iterdir()):
            refuse_pickle(path)
        got = f"{', '.join(names[:3])}, ... without an index" if names else "none"
        raise FileNotFoundError(f"{self.path}: must have {SINGLE}, or {INDEX} and what it names, got {got}")


def refuse_pickle(path: Path) -> None:
    """Raise a ValueError if this is a pickle by its name."""
    if path.suffix in PICKLES:
        why = "loading one runs whatever code is in it, and cannot be done piece by piece"
        raise ValueError(f"{path}: is a pickle, which is not read: {why}. Convert it to .safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object.

    Raises:
        FileNotFoundError, IsADirectoryError: there is none; ValueError: it is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not there") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path}: must be a JSON file, got a folder") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, got a {type(value).__name__}")
    return value


def _checked_index(path: Path) -> dict[str, str]:
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: must have a weight_map of tensors and their files, got {str(table)[:80]}")
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: tensor {name!r} must be in a .safetensors file of this folder, got {file!r}")
    return table
