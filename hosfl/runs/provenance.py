"""What a run was made of. Whatever is put together from two runs is refused, with what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hosfl.runs.config import differences


class ProvenanceError(ValueError):
    """Two things that are to go together are of different runs; nothing was changed."""


@dataclass(frozen=True)
class Provenance:
    """What a run's bits follow from.

    settings: those that the bits depend on, see `Config.settings`. data: SHA-256 of the content of all samples, as the
    model gets them. model: SHA-256 of both halves' weights as the task makes them. log: SHA-256 of the log's header;
    empty where the method has no log.
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
        """Raises ProvenanceError unless `found`, which `what` carries, is this very provenance; says what differs."""
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
