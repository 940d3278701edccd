"""The roster of a federation, `federation.json`: the broker's address, the run, and the serials of all certificates."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hosfl.federation.certificates import FederationError, Issued, identity
from hosfl.files import read_small, write_json

MAX_CLIENTS = 10_000
PORT = 4222
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Address:
    """The address of the broker: a DNS name or an IP address, and a port."""

    host: str
    port: int = PORT

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse HOST, HOST:PORT, or [IPv6]:PORT. Raises ValueError that names what is wrong."""
        bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", text)
        if bracketed:
            host, port = bracketed[1], bracketed[2]
        elif text.count(":") > 1:
            host, port = text, None
        else:
            host, colon, after = text.partition(":")
            port = after if colon else None
        if "/" in text:
            raise ValueError(f"the address must be HOST or HOST:PORT, without a scheme or a path, got {text!r}")
        if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
            raise ValueError(f"the address's port must be 1 to 65535, got {port!r} in {text!r}")
        return cls(_host(host, text), PORT if port is None else int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host == "localhost" or (_is_ip(self.host) and ipaddress.ip_address(self.host).is_loopback)


def _host(host: str, text: str) -> str:
    if _is_ip(host):
        ip = ipaddress.ip_address(host)
        if ip.is_unspecified or ip.is_multicast or "%" in host:
            raise ValueError(f"the address must be one that clients can reach, got {text!r}")
        return str(ip)
    labels = host.split(".")
    if len(host) > 253 or not all(LABEL.fullmatch(each) for each in labels) or labels[-1].isdigit():
        raise ValueError(
            f"the address must be a DNS name or an IP address, and a port if it is not {PORT}, got {text!r}; a name has"
            " letters a to z, digits, hyphens and dots: others in their xn-- form"
        )
    return host.lower()


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_run(run: str) -> str:
    """Check a run's name, which becomes a part of subjects, and return it. Raises ValueError."""
    if not NAME.fullmatch(run):
        raise ValueError(
            f"the run's name must be 1 to 32 letters a to z, digits, hyphens and underscores, the first a letter or"
            f" digit, got {run!r}"
        )
    return run


@dataclass(frozen=True)
class CertificateStatus:
    """The current certificate of the broker, the server or a client. revoked: whether the broker refuses it."""

    serial: str
    expires: datetime
    revoked: bool = False

    @classmethod
    def of(cls, issued: Issued) -> CertificateStatus:
        return cls(issued.serial, issued.expires)


@dataclass(frozen=True)
class RetiredCertificate:
    """A replaced or revoked certificate, which the broker refuses although it has not expired. who: its owner."""

    who: str
    serial: str
    since: datetime


@dataclass(frozen=True)
class Roster:
    """The members of a federation. A client's number is its index in `clients`; numbers are never reused.

    days: the validity of new certificates. broker_folder: the path of the broker's files on its machine, "" for the
    federation's own folder.
    """

    address: Address
    run: str
    days: int
    broker_folder: str
    broker: CertificateStatus
    server: CertificateStatus
    clients: tuple[CertificateStatus, ...]
    retired: tuple[RetiredCertificate, ...] = ()

    def users(self) -> dict[str, int | None]:
        """Return the users that the broker accepts: identity -> the client's number, None for the server."""
        users: dict[str, int | None] = {identity("server", self.server.serial): None}
        for number, client in enumerate(self.clients):
            if not client.revoked:
                users[identity(f"client-{number}", client.serial)] = number
        return users

    def client(self, number: int) -> CertificateStatus:
        """Return the status of a client's certificate. Raises ValueError for a number that does not exist."""
        if not 0 <= number < len(self.clients):
            raise ValueError(f"there is no client {number}: this federation has clients 0 to {len(self.clients) - 1}")
        return self.clients[number]

    @classmethod
    def read(cls, path: Path) -> Roster:
        """Read a `federation.json`. Raises FederationError for a damaged one, FileNotFoundError."""
        saved = read_object(path)
        try:
            return cls(
                Address.parse(saved["address"]),
                check_run(saved["run"]),
                int(saved["days"]),
                str(saved["broker_folder"]),
                _read_status(saved["broker"]),
                _read_status(saved["server"]),
                tuple(_read_status(each) for each in saved["clients"]),
                tuple(
                    RetiredCertificate(str(r["who"]), _serial(r["serial"]), _time(r["since"])) for r in saved["retired"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FederationError(f"{path} is damaged: take it from a copy ({error!r})") from None

    def write(self, path: Path) -> None:
        """Write a file for `read`, atomically."""
        saved = {**asdict(self), "address": str(self.address)}
        write_json(path, json.loads(json.dumps(saved, default=lambda time: time.isoformat())))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file with one object. Raises FederationError for any other, FileNotFoundError."""
    try:
        value = json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise FederationError(f"{path} is damaged: take it from a copy ({error})") from None
    if not isinstance(value, dict):
        raise FederationError(f"{path} is damaged: take it from a copy (no JSON object)")
    return value


def _read_status(saved: Any) -> CertificateStatus:
    if not isinstance(saved["revoked"], bool):
        raise TypeError(f"revoked must be true or false, got {saved['revoked']!r}")
    return CertificateStatus(_serial(saved["serial"]), _time(saved["expires"]), saved["revoked"])


def _serial(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", text):
        raise ValueError(f"a serial has 40 hexadecimal digits, got {text!r}")
    return text


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"a time needs its zone, got {text!r}")
    return time
