"""Weights in safetensors files, as numpy arrays: bfloat16 is its bits, uint16."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize, serialize

from hosfl.protocol.arrays import Array, bits, dtype_name

# A file's name of a dtype, and numpy's of what holds it here.
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16", "BOOL": "bool"}
STORED |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}


def read_weights(path: Path) -> dict[str, Array]:
    """A file's tensors, by name. Raises OSError, SafetensorError, and ValueError for a dtype that numpy cannot hold."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    found = {}
    for name, stored in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        if stored["dtype"] not in STORED:
            raise ValueError(f"{path}: {name!r} is {stored['dtype']}; numpy can hold {', '.join(STORED)}")
        dtype = np.dtype(STORED[stored["dtype"]]).newbyteorder("<")
        found[name] = np.frombuffer(stored["data"], dtype).reshape(stored["shape"]).copy()
    return found


def as_file(arrays: Mapping[str, Array]) -> bytes:
    """The bytes of a file that holds these, numpy's or torch's."""
    told: Any = {
        name: {"dtype": dtype_name(array), "shape": tuple(array.shape), "data": bytes(bits(array))}
        for name, array in arrays.items()
    }
    try:
        return bytes(serialize(told))
    except SafetensorError as error:
        raise ValueError(f"these weights cannot be written: {error}") from error
