"""Federations: their folders, and what a real broker with their configuration lets pass."""

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import warnings
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

import nats
import pytest
from broker import Broker, free_port
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st

from hosfl import federation
from hosfl.cli import main
from hosfl.federation import FederationError, Member, Roster, check_broker, check_permissions, provision
from hosfl.federation.broker import configuration
from hosfl.federation.certificates import Authority, identity, make_authority
from hosfl.federation.roster import Address, CertificateStatus
from hosfl.files import FolderLock, RunFolderError, write_json

ROOT = Path(__file__).parent.parent
REFUSED = (ssl.SSLError, ConnectionError, nats.errors.Error, asyncio.IncompleteReadError)


@pytest.fixture
def start(tmp_path):
    """Calls start(conf): a broker with this configuration."""
    started = []

    def with_conf(conf):
        started.append(Broker(conf, tmp_path))
        started[-1].start()
        return started[-1]

    yield with_conf
    for broker in started:
        broker.stop()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A federation of three clients, made once."""
    folder = tmp_path_factory.mktemp("federation") / "fed"
    federation.create(folder, 3, "localhost:4222", "demo")
    return folder


@pytest.fixture
def fed(template, tmp_path):
    """A federation of three clients with a port of its own, for a test to change."""
    folder = tmp_path / "fed"
    shutil.copytree(template, folder)
    address = Address("localhost", free_port())
    roster = replace(federation.read(folder), address=address)
    provision._write_roster(folder, roster)
    for number in range(3):
        path = folder / f"clients/{number}/client.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "address": str(address)}))
    return folder


@pytest.fixture
def broker(fed, start):
    return start(fed / "broker/nats.conf")


class Connection:
    """One to the broker, and what the broker refused it."""

    async def open(self, folder, context=None):
        self.refused = []
        self.closed = asyncio.Event()

        async def on_error(error):
            self.refused.append(str(error))

        async def on_close():
            self.closed.set()

        member = Member.read(folder)
        given = {"tls": context or member.context(), "allow_reconnect": False, "connect_timeout": 5}
        self.nats = await nats.connect(f"tls://{member.address}", error_cb=on_error, closed_cb=on_close, **given)
        return self

    async def settle(self):
        """Until the broker has seen all that was said, and we its refusals."""
        await self.nats.flush()  # nats-py 2.16 sends the ping of a flush before what waits to be sent,
        await self.nats.flush()  # but after what the last flush has sent

    async def close(self):
        await self.nats.close()


async def connect(folder, context=None):
    return await Connection().open(folder, context)


def lets_in(folder, context=None):
    async def tried():
        await (await connect(folder, context)).close()

    asyncio.run(tried())


def refuses(folder, context=None):
    with pytest.raises(REFUSED):
        lets_in(folder, context)
    return True


def context_of(folder, issued, tmp_path):
    """For TLS with a certificate that lies in no folder of the federation's."""
    (tmp_path / "own.pem").write_bytes(issued.certificate)
    (tmp_path / "own.key").write_bytes(issued.key)
    context = ssl.create_default_context(cafile=folder / "ca/ca.pem")
    context.load_cert_chain(tmp_path / "own.pem", tmp_path / "own.key")
    return context


def authority(folder):
    return Authority((folder / "ca/ca.pem").read_bytes(), (folder / "ca/ca.key").read_bytes())


# --- who gets in --------------------------------------------------------------------------------------------------


def test_server_and_clients_reach_each_other(fed, broker):
    """Each on its own subjects, up to a whole mebibyte, with TLS 1.3 and 1.2."""

    async def exchange():
        server, client = await connect(fed / "server"), Member.read(fed / "clients/1").context()
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        client = await connect(fed / "clients/1", client)
        down = await client.nats.subscribe("hosfl.demo.down.1.>")
        up = await server.nats.subscribe("hosfl.demo.up.>")
        await asyncio.gather(client.settle(), server.settle())
        large = bytes(1 << 20)
        await server.nats.publish("hosfl.demo.down.1.ask", large, reply="hosfl.demo.up.1.answer")
        asked = await down.next_msg(10)
        assert asked.data == large
        await client.nats.publish(asked.reply, b"scalars")
        assert (await up.next_msg(10)).data == b"scalars"
        assert server.refused == client.refused == []
        await asyncio.gather(server.close(), client.close())

    asyncio.run(exchange())


def test_who_has_no_certificate_stays_out(fed, broker):
    refuses(fed / "clients/1", ssl.create_default_context(cafile=fed / "ca/ca.pem"))


def test_a_certificate_of_another_authority_stays_out(fed, broker, tmp_path, monkeypatch):
    """Although the name in it is that of a client."""
    federation.create(tmp_path / "other", 1, "localhost")
    serial = federation.read(fed).clients[1].serial
    monkeypatch.setattr(x509, "random_serial_number", lambda: int(serial, 16))
    forged = authority(tmp_path / "other").client("client-1", 9)
    monkeypatch.undo()
    assert identity("client-1", forged.serial) in federation.read(fed).users()
    refuses(fed / "clients/1", context_of(fed, forged, tmp_path))


def test_a_certificate_that_nobody_has_on_the_roster_stays_out(fed, broker, tmp_path):
    refuses(fed / "clients/1", context_of(fed, authority(fed).client("client-1", 9), tmp_path))


def test_the_broker_s_own_certificate_is_no_client_s(fed, broker, tmp_path):
    refuses(fed / "clients/1", context_of(fed, authority(fed).broker("localhost", 9), tmp_path))


def test_old_tls_is_refused(fed, broker):
    context = Member.read(fed / "clients/1").context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    refuses(fed / "clients/1", context)


def test_a_client_refuses_a_broker_of_another_authority(fed, broker, tmp_path):
    federation.create(tmp_path / "other", 2, str(federation.read(fed).address))
    with pytest.raises(ssl.SSLCertVerificationError):
        lets_in(tmp_path / "other/clients/1")


# --- what they may do ---------------------------------------------------------------------------------------------


def subjects(*ways):
    return [f"hosfl.demo.{way}" for way in ways]


FORBIDDEN = {
    "clients/1": (
        [*subjects("up.2.answer", "up.10.answer", "up.1", "down.1.ask", "down.2.ask"), "_INBOX.a", "$SYS.REQ.A"],
        [*subjects("down.2.>", "down.*.ask", "down.>", "up.1.>", "up.>"), "*.demo.down.1.>", ">", "_INBOX.a"],
    ),
    "server": (
        [*subjects("up.1.answer", "other"), "hosfl.other.down.1.ask", "_INBOX.a"],
        [*subjects("down.>", "*.>"), "hosfl.>", ">", "_INBOX.>", "$SYS.>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("who", FORBIDDEN)
def test_nobody_speaks_or_listens_as_somebody_else(who, fed, broker):
    publish, subscribe = FORBIDDEN[who]

    async def tried():
        one = await connect(fed / who)
        for subject in publish:
            await one.nats.publish(subject, b"a lie")
        for subject in subscribe:
            await one.nats.subscribe(subject)
        await one.settle()
        said = {(a.lower(), b.lower()) for e in one.refused for a, b in re.findall(r"for (\w+).*? to \"(\S+)\"", e)}
        await one.close()
        return said

    said = asyncio.run(tried())
    assert said == {("publish", s.lower()) for s in publish} | {("subscription", s.lower()) for s in subscribe}


def test_a_lie_reaches_nobody(fed, broker):
    async def told():
        server, honest, liar = [await connect(fed / who) for who in ("server", "clients/2", "clients/1")]
        heard = [await server.nats.subscribe("hosfl.demo.up.>"), await honest.nats.subscribe("hosfl.demo.down.2.>")]
        overheard = await liar.nats.subscribe("hosfl.demo.down.2.>")
        await asyncio.gather(*(one.settle() for one in (server, honest, liar)))
        await liar.nats.publish("hosfl.demo.up.2.answer", b"a lie")
        await liar.nats.publish("hosfl.demo.down.2.ask", b"a lie")
        await liar.nats.publish("hosfl.demo.up.1.answer", b"true")  # after them: it comes, so they would have come
        await liar.settle()
        await server.nats.publish("hosfl.demo.down.2.ask", b"true")
        assert [(await each.next_msg(10)).data for each in heard] == [b"true", b"true"]
        await liar.settle()
        assert overheard.pending_msgs == 0
        assert len(liar.refused) == 3
        await asyncio.gather(*(one.close() for one in (server, honest, liar)))

    asyncio.run(told())


# --- coming and going ---------------------------------------------------------------------------------------------


def test_a_revoked_client_is_out_and_the_others_stay(fed, broker, tmp_path):
    shutil.copytree(fed / "clients/1", tmp_path / "old")

    async def revoked():
        server, stays, goes = [await connect(fed / who) for who in ("server", "clients/2", "clients/1")]
        up = await server.nats.subscribe("hosfl.demo.up.>")
        await server.settle()
        federation.revoke(fed, 1)
        await asyncio.to_thread(broker.reload)
        await asyncio.wait_for(goes.closed.wait(), 10)
        await stays.nats.publish("hosfl.demo.up.2.answer", b"still here")
        assert (await up.next_msg(10)).data == b"still here"
        assert not server.closed.is_set()
        await asyncio.gather(server.close(), stays.close())

    asyncio.run(revoked())
    assert refuses(tmp_path / "old")
    federation.renew(fed, 1)
    assert refuses(fed / "clients/1")  # not yet: the broker has not reloaded
    broker.reload()
    lets_in(fed / "clients/1")
    assert refuses(tmp_path / "old")
    check_broker(Member.read(fed / "clients/1"))
    with pytest.raises(FederationError, match=r"old: it was revoked or renewed"):
        check_broker(Member.read(tmp_path / "old"))


@pytest.mark.parametrize(("who", "folder"), [(1, "clients/1"), ("server", "server")])
def test_a_renewed_certificate_takes_the_place_of_the_old(who, folder, fed, broker, tmp_path):
    shutil.copytree(fed / folder, tmp_path / "old")
    federation.renew(fed, who)
    broker.reload()
    lets_in(fed / folder)
    lets_in(fed / "clients/2")
    assert refuses(tmp_path / "old")


def test_the_broker_s_certificate_is_renewed_while_it_runs(fed, broker):
    def shown():
        address = federation.read(fed).address
        with socket.create_connection((address.host, address.port)) as plain:
            plain.recv(1 << 16)
            with Member.read(fed / "server").context().wrap_socket(plain, server_hostname=address.host) as line:
                return line.getpeercert()["serialNumber"]

    before = federation.read(fed).broker.serial
    assert int(shown(), 16) == int(before, 16)
    after = federation.renew(fed, "broker").broker.serial
    broker.reload()
    assert int(shown(), 16) == int(after, 16) != int(before, 16)
    lets_in(fed / "clients/1")


def test_an_added_client_gets_in(fed, broker):
    roster, numbers = federation.add(fed, 2)
    assert numbers == [3, 4]
    assert len(roster.clients) == 5
    assert refuses(fed / "clients/4")
    broker.reload()
    check_broker(Member.read(fed / "clients/4"))


def test_the_broker_starts_anywhere_as_the_command_says(tmp_path, start, capsys):
    """In a folder whose name its configuration must quote."""
    folder = tmp_path / 'Ω "quoted" \\ $HOME # {it}'
    address = f"127.0.0.1:{free_port()}"
    assert main(["federation", "create", str(folder), "--clients", "1", "--address", address]) == 0
    said = capsys.readouterr().out
    (command,) = re.findall(r"(nats-server -c .*)", said)
    program, option, conf = shlex.split(command)
    broker = start(conf)
    check_broker(Member.read(folder / "server"))
    assert main(["federation", "revoke", str(folder), "0"]) == 0
    (command,) = re.findall(r"(nats-server --signal .*)", capsys.readouterr().out)
    assert shlex.split(command)[2] == f"reload={broker.pid_file}"
    broker.reload()
    refuses(folder / "clients/0")


# --- what the server checks ---------------------------------------------------------------------------------------

EDITS = {
    "a wildcard for a client's number": (r"hosfl\.demo\.up\.1\.>", "hosfl.demo.up.*.>"),
    "all for a client": (r"hosfl\.demo\.up\.1\.>", ">"),
    "two subjects": (r'"hosfl\.demo\.down\.1\.>"', '"hosfl.demo.down.1.>", "hosfl.demo.down.2.>"'),
    "another's number": (r"hosfl\.demo\.down\.1\.>", "hosfl.demo.down.2.>"),
    "a wildcard for the server": (r"hosfl\.demo\.up\.>", "hosfl.>"),
    "no verification": (r"  verify_and_map: true\n", ""),
    "verified and not mapped": (r"verify_and_map: true", "verify: true"),
    "verification off": (r"verify_and_map: true", "verify_and_map: false"),
    "a user without permissions": (r"(client-1\.\w+@hosfl\"), permissions: .*", r"\1}"),
    "no tls": (r"tls \{.*?\n\}\n", ""),
    "a user more": (r"(  users: \[\n)", r'\1    {user: "guest", password: "guest"}\n'),
    "a client twice": (r"(    \{user: \"client-1.*\n)", r"\1\1"),
    "a client missing": (r"    \{user: \"client-1.*\n", ""),
    "anonymous users": (r"$", "no_auth_user: guest\n"),
    "permissions by default": (r"(authorization \{\n)", r'\1  default_permissions: {publish: ">"}\n'),
    "no authorization": (r"authorization \{.*?\n\}\n", ""),
    "another file": (r"$", "include more.conf\n"),
    "a door without TLS": (r"$", "websocket: {port: 8080, no_tls: true}\n"),
    "another authority": (r"/ca\.pem", "/other.pem"),
    "a larger message": (r"max_payload: \d+", "max_payload: 8388608"),
    "cut off": (r"\nmax_connections.*", ""),
    "empty": (r".*", ""),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_configuration_is_refused(edit, template, tmp_path):
    roster = Roster.read(template / "server/federation.json")
    made = template / "broker/nats.conf"
    check_permissions(made, roster)
    pattern, put = EDITS[edit]
    edited = re.sub(pattern, put, made.read_text(), count=1, flags=re.S if "\\n\\}" in pattern or put == "" else 0)
    assert edited != made.read_text()
    with pytest.raises(FederationError, match=r"line \d+: there is|names no certificate"):
        check_permissions(edited, roster)
    (tmp_path / "nats.conf").write_text(edited)
    with pytest.raises(FederationError, match=r"nats\.conf.*renew DIR broker"):
        check_permissions(tmp_path / "nats.conf", roster)


@given(st.data())
def test_no_character_of_it_may_change(template, data):
    roster = Roster.read(template / "server/federation.json")
    text = (template / "broker/nats.conf").read_text()
    at = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.text(max_size=3).filter(lambda new: new != text[at]))
    with pytest.raises(FederationError):
        check_permissions(text[:at] + put + text[at + 1 :], roster)


def test_a_broker_s_folder_may_move(template):
    roster = Roster.read(template / "server/federation.json")
    for folder in ("/srv/broker", "/", '/a "b"'):
        check_permissions(configuration(roster, folder), roster)
    check_permissions(configuration(replace(roster, broker_folder="/srv"), "/srv"), roster)


def test_a_configuration_of_before_a_change_is_refused(template, tmp_path):
    shutil.copytree(template, tmp_path / "fed")
    before = (tmp_path / "fed/broker/nats.conf").read_text()
    roster = federation.revoke(tmp_path / "fed", 1)
    with pytest.raises(FederationError, match=r"there is `\{user: \"client-1"):
        check_permissions(before, roster)


LIVE = {
    "lets in who has no certificate": (r"  verify_and_map: true\n|authorization \{.*?\n\}\n", ""),
    "lets client 1 subscribe": (r'subscribe: \{allow: \["hosfl\.demo\.down\.1\.>"\]\}', "subscribe: {allow: [\">\"]}"),
    "lets client 1 publish": (r'publish: \{allow: \["hosfl\.demo\.up\.1\.>"\]\}', "publish: {allow: [\"hosfl.>\"]}"),
    "speaks without TLS": (r"tls \{.*?\n\}\n|authorization \{.*?\n\}\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", LIVE)
def test_a_broker_that_is_too_open_is_found_out(fault, fed, start):
    conf, (pattern, put) = fed / "broker/nats.conf", LIVE[fault]
    edited, times = re.subn(pattern, put, conf.read_text(), flags=re.S)
    assert times
    conf.write_text(edited)
    start(conf)
    with pytest.raises(FederationError, match=fault):
        check_broker(Member.read(fed / "clients/1"))


def test_a_broker_is_ours(fed, broker, tmp_path):
    for who in ("server", "clients/0", "clients/2"):
        check_broker(Member.read(fed / who))
    federation.create(tmp_path / "other", 1, str(federation.read(fed).address))
    with pytest.raises(FederationError, match="is not this federation's"):
        check_broker(Member.read(tmp_path / "other/clients/0"))


def test_nobody_there_is_no_refusal(fed):
    with pytest.raises(ConnectionRefusedError):
        check_broker(Member.read(fed / "server"))
    member = Member.read(fed / "server")
    with socket.create_server((member.address.host, member.address.port)) as silent:
        with pytest.raises(TimeoutError):
            check_broker(member, timeout=0.2)
        silent.close()


def test_a_broker_that_falls_silent_is_no_refusal(fed, monkeypatch):
    """After it has refused who has no certificate."""
    answers = iter([lambda: b"", lambda: (_ for _ in ()).throw(TimeoutError)])
    monkeypatch.setattr("hosfl.federation.broker._ask", lambda *_: next(answers)())
    with pytest.raises(TimeoutError):
        check_broker(Member.read(fed / "server"))


# --- folders ------------------------------------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_private_is_its_owner_s_alone(tmp_path):
    before = os.umask(0)
    try:
        federation.create(tmp_path / "fed", 2, "localhost")
        federation.add(tmp_path / "fed")
        (tmp_path / "fed/clients/0/client.key").chmod(0o644)
        federation.renew(tmp_path / "fed", 0)
    finally:
        os.umask(before)
    folders = [path for path in (tmp_path / "fed").rglob("*") if path.is_dir()]
    assert len(folders) == 7
    assert {mode(path) for path in [tmp_path / "fed", *folders]} == {0o700}
    keys = list((tmp_path / "fed").rglob("*.key"))
    assert len(keys) == 6
    assert {mode(path) for path in keys} == {0o600}
    assert not list(tmp_path.rglob("*.tmp"))
    assert [path.name for path in tmp_path.iterdir()] == ["fed"]


def test_a_client_s_folder_holds_its_own_alone(template):
    assert sorted(p.name for p in (template / "clients/1").iterdir()) == [
        *("ca.pem", "client.json", "client.key", "client.pem")
    ]
    says = json.loads((template / "clients/1/client.json").read_text())
    assert {k: says[k] for k in ("address", "run", "client")} == {
        "address": "localhost:4222",
        "run": "demo",
        "client": 1,
    }
    member = Member.read(template / "clients/1")
    assert says["expires"] == member.expires.isoformat()
    assert (member.who, member.run, str(member.address)) == ("client 1", "demo", "localhost:4222")
    assert Member.read(template / "server").who == "the server"


@pytest.mark.parametrize(("folder", "run"), [("wards-2", "wards-2"), ("with a space", "run")])
def test_a_run_is_named_after_the_folder(folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["federation", "create", folder, "--clients", "1", "--address", "localhost"]) == 0
    assert Member.read(Path(folder, "clients/0")).run == run


def test_certificates_are_what_strict_verifiers_take(template):
    """cryptography's own verifier, which is as strict as browsers: chain, names, uses of keys."""

    def load(name):
        return x509.load_pem_x509_certificate((template / name).read_bytes())

    policy = PolicyBuilder().store(Store([load("ca/ca.pem")]))
    for name in (x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))):
        policy.build_server_verifier(name).verify(load("broker/broker.pem"), [])
    for who, number in (("server/server.pem", None), ("clients/1/client.pem", 1)):
        verified = policy.build_client_verifier().verify(load(who), [])
        (name,) = verified.subjects
        assert federation.read(template).users()[name.value] == number
    with pytest.raises(x509.verification.VerificationError):
        policy.build_client_verifier().verify(load("broker/broker.pem"), [])
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("localhost")).verify(load("server/server.pem"), [])


@pytest.mark.parametrize("host", ["broker.example", "10.0.0.3", "2001:db8::1"])
def test_the_broker_s_certificate_is_for_its_address(host, template):
    broker = x509.load_pem_x509_certificate(authority(template).broker(host, 9).certificate)
    names = broker.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns, ip = names.get_values_for_type(x509.DNSName), names.get_values_for_type(x509.IPAddress)
    assert {host, "localhost", "127.0.0.1"} == {*dns, *map(str, ip)}
    assert (host in dns) == (host == "broker.example")


def test_a_folder_that_is_there_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "link"):
        with pytest.raises(FileExistsError, match="is there already"):
            federation.create(tmp_path / name, 1, "localhost")
    with pytest.raises(SystemExit) as end:
        main(["federation", "create", str(tmp_path / "empty"), "--clients", "1", "--address", "localhost"])
    assert end.value.code == 2
    assert "is there already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


WRONG = {
    "port": ({"address": "host:0"}, "port must be 1 to 65535, got '0'"),
    "large port": ({"address": "host:65536"}, "port must be 1 to 65535, got '65536'"),
    "no port": ({"address": "host:"}, "port must be 1 to 65535, got ''"),
    "scheme": ({"address": "nats://host:4222"}, "without a scheme"),
    "no host": ({"address": ":4222"}, "must be a DNS name or an IP address"),
    "spaces": ({"address": "my host"}, "must be a DNS name or an IP address"),
    "letters": ({"address": "münchen.example"}, "xn-- form"),
    "a number out of range": ({"address": "10.0.0.300"}, "must be a DNS name or an IP address"),
    "anywhere": ({"address": "0.0.0.0"}, "that clients can reach"),
    "empty run": ({"run": ""}, "run's name must be"),
    "a wildcard": ({"run": "a.>"}, "run's name must be .* got 'a.>'"),
    "a line": ({"run": "run\n"}, "run's name must be"),
    "no client": ({"clients": 0}, "clients must be 1 to 10000, got 0"),
    "many clients": ({"clients": 10_001}, "got 10001"),
    "no day": ({"days": 0}, "1 to 3650 days, got 0"),
    "many days": ({"days": 3651}, "1 to 3650 days, got 3651"),
    "relative": ({"broker_folder": "broker"}, "absolute path, got 'broker'"),
    "unprintable": ({"broker_folder": "/a\nb"}, "characters that its configuration cannot hold"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_named_and_leaves_nothing(what, tmp_path):
    settings, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        federation.create(tmp_path / "fed", **{"clients": 1, "address": "localhost", **settings})
    assert not list(tmp_path.iterdir())


def test_addresses():
    for text, host, port in [
        ("Broker.Example", "broker.example", 4222),
        ("10.0.0.3:5000", "10.0.0.3", 5000),
        ("2001:DB8::1", "2001:db8::1", 4222),
        ("[::1]:5000", "::1", 5000),
    ]:
        address = Address.parse(text)
        assert (address.host, address.port) == (host, port)
        assert Address.parse(str(address)) == address


def test_the_broker_listens_where_its_address_is(template):
    roster = federation.read(template)
    for host, listens in [
        ("localhost", "127.0.0.1:4222"),
        ("::1", "[::1]:4222"),
        ("broker.example", "0.0.0.0:4222"),
        ("2001:db8::1", "[::]:4222"),
    ]:
        assert f'listen: "{listens}"' in configuration(replace(roster, address=Address(host)), "/b")


def test_numbers_that_are_not_there_are_named(fed):
    for change in (federation.revoke, federation.renew):
        for number in (3, -1):
            with pytest.raises(ValueError, match=f"no client {number}: this federation has clients 0 to 2"):
                change(fed, number)
    with pytest.raises(ValueError, match="got 'everybody'"):
        federation.renew(fed, "everybody")
    federation.revoke(fed, 1)
    with pytest.raises(ValueError, match="client 1 is revoked already"):
        federation.revoke(fed, 1)
    with pytest.raises(FederationError, match="holds no federation"):
        federation.add(fed / "server")


def test_a_revoked_certificate_is_remembered(fed, capsys):
    old = federation.read(fed).clients[1].serial
    federation.revoke(fed, 1)
    roster = federation.renew(fed, 1)
    assert [(r.who, r.serial) for r in roster.retired] == [("client-1", old)]
    replaced = [("client-2", roster.clients[2].serial), ("server", roster.server.serial)]
    federation.renew(fed, 2)
    roster = federation.renew(fed, "server")
    assert [(r.who, r.serial) for r in roster.retired] == [("client-1", old), *replaced]
    assert roster == federation.read(fed) == Roster.read(fed / "server/federation.json")
    assert main(["federation", "show", str(fed)]) == 0
    assert f"certificate {old} of client-1" in capsys.readouterr().out


def test_revoking_needs_no_key_and_the_others_say_that_they_do(fed):
    (fed / "ca/ca.key").unlink()
    federation.revoke(fed, 1)
    for change in (federation.add, lambda folder: federation.renew(folder, 1)):
        before = files(fed)
        with pytest.raises(FederationError, match=r"ca\.key is not there: bring the authority's key back"):
            change(fed)
        assert files(fed) == before


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


class Killed(BaseException):
    """The process ends here."""


CHANGES = {
    "add": lambda folder: federation.add(folder),
    "revoke": lambda folder: federation.revoke(folder, 1),
    "renew": lambda folder: federation.renew(folder, 1),
    "server": lambda folder: federation.renew(folder, "server"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_command_that_was_killed_is_given_again(change, fed, monkeypatch):
    """At any file that it writes: what counts is as before, and the same command ends in a whole federation."""
    for nth in range(9):
        left = iter([True] * nth)
        monkeypatch.setattr(provision, "write_atomically", once(provision.write_atomically, left))
        monkeypatch.setattr("hosfl.federation.roster.write_json", once(write_json, left))
        before = federation.read(fed)
        try:
            CHANGES[change](fed)
            monkeypatch.undo()
            break
        except Killed:
            monkeypatch.undo()
        assert federation.read(fed) == before
    assert nth >= 2
    roster = federation.read(fed)
    assert roster != before
    check_permissions(fed / "broker/nats.conf", Roster.read(fed / "server/federation.json"))
    for number in [n for n, client in enumerate(roster.clients) if not client.revoked]:
        member = Member.read(fed / f"clients/{number}")
        member.context()
        assert member.expires == roster.clients[number].expires


def once(write, left):
    def killed(*what, **how):
        if next(left, False) is False:
            raise Killed
        return write(*what, **how)

    return killed


def test_create_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(provision, "sync_folder", lambda path: None)
    monkeypatch.setattr(Roster, "write", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        federation.create(tmp_path / "fed", 2, "localhost")
    assert not list(tmp_path.iterdir())


def test_one_process_changes_a_federation(fed):
    lock = FolderLock(fed / "ca", "federation")
    with pytest.raises(RunFolderError, match="another process is at work on the federation"):
        federation.add(fed)
    lock.close()
    federation.add(fed)


# --- what ends, what is damaged -----------------------------------------------------------------------------------


def test_a_certificate_that_ends_is_told(template, recwarn):
    folder = template / "clients/1"
    ends = Member.read(folder).expires
    assert timedelta(days=364) < ends - datetime.now(timezone.utc) < timedelta(days=366)
    Member.read(folder, ends - timedelta(days=31))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=rf"ends on {ends:%Y-%m-%d}: `hosfl federation renew DIR 1`"):
        Member.read(folder, ends - timedelta(days=29))
    with pytest.raises(FederationError, match=rf"ended on {ends:%Y-%m-%d}: `hosfl federation renew DIR 1`"):
        Member.read(folder, ends)
    with pytest.raises(FederationError, match="`hosfl federation renew DIR server`"):
        Member.read(template / "server", ends + timedelta(days=1))
    with pytest.raises(FederationError, match=r"begins on .* clock is at 1970-01-01: set the clock"):
        Member.read(folder, datetime.fromtimestamp(0, timezone.utc))  # a device without a battery


def test_a_key_that_others_can_read_is_told(fed, recwarn):
    Member.read(fed / "clients/1")
    assert not recwarn.list
    (fed / "clients/1/client.key").chmod(0o640)
    with pytest.warns(UserWarning, match=rf"chmod 600 {fed}/clients/1/client\.key"):
        Member.read(fed / "clients/1")


def test_certificates_may_last_ten_years(tmp_path, monkeypatch):
    """And new ones are made nine years later."""
    federation.create(tmp_path / "fed", 1, "localhost", days=3650)
    later = datetime.now(timezone.utc) + timedelta(days=9 * 365)
    monkeypatch.setattr("hosfl.federation.certificates._now", lambda: later)
    federation.add(tmp_path / "fed")


def test_nothing_outlasts_the_authority(fed, monkeypatch):
    now = datetime.now(timezone.utc)
    monkeypatch.setattr("hosfl.federation.certificates._now", lambda: now + timedelta(days=7300 - 300))
    before = files(fed)
    with pytest.raises(FederationError, match="fewer than 365 days"):
        federation.renew(fed, 1)
    assert files(fed) == before


def test_show_says_what_ends_and_what_was_edited(fed, capsys):
    roster, now = federation.read(fed), datetime.now(timezone.utc)
    soon = CertificateStatus(roster.clients[0].serial, now + timedelta(days=12, hours=1))
    ended = CertificateStatus(roster.clients[1].serial, now - timedelta(days=1))
    replace(roster, clients=(soon, roster.clients[1], roster.clients[2])).write(fed / "ca/federation.json")
    assert main(["federation", "show", str(fed)]) == 0
    said = capsys.readouterr().out
    assert f"12 days left: hosfl federation renew {fed} 0\n" in said
    assert re.search(r"client 2: until [-\d]{10}\n", said)
    replace(roster, clients=(soon, ended, roster.clients[2])).write(fed / "ca/federation.json")
    assert main(["federation", "show", str(fed)]) == 1
    assert f"ENDED: hosfl federation renew {fed} 1\n" in capsys.readouterr().out
    roster.write(fed / "ca/federation.json")
    federation.revoke(fed, 2)
    (fed / "broker/nats.conf").write_text((fed / "broker/nats.conf").read_text() + "\n")
    assert main(["federation", "show", str(fed)]) == 1
    said = capsys.readouterr().out
    assert "client 2: revoked\n" in said
    assert "1 of them revoked" in said
    assert "The broker's configuration is not what was made" in said


def put(folder, name, text):
    (folder / name).write_text(text)


def lock_key(path):
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    pem, under = serialization.Encoding.PEM, serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, under))


def another_authority(folder):
    (folder / "ca.pem").write_bytes(make_authority("another").certificate)


def swap(other, folder):
    for name in ("client.pem", "client.key"):
        shutil.copy(other / name, folder / name)


DAMAGED = {
    "no client.json": (lambda f: (f / "client.json").unlink(), "has no client.json"),
    "no key": (lambda f: (f / "client.key").unlink(), r"has no client\.key"),
    "no json": (lambda f: put(f, "client.json", "{"), "client.json is damaged"),
    "a list": (lambda f: put(f, "client.json", "[]"), "client.json is damaged"),
    "no run": (lambda f: put(f, "client.json", '{"address": "a", "client": 1}'), "client.json is damaged"),
    "a client's name": (lambda f: put(f, "client.json", '{"address": "a", "run": "r", "client": "1"}'), "an integer"),
    "no certificate": (lambda f: put(f, "client.pem", "none"), r"client\.pem: this is no certificate"),
    "no key in it": (lambda f: put(f, "client.key", "none"), "damaged, or not of one pair"),
    "another's certificate": (lambda f: swap(f.parent / "0", f), r"client\.pem is client-0's, not client 1's"),
    "no authority": (lambda f: put(f, "ca.pem", ""), r"client\.pem is not of the authority in .*/ca\.pem"),
    "another authority": (another_authority, r"client\.pem is not of the authority in .*/ca\.pem"),
    "a key under a passphrase": (lambda f: lock_key(f / "client.key"), "damaged, or not of one pair"),
    "another's key": (lambda f: shutil.copy(f.parent / "0/client.key", f / "client.key"), "not of one pair"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_named(damage, fed):
    folder, (do, message) = fed / "clients/1", DAMAGED[damage]
    do(folder)
    with pytest.raises(FederationError, match=message):
        Member.read(folder).context()


@pytest.mark.parametrize("field", ["address", "run", "days", "broker_folder", "broker", "server", "clients", "retired"])
def test_a_damaged_roster_is_named(field, fed):
    path = fed / "ca/federation.json"
    saved = json.loads(path.read_text())
    quoted = {"serial": '"}', "expires": saved["server"]["expires"], "revoked": False}  # it would end its line
    for value in (None, [{"serial": "x"}], [quoted], quoted):
        damaged = {**saved, field: value}
        if value is None:
            del damaged[field]
        path.write_text(json.dumps(damaged))
        if field == "broker_folder" and field in damaged:
            continue
        with pytest.raises(FederationError, match=r"federation\.json is damaged"):
            federation.read(fed)


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def vast(path):
    path.touch()
    os.truncate(path, 1 << 40)


READS = {
    "ca/federation.json": federation.read,
    "ca/ca.pem": federation.add,
    "ca/lock": federation.add,
    "broker/nats.conf": lambda folder: check_permissions(folder / "broker/nats.conf", federation.read(folder)),
    "server/federation.json": lambda folder: Member.read(folder / "server"),
}


@pytest.mark.timeout(30)  # they would be waited for, or read without end
@pytest.mark.parametrize("damage", [pipe, endless, vast])
@pytest.mark.parametrize("name", READS)
def test_a_file_without_end_is_named(name, damage, fed):
    damage(fed / name)
    if name.endswith("lock") and damage is not pipe:  # nobody reads it
        READS[name](fed)
        return
    with pytest.raises(OSError, match=f"{name}'$"):
        READS[name](fed)


def test_another_authority_s_key_is_refused(fed, tmp_path):
    federation.create(tmp_path / "other", 1, "localhost")
    shutil.copy(tmp_path / "other/ca/ca.key", fed / "ca/ca.key")
    with pytest.raises(FederationError, match="key is not that of its certificate"):
        federation.add(fed)
    (fed / "ca/ca.key").write_text("none")
    with pytest.raises(FederationError, match="damaged"):
        federation.add(fed)


# --- the command --------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Others
from hosfl.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(missing, *words):
    program = f"MISSING = {missing!r}\n{WITHOUT}"
    return subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("action", [[], *([name] for name in ("create", "add", "revoke", "renew", "show"))])
def test_help_needs_neither_torch_nor_cryptography(action):
    done = command(["torch", "cryptography", "nats"], "federation", *action, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: hosfl federation" in done.stdout


def test_the_command_needs_no_torch_and_names_the_extra(tmp_path):
    words = ["federation", "create", str(tmp_path / "fed"), "--clients", "1", "--address", "localhost"]
    done = command(["cryptography"], *words)
    assert done.returncode == 2
    assert "needs cryptography, which is missing: pip install 'hosfl[nats]'" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
    done = command(["torch", "nats"], *words)
    assert done.returncode == 0, done.stderr


def test_every_action_says_what_to_do_next(tmp_path, capsys):
    fed = tmp_path / "fed"

    def said(*words):
        assert main(["federation", words[0], str(fed), *words[1:]]) == 0
        return capsys.readouterr().out

    made = said("create", "--clients", "2", "--address", "broker.example", "--broker-folder", "/srv/broker/")
    assert "nats-server -c /srv/broker/nats.conf\n" in made
    assert f"Copy {fed}/broker to /srv/broker on the broker's machine." in made
    assert f"hosfl serve {fed}/server" in made
    assert f"hosfl join {fed}/clients/0" in made
    assert f"{fed}/clients/0 to {fed}/clients/1" in made
    reload = "The broker must reload its configuration: nats-server --signal reload=/srv/broker/nats.pid\n"
    copy = f"Copy {fed}/broker/nats.conf to /srv/broker on the broker's machine.\n"
    assert f"Then hand {fed}/clients/2 to the owner of client 2" in said("add")
    for words in (["revoke", "1"], ["renew", "1"], ["renew", "server"], ["renew", "broker"], ["add"]):
        assert copy + reload in said(*words), words
    for words in (["renew", "-1"], ["renew", "x"], ["revoke", "x"], ["create", "--clients", "1"]):
        with pytest.raises(SystemExit):
            main(["federation", words[0], str(fed), *words[1:]])
