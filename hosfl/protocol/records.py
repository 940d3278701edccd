"""The records of a log: their classes, encoding and decoding, and which may come next.

Little-endian. A record's payload is

    payload kind u8  epoch u16  round u32  fields
    fields  kind 1, round:  rate f32  coefficients f32[P]  participants u32[k]
            kind 2, epoch:  none
            kind 3, digest: SHA-256[32]
            kind 4, round on a coarser lattice:  exponent i16, then as kind 1

In the file (`log.py`) each takes 18 bytes more. A round takes 29 + 4 P + 4 k bytes there: 61 with P = 5 directions and
k = 3 participants. An epoch takes 25, a digest 57.

Kind 4: before this round's move the weights are put on the lattice of quantum 2^exponent, above the quantum so far,
which holds from there on. It is one record, so that a crash cannot separate the two.

Order. Rounds count from 0, epochs from 0. A round record's round is the number of rounds so far, its epoch the current
one. An epoch record (epoch e, round r) voids the rounds from r on and the digests after r rounds; e is above every
epoch before it, r at most the number of rounds so far. A digest record's round is the number of rounds so far; two of
the same round agree.
"""

from __future__ import annotations

import math
import reprlib
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.header import (
    EXPONENTS,
    Header,
    LogError,
    check_integer,
    check_number,
    check_quantum,
    set_fields,
)

FIELDS = struct.Struct("<BHI")
RATE = struct.Struct("<f")
EXPONENT = struct.Struct("<h")
LAST_EPOCH = 2**16 - 1  # the largest that records and messages can have
ROUND, EPOCH, DIGEST, COARSER_ROUND = 1, 2, 3, 4


@dataclass(frozen=True, eq=False, slots=True)
class RoundRecord:
    """A committed round: the client half moves by what the header's rule makes of `coefficients`.

    rate: the learning rate, rounded to float32 here; for readers, the coefficients contain it. coefficients: finite
    float32 [P], not rounded: numbers that are none in float32 are refused; copied. participants: the clients that
    answered, each once, below 2^32; none means no step, all coefficients zero. quantum: of the coarser lattice that
    holds from this round on, a power of two; None where the lattice stays. Equal means equal bits. Raises LogError.
    """

    epoch: int
    round: int
    rate: float
    coefficients: NDArray[np.float32]
    participants: tuple[int, ...]
    quantum: float | None = None

    def __post_init__(self) -> None:
        participants = tuple(check_integer(client, "a participant", 0, 2**32 - 1) for client in self.participants)
        coefficients = _float32(self.coefficients)
        if len(set(participants)) < len(participants):
            raise LogError(f"a participant is named twice: {reprlib.repr(participants)}")
        if not participants and coefficients.any():
            raise LogError("nobody took part, but not all coefficients are zero")
        if self.quantum is not None:
            check_quantum(self.quantum, "the quantum")
        set_fields(self, rate=_rate(self.rate), coefficients=coefficients, participants=participants, **_when(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoundRecord) and encode_record(self) == encode_record(other)

    def __hash__(self) -> int:
        return hash(encode_record(self))


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """The server restarted from a snapshot: rounds from `round` on are void, and `epoch` starts. Raises LogError."""

    epoch: int
    round: int

    def __post_init__(self) -> None:
        set_fields(self, **_when(self))


@dataclass(frozen=True, slots=True)
class DigestRecord:
    """SHA-256 of the client half after `round` rounds, 32 bytes. Raises LogError."""

    epoch: int
    round: int
    sha256: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, bytes) or len(self.sha256) != 32:
            raise LogError(f"sha256 must be 32 bytes, not {reprlib.repr(self.sha256)}")
        set_fields(self, **_when(self))


Record = RoundRecord | EpochRecord | DigestRecord
AnyRecord = TypeVar("AnyRecord", RoundRecord, Record)


def _when(record: Record) -> dict[str, int]:
    return {
        "epoch": check_integer(record.epoch, "epoch", 0, LAST_EPOCH),
        "round": check_integer(record.round, "round", 0, 2**32 - 1),
    }


def _rate(value: Any) -> float:
    try:
        rate: float = RATE.unpack(RATE.pack(check_number(value, "rate")))[0]
    except OverflowError:
        raise LogError(f"rate must fit float32, not {value!r}") from None
    return rate


def _float32(values: Any) -> NDArray[np.float32]:
    given = np.asarray(values)
    if given.ndim != 1 or given.dtype.kind != "f":
        raise LogError(f"coefficients must be floats in one dim, not {given.dtype} of shape {given.shape}")
    with np.errstate(over="ignore"):
        single = np.array(given, dtype=np.float32)
    if not np.isfinite(single).all():
        raise LogError("coefficients must be finite")
    if given.dtype != np.float32 and (single != given).any():
        raise LogError("coefficients must be float32 numbers: round them before they are committed")
    single.flags.writeable = False
    return single


def encode_record(record: Record) -> bytes:
    """A record's body without the chain."""
    if isinstance(record, RoundRecord):
        participants = np.array(record.participants, dtype="<u4").tobytes()
        fields = RATE.pack(record.rate) + record.coefficients.astype("<f4").tobytes() + participants
        if record.quantum is None:
            return FIELDS.pack(ROUND, record.epoch, record.round) + fields
        exponent = EXPONENT.pack(math.frexp(record.quantum)[1] - 1)
        return FIELDS.pack(COARSER_ROUND, record.epoch, record.round) + exponent + fields
    if isinstance(record, EpochRecord):
        return FIELDS.pack(EPOCH, record.epoch, record.round)
    if isinstance(record, DigestRecord):
        return FIELDS.pack(DIGEST, record.epoch, record.round) + record.sha256
    raise LogError(f"{type(record).__name__} is no kind of record")


def decode_record(payload: bytes, directions: int) -> Record:
    kind, epoch, round_ = FIELDS.unpack_from(payload)
    rest, quantum = payload[FIELDS.size :], None
    if kind == COARSER_ROUND and len(rest) >= EXPONENT.size:
        exponent = check_integer(EXPONENT.unpack_from(rest)[0], "the quantum's exponent", *EXPONENTS)
        kind, rest, quantum = ROUND, rest[EXPONENT.size :], 2.0**exponent
    if kind == ROUND:
        participants, odd = divmod(len(rest) - RATE.size - 4 * directions, 4)
        if participants < 0 or odd:
            raise LogError(f"a round of {directions} directions does not take {len(payload)} bytes")
        coefficients = np.frombuffer(rest, "<f4", directions, RATE.size)
        clients = struct.unpack_from(f"<{participants}I", rest, RATE.size + 4 * directions)
        return RoundRecord(epoch, round_, RATE.unpack_from(rest)[0], coefficients, clients, quantum)
    if kind == EPOCH and not rest:
        return EpochRecord(epoch, round_)
    if kind == DIGEST:
        return DigestRecord(epoch, round_, rest)
    raise LogError(f"unknown kind {kind} of {len(payload)} bytes")


class Packed(Sequence[AnyRecord]):
    """A sequence of records in a log's encoding, without frames: a ninth of the memory of objects.

    directions: P, of the rounds. An item is decoded whenever it is accessed; a slice is a copy. Equal to any sequence
    of the same records.
    """

    def __init__(self, directions: int) -> None:
        self.directions = directions
        self._data, self._ends = bytearray(), array("Q", [0])

    def append(self, record: AnyRecord) -> None:
        self._data += encode_record(record)
        self._ends.append(len(self._data))

    def truncate(self, count: int) -> None:
        """Keep the first `count`."""
        del self._ends[count + 1 :]
        del self._data[self._ends[-1] :]

    def payload(self, number: int) -> bytes:
        """A record's body without the chain."""
        return bytes(self._data[self._ends[number] : self._ends[number + 1]])

    def picked(self, numbers: Iterable[int]) -> Packed[Any]:
        """A copy of the records of these numbers."""
        copy: Packed[Any] = Packed(self.directions)
        for number in numbers:
            copy._data += self.payload(number)
            copy._ends.append(len(copy._data))
        return copy

    def columns(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        """Of rounds: coefficients [n, P], rates [n], and (round, exponent) of every coarser lattice [k, 2].

        Read from the bytes: decoding the records takes several times as long, and a client that joins late needs all.
        """
        coefficients, rates = np.empty((len(self), self.directions), np.float32), np.empty(len(self), np.float32)
        coarser: list[tuple[int, int]] = []
        for row, begin in enumerate(self._ends[:-1]):
            (kind, _, round), at = FIELDS.unpack_from(self._data, begin), begin + FIELDS.size
            if kind == COARSER_ROUND:
                coarser.append((round, EXPONENT.unpack_from(self._data, at)[0]))
                at += EXPONENT.size
            rates[row] = RATE.unpack_from(self._data, at)[0]
            coefficients[row] = np.frombuffer(self._data, "<f4", self.directions, at + RATE.size)
        return coefficients, rates, np.array(coarser, np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> AnyRecord: ...
    @overload
    def __getitem__(self, number: slice) -> Packed[AnyRecord]: ...
    def __getitem__(self, number: int | slice) -> AnyRecord | Packed[AnyRecord]:
        if isinstance(number, slice):
            return self.picked(range(len(self))[number])
        record: AnyRecord = decode_record(self.payload(range(len(self))[number]), self.directions)  # type: ignore[assignment]
        return record

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"<{len(self)} records of {self.directions} directions>"


class History:
    """The state that a log's records add up to, and the check of which may come next."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.records: Packed[Record] = Packed(header.directions)
        self.rounds = array("Q")  # the number of the record of every committed round
        self.lattices: list[tuple[int, float]] = []  # (round, quantum) of every coarser one
        self.digests: dict[int, bytes] = {}
        self.epochs: list[tuple[int, int]] = []  # (epoch, its first round) of every restart

    @property
    def epoch(self) -> int:
        return self.epochs[-1][0] if self.epochs else 0

    def check(self, record: Record) -> None:
        """Raises LogError for a record that may not come next."""
        done = len(self.rounds)
        if isinstance(record, EpochRecord):
            if record.epoch <= self.epoch:
                raise LogError(f"epoch {record.epoch} cannot start after epoch {self.epoch}")
            if record.round > done:
                raise LogError(f"epoch {record.epoch} cannot start at round {record.round}: there are {done} rounds")
            return
        if record.epoch != self.epoch or record.round != done:
            raise LogError(
                f"a {type(record).__name__} of epoch {record.epoch}, round {record.round} cannot come in epoch"
                f" {self.epoch} after {done} rounds"
            )
        if isinstance(record, RoundRecord) and len(record.coefficients) != self.header.directions:
            raise LogError(f"{len(record.coefficients)} coefficients in a run of {self.header.directions} directions")
        if isinstance(record, RoundRecord) and record.quantum is not None:
            so_far = self.lattices[-1][1] if self.lattices else self.header.quantum
            if so_far is None or record.quantum <= so_far:
                raise LogError(f"a lattice of quantum {record.quantum:g} cannot follow one of {so_far}")
        if isinstance(record, DigestRecord) and self.digests.get(done, record.sha256) != record.sha256:
            raise LogError(f"after {done} rounds there is another digest already")

    def add(self, record: Record) -> None:
        if isinstance(record, RoundRecord):
            self.rounds.append(len(self.records))
            if record.quantum is not None:
                self.lattices.append((record.round, record.quantum))
        elif isinstance(record, DigestRecord):
            self.digests[record.round] = record.sha256
        else:
            self.epochs.append((record.epoch, record.round))
            del self.rounds[record.round :]
            self.lattices = [(round, quantum) for round, quantum in self.lattices if round < record.round]
            while self.digests and next(reversed(self.digests)) > record.round:  # they lie in the order of rounds
                self.digests.popitem()
        self.records.append(record)
