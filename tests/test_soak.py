"""Clients, server and broker are killed, stopped and starved. Whoever is left or comes back holds one digest."""

import json
import random
import signal
import time

import pytest
from broker import Plain
from processes import client, server, status, wait_for

from hosfl.protocol.log import Log
from hosfl.protocol.records import RoundRecord

pytest.importorskip("nats")
pytestmark = pytest.mark.timeout(1500)
CLIENTS = 4
SETTINGS = {
    "clients": CLIENTS,
    "sampled": CLIENTS,
    "batch": 8,
    "directions": 3,
    "directions_from": "fresh",
    "evaluate_every": 1000,
    "snapshot_every": 1,
    "digest_every": 10,
}


class Federation:
    """Four clients and a server. probing: seconds that an answer takes. drop: of the network's first absence."""

    def __init__(self, folder, rounds, drop=4.0, probing=0.03, deadline=3.0):
        self.folder = folder
        self.broker = Plain(folder)
        self.broker.start()
        self.told = {**SETTINGS, "rounds": rounds, "over": {"deadline": deadline, "enough": 2, "least": 2}}
        self.server = server(folder, self.broker, **self.told)
        self.clients = [client(folder, self.broker, n, slow=probing) for n in range(CLIENTS)]
        self.probing, self.drop = probing, drop

    def round(self):
        return status(self.folder).get("round", 0)

    def goes_on(self, rounds=2, seconds=120.0):
        """Waits for a few more rounds, or the end."""
        until = min(self.round() + rounds, self.told["rounds"])
        wait_for(lambda: self.round() >= until or self.server.process.poll() is not None, seconds)

    def records(self):
        """The committed rounds that stand, as the log has them now."""
        log = Log.read(self.folder / "run" / "hosfl.log")
        return [(r.round, r.coefficients.tobytes(), r.participants) for r in log.rounds if isinstance(r, RoundRecord)]

    def close(self):
        for process in (*self.clients, self.server):
            process.kill()
        self.broker.stop()

    # --- faults ---

    def kill_a_client(self, chance):
        self.again([chance.randrange(CLIENTS)])

    def kill_two(self, chance):
        self.again(chance.sample(range(CLIENTS), 2))

    def again(self, numbers):
        for number in numbers:
            self.clients[number].kill()
        self.goes_on(1)
        for number in numbers:
            self.clients[number].start()

    def kill_the_server(self, chance):
        # Nothing that was committed is lost: what was there is there, before what came after.
        self.server.kill()
        before = self.records()
        self.server.start()
        wait_for(lambda: len(self.records()) > len(before) or self.server.process.poll() is not None, 120)
        after = self.records()
        assert after[: len(before)] == before

    def kill_the_broker(self, chance):
        self.broker.stop()
        time.sleep(0.3)
        self.broker.start()

    def a_client_lags(self, chance):
        self.stop([self.clients[chance.randrange(CLIENTS)]], 10 * self.probing + 1)

    def the_network_drops(self, chance):
        seconds, self.drop = self.drop, 4.0
        self.stop([self.broker], seconds)

    def the_server_sleeps(self, chance):
        self.stop([self.server], 1.0)

    def stop(self, processes, seconds):
        for one in processes:
            one.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        for one in processes:
            one.process.send_signal(signal.SIGCONT)

    def a_full_disk(self, chance):
        number = chance.randrange(CLIENTS)
        self.clients[number].kill()
        for path in (self.folder / f"client-{number}").glob("*.safetensors"):
            path.unlink()
        self.clients[number] = client(self.folder, self.broker, number, slow=self.probing, largest=100)


FAULTS = (
    Federation.kill_a_client,
    Federation.kill_two,
    Federation.kill_the_server,
    Federation.kill_the_broker,
    Federation.a_client_lags,
    Federation.the_network_drops,
    Federation.the_server_sleeps,
    Federation.a_full_disk,
)


def soak(folder, faults, rounds, seed=0, **told):
    chance = random.Random(seed)
    federation = Federation(folder, rounds, **told)
    try:
        federation.goes_on(2)
        for number in range(faults):
            fault = FAULTS[number % len(FAULTS)] if number < len(FAULTS) else chance.choice(FAULTS)
            fault(federation, chance)
            federation.goes_on(1)
        wait_for(lambda: federation.server.process.poll() is not None, 600)
        assert federation.server.process.returncode == 0, (folder / "server.log").read_text()[-2000:]
        summary = json.loads((folder / "run" / "summary.json").read_text())
        assert summary["rounds"] == rounds
        assert summary["replicas"]["clients"] >= 3  # two of those that are here, and a newcomer
        assert summary["replicas"]["equal"]
        assert [r for r, *_ in federation.records()] == list(range(rounds))
        return summary
    finally:
        federation.close()


def test_every_kind_of_fault(tmp_path):
    soak(tmp_path, faults=len(FAULTS), rounds=100)


@pytest.mark.slow
def test_a_hundred_faults(tmp_path):
    soak(tmp_path, faults=100, rounds=1500, drop=30.0)
