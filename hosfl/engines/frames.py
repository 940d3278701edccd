"""What the lines of NATS carry: frames of a byte of version, a byte of kind and fields of a fixed size.

A message of any length is moved by its receiver. The sender announces it by a `Piece` at offset 0, which holds all of a
small message and nothing of a larger one; the receiver says `Want` for a window of bytes, and for the next when half of
it has come. So no queue on the way is longer than the windows, nothing is sent that nobody wants any more, and after a
broken connection the receiver wants what it lacks.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

VERSION = 1
PIECE = 512 * 1024  # bytes of a message in one frame; the broker's largest is 1 MB, if nobody changed it
SMALL = 32 * 1024  # bytes of a message that comes whole with its announcement
LEAST = 16 * 1024  # bytes of a piece but the last, whose multiple all are: many small ones cost more than they hold
WINDOW = 4 * 1024 * 1024  # bytes on their way to one receiver
TEXT = 500  # bytes of a name or a reason
MAX_ASKS = 16  # asks that a line can have at once


class FrameError(ValueError):
    """Bytes that are not a valid frame."""


class EndReason(IntEnum):
    """Why a transfer has ended."""

    DONE = 0
    LATE = 1
    UNKNOWN = 2
    REFUSED = 3
    REPLACED = 4


@dataclass(frozen=True)
class Ping:
    """Server to line: it is here. engine: a random number of this engine; connection: how many it has had."""

    engine: int
    connection: int


@dataclass(frozen=True)
class Beat:
    """Line to server: it is here. line: a random number of this line. asks: those it has, True if answered."""

    line: int
    connection: int
    asks: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Bytes of transfer `id` from `offset` on. crc: CRC-32 of all `total` bytes. failed: the bytes are a reason."""

    id: int
    failed: bool
    offset: int
    total: int
    crc: int
    data: bytes | memoryview


@dataclass(frozen=True)
class Want:
    """Send `length` bytes of transfer `id` from `offset` on. length 0: announce it again."""

    id: int
    offset: int
    length: int


@dataclass(frozen=True)
class Ended:
    """Transfer `id` is over, at either end."""

    id: int
    why: EndReason
    text: str = ""


@dataclass(frozen=True)
class Fetch:
    """Line to server: announce the file `name` as transfer `id`."""

    id: int
    name: str


@dataclass(frozen=True)
class Bye:
    """Line to server: it goes."""

    line: int


Frame = Ping | Beat | Piece | Want | Ended | Fetch | Bye

_HEAD = struct.Struct("!BB")
_NUMBERS = {  # of each kind: what it is, and its numbers
    1: (Ping, struct.Struct("!QL")),
    2: (Beat, struct.Struct("!QL")),
    3: (Piece, struct.Struct("!Q?QQL")),
    4: (Want, struct.Struct("!QQQ")),
    5: (Ended, struct.Struct("!QB")),
    6: (Fetch, struct.Struct("!Q")),
    7: (Bye, struct.Struct("!Q")),
}
_KINDS = {kind: (number, numbers) for number, (kind, numbers) in _NUMBERS.items()}
_ASK = struct.Struct("!QB")


def encode(frame: Frame) -> bytes:
    """A frame as bytes."""
    kind, numbers = _KINDS[type(frame)]
    tail: bytes | memoryview = b""
    values: tuple[int, ...] = ()
    if isinstance(frame, Ping):
        values = (frame.engine, frame.connection)
    elif isinstance(frame, Beat):
        values = (frame.line, frame.connection)
        tail = b"".join(_ASK.pack(*ask) for ask in frame.asks)
    elif isinstance(frame, Piece):
        values, tail = (frame.id, frame.failed, frame.offset, frame.total, frame.crc), frame.data
    elif isinstance(frame, Want):
        values = (frame.id, frame.offset, frame.length)
    elif isinstance(frame, Ended):
        values, tail = (frame.id, frame.why), frame.text.encode()[:TEXT]
    elif isinstance(frame, Fetch):
        values, tail = (frame.id,), frame.name.encode()
    else:
        values = (frame.line,)
    return b"".join((_HEAD.pack(VERSION, kind), numbers.pack(*values), tail))


def decode(data: bytes) -> Frame:
    """Bytes as a frame. Raises FrameError."""
    if len(data) < _HEAD.size:
        raise FrameError(f"{len(data)} bytes are no frame")
    version, kind = _HEAD.unpack_from(data)
    if version != VERSION:
        raise FrameError(f"version {version} of the frames, not {VERSION}: install the same hosfl at both ends")
    if kind not in _NUMBERS:
        raise FrameError(f"a frame of kind {kind}")
    made, numbers = _NUMBERS[kind]
    if len(data) < _HEAD.size + numbers.size:
        raise FrameError(f"a {made.__name__} of {len(data)} bytes")
    values = numbers.unpack_from(data, _HEAD.size)
    tail = memoryview(data)[_HEAD.size + numbers.size :]
    if made is Beat:
        return Beat(values[0], values[1], _asks(tail))
    if made is Piece:
        id, failed, offset, total, crc = values
        if len(tail) > PIECE or offset + len(tail) > total or (failed and total > TEXT):
            raise FrameError(f"a piece of {len(tail)} bytes from {offset} on, of {total}")
        return Piece(id, failed, offset, total, crc, tail)
    if made is Ended:
        return Ended(values[0], _end_reason(values[1]), _text(tail))
    if made is Fetch:
        return Fetch(values[0], _text(tail))
    if tail:
        raise FrameError(f"a {made.__name__} with {len(tail)} bytes too many")
    return Bye(*values) if made is Bye else Want(*values) if made is Want else Ping(*values)


def _asks(tail: memoryview) -> tuple[tuple[int, bool], ...]:
    if len(tail) % _ASK.size or len(tail) > MAX_ASKS * _ASK.size:
        raise FrameError(f"a list of asks of {len(tail)} bytes")
    asks = tuple(_ASK.iter_unpack(tail))
    if any(answered > 1 for _, answered in asks):
        raise FrameError("an ask that is neither answered nor not")
    return tuple((id, bool(answered)) for id, answered in asks)


def _end_reason(number: int) -> EndReason:
    try:
        return EndReason(number)
    except ValueError:
        raise FrameError(f"a transfer that ended for reason {number}") from None


def _text(tail: memoryview) -> str:
    if len(tail) > TEXT:
        raise FrameError(f"a text of {len(tail)} bytes")
    try:
        return bytes(tail).decode()
    except UnicodeDecodeError:
        raise FrameError("a text that is not UTF-8") from None


@dataclass
class Outgoing:
    """A message, to be sent in pieces. failed: it is the reason why there is none."""

    data: bytes
    failed: bool = False
    crc: int = field(init=False)

    def __post_init__(self) -> None:
        self.crc = zlib.crc32(self.data)

    def announcement(self, id: int) -> bytes:
        """The first frame: all of a small message, nothing of a larger one."""
        return self.piece(id, 0, len(self.data) if len(self.data) <= SMALL else 0)

    def piece(self, id: int, offset: int, end: int) -> bytes:
        """The frame that holds the bytes from `offset` to `end`."""
        data = memoryview(self.data)[offset:end]
        return encode(Piece(id, self.failed, offset, len(self.data), self.crc, data))


@dataclass
class Incoming:
    """A message on its way here. failed, total, crc: as its first piece says. now: the clock, in seconds."""

    failed: bool
    total: int
    crc: int
    now: Callable[[], float]
    have: int = 0  # bytes that have come
    asked: int = 0  # bytes that have come or been asked for
    moved: float = field(init=False)  # when bytes came last, or were asked for anew
    _pieces: list[bytes | memoryview] = field(default_factory=list)
    _sum: int = 0

    def __post_init__(self) -> None:
        self.moved = self.now()

    def fits(self, piece: Piece) -> bool:
        """Whether it is of this message, the next one, asked for, and not one of very many."""
        same = (piece.failed, piece.total, piece.crc) == (self.failed, self.total, self.crc)
        end = piece.offset + len(piece.data)
        large = len(piece.data) >= LEAST or (end == self.asked and len(piece.data) > 0)
        return same and piece.offset == self.have and end <= self.asked and large

    def take(self, piece: Piece) -> None:
        """Keep a piece that fits."""
        self._pieces.append(piece.data)
        self._sum = zlib.crc32(piece.data, self._sum)
        self.have += len(piece.data)
        self.moved = self.now()

    @property
    def whole(self) -> bool:
        """Whether all bytes are here."""
        return self.have == self.total

    def message(self) -> bytes | None:
        """All bytes, which are kept no longer; None where they are not those that were announced."""
        message = b"".join(self._pieces)
        self._pieces.clear()
        return message if self._sum == self.crc else None

    def wanted(self, id: int, window: int, again: bool = False) -> bytes | None:
        """A frame that asks for more, if it is time to. again: what was asked for is not coming."""
        if again:
            self.asked, self.moved = self.have, self.now()
        if self.asked == self.total or self.asked - self.have > window // 2:
            return None
        offset, self.asked = self.asked, min(self.total, self.asked + window // LEAST * LEAST)
        return encode(Want(id, offset, self.asked - offset))


def start_incoming(piece: Piece, now: Callable[[], float]) -> Incoming:
    """The `Incoming` of a first piece: complete if that holds the whole message, else empty."""
    incoming = Incoming(piece.failed, piece.total, piece.crc, now)
    if piece.offset == 0 and len(piece.data) == piece.total <= SMALL:
        incoming.asked = piece.total
        if piece.total:
            incoming.take(piece)
    return incoming
