"""What clients with and without torch share: reading the offered run, fetching its files, and answering requests.

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

FORMAT = 4  # of what is offered
log = logging.getLogger("hosfl.join")


def read_offer(offered: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of the run that a server offers, its other fields), with values of the right types. Raises JoinError.

    The other fields: base, log: digests; cut: the shape of one sample's cut; labels: see `check_labels`; measures; id;
    hosfl, the server's version; edge, for clients without torch: SHA-256 of graphs, header, gradient and statistics,
    the names of the tensors in the half's digest, and those of its running statistics; None if there is nothing for
    them.
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
    rest: dict[str, Any] = {"base": base, "log": header, "cut": cut, "labels": labels, "hosfl": str(run.get("hosfl"))}
    return settings, rest | {"measures": measures, "id": id, "edge": edge}


def check_labels(labels: NDArray[Any], tokens: int | None, run: dict[str, Any], what: str) -> None:
    """Raises DataError for labels that the server would refuse in every round.

    tokens: of a sample; None where the inputs have no attention mask. what: how errors call the data.
    """
    takes, cut = run["labels"], run["cut"]
    shape, classes, ignored = takes["shape"], takes["classes"], takes["ignore_index"]
    if tokens is not None:  # texts may be shorter than the longest, and so may labels with one value per token
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


def fetch_file(line: Line, name: str, sha256: str, path: Path, needed: bool = False) -> bytes:
    """A file that the server offers: from `path` if it is there, else fetched and written there.

    needed: whether the file at `path` is read later, so that failing to write it is an error. Raises JoinError for a
    damaged file, OSError.
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
    """Logs why the server refuses messages; a reason that recurs, only once."""

    def __init__(self, number: int) -> None:
        self.number, self._said = number, ""

    def __call__(self, why: str) -> None:
        if why != self._said:
            log.warning("the server refuses what client %d sends: %s", self.number, printable(why))
        self._said = why


def take_part(line: Line, number: int, folder: Path, made: Callable[[bytes], Endpoint[Any]]) -> None:
    """Take part in a run until the line is closed. If the server starts another run, the client takes part in it.

    folder: of this client, for its state. made: makes the client from the run that the server offers. Raises JoinError,
    and what `made` raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder, "client")
    try:

        def joined() -> tuple[Endpoint[Any], SavedState]:
            """Make the client for the run that is offered now, and restore its saved state."""
            log.info("client %d asks for the server's run, and waits until there is one", number)
            endpoint = made(line.fetch("run"))
            endpoint.refused = _Refusals(number)
            kept = SavedState(folder / "state.safetensors", endpoint.run, endpoint.client)
            kept.restore()
            log.info("client %d joins at round %d", number, endpoint.client.applied)
            return endpoint, kept

        taken: list[tuple[Endpoint[Any], SavedState]] = [joined()]  # empty while another run is fetched
        failed: list[Exception] = []

        def answer(ask: bytes) -> bytes:
            try:
                said = taken[0][0].answer(ask)
            except AnotherRun:
                log.info("client %d leaves its run: the server has begun another", number)
                taken.clear()
            # Not in the handler, whose error would keep the old client alive: there may be no memory for two.
            if not taken:
                try:
                    taken.append(joined())
                except Exception as error:
                    failed.append(error)  # the line only logs it
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
