"""Provenance: digests of what a run was made of, so that parts of two runs cannot be put together."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hosfl.files import sync_folder
from hosfl.protocol.header import Header, LogError
from hosfl.protocol.log import Log
from hosfl.settings import decisive, differences


class ProvenanceError(ValueError):
    """Files or data of different runs were put together; nothing was changed."""


@dataclass(frozen=True)
class Provenance:
    """What a run's bits depend on.

    settings: see `Settings.decisive`. data: SHA-256 of all samples, as the model gets them. model: SHA-256 of both
    halves' weights as the task makes them. log: SHA-256 of the log's header; empty if the method has no log.
    """

    settings: dict[str, Any]
    data: str
    model: str
    log: str

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def check(self, found: Any, what: object) -> None:
        """Raises ProvenanceError, saying what differs, unless `found`, the provenance in `what`, equals this one."""
        if not isinstance(found, Mapping) or not isinstance(found.get("settings"), Mapping):
            raise ProvenanceError(f"{what} does not say what run it is of: take it away, or start anew elsewhere")
        differs = differences(found["settings"], self.settings)
        for part, called in (("data", "the data"), ("model", "the model's first weights")):
            if found.get(part) != getattr(self, part):
                differs.append(f"{called} were others")
        if not differs and found.get("log") != self.log:
            differs.append("its log begins with another header")
        if differs:
            raise ProvenanceError(f"{what} is of another run: {'; '.join(differs)}. Put that back, or start anew")


ID = 8  # bytes


def new_id() -> bytes:
    """A random id for a run: two runs of equal provenance have equal digests, but other rounds."""
    return secrets.token_bytes(ID)


def read_id(digits: Any) -> bytes:
    """Parse an id from its hexadecimal digits. Raises ValueError."""
    if not isinstance(digits, str) or len(id := bytes.fromhex(digits)) != ID:
        raise ValueError(f"{2 * ID} hexadecimal digits are needed")
    return id


def header_digest(header: Header) -> str:
    """SHA-256 of a log's header, without the settings that the bits do not depend on."""
    return hashlib.sha256(repr(replace(header, settings=decisive(header.settings))).encode()).hexdigest()


def open_log(folder: Path, header: Header) -> Log:
    """Open a run's log: the one in its folder, which must have this header, or a new one, which is created atomically.

    Raises LogError, saying what differs, for the log of another run.
    """
    path = folder / "hosfl.log"
    if not path.exists():
        temporary = path.with_name("hosfl.log.tmp")
        temporary.unlink(missing_ok=True)
        Log.create(temporary, header).close()
        temporary.replace(path)
        sync_folder(folder)
    log = Log.open(path)
    if header_digest(log.header) != header_digest(header):
        log.close()
        found = differences(decisive(log.header.settings), header.settings) or [
            "the model's first weights or their lattice were others"
        ]
        raise LogError(f"{path} is the log of another run: {'; '.join(found)}")
    return log
