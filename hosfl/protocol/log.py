"""`hosfl.log`: an append-only file of the numbers that moved the client half. With the base weights it is a checkpoint.

Little-endian:

    file    header  record ...
    header  see `header.py`
    record  ab 52  length u32  crc u32  body[length]
    body    payload  chain[8]
    payload see `records.py`

A record's crc is CRC-32 of its length and its body, so that a damaged length cannot pass for a torn tail. The running
digest starts as BLAKE2b-256 of the header's bytes and becomes BLAKE2b-256(running digest, payload) with every record;
`chain` is its first 8 bytes, so that records removed, repeated, exchanged or taken from another log are found. (Records
removed from the end leave a shorter log that is valid: compare `Log.digest` with one kept elsewhere where that
matters.) CRC and chain find accidents; they are no signature.

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
import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from hosfl.files import naming, open_nonblocking, sync_folder, try_lock
from hosfl.protocol.header import Header, LogError, check_integer, decode_header, encode_header
from hosfl.protocol.records import FIELDS, History, Packed, Record, RoundRecord, decode_record, encode_record

MARKER = b"\xabR"  # its first byte is not zero: what never reached the disk reads as zeros
FRAME = struct.Struct("<2sII")
CHAIN = 8

Sync = Literal["always", "never"] | int


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
    """A parsed log. good: the number of its valid bytes; torn: of those after them."""

    header: Header
    history: History
    running: bytes
    good: int
    torn: int


def _parse(data: bytes) -> _Content:
    header, at = decode_header(data)
    history = History(header)
    running = hashlib.blake2b(data[:at], digest_size=32).digest()
    while (body := _body(data, at)) is not None:
        payload = body[:-CHAIN]
        running = _advance(running, payload)
        try:
            if running[:CHAIN] != body[-CHAIN:]:
                raise LogError("does not continue the records before it: one is missing, repeated or out of order")
            record = decode_record(payload, header.directions)
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
    """Where the next whole record starts. Raises LogError for bytes that look like too many long records to check."""
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

    If records are larger than a sector, a later sector may have been written without the first: it starts with zeros.
    """
    written = tail.rstrip(b"\0")
    if not written or tail[0] == 0:
        return True
    length = FRAME.unpack(written[: FRAME.size].ljust(FRAME.size, b"\0"))[1]
    return written[:2] == MARKER[: len(written)] and len(written) <= FRAME.size + length


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
    if not try_lock(file):
        raise LogError("another writer has this log open; only one may append")


def _interval(sync: Sync) -> int:
    """Records per fsync; 0 for never."""
    if sync == "always":
        return 1
    if sync == "never":
        return 0
    return check_integer(sync, 'sync, where it is not "always" or "never",', 1, 2**31)


class Log:
    """A log of the client half's moves, hosfl.log. Make one by `create`, `open` or `read`.

        log = hosfl.Log.read("runs/own/hosfl.log")
        for record in log.rounds:
            print(record.round, record.rate, record.coefficients)

    All records are in memory, as many bytes as the file has. Not thread-safe. `hosfl.protocol.log` says when an append
    is durable, and which damage is found.

    Attributes:
        path: of the file.
        header: says what its records mean.
        cut: bytes of a torn tail that `open` cut off.
        torn: bytes of a torn tail that `read` ignored.
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
        """Create a log without records; it is on disk when this returns.

        Raises FileExistsError if there is a file already, OSError if none can be written; then none is left.
        """
        path, data = Path(path), encode_header(header)
        _interval(sync)
        file = io.FileIO(path, "x+")
        try:
            _lock(file)
            with naming(path):
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
        """Open a log to append to it. Checks every byte, cuts a torn tail off, and syncs the rest to disk.

        Raises LogError for a log that is damaged, or that another writer has open; then the file is unchanged.
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
        """Read a log, with the checks of `open`, without changing or locking the file, to which others may append.

        Raises LogError for a log that is damaged.
        """
        path = Path(path)
        with io.FileIO(path, "r", opener=open_nonblocking) as file:
            content = _content(path, file)
        return cls(path, content, None, "never")

    def append(self, record: Record) -> None:
        """Commit a record; see the module for when it is durable.

        Raises LogError for a record that may not come next, OSError if the disk fails. Either way log and file are as
        they were before. After a failed fsync it is unknown what the disk has: then, and if the file cannot be rolled
        back, every further append is refused until the log is opened again.
        """
        file = self._writable()
        payload = encode_record(record)
        self._history.check(record)
        running = _advance(self._running, payload)
        frame = _frame(payload + running[:CHAIN])
        try:
            with naming(self.path):
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
        """Raises LogError if the file was removed, replaced, truncated or written by something else.

        It compares the last bytes, which depend on every record before them.
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
            with naming(self.path):
                os.fsync(self._file.fileno())
        except OSError as error:
            self._refusal = f"could not be synced ({error}): open it again"
            raise
        self._unsynced = 0

    def close(self) -> None:
        """Sync, unless sync="never", and close and unlock the file. Records stay readable. May be called twice."""
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
    def records(self) -> Packed[Record]:
        """All records in the file's order, void ones too."""
        return self._history.records[:]

    @property
    def position(self) -> tuple[int, str]:
        """(number of records, the running digest after them): see `digest_after`."""
        return len(self._history.records), self.digest

    def digest_after(self, records: int) -> str:
        """The running digest after the first `records` records. Raises LogError if there are fewer."""
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
    def rounds(self) -> Packed[RoundRecord]:
        """The committed rounds that are not void: rounds[t].round == t."""
        return self._history.records.picked(self._history.rounds)

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
