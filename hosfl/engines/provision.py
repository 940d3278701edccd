"""A federation's certificates and its broker's permissions: `hosfl federation`.

    DIR/federation.json      who belongs to it
    DIR/ca                   the authority's key, which signs all others: it stays here
    DIR/broker               for the machine of the broker: nats.conf, permissions.conf, its certificate and key
    DIR/server               for the machine of the server
    DIR/clients/K            for the owner of client K's device

Everybody proves who they are with a certificate of this authority (mutual TLS). The broker knows each by the name in
it, and by that what it may say and hear: client K its own subjects, and nothing of anybody else's. A name has a random
part, so that the certificate that was revoked is nobody's when its number gets a new one.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import secrets
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosfl.engines.engine import EngineError
from hosfl.extras import needed
from hosfl.files import write_atomically

FORMAT = 1
PORT = 4222
SOON = datetime.timedelta(days=30)  # before its end a certificate is called to mind
AUTHORITY_DAYS = 3650
DIRECT = (
    "authorization",
    "accounts",
    "no_auth_user",
    "tls",
    "websocket",
    "mqtt",
    "leafnodes",
    "gateway",
    "allow_non_tls",
)
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Member:
    """What a server or a client has in its folder. number: a client's. clients: how many there are, for the server."""

    folder: Path
    address: str
    run: str
    role: str
    number: int
    clients: int

    @property
    def url(self) -> str:
        return f"tls://{self.address}"

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """The authority's certificate, one's own, and its key."""
        return self.folder / "ca.pem", self.folder / f"{self.role}.pem", self.folder / f"{self.role}.key"

    def check(self) -> str:
        """A word about a certificate that ends soon, or "". Raises EngineError for one that has ended or is missing."""
        for path in self.paths:
            if not path.is_file():
                raise EngineError(f"{path} is missing: ask the federation's operator for the folder again")
        ends = _ends(self.paths[1])
        left = ends - _now()
        if left < datetime.timedelta():
            raise EngineError(f"the certificate in {self.folder} ended on {ends:%Y-%m-%d}: hosfl federation renew")
        return f"the certificate in {self.folder} ends on {ends:%Y-%m-%d}: renew it" if left < SOON else ""


def read_member(folder: Path, role: str) -> Member:
    """A server's or a client's folder. Raises ValueError, FileNotFoundError."""
    path = folder / f"{role}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no {role}'s folder of hosfl federation create: there is no {path.name}")
    try:
        told = json.loads(path.read_bytes())
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']!r}")
        number, clients = int(told.get("number", -1)), int(told.get("clients", 0))
        member = Member(folder, str(told["address"]), str(told["run"]), role, number, clients)
        _host_port(member.address)
        _checked_name(member.run)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not what hosfl federation made: {error}") from None
    return member


class Federation:
    """A federation's folder, with its authority. Raises FileNotFoundError, ValueError for what is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "federation.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no federation: make one with hosfl federation create")
        try:
            self.told: dict[str, Any] = json.loads(path.read_bytes())
            if self.told["format"] != FORMAT:
                raise ValueError(f"format {self.told['format']!r}")
            self.run, self.address = str(self.told["run"]), str(self.told["address"])
            self.clients: list[dict[str, Any]] = self.told["clients"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not what hosfl federation made: {error}") from None

    @classmethod
    def create(cls, folder: Path, clients: int, address: str, run: str = "hosfl", days: int = 365) -> Federation:
        """A new one. address: HOST or HOST:PORT at which everybody reaches the broker. Raises FileExistsError,
        ValueError."""
        if clients < 1:
            raise ValueError(f"a federation has one client or more, got {clients}")
        if days < 1:
            raise ValueError(f"certificates last a day or more, got {days}")
        _checked_name(run)
        host, port = _host_port(address)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        _write_authority(folder / "ca", run)
        told = {"format": FORMAT, "run": run, "address": f"{host}:{port}", "days": days, "server": "", "clients": []}
        write_atomically(folder / "federation.json", json.dumps(told).encode())
        made = cls(folder)
        made.renew("broker")
        made.renew("server")
        for _ in range(clients):
            made.add()
        return made

    def add(self) -> int:
        """One more client; returns its number."""
        number = len(self.clients)
        self.clients.append({"number": number, "name": "", "revoked": False})
        self._issue_client(number)
        self._issue_server()
        self._save()
        return number

    def revoke(self, number: int) -> None:
        """A client's certificate is nobody's from the broker's next reload on."""
        self._client(number)["revoked"] = True
        self._save()

    def renew(self, who: str) -> None:
        """New certificate and key: of "broker", "server", or a client by its number, which is one again if revoked."""
        if who == "broker":
            self._issue_broker()
        elif who == "server":
            self.told["server"] = f"server.{secrets.token_hex(8)}@{self.run}"
            self._issue(self.folder / "server", "server", self.told["server"])
            self._issue_server()
        elif who.isdecimal():
            self._client(int(who))["revoked"] = False
            self._issue_client(int(who))
        else:
            raise ValueError(f"broker, server or a client's number is needed, got {who!r}")
        self._save()

    def described(self) -> list[tuple[str, str, str]]:
        """(who, the end of its certificate, what there is to say) of all members."""
        rows = []
        for who, path in (("broker", "broker/broker.pem"), ("server", "server/server.pem")):
            rows.append((who, *_told_end(self.folder / path)))
        for client in self.clients:
            end, told = _told_end(self.folder / f"clients/{client['number']}/client.pem")
            rows.append((f"client {client['number']}", end, "revoked" if client["revoked"] else told))
        return rows

    def permissions(self) -> str:
        """permissions.conf: who may say and hear what. `check_broker` holds the broker's file against it."""
        broker = (self.folder / "broker").absolute()
        up, down = f"hosfl.{self.run}.up", f"hosfl.{self.run}.down"
        users = [_user(self.told["server"], f"{down}.>", f"{up}.>")]
        users += [
            _user(client["name"], f"{up}.{client['number']}.>", f"{down}.{client['number']}.>")
            for client in self.clients
            if not client["revoked"]
        ]
        return "\n".join(
            [
                "# Made by hosfl federation, which writes it anew: whatever is changed here is refused by hosfl serve.",
                "tls {",
                f"  cert_file: {json.dumps(str(broker / 'broker.pem'))}",
                f"  key_file: {json.dumps(str(broker / 'broker.key'))}",
                f"  ca_file: {json.dumps(str(broker / 'ca.pem'))}",
                "  verify_and_map: true",
                "  timeout: 5",
                "}",
                "authorization {",
                "  timeout: 5",
                "  users = [",
                *users,
                "  ]",
                "}",
                "",
            ]
        )

    def _client(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self.clients):
            raise ValueError(f"there is no client {number} among {len(self.clients)}")
        return self.clients[number]

    def _issue_client(self, number: int) -> None:
        client, folder = self._client(number), self.folder / "clients" / str(number)
        client["name"] = f"client-{number}.{secrets.token_hex(8)}@{self.run}"
        self._issue(folder, "client", client["name"])
        self._write(folder / "client.json", {"number": number})

    def _issue_server(self) -> None:
        self._write(self.folder / "server" / "server.json", {"clients": len(self.clients)})

    def _write(self, path: Path, more: dict[str, Any]) -> None:
        told = {"format": FORMAT, "address": self.address, "run": self.run, **more}
        write_atomically(path, json.dumps(told).encode())

    def _issue_broker(self) -> None:
        host, port = _host_port(self.address)
        folder = self.folder / "broker"
        self._issue(folder, "broker", f"broker of {self.run}", hosts=dict.fromkeys([host, "localhost", "127.0.0.1"]))
        conf = folder / "nats.conf"
        if not conf.exists():
            write_atomically(conf, _CONF.format(run=self.run, port=port).encode())

    def _issue(self, folder: Path, role: str, name: str, hosts: Sequence[str] | dict[str, None] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        cert, key = _signed(self.folder / "ca", name, list(hosts), self.told["days"])
        _private(folder / f"{role}.key", key)
        write_atomically(folder / f"{role}.pem", cert)
        write_atomically(folder / "ca.pem", (self.folder / "ca" / "ca.pem").read_bytes())

    def _save(self) -> None:
        self.told["clients"] = self.clients
        write_atomically(self.folder / "federation.json", json.dumps(self.told, indent=1).encode())
        if self.told["server"]:
            _private(self.folder / "broker" / "permissions.conf", self.permissions().encode())


_CONF = """\
# What of the broker may be changed: where it listens, and its limits. Who may do what is in permissions.conf.
server_name: "hosfl-{run}"
listen: "0.0.0.0:{port}"
max_payload: 1MB
max_pending: 256MB
max_control_line: 4KB
max_subscriptions: 16
write_deadline: "10s"
ping_interval: "20s"
include ./permissions.conf
"""


def _user(name: str, publish: str, subscribe: str) -> str:
    allowed = f'publish: {{allow: ["{publish}"]}}, subscribe: {{allow: ["{subscribe}"]}}'
    return f"    {{user: {json.dumps(name)}, permissions: {{{allowed}}}}}"


def check_broker(federation: Federation) -> None:
    """Raises EngineError where the broker's files, as they lie here, give anybody more than `hosfl federation` does."""
    folder = federation.folder / "broker"
    try:
        conf, own = (folder / "nats.conf").read_text(), (folder / "permissions.conf").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"the broker's configuration cannot be read: {error}") from error
    if own != federation.permissions():
        raise EngineError(f"{folder / 'permissions.conf'} was changed: hosfl federation renew broker writes it anew")
    plain = [line.split("#")[0].split("//")[0].strip() for line in conf.splitlines()]
    if plain.count("include ./permissions.conf") != 1:
        raise EngineError(f"{folder / 'nats.conf'} does not include ./permissions.conf: anybody could speak as anybody")
    for line in plain:
        first = re.split(r"[\s:={]", line.lower(), maxsplit=1)[0].strip("\"'")
        if first in DIRECT or (first == "include" and line != "include ./permissions.conf"):
            raise EngineError(
                f"{folder / 'nats.conf'} says {line!r}, which may give more than permissions.conf: remove it"
            )


def check_refusal(member: Member, seconds: float = 5.0) -> None:
    """Raises EngineError where the broker at the address takes somebody without a certificate. An absent one passes."""
    host, port = _host_port(member.address)
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(member.paths[0]))
    try:
        with socket.create_connection((host, port), timeout=seconds) as plain:
            greeting = plain.recv(65536)
            if b'"tls_required":true' not in greeting.replace(b" ", b""):
                raise EngineError(f"the broker at {member.address} speaks without TLS: start it with its nats.conf")
            try:
                with context.wrap_socket(plain, server_hostname=host) as secure:
                    secure.sendall(b'CONNECT {"verbose":true}\r\nPING\r\n')
                    answer = secure.recv(65536)
            except (ssl.SSLError, ConnectionError):
                return  # as it should
            if answer and not answer.startswith(b"-ERR"):
                raise EngineError(
                    f"the broker at {member.address} takes clients without a certificate: its permissions"
                )
    except (TimeoutError, ConnectionError, socket.gaierror):
        return  # nobody is there yet; the engine waits for it


def _checked_name(run: str) -> None:
    if not SAFE.fullmatch(run):
        raise ValueError(f"a run's name is of letters, digits, _ and -, 64 at most, got {run!r}")


def _host_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon:
        host, port = address, str(PORT)
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host):
        raise ValueError(f"an address is HOST or HOST:PORT, a name or an IPv4 address, got {address!r}")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{port!r} is no port: an address is HOST:PORT, got {address!r}")
    return host, int(port)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _x509() -> Any:
    return needed("cryptography.x509", "certificates", "nats")


def _ends(path: Path) -> datetime.datetime:
    found: datetime.datetime = _x509().load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    return found


def _told_end(path: Path) -> tuple[str, str]:
    ends = _ends(path)
    left = ends - _now()
    return f"{ends:%Y-%m-%d}", "ended" if left < datetime.timedelta() else "ends soon" if left < SOON else ""


def _private(path: Path, data: bytes) -> None:
    """A file that its owner alone reads, at no moment anybody else."""
    if not path.exists():
        path.touch(mode=0o600)
    path.chmod(0o600)
    write_atomically(path, data)


def _write_authority(folder: Path, run: str) -> None:
    folder.mkdir(mode=0o700)
    cert, key = _signed(None, f"authority of {run}", [], AUTHORITY_DAYS)
    _private(folder / "ca.key", key)
    write_atomically(folder / "ca.pem", cert)


def _signed(authority: Path | None, name: str, hosts: list[str], days: int) -> tuple[bytes, bytes]:
    """A certificate and its key, as PEM: P-256, for a name; hosts: of a broker, which serves. None: an authority's."""
    x509 = _x509()
    needed("cryptography.x509.oid", "certificates", "nats")
    hashes = needed("cryptography.hazmat.primitives.hashes", "certificates", "nats")
    forms = needed("cryptography.hazmat.primitives.serialization", "certificates", "nats")
    curves = needed("cryptography.hazmat.primitives.asymmetric.ec", "certificates", "nats")
    key = curves.generate_private_key(curves.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name[:64])])
    signer, issuer = key, subject
    if authority is not None:
        signer = forms.load_pem_private_key((authority / "ca.key").read_bytes(), None)
        issuer = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes()).subject
    begin = _now() - datetime.timedelta(minutes=5)  # clocks differ
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=0 if authority is None else None), True)
        .add_extension(_usage(x509, authority is None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
    )
    if authority is not None:
        oid = x509.oid.ExtendedKeyUsageOID
        made = made.add_extension(x509.ExtendedKeyUsage([oid.SERVER_AUTH if hosts else oid.CLIENT_AUTH]), False)
        names = [_host(x509, host) for host in hosts] or [x509.RFC822Name(name)]
        made = made.add_extension(x509.SubjectAlternativeName(names), False)
    cert = made.sign(signer, hashes.SHA256())
    plain = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    return cert.public_bytes(forms.Encoding.PEM), plain


def _usage(x509: Any, authority: bool) -> Any:
    others = (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    )
    signs = {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    return x509.KeyUsage(**dict.fromkeys(others, False), **signs)


def _host(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
