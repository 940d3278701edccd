"""A client at its end of a line, whatever it computes with: it reads what is offered, keeps its state on disk, and
answers until the line is closed. Nothing that comes from the server is evaluated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from hosfl.engines.engine import JoinError, Line
from hosfl.files import FolderLock, regular, write_atomically
from hosfl.protocol.arrays import Array, is_tensor
from hosfl.protocol.endpoint import AnotherRun, Answers, Endpoint
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.provenance import read_id
from hosfl.protocol.replica import Replica, ReplicaState
from hosfl.protocol.terms import Measures
from hosfl.protocol.weights import Weights, as_file
from hosfl.tasks.reading import DataError
from hosfl.terminal import printable

FORMAT = 4  # of what is offered
SAVED_EVERY = 60.0  # seconds: what was applied since is replayed
STATE_FORMAT = "3"  # a file of another one is passed over: a client that begins anew loses time alone
log = logging.getLogger("hosfl.join")


def read_offer(offered: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the run that a server offers, and what else it says of it, of the right types. Raises JoinError.

    What it says: base, log: digests; cut: the shape of one sample's; labels: see `check_labels`; measures; id; hosfl,
    the server's version; edge, for clients without torch: SHA-256 of graphs, header, gradient and statistics, and the
    names of what the half's digest is of and of its running statistics; None where there is nothing for them.
    """
    try:
        run = json.loads(offered)
        settings = {str(name): value for name, value in dict(run["settings"]).items()}
        if run["format"] != FORMAT:
            raise JoinError(f"the server offers a run of format {run['format']!r}, this is {FORMAT}: update hosfl")
        base, header, cut = str(run["base"]), str(run["log"]), [int(size) for size in run["cut"]]
        takes = dict(run["labels"])
        labels: dict[str, Any] = {"shape": [int(size) for size in takes["shape"]], "real": bool(takes["real"])}
        for name in ("classes", "ignore_index"):
            labels[name] = None if takes[name] is None else int(takes[name])
        id = read_id(run["id"])
        measures = None if run["measures"] is None else Measures(**run["measures"])
        edge: dict[str, Any] | None = None
        if run["edge"] is not None:
            edge = {name: [str(one) for one in run["edge"][name]] for name in ("graphs", "digest", "running")}
            edge["header"] = str(run["edge"]["header"])
            for name in ("gradient", "statistics"):
                edge[name] = None if run["edge"][name] is None else str(run["edge"][name])
    except JoinError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise JoinError(f"what the server offers is no run: {error!r}") from None
    told: dict[str, Any] = {"base": base, "log": header, "cut": cut, "labels": labels, "hosfl": str(run.get("hosfl"))}
    return settings, told | {"measures": measures, "id": id, "edge": edge}


def check_labels(labels: NDArray[Any], tokens: int | None, run: dict[str, Any], what: str) -> None:
    """Raises DataError for labels that the server would refuse in every round.

    tokens: of a sample; None where the inputs have no attention mask. what: how errors call the data.
    """
    takes, cut = run["labels"], run["cut"]
    shape, classes, ignored = takes["shape"], takes["classes"], takes["ignore_index"]
    if tokens is not None:  # texts may be shorter than the longest, and what goes by their tokens too
        if ignored is not None:
            shape = [tokens, *shape[1:]]
        elif shape and cut and classes == cut[0]:
            classes = tokens
    if list(labels.shape[1:]) != shape:
        raise DataError(
            f"{what}: a sample's label has the shape {list(labels.shape[1:])}, and the server takes {shape}"
        )
    real = labels.dtype.kind == "f"
    if real != takes["real"]:
        kinds = "integers", "floating-point numbers"
        raise DataError(f"{what}: its labels are {kinds[real]}, and the server takes {kinds[takes['real']]}")
    counted = labels if ignored is None else labels[labels != ignored]
    if not counted.size:
        raise DataError(f"{what}: all of its labels are {ignored}, which do not count: there is nothing to learn from")
    least, most = counted.min().item(), counted.max().item()
    if classes is not None and not 0 <= least <= most < classes:
        raise DataError(f"{what}: its labels are from {least} to {most}, and the server takes 0 to {classes - 1}")


def check_cut(made: list[int], finite: bool, texts: bool, cut: list[int], what: str) -> None:
    """Raises DataError for cuts that the server would refuse in every round.

    made: a sample's shape; cut: the one that the server takes, of texts the longest's. finite: whether its numbers are.
    """
    if made != cut and not (texts and made[:1] < cut[:1] and made[1:] == cut[1:]):
        raise DataError(f"{what}: of these data the client half makes cuts of shape {made}, and the server takes {cut}")
    if not finite:
        raise DataError(
            f"{what}: of its first samples the client half makes infinite or NaN numbers, and the server takes finite"
            " ones: look for such numbers among the inputs"
        )


def fetched(line: Line, name: str, sha256: str, path: Path, needed: bool = False) -> bytes:
    """A file that the server offers: the one that was kept, or fetched, once. Raises JoinError for a damaged one.

    needed: somebody reads it from there, so that OSError is raised where it cannot be written.
    """
    if path.is_file() and hashlib.sha256(data := path.read_bytes()).hexdigest() == sha256:
        return data
    data = line.fetch(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise JoinError(f"the server's {name} has another SHA-256 than it says")
    try:
        write_atomically(path, data)
    except OSError as error:
        if needed:
            raise
        log.warning("%s cannot be written: %s; a restart fetches it again", path, error)
    return data


@runtime_checkable
class Replays(Answers, Protocol):
    """A client that holds a replica."""

    replica: Replica

    def load(self, state: ReplicaState) -> None:
        """Become a copy of another replica of the run."""


class SavedState:
    """A client's state on disk, so that a restart need not replay the whole log. Losing it loses time alone.

    A safetensors file: the tensors that move, 0.0, 0.1, ..., then each of their moments, 1.0, 1.1, ...; its metadata
    are what `save` tells, as text, and their digest.

    run: the id of the run that it is of.
    """

    def __init__(self, path: Path, run: bytes, client: Answers) -> None:
        self.path, self.of, self.client = path, run.hex(), client
        self._saved = time.monotonic()

    def restore(self) -> None:
        """Load what is there; a file that is damaged, or another run's, is passed over."""
        client = self.client
        if not isinstance(client, Replays) or not self.path.exists():
            return
        replica = client.replica
        try:
            torch = all(map(is_tensor, replica.tensors))
            with safe_open(regular(self.path), "pt" if torch else "np") as file:
                told, read = file.metadata(), file.get_tensor if torch else Weights(self.path).__getitem__
                if told["format"] != STATE_FORMAT:
                    raise ValueError("another version wrote it")
                if told["run"] != self.of or told["client"] != str(client.number):
                    raise ValueError("it is of another run")
                groups = [
                    [read(f"{group}.{n}") for n in range(len(replica.tensors))]
                    for group in range(1 + len(replica.moments))
                ]
            quantum = float(told["quantum"]) if told["quantum"] else None
            applied, epoch = int(told["applied"]), int(told["epoch"])
            if applied < 0 or epoch < 0:
                raise ValueError(f"it is of round {applied}, epoch {epoch}")
            mine = [[*replica.tensors], *replica.moments]
            for kept, tensors in zip(groups, mine, strict=True):
                if any(k.shape != t.shape or k.dtype != t.dtype for k, t in zip(kept, tensors, strict=True)):
                    raise ValueError("it is of another half")
            lattice = None if quantum is None else Lattice(quantum)
            client.load(ReplicaState(groups[0], groups[1:], applied, epoch, lattice))
            if told["digest"] != _digest(told, replica):
                raise ValueError("its digest is another")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is passed over: %s", self.path, error)
            client.reset()

    def save(self, due: bool = True) -> None:
        """Write it, unless that was done a moment ago and is not due, or it is the base. A full disk is a warning."""
        client = self.client
        if not isinstance(client, Replays) or (not due and time.monotonic() - self._saved < SAVED_EVERY):
            return
        replica = client.replica
        if not replica.applied:
            return  # it is the base, or on the way there
        groups: Sequence[Sequence[Array]] = [replica.tensors, *replica.moments]
        tensors = {f"{group}.{n}": tensor for group, of in enumerate(groups) for n, tensor in enumerate(of)}
        told = {
            "format": STATE_FORMAT,
            "run": self.of,
            "client": str(client.number),
            "applied": str(replica.applied),
            "epoch": str(replica.epoch),
            "quantum": "" if replica.lattice is None else repr(replica.lattice.quantum),
        }
        told["digest"] = _digest(told, replica)
        try:
            write_atomically(self.path, as_file(tensors, told))
        except OSError as error:
            log.warning("%s cannot be written: %s; a restart would replay more", self.path, error)
        self._saved = time.monotonic()


def _digest(told: Mapping[str, str], replica: Replica) -> str:
    """Of a state: SHA-256 of all that its file tells but this, as JSON, then the digest of weights and moments."""
    text = json.dumps({name: value for name, value in told.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode() + replica.digest()).hexdigest()


class _Refusals:
    """Says in the log what the server refused, and why: the same reason once, however many rounds it recurs in."""

    def __init__(self, number: int) -> None:
        self.number, self._said = number, ""

    def __call__(self, why: str) -> None:
        if why != self._said:
            log.warning("the server refuses what client %d sends: %s", self.number, printable(why))
        self._said = why


def take_part(line: Line, number: int, folder: Path, made: Callable[[bytes], Endpoint[Any]]) -> None:
    """Take part in a run until the line is closed. folder: this client's, where its state is kept.

    made: the client of the run that is offered. When the server comes with another run, the client takes part in that
    one. Raises JoinError, and what `made` raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder, "client")
    try:

        def joined() -> tuple[Endpoint[Any], SavedState]:
            """This client in the run that is offered now."""
            log.info("client %d asks for the server's run, and waits until there is one", number)
            endpoint = made(line.fetch("run"))
            endpoint.refused = _Refusals(number)
            kept = SavedState(folder / "state.safetensors", endpoint.run, endpoint.client)
            kept.restore()
            log.info("client %d joins at round %d", number, endpoint.client.applied)
            return endpoint, kept

        taken: list[tuple[Endpoint[Any], SavedState]] = [joined()]  # none, while another run is fetched
        failed: list[Exception] = []

        def answer(ask: bytes) -> bytes:
            try:
                said = taken[0][0].answer(ask)
            except AnotherRun:
                log.info("client %d leaves its run: the server has begun another", number)
                taken.clear()
            # There may not be room for two clients, and the handler's error would hold the one that leaves.
            if not taken:
                try:
                    taken.append(joined())
                except Exception as error:
                    failed.append(error)  # the line would keep it to itself
                    line.close()
                    raise
                said = taken[0][0].answer(ask)
            taken[0][1].save(due=False)
            return said

        try:
            line.serve(answer)
        finally:
            for _, kept in taken:
                kept.save()
        if failed:
            raise failed[0]
    finally:
        lock.close()


ENDS = (signal.SIGINT, signal.SIGTERM)


class Ending:
    """A client's line that Ctrl-C or SIGTERM ends; the second one has its default action, and ends the process.

    A client that serves answers what it is at, and keeps its state. Before that nothing is at stake: the wait for the
    server, or the reading of data, ends at once, by KeyboardInterrupt. signal: which it was.

    line: is given afterwards, since it may wait for a broker from its first moment on.

    Python hears of a signal only when an operation has returned to it, and a graph that a server offers may be one
    without end. So a thread watches what the system has noted, while the block of `with` lasts.
    """

    line: Line | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.signal: int | None = None
        self._serves = False

    def __enter__(self) -> Ending:
        self._noted, self._notes = socket.socketpair()
        self._notes.setblocking(False)
        signal.set_wakeup_fd(self._notes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        self._before = {number: signal.signal(number, self._end) for number in ENDS}
        return self

    def __exit__(self, *error: object) -> None:
        if self.signal is None:  # else the process ends, and a second signal ends it at once
            for number, handler in self._before.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._notes.close()

    def _watch(self) -> None:
        """End the process where a second signal comes before Python has heard of the first."""
        count = 0
        with self._noted:
            while note := self._noted.recv(1):
                count += note[0] in ENDS
                if count > 1:
                    time.sleep(1)  # the second may be the first one, put off: see `hosfl.interrupts`
                    if self.signal is None:
                        os._exit(128 + note[0])

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        assert self.line is not None
        return self.line.fetch(name, deadline)

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        assert self.line is not None
        self._serves = True
        if self.signal is None:  # else code that reads data has kept the interrupt to itself
            self.line.serve(answer)

    def close(self) -> None:
        if self.line is not None:
            self.line.close()

    def _end(self, number: int, frame: object) -> None:
        for one in ENDS:
            signal.signal(one, signal.SIG_DFL)
        if self.signal is not None:  # the second: a pass that Ctrl-C waits for has put this back
            signal.raise_signal(number)
        self.signal = number
        # Not by print or a log: the signal may have come while this thread was at one of these.
        os.write(2, f"hosfl: {self.name} ends; once more ends it at once\n".encode())
        if not self._serves:
            raise KeyboardInterrupt
        threading.Thread(target=self.close).start()  # what it waits for, this thread may hold
