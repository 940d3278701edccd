"""The header of `hosfl.log`, which says what the records mean: checks, encoding and decoding.

Formats 1 and 2, little-endian:

    header  "hosfllog"  format u16  zero u16  length u32  crc u32  JSON[length]

The crc is CRC-32 of the 16 bytes before it and the JSON. That is UTF-8 with sorted keys and no spaces; floats are
Python's repr, the shortest decimal that reads back as the same double. Format 2 is of runs whose header has blocks,
which format 1 does not know; all else is the same.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
import sys
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

MAGIC = b"hosfllog"
VERSION, WITH_BLOCKS = 1, 2
HEADER = struct.Struct("<8sHHII")
EXPONENTS = -149, 103  # of a quantum of float32 weights: it is a float32 number, and 2^24 of them still are
DISTRIBUTIONS = ("rademacher", "gaussian")
DTYPES = ("float32", "bfloat16", "float16")
LARGEST = sys.float_info.max
LARGEST_DIRECTIONS = 1 << 20
CUT_SHORT = "it is damaged, or was never finished; then no record followed it, and the file may be deleted"


class LogError(ValueError):
    """A log or a record does not follow the format; nothing was changed by it."""


def check_integer(value: Any, what: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise LogError(f"{what} must be an integer from {low} to {high}, not {reprlib.repr(value)}")
    return int(value)


def check_number(value: Any, what: str) -> float:
    # Compared, not converted: an integer may be larger than any float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        raise LogError(f"{what} must be a finite number, not {reprlib.repr(value)}")
    return float(value)


def check_power_of_two(value: Any, what: str) -> float:
    number = check_number(value, what)
    if number <= 0 or math.frexp(number)[0] != 0.5:
        raise LogError(f"{what} must be a power of two, not {number!r}")
    return number


def check_quantum(value: Any, what: str) -> float:
    """Of a lattice of float32 weights."""
    quantum = check_power_of_two(value, what)
    check_integer(math.frexp(quantum)[1] - 1, f"{what}: the quantum's exponent", *EXPONENTS)
    return quantum


def check_choice(value: Any, what: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise LogError(f"{what} must be {' or '.join(choices)}, not {reprlib.repr(value)}")
    return value


def check_sha256(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise LogError(f"{what} must be 64 hexadecimal digits, not {reprlib.repr(value)}")
    return value


def check_keys(value: Any, expected: Collection[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(expected):
        raise LogError(f"{what} must have exactly {', '.join(sorted(expected))}, not {reprlib.repr(value)}")
    return value


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise LogError(f"{what} must be a string that is not empty, not {reprlib.repr(value)}")
    return value


def _canonical(value: Any, what: str) -> bytes:
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise LogError(f"{what} cannot be written as JSON: {error}") from None


def _parsed(text: bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LogError(f"{what} is no JSON: {error}") from None


def _dict(value: Any, what: str) -> dict[str, Any]:
    """A copy, as JSON returns it: tuples become lists."""
    if not isinstance(value, dict):
        raise LogError(f"{what} must be a dict, not {reprlib.repr(value)}")
    return dict(_parsed(_canonical(value, what), what))


@dataclass(frozen=True)
class Parameter:
    """A trainable tensor of the client half.

    stream: of its noise, below 2^32. dtype: "float32", "bfloat16" or "float16". factor: the scale of directions on this
    tensor, a power of two. tied: its other names in the model. Raises LogError.
    """

    name: str
    stream: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    factor: float = 1.0
    tied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"parameter {_name(self.name, 'a parameter name')!r}"
        if not isinstance(self.shape, (tuple, list)):
            raise LogError(f"{what}: shape must be a tuple, not {reprlib.repr(self.shape)}")
        if not isinstance(self.tied, (tuple, list)):
            raise LogError(f"{what}: tied must be a tuple of names, not {reprlib.repr(self.tied)}")
        shape = tuple(check_integer(size, f"{what}: a size in shape", 0, 2**63 - 1) for size in self.shape)
        if math.prod(shape) >= 2**63:
            raise LogError(f"{what}: no tensor has as many elements as one of shape {reprlib.repr(shape)}")
        set_fields(
            self,
            stream=check_integer(self.stream, f"{what}: stream", 0, 2**32 - 1),
            shape=shape,
            dtype=check_choice(self.dtype, f"{what}: dtype", DTYPES),
            factor=check_power_of_two(self.factor, f"{what}: factor"),
            tied=tuple(_name(name, f"{what}: a name in tied") for name in self.tied),
        )


@dataclass(frozen=True)
class Header:
    """The header of a log: everything that replay needs beside the base weights and the records.

    seed: the run's, below 2^64. directions: P. dist: "rademacher" or "gaussian". mu: the probe's step, 0 for forward
    mode. quantum: of the lattice, a power of two; None off it. rule: the update rule's "name" and its constants.
    pool: {"size": D, "rounds": G} for D directions renewed every G rounds, 0: never; P <= D; None for fresh directions.
    blocks: {"tensors": [...], "directions": n} each: of the P directions the first n move these parameters alone, by
    position, the next ones those of the next block; none: every direction moves all.
    parameters: in the order in which they move. base: SHA-256 of the base weights, hex. settings: the run's
    configuration, any JSON; not read here. Dicts are copied. Raises LogError, which names the field.
    """

    seed: int
    directions: int
    dist: str
    mu: float
    quantum: float | None
    rule: dict[str, Any]
    pool: dict[str, int] | None
    parameters: tuple[Parameter, ...]
    base: str
    settings: dict[str, Any]
    blocks: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        directions = check_integer(self.directions, "directions", 1, LARGEST_DIRECTIONS)
        set_fields(
            self,
            seed=check_integer(self.seed, "seed", 0, 2**64 - 1),
            directions=directions,
            dist=check_choice(self.dist, "dist", DISTRIBUTIONS),
            mu=check_number(self.mu, "mu"),
            quantum=None if self.quantum is None else check_power_of_two(self.quantum, "quantum"),
            rule=_rule(self.rule),
            pool=None if self.pool is None else _pool(self.pool, directions),
            parameters=_parameters(self.parameters),
            base=check_sha256(self.base, "base"),
            settings=_dict(self.settings, "settings"),
            blocks=_blocks(self.blocks, directions),
        )
        if self.mu < 0:
            raise LogError(f"mu must not be negative, not {self.mu!r}")


def set_fields(instance: object, **values: Any) -> None:
    """Set fields of a frozen dataclass, in its __post_init__."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def _rule(value: Any) -> dict[str, Any]:
    rule = _dict(value, "rule")
    _name(rule.get("name"), "rule: name")
    for name, constant in rule.items():
        if isinstance(constant, (dict, list)):
            raise LogError(f"rule: {name} must be a constant, not {reprlib.repr(constant)}")
    return rule


def _pool(value: Any, directions: int) -> dict[str, int]:
    pool = _dict(value, "pool")
    if pool.keys() != {"size", "rounds"}:
        raise LogError(f"pool must have size and rounds, not {reprlib.repr(sorted(pool))}")
    check_integer(pool["size"], "pool: size", directions, 2**32 - 1)
    check_integer(pool["rounds"], "pool: rounds", 0, 2**32 - 1)
    return pool


def _blocks(value: Any, directions: int) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, (tuple, list)):
        raise LogError(f"blocks must be a list, not {reprlib.repr(value)}")
    blocks = tuple(check_keys(_dict(b, "a block"), ("tensors", "directions"), "a block") for b in value)
    for block in blocks:
        check_integer(block["directions"], "a block's directions", 1, directions)
        if not isinstance(block["tensors"], list):
            raise LogError(f"a block's tensors must be a list, not {reprlib.repr(block['tensors'])}")
        for position in block["tensors"]:
            check_integer(position, "a block's tensor", 0, 2**32 - 1)
    return blocks


def _parameters(value: Any) -> tuple[Parameter, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(p, Parameter) for p in value):
        raise LogError(f"parameters must be a tuple of Parameter, not {reprlib.repr(value)}")
    names = [name for p in value for name in (p.name, *p.tied)]
    for what, all_of_them in (("name", names), ("stream", [p.stream for p in value])):
        if len(set(all_of_them)) < len(all_of_them):
            raise LogError(f"parameters: two have the same {what}")
    return tuple(value)


def encode_header(header: Header) -> bytes:
    """The bytes of a log without records."""
    values = {f.name: getattr(header, f.name) for f in fields(header)}
    values["parameters"] = [asdict(parameter) for parameter in header.parameters]
    version = WITH_BLOCKS if header.blocks else VERSION
    if version == VERSION:
        del values["blocks"]
    text = _canonical(values, "the header")
    head = HEADER.pack(MAGIC, version, 0, len(text), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(text, zlib.crc32(head))) + text


def decode_header(data: bytes) -> tuple[Header, int]:
    """(a log's header, its size in bytes). Raises LogError."""
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise LogError(f"starts with {data[: len(MAGIC)]!r}, not {MAGIC!r}: this is no log")
    if len(data) < HEADER.size:
        raise LogError(f"{len(data)} bytes are too few for a header: {CUT_SHORT}")
    _, version, zero, length, crc = HEADER.unpack_from(data)
    if version not in (VERSION, WITH_BLOCKS) or zero != 0:
        raise LogError(f"is of format {version}.{zero}; this code reads {VERSION}.0 and {WITH_BLOCKS}.0")
    end = HEADER.size + length
    if end > len(data):
        raise LogError(f"the header says {length} bytes and {len(data) - HEADER.size} are there: {CUT_SHORT}")
    text = data[HEADER.size : end]
    if zlib.crc32(text, zlib.crc32(data[: HEADER.size - 4])) != crc:
        raise LogError("the header is damaged: its checksum is wrong")
    expected = Header.__dataclass_fields__.keys() - ({"blocks"} if version == VERSION else set())
    values = check_keys(_parsed(text, "the header"), expected, "the header")
    if not isinstance(values["parameters"], list):
        raise LogError("the header: parameters must be a list")
    known = Parameter.__dataclass_fields__
    values["parameters"] = tuple(Parameter(**check_keys(p, known, "a parameter")) for p in values["parameters"])
    header = Header(**values)
    if encode_header(header) != data[:end]:
        raise LogError("the header is not canonical JSON")
    return header, end
