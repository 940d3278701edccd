"""A run whose clients are elsewhere: what they are offered, and what of it is written down.

status.json    how the run stands now: who is here, round, loss, bytes, what was refused
events.jsonl   a line per round: who was asked, who took part, who did not and why, seconds by phase, bytes
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
from hosfl.extras import needed
from hosfl.files import finite, naming, write_json
from hosfl.methods import calibration
from hosfl.methods.client import digest_tensors
from hosfl.methods.ho import ZerothOrderClient
from hosfl.methods.ledger import SeedReplay
from hosfl.protocol.header import encode_header
from hosfl.protocol.provenance import header_digest
from hosfl.runs.checkpoint import header_of, module_bytes

if TYPE_CHECKING:
    from hosfl.runs.federation import Federation

LONGEST = 7 * 24 * 3600  # seconds of a deadline: platforms wait for some weeks at most, and for infinity not at all
LOCAL = ("data", "model", "device", "evaluate_every", "snapshot_every", "keep")  # settings that are a machine's own


@dataclass(frozen=True)
class Transport:
    """How a run reaches its clients.

    Args:
        engine: who carries the messages; or what makes it of what clients are offered, by name, and of their number.
        deadline: seconds for each of a round's two exchanges, and for running statistics before the first; None: no
            end.
        enough: cuts, and answers, with which a round goes on without the rest; None: all.
        least: clients that have to be here before a round begins.
        patient: a round in which no cut could be learnt from does not count, and is tried again after a pause: others
            may come. False: it counts, as in one process.
        edge: clients without torch may take part too.

    Raises:
        ValueError: a number out of range.
    """

    engine: Engine | Callable[[dict[str, bytes], int], Engine]
    deadline: float | None = None
    enough: int | None = None
    least: int = 1
    patient: bool = True
    edge: bool = False

    def __post_init__(self) -> None:
        if self.deadline is not None and not 0 < self.deadline <= LONGEST:
            raise ValueError(f"deadline must be a positive number of seconds, at most {LONGEST}, got {self.deadline}")
        for name in ("enough", "least"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check(self, clients: int) -> None:
        """Raises ValueError where more clients are waited for than can ever be here."""
        for name in ("enough", "least"):
            if (value := getattr(self, name)) is not None and value > clients:
                raise ValueError(f"{name} must be at most {clients}, the clients that may be here, got {value}")

    def connect(self, federation: Federation) -> None:
        """Let the federation's messages go through the engine, and offer clients what they begin with.

        Raises ValueError as `check` does, and for a run that clients without torch cannot take part in.
        """
        self.check(federation.config.clients)
        files = offered(federation, self.edge)
        engine = self.engine(files, federation.config.clients) if callable(self.engine) else self.engine
        engine.limit(federation.server.largest_message)
        engine.offer(files)
        federation.messenger.engine, federation.messenger.deadline = engine, self.deadline
        federation.enough, federation.least = self.enough, self.least


def offered(federation: Federation, edge: bool = False) -> dict[str, bytes]:
    """What a client fetches when it comes for the first time: the run, as JSON, and the base half, as safetensors.

    edge: what clients without torch need is among it. Raises ValueError for a run in which they cannot take part.

    "cut" is the shape of one sample's cut; of texts, of the longest that the server takes. "labels" are those that
    it takes. "measures": see `Measures`; null where the method has no log.

    Running statistics that clients estimate are in neither: a client is told them when it takes part.
    """
    half = calibration.initial_half(federation.base, federation.server.statistics)
    base = module_bytes(half)
    for_edge, told = _for_edge(federation, half) if edge else ({}, None)
    config, server, ledger = federation.config, federation.server, federation.server.ledger
    log, measures = "", None
    if isinstance(ledger, SeedReplay):
        measures = asdict(ledger.run.measures)
        log = header_digest(header_of(ledger.run, half, config.decisive()))
    settings = {name: value for name, value in asdict(config).items() if name not in LOCAL}
    run = {
        "format": FORMAT,
        "id": federation.id.hex(),
        "hosfl": version("hosfl"),
        "settings": settings,
        "base": _sha256(base),
        "log": log,
        "measures": measures,
        "edge": told,
        "cut": list(server.cuts.shape),
        "labels": {
            "shape": list(server.cuts.label_shape),
            "real": server.cuts.real,
            "classes": server.cuts.classes,
            "ignore_index": server.cuts.ignore_index,
        },
    }
    return {"run": json.dumps(run).encode(), "base": base} | for_edge


def _for_edge(federation: Federation, half: nn.Module) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What clients without torch need, and what the run says of it: the half's graphs, a log's header, the gradient."""
    edge = needed("hosfl.edge.join", "a server of clients without torch", "export")
    exported = needed("hosfl.edge.export", "a server of clients without torch", "export").exported
    if why := edge.unable(federation.config):
        raise ValueError(why)
    client, gradient = federation.make(0), None
    assert isinstance(federation.server.ledger, SeedReplay)
    assert isinstance(client, ZerothOrderClient)
    header = encode_header(header_of(federation.server.ledger.run, half, federation.config.decisive()))
    sample, entries = client.batch(0)[0], [begin.entry for begin in client.begins]
    if federation.config.device != "cpu":
        half, sample = copy.deepcopy(half).cpu(), tree_map_only(Tensor, Tensor.cpu, sample)
    most = federation.config.batch, federation.server.cuts.shape[0] if federation.server.cuts.masked else 0
    backward = federation.config.estimator == "backward"
    running = list(calibration.running(half)) if federation.config.calibrate else []
    pieces = exported(half, sample, entries, most, backward, running)
    files = {edge.graph_name(number): data for number, data in enumerate(pieces)}
    told: dict[str, Any] = {"graphs": [_sha256(data) for data in files.values()], "header": _sha256(header)}
    files[edge.HEADER] = header
    if backward:
        exporter = needed("hosfl.edge.backward", "a server of clients without torch", "export")
        files[edge.GRADIENT] = gradient = exporter.exported_gradient(half, sample, entries[0], most, running)
    told |= {"gradient": None if gradient is None else _sha256(gradient), "digest": list(digest_tensors(half))}
    told |= {"running": running, "statistics": None}
    if running:
        by_batch = needed("hosfl.edge.by_batch", "a server of clients without torch", "export")
        files[edge.STATISTICS] = statistics = by_batch.exported_statistics(half, sample, most)
        told["statistics"] = _sha256(statistics)
    return files, told


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Events:
    """What is written of a run's rounds, for `hosfl status` and whoever reads JSON lines."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._begin, self._told = folder, time.time(), -math.inf
        self._waits = -1  # the round whose waiting was said

    def round(self, federation: Federation, done: int, loss: float) -> None:
        """A round is over."""
        event = {
            "time": round(time.time(), 3),
            "round": done,
            "loss": loss,
            "asked": federation.asked,
            "took part": federation.took_part,
            "missing": {str(client): why for client, why in sorted(federation.messenger.why.items())},
            "seconds": {phase: round(spent, 4) for phase, spent in federation.seconds.items()},
            "bytes": sum(federation.messenger.wire.bytes.values()),
            "refused": federation.server.refused.total,
            "complaints": federation.messenger.complained.total,
        }
        _add_line(self.folder / "events.jsonl", json.dumps(finite(event)).encode())
        self._status(federation, done, event, due=done == federation.config.rounds)

    def waiting(self, federation: Federation, done: int) -> None:
        """Too few clients are here for a round, or it was tried in vain, and is tried again in a while."""
        event: dict[str, Any] = {"waiting for": federation.least}
        if federation.tried:
            why = {str(client): federation.messenger.why.get(client, "left out") for client in federation.asked}
            event |= {"tried": federation.tried, "missing": why}
        elif self._waits != done:
            self._waits, here = done, len(federation.messenger.engine.present())
            logging.warning("round %d waits for clients: %d of at least %d are here", done + 1, here, federation.least)
        self._status(federation, done, event)

    def _status(self, federation: Federation, done: int, event: dict[str, Any], due: bool = False) -> None:
        now = time.monotonic()  # the clock on the wall may be set back
        if not due and now - self._told < 0.5:
            return
        self._told = now
        status = {
            "round": done,
            "rounds": federation.config.rounds,
            "here": sorted(federation.messenger.engine.present()),
            "clients": federation.config.clients,
            "last": event,
            "missing": federation.messenger.missing,
            "refused": federation.server.refused[-10:],
            "complaints": federation.messenger.complained[-10:],
            "bytes": dict(federation.messenger.wire.bytes),
            "since": self._begin,
            "time": time.time(),
        }
        write_json(self.folder / "status.json", status)


def _add_line(path: Path, line: bytes) -> None:
    """To a file of lines, of which a kill may have cut the last one."""
    with naming(path), path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                line = b"\n" + line
        file.write(line + b"\n")
