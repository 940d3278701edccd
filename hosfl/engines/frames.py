"""The wire format between a NATS engine and its clients: frames, and the transfer of messages in pieces.

A frame is a version byte, a kind byte, and fields of fixed size; text or data may follow.

A message can have any length, and its receiver controls the transfer. The sender announces the message by a `Piece` at
offset 0, which holds all of a small message and no data of a larger one. The receiver requests a window of bytes by
`Want`, and the next window when half of the previous one has arrived. So no queue on the way is longer than the
windows, nothing is sent that nobody wants any more, and after a broken connection the receiver requests only what it
lacks.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

VERSION = 1
MAX_PIECE = 512 * 1024  # bytes of a message in one frame; a broker's default limit for a frame is 1 MB
SMALL = 32 * 1024  # the largest message that is sent whole with its announcement, bytes
MIN_PIECE = 16 * 1024  # every piece but the last is a multiple of this, in bytes: smaller ones have too much overhead
WINDOW = 4 * 1024 * 1024  # bytes that may be in flight to one receiver
MAX_TEXT = 500  # bytes of a name or a reason
MAX_REQUESTS = 16  # requests that a line can have at once


class FrameError(ValueError):
    """Bytes that are not a valid frame."""


class EndReason(IntEnum):
    """Why a transfer ended."""

    DONE = 0
    LATE = 1
    UNKNOWN = 2
    REFUSED = 3
    REPLACED = 4


@dataclass(frozen=True)
class Ping:
    """Server to line: a sign of life. engine: this engine's random number; connection: how many it has had."""

    engine: int
    connection: int


@dataclass(frozen=True)
class Beat:
    """Line to server: a sign of life.

    line: this line's random number; connection: how many it has had. requests: the id of each request that it holds,
    and whether it has an answer.
    """

    line: int
    connection: int
    requests: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The bytes of transfer `id` from `offset` on.

    crc: CRC-32 of all `total` bytes. failed: the message is the reason of a failure.
    """

    id: int
    failed: bool
    offset: int
    total: int
    crc: int
    data: bytes | memoryview


@dataclass(frozen=True)
class Want:
    """Request for `length` bytes of transfer `id` from `offset` on. length 0: announce the message again."""

    id: int
    offset: int
    length: int


@dataclass(frozen=True)
class Ended:
    """Notice that transfer `id` is over; either side may send it."""

    id: int
    reason: EndReason
    text: str = ""


@dataclass(frozen=True)
class Fetch:
    """Line to server: request for the file `name`, to be announced as transfer `id`."""

    id: int
    name: str


@dataclass(frozen=True)
class Bye:
    """Line to server: it disconnects."""

    line: int


Frame = Ping | Beat | Piece | Want | Ended | Fetch | Bye

_HEAD = struct.Struct("!BB")
_LAYOUTS = {  # of each kind byte: the frame's class, and its fields of fixed size
    1: (Ping, struct.Struct("!QL")),
    2: (Beat, struct.Struct("!QL")),
    3: (Piece, struct.Struct("!Q?QQL")),
    4: (Want, struct.Struct("!QQQ")),
    5: (Ended, struct.Struct("!QB")),
    6: (Fetch, struct.Struct("!Q")),
    7: (Bye, struct.Struct("!Q")),
}
_KINDS = {cls: (kind, fields) for kind, (cls, fields) in _LAYOUTS.items()}
_REQUEST = struct.Struct("!QB")


def encode(frame: Frame) -> bytes:
    """Encode a frame as bytes."""
    kind, fields = _KINDS[type(frame)]
    tail: bytes | memoryview = b""
    values: tuple[int, ...] = ()
    if isinstance(frame, Ping):
        values = (frame.engine, frame.connection)
    elif isinstance(frame, Beat):
        values = (frame.line, frame.connection)
        tail = b"".join(_REQUEST.pack(*request) for request in frame.requests)
    elif isinstance(frame, Piece):
        values, tail = (frame.id, frame.failed, frame.offset, frame.total, frame.crc), frame.data
    elif isinstance(frame, Want):
        values = (frame.id, frame.offset, frame.length)
    elif isinstance(frame, Ended):
        values, tail = (frame.id, frame.reason), frame.text.encode()[:MAX_TEXT]
    elif isinstance(frame, Fetch):
        values, tail = (frame.id,), frame.name.encode()
    else:
        values = (frame.line,)
    return b"".join((_HEAD.pack(VERSION, kind), fields.pack(*values), tail))


def decode(data: bytes) -> Frame:
    """Decode a frame. Raises FrameError."""
    if len(data) < _HEAD.size:
        raise FrameError(f"{len(data)} bytes are no frame")
    version, kind = _HEAD.unpack_from(data)
    if version != VERSION:
        raise FrameError(f"version {version} of the frames, not {VERSION}: install the same hosfl at both ends")
    if kind not in _LAYOUTS:
        raise FrameError(f"a frame of unknown kind {kind}")
    cls, fields = _LAYOUTS[kind]
    if len(data) < _HEAD.size + fields.size:
        raise FrameError(f"a {cls.__name__} of only {len(data)} bytes")
    values = fields.unpack_from(data, _HEAD.size)
    tail = memoryview(data)[_HEAD.size + fields.size :]
    if cls is Beat:
        return Beat(values[0], values[1], _decode_requests(tail))
    if cls is Piece:
        id, failed, offset, total, crc = values
        if len(tail) > MAX_PIECE or offset + len(tail) > total or (failed and total > MAX_TEXT):
            raise FrameError(f"a piece of {len(tail)} bytes from {offset} on, of {total}")
        return Piece(id, failed, offset, total, crc, tail)
    if cls is Ended:
        return Ended(values[0], _decode_end_reason(values[1]), _decode_text(tail))
    if cls is Fetch:
        return Fetch(values[0], _decode_text(tail))
    if tail:
        raise FrameError(f"a {cls.__name__} with {len(tail)} bytes too many")
    return Bye(*values) if cls is Bye else Want(*values) if cls is Want else Ping(*values)


def _decode_requests(tail: memoryview) -> tuple[tuple[int, bool], ...]:
    if len(tail) % _REQUEST.size or len(tail) > MAX_REQUESTS * _REQUEST.size:
        raise FrameError(f"a list of requests of {len(tail)} bytes")
    requests = tuple(_REQUEST.iter_unpack(tail))
    if any(answered > 1 for _, answered in requests):
        raise FrameError("a request whose flag is neither 0 nor 1")
    return tuple((id, bool(answered)) for id, answered in requests)


def _decode_end_reason(number: int) -> EndReason:
    try:
        return EndReason(number)
    except ValueError:
        raise FrameError(f"a transfer that ended for the unknown reason {number}") from None


def _decode_text(tail: memoryview) -> str:
    if len(tail) > MAX_TEXT:
        raise FrameError(f"a text of {len(tail)} bytes")
    try:
        return bytes(tail).decode()
    except UnicodeDecodeError:
        raise FrameError("a text that is not UTF-8") from None


@dataclass
class Outgoing:
    """A message that is sent in pieces. failed: whether it is the reason of a failure, instead of an answer."""

    data: bytes
    failed: bool = False
    crc: int = field(init=False)

    def __post_init__(self) -> None:
        self.crc = zlib.crc32(self.data)

    def announcement(self, id: int) -> bytes:
        """Return the first frame, encoded: all of a small message, no data of a larger one."""
        return self.piece(id, 0, len(self.data) if len(self.data) <= SMALL else 0)

    def piece(self, id: int, offset: int, end: int) -> bytes:
        """Return the frame that holds the bytes from `offset` to `end`, encoded."""
        data = memoryview(self.data)[offset:end]
        return encode(Piece(id, self.failed, offset, len(self.data), self.crc, data))


@dataclass
class Incoming:
    """A message that is being received. failed, total, crc: from its first piece. now: the clock, in seconds."""

    failed: bool
    total: int
    crc: int
    now: Callable[[], float]
    received: int = 0  # bytes
    requested: int = 0  # bytes that were received or requested
    last_progress: float = field(init=False)  # time of the last piece, or of the last repeated request
    _pieces: list[bytes | memoryview] = field(default_factory=list)
    _received_crc: int = 0

    def __post_init__(self) -> None:
        self.last_progress = self.now()

    def fits(self, piece: Piece) -> bool:
        """Whether the piece is the next one of this message, was requested, and is not too small."""
        same = (piece.failed, piece.total, piece.crc) == (self.failed, self.total, self.crc)
        end = piece.offset + len(piece.data)
        large = len(piece.data) >= MIN_PIECE or (end == self.requested and len(piece.data) > 0)
        return same and piece.offset == self.received and end <= self.requested and large

    def add(self, piece: Piece) -> None:
        """Append a piece that fits."""
        self._pieces.append(piece.data)
        self._received_crc = zlib.crc32(piece.data, self._received_crc)
        self.received += len(piece.data)
        self.last_progress = self.now()

    @property
    def complete(self) -> bool:
        """Whether all bytes have been received."""
        return self.received == self.total

    def take_message(self) -> bytes | None:
        """Return the whole message and release it here; None if its CRC is not the announced one."""
        message = b"".join(self._pieces)
        self._pieces.clear()
        return message if self._received_crc == self.crc else None

    def next_want(self, id: int, window: int, again: bool = False) -> bytes | None:
        """Return an encoded `Want` for the next window, or None while more than half a window is in flight.

        again: request again what was requested and has not arrived.
        """
        if again:
            self.requested, self.last_progress = self.received, self.now()
        if self.requested == self.total or self.requested - self.received > window // 2:
            return None
        offset, self.requested = self.requested, min(self.total, self.requested + window // MIN_PIECE * MIN_PIECE)
        return encode(Want(id, offset, self.requested - offset))


def start_incoming(piece: Piece, now: Callable[[], float]) -> Incoming:
    """Start to receive the message of a first piece: complete if that holds the whole message, else empty."""
    incoming = Incoming(piece.failed, piece.total, piece.crc, now)
    if piece.offset == 0 and len(piece.data) == piece.total <= SMALL:
        incoming.requested = piece.total
        if piece.total:
            incoming.add(piece)
    return incoming
