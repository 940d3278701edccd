"""Weights in safetensors files, as numpy arrays; bfloat16 as its bits, uint16."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize, safe_open

from hosfl.files import regular
from hosfl.protocol.arrays import Array, bits, dtype_name

# By the file's name of a dtype, numpy's name of the one that holds it.
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16", "BOOL": "bool"}
STORED |= {"C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "C64", "F64", "I64")  # the format's own


def read_weights(path: Path) -> dict[str, Array]:
    """Read a file's tensors by name. Raises OSError, SafetensorError, ValueError for a dtype that numpy cannot hold."""
    found = {}
    for name, stored in deserialize(regular(path).read_bytes()):  # type: ignore[no-untyped-call]
        found[name] = (
            np.frombuffer(stored["data"], _in_numpy(stored["dtype"], name, path)).reshape(stored["shape"]).copy()
        )
    return found


def _in_numpy(stored: str, name: str, path: Path) -> np.dtype[Any]:
    """numpy's dtype for a file's. Raises ValueError if there is none."""
    if stored not in STORED:
        raise ValueError(f"{path}: {name!r} is {stored}; numpy can hold {', '.join(STORED)}")
    return np.dtype(STORED[stored]).newbyteorder("<")


class Weights(Mapping[str, Array]):
    """A file's tensors, each read when it is accessed; also bfloat16, which safetensors does not give to numpy.

    Raises OSError, SafetensorError; on access ValueError for a dtype that numpy cannot hold.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(regular(path), "np"):  # checks all offsets in the file
            pass
        self._path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(size))
        self._header.pop("__metadata__", None)
        self._start = 8 + size

    def dtype(self, name: str) -> str:
        """The file's name of a tensor's dtype."""
        return str(self._header[name]["dtype"])

    def __getitem__(self, name: str) -> Array:
        entry = self._header[name]
        dtype = _in_numpy(entry["dtype"], name, self._path)
        begin, end = entry["data_offsets"]
        count, start = (end - begin) // dtype.itemsize, self._start + begin
        return np.fromfile(self._path, dtype, count, offset=start).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def as_file(arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file with these arrays, numpy's or torch's: the same as from `safetensors.torch.save`.

    Raises ValueError for a dtype that numpy cannot hold.
    """
    codes = {("bfloat16" if code == "BF16" else name): code for code, name in STORED.items()}
    for name, array in arrays.items():
        if dtype_name(array) not in codes:
            raise ValueError(f"{name!r} is {dtype_name(array)}, which cannot be written: {', '.join(codes)} can")
    # Widest dtypes first, so that all are aligned.
    order = sorted(arrays, key=lambda name: (-ORDER.index(codes[dtype_name(arrays[name])]), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = bytearray()
    for name in order:
        begin, array = len(data), arrays[name]
        data += bits(array)
        entry = {"dtype": codes[dtype_name(array)], "shape": list(array.shape), "data_offsets": [begin, len(data)]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(data)
