"""`hosfl serve` and `hosfl join`, as an operator and device owners type them."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import shifted

pytest.importorskip("nats")

from broker import Broker, Plain, free_port
from processes import wait_for
from test_join import SIGNS, Elsewhere

from hosfl import Config, train
from hosfl.cli import main
from hosfl.engines.nats_line import NatsLine
from hosfl.engines.nats_server import NatsEngine
from hosfl.runs.assemble import assemble
from hosfl.runs.checkpoint import load_config
from hosfl.runs.join import join
from hosfl.runs.serve import Events, Transport, offered_files
from hosfl.runs.status import show
from hosfl.terminal import log_to_terminal


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation") / "fed"
    address = f"127.0.0.1:{free_port()}"
    assert main(["federation", "create", str(folder), "--clients", "3", "--address", address]) == 0
    started = Broker(folder / "broker" / "nats.conf", folder)
    started.start()
    yield folder
    started.stop()


class Two(Elsewhere):
    """Two of three clients, in this process."""

    def present(self):
        return frozenset(range(2))


def test_a_run_by_its_commands(federation, tmp_path):
    """What an operator and two device owners type; one client belongs to nobody.

    Task and method are of a file that each has a copy of, and running statistics are estimated first.
    """
    folder, environment = federation, {**os.environ, "OMP_NUM_THREADS": "1"}
    hosfl = [sys.executable, "-W", "ignore", "-m", "hosfl.cli"]
    own, copies = [], []
    for option, file, name in (("--task", shifted.__file__, "make"), ("--method", SIGNS, "Signs")):
        own += [option, f"{file}:{name}"]
        copies += [option, f"{shutil.copy(file, tmp_path)}:{name}"]
    joined = [
        subprocess.Popen([*hosfl, "join", folder / "clients" / str(n), *copies], env=environment) for n in range(2)
    ]
    settings = [*own, "--rounds", "5", "--sampled", "2", "--batch", "8", "--calibrate", "2"]
    settings += ["--server-rate", "0.05", "--client-rate", "0.01", "--least", "2"]
    settings += ["--tensorboard"] * (find_spec("tensorboard") is not None)
    try:
        for out in ("run", "next"):  # for which the clients need no restart
            served = [*hosfl, "serve", folder / "server", *settings, "--out", tmp_path / out]
            ended = subprocess.run(served, env=environment, timeout=120, stdout=subprocess.PIPE, text=True)
            assert ended.returncode == 0
            said = ended.stdout.splitlines()[-1]
        for process in joined:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        for process in joined:
            process.kill()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["replicas"]["clients"] == 3
    assert summary["replicas"]["equal"]
    following = json.loads((tmp_path / "next" / "summary.json").read_text())
    assert (following["replicas"], following["refused"]) == (summary["replicas"], [])
    digest = summary["replicas"]["digest"]
    assert said == f"clients here at the end: 2; all hold the server's bits, digest {digest}"
    here = Transport(Two(3, task=own[1], method=own[3]))
    again = train(load_config(tmp_path / "run"), tmp_path / "here", transport=here)
    assert again.replicas.digest == summary["replicas"]["digest"]
    assert (folder / "clients" / "0" / "state" / "state.safetensors").exists()
    status = subprocess.run([*hosfl, "status", tmp_path / "run"], capture_output=True, text=True, env=environment)
    assert "round 5 of 5" in status.stdout
    assert "here: 0, 1; not here: 2" in status.stdout
    assert len(list((tmp_path / "run").glob("tensorboard/*"))) == settings.count("--tensorboard")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Round 5 of 5, 3 clients" in (tmp_path / "run/report.html").read_text()


def test_a_run_goes_on_with_its_own_clients(tmp_path, capsys):
    """One that the federation was given meanwhile has no part in it."""
    address = f"127.0.0.1:{free_port()}"
    assert main(["federation", "create", str(tmp_path / "fed"), "--clients", "2", "--address", address]) == 0
    settings = {"rounds": 2, "clients": 2, "sampled": 2, "batch": 8, "directions": 1}
    train(Config(**settings), tmp_path / "run", transport=Transport(Elsewhere(2)))
    assert main(["federation", "add", str(tmp_path / "fed")]) == 0
    assert main(["serve", str(tmp_path / "fed/server"), "--resume", str(tmp_path / "run")]) == 0
    assert load_config(tmp_path / "run").clients == 2
    # Nor are those counted, or one that was revoked, whom it could wait for.
    assert main(["federation", "revoke", str(tmp_path / "fed"), "0"]) == 0
    with pytest.raises(SystemExit):
        main(["serve", str(tmp_path / "fed/server"), "--resume", str(tmp_path / "run"), "--least", "2"])
    assert "least must be at most 1, the clients that may be here, got 2" in capsys.readouterr().err


SAID = [f"round {round} waits for clients: 1 of at least 2 are here" for round in (1, 2)]


def test_a_server_says_whom_it_waits_for(tmp_path, caplog):
    """Once for a round; a round that is tried in vain is another matter, which `hosfl status` shows."""
    engine = SimpleNamespace(present=lambda: [3])
    server = SimpleNamespace(refused=[])
    messenger = SimpleNamespace(engine=engine, missing=0, complaints=[], wire=SimpleNamespace(bytes={}))
    federation = SimpleNamespace(messenger=messenger, server=server, config=Config(rounds=4), least=2, tries=0)
    events = Events(tmp_path)
    for done in (0, 0, 1):
        events.waiting(federation, done)
    assert caplog.messages == SAID


@pytest.mark.parametrize("terminal", [True, False])
def test_a_status_that_is_watched_clears_a_terminal_and_nothing_else(tmp_path, monkeypatch, capsys, terminal):
    test_a_server_says_whom_it_waits_for(tmp_path, SimpleNamespace(messages=SAID))

    def interrupted(seconds):
        raise KeyboardInterrupt

    # Not the module's own `sleep`, which other threads of this process call too.
    monkeypatch.setattr("hosfl.runs.status.time", SimpleNamespace(**vars(time) | {"sleep": interrupted}))
    monkeypatch.setattr("hosfl.runs.status.sys.stdout.isatty", lambda: terminal, raising=False)
    with pytest.raises(KeyboardInterrupt):
        show(tmp_path, watch=True)
    shown = capsys.readouterr().out
    assert shown.endswith("waiting until at least 2 are here\n0.0 MB; no answer 0 times\n")
    assert ("\x1b" in shown) is terminal


def test_a_log_does_nothing_to_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.WARNING))
    log_to_terminal(logging.WARNING)
    try:
        raise ValueError("a graph's node \x1b[2J")
    except ValueError:
        logging.root.exception("it failed\r")
    said = capsys.readouterr().err
    assert said.splitlines()[0].endswith(" it failed?")
    assert said.endswith("\nValueError: a graph's node ?[2J\n")
    assert "Traceback" in said


def test_a_status_does_nothing_to_a_terminal(tmp_path, capsys):
    test_a_server_says_whom_it_waits_for(tmp_path, SimpleNamespace(messages=SAID))
    status = json.loads((tmp_path / "status.json").read_text()) | {"refused": ["\x1b[2Jof a file\nof any"]}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("\nrefused: ?[2Jof a file?of any\n")


@pytest.mark.parametrize(
    "text", ["damaged", "[1]", '{"rounds": 3}', '{"last": 1, "here": [], "clients": 2, "time": 0}']
)
def test_a_status_that_is_none_is_named(tmp_path, capsys, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path)])
    said = capsys.readouterr().err
    assert said.startswith(f"hosfl: {tmp_path / 'status.json'} is not a run's status (")
    assert said.count("\n") == 1


def test_a_run_whose_cuts_are_larger_than_an_engine_takes_of_itself(tmp_path):
    broker = Plain(tmp_path)
    broker.start()
    engine, lines = NatsEngine(broker.url, "r", 2, largest=1000), [NatsLine(broker.url, "r", n) for n in range(2)]
    threads = [threading.Thread(target=join, args=(line, n, tmp_path / f"{n}")) for n, line in enumerate(lines)]
    for thread in threads:
        thread.start()
    config = Config(rounds=2, clients=2, sampled=2, batch=16, directions=1)
    try:
        summary = train(config, tmp_path / "run", transport=Transport(engine, least=2, patient=False))
    finally:
        for line, thread in zip(lines, threads, strict=True):
            line.close()
            thread.join(20)
        broker.stop()
    assert summary.replicas.equal
    assert (summary.rounds, summary.replicas.clients) == (2, 3)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["serve", "FED/server"], 2, "give --out"),
        (["serve", "FED/clients/0", "--out", "RUN"], 2, "the folder of client 0"),
        (["serve", "FED", "--out", "RUN"], 2, "FED has no"),
        (["serve", "FED/server", "--out", "RUN", "--enough", "0"], 2, "enough must be at least 1"),
        (["serve", "FED/server", "--out", "RUN", "--enough", "4"], 2, "enough must be at most 3, the clients that may"),
        (["serve", "FED/server", "--out", "RUN", "--least", "4"], 2, "least must be at most 3, the clients that may"),
        (["serve", "FED/server", "--out", "RUN", "--deadline", "0"], 2, "deadline must be"),
        (["serve", "FED/server", "--out", "RUN", "--deadline", "inf"], 2, "deadline must be"),
        (["serve", "FED/server", "--out", "RUN", "--deadline", "nan"], 2, "deadline must be"),
        (["serve", "FED/server", "--out", "RUN", "--calibrate", "2"], 2, "running statistics"),
        (["serve", "FED/server", "--out", "RUN", "--broker", "OTHER"], 2, "names no certificate"),
        (["join", "FED/server"], 2, "the server's folder"),
        (["join", "RUN"], 2, "RUN has no"),
        (["join", "FED/clients/0", "--data", "RUN.npz"], 2, "--data: there is no RUN.npz"),
        (["join", "FED/clients/0", "--data", "RUN.py:mine"], 2, "--data: there is no RUN.py"),
        (["status", "RUN"], 2, "no run with clients elsewhere"),
    ],
)
def test_what_cannot_be(federation, tmp_path, capsys, words, status, says):
    (tmp_path / "other.conf").write_text("port: 4222\n")
    places = {"FED": str(federation), "RUN": str(tmp_path / "run"), "OTHER": str(tmp_path / "other.conf")}

    def placed(text):
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    try:
        ended = main([placed(word) for word in words])
    except SystemExit as exit:
        ended = exit.code
    assert ended == status
    assert placed(says) in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.json"))


def offering(federation):
    """A server that offers a run and begins none, and who it is."""
    from hosfl.engines.nats_server import NatsEngine
    from hosfl.federation import Member

    made, _ = assemble(Config(rounds=2, clients=3))
    files = offered_files(made)
    made.close()
    member = Member.read(federation / "server")
    engine = NatsEngine(f"tls://{member.address}", member.run, 3, member.context())
    engine.offer(files)
    return engine, member


def test_wrong_data_end_the_command_with_status_2(federation, tmp_path):
    engine, _ = offering(federation)
    inputs = np.zeros((4, 1, 8, 8), np.float32)
    np.savez(tmp_path / "classes.npz", inputs=inputs, labels=np.full(4, 10))
    np.savez(tmp_path / "sizes.npz", inputs=inputs[..., 1:], labels=np.arange(4))
    (tmp_path / "empty.npz").touch()
    hosfl, environment = [sys.executable, "-W", "ignore", "-m", "hosfl.cli"], {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        for name, says in (("classes", "labels are from 10"), ("sizes", "cuts of shape"), ("empty", "is damaged")):
            words = ["join", federation / "clients" / "0", "--data", tmp_path / f"{name}.npz"]
            ended = subprocess.run([*hosfl, *words], env=environment, capture_output=True, text=True, timeout=60)
            assert ended.returncode == 2
            assert f"{name}.npz" in ended.stderr
            assert says in ended.stderr
            assert "Traceback" not in ended.stderr
    finally:
        engine.close()


READING = """
import time
from pathlib import Path
def slowly():
    Path(__file__).with_suffix(".read").touch()
    time.sleep(60)
def and_on():
    for _ in range(2):
        try:
            slowly()
        except KeyboardInterrupt:
            Path(__file__).with_suffix(".again").touch()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["Ctrl-C", "SIGTERM"])
def test_a_client_is_ended_by_a_signal(federation, tmp_path, number, status):
    """While there is no broker, while its data are read, while it serves: at once, and it is no error.

    One whose code keeps the interrupt to itself is ended by the second signal.
    """
    alone = tmp_path / "alone"
    assert main(["federation", "create", str(alone), "--clients", "1", "--address", f"127.0.0.1:{free_port()}"]) == 0
    for name in ("mine", "other"):
        (tmp_path / f"{name}.py").write_text(READING)
    engine, member = offering(federation)
    joined = {
        "waits": [alone / "clients" / "0"],
        "reads": [federation / "clients" / "0", "--data", tmp_path / "mine.py:slowly"],
        "reads on": [federation / "clients" / "1", "--data", tmp_path / "other.py:and_on"],
        "serves": [federation / "clients" / "2"],
    }
    reached = {
        "waits": lambda: "has no broker" in (tmp_path / "waits.log").read_text(),
        "reads": (tmp_path / "mine.read").exists,
        "reads on": (tmp_path / "other.read").exists,
        "serves": lambda: 2 in engine.present(),
    }
    hosfl, environment = [sys.executable, "-W", "ignore", "-m", "hosfl.cli"], {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = {}
    try:
        for name, words in joined.items():
            with (tmp_path / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen([*hosfl, "join", *words], stderr=log, env=environment)
        for name, process in processes.items():
            wait_for(reached[name])
            process.send_signal(number)
        wait_for((tmp_path / "other.again").exists)
        processes["reads on"].send_signal(number)
        for name, process in processes.items():
            assert process.wait(20) == (-number if name == "reads on" else status), name
            said = (tmp_path / f"{name}.log").read_text()
            run = "alone" if name == "waits" else member.run
            assert f"of run {run} ends; once more ends it at once" in said
            assert "Traceback" not in said
            assert "closed" not in said
    finally:
        for process in processes.values():
            process.kill()
        engine.close()
