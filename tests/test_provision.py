"""Certificates and permissions of a federation, by a real broker: who is refused, and what edited files give away."""

import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time

import pytest

pytest.importorskip("cryptography")

from broker import Broker

from hosfl.cli import main
from hosfl.engines.engine import EngineError
from hosfl.engines.provision import Federation, check_broker, check_refusal, read_member


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started(Broker):
    """A federation's own broker."""

    def __init__(self, federation):
        super().__init__(federation.folder)
        self.settings = federation.folder / "broker" / "nats.conf"
        self.port = int(federation.address.rpartition(":")[2])

    def reload(self):
        self.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)


@pytest.fixture
def federation(tmp_path):
    return Federation.create(tmp_path / "fed", 3, f"127.0.0.1:{free_port()}", "lab-1")


@pytest.fixture
def broker(federation):
    started = Started(federation)
    started.start()
    yield started
    started.stop()


class Speaker:
    """Somebody at the broker, with a certificate or without one."""

    def __init__(self, federation, folder=None, role="client", ca=None):
        host, _, port = federation.address.partition(":")
        plain = socket.create_connection((host, int(port)), timeout=5)
        plain.recv(65536)
        context = ssl.create_default_context(cafile=str(ca or federation.folder / "ca" / "ca.pem"))
        if folder is not None:
            context.load_cert_chain(str(folder / f"{role}.pem"), str(folder / f"{role}.key"))
        self.socket = context.wrap_socket(plain, server_hostname=host)
        self.file = self.socket.makefile("rb")
        self.said = self.tell(b'CONNECT {"verbose":false,"pedantic":false}\r\n')

    def tell(self, line):
        """What the broker says to a line, up to its PONG or the end."""
        with contextlib.suppress(OSError):
            self.socket.sendall(line + b"PING\r\n")
        said = b""
        with contextlib.suppress(OSError):
            while (heard := self.file.readline()) not in (b"", b"PONG\r\n"):
                said += heard
        return said

    def close(self):
        self.file.close()
        self.socket.close()


def test_folders_and_their_modes(federation):
    folder = federation.folder
    for path in folder.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for part in ("", "ca", "broker", "server", "clients/0", "clients/2"):
        assert stat.S_IMODE((folder / part).stat().st_mode) == 0o700, part
    told = json.loads((folder / "clients" / "1" / "client.json").read_text())
    assert told == {"format": 1, "address": federation.address, "run": "lab-1", "number": 1}
    server = read_member(folder / "server", "server")
    assert (server.clients, server.run, server.check()) == (3, "lab-1", "")
    assert not list((folder / "clients" / "0").glob("ca.key"))
    names = [user["name"] for user in federation.clients]
    assert len(set(names)) == 3


def test_each_speaks_and_hears_for_itself_alone(federation, broker):
    folder = federation.folder
    one = Speaker(federation, folder / "clients" / "1")
    assert one.said == b""
    assert one.tell(b"SUB hosfl.lab-1.down.1.m 1\r\n") == b""
    assert one.tell(b"PUB hosfl.lab-1.up.1.m 2\r\nhi\r\n") == b""
    for line in (
        b"SUB hosfl.lab-1.down.2.m 2\r\n",
        b"SUB hosfl.lab-1.up.1.m 3\r\n",
        b"SUB > 4\r\n",
        b"SUB hosfl.> 5\r\n",
        b"SUB hosfl.lab-1.down.*.m 6\r\n",
        b"SUB _INBOX.x 7\r\n",
        b"PUB hosfl.lab-1.up.2.m 2\r\nhi\r\n",
        b"PUB hosfl.lab-1.down.1.m 2\r\nhi\r\n",
        b"PUB hosfl.lab-2.up.1.m 2\r\nhi\r\n",
    ):
        assert b"Permissions Violation" in one.tell(line), line
    one.close()
    server = Speaker(federation, folder / "server", "server")
    assert server.tell(b"SUB hosfl.lab-1.up.> 1\r\n") == b""
    assert b"Permissions Violation" in server.tell(b"SUB hosfl.lab-1.down.> 2\r\n")
    assert b"Permissions Violation" in server.tell(b"PUB hosfl.lab-1.up.1.m 2\r\nhi\r\n")
    server.close()


def lets_in(federation, *arguments, **more):
    """Whether somebody's subscription stands: the broker answers, and has nothing against it."""
    try:
        speaker = Speaker(federation, *arguments, **more)
        speaker.socket.sendall(b"PING\r\n")
        stands = not speaker.said and speaker.file.readline() == b"PONG\r\n"
        speaker.close()
        return stands
    except OSError:
        return False


def test_strangers_are_refused(federation, broker, tmp_path):
    assert lets_in(federation, federation.folder / "clients" / "0")
    assert not lets_in(federation)
    other = Federation.create(tmp_path / "other", 1, federation.address, "lab-1")
    assert not lets_in(federation, other.folder / "clients" / "0")
    # Signed by this authority, and nobody whom the broker knows.
    federation._issue(tmp_path / "stranger", "client", "client-0@lab-1")
    assert not lets_in(federation, tmp_path / "stranger")


def test_a_certificate_that_was_revoked(federation, broker, tmp_path):
    folder = federation.folder / "clients" / "2"
    old = tmp_path / "old"
    old.mkdir()
    for path in folder.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    staying = Speaker(federation, federation.folder / "clients" / "0")
    assert lets_in(federation, old)
    federation.revoke(2)
    broker.reload()
    assert not lets_in(federation, old)
    federation.renew("2")
    broker.reload()
    assert lets_in(federation, folder)
    assert not lets_in(federation, old)
    assert staying.tell(b"SUB hosfl.lab-1.down.0.m 1\r\n") == b""  # nobody else noticed
    staying.close()
    number = federation.add()
    assert number == 3
    broker.reload()
    assert lets_in(federation, federation.folder / "clients" / "3")


def test_the_server_refuses_a_broker_that_gives_more(federation):
    check_broker(federation)
    own, conf = federation.folder / "broker" / "permissions.conf", federation.folder / "broker" / "nats.conf"
    edits = [
        (own, "hosfl.lab-1.up.1.>", "hosfl.lab-1.up.>"),
        (own, "hosfl.lab-1.down.1.>", ">"),
        (own, "verify_and_map: true", "verify_and_map: false"),
        (own, "  users = [", '  users = [\n    {user: "x", password: "y"}'),
        (own, "tls {", "ignored {"),
        (conf, "include ./permissions.conf", ""),
        (conf, "include ./permissions.conf", "include ./permissions.conf\nno_auth_user: x"),
        (conf, "include ./permissions.conf", "include ./permissions.conf\naccounts { A: {} }"),
        (conf, "include ./permissions.conf", "include ./permissions.conf\nwebsocket { port: 1, no_tls: true }"),
        (conf, "include ./permissions.conf", "include ./permissions.conf\n  authorization: { user: a }"),
        (conf, "include ./permissions.conf", "include ./permissions.conf\ninclude ./more.conf"),
        (conf, "include ./permissions.conf", '"TLS" { }\ninclude ./permissions.conf'),
    ]
    for path, before, after in edits:
        whole = path.read_text()
        assert before in whole
        path.write_text(whole.replace(before, after))
        with pytest.raises(EngineError):
            check_broker(federation)
        path.write_text(whole)
    conf.write_text(conf.read_text().replace("0.0.0.0", "127.0.0.1").replace("max_pending: 256MB", "max_pending: 1GB"))
    check_broker(federation)
    conf.unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        check_broker(federation)


def test_a_broker_that_takes_anybody(federation, broker):
    server = read_member(federation.folder / "server", "server")
    check_refusal(server)
    broker.stop()
    check_refusal(server)  # nobody is there yet
    text = broker.settings.read_text()
    broker.settings.write_text(text.replace("include ./permissions.conf", ""))
    broker.start()
    with pytest.raises(EngineError, match="without TLS"):
        check_refusal(server)
    broker.stop()
    own = federation.permissions().partition("authorization")[0].replace("verify_and_map: true", "verify: false")
    broker.settings.write_text(text.replace("include ./permissions.conf", own))
    broker.start()
    with pytest.raises(EngineError, match="without a certificate"):
        check_refusal(server)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"clients": 0}, "one client or more"),
        ({"days": 0}, "a day or more"),
        ({"run": "a b"}, "letters, digits"),
        ({"run": "a.>"}, "letters, digits"),
        ({"address": "host:0"}, "no port"),
        ({"address": "host:x"}, "no port"),
        ({"address": ""}, "HOST"),
        ({"address": "a b"}, "HOST"),
        ({"address": "*"}, "HOST"),
    ],
)
def test_what_cannot_be_made(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        Federation.create(tmp_path / "fed", **{"clients": 1, "address": "localhost", **wrong})
    assert not (tmp_path / "fed" / "federation.json").exists()


def test_certificates_that_end(tmp_path, monkeypatch):
    made = Federation.create(tmp_path / "fed", 1, "localhost", days=10)
    member = read_member(made.folder / "clients" / "0", "client")
    assert "renew it" in member.check()
    assert [told for *_, told in made.described()] == ["ends soon"] * 3
    from hosfl.engines import provision

    later = provision._now() + provision.datetime.timedelta(days=11)
    monkeypatch.setattr(provision, "_now", lambda: later)
    with pytest.raises(EngineError, match="ended on"):
        member.check()
    (made.folder / "clients" / "0" / "client.key").unlink()
    with pytest.raises(EngineError, match="is missing"):
        member.check()


def test_the_commands(tmp_path, capsys):
    folder = str(tmp_path / "fed")
    assert main(["federation", "create", folder, "--clients", "2", "--address", "localhost:4999"]) == 0
    assert f"hosfl join {folder}/clients/0" in capsys.readouterr().out
    assert main(["federation", "add", folder]) == 0
    assert main(["federation", "revoke", folder, "1"]) == 0
    assert "SIGHUP" in capsys.readouterr().out
    assert main(["federation", "show", folder]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5
    assert shown[3].endswith("revoked")
    for wrong in (
        ["revoke", folder, "7"],
        ["revoke", folder, "server"],
        ["renew", folder, "x"],
        ["show", str(tmp_path)],
    ):
        with contextlib.suppress(SystemExit):
            assert main(["federation", *wrong]) != 0
    with pytest.raises(SystemExit):
        main(["federation", "create", folder, "--clients", "2", "--address", "localhost"])
    for damaged in (b"", b"{}", b"[]", b'{"format": 2}'):
        (tmp_path / "fed" / "clients" / "0" / "client.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="not what hosfl federation made"):
            read_member(tmp_path / "fed" / "clients" / "0", "client")


def test_a_run_over_certificates_by_its_commands(federation, broker, tmp_path):
    """What an operator and two device owners type; one client belongs to nobody."""
    folder, environment = federation.folder, {**os.environ, "OMP_NUM_THREADS": "1"}
    hosfl = [sys.executable, "-W", "ignore", "-m", "hosfl.cli"]
    joined = [
        subprocess.Popen([*hosfl, "join", folder / "clients" / str(n)], env=environment, stderr=subprocess.DEVNULL)
        for n in range(2)
    ]
    settings = ["--rounds", "5", "--sampled", "2", "--batch", "8", "--least", "2", "--out", tmp_path / "run"]
    try:
        served = subprocess.run([*hosfl, "serve", folder / "server", *settings], env=environment, timeout=120)
        assert served.returncode == 0
        for process in joined:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        for process in joined:
            process.kill()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["replicas"]["clients"] == 3
    assert summary["replicas"]["equal"]
    assert (folder / "clients" / "0" / "state" / "state.safetensors").exists()
    status = subprocess.run([*hosfl, "status", tmp_path / "run"], capture_output=True, text=True, env=environment)
    assert "round 5 of 5" in status.stdout
    assert "here: 0, 1; not here: 2" in status.stdout
