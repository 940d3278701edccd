"""Joining a run, for clients with and without torch: read the offer, fetch its files, answer requests.

No code comes from the server.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hosfl.engines.engine import JoinError, Line
from hosfl.engines.saved_state import SavedState
from hosfl.files import FolderLock, write_atomically
from hosfl.protocol.endpoint import AnotherRun, Endpoint
from hosfl.protocol.provenance import read_id
from hosfl.protocol.terms import Measures
from hosfl.tasks.reading import DataError
from hosfl.terminal import printable

FORMAT = 4  # of the offer
log = logging.getLogger("hosfl.join")


def read_offer(offered: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse the run that a server offers: (its settings, its other fields), with values of the right types.

    The other fields:

    - base, log: SHA-256 of the base half and of the log's header
    - cut: the shape of one sample's cut
    - labels: shape, real, classes and ignore_index: see `check_labels`
    - measures: what the clients measure, or None; id: the run's; hosfl: the server's version
    - edge: for clients without torch: SHA-256 of the graphs, and of header, gradient and statistics; digest: the names
      of the tensors in the half's digest; running: those of its running statistics. None if it has nothing for them

    Raises JoinError for anything else.
    """
    try:
        run = json.loads(offered)
        settings = {str(name): value for name, value in dict(run["settings"]).items()}
        if run["format"] != FORMAT:
            raise JoinError(f"the server offers a run of format {run['format']!r}, this is {FORMAT}: update hosfl")
        base, header, cut = str(run["base"]), str(run["log"]), [int(size) for size in run["cut"]]
        sent = dict(run["labels"])
        labels: dict[str, Any] = {"shape": [int(size) for size in sent["shape"]], "real": bool(sent["real"])}
        for name in ("classes", "ignore_index"):
            labels[name] = None if sent[name] is None else int(sent[name])
        id = read_id(run["id"])
        measures = None if run["measures"] is None else Measures(**run["measures"])
        edge: dict[str, Any] | None = None
        if run["edge"] is not None:
            edge = {name: [str(item) for item in run["edge"][name]] for name in ("graphs", "digest", "running")}
            edge["header"] = str(run["edge"]["header"])
            for name in ("gradient", "statistics"):
                edge[name] = None if run["edge"][name] is None else str(run["edge"][name])
    except JoinError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise JoinError(f"what the server offers is no run: {error!r}") from None
    rest: dict[str, Any] = {"base": base, "log": header, "cut": cut, "labels": labels, "hosfl": str(run.get("hosfl"))}
    return settings, rest | {"measures": measures, "id": id, "edge": edge}


def check_labels(labels: NDArray[Any], tokens: int | None, offer: dict[str, Any], data: str) -> None:
    """Raises DataError for labels that the server would refuse in every round.

    tokens: number of tokens of a sample; None if the inputs have no attention mask. offer: the other fields of
    `read_offer`; its labels have the shape of one sample's label, `real` for floating-point numbers, the number of
    classes, and the value that does not count. data: its name, for errors.
    """
    accepted, cut = offer["labels"], offer["cut"]
    shape, classes, ignored = accepted["shape"], accepted["classes"], accepted["ignore_index"]
    if tokens is not None:  # a text may be shorter than the longest, and so may labels with one value per token
        if ignored is not None:
            shape = [tokens, *shape[1:]]
        elif shape and cut and classes == cut[0]:
            classes = tokens
    if list(labels.shape[1:]) != shape:
        raise DataError(
            f"{data}: a sample's label has the shape {list(labels.shape[1:])}, and the server takes {shape}"
        )
    real = labels.dtype.kind == "f"
    if real != accepted["real"]:
        kinds = "integers", "floating-point numbers"
        raise DataError(f"{data}: its labels are {kinds[real]}, and the server takes {kinds[accepted['real']]}")
    counted = labels if ignored is None else labels[labels != ignored]
    if not counted.size:
        raise DataError(f"{data}: all of its labels are {ignored}, which do not count: there is nothing to learn from")
    low, high = counted.min().item(), counted.max().item()
    if classes is not None and not 0 <= low <= high < classes:
        raise DataError(f"{data}: its labels are from {low} to {high}, and the server takes 0 to {classes - 1}")


def check_cut(shape: list[int], finite: bool, texts: bool, expected: list[int], data: str) -> None:
    """Raises DataError for a cut that the server would refuse in every round.

    shape: of one sample's cut. finite: whether all its numbers are. texts: whether samples are texts, which may be
    shorter than the expected shape. expected: the shape that the server takes, for texts that of the longest. data: its
    name, for errors.
    """
    if shape != expected and not (texts and shape[:1] < expected[:1] and shape[1:] == expected[1:]):
        raise DataError(f"{data}: the client half makes cuts of shape {shape}, and the server takes {expected}")
    if not finite:
        raise DataError(
            f"{data}: the client half makes infinite or NaN numbers of its first samples, and the server takes finite"
            " ones: look for such numbers among the inputs"
        )


def fetch_file(line: Line, name: str, sha256: str, path: Path, needed: bool = False) -> bytes:
    """Return the bytes of a file that the server offers: from `path` if it has them, else fetched and written there.

    sha256: of the file, as the offer says. needed: whether the file at `path` is read later, so that failing to write
    it is an error. Raises JoinError for a damaged file, and OSError.
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


class _Refusals:
    """Logs why the server refuses a client's messages; the same reason in a row only once."""

    def __init__(self, number: int) -> None:
        self.number, self._last = number, ""

    def __call__(self, reason: str) -> None:
        if reason != self._last:
            log.warning("the server refuses what client %d sends: %s", self.number, printable(reason))
        self._last = reason


def take_part(line: Line, number: int, folder: Path, make_endpoint: Callable[[bytes], Endpoint[Any]]) -> None:
    """Take part in a run until the line is closed. If the server starts another run, the client takes part in that.

    number: the client's. folder: for this client's state. make_endpoint: makes the client from the offer's bytes.
    Raises JoinError, and what `make_endpoint` raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder, "client")
    try:

        def join_run() -> tuple[Endpoint[Any], SavedState]:
            """Make the client for the run that is offered now, and restore its saved state."""
            log.info("client %d asks for the server's run, and waits until there is one", number)
            endpoint = make_endpoint(line.fetch("run"))
            endpoint.refused = _Refusals(number)
            saved_state = SavedState(folder / "state.safetensors", endpoint.run, endpoint.client)
            saved_state.restore()
            log.info("client %d joins at round %d", number, endpoint.client.applied)
            return endpoint, saved_state

        # The current run's client. A list, since it must be empty while the next one is made: there may be no memory
        # for two.
        current: list[tuple[Endpoint[Any], SavedState]] = [join_run()]
        errors: list[Exception] = []

        def answer(request: bytes) -> bytes:
            try:
                reply = current[0][0].answer(request)
            except AnotherRun:
                log.info("client %d leaves its run: the server has begun another", number)
                current.clear()
            if not current:  # not in the handler above, whose traceback keeps the old client alive
                try:
                    current.append(join_run())
                except Exception as error:
                    errors.append(error)  # the line only logs it
                    line.close()
                    raise
                reply = current[0][0].answer(request)
            current[0][1].save(due=False)
            return reply

        try:
            line.serve(answer)
        finally:
            for _, saved_state in current:
                saved_state.save()
        if errors:
            raise errors[0]
    finally:
        lock.close()
