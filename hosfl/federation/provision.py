"""Makes a federation's folder, and changes it: adds clients, revokes and renews certificates. One process at a time.

`ca/federation.json` decides, and is written last: if a command was cut off, running it again completes it.
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
from hosfl.federation.roster import (
    MOST_CLIENTS,
    NAME,
    Address,
    CertificateStatus,
    RetiredCertificate,
    Roster,
    check_run,
)
from hosfl.files import FolderLock, read_small, sync_folder, write_atomically, write_json


def create(
    folder: Path, clients: int, address: str, run: str | None = None, days: int = 365, broker_folder: str = ""
) -> Roster:
    """Make a federation's folder, completely or not at all: `ca`, `broker`, `server`, `clients/0` to `clients/N-1`.

    address: at which clients reach the broker, HOST or HOST:PORT. run: the run's name; None: the folder's, or "run" if
    that is no valid name. days: how long certificates last. broker_folder: the absolute path that the folder `broker`
    will have on the broker's machine; "": its path here. Raises FileExistsError for a folder that exists, ValueError.
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
        _make_private_folder(made / "ca")
        write_atomically(made / "ca/ca.key", first.key, private=True)
        write_atomically(made / "ca/ca.pem", first.certificate)
        authority = Authority(first.certificate, first.key)
        broker, server = authority.broker(reached.host, days), authority.client("server", days)
        issued = [authority.client(f"client-{number}", days) for number in range(clients)]
        statuses = tuple(map(CertificateStatus.of, issued))
        roster = Roster(
            reached,
            run,
            days,
            broker_folder and os.path.normpath(broker_folder),
            CertificateStatus.of(broker),
            CertificateStatus.of(server),
            statuses,
        )
        _write_folder(made, "broker", broker)
        _write_folder(made, "server", server)
        for number, one in enumerate(issued):
            _write_client(made, roster, number, one)
        _write_roster(made, roster, final)
        made.rename(final)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync_folder(final.parent)
    return roster


def add(folder: Path, clients: int = 1) -> tuple[Roster, list[int]]:
    """Make folders for more clients, under the next numbers. Returns the roster and the new numbers."""
    with _locked_roster(folder) as roster:
        _check_count(clients, len(roster.clients))
        authority = _read_authority(folder)
        numbers = list(range(len(roster.clients), len(roster.clients) + clients))
        for number in numbers:
            issued = authority.client(f"client-{number}", roster.days)
            _write_client(folder, roster, number, issued)
            roster = replace(roster, clients=(*roster.clients, CertificateStatus.of(issued)))
        _write_roster(folder, roster)
    return roster, numbers


def revoke(folder: Path, client: int) -> Roster:
    """Revoke a client's certificate: the broker refuses it once it has reloaded its configuration.

    Needs no key of the authority. Raises ValueError for a client that does not exist, or is revoked.
    """
    with _locked_roster(folder) as roster:
        standing = roster.client(client)
        if standing.revoked:
            raise ValueError(f"client {client} is revoked already: `hosfl federation renew` lets it in again")
        roster = _with_client(_retire(roster, f"client-{client}", standing), client, replace(standing, revoked=True))
        _write_roster(folder, roster)
    return roster


def renew(folder: Path, who: int | str) -> Roster:
    """Make a new certificate in place of one that expires, is lost, or was revoked; the old one becomes invalid.

    who: a client's number, "server" or "broker".
    """
    with _locked_roster(folder) as roster:
        if isinstance(who, int):
            standing = roster.client(who)
            issued = _read_authority(folder).client(f"client-{who}", roster.days)
            if not standing.revoked:
                roster = _retire(roster, f"client-{who}", standing)
            _write_client(folder, roster, who, issued)
            roster = _with_client(roster, who, CertificateStatus.of(issued))
        elif who == "server":
            issued = _read_authority(folder).client("server", roster.days)
            _write_folder(folder, "server", issued)
            roster = replace(_retire(roster, "server", roster.server), server=CertificateStatus.of(issued))
        elif who == "broker":
            issued = _read_authority(folder).broker(roster.address.host, roster.days)
            _write_folder(folder, "broker", issued)
            roster = replace(roster, broker=CertificateStatus.of(issued))
        else:
            raise ValueError(f"a client's number, `server` or `broker` is needed, got {who!r}")
        _write_roster(folder, roster)
    return roster


def read(folder: Path) -> Roster:
    """The roster of the federation in a folder. Raises FederationError for another folder."""
    try:
        return Roster.read(folder / "ca/federation.json")
    except (FileNotFoundError, NotADirectoryError):
        raise FederationError(
            f"{folder} holds no federation: `hosfl federation create` makes one, and only its folder `ca` can change it"
        ) from None


@contextmanager
def _locked_roster(folder: Path) -> Iterator[Roster]:
    read(folder)
    lock = FolderLock(folder / "ca", "federation")
    try:
        yield read(folder)  # again, since another process may have held the lock and changed it
    finally:
        lock.close()


def _read_authority(folder: Path) -> Authority:
    key = folder / "ca/ca.key"
    if not key.is_file():
        raise FederationError(
            f"{key} is not there: bring the authority's key back for as long as this command needs it"
        )
    return Authority(read_small(folder / "ca/ca.pem"), read_small(key))


def _make_private_folder(path: Path) -> None:
    """Make a folder that only its owner can read."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def _write_folder(folder: Path, who: str, issued: Issued, name: str = "") -> Path:
    """Write key and certificates into the folder of `who`."""
    own, name = folder / who, name or who
    for one in (own.parent, own):
        _make_private_folder(one)
    write_atomically(own / "ca.pem", read_small(folder / "ca/ca.pem"))
    write_atomically(own / f"{name}.key", issued.key, private=True)
    write_atomically(own / f"{name}.pem", issued.certificate)
    return own


def _write_client(folder: Path, roster: Roster, number: int, issued: Issued) -> None:
    own = _write_folder(folder, f"clients/{number}", issued, "client")
    says = {"address": str(roster.address), "run": roster.run, "client": number, "expires": issued.expires.isoformat()}
    write_json(own / "client.json", says)


def _write_roster(folder: Path, roster: Roster, final: Path | None = None) -> None:
    """Write the broker's configuration and the roster. final: the folder's later path, if it is going to be moved."""
    for one in ("broker", "server"):
        _make_private_folder(folder / one)
    here = str((final or folder.resolve()) / "broker")
    text = configuration(roster, roster.broker_folder or here)
    write_atomically(folder / "broker/nats.conf", text.encode())
    roster.write(folder / "server/federation.json")
    roster.write(folder / "ca/federation.json")


def _retire(roster: Roster, who: str, standing: CertificateStatus) -> Roster:
    now = datetime.now(timezone.utc).replace(microsecond=0)
    return replace(roster, retired=(*roster.retired, RetiredCertificate(who, standing.serial, now)))


def _with_client(roster: Roster, number: int, standing: CertificateStatus) -> Roster:
    clients = list(roster.clients)
    clients[number] = standing
    return replace(roster, clients=tuple(clients))


def _check_days(days: int) -> None:
    if not 1 <= days <= MOST_DAYS:
        raise ValueError(f"certificates must last 1 to {MOST_DAYS} days, got {days}")


def _check_count(clients: int, there: int = 0) -> None:
    if not 1 <= clients <= MOST_CLIENTS - there:
        raise ValueError(f"the number of clients must be 1 to {MOST_CLIENTS - there}, got {clients}")
