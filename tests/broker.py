"""NATS brokers for the tests, certificates for it, and a client that speaks its protocol by hand."""

import os
import shutil
import socket
import ssl
import subprocess
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

NATS = shutil.which("nats-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Broker:
    """nats-server with a configuration; it may be stopped and started again. Its log lies in `folder`."""

    def __init__(self, conf, folder):
        if NATS is None:
            said = "no nats-server on the path: https://docs.nats.io, or Debian's package of that name"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
        self.conf, self.log, self.process = Path(conf), folder / "broker.log", None

    def start(self):
        with self.log.open("w") as log:
            # Somewhere else than its files: the paths in its configuration must hold all the same.
            self.process = subprocess.Popen([NATS, "-c", self.conf], stderr=log, cwd="/")
        self._wait(lambda: "Server is ready" in self.log.read_text())

    def _wait(self, until):
        end = time.monotonic() + 30
        while not until():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def reload(self):
        before = self.log.read_text().count("Reloaded server configuration")
        subprocess.run([NATS, "--signal", f"reload={self.pid_file}"], check=True)
        self._wait(lambda: self.log.read_text().count("Reloaded server configuration") > before)

    @property
    def pid_file(self):
        """Where a federation's configuration has it."""
        return self.conf.parent / "nats.pid"

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Plain(Broker):
    """One that anybody may speak to, on a free port of this machine. lines: more of its configuration."""

    def __init__(self, folder, lines=""):
        super().__init__(folder / "nats.conf", folder)
        self.port = free_port()
        self.conf.write_text(f"host: 127.0.0.1\nport: {self.port}\n{lines}\n")
        self.url = f"nats://127.0.0.1:{self.port}"


class Stranger:
    """A client of the broker that sends whatever it likes."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.file = self.socket.makefile("rb")
        assert self.file.readline().startswith(b"INFO")
        self.socket.sendall(b'CONNECT {"verbose": false, "headers": true, "no_responders": true}\r\n')
        self.flush()

    def publish(self, subject, data, headers=None, reply=b""):
        """subject, reply, headers: bytes that go out as they are."""
        words = [b"PUB" if headers is None else b"HPUB", subject, reply]
        words += [] if headers is None else [b"%d" % len(headers)]
        line = b" ".join([*(word for word in words if word), b"%d" % (len(headers or b"") + len(data))])
        self.socket.sendall(b"".join((line, b"\r\n", headers or b"", data, b"\r\n")))

    def subscribe(self, subject):
        self.socket.sendall(b"SUB " + subject + b" 1\r\n")
        self.flush()

    def next(self, timeout=5):
        """The data of the next message."""
        self.socket.settimeout(timeout)
        while True:
            line = self.file.readline()
            if line.startswith(b"MSG"):
                data = self.file.read(int(line.split()[-1]) + 2)
                return data[:-2]
            if line.startswith(b"PING"):
                self.socket.sendall(b"PONG\r\n")
            assert line, "the broker hung up"

    def flush(self):
        """Until the broker has read everything. What it says besides is thrown away."""
        self.socket.sendall(b"PING\r\n")
        self.socket.settimeout(20)
        while (line := self.file.readline()) != b"PONG\r\n":
            assert line, "the broker hung up"
            assert not line.startswith(b"-ERR"), line
            if line.startswith(b"MSG"):
                self.file.read(int(line.split()[-1]) + 2)

    def close(self):
        self.file.close()
        self.socket.close()


def certificates(folder, names):
    """Make an authority and certificates that it signed: NAME.pem and NAME.key for each name, and ca.pem."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def named(name):
        return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])

    authority = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(timezone.utc)
    for name in ("ca", *names):
        key = authority if name == "ca" else ec.generate_private_key(ec.SECP256R1())
        made = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named("ca"))
        made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        made = made.add_extension(x509.BasicConstraints(name == "ca", None), critical=True)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        if name == "ca":
            made = made.add_extension(x509.KeyUsage(*[False] * 5, True, True, False, False), critical=True)
        else:
            signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
            made = made.add_extension(signer, critical=False)
            mail = x509.RFC822Name(f"{name}@hosfl")  # what the broker knows its users by
            alternatives = [mail, x509.DNSName("localhost")]
            made = made.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        signed = made.sign(authority, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        kind, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, plain))


def context(folder, name):
    """For a connection with one of these certificates."""
    made = ssl.create_default_context(cafile=folder / "ca.pem")
    made.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 has it by default
    made.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return made
