"""The client half's checkpoint: base weights, and this append-only file of the numbers that moved them, `hosfl.log`.

Formats 1 and 2, little-endian:

    header  "hosfllog"  format u16  zero u16  length u32  crc u32  JSON[length]
    record  ab 52  length u32  crc u32  body[length]
    body    kind u8  epoch u16  round u32  fields  chain[8]
    fields  kind 1, round:  rate f32  coefficients f32[P]  participants u32[k]
            kind 2, epoch:  none
            kind 3, digest: SHA-256[32]
            kind 4, round on a coarser lattice:  exponent i16, then as kind 1

The header's crc is CRC-32 of the 16 bytes before it and the JSON; a record's, of its length and its body, so that a
damaged length cannot pass for a torn tail. Format 2 is of runs whose header has blocks, which format 1 does not know;
all else is the same. The JSON is UTF-8 with sorted keys and no spaces; floats are Python's repr,
the shortest decimal that reads back as the same double. The running digest starts as BLAKE2b-256 of the header's bytes
and becomes BLAKE2b-256(running digest, body without chain) with every record; `chain` is its first 8 bytes, so that
records removed, repeated, exchanged or taken from another log are found. (Records removed from the end leave a shorter
log that is valid: compare `Log.digest` with one kept elsewhere where that matters.) CRC and chain find accidents;
they are no signature.

A round takes 29 + 4 P + 4 k bytes: 61 with P = 5 directions and k = 3 participants. An epoch takes 25, a digest 57.

Kind 4: before this round's move the weights are put on the lattice of quantum 2^exponent, above the quantum so far; it
holds from there on. One record, so that a crash cannot part the two.

Order. Rounds count from 0, epochs from 0. A round record's round is the number of rounds so far, its epoch the current
one. An epoch record (epoch e, round r) voids the rounds from r on and the digests after r rounds; e is above every
epoch before it, r at most the number of rounds so far. A digest record's round is the number of rounds so far; two of
the same round agree.

Durability. With sync="always", when `append` returns the record has been through fsync: it survives a kill of the
process, a crash of the system and a power cut, as far as the disk keeps what it acknowledged (macOS's fsync does not
empty the drive's cache). With sync=n this holds for all but the last n - 1 records, and for all after `flush` or
`close`; with "never", after `flush` alone. A kill of the process alone loses no appended record under any setting.
A power cut may leave the last record torn, and opening cuts it off: a record whose `append` has not returned is there
whole or not at all. Without "always", a power cut may also lose pages out of order; if records that can be read follow
the hole, opening refuses. Bytes that change at rest are found; if they are in the last record they look like a tear,
and reading reports them as such: `cut` and `torn` say how many bytes, look at them after every start.
`create` and `open` also sync the folder's entry and whatever they found in the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import reprlib
import stat
import struct
import sys
import zlib
from array import array
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from hosfl.files import locked, sync_folder

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

MAGIC = b"hosfllog"
VERSION, WITH_BLOCKS = 1, 2
HEADER = struct.Struct("<8sHHII")
MARKER = b"\xabR"  # its first byte is not zero: what never reached the disk reads as zeros
FRAME = struct.Struct("<2sII")
FIELDS = struct.Struct("<BHI")
RATE = struct.Struct("<f")
CHAIN = 8
EXPONENT = struct.Struct("<h")
LAST_EPOCH = 2**16 - 1  # that records and messages have room for
EXPONENTS = -149, 103  # of a quantum of float32 weights: it is a float32 number, and 2^24 of them still are
ROUND, EPOCH, DIGEST, COARSER_ROUND = 1, 2, 3, 4
DISTRIBUTIONS = ("rademacher", "gaussian")
DTYPES = ("float32", "bfloat16", "float16")
LARGEST = sys.float_info.max
LARGEST_DIRECTIONS = 1 << 20
CUT_SHORT = "it is damaged, or was never finished; then no record followed it, and the file may be deleted"

Sync = Literal["always", "never"] | int


class LogError(ValueError):
    """A log, or a record for one, that is not what the format says; nothing was changed by it."""


# --- checks of values ---------------------------------------------------------------------------------------------


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
    """A copy of its own, as it will be read back: tuples become lists."""
    if not isinstance(value, dict):
        raise LogError(f"{what} must be a dict, not {reprlib.repr(value)}")
    return dict(_parsed(_canonical(value, what), what))


# --- header -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A tensor of the client half that moves.

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
        _set(
            self,
            stream=check_integer(self.stream, f"{what}: stream", 0, 2**32 - 1),
            shape=shape,
            dtype=check_choice(self.dtype, f"{what}: dtype", DTYPES),
            factor=check_power_of_two(self.factor, f"{what}: factor"),
            tied=tuple(_name(name, f"{what}: a name in tied") for name in self.tied),
        )


@dataclass(frozen=True)
class Header:
    """What a log's records mean: everything that replay needs beside the base weights.

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
        _set(
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


def _set(instance: object, **values: Any) -> None:
    """Fields of a frozen dataclass, in its __post_init__."""
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
    """A log's header, and where it ends. Raises LogError."""
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


# --- records ------------------------------------------------------------------------------------------------------


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
        _set(self, rate=_rate(self.rate), coefficients=coefficients, participants=participants, **_when(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoundRecord) and _payload(self) == _payload(other)

    def __hash__(self) -> int:
        return hash(_payload(self))


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """The server restarted from a snapshot: rounds from `round` on are void, and `epoch` starts. Raises LogError."""

    epoch: int
    round: int

    def __post_init__(self) -> None:
        _set(self, **_when(self))


@dataclass(frozen=True, slots=True)
class DigestRecord:
    """SHA-256 of the client half after `round` rounds, 32 bytes. Raises LogError."""

    epoch: int
    round: int
    sha256: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, bytes) or len(self.sha256) != 32:
            raise LogError(f"sha256 must be 32 bytes, not {reprlib.repr(self.sha256)}")
        _set(self, **_when(self))


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


def _payload(record: Record) -> bytes:
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


def _decode(payload: bytes, directions: int) -> Record:
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
    """Records as the log has them, without frames: a ninth of what they take as objects, of which a run makes many.

    directions: P, of the rounds. An item is made anew whenever it is asked for.
    """

    def __init__(self, directions: int) -> None:
        self.directions = directions
        self._data, self._ends = bytearray(), array("Q", [0])

    def append(self, record: AnyRecord) -> None:
        self._data += _payload(record)
        self._ends.append(len(self._data))

    def truncate(self, count: int) -> None:
        """Keep the first `count`."""
        del self._ends[count + 1 :]
        del self._data[self._ends[-1] :]

    def payload(self, number: int) -> bytes:
        """A record's body without the chain."""
        return bytes(self._data[self._ends[number] : self._ends[number + 1]])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> AnyRecord: ...
    @overload
    def __getitem__(self, number: slice) -> list[AnyRecord]: ...
    def __getitem__(self, number: int | slice) -> AnyRecord | list[AnyRecord]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        record: AnyRecord = _decode(self.payload(range(len(self))[number]), self.directions)  # type: ignore[assignment]
        return record


class _History:
    """What records add up to, and which may come next."""

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


# --- the file -----------------------------------------------------------------------------------------------------


def _advance(running: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(running + payload, digest_size=32).digest()


def _frame(body: bytes) -> bytes:
    length = struct.pack("<I", len(body))
    return MARKER + length + struct.pack("<I", zlib.crc32(body, zlib.crc32(length))) + body


def _body(data: bytes, at: int) -> bytes | None:
    """The body of the record that starts at `at`; None where there is no whole record with a right checksum."""
    if not data.startswith(MARKER, at) or len(data) < at + FRAME.size:
        return None
    _, length, crc = FRAME.unpack_from(data, at)
    begin = at + FRAME.size
    if length < FIELDS.size + CHAIN or length > len(data) - begin:
        return None
    body = data[begin : begin + length]
    return body if zlib.crc32(body, zlib.crc32(data[at + 2 : at + 6])) == crc else None


@dataclass
class _Content:
    """A log's bytes, understood: `good` of them, and `torn` after these."""

    header: Header
    history: _History
    running: bytes
    good: int
    torn: int


def _parse(data: bytes) -> _Content:
    header, at = decode_header(data)
    history = _History(header)
    running = hashlib.blake2b(data[:at], digest_size=32).digest()
    while (body := _body(data, at)) is not None:
        payload = body[:-CHAIN]
        running = _advance(running, payload)
        try:
            if running[:CHAIN] != body[-CHAIN:]:
                raise LogError("does not continue the records before it: one is missing, repeated or out of order")
            record = _decode(payload, header.directions)
            history.check(record)
        except LogError as error:
            raise LogError(f"record {len(history.records)} at byte {at}: {error}") from None
        history.add(record)
        at += FRAME.size + len(body)
    if at < len(data):
        _check_tail(data, at, len(history.records))
    return _Content(header, history, running, at, len(data) - at)


def _check_tail(data: bytes, at: int, number: int) -> None:
    """Raises LogError unless the bytes from `at` on, which hold no record at `at`, are those of one torn append."""
    later = _next_record(data, at + 1)
    if later is not None:
        raise LogError(f"record {number} at byte {at} is damaged: a valid record follows it at byte {later}")
    if not _torn(data[at:]):
        raise LogError(f"record {number} at byte {at} is damaged: the {len(data) - at} bytes there are no torn append")


def _next_record(data: bytes, at: int) -> int | None:
    """Where the next whole record starts. Bytes made to look like many long records are refused: it would take ages."""
    budget = 16 * len(data) + (1 << 20)
    while (at := data.find(MARKER, at)) >= 0:
        if _body(data, at) is not None:
            return at
        if len(data) >= at + FRAME.size:
            length = FRAME.unpack_from(data, at)[1]
            budget -= length if length <= len(data) - at else 0
        if budget < 0:
            raise LogError(f"around byte {at} are too many beginnings of records to be a torn append: it is damaged")
        at += 1
    return None


def _torn(tail: bytes) -> bool:
    """Whether a tail looks like one torn append: the beginning of a record, the rest missing or zeros.

    Where records are larger than a sector, a later sector may be there without the first: then it starts with zeros.
    """
    written = tail.rstrip(b"\0")
    if not written or tail[0] == 0:
        return True
    length = FRAME.unpack(written[: FRAME.size].ljust(FRAME.size, b"\0"))[1]
    return written[:2] == MARKER[: len(written)] and len(written) <= FRAME.size + length


def _at_once(path: str, flags: int) -> int:
    """Opens also a pipe that nobody writes to, which else is waited for before it can be refused."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read(file: io.FileIO) -> bytes:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise LogError("this is no regular file")
    return file.readall()


def _write(file: io.FileIO, data: bytes, at: int) -> None:
    file.seek(at)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _lock(file: io.FileIO) -> None:
    if not locked(file):
        raise LogError("another writer has this log open; only one may append")


def _interval(sync: Sync) -> int:
    """Records per fsync; 0 for never."""
    if sync == "always":
        return 1
    if sync == "never":
        return 0
    return check_integer(sync, 'sync, where it is not "always" or "never",', 1, 2**31)


class Log:
    """A log: what is in it, and `append`. Made by `create`, `open` or `read`; the rules are the module's.

    path. header. cut: bytes of a torn tail that `open` cut off. torn: bytes of one that `read` passed over.
    Holds all records in memory, as many bytes as the file has. Not for use from several threads at once.
    """

    def __init__(self, path: Path, content: _Content, file: io.FileIO | None, sync: Sync) -> None:
        self.path = path
        self.header = content.header
        self.cut = content.torn if file is not None else 0
        self.torn = content.torn if file is None else 0
        self._history = content.history
        self._running = content.running
        self._nbytes = content.good
        self._file = file
        self._interval = _interval(sync)
        self._unsynced = 0
        self._refusal = "is open for reading only" if file is None else ""

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Header, sync: Sync = "always") -> Log:
        """A new log with no records, on disk when this returns.

        Raises FileExistsError where there is a file already, and OSError where none can be written; then none is left.
        """
        path, data = Path(path), encode_header(header)
        _interval(sync)
        file = io.FileIO(path, "x+")
        try:
            _lock(file)
            _write(file, data, 0)
            os.fsync(file.fileno())
            sync_folder(path.parent)
            return cls(path, _parse(data), file, sync)
        except BaseException:
            file.close()
            path.unlink()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], sync: Sync = "always") -> Log:
        """A log to append to. Every byte is checked, a torn tail cut off, and what stays is on disk when this returns.

        Raises LogError for a log that is damaged, or that another writer has open; then it is as it was.
        """
        path = Path(path)
        _interval(sync)
        file = io.FileIO(path, "r+")
        try:
            content = _locked_content(path, file)
            if content.torn:
                file.truncate(content.good)
            os.fsync(file.fileno())
            sync_folder(path.parent)
            return cls(path, content, file, sync)
        except BaseException:
            file.close()
            raise

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Log:
        """A log to look at: checked as `open` does, and never changed. Takes no lock; another may be appending.

        Raises LogError for a log that is damaged.
        """
        path = Path(path)
        with io.FileIO(path, "r", opener=_at_once) as file:
            content = _content(path, file)
        return cls(path, content, None, "never")

    def append(self, record: Record) -> None:
        """Commit a record; see the module for when it is durable.

        Raises LogError for a record that may not come next, OSError where the disk fails. Either way the log and its
        file hold what they held before. After an fsync that failed nobody knows what the disk holds: then, and where
        the file cannot be brought back, every further append is refused until the log is opened again.
        """
        file = self._writable()
        payload = _payload(record)
        self._history.check(record)
        running = _advance(self._running, payload)
        frame = _frame(payload + running[:CHAIN])
        try:
            _write(file, frame, self._nbytes)
            self._unsynced += 1
            if self._interval and self._unsynced >= self._interval:
                self.flush()
        except BaseException:
            self._roll_back(file)
            raise
        self._nbytes += len(frame)
        self._running = running
        self._history.add(record)

    def _writable(self) -> io.FileIO:
        if self._file is None or self._refusal:
            raise LogError(f"{self.path} {self._refusal}")
        size = os.fstat(self._file.fileno()).st_size
        if size != self._nbytes:
            raise LogError(f"{self.path} has {size} bytes instead of {self._nbytes}: something else changed it")
        return self._file

    def _roll_back(self, file: io.FileIO) -> None:
        try:
            file.truncate(self._nbytes)
        except OSError as error:
            self._refusal = f"could not be brought back to its last record ({error}): open it again"

    def check_file(self) -> None:
        """Whether the file is still this log: LogError where it is gone, replaced, cut or written by something else.

        The last bytes tell: they depend on every record before them.
        """
        file = self._writable()
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            raise LogError(f"{self.path} is gone: something removed it while the run went on") from None
        if not os.path.samestat(there, os.fstat(file.fileno())):
            raise LogError(f"{self.path} was replaced by another file while the run went on")
        if len(self._history.records):
            file.seek(self._nbytes - CHAIN)
            if file.read(CHAIN) != self._running[:CHAIN]:
                raise LogError(f"{self.path} was overwritten while the run went on: it ends with other records")

    def flush(self) -> None:
        """Make every record appended so far durable. Raises OSError; then the log takes no more records."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._refusal = f"could not be synced ({error}): open it again"
            raise
        self._unsynced = 0

    def close(self) -> None:
        """Sync, unless sync="never", and let the file and its lock go. What was read stays. Twice is harmless."""
        file = self._file
        if file is None:
            return
        try:
            if self._interval and self._unsynced:
                self.flush()
        finally:
            self._file, self._refusal = None, "is closed"
            file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def records(self) -> list[Record]:
        """All records in the file's order, void ones too."""
        return list(self._history.records)

    @property
    def position(self) -> tuple[int, str]:
        """How many records there are, and the running digest after them: see `digest_after`."""
        return len(self._history.records), self.digest

    def digest_after(self, records: int) -> str:
        """The running digest as it was after the first so many records. LogError where there are fewer."""
        if not 0 <= records <= len(self._history.records):
            raise LogError(f"{self.path} holds {len(self._history.records)} records, not {records}")
        running = hashlib.blake2b(encode_header(self.header), digest_size=32).digest()
        for number in range(records):
            running = _advance(running, self._history.records.payload(number))
        return running.hex()

    @property
    def epochs(self) -> list[tuple[int, int]]:
        """(epoch, its first round) of every restart: rounds of earlier epochs from there on are void."""
        return list(self._history.epochs)

    @property
    def rounds(self) -> list[RoundRecord]:
        """The rounds that are committed now: rounds[t].round == t."""
        return [self._history.records[number] for number in self._history.rounds]  # type: ignore[misc]

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._history.epoch

    @property
    def digests(self) -> dict[int, bytes]:
        """Number of rounds -> SHA-256 of the client half after them; those of void rounds left out."""
        return dict(self._history.digests)

    @property
    def digest(self) -> str:
        """The running digest after the last record, 64 hexadecimal digits: equal means equal logs."""
        return self._running.hex()

    @property
    def nbytes(self) -> int:
        """Bytes of the header and all records; the file's size, but for a torn tail that `read` passed over."""
        return self._nbytes


def _content(path: Path, file: io.FileIO) -> _Content:
    try:
        return _parse(_read(file))
    except LogError as error:
        raise LogError(f"{path}: {error}") from None


def _locked_content(path: Path, file: io.FileIO) -> _Content:
    try:
        _lock(file)
    except LogError as error:
        raise LogError(f"{path}: {error}") from None
    return _content(path, file)
