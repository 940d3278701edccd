"""A client's state on disk, so that a restarted client need not replay the whole log."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from safetensors import SafetensorError, safe_open

from hosfl.files import regular, write_atomically
from hosfl.protocol.arrays import Array, is_tensor
from hosfl.protocol.endpoint import ClientProtocol
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.replica import Replica, ReplicaState
from hosfl.protocol.weights import Weights, as_file

SAVE_EVERY = 60.0  # seconds; the rounds since the last save are replayed after a restart
STATE_FORMAT = "3"  # files of other formats are ignored: the client then replays the whole log
log = logging.getLogger("hosfl.join")


@runtime_checkable
class ReplicaClient(ClientProtocol, Protocol):
    """A client that holds a replica."""

    replica: Replica

    def load(self, state: ReplicaState) -> None:
        """Become a copy of another replica of the run."""


class SavedState:
    """A client's state in a file. Without the file a restarted client only takes longer to catch up.

    A safetensors file with the trainable tensors, 0.0, 0.1, ..., then each of their moments, 1.0, 1.1, .... Its
    metadata have the values that `save` writes, as text, and a digest. run: the run's id.
    """

    def __init__(self, path: Path, run: bytes, client: ClientProtocol) -> None:
        self.path, self.run, self.client = path, run.hex(), client
        self._saved_at = time.monotonic()

    def restore(self) -> None:
        """Load the file into the client. A missing, damaged or foreign file is ignored; the last two with a warning."""
        client = self.client
        if not isinstance(client, ReplicaClient) or not self.path.exists():
            return
        replica = client.replica
        try:
            torch = all(map(is_tensor, replica.tensors))
            with safe_open(regular(self.path), "pt" if torch else "np") as file:
                metadata, read = file.metadata(), file.get_tensor if torch else Weights(self.path).__getitem__
                if metadata["format"] != STATE_FORMAT:
                    raise ValueError("another version wrote it")
                if metadata["run"] != self.run or metadata["client"] != str(client.number):
                    raise ValueError("it is of another run")
                groups = [
                    [read(f"{group}.{n}") for n in range(len(replica.tensors))]
                    for group in range(1 + len(replica.moments))
                ]
            quantum = float(metadata["quantum"]) if metadata["quantum"] else None
            applied, epoch = int(metadata["applied"]), int(metadata["epoch"])
            if applied < 0 or epoch < 0:
                raise ValueError(f"it is of round {applied}, epoch {epoch}")
            current = [[*replica.tensors], *replica.moments]
            for saved, tensors in zip(groups, current, strict=True):
                if any(s.shape != t.shape or s.dtype != t.dtype for s, t in zip(saved, tensors, strict=True)):
                    raise ValueError("it is of another half")
            lattice = None if quantum is None else Lattice(quantum)
            client.load(ReplicaState(groups[0], groups[1:], applied, epoch, lattice))
            if metadata["digest"] != _digest(metadata, replica):
                raise ValueError("its digest is another")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is passed over: %s", self.path, error)
            client.reset()

    def save(self, due: bool = True) -> None:
        """Write the file, unless no round has been applied. A failure to write is only a warning.

        due: False: not again within `SAVE_EVERY` seconds.
        """
        client = self.client
        if not isinstance(client, ReplicaClient) or (not due and time.monotonic() - self._saved_at < SAVE_EVERY):
            return
        replica = client.replica
        if not replica.applied:
            return  # the weights are the base's, or are being reset to them
        groups: Sequence[Sequence[Array]] = [replica.tensors, *replica.moments]
        tensors = {f"{g}.{n}": tensor for g, group in enumerate(groups) for n, tensor in enumerate(group)}
        metadata = {
            "format": STATE_FORMAT,
            "run": self.run,
            "client": str(client.number),
            "applied": str(replica.applied),
            "epoch": str(replica.epoch),
            "quantum": "" if replica.lattice is None else repr(replica.lattice.quantum),
        }
        metadata["digest"] = _digest(metadata, replica)
        try:
            write_atomically(self.path, as_file(tensors, metadata))
        except OSError as error:
            log.warning("%s cannot be written: %s; a restart would replay more", self.path, error)
        self._saved_at = time.monotonic()


def _digest(metadata: Mapping[str, str], replica: Replica) -> str:
    """Return the digest of a state: SHA-256 of its metadata without "digest", as JSON, then the replica's digest."""
    text = json.dumps({name: value for name, value in metadata.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode() + replica.digest()).hexdigest()
