"""The broker's configuration: making it, checking a file against it, and checking the running broker.

The broker is nats-server 2.9 or later. It takes only TLS 1.2 and 1.3.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
from itertools import zip_longest
from pathlib import Path

from hosfl.federation.certificates import FederationError
from hosfl.federation.member import Member
from hosfl.federation.roster import Roster
from hosfl.files import read_small

MAX_PAYLOAD = 1 << 20  # bytes of one message; larger ones are sent in pieces
MAX_PENDING = 64 << 20  # bytes pending for one connection, above which the broker closes it
CLOSED_ERRORS = (ssl.SSLError, ConnectionResetError, BrokenPipeError)  # raised if the broker closes the connection

# nats-server 2.9 tries a certificate's e-mail addresses, then its DNS names, URIs and subject; the first that is a
# user's name determines the user. Our certificates have one unique e-mail address, and nothing else that could be a
# user's name. The broker cannot limit connections per user.
TEMPLATE = """\
# Made by `hosfl federation`, which writes it again. Change nothing: `hosfl serve` refuses it then.
# Logging and monitoring are options of nats-server.
listen: {listen}
pid_file: {pid}

tls {{
  cert_file: {certificate}
  key_file: {key}
  ca_file: {authority}
  # No connection without a certificate of this authority. The e-mail address in it is the user.
  verify_and_map: true
  timeout: 5
  cipher_suites: [
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
  ]
}}

# What a user is not allowed here, it is refused.
authorization {{
  timeout: 6
  users: [
{users}
  ]
}}

# For the server and every client one connection and one that has not yet been found dead, and a few to spare.
max_connections: {connections}
max_subscriptions: 1024
max_control_line: 4096
max_payload: {payload}
max_pending: {pending}
write_deadline: "60s"
ping_interval: "20s"
ping_max: 2
"""


def configuration(roster: Roster, folder: str) -> str:
    """Return the text of `nats.conf`. folder: the absolute path of the broker's files on its machine."""
    address, users = roster.address, roster.users()
    if address.is_loopback:
        host = "127.0.0.1" if address.host == "localhost" else address.host
    else:
        host = "::" if ":" in address.host else "0.0.0.0"
    return TEMPLATE.format(
        listen=_quoted(f"[{host}]:{address.port}" if ":" in host else f"{host}:{address.port}"),
        pid=_quoted(f"{folder}/nats.pid"),
        certificate=_quoted(f"{folder}/broker.pem"),
        key=_quoted(f"{folder}/broker.key"),
        authority=_quoted(f"{folder}/ca.pem"),
        users="\n".join(_user(name, roster.run, client) for name, client in users.items()),
        connections=2 * (1 + len(roster.clients)) + 16,
        payload=MAX_PAYLOAD,
        pending=MAX_PENDING,
    )


def _user(name: str, run: str, client: int | None) -> str:
    """Return the line of a user. client: its number; None: the server."""
    up, down = (f"hosfl.{run}.{direction}.{'' if client is None else f'{client}.'}>" for direction in ("up", "down"))
    publish, subscribe = (down, up) if client is None else (up, down)
    permissions = f'publish: {{allow: ["{publish}"]}}, subscribe: {{allow: ["{subscribe}"]}}'
    return f'    {{user: "{name}", permissions: {{{permissions}}}}}'


def _quoted(text: str) -> str:
    """Return a string literal for nats-server, as in JSON. Raises ValueError for characters that it cannot contain."""
    if not text.isprintable():
        raise ValueError(f"the path of the broker's folder has characters that its configuration cannot hold: {text!r}")
    return json.dumps(text, ensure_ascii=False)


def check_permissions(conf: Path | str, roster: Roster) -> None:
    """Check that the broker's configuration is, line by line, the one made for this roster.

    conf: the file, or its text. The broker's folder may have been moved. Raises FederationError naming the first line
    that differs; OSError for a file that cannot be read.
    """
    text = read_small(conf).decode("utf-8", "replace") if isinstance(conf, Path) else conf
    where = conf if isinstance(conf, Path) else "the broker's configuration"
    remedy = "make it again with `hosfl federation renew DIR broker`, and let the broker reload it"
    match = re.search(r'^  cert_file: ("/.*/broker\.pem")$', text, re.M)
    try:
        if match is None:
            raise ValueError
        expected = configuration(roster, str(json.loads(match[1])).removesuffix("/broker.pem"))
    except ValueError:
        raise FederationError(f"{where} names no certificate of the broker in `tls`: {remedy}") from None
    for number, lines in enumerate(zip_longest(text.split("\n"), expected.split("\n")), 1):
        if lines[0] != lines[1]:
            actual, made = ("nothing" if line is None else f"`{line.strip()}`" for line in lines)
            raise FederationError(
                f"{where}, line {number}: there is {actual} where {made} was made, so the broker may allow what it must"
                f" refuse: {remedy}"
            )


def check_broker(member: Member, timeout: float = 10.0) -> None:
    """Check that the running broker refuses connections without a certificate, and accepts and limits this member.

    Connects without a certificate, and as this member; `check_permissions` checks the permissions of others. timeout:
    seconds for each answer. Raises FederationError if a check fails, or the broker is another federation's; OSError if
    there is no answer.
    """
    with_certificate = member.context()
    without_certificate = ssl.create_default_context(cafile=str(member.folder / "ca.pem"))
    try:
        answer = _ask(member, without_certificate, b"", timeout)
    except CLOSED_ERRORS as error:
        if isinstance(error, ssl.SSLCertVerificationError):
            raise _of_another(member, error) from None
        answer = b""
    if b"PONG" in answer:
        raise FederationError(
            f"the broker at {member.address} lets in who has no certificate: start it with the nats.conf that"
            " `hosfl federation` made"
        )
    # A subscription and a message that this member is not allowed: the broker must refuse both.
    forbidden = f"SUB > 1\r\nPUB hosfl.{member.run}.probe 0\r\n\r\n".encode()
    try:
        answer = _ask(member, with_certificate, forbidden, timeout)
    except ssl.SSLCertVerificationError as error:
        raise _of_another(member, error) from None
    except CLOSED_ERRORS as error:
        raise _refused(member, str(error)) from None
    if b"PONG" not in answer:
        raise _refused(member, answer.decode("utf-8", "replace").strip())
    for violation in (b"Permissions Violation for Subscription", b"Permissions Violation for Publish"):
        if violation not in answer:
            raise FederationError(
                f"the broker at {member.address} lets {member.who} "
                f"{'subscribe' if b'Sub' in violation else 'publish'} what is not its own: start it with the nats.conf"
                " that `hosfl federation` made"
            )


def _ask(member: Member, context: ssl.SSLContext, lines: bytes, timeout: float) -> bytes:
    """Connect, send these lines, and return the broker's answer up to its PONG, or until it closes the connection."""
    host, port = member.address.host, member.address.port
    with socket.create_connection((host, port), timeout) as plain:
        info = b""
        while not info.endswith(b"\n") and (more := plain.recv(1)) and len(info) < 1 << 16:
            info += more
        try:
            if not info.startswith(b"INFO "):
                raise ValueError
            tls = json.loads(info[5:]).get("tls_required")
        except (ValueError, AttributeError):
            raise FederationError(f"what answers at {member.address} is no NATS broker") from None
        if not tls:
            raise FederationError(
                f"the broker at {member.address} speaks without TLS: start it with the nats.conf that"
                " `hosfl federation` made"
            )
        with context.wrap_socket(plain, server_hostname=host) as secure:
            secure.sendall(b'CONNECT {"verbose":false,"pedantic":false,"tls_required":true}\r\n' + lines + b"PING\r\n")
            answer = b""
            while b"PONG" not in answer and (more := secure.recv(4096)):
                answer += more
    return answer


def _refused(member: Member, reason: str) -> FederationError:
    return FederationError(
        f"the broker at {member.address} refuses the certificate in {member.folder}: it was revoked or renewed, or the"
        f" broker has not yet read its new configuration ({reason or 'it closed the connection'})"
    )


def _of_another(member: Member, error: ssl.SSLCertVerificationError) -> FederationError:
    return FederationError(
        f"the broker at {member.address} is not this federation's, or its certificate has ended or is for another"
        f" address: {error.verify_message}"
    )
