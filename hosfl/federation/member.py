"""The folder that the server or a client's owner was handed: who that is, where the broker is, its certificate."""

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

SOON = timedelta(days=30)


@dataclass(frozen=True)
class Member:
    """Who may connect to the broker: the server, whose `client` is None, or a client by its number."""

    folder: Path
    address: Address
    run: str
    client: int | None
    expires: datetime

    @property
    def who(self) -> str:
        return "the server" if self.client is None else f"client {self.client}"

    @property
    def pem(self) -> tuple[Path, Path, Path]:
        """The files that prove it: the authority's certificate, its own, its key."""
        role = "server" if self.client is None else "client"
        return self.folder / "ca.pem", self.folder / f"{role}.pem", self.folder / f"{role}.key"

    @classmethod
    def read(cls, folder: Path, now: datetime | None = None) -> Member:
        """Of a folder `server` or `clients/N` that `hosfl federation` made.

        Warns of a certificate that ends within 30 days, and of a key that others can read. Raises FederationError for a
        folder that is not whole, and for a certificate that has ended or not begun: at the start of a run it says so
        before the broker refuses. now: with its time zone; default: the clock's.
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
            address, run, client = _client(folder / "client.json")
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
        renewed = f"`hosfl federation renew DIR {'server' if client is None else client}` makes a new one"
        if left <= timedelta(0):
            raise FederationError(f"the certificate in {folder} ended on {expires:%Y-%m-%d}: {renewed}")
        if left < SOON:
            warnings.warn(f"the certificate in {folder} ends on {expires:%Y-%m-%d}: {renewed}", stacklevel=2)
        key = folder / f"{kind}.key"
        if os.name != "nt" and key.stat().st_mode & 0o077:
            warnings.warn(f"others can read the key {key}: chmod 600 {shlex.quote(str(key))}", stacklevel=2)
        return member

    def context(self) -> ssl.SSLContext:
        """For connections to the broker: TLS 1.2 or later, this certificate, and no authority but the federation's.

        Raises FederationError where certificate and key are damaged, or not of one pair.
        """
        authority, certificate, key = self.pem
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks the broker's certificate and host
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(authority)
            context.load_cert_chain(certificate, key, password="")  # else one is asked for at the terminal
        except ssl.SSLError as error:
            raise FederationError(
                f"the certificates or the key in {self.folder} are damaged, or not of one pair: take the folder from a"
                f" copy ({error})"
            ) from None
        return context


def _client(path: Path) -> tuple[Address, str, int]:
    saved = read_object(path)
    try:
        address, run, client = Address.parse(saved["address"]), check_run(saved["run"]), saved["client"]
        if type(client) is not int or client < 0:
            raise ValueError(f"a client's number must be an integer from 0 on, got {client!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise FederationError(f"{path} is damaged: take it from a copy ({error!r})") from None
    return address, run, client
