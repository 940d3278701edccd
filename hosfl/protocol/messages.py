"""The messages of the protocol: one dataclass per message, and its byte format.

A message is a header (round, epoch, client) and arrays. `encode` and `decode` are exact inverses; nothing is pickled,
and `decode` trusts no byte: a message that is not exactly right is refused with a `MessageError` that says why.

    header  "HSF1"  kind u8  arrays u8  epoch u16  client u32  round u32  crc u32     20 bytes, little-endian
    array   dtype u8  dims u8  zero u16  size u32 per dim  elements                   row-major

The crc is CRC-32 of the header before it and of all that follows it: it finds accidents; it is no signature.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from hosfl.protocol.arrays import Array, bits, count, dtype_name, host

MAGIC = b"HSF1"
HEADER = struct.Struct("<4sBBHIII")
CRC = struct.Struct("<I")
ARRAY = struct.Struct("<BBH")
LENGTH = struct.Struct("<I")
DTYPES = {1: "float32", 2: "bfloat16", 3: "float16", 4: "int32", 5: "uint8", 6: "int8"}
CODES = {dtype: code for code, dtype in DTYPES.items()}
NUMPY = {name: np.dtype("uint16" if name == "bfloat16" else name).newbyteorder("<") for name in DTYPES.values()}
LARGEST_MESSAGE = 1 << 32
LONGEST_TEXT = 1000  # bytes of a reason
TOGETHER = 4  # messages in one request at most: an update, a refusal and an invitation are three


AnyMessage = TypeVar("AnyMessage", bound="Message")


class MessageError(ValueError):
    """A message does not follow the protocol; nothing was changed by it."""


def array(category: str, dims: int | None, *dtypes: str, empty: tuple[int, ...] | None = None) -> Any:
    """A dataclass field with an array. category: under which its bytes are counted. dims: their number; None: any.

    empty: the shape, with a zero in it, of an array that is left out.
    """
    dtypes = dtypes or ("float32",)
    metadata = {"category": category, "dims": dims, "dtypes": dtypes}
    if empty is None:
        return field(metadata=metadata)
    return field(metadata=metadata, default_factory=lambda: np.empty(empty, NUMPY[dtypes[0]]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Message:
    """The header that every message has."""

    kind: ClassVar[int]
    direction: ClassVar[str]

    client: int
    round: int
    epoch: int = 0

    @classmethod
    def arrays(cls) -> dict[str, Any]:
        """Name -> metadata of the fields with arrays, in their order on the wire."""
        return {f.name: f.metadata for f in fields(cls) if "category" in f.metadata}

    def sizes(self) -> dict[str, int]:
        """Bytes on the wire by category, such as {"cut up": 2048, "labels up": 64, "framing up": 36}."""
        sizes = {"framing": HEADER.size}
        for name, meta in self.arrays().items():
            value: Array = getattr(self, name)
            if value.nbytes:
                sizes[meta["category"]] = sizes.get(meta["category"], 0) + value.nbytes
            sizes["framing"] += ARRAY.size + 4 * len(value.shape)
        return {f"{category} {self.direction}": size for category, size in sizes.items()}

    def on_host(self: AnyMessage) -> AnyMessage:
        """The same message with numpy arrays on the host, as `decode` returns it."""
        arrays: dict[str, Any] = {name: host(getattr(self, name)) for name in self.arrays()}
        return replace(self, **arrays)

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return sum(self.sizes().values())


@dataclass(frozen=True, eq=False, kw_only=True)
class Hello(Message):
    """A client's position: it has applied the records of all rounds before `round`, the last of them in `epoch`."""

    kind, direction = 1, "up"


@dataclass(frozen=True, eq=False, kw_only=True)
class Records(Message):
    """The committed records of rounds `round`, `round` + 1, ...: everything after the client's last.

    coefficients: float32 [rounds, P]; a row of zeros is a round that nobody answered: no step. On a lattice the client
    half moves by coefficients[i, p] * u_p(round + i); elsewhere sum_p coefficients[i, p] u_p is the gradient estimate
    that the run's rule takes.
    rates: float32 [rounds], the learning rates of the rule; [0] on a lattice, where the coefficients contain them.
    digest: int32 [8], the SHA-256 of the client half after the last of these records; [0] where none is due.
    lattices: int32 [k, 2], (round, exponent): before this round's move the half is put on the coarser lattice of
    quantum 2^exponent, which holds from there on.
    """

    kind, direction = 2, "down"
    coefficients: Array = array("scalars", 2)
    rates: Array = array("scalars", 1)
    digest: Array = array("digest", 1, "int32")
    lattices: Array = array("scalars", 2, "int32", empty=(0, 2))


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolMoves(Message):
    """The sums of all moves of the rounds from `round` to before `until`, by direction of the pool.

    On a lattice moves commute, so that a generation of the pool is D sums, however many rounds it lasted: short for a
    client that was away for long.
    coefficients: float32 [generations, D], from the generation of round `round` on. until: int32 [1].
    digest: as in Records.
    """

    kind, direction = 8, "down"
    coefficients: Array = array("scalars", 2)
    until: Array = array("scalars", 1, "int32")
    digest: Array = array("digest", 1, "int32")


@dataclass(frozen=True, eq=False, kw_only=True)
class Differs(Message):
    """A client's half has another digest after `round` rounds than the server's. The client starts again from the base.

    digest: int32 [8], the client's own.
    """

    kind, direction = 9, "up"
    digest: Array = array("digest", 1, "int32")


@dataclass(frozen=True, eq=False, kw_only=True)
class Cut(Message):
    """The client half's output, and the labels.

    cut: [batch, ...], float; labels: [batch, ...], int32 or, if they are not classes, float32. mask: uint8 [batch,
    length], the attention mask of a text model's inputs, 0 for padding; [0, 0] if the server half takes none. scales:
    of an int8 cut, float32 [blocks], a factor for every 64 consecutive numbers.
    """

    kind, direction = 3, "up"
    cut: Array = array("cut", None, "float32", "bfloat16", "float16", "int8")
    labels: Array = array("labels", None, "int32", "float32")
    mask: Array = array("mask", 2, "uint8", empty=(0, 0))
    scales: Array = array("cut", 1, empty=(0,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Multiplier(Message):
    """The Lagrange multiplier of "client output = server input": d loss / d cut, the loss being this client's own mean.

    multiplier: [batch, ...], the shape and dtype of the cut. scales: as of a Cut.
    """

    kind, direction = 4, "down"
    multiplier: Array = array("multiplier", None, "float32", "bfloat16", "float16", "int8")
    scales: Array = array("multiplier", 1, empty=(0,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Scalars(Message):
    """Directional derivatives, float32 [P]: scalars[p] = <multiplier, J u_p> by the run's estimator, such as
    <multiplier, f(x; theta + mu u_p) - cut> / mu."""

    kind, direction = 5, "up"
    scalars: Array = array("scalars", 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbedCut(Cut):
    """A cut, and the client half's outputs for the same samples at displaced weights, if the server measures losses.

    displaced: [n, batch, ...], dtype and shape of the cut. Their order is the method's.
    """

    kind, direction = 10, "up"
    displaced: Array = array("cut", None, "float32", "bfloat16", "float16", empty=(0,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Losses(Message):
    """The server's losses of a ProbedCut's displaced cuts, in their order: float32 [n]."""

    kind, direction = 11, "down"
    losses: Array = array("losses", 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained(Message):
    """The weights of a client that has trained its half by itself, float32 [d], to be averaged with the others'."""

    kind, direction = 12, "up"
    weights: Array = array("weights", 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Weights(Message):
    """The client half's weights, float32 [d], for methods that send them whole. Empty: the client's are current."""

    kind, direction = 6, "down"
    weights: Array = array("weights", 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Statistics(Message):
    """Running statistics of the client half's normalisations on the client's own data, before the first round.

    statistics: float32 [n], for each normalisation, in the order of modules, the channels' means, then their variances.
    samples: int32 [1], their number. Both [0]: a client that has no statistics requests the committed ones.
    """

    kind, direction = 13, "up"
    statistics: Array = array("statistics", 1)
    samples: Array = array("samples", 1, "int32")


@dataclass(frozen=True, eq=False, kw_only=True)
class Ask(Message):
    """A request of the server. run: uint8 [8], the id of its run."""

    run: Array = array("framing", 1, "uint8", empty=(0,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration(Ask):
    """The committed running statistics, which are used from round 0 on: float32 [n], in the order of Statistics.

    [0]: the server has none yet, and requests the client's own Statistics.
    """

    kind, direction = 14, "down"
    statistics: Array = array("statistics", 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Invitation(Ask):
    """A request for a cut in `round`, after the update that the client has missed. Without one, or if it leaves a gap,
    the client answers with Hello instead of a cut, and is asked again."""

    kind, direction = 15, "down"


@dataclass(frozen=True, eq=False, kw_only=True)
class Complaint(Message):
    """The reason why a client cannot answer: uint8 [n], UTF-8."""

    kind, direction = 16, "up"
    text: Array = array("complaints", 1, "uint8")


@dataclass(frozen=True, eq=False, kw_only=True)
class Refusal(Message):
    """The reason why the server refused the client's last message: uint8 [n], UTF-8. It is sent before an invitation,
    and logged for the client's owner."""

    kind, direction = 19, "down"
    text: Array = array("complaints", 1, "uint8")


@dataclass(frozen=True, eq=False, kw_only=True)
class Audit(Ask):
    """A request for the digest of the client's half after `round` rounds, after the update that it has missed."""

    kind, direction = 17, "down"


@dataclass(frozen=True, eq=False, kw_only=True)
class Audited(Message):
    """The SHA-256 of the client half after `round` rounds, parameters and buffers: int32 [8]."""

    kind, direction = 18, "up"
    digest: Array = array("digest", 1, "int32")


@dataclass(frozen=True, eq=False, kw_only=True)
class Gradient(Message):
    """First-order split learning: the client half's gradient, float32 [d]."""

    kind, direction = 7, "up"
    gradient: Array = array("gradient", 1)


MESSAGES: dict[int, type[Message]] = {
    cls.kind: cls
    for cls in (
        Hello,
        Records,
        Cut,
        Multiplier,
        Scalars,
        Weights,
        Gradient,
        PoolMoves,
        Differs,
        ProbedCut,
        Losses,
        Trained,
        Statistics,
        Calibration,
        Invitation,
        Complaint,
        Audit,
        Audited,
        Refusal,
    )
}


def multiplier_of(message: Message, client: int, round: int, epoch: int) -> Multiplier:
    """The message, if it is the multiplier for a client's cut of this round. Raises MessageError."""
    if not isinstance(message, Multiplier):
        raise MessageError(f"client {client} expects a multiplier, got {type(message).__name__}")
    if (message.round, message.epoch, message.client) != (round, epoch, client):
        raise MessageError(
            f"client {client} is in round {round} of epoch {epoch}; this multiplier is for client"
            f" {message.client} in round {message.round} of epoch {message.epoch}"
        )
    return message


def text_array(text: str) -> Array:
    """A reason as messages carry it: uint8 [n], the first LONGEST_TEXT bytes of its UTF-8."""
    return np.frombuffer(text.encode()[:LONGEST_TEXT], np.uint8)


def text_of(message: Complaint | Refusal) -> str:
    """The reason in a message, cut off as in `text_array`. It may have control characters."""
    return bytes(bits(message.text[:LONGEST_TEXT])).decode(errors="replace")


def encode(message: Message) -> bytes:
    """Encode a message. Raises MessageError for an array of the wrong dtype or number of dims, or a number that is too
    large for the header."""
    arrays = message.arrays()
    try:
        header = HEADER.pack(MAGIC, message.kind, len(arrays), message.epoch, message.client, message.round, 0)
    except struct.error as error:
        where = f"epoch {message.epoch}, client {message.client}, round {message.round}"
        raise MessageError(f"{type(message).__name__} of {where} does not fit a header: {error}") from None
    header = header[: -CRC.size]
    parts: list[bytes | memoryview] = []
    for name, meta in arrays.items():
        value: Array = getattr(message, name)
        dtype, dims = dtype_name(value), len(value.shape)
        _check(type(message).__name__, name, meta, dtype, dims)
        parts.append(ARRAY.pack(CODES[dtype], dims, 0))
        parts.append(struct.pack(f"<{dims}I", *value.shape))
        if count(value):
            parts.append(bits(value))
    body = b"".join(parts)
    return header + CRC.pack(zlib.crc32(body, zlib.crc32(header))) + body


def decode(data: bytes, largest: int = LARGEST_MESSAGE) -> Message:
    """Decode a message, whose arrays are copies. Raises MessageError, also for more than `largest` bytes."""
    if len(data) > largest:
        raise MessageError(f"{len(data)} bytes; the largest message has {largest}")
    if len(data) < HEADER.size:
        raise MessageError(f"{len(data)} bytes are too few for a header of {HEADER.size}")
    magic, kind, count, epoch, client, round_, crc = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise MessageError(f"starts with {magic!r}, not {MAGIC!r}")
    if crc != zlib.crc32(memoryview(data)[HEADER.size :], zlib.crc32(data[: HEADER.size - CRC.size])):
        raise MessageError("damaged on the way: the checksum is wrong")
    if kind not in MESSAGES:
        raise MessageError(f"unknown kind {kind}")
    cls = MESSAGES[kind]
    arrays = cls.arrays()
    if count != len(arrays):
        raise MessageError(f"{cls.__name__} has {len(arrays)} arrays, this one {count}")
    values = _read_arrays(cls, memoryview(data)[HEADER.size :])
    return cls(client=client, round=round_, epoch=epoch, **dict(zip(arrays, values, strict=True)))


def pack(messages: Sequence[bytes]) -> bytes:
    """Join encoded messages that are sent together: each one after its length, u32."""
    return b"".join(part for data in messages for part in (LENGTH.pack(len(data)), data))


def unpack(data: bytes) -> list[bytes]:
    """Split what `pack` has joined. Raises MessageError for bytes that are cut off, and for more than `TOGETHER`."""
    found, at = list[bytes](), 0
    while at < len(data):
        if len(data) < at + LENGTH.size:
            raise MessageError("the length of a message is cut off")
        (size,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size
        if len(data) < at + size:
            raise MessageError(f"a message of {size} bytes is cut off after {len(data) - at}")
        if len(found) == TOGETHER:
            raise MessageError(f"more than {TOGETHER} messages together")
        found.append(data[at : at + size])
        at += size
    return found


def _read_arrays(cls: type[Message], data: memoryview) -> Iterator[Array]:
    at = 0
    for name, meta in cls.arrays().items():
        if len(data) < at + ARRAY.size:
            raise MessageError(f"{cls.__name__}.{name} is cut off")
        code, dims, zero = ARRAY.unpack_from(data, at)
        if code not in DTYPES or zero != 0:
            raise MessageError(f"{cls.__name__}.{name} has dtype code {code} and padding {zero}")
        dtype = DTYPES[code]
        _check(cls.__name__, name, meta, dtype, dims)
        at += ARRAY.size
        if len(data) < at + 4 * dims:
            raise MessageError(f"{cls.__name__}.{name} is cut off in its shape")
        shape = struct.unpack_from(f"<{dims}I", data, at)
        at += 4 * dims
        if math.prod(max(n, 1) for n in shape) > LARGEST_MESSAGE:  # with a zero among them, no bytes need follow
            raise MessageError(f"{cls.__name__}.{name} says shape {shape}")
        stored = NUMPY[dtype]
        size = math.prod(shape) * stored.itemsize
        if len(data) < at + size:
            raise MessageError(f"{cls.__name__}.{name} says shape {shape}, {size} bytes, and has {len(data) - at}")
        # A copy, which the receiver may write into.
        yield np.frombuffer(data, stored, math.prod(shape), at).reshape(shape).copy()
        at += size
    if at != len(data):
        raise MessageError(f"{cls.__name__} has {len(data) - at} bytes too many")


def _check(cls: str, name: str, meta: Any, dtype: str, dims: int) -> None:
    if dtype not in meta["dtypes"]:
        raise MessageError(f"{cls}.{name} is {dtype}, not {' or '.join(meta['dtypes'])}")
    if dims > 8 or (meta["dims"] is not None and dims != meta["dims"]):
        raise MessageError(f"{cls}.{name} has {dims} dims, not {meta['dims']}")


class Wire:
    """Counts every byte between server and clients, by category, in `bytes`. A subclass may lose or damage some."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def carry(self, client: int, messages: Sequence[Message]) -> bytes | None:
        """The bytes of a request that a client receives; None if they are lost or late. This wire loses nothing."""
        for message in messages:
            self.count(message)
        self._add("framing down", LENGTH.size * len(messages))
        return pack([encode(message) for message in messages])

    def bring(self, client: int, data: bytes) -> bytes | None:
        """The bytes of a reply that the server receives. They are counted when they are decoded: see `count`."""
        return data

    def count(self, message: Message) -> None:
        """Add a message's bytes to their categories'."""
        for category, size in message.sizes().items():
            self._add(category, size)

    def _add(self, category: str, size: int) -> None:
        self.bytes[category] = self.bytes.get(category, 0) + size
