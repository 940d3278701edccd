"""The engine of a Ray cluster, beyond what every engine promises: actors that queue, die and come back."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hosfl.engines.engine import EngineError, Reply

ray = pytest.importorskip("ray")

from hosfl import Config, train  # noqa: E402
from hosfl.engines.ray import RayEngine  # noqa: E402
from hosfl.runs.join import WorkerFactory  # noqa: E402
from hosfl.runs.serve import Transport  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this file


@pytest.fixture(scope="module", autouse=True)
def cluster():
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "7")  # the machine's own: an actor has its share
        ray.init(address="local", num_cpus=2, object_store_memory=200 * 2**20, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def engine():
    """Twelve clients over two actors: even numbers at one, odd ones at the other."""
    engine = RayEngine(obedient, 12, actors=2)
    yield engine
    engine.close()


@pytest.fixture
def mortal(engine):
    """The same, where a test kills actors: they come back."""
    yield engine
    until(lambda: process(engine, 0) != process(engine, 1))


def obedient():
    """Clients that do what they are told, and send other bytes back as they are."""
    kept = {}

    def answer(client, data):
        word, _, rest = data[:100].partition(b" ")
        match word:
            case b"sleep":
                time.sleep(float(rest))
            case b"die":
                os.kill(os.getpid(), signal.SIGKILL)
            case b"exit":
                sys.exit("enough")
            case b"keep":
                kept[client] = rest
            case b"kept":
                return kept.get(client, b"nothing was kept")
            case b"process":
                return str(os.getpid()).encode()
            case b"threads":
                return os.environ["OMP_NUM_THREADS"].encode()
        return data

    return answer


def told(engine, messages, **how):
    """What is said of each client: its bytes, or the reason why there are none."""
    replies = list(engine.ask(messages, **how))
    said = {r.client: r.reason if r.data is None else r.data for r in replies}
    assert len(said) == len(replies), "a client twice"
    assert all((r.data is None) == bool(r.reason) for r in replies)
    return said


def until(true, seconds=60):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "never"
        time.sleep(0.05)


def process(engine, client):
    return int(told(engine, {client: b"process"})[client])


def test_one_reply_for_each_of_many():
    crowd = RayEngine(obedient, 500, actors=1, cpus=0)
    try:
        assert told(crowd, {n: b"%d" % n for n in range(500)}) == {n: b"%d" % n for n in range(500)}
    finally:
        crowd.close()


def test_what_clients_keep_stays(engine):
    told(engine, {n: b"keep %d" % n for n in range(12)})
    assert told(engine, dict.fromkeys(range(12), b"kept")) == {n: b"%d" % n for n in range(12)}
    assert len({process(engine, n) for n in range(12)}) == 2


def test_what_has_not_begun_at_the_end_never_does(engine):
    told(engine, {2: b"keep old", 4: b"keep old"})
    asks = {0: b"sleep 1", 2: b"keep new", 4: b"keep new"}
    for _ in range(2):  # also where an actor is still busy with the ask before
        assert told(engine, asks, deadline=0.3) == dict.fromkeys(asks, "late")
    time.sleep(1)
    assert told(engine, {2: b"keep new", 4: b"keep new"}, deadline=0) == {2: "late", 4: "late"}
    asks[0] = b"zero"
    replies = engine.ask(asks)
    assert next(replies) == Reply(0, b"zero")
    replies.close()
    assert told(engine, {2: b"kept", 4: b"kept"}) == {2: b"old", 4: b"old"}


def test_a_client_that_exits_says_so_and_its_actor_lives(engine):
    told(engine, {0: b"keep this"})
    assert told(engine, {0: b"exit", 1: b"one"}) == {0: "failed: SystemExit", 1: b"one"}
    assert told(engine, {0: b"kept"}) == {0: b"this"}


def test_an_actor_computes_with_its_share_of_threads(engine):
    assert told(engine, {0: b"threads"}) == {0: b"1"}


def test_an_actor_dies_during_an_ask_and_comes_back(mortal):
    told(mortal, dict.fromkeys(range(12), b"keep this"))
    before = process(mortal, 0)
    asks = {0: b"die", 2: b"two"} | dict.fromkeys((1, 3, 4, 6, 8), b"hi")
    assert told(mortal, asks) == {0: "gone", 2: b"two"} | dict.fromkeys((1, 3, 4, 6, 8), b"hi")
    assert mortal.present() == frozenset(range(12))  # the other stands in
    until(lambda: process(mortal, 0) not in (before, process(mortal, 1)))
    assert told(mortal, {0: b"kept", 1: b"kept"}) == {0: b"nothing was kept", 1: b"this"}


def test_an_actor_that_died_between_asks_is_found_out(mortal):
    os.kill(process(mortal, 1), signal.SIGKILL)
    until(lambda: told(mortal, {1: b"one"}) == {1: "gone"}, 5)
    assert told(mortal, {1: b"one", 2: b"two"}) == {1: b"one", 2: b"two"}


@pytest.mark.slow
def test_an_actor_that_was_restarted_between_asks_is_made_again(mortal):
    os.kill(process(mortal, 1), signal.SIGKILL)
    new = mortal._actors[1].answer.options(max_task_retries=-1)
    until(lambda: ray.get(new.remote(1, b"")) is None)
    assert told(mortal, {1: b"one", 3: b"three"}) == {1: "gone", 3: b"three"}


@pytest.mark.slow
def test_an_actor_may_die_again_while_it_is_made(tmp_path):
    def at_the_third_try():
        (tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
        if len(list(tmp_path.iterdir())) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return obedient()

    engine = RayEngine(at_the_third_try, 1, cpus=0)
    try:
        assert told(engine, {0: b"die"}) == {0: "gone"}
        until(engine.present)
        assert told(engine, {0: b"hi"}) == {0: b"hi"}
        assert len(list(tmp_path.iterdir())) == 3
    finally:
        engine.close()


def test_nobody_is_here_while_the_only_actor_is_away():
    engine = RayEngine(obedient, 12, actors=1, cpus=0)
    try:
        assert told(engine, {0: b"die"} | dict.fromkeys(range(1, 12), b"hi")) == dict.fromkeys(range(12), "gone")
        assert engine.present() == frozenset()
        assert told(engine, {0: b"hi"}) == {0: "gone"}
        until(engine.present)
        assert told(engine, dict.fromkeys(range(12), b"hi")) == dict.fromkeys(range(12), b"hi")
    finally:
        engine.close()


def test_an_actor_that_cannot_be_made_again_is_an_error(tmp_path):
    def once():
        (tmp_path / "made").mkdir()
        return obedient()

    engine = RayEngine(once, 1, cpus=0)
    try:
        assert told(engine, {0: b"die"}) == {0: "gone"}
        with pytest.raises(EngineError, match="no actor is left"):
            until(engine.present)
    finally:
        engine.close()


def test_what_cannot_start_says_why_and_leaves_nothing():
    def broken():
        raise ValueError("no such base")

    before = ray.available_resources().get("CPU", 0)
    with pytest.raises(EngineError, match=r"cannot be made: ValueError: no such base"):
        RayEngine(broken, 4, actors=1, cpus=0)
    with pytest.raises(EngineError, match=r"1 of 1 actors had not started after 1 s.*99 CPUs.*has 2 CPUs.*fewer"):
        RayEngine(obedient, 4, actors=1, cpus=99, patience=1)
    lock = threading.Lock()
    with pytest.raises(EngineError, match="does not pickle: cannot pickle '_thread"):
        RayEngine(lambda: lock, 4, actors=1)
    for bad in ({"clients": 0}, {"clients": 4, "actors": 0}, {"clients": 4, "cpus": -1}, {"clients": 4, "gpus": -1}):
        with pytest.raises(ValueError, match="one client or more"):
            RayEngine(obedient, **bad)
    assert ray.available_resources().get("CPU", 0) == before


@pytest.mark.slow
def test_a_closed_engine_leaves_a_cluster_that_it_found():
    engine = RayEngine(obedient, 3, actors=9, cpus=0)
    assert len(engine._actors) == 3  # no more actors than clients
    actor = process(engine, 1)
    asking = engine.ask({0: b"hi", 1: b"sleep 60"})
    assert next(asking) == Reply(0, b"hi")
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed during a request"):
        next(asking)
    for use in (engine.present, lambda: list(engine.ask({0: b"hi"}))):
        with pytest.raises(EngineError, match="this engine is closed"):
            use()
    until(lambda: not os.path.exists(f"/proc/{actor}"), 20)
    assert told(RayEngine(obedient, 3, actors=1, cpus=0), {0: b"hi"}) == {0: b"hi"}  # the cluster is there


ALONE = """
import ray
from hosfl.engines.engine import EngineError, Reply
from hosfl.engines.ray import RayEngine

def make():
    print("said in an actor")
    return lambda client, data: data

engine = RayEngine(make, 4, actors=1)
assert list(engine.ask({0: b"hi"})) == [Reply(0, b"hi")]
engine.close()
assert not ray.is_initialized()
try:
    RayEngine(make, 4, actors=2, gpus=1000)
except EngineError as error:
    assert str(error).startswith("2 actors of 1000 GPUs each"), error
assert not ray.is_initialized()
"""


@pytest.mark.slow
def test_a_cluster_of_our_own_is_quiet_and_ends():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_no_cluster_at_an_address():
    code = "from hosfl.engines.ray import RayEngine; RayEngine(lambda: None, 1, address='127.0.0.1:1')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "EngineError: Ray's cluster cannot be joined at 127.0.0.1:1" in done.stderr


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"the engine ray needs ray, which is missing: pip install 'hosfl\[ray\]'"):
        RayEngine(obedient, 1)


def over_ray(make=lambda files: WorkerFactory(files)):
    return Transport(lambda files, clients: RayEngine(make(files), clients, actors=2, cpus=0))


def test_a_run_over_ray_is_the_run_in_one_process(tmp_path, monkeypatch):
    """Of a task and a method of one's own, whose files the actors find by their names, and with statistics."""
    monkeypatch.chdir(Path(__file__).parent)
    own = {"task": "shifted.py:make", "method": "../examples/signs.py:Signs", "calibrate": 2}
    config = Config(rounds=3, clients=5, sampled=4, batch=8, server_rate=0.05, client_rate=0.01, **own)
    here, there = train(config, tmp_path / "here"), train(config, tmp_path / "there", transport=over_ray())
    assert here.replicas.digest == there.replicas.digest
    assert there.replicas.equal
    assert here.scores == there.scores


@pytest.mark.slow
def test_a_run_outlives_an_actor(tmp_path):
    def mortal(files):
        def make():
            answer, asked = WorkerFactory(files)(), []

            def until_the_fifth(client, data):
                asked.append(client)
                if len(asked) == 5 and not (tmp_path / "died").exists():
                    (tmp_path / "died").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer(client, data)

            return until_the_fifth

        return make

    summary = train(Config(rounds=4, clients=5, sampled=5), tmp_path / "run", transport=over_ray(mortal))
    assert (tmp_path / "died").exists()
    assert summary.rounds == 4
    assert summary.replicas.equal
    assert summary.replicas.clients == 6
