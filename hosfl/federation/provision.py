"""A federation's folder: made, and changed by adding, revoking and renewing. One process changes it at a time.

`ca/federation.json` says what counts and is written last: a command that was cut off is given again, and heals what it
had begun.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from hosfl.federation.broker import configuration
from hosfl.federation.certificates import MOST_DAYS, Authority, FederationError, Issued, make_authority
from hosfl.federation.roster import MOST_CLIENTS, NAME, Address, Retired, Roster, Standing, check_run
from hosfl.files import FolderLock, read_small, sync_folder, write_atomically, write_json


def create(
    folder: Path, clients: int, address: str, run: str | None = None, days: int = 365, broker_folder: str = ""
) -> Roster:
    """Make a federation's folder, whole or not at all: `ca`, `broker`, `server`, and `clients/0` to `clients/N-1`.

    address: where clients reach the broker, HOST or HOST:PORT. run: the run's name; None: the folder's, or "run" where
    that cannot be one. days: how long certificates last. broker_folder: where the folder `broker` will lie on the
    broker's machine, an absolute path; "": where it is made. Raises FileExistsError for a folder that is there,
    ValueError for what cannot be.
    """
    final = folder.resolve()
    if run is None:
        run = final.name if NAME.fullmatch(final.name) else "run"
    check_run(run)
    _check_days(days)
    _check_count(clients)
    reached = Address.parse(address)
    if broker_folder and not broker_folder.startswith("/"):
        raise ValueError(f"the broker's folder must be an absolute path, got {broker_folder!r}")
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} is there already: name a folder that is not")
    final.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))  # mode 0700
    try:
        first = make_authority(f"hosfl {run}")
        _folder(made / "ca")
        write_atomically(made / "ca/ca.key", first.key, private=True)
        write_atomically(made / "ca/ca.pem", first.certificate)
        authority = Authority(first.certificate, first.key)
        broker, server = authority.broker(reached.host, days), authority.client("server", days)
        issued = [authority.client(f"client-{number}", days) for number in range(clients)]
        standings = tuple(map(Standing.of, issued))
        roster = Roster(
            reached,
            run,
            days,
            broker_folder and os.path.normpath(broker_folder),
            Standing.of(broker),
            Standing.of(server),
            standings,
        )
        _hand_out(made, "broker", broker)
        _hand_out(made, "server", server)
        for number, each in enumerate(issued):
            _hand_out_client(made, roster, number, each)
        _commit(made, roster, final)
        made.rename(final)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync_folder(final.parent)
    return roster


def add(folder: Path, clients: int = 1) -> tuple[Roster, list[int]]:
    """Make folders for more clients, under the next numbers. Gives the roster and the new numbers."""
    with _open(folder) as roster:
        _check_count(clients, len(roster.clients))
        authority = _authority(folder)
        numbers = list(range(len(roster.clients), len(roster.clients) + clients))
        for number in numbers:
            issued = authority.client(f"client-{number}", roster.days)
            _hand_out_client(folder, roster, number, issued)
            roster = replace(roster, clients=(*roster.clients, Standing.of(issued)))
        _commit(folder, roster)
    return roster, numbers


def revoke(folder: Path, client: int) -> Roster:
    """Take a client's permissions away: once the broker has reloaded, its certificate lets nobody in.

    Needs no key of the authority. Raises ValueError for a client that is not there, or is revoked.
    """
    with _open(folder) as roster:
        standing = roster.client(client)
        if standing.revoked:
            raise ValueError(f"client {client} is revoked already: `hosfl federation renew` lets it in again")
        roster = _with_client(_retire(roster, f"client-{client}", standing), client, replace(standing, revoked=True))
        _commit(folder, roster)
    return roster


def renew(folder: Path, who: int | str) -> Roster:
    """Make a new certificate in place of one that ends, is lost, or was revoked; the old one lets nobody in any more.

    who: a client's number, "server" or "broker".
    """
    with _open(folder) as roster:
        if isinstance(who, int):
            standing = roster.client(who)
            issued = _authority(folder).client(f"client-{who}", roster.days)
            if not standing.revoked:
                roster = _retire(roster, f"client-{who}", standing)
            _hand_out_client(folder, roster, who, issued)
            roster = _with_client(roster, who, Standing.of(issued))
        elif who == "server":
            issued = _authority(folder).client("server", roster.days)
            _hand_out(folder, "server", issued)
            roster = replace(_retire(roster, "server", roster.server), server=Standing.of(issued))
        elif who == "broker":
            issued = _authority(folder).broker(roster.address.host, roster.days)
            _hand_out(folder, "broker", issued)
            roster = replace(roster, broker=Standing.of(issued))
        else:
            raise ValueError(f"a client's number, `server` or `broker` is needed, got {who!r}")
        _commit(folder, roster)
    return roster


def read(folder: Path) -> Roster:
    """Who is in the federation of a folder. Raises FederationError for a folder that is none."""
    try:
        return Roster.read(folder / "ca/federation.json")
    except (FileNotFoundError, NotADirectoryError):
        raise FederationError(
            f"{folder} holds no federation: `hosfl federation create` makes one, and only its folder `ca` can change it"
        ) from None


@contextmanager
def _open(folder: Path) -> Iterator[Roster]:
    read(folder)
    lock = FolderLock(folder / "ca", "federation")
    try:
        yield read(folder)  # again: another process may have had it until now
    finally:
        lock.close()


def _authority(folder: Path) -> Authority:
    key = folder / "ca/ca.key"
    if not key.is_file():
        raise FederationError(
            f"{key} is not there: bring the authority's key back for as long as this command needs it"
        )
    return Authority(read_small(folder / "ca/ca.pem"), read_small(key))


def _folder(path: Path) -> None:
    """A folder for its owner alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def _hand_out(folder: Path, who: str, issued: Issued, name: str = "") -> Path:
    """Write key and certificates into the folder of `who`."""
    own, name = folder / who, name or who
    for each in (own.parent, own):
        _folder(each)
    write_atomically(own / "ca.pem", read_small(folder / "ca/ca.pem"))
    write_atomically(own / f"{name}.key", issued.key, private=True)
    write_atomically(own / f"{name}.pem", issued.certificate)
    return own


def _hand_out_client(folder: Path, roster: Roster, number: int, issued: Issued) -> None:
    own = _hand_out(folder, f"clients/{number}", issued, "client")
    says = {"address": str(roster.address), "run": roster.run, "client": number, "expires": issued.expires.isoformat()}
    write_json(own / "client.json", says)


def _commit(folder: Path, roster: Roster, final: Path | None = None) -> None:
    """Write what follows from the roster, and the roster itself last.

    final: where the folder will lie, if not where it is.
    """
    for each in ("broker", "server"):
        _folder(folder / each)
    here = str((final or folder.resolve()) / "broker")
    text = configuration(roster, roster.broker_folder or here)
    write_atomically(folder / "broker/nats.conf", text.encode())
    roster.write(folder / "server/federation.json")
    roster.write(folder / "ca/federation.json")


def _retire(roster: Roster, who: str, standing: Standing) -> Roster:
    now = datetime.now(timezone.utc).replace(microsecond=0)
    return replace(roster, retired=(*roster.retired, Retired(who, standing.serial, now)))


def _with_client(roster: Roster, number: int, standing: Standing) -> Roster:
    clients = list(roster.clients)
    clients[number] = standing
    return replace(roster, clients=tuple(clients))


def _check_days(days: int) -> None:
    if not 1 <= days <= MOST_DAYS:
        raise ValueError(f"certificates must last 1 to {MOST_DAYS} days, got {days}")


def _check_count(clients: int, there: int = 0) -> None:
    if not 1 <= clients <= MOST_CLIENTS - there:
        raise ValueError(f"the number of clients must be 1 to {MOST_CLIENTS - there}, got {clients}")
