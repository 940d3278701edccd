"""A run whose clients are elsewhere: what they are offered, and what of it is written down.

status.json    how the run stands now: who is here, round, loss, bytes, what was refused
events.jsonl   a line per round: who was asked, who took part, who did not and why, seconds by phase, bytes
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosfl.engines.engine import Engine
from hosfl.files import finite, write_json
from hosfl.protocol.provenance import header_digest

if TYPE_CHECKING:
    from hosfl.runs.federation import Federation

FORMAT = 1  # of what is offered
LOCAL = ("data", "model", "device", "evaluate_every", "snapshot_every", "keep")  # settings that are a machine's own


@dataclass(frozen=True)
class Over:
    """How a run reaches its clients.

    engine: who carries the messages; or what makes it of what clients are offered, by name, and of their number.
    deadline: seconds for each of a round's two exchanges. enough: cuts, and answers, with which a round goes on without
    the rest; None: all. least: clients that have to be here before a round begins.
    """

    engine: Engine | Callable[[dict[str, bytes], int], Engine]
    deadline: float | None = None
    enough: int | None = None
    least: int = 1

    def __post_init__(self) -> None:
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline must be a positive number of seconds, got {self.deadline}")
        for name in ("enough", "least"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def reach(self, federation: Federation, folder: Path) -> None:
        """Let the federation's messages go through the engine, and offer clients what they begin with.

        Raises ValueError for a run that needs its clients here.
        """
        if federation.config.calibrate:
            raise ValueError("calibrate needs all clients in one process: leave it out, or train without an engine")
        files = offered(federation, folder)
        engine = self.engine(files, federation.config.clients) if callable(self.engine) else self.engine
        engine.offer(files)
        federation.engine, federation.deadline = engine, self.deadline
        federation.enough, federation.least = self.enough, self.least


def offered(federation: Federation, folder: Path) -> dict[str, bytes]:
    """What a client fetches when it comes for the first time: the run, as JSON, and the base half, as safetensors."""
    base = (folder / "base.safetensors").read_bytes()
    settings = {name: value for name, value in asdict(federation.config).items() if name not in LOCAL}
    run = {
        "format": FORMAT,
        "hosfl": version("hosfl"),
        "settings": settings,
        "base": hashlib.sha256(base).hexdigest(),
        "log": "" if federation.header is None else header_digest(federation.header),
    }
    return {"run": json.dumps(run).encode(), "base": base}


class Events:
    """What is written of a run's rounds, for `hosfl status` and whoever reads JSON lines."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._begin, self._told = folder, time.time(), 0.0

    def round(self, federation: Federation, done: int, loss: float) -> None:
        """A round is over."""
        event = {
            "time": round(time.time(), 3),
            "round": done,
            "loss": loss,
            "asked": federation.asked,
            "took part": federation.took_part,
            "missing": {str(client): why for client, why in sorted(federation.why.items())},
            "seconds": {phase: round(spent, 4) for phase, spent in federation.seconds.items()},
            "bytes": sum(federation.wire.bytes.values()),
            "refused": federation.server.refusals,
            "complaints": federation.complaints,
        }
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(finite(event)) + "\n")
        self._status(federation, done, event, due=done == federation.config.rounds)

    def waiting(self, federation: Federation, done: int) -> None:
        """Too few clients are here for a round."""
        self._status(federation, done, {"waiting for": federation.least})

    def _status(self, federation: Federation, done: int, event: dict[str, Any], due: bool = False) -> None:
        if not due and time.time() - self._told < 0.5:
            return
        self._told = time.time()
        status = {
            "round": done,
            "rounds": federation.config.rounds,
            "here": sorted(federation.engine.present()),
            "clients": federation.config.clients,
            "last": event,
            "missing": federation.missing,
            "refused": federation.server.refused[-10:],
            "complaints": federation.complained[-10:],
            "bytes": dict(federation.wire.bytes),
            "since": self._begin,
            "time": self._told,
        }
        write_json(self.folder / "status.json", status)
