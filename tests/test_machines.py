"""A federation over several machines: each a network namespace with an address of its own, on one switch.

Nothing is reached by loopback: certificates, the broker's address and the files that are handed out have to be right.
Needs root, and Linux with `ip`.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import wait_for

from hosfl.cli import main
from hosfl.tasks.digits import digits

pytest.importorskip("nats")

from broker import NATS, Broker

pytestmark = pytest.mark.timeout(300)
NAME = f"hosfl{os.getpid() % 10000}"  # of the switch; interfaces have short names
BROKER = "10.213.77.1"
WITHOUT_TORCH = "import sys; sys.modules.update(torch=None, triton=None); from hosfl.cli import main; sys.exit(main())"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machine:
    """A network namespace on the switch."""

    def __init__(self, number, address):
        self.name, self.link = f"{NAME}-{number}", f"{NAME}v{number}"
        ip("netns", "add", self.name)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.link, "master", NAME, "up")
        ip("-n", self.name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")

    def start(self, *words, log, **more):
        """A process on this machine."""
        with log.open("a") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, words)], stdout=file, stderr=file, **more
            )

    def unplug(self):
        """Whatever is sent vanishes: no connection is closed."""
        ip("link", "set", self.link, "down")

    def plug_in(self):
        ip("link", "set", self.link, "up")

    def close(self):
        # The link first: a namespace goes when its last connection does, which may be a while.
        for of in (["link", "del", self.link], ["netns", "del", self.name]):
            subprocess.run(["ip", *of], capture_output=True)


@pytest.fixture
def machines():
    """One for broker and server, and three for clients."""
    try:
        ip("link", "add", NAME, "type", "bridge")
        ip("link", "set", NAME, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces for machines of their own: root and Linux are needed ({error})")
    made = []
    try:
        for number in range(4):
            made.append(Machine(number, f"10.213.77.{number + 1}"))
        yield made
    finally:
        for machine in made:
            machine.close()
        subprocess.run(["ip", "link", "del", NAME], capture_output=True)


class Elsewhere(Broker):
    """The broker, on a machine."""

    def __init__(self, machine, folder):
        super().__init__(folder / "broker" / "nats.conf", folder)
        self.machine = machine

    def start(self):
        self.process = self.machine.start(NATS, "-c", self.conf, log=self.log, cwd="/")
        self._wait(lambda: "Server is ready" in self.log.read_text())


def rounds(run):
    """Who took part, round by round so far."""
    events = run / "events.jsonl"
    return [set(json.loads(line)["took part"]) for line in events.read_text().splitlines()] if events.exists() else []


def test_clients_on_machines_of_their_own(machines, tmp_path):
    """Each client has its folder and samples of its own; the last has no torch. One is unplugged, and another's machine
    lags, for a while."""
    host, *others = machines
    fed, run = tmp_path / "fed", tmp_path / "run"
    assert main(["federation", "create", str(fed), "--clients", "3", "--address", BROKER]) == 0
    hosfl = [sys.executable, "-W", "ignore", "-m", "hosfl.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    broker, running = Elsewhere(host, fed), []
    train, edge = digits().train, importlib.util.find_spec("onnxruntime")  # Python 3.10 has none that is safe
    try:
        broker.start()
        for number, machine in enumerate(others):
            mine = tmp_path / f"machine-{number}"
            shutil.copytree(fed / "clients" / str(number), mine / "handed-out")
            own = train[train.labels % 3 == number] if number < 2 else train[:40]  # not every class
            np.savez(mine / "samples.npz", inputs=own.inputs.numpy(), labels=own.labels.numpy())
            words = [*hosfl, "join", "handed-out", "--data", "samples.npz"]
            if number == 2 and edge:
                words = [sys.executable, "-c", WITHOUT_TORCH, *words[words.index("join") :], "--runtime", "onnx"]
            running.append(machine.start(*words, log=mine / "log", cwd=mine, env=environment))
        settings = ["--task", "digits", "--rounds", "500", "--sampled", "3", "--least", "2"]
        settings += ["--deadline", "2", "--enough", "2", "--digest-every", "20", *["--edge"] * bool(edge), "--out", run]
        server = host.start(
            *hosfl, "serve", fed / "server", *settings, log=tmp_path / "server.log", cwd=tmp_path, env=environment
        )
        running.append(server)

        def came():  # all, however long a busy machine takes to let each of them in
            return len(rounds(run)) > 9 and {0, 1, 2} == set.union(*rounds(run))

        wait_for(lambda: came() or server.poll() is not None, 120)
        others[0].unplug()
        time.sleep(1)
        before = len(rounds(run))

        def went_on():  # with both of the others, in whichever rounds a busy machine lets them come in time
            return {1, 2} <= set().union(*rounds(run)[before + 1 :]) and len(rounds(run)) > before + 3

        wait_for(lambda: went_on() or server.poll() is not None, 120)
        after = len(rounds(run))
        running[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        running[1].send_signal(signal.SIGCONT)
        others[0].plug_in()
        assert server.wait(200) == 0, (tmp_path / "server.log").read_text()
        summary = json.loads((run / "summary.json").read_text())
        assert summary["replicas"]["equal"]
        assert summary["replicas"]["clients"] == 4  # with a newcomer
        took_part = rounds(run)
        assert {0, 1, 2} == set.union(*took_part[:before])
        assert {1, 2} == set.union(*took_part[before + 1 : after])  # and not 0
        assert 0 in set.union(*took_part[-50:]), "the unplugged client did not come back"
        for process in running[:3]:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        for process in running:
            process.kill()
        broker.stop()


def tops(service):
    """The folders of the root that a service's volumes lie in."""
    return sorted({"/" + volume.split(":")[1].split("/")[1] for volume in service["volumes"]})


def contained(machine, folder, service, words, log):
    """What a service of a compose file runs, on a machine, with its volumes where they are in the container."""
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{BROKER} broker.example.org\n")
    script = [f"mount --bind {hosts} /etc/hosts", "mount -t tmpfs none /mnt"]
    for volume in service["volumes"]:
        here, there, *read_only = volume.split(":")
        source = folder / here
        if not source.exists():
            source.mkdir()
        script.append(f"mkdir -p /mnt{os.path.dirname(there)}")
        script.append(f"{'touch' if source.is_file() else 'mkdir -p'} /mnt{there}")
        script.append(f"mount --bind {source} /mnt{there}")
        script += [f"mount -o remount,bind,ro /mnt{there}"] * bool(read_only)
    # The container's root is this machine's, but for what the volumes put into it.
    script += [f"mount --rbind /mnt{top} {top}" for top in tops(service)]
    script.append("exec " + shlex.join(map(str, words)))
    return machine.start("unshare", "-m", "bash", "-ec", "; ".join(script), log=log, cwd="/")


@pytest.mark.slow
def test_the_page_s_compose_file(machines, tmp_path):
    yaml = pytest.importorskip("yaml")
    page = (Path(__file__).parent.parent / "docs" / "federation.md").read_text()
    create = re.search(r"hosfl (federation create fed-docker .*)", page)[1].replace(
        "fed-docker", f"{tmp_path}/fed-docker"
    )
    services = yaml.safe_load(re.search(r"```yaml\n(services:.*?)```", page, re.S)[1])["services"]
    assert main(shlex.split(create)) == 0
    host, server, client, _ = machines
    assert services["broker"]["networks"]["default"]["aliases"] == ["broker.example.org"]
    words = shlex.split(services["server"]["command"])
    words[words.index("--rounds") + 1] = "10"
    hosfl = [sys.executable, "-W", "ignore", "-m", "hosfl.cli"]
    running = []
    made = [Path(top) for top in {*tops(services["broker"]), *tops(services["server"])} if not Path(top).exists()]
    for path in made:
        path.mkdir()  # where something can be mounted
    try:
        broker = services["broker"]
        running.append(contained(host, tmp_path, broker, [NATS, *broker["command"]], tmp_path / "broker.log"))
        wait_for(
            lambda: "Server is ready" in (tmp_path / "broker.log").read_text() or running[0].poll() is not None, 20
        )
        assert running[0].poll() is None, (tmp_path / "broker.log").read_text()
        found = contained(server, tmp_path, services["server"], [*hosfl, *words[1:]], tmp_path / "server.log")
        running.append(found)
        none = {"volumes": []}
        for number in range(4):
            join = [*hosfl, "join", tmp_path / "fed-docker" / "clients" / str(number)]
            running.append(contained(client, tmp_path, none, join, tmp_path / f"client-{number}.log"))
        assert found.wait(120) == 0, (tmp_path / "server.log").read_text()
        assert json.loads((tmp_path / "runs" / "digits" / "summary.json").read_text())["replicas"]["equal"]
    finally:
        for process in running:
            process.kill()
        for path in made:
            path.rmdir()


def test_a_stranger_s_machine(machines, tmp_path):
    """A machine without a certificate, and one with another federation's, reach the broker and get nothing."""
    host, stranger, *_ = machines
    for name in ("fed", "other"):
        assert main(["federation", "create", str(tmp_path / name), "--clients", "1", "--address", BROKER]) == 0
    broker = Elsewhere(host, tmp_path / "fed")
    try:
        broker.start()
        joined = stranger.start(
            *[sys.executable, "-W", "ignore", "-m", "hosfl.cli", "join", tmp_path / "other" / "clients" / "0"],
            log=tmp_path / "log",
        )
        wait_for(lambda: "TLS handshake error" in broker.log.read_text(), 30)
        joined.terminate()
        joined.wait(20)
        plain = "import socket; s = socket.create_connection(('10.213.77.1', 4222), 5); s.recv(4096);"
        plain += "s.sendall(b'CONNECT {}\\r\\nPING\\r\\n'); s.settimeout(5); print(s.recv(4096), s.recv(4096))"
        stranger.start(sys.executable, "-c", plain, log=tmp_path / "plain").wait(30)
        assert "PONG" not in (tmp_path / "plain").read_text()
    finally:
        broker.stop()
