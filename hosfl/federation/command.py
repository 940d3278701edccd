"""`hosfl federation`: its actions, and the instructions that they print for what to do next."""

from __future__ import annotations

import argparse
import shlex
from datetime import datetime, timezone
from pathlib import Path

from hosfl.federation import provision
from hosfl.federation.broker import check_permissions
from hosfl.federation.certificates import FederationError, read_certificate
from hosfl.federation.member import WARN_BEFORE
from hosfl.federation.roster import Roster
from hosfl.files import read_small


def run(options: argparse.Namespace) -> int:
    """Run the action of these options, and return the exit status."""
    return ACTIONS[options.action](options)


def _create(options: argparse.Namespace) -> int:
    folder = options.folder
    roster = provision.create(
        folder, options.clients, options.address, options.name, options.days, options.broker_folder
    )
    last = len(roster.clients) - 1
    print(
        f"{folder}: run {roster.run}, broker at {roster.address}, {_count(roster)}, certificates for {roster.days} days"
    )
    print(f"Keep {_path(folder, 'ca')} to yourself: whoever has ca.key can make clients.")
    if roster.broker_folder:
        print(f"Copy {_path(folder, 'broker')} to {shlex.quote(roster.broker_folder)} on the broker's machine.")
    print(f"Start the broker:        nats-server -c {shlex.quote(_broker_folder(folder, roster) + '/nats.conf')}")
    print(f"Start the server:        hosfl serve {_path(folder, 'server')} --out DIR")
    folders = _path(folder, "clients/0") + (f" to {_path(folder, f'clients/{last}')}" if last else "")
    print(f"Hand out, each to its owner and nobody else: {folders}")
    print(f"Its owner starts client 0: hosfl join {_path(folder, 'clients/0')}")
    return 0


def _add(options: argparse.Namespace) -> int:
    roster, numbers = provision.add(options.folder, options.clients)
    _print_reload(options.folder, roster)
    for number in numbers:
        _print_hand_out(options.folder, roster, number)
    return 0


def _revoke(options: argparse.Namespace) -> int:
    roster = provision.revoke(options.folder, options.client)
    print(f"Client {options.client} is revoked: certificate {roster.client(options.client).serial}.")
    _print_reload(options.folder, roster)
    print("Until then it stays connected. The others stay connected.")
    return 0


def _renew(options: argparse.Namespace) -> int:
    who, folder = options.who, options.folder
    roster = provision.renew(folder, who)
    if who == "broker" and roster.broker_folder:
        print(f"Copy {_path(folder, 'broker')} to {shlex.quote(roster.broker_folder)} on the broker's machine.")
    _print_reload(folder, roster)
    if who == "server":
        print(f"Start the server again, with the new {_path(folder, 'server')}: the old certificate is refused.")
    elif who != "broker":
        _print_hand_out(folder, roster, who)
    return 0


def _show(options: argparse.Namespace) -> int:
    """Print the state of all certificates. Returns 1 if one has expired, or the broker's configuration was changed."""
    folder = options.folder
    roster = provision.read(folder)
    now = datetime.now(timezone.utc)
    print(f"{folder}: run {roster.run}, broker at {roster.address}, {_count(roster)}")
    faults = 0
    try:
        _, _, ends = read_certificate(read_small(folder / "ca/ca.pem"))
        print(f"authority: until {ends:%Y-%m-%d}{_warning(ends, now, 'make a new federation')}")
        faults += ends <= now
    except (OSError, FederationError) as error:
        print(f"authority: ca/ca.pem cannot be read: {error}")
        faults += 1
    rows = [("broker", "broker", roster.broker), ("server", "server", roster.server)]
    rows += [(f"client {number}", str(number), client) for number, client in enumerate(roster.clients)]
    for name, who, status in rows:
        if status.revoked:
            print(f"{name}: revoked")
            continue
        renew = f"hosfl federation renew {_path(folder)} {who}"
        print(f"{name}: until {status.expires:%Y-%m-%d}{_warning(status.expires, now, renew)}")
        faults += status.expires <= now
    for retired in roster.retired:
        print(f"refused since {retired.since:%Y-%m-%d}: certificate {retired.serial} of {retired.who}")
    try:
        check_permissions(folder / "broker/nats.conf", roster)
    except (OSError, FederationError) as error:
        print(f"The broker's configuration is not what was made: {error}")
        faults += 1
    return 1 if faults else 0


def _warning(ends: datetime, now: datetime, remedy: str) -> str:
    if ends <= now:
        return f", ENDED: {remedy}"
    return f", {(ends - now).days} days left: {remedy}" if ends - now < WARN_BEFORE else ""


def _count(roster: Roster) -> str:
    clients, revoked = len(roster.clients), sum(client.revoked for client in roster.clients)
    return f"{clients} client{'s' * (clients != 1)}" + (f", {revoked} of them revoked" if revoked else "")


def _print_reload(folder: Path, roster: Roster) -> None:
    if roster.broker_folder:
        conf = f"{_path(folder, 'broker/nats.conf')} to {shlex.quote(roster.broker_folder)}"
        print(f"Copy {conf} on the broker's machine.")
    pid_file = shlex.quote(_broker_folder(folder, roster) + "/nats.pid")
    print(f"The broker must reload its configuration: nats-server --signal reload={pid_file}")


def _print_hand_out(folder: Path, roster: Roster, number: int) -> None:
    until = roster.client(number).expires
    print(f"Then hand {_path(folder, f'clients/{number}')} to the owner of client {number}: until {until:%Y-%m-%d}.")


def _broker_folder(folder: Path, roster: Roster) -> str:
    return roster.broker_folder or str(folder.resolve() / "broker")


def _path(folder: Path, name: str = "") -> str:
    return shlex.quote(str(folder / name))


ACTIONS = {"create": _create, "add": _add, "revoke": _revoke, "renew": _renew, "show": _show}
