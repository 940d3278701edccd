"""`Member`: the folder of the server or of a client, with its identity, its certificate and the broker's address."""

from __future__ import annotations

import os
import shlex
import ssl
import warnings
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from hosfl.federation.certificates import FederationError, read_certificate, signed_by
from hosfl.federation.roster import Address, Roster, check_run, read_object
from hosfl.files import read_small

WARN_BEFORE = timedelta(days=30)  # before a certificate's end


@dataclass(frozen=True)
class Member:
    """The server, or a client, as a user of the broker. client: its number; None for the server."""

    folder: Path
    address: Address
    run: str
    client: int | None
    expires: datetime

    @property
    def who(self) -> str:
        """The member in words, such as "client 3"."""
        return "the server" if self.client is None else f"client {self.client}"

    @property
    def pem(self) -> tuple[Path, Path, Path]:
        """The paths of the authority's certificate, the member's own certificate, and its key."""
        role = "server" if self.client is None else "client"
        return self.folder / "ca.pem", self.folder / f"{role}.pem", self.folder / f"{role}.key"

    @classmethod
    def read(cls, folder: Path, now: datetime | None = None) -> Member:
        """Read a folder `server` or `clients/N` that `hosfl federation` made, and check its certificate.

        now: the time, with its zone; by default the clock's. Warns of a certificate that ends within 30 days, and of a
        key that others can read. Raises FederationError for an incomplete folder, and for a certificate that is not
        valid now, since the broker would refuse it with less explanation.
        """
        kind = "server" if (folder / "federation.json").exists() else "client"
        missing = [name for name in ("ca.pem", f"{kind}.pem", f"{kind}.key") if not (folder / name).is_file()]
        if kind == "client" and not (folder / "client.json").is_file():
            missing.insert(0, "client.json or federation.json")
        if missing:
            raise FederationError(
                f"{folder} has no {missing[0]}: name a folder `server` or `clients/N` that `hosfl federation` made"
            )
        if kind == "server":
            roster = Roster.read(folder / "federation.json")
            address, run, client = roster.address, roster.run, None
        else:
            address, run, client = _read_client(folder / "client.json")
        try:
            owner, begins, expires = read_certificate(read_small(folder / f"{kind}.pem"))
        except FederationError as error:
            raise FederationError(f"{folder / f'{kind}.pem'}: {error}") from None
        member = cls(folder, address, run, client, expires)
        if owner != ("server" if client is None else f"client-{client}"):
            raise FederationError(f"{folder / f'{kind}.pem'} is {owner}'s, not {member.who}'s: take it from a copy")
        if not signed_by(*map(read_small, member.pem[:2])):
            raise FederationError(
                f"{folder / f'{kind}.pem'} is not of the authority in {folder / 'ca.pem'}: take the folder from a copy"
            )
        now = now or datetime.now(timezone.utc)
        if now < begins:
            raise FederationError(
                f"the certificate in {folder} begins on {begins:%Y-%m-%d}, and this machine's clock is at"
                f" {now:%Y-%m-%d}: set the clock"
            )
        left = expires - now
        remedy = f"`hosfl federation renew DIR {'server' if client is None else client}` makes a new one"
        if left <= timedelta(0):
            raise FederationError(f"the certificate in {folder} ended on {expires:%Y-%m-%d}: {remedy}")
        if left < WARN_BEFORE:
            warnings.warn(f"the certificate in {folder} ends on {expires:%Y-%m-%d}: {remedy}", stacklevel=2)
        key = folder / f"{kind}.key"
        if os.name != "nt" and key.stat().st_mode & 0o077:
            warnings.warn(f"others can read the key {key}: chmod 600 {shlex.quote(str(key))}", stacklevel=2)
        return member

    def context(self) -> ssl.SSLContext:
        """Make the TLS context for connections to the broker: TLS 1.2 or later, and the federation's authority only.

        Raises FederationError if certificate or key are damaged, or not a pair.
        """
        authority, certificate, key = self.pem
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the broker's certificate and host
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(authority)
            context.load_cert_chain(certificate, key, password="")  # without a password it would prompt for one
        except ssl.SSLError as error:
            raise FederationError(
                f"the certificates or the key in {self.folder} are damaged, or not of one pair: take the folder from a"
                f" copy ({error})"
            ) from None
        return context


def _read_client(path: Path) -> tuple[Address, str, int]:
    """Read a client.json: (the broker's address, the run's name, the client's number). Raises FederationError."""
    saved = read_object(path)
    try:
        address, run, client = Address.parse(saved["address"]), check_run(saved["run"]), saved["client"]
        if type(client) is not int or client < 0:
            raise ValueError(f"a client's number must be an integer from 0 on, got {client!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise FederationError(f"{path} is damaged: take it from a copy ({error!r})") from None
    return address, run, client
