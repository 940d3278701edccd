"""A run whose clients are on other machines: the files that they fetch, and two files about the run's progress.

status.json    the current state: connected clients, round, loss, bytes, refusals
events.jsonl   a line per round: which clients were asked, took part, or did not and why; seconds by phase, bytes
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hosfl.engines.engine import Engine
from hosfl.engines.joining import FORMAT
from hosfl.extras import require
from hosfl.files import finite, naming, write_json
from hosfl.methods import calibration
from hosfl.methods.client import digested_tensors
from hosfl.methods.ho import ZerothOrderClient
from hosfl.methods.ledger import SeedReplay
from hosfl.protocol.header import encode_header
from hosfl.protocol.provenance import header_digest
from hosfl.runs.checkpoint import make_header, module_bytes

if TYPE_CHECKING:
    from hosfl.runs.federation import Federation

LONGEST_DEADLINE = 7 * 24 * 3600  # seconds; platforms limit the time of a wait to some weeks
LOCAL = (
    "data",
    "model",
    "device",
    "evaluate_every",
    "snapshot_every",
    "keep",
)  # settings that each machine has its own of


@dataclass(frozen=True)
class Transport:
    """How a run reaches its clients.

    Args:
        engine: carries the messages; or a function that makes it from the files that clients may fetch, by name, and
            the number of clients.
        deadline: seconds for each of a round's two exchanges, and for running statistics before the first round; None:
            no limit.
        enough: the number of cuts, and of answers, with which a round goes on without the remaining clients; None: all.
        least: the number of clients that must be connected before a round begins.
        patient: whether a round in which no cut could be learnt from is tried again after a pause, possibly with other
            clients. False: it counts, as in one process.
        edge: whether clients without torch may take part too.

    Raises:
        ValueError: a number is out of range.
    """

    engine: Engine | Callable[[dict[str, bytes], int], Engine]
    deadline: float | None = None
    enough: int | None = None
    least: int = 1
    patient: bool = True
    edge: bool = False

    def __post_init__(self) -> None:
        if self.deadline is not None and not 0 < self.deadline <= LONGEST_DEADLINE:
            raise ValueError(
                f"deadline must be a positive number of seconds, at most {LONGEST_DEADLINE}, got {self.deadline}"
            )
        for name in ("enough", "least"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check(self, clients: int) -> None:
        """Raises ValueError if `enough` or `least` is greater than the number of clients."""
        for name in ("enough", "least"):
            if (value := getattr(self, name)) is not None and value > clients:
                raise ValueError(f"{name} must be at most {clients}, the clients that may be here, got {value}")

    def connect(self, federation: Federation) -> None:
        """Make the federation use the engine, and offer clients the files that they need to join.

        Raises ValueError as `check` does, and if `edge` is set for a run in which such clients cannot take part.
        """
        self.check(federation.config.clients)
        files = offered_files(federation, self.edge)
        engine = self.engine(files, federation.config.clients) if callable(self.engine) else self.engine
        engine.limit(federation.server.largest_message)
        engine.offer(files)
        federation.messenger.engine, federation.messenger.deadline = engine, self.deadline
        federation.enough, federation.least = self.enough, self.least


def offered_files(federation: Federation, edge: bool = False) -> dict[str, bytes]:
    """Return the files that a client fetches to join: "run", as JSON, and "base", the base half, as safetensors.

    edge: add the files that clients without torch need. Raises ValueError for a run in which they cannot take part.

    In the run, "cut" is the shape of one sample's cut; for texts, that of the longest that the server accepts. "labels"
    describes the labels that it accepts. "measures": see `Measures`; null if the method has no log.

    Running statistics that clients estimate are in neither file: a client gets them when it takes part.
    """
    half = calibration.initial_half(federation.base, federation.server.statistics)
    base = module_bytes(half)
    edge_files, description = _edge_files(federation, half) if edge else ({}, None)
    config, server, ledger = federation.config, federation.server, federation.server.ledger
    log, measures = "", None
    if isinstance(ledger, SeedReplay):
        measures = asdict(ledger.run.measures)
        log = header_digest(make_header(ledger.run, half, config.decisive()))
    settings = {name: value for name, value in asdict(config).items() if name not in LOCAL}
    run = {
        "format": FORMAT,
        "id": federation.id.hex(),
        "hosfl": version("hosfl"),
        "settings": settings,
        "base": _sha256(base),
        "log": log,
        "measures": measures,
        "edge": description,
        "cut": list(server.cuts.shape),
        "labels": {
            "shape": list(server.cuts.label_shape),
            "real": server.cuts.real,
            "classes": server.cuts.classes,
            "ignore_index": server.cuts.ignore_index,
        },
    }
    return {"run": json.dumps(run).encode(), "base": base} | edge_files


def _edge_files(federation: Federation, half: nn.Module) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files for clients without torch, by name, and the run's field "edge", which describes them."""
    edge = require("hosfl.edge.join", "a server of clients without torch", "export")
    export_half = require("hosfl.edge.export", "a server of clients without torch", "export").export_half
    if reason := edge.unsupported_reason(federation.config):
        raise ValueError(reason)
    client, gradient = federation.make_client(0), None
    assert isinstance(federation.server.ledger, SeedReplay)
    assert isinstance(client, ZerothOrderClient)
    header = encode_header(make_header(federation.server.ledger.run, half, federation.config.decisive()))
    sample, entries = client.batch(0)[0], [begin.entry for begin in client.begins]
    if federation.config.device != "cpu":
        half, sample = copy.deepcopy(half).cpu(), tree_map_only(Tensor, Tensor.cpu, sample)
    limits = federation.config.batch, federation.server.cuts.shape[0] if federation.server.cuts.masked else 0
    backward = federation.config.estimator == "backward"
    running = list(calibration.running(half)) if federation.config.calibrate else []
    pieces = export_half(half, sample, entries, limits, backward, running)
    files = {edge.graph_name(number): data for number, data in enumerate(pieces)}
    description: dict[str, Any] = {"graphs": [_sha256(data) for data in files.values()], "header": _sha256(header)}
    files[edge.HEADER] = header
    if backward:
        exporter = require("hosfl.edge.backward", "a server of clients without torch", "export")
        files[edge.GRADIENT] = gradient = exporter.export_gradient(half, sample, entries[0], limits, running)
    description |= {"gradient": None if gradient is None else _sha256(gradient), "digest": list(digested_tensors(half))}
    description |= {"running": running, "statistics": None}
    if running:
        batch_statistics = require("hosfl.edge.batch_statistics", "a server of clients without torch", "export")
        files[edge.STATISTICS] = statistics = batch_statistics.export_statistics(half, sample, limits)
        description["statistics"] = _sha256(statistics)
    return files, description


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Events:
    """Writes a run's events.jsonl, and its status.json for `hosfl status`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._begin = folder, time.time()
        self._status_written_at = -math.inf  # by time.monotonic()
        self._waiting_round = -1  # the last round for which a warning about waiting was logged

    def round(self, federation: Federation, done: int, loss: float) -> None:
        """Write a finished round."""
        event = {
            "time": round(time.time(), 3),
            "round": done,
            "loss": loss,
            "asked": federation.asked,
            "took part": federation.took_part,
            "missing": {str(client): reason for client, reason in sorted(federation.messenger.failures.items())},
            "seconds": {phase: round(seconds, 4) for phase, seconds in federation.seconds.items()},
            "bytes": sum(federation.messenger.wire.bytes.values()),
            "refused": federation.server.refused.total,
            "complaints": federation.messenger.complaints.total,
        }
        _add_line(self.folder / "events.jsonl", json.dumps(finite(event)).encode())
        self._write_status(federation, done, event, due=done == federation.config.rounds)

    def waiting(self, federation: Federation, done: int) -> None:
        """Write the status of a run that waits: for clients, or for the next try of a round."""
        event: dict[str, Any] = {"waiting for": federation.least}
        if federation.tries:
            failures = federation.messenger.failures
            missing = {str(client): failures.get(client, "left out") for client in federation.asked}
            event |= {"tried": federation.tries, "missing": missing}
        elif self._waiting_round != done:
            self._waiting_round, present = done, len(federation.messenger.engine.present())
            logging.warning(
                "round %d waits for clients: %d of at least %d are here", done + 1, present, federation.least
            )
        self._write_status(federation, done, event)

    def _write_status(self, federation: Federation, done: int, event: dict[str, Any], due: bool = False) -> None:
        """Write status.json, at most every half second unless `due`."""
        now = time.monotonic()  # not time.time(), which may be set back
        if not due and now - self._status_written_at < 0.5:
            return
        self._status_written_at = now
        status = {
            "round": done,
            "rounds": federation.config.rounds,
            "here": sorted(federation.messenger.engine.present()),
            "clients": federation.config.clients,
            "last": event,
            "missing": federation.messenger.missing,
            "refused": federation.server.refused[-10:],
            "complaints": federation.messenger.complaints[-10:],
            "bytes": dict(federation.messenger.wire.bytes),
            "since": self._begin,
            "time": time.time(),
        }
        write_json(self.folder / "status.json", status)


def _add_line(path: Path, line: bytes) -> None:
    """Append a line to a file, after a line end if its last line is incomplete, as after a kill."""
    with naming(path), path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                line = b"\n" + line
        file.write(line + b"\n")
