"""Making and changing a federation's folder: clients are added, certificates revoked and renewed.

Only one process at a time can change it. `ca/federation.json` is authoritative, and is written last: a command that was
interrupted is completed by running it again.
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
from hosfl.federation.certificates import MAX_DAYS, Authority, FederationError, Issued, make_authority
from hosfl.federation.roster import (
    MAX_CLIENTS,
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

    address: of the broker as clients reach it, HOST or HOST:PORT. run: the run's name; None: the folder's, or "run" if
    that is no valid name. days: the validity of certificates. broker_folder: the absolute path that the folder `broker`
    will have on the broker's machine; "": its path here. Raises FileExistsError if the folder exists, and ValueError.
    """
    final = folder.resolve()
    if run is None:
        run = final.name if NAME.fullmatch(final.name) else "run"
    check_run(run)
    _check_days(days)
    _check_count(clients)
    broker_address = Address.parse(address)
    if broker_folder and not broker_folder.startswith("/"):
        raise ValueError(f"the broker's folder must be an absolute path, got {broker_folder!r}")
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} is there already: name a folder that is not")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))  # mode 0700
    try:
        root = make_authority(f"hosfl {run}")
        _make_private_folder(temporary / "ca")
        write_atomically(temporary / "ca/ca.key", root.key, private=True)
        write_atomically(temporary / "ca/ca.pem", root.certificate)
        authority = Authority(root.certificate, root.key)
        broker, server = authority.broker(broker_address.host, days), authority.client("server", days)
        issued = [authority.client(f"client-{number}", days) for number in range(clients)]
        statuses = tuple(map(CertificateStatus.of, issued))
        roster = Roster(
            broker_address,
            run,
            days,
            broker_folder and os.path.normpath(broker_folder),
            CertificateStatus.of(broker),
            CertificateStatus.of(server),
            statuses,
        )
        _write_folder(temporary, "broker", broker)
        _write_folder(temporary, "server", server)
        for number, certificate in enumerate(issued):
            _write_client(temporary, roster, number, certificate)
        _write_roster(temporary, roster, final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
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

    This needs no key of the authority. Raises ValueError for a client that does not exist, or is revoked already.
    """
    with _locked_roster(folder) as roster:
        status = roster.client(client)
        if status.revoked:
            raise ValueError(f"client {client} is revoked already: `hosfl federation renew` lets it in again")
        roster = _with_client(_retire(roster, f"client-{client}", status), client, replace(status, revoked=True))
        _write_roster(folder, roster)
    return roster


def renew(folder: Path, who: int | str) -> Roster:
    """Replace a certificate that expires, is lost, or was revoked by a new one; the old one becomes invalid.

    who: a client's number, "server" or "broker".
    """
    with _locked_roster(folder) as roster:
        if isinstance(who, int):
            status = roster.client(who)
            issued = _read_authority(folder).client(f"client-{who}", roster.days)
            if not status.revoked:
                roster = _retire(roster, f"client-{who}", status)
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
    """Read the roster of the federation in a folder. Raises FederationError for another folder."""
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
    """Make a folder that only its owner can access."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def _write_folder(folder: Path, who: str, issued: Issued, name: str = "") -> Path:
    """Write key and certificates into the folder `who`. name: of the files; "": `who`. Returns the folder's path."""
    path, name = folder / who, name or who
    for each in (path.parent, path):
        _make_private_folder(each)
    write_atomically(path / "ca.pem", read_small(folder / "ca/ca.pem"))
    write_atomically(path / f"{name}.key", issued.key, private=True)
    write_atomically(path / f"{name}.pem", issued.certificate)
    return path


def _write_client(folder: Path, roster: Roster, number: int, issued: Issued) -> None:
    path = _write_folder(folder, f"clients/{number}", issued, "client")
    expires = issued.expires.isoformat()
    client = {"address": str(roster.address), "run": roster.run, "client": number, "expires": expires}
    write_json(path / "client.json", client)


def _write_roster(folder: Path, roster: Roster, final: Path | None = None) -> None:
    """Write the broker's configuration and the roster. final: the folder's later path, if it will be renamed."""
    for name in ("broker", "server"):
        _make_private_folder(folder / name)
    broker_folder = roster.broker_folder or str((final or folder.resolve()) / "broker")
    text = configuration(roster, broker_folder)
    write_atomically(folder / "broker/nats.conf", text.encode())
    roster.write(folder / "server/federation.json")
    roster.write(folder / "ca/federation.json")


def _retire(roster: Roster, who: str, status: CertificateStatus) -> Roster:
    now = datetime.now(timezone.utc).replace(microsecond=0)
    return replace(roster, retired=(*roster.retired, RetiredCertificate(who, status.serial, now)))


def _with_client(roster: Roster, number: int, status: CertificateStatus) -> Roster:
    clients = list(roster.clients)
    clients[number] = status
    return replace(roster, clients=tuple(clients))


def _check_days(days: int) -> None:
    if not 1 <= days <= MAX_DAYS:
        raise ValueError(f"certificates must last 1 to {MAX_DAYS} days, got {days}")


def _check_count(clients: int, existing: int = 0) -> None:
    if not 1 <= clients <= MAX_CLIENTS - existing:
        raise ValueError(f"the number of clients must be 1 to {MAX_CLIENTS - existing}, got {clients}")
