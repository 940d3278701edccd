"""Every engine, by one contract: `hosfl/engines/engine.py`."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import answers
import pytest
from broker import Plain

from hosfl.engines.engine import EngineError, Reply
from hosfl.engines.in_process import InProcessEngine

CLIENTS = 3
MB = 1 << 20
_runs = count()


def answer_of(answer):
    return getattr(answers, answer) if isinstance(answer, str) else answer


class Here:
    """A run whose clients are in this process, and are always here."""

    def __init__(self, request):
        self.answers = dict.fromkeys(range(CLIENTS), answers.reverse)
        self.engine = InProcessEngine(lambda number, data: self.answers[number](data), CLIENTS)

    def join(self, number, answer="reverse"):
        self.answers[number] = answer_of(answer)

    def close(self):
        self.engine.close()


BECOME = b"become "  # and what a client of an actor's answers from then on, pickled


def obedient():
    become, answers_of = BECOME, {}

    def answer(client, data):
        if data.startswith(become):
            answers_of[client] = pickle.loads(data.removeprefix(become))
            return b""
        return answers_of[client](data)

    return answer


@pytest.fixture(scope="module")
def actors():
    """An engine of one actor for each client."""
    ray = pytest.importorskip("ray")
    from hosfl.engines.ray import RayEngine

    for module in (answers, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)  # actors cannot import these files
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, object_store_memory=400 * MB, **quiet)
    engine = RayEngine(obedient, CLIENTS, actors=CLIENTS, cpus=0)
    yield engine
    engine.close()
    ray.shutdown()


class OverRay:
    """A run whose clients are Ray actors, and are always here."""

    def __init__(self, request):
        self.engine = request.getfixturevalue("actors")
        for number in range(CLIENTS):
            self.join(number)

    def join(self, number, answer="reverse"):
        from ray import cloudpickle

        told = BECOME + cloudpickle.dumps(answer_of(answer))
        assert list(self.engine.ask({number: told})) == [Reply(number, b"")]

    def close(self):
        pass  # the actors serve the next test


class OverNats:
    """A run whose clients a NATS broker connects."""

    def __init__(self, request):
        pytest.importorskip("nats")
        from hosfl.engines.nats_line import NatsLine
        from hosfl.engines.nats_server import NatsEngine

        folder = request.getfixturevalue("tmp_path")
        self.made, self.run, self.clients = (NatsEngine, NatsLine), f"run-{next(_runs)}", []
        self.broker = Plain(folder)
        self.broker.start()
        self.engine = self._engine()

    def _engine(self):
        return self.made[0](self.broker.url, self.run, CLIENTS)

    def line(self, number):
        return self.made[1](self.broker.url, self.run, number)

    def join(self, number, answer="reverse", process=False):
        """A client that serves: in a thread, or in a process of its own, which can be killed."""
        kind = Process if process else Thread
        self.clients.append(kind(self, number, answer))
        return self.clients[-1]

    def command(self, number, answer):
        return ["nats", self.broker.url, self.run, str(number), answer]

    def restart(self):
        """Another engine for the same clients."""
        self.engine.close()
        self.engine = self._engine()

    def close(self):
        for client in self.clients:
            client.close()
        self.engine.close()
        self.broker.stop()


class Thread:
    def __init__(self, run, number, answer):
        self.line = run.line(number)
        self.answer = answer_of(answer)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        try:
            self.line.serve(self.answer)
        except EngineError as error:
            self.ended = error

    def close(self):
        self.line.close()
        self.thread.join(20)
        assert not self.thread.is_alive()


class Process:
    def __init__(self, run, number, answer):
        program = [sys.executable, Path(answers.__file__), *run.command(number, answer)]
        self.process = subprocess.Popen(program)

    def kill(self):
        self.process.kill()
        self.process.wait()

    close = kill


ENGINES = {"in-process": Here, "nats": OverNats, "ray": OverRay}


def over(*engines):
    return pytest.mark.parametrize("run", engines, indirect=True)


every_engine = over(*ENGINES)
apart = over("nats", "ray")  # where a client computes while others do
on_devices = over("nats")  # where clients come, go and fetch


@pytest.fixture
def run(request):
    made = ENGINES[request.param](request)
    yield made
    made.close()


def until(true, seconds=20.0):
    """Waits for it; returns for how long."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() < begin + seconds
        time.sleep(0.02)
    return time.monotonic() - begin


@pytest.fixture
def three(run):
    """A run with all its clients here."""
    for number in range(CLIENTS):
        run.join(number)
    until(lambda: run.engine.present() == {0, 1, 2})
    return run


def answered(run, clients, data=b"ask", **limits):
    return {reply.client: reply for reply in run.engine.ask(dict.fromkeys(clients, data), **limits)}


@every_engine
def test_each_client_gets_its_own_and_replies_once(three):
    replies = list(three.engine.ask({n: f"for {n}".encode() for n in range(CLIENTS)}))
    assert sorted(replies, key=lambda r: r.client) == [Reply(n, f"for {n}".encode()[::-1]) for n in range(CLIENTS)]


@apart
def test_replies_come_as_they_come(run):
    for number in range(CLIENTS):
        run.join(number, "slow")
    until(lambda: len(run.engine.present()) == CLIENTS)
    replies = list(run.engine.ask({0: b"0.8", 1: b"0.0", 2: b"0.4"}))
    assert [reply.client for reply in replies] == [1, 2, 0]


@every_engine
def test_asks_in_a_row_are_answered_in_a_row(three):
    for number in range(30):
        assert answered(three, [1], b"%d" % number) == {1: Reply(1, (b"%d" % number)[::-1])}


@every_engine
@pytest.mark.parametrize("size", [0, 1, 32 * 1024, 32 * 1024 + 1, MB // 2, MB // 2 + 1, 3 * MB, 9 * MB + 1])
def test_bytes_of_every_size(three, size):
    data = os.urandom(size)
    assert answered(three, range(CLIENTS), data) == {n: Reply(n, data[::-1]) for n in range(CLIENTS)}


@every_engine
def test_64_megabytes(run):
    run.join(0)
    until(lambda: 0 in run.engine.present())
    data = os.urandom(64 * MB)
    assert list(run.engine.ask({0: data})) == [Reply(0, data[::-1])]


@apart
def test_a_deadline_tells_who_is_late_and_costs_the_next_ask_nothing(run):
    run.join(0, "slow")
    run.join(1, "slow")
    until(lambda: run.engine.present() >= {0, 1})
    begin = time.monotonic()
    replies = list(run.engine.ask({0: b"1.5", 1: b"0.00"}, deadline=0.5))
    assert 0.4 < time.monotonic() - begin < 1.2
    assert replies == [Reply(1, b"00.0"), Reply(0, None, "late")]
    # Client 0 is at the old ask for another second. What it answers there is nobody's any more.
    assert answered(run, [0, 1], b"0.01") == {n: Reply(n, b"10.0") for n in (0, 1)}
    assert answered(run, [0, 1], b"0.02") == {n: Reply(n, b"20.0") for n in (0, 1)}


@apart
def test_closing_the_replies_ends_an_ask(run):
    for number in range(CLIENTS):
        run.join(number, "slow")
    until(lambda: len(run.engine.present()) == CLIENTS)
    begin = time.monotonic()
    replies = run.engine.ask({0: b"no number", 1: b"0.2", 2: b"1.5"})
    assert [next(replies), next(replies)] == [Reply(0, None, "failed: ValueError"), Reply(1, b"2.0")]
    replies.close()
    assert time.monotonic() - begin < 1
    assert answered(run, [0, 1], b"0.0") == {n: Reply(n, b"0.0") for n in (0, 1)}


@on_devices
def test_who_has_never_been_here_is_gone(three):
    three.clients[1].close()
    until(lambda: three.engine.present() == {0, 2})
    begin = time.monotonic()
    assert answered(three, range(CLIENTS)) == {
        0: Reply(0, b"ksa"),
        1: Reply(1, None, "gone"),
        2: Reply(2, b"ksa"),
    }
    assert time.monotonic() - begin < 5  # an engine that has just begun looks around first


@on_devices
def test_a_client_in_a_process(run):
    """It is here while it computes, gone when it is killed, during an ask or before one, and may come back."""
    first = run.join(0, "slow", process=True)
    run.join(1, "slow")
    until(lambda: run.engine.present() == {0, 1})
    assert answered(run, [0], b"6.0") == {0: Reply(0, b"0.6")}  # by now the engine has looked around
    threading.Timer(0.5, first.kill).start()
    begin = time.monotonic()
    replies = list(run.engine.ask({0: b"60", 1: b"0.0"}))
    assert replies == [Reply(1, b"0.0"), Reply(0, None, "gone")]
    assert time.monotonic() - begin < 5
    second = run.join(0, "slow", process=True)
    until(lambda: run.engine.present() == {0, 1})
    assert answered(run, [0, 1], b"0.00") == {n: Reply(n, b"00.0") for n in (0, 1)}
    second.kill()
    assert until(lambda: run.engine.present() == {1}) < 5
    assert answered(run, [0], b"0.0") == {0: Reply(0, None, "gone")}
    run.join(0, "slow", process=True)
    until(lambda: run.engine.present() == {0, 1})
    assert answered(run, [0, 1], b"0.01") == {n: Reply(n, b"10.0") for n in (0, 1)}


@on_devices
def test_a_client_that_closes_during_an_ask_is_gone(three):
    begun = threading.Event()

    def answer(data):
        begun.set()
        time.sleep(1)
        return data

    three.clients.pop(0).close()
    leaving = three.join(0, answer)
    until(lambda: len(three.engine.present()) == CLIENTS)
    closing = threading.Thread(target=lambda: (begun.wait(), leaving.close()), daemon=True)
    closing.start()
    begin = time.monotonic()
    assert answered(three, [0, 1]) == {0: Reply(0, None, "gone"), 1: Reply(1, b"ksa")}
    assert time.monotonic() - begin < 0.9
    closing.join()


@on_devices
def test_a_client_that_takes_the_place_of_another_is_asked_alone(three):
    three.join(1, lambda data: b"the new one")
    until(lambda: three.engine.present() == {0, 1, 2} and not three.clients[1].thread.is_alive())
    assert "another process is client 1 now" in str(three.clients[1].ended)
    assert answered(three, [1]) == {1: Reply(1, b"the new one")}


@every_engine
def test_an_iterator_may_be_closed_early(run):
    for number in range(CLIENTS):
        run.join(number, "slow")
    until(lambda: len(run.engine.present()) == CLIENTS)
    asking = run.engine.ask({0: b"0.0", 1: b"0.5", 2: b"0.5"})
    assert next(asking) == Reply(0, b"0.0")
    asking.close()
    with pytest.raises(KeyboardInterrupt):
        for _ in run.engine.ask({0: b"0.1", 1: b"0.6", 2: b"0.6"}):
            raise KeyboardInterrupt
    assert answered(run, range(CLIENTS), b"0.00") == {n: Reply(n, b"00.0") for n in range(CLIENTS)}


@every_engine
def test_an_ask_that_nobody_looks_at_is_not_sent(run):
    run.join(0, "kept")
    until(lambda: 0 in run.engine.present())
    before = answered(run, [0])[0].data
    run.engine.ask({0: b"never"}).close()
    assert answered(run, [0]) == {0: Reply(0, before + b" ask")}


@on_devices
def test_clients_find_the_next_server(three):
    assert len(answered(three, range(CLIENTS))) == CLIENTS
    three.restart()
    assert answered(three, range(CLIENTS)) == {n: Reply(n, b"ksa") for n in range(CLIENTS)}  # without waiting for them
    assert three.engine.present() == {0, 1, 2}


@on_devices
def test_an_ask_of_a_server_that_is_gone_is_not_the_next_ones(run):
    run.join(0, "slow")
    until(lambda: 0 in run.engine.present())
    asking = run.engine.ask({0: b"1.0"}, deadline=0.2)
    assert list(asking) == [Reply(0, None, "late")]
    run.restart()
    assert answered(run, [0], b"0.0") == {0: Reply(0, b"0.0")}


@on_devices
def test_files(run):
    line = run.line(0)
    big = os.urandom(3 * MB)
    run.engine.offer({"nothing": b"", "a base half": big, "../../etc/passwd": b"a name, no path"})
    assert line.fetch("nothing") == b""
    assert line.fetch("a base half", deadline=20) == big
    assert line.fetch("../../etc/passwd") == b"a name, no path"
    for name in ("what", "/etc/passwd", "a base half "):
        with pytest.raises(EngineError, match="does not offer"):
            line.fetch(name, deadline=20)
    run.engine.offer({"other": big[:MB]})
    assert line.fetch("other") == big[:MB]
    with pytest.raises(EngineError, match="does not offer"):
        line.fetch("a base half")
    line.close()
    with pytest.raises(EngineError, match="closed"):
        line.fetch("other")


@on_devices
def test_a_client_may_fetch_while_it_answers(run):
    run.engine.offer({"f": b"of the server"})
    client = run.join(0, lambda data: client.line.fetch("f", deadline=20))
    until(lambda: 0 in run.engine.present())
    assert answered(run, [0]) == {0: Reply(0, b"of the server")}


@on_devices
def test_a_signal_may_end_a_client(run):
    line = run.line(0)
    before = signal.signal(signal.SIGALRM, lambda *_: line.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        line.serve(answers.reverse)
    finally:
        signal.signal(signal.SIGALRM, before)
    until(lambda: run.engine.present() == set())


@on_devices
def test_a_file_of_a_server_that_is_away_is_waited_for(run):
    run.engine.close()
    line = run.line(0)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"'f' has not come in 0\.3 seconds"):
        line.fetch("f", deadline=0.3)
    assert 0.2 < time.monotonic() - begin < 2
    later = threading.Timer(0.5, lambda: (run.restart(), time.sleep(1), run.engine.offer({"f": b"here"})))
    later.start()
    assert line.fetch("f", deadline=10) == b"here"
    later.join()
    line.close()


@on_devices
def test_a_client_that_fetches_is_not_yet_here(run):
    line = run.line(0)
    run.engine.offer({"f": b"1"})
    assert line.fetch("f") == b"1"
    assert run.engine.present() == set()
    line.close()


@apart
def test_a_client_that_cannot_answer_says_so_and_goes_on(run, caplog):
    run.join(0, "wrong")
    until(lambda: 0 in run.engine.present())
    assert answered(run, [0], b"wrong") == {0: Reply(0, None, "failed: ValueError")}  # and nothing of its data
    if isinstance(run, OverNats):  # an actor's log is its own
        assert "could not answer" in caplog.text
        assert "the text of a patient" in caplog.text
    assert answered(run, [0], b"right") == {0: Reply(0, b"thgir")}


@apart
def test_an_answer_that_is_not_bytes_is_a_failure(run):
    run.join(0, "text")
    until(lambda: 0 in run.engine.present())
    assert answered(run, [0]) == {0: Reply(0, None, "failed: TypeError")}


@every_engine
def test_what_cannot_be_asked(run):
    for stranger in (3, -1):
        with pytest.raises(EngineError, match=f"clients 0 to 2, and no {stranger}"):
            run.engine.ask({0: b"", stranger: b""})
    assert list(run.engine.ask({})) == []


@on_devices
def test_a_closed_engine_says_so(three):
    three.engine.close()
    three.engine.close()
    with pytest.raises(EngineError, match="closed"):
        three.engine.present()
    with pytest.raises(EngineError, match="closed"):
        list(three.engine.ask({0: b""}))
