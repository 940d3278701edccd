"""Real processes of a federation, for tests: a server and clients, and what kills them.

python tests/processes.py server URL FOLDER JSON       settings, `Transport`'s numbers; goes on in a folder with a run
python tests/processes.py client URL FOLDER NUMBER JSON    how slow it is, the largest file it may write
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN = "soak"


class Role:
    """A server or a client in a process of its own."""

    def __init__(self, folder, *arguments):
        self.folder, self.arguments = folder, [str(a) for a in arguments]
        self.start()

    def start(self):
        command = [sys.executable, __file__, *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        name = "-".join(a for a in self.arguments if a in ("server", "client") or a.isdigit())
        with (self.folder / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def signal(self, number):
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()

    def end(self):
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def server(folder, broker, **told):
    return Role(folder, "server", broker.url, folder, json.dumps(told))


def client(folder, broker, number, **told):
    return Role(folder, "client", broker.url, folder, number, json.dumps(told))


def status(folder):
    """The server's, or {} before there is one."""
    try:
        return json.loads((folder / "run" / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def wait_for(what, seconds=60.0):
    ends = time.monotonic() + seconds
    while not what():
        if time.monotonic() > ends:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.05)


def _server(url, folder, told):
    from hosfl import train
    from hosfl.engines.nats_server import NatsEngine
    from hosfl.runs.config import Config
    from hosfl.runs.serve import Transport

    folder, told = Path(folder) / "run", json.loads(told)
    over = told.pop("over")
    config = Config(**told)
    engine = NatsEngine(url, RUN, config.clients)
    train(config, folder, transport=Transport(engine, **over), resume=(folder / "config.json").exists())


def _client(url, folder, number, told):
    import resource

    from hosfl.engines.nats_line import NatsLine
    from hosfl.runs.join import join

    told = json.loads(told)
    if "largest" in told:  # bytes of a file: a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (told["largest"], told["largest"]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    line = NatsLine(url, RUN, int(number))
    signal.signal(signal.SIGTERM, lambda *_: line.close())
    if told.get("slow"):
        from hosfl.methods.ho import ZerothOrderClient

        plain = ZerothOrderClient.answer

        def slowly(self, message):
            time.sleep(told["slow"])
            return plain(self, message)

        ZerothOrderClient.answer = slowly
    join(line, int(number), Path(folder) / f"client-{number}")


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO)
    {"server": _server, "client": _client}[sys.argv[1]](*sys.argv[2:])
