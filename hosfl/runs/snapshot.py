"""Snapshots of the server: `snapshot-00000120.safetensors` is its state after 120 rounds. Nothing is pickled.

A snapshot has tensors and `info`, a JSON object, in one safetensors file. The file's metadata are

    format  "hosfl snapshot 1"
    round   decimal
    info    JSON; floats are Python's repr, which reads back as the same double
    digest  SHA-256 of round, info and tensors, since safetensors has no checksum

Durability: a snapshot is written under another name, synced, renamed, and the folder synced. When `save` returns, it
survives a power cut. A `save` that is interrupted leaves older snapshots as they were, and a temporary file that the
next one removes. A folder has one writer. Any program that knows safetensors can read the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hosfl.files import regular, sync_folder
from hosfl.methods.state import SnapshotError, check_tensor

FORMAT = "hosfl snapshot 1"
NAME = re.compile(r"snapshot-(\d{8,})\.safetensors")
TEMPORARY = "snapshot-*.safetensors.tmp"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The server's state after `round` rounds: tensors on the CPU, which share no memory with the file, and info."""

    round: int
    tensors: dict[str, Tensor]
    info: dict[str, Any]


def save(
    folder: str | os.PathLike[str], round: int, tensors: Mapping[str, Tensor], info: dict[str, Any], keep: int = 3
) -> Path:
    """Write the snapshot of `round`, replacing an older one of it, and return its path. It is durable on return.

    tensors: dense, on any device; those that share memory are stored separately. Those that are not contiguous on the
    CPU are copied. info: values that JSON returns unchanged: no tuples, no keys other than strings, no NaN. keep: the
    number of snapshots up to this round that remain; those of later rounds are not touched.

    Raises SnapshotError for values that cannot be stored, and for a write that fails.
    """
    if isinstance(round, bool) or not isinstance(round, int) or round < 0 or keep < 1:
        raise SnapshotError(f"round must be at least 0 and keep at least 1, not {round!r} and {keep!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dense, text = _dense(tensors), _encode_info(info)
    metadata = {"format": FORMAT, "round": str(round), "info": text, "digest": _digest(round, text, dense)}
    path = folder / f"snapshot-{round:08d}.safetensors"
    _write(path, dense, metadata)
    for old in [p for r, p in _snapshots(folder) if r <= round][keep:]:
        old.unlink()
    for stale in folder.glob(TEMPORARY):
        stale.unlink()
    return path


def load(path: str | os.PathLike[str]) -> Snapshot:
    """Read a snapshot and check its digest. Raises SnapshotError with the path and the reason."""
    path = Path(path)
    try:
        with safe_open(regular(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # Copies, since safetensors maps the file, and the tensors would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        raise SnapshotError(f"{path} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise SnapshotError(f"{path} is no snapshot: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    text, number = metadata.get("info", ""), metadata.get("round", "")
    if not re.fullmatch(r"[0-9]{1,18}", number) or metadata.get("digest") != _digest(int(number), text, tensors):
        raise SnapshotError(f"{path} is damaged: its digest is wrong")
    named = NAME.fullmatch(path.name)
    if named and int(named[1]) != int(number):
        raise SnapshotError(f"{path} holds round {number}: it was renamed")
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path}: its info is no JSON: {error}") from None
    if not isinstance(info, dict):
        raise SnapshotError(f"{path}: its info must be an object, not {text[:80]}")
    return Snapshot(int(number), tensors, info)


def latest(folder: str | os.PathLike[str], objection: Callable[[Snapshot], str] = lambda saved: "") -> Snapshot | None:
    """Load the newest valid snapshot to which there is no objection; None if there is none.

    objection: returns why a snapshot cannot be used, or ""; what it raises is raised. Snapshots that are skipped give a
    warning with file and reason.
    """
    for _, path in _snapshots(Path(folder)):
        try:
            saved = load(path)
        except SnapshotError as error:
            reason = str(error)
        else:
            problem = objection(saved)
            if not problem:
                return saved
            reason = f"{path} {problem}"
        warnings.warn(f"passed over a snapshot: {reason}", stacklevel=2)
    return None


def set_aside(folder: str | os.PathLike[str], after: int) -> None:
    """Rename snapshots of rounds after `after` to NAME.void: the run resumes from that round, and they are not its."""
    for round, path in _snapshots(Path(folder)):
        if round > after:
            path.replace(path.with_name(path.name + ".void"))


def _snapshots(folder: Path) -> list[tuple[int, Path]]:
    """List (round, path) of the snapshots in a folder, newest first."""
    if not folder.is_dir():
        return []
    matches = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise SnapshotError(f"{path} cannot be written: {error}") from error


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make tensors contiguous on the CPU, with no shared memory."""
    dense: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        dense[name] = value
    return dense


def _encode_info(info: dict[str, Any]) -> str:
    """Encode info as JSON. Raises SnapshotError for values that do not survive it unchanged."""
    try:
        text = json.dumps(info, sort_keys=True, separators=(",", ":"), allow_nan=False)
        unchanged = json.loads(text) == info
    except (TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(f"info cannot be written as JSON: {error}") from None
    if not unchanged:
        raise SnapshotError("info does not come back from JSON as it was: a tuple, or a key that is no string?")
    return text


def _digest(round: int, text: str, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps([round, text]).encode() + b"\n")
    for name, tensor in sorted(tensors.items()):
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
