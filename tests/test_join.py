"""Clients that know of a run what a server offers, and nothing else."""

import json
import math
import os
import pickle
import shutil
import signal
from argparse import Namespace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import shifted
import torch
from safetensors.torch import load_file, save_file
from small import small
from torch import nn

from hosfl import commands, train
from hosfl.engines.engine import EngineError, JoinError, Reply
from hosfl.engines.in_process import InProcessEngine
from hosfl.engines.joining import fetch_file
from hosfl.engines.saved_state import SavedState
from hosfl.files import RunFolderError
from hosfl.methods import METHODS
from hosfl.methods.ho import make_run
from hosfl.protocol.messages import Hello, Invitation, Refusal, decode, encode, pack, text_array, unpack
from hosfl.protocol.terms import NothingLearnt
from hosfl.references import load_object
from hosfl.runs import serve, trainer
from hosfl.runs.assemble import assemble
from hosfl.runs.attendance import read_events
from hosfl.runs.config import Config, with_shared
from hosfl.runs.join import ClientFactory, WorkerFactory, join, read_client_data, read_run
from hosfl.runs.serve import Events, Transport
from hosfl.runs.serve import offered_files as offered_by
from hosfl.runs.status import lines

SMALL = {"rounds": 4, "clients": 3, "sampled": 2, "batch": 8, "directions": 3, "evaluate_every": 4, "snapshot_every": 2}
WAYS = {method: {"method": method, "server_rate": 0.05} for method in METHODS} | {
    "ho fresh": {"directions_from": "fresh"},
    "ho adamw": {"directions_from": "fresh", "rule": "adamw"},
    "ho bfloat16": {"dtype": "bfloat16"},
    "ho act": {"trains": "act:2", "public": 40, "directions_from": "fresh", "rule": "adamw"},
    "ho int8": {"trains": "xs:2", "frozen": "int8"},
    "ho over int8": {"wire": "int8"},
}


SIGNS = str(Path(__file__).parent.parent / "examples" / "signs.py")
OWN = {"task": f"{shifted.__file__}:make", "method": f"{SIGNS}:Signs"}
RATES = {"server_rate": 0.05, "client_rate": 0.01}


def client_of(run, config, base, number):
    """The client of a process of its own."""
    clients = ClientFactory(run, config, base)
    return clients.endpoint(number, clients.samples(number), alone=True)


class Elsewhere(InProcessEngine):
    """Clients that are made of what is offered alone. own: the task and the method that they name themselves."""

    def __init__(self, clients, **own):
        self.endpoints, self.own = {}, own
        super().__init__(self.reply, clients)

    def offer(self, files):
        self.files, self.endpoints = files, {}

    def reply(self, number, data):
        if number not in self.endpoints:
            run, config = read_run(self.files["run"], **self.own)
            self.endpoints[number] = client_of(run, config, self.files["base"], number)
        return self.endpoints[number].answer(data)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_as_in_one_process(way, tmp_path):
    settings = Config(**with_shared(WAYS[way], SMALL))
    here = train(settings)
    there = train(settings, tmp_path, transport=Transport(Elsewhere(3)))
    assert there.replicas.equal
    assert there.replicas.digest == here.replicas.digest
    assert (there.loss, there.accuracy) == (here.loss, here.accuracy)
    assert there.bytes == here.bytes
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events] == [1, 2, 3, 4]
    assert all(len(event["took part"]) == 2 and not event["missing"] for event in events)
    assert all(sorted(event["asked"]) == event["took part"] for event in events)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["round"], status["here"]) == (4, [0, 1, 2])


@pytest.mark.parametrize("way", ["ho", "ho adamw", "first-order", "splitfed"])
def test_one_process_for_everybody(way, tmp_path):
    settings = Config(**with_shared(WAYS[way], SMALL | {"clients": 9, "rounds": 8}))
    here = train(settings)
    there = train(settings, tmp_path, transport=Transport(everybody))
    assert there.replicas.equal
    assert (there.replicas.digest, there.loss) == (here.replicas.digest, here.loss)


def everybody(files, clients):
    return InProcessEngine(pickle.loads(pickle.dumps(WorkerFactory(files)))(), clients)


@pytest.mark.parametrize("way", ["each alone", "everybody"])
def test_a_task_and_a_method_of_one_s_own(way, tmp_path, monkeypatch):
    """Files by a name that is the operator's; each client has them elsewhere, and under other names."""
    for name, source in (("tasks.py", shifted.__file__), ("methods.py", SIGNS)):
        shutil.copy(source, tmp_path / name)
    theirs = {"task": f"{tmp_path}/tasks.py:make", "method": f"{tmp_path}/methods.py:Signs"}
    monkeypatch.chdir(Path(shifted.__file__).parent)
    settings = Config(**SMALL | {"task": "shifted.py:make", "method": "../examples/signs.py:Signs"} | RATES)
    here = train(settings)
    there = train(
        settings, tmp_path / "run", transport=Transport(everybody if way == "everybody" else Elsewhere(3, **theirs))
    )
    assert there.replicas.equal
    assert (there.replicas.digest, there.loss) == (here.replicas.digest, here.loss)
    plain = {name: value for name, value in OWN.items() if name != "method"}
    assert here.replicas.digest != train(Config(**SMALL | plain | RATES)).replicas.digest
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["task"], config["method"]) == (settings.task, settings.method)


@pytest.mark.parametrize("name", ["task", "method"])
def test_a_machine_that_lacks_a_file(name, tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    shutil.copy(shifted.__file__ if name == "task" else SIGNS, file)
    monkeypatch.chdir(tmp_path)
    inner = OWN[name].rpartition(":")[2]
    config = Config(**SMALL | OWN | RATES | {name: f"mine.py:{inner}"})
    federation, _ = assemble(config)
    made = WorkerFactory(offered_by(federation))
    file.unlink()
    with pytest.raises(JoinError, match=f"has no {file}, where the run's {name} is: every machine has to have"):
        made()
    federation.close()


def test_a_task_that_is_an_object(tmp_path):
    with pytest.raises(JoinError, match=r"put it into a file, FILE\.py:FUNCTION"):
        train(shifted.make(), tmp_path / "run", transport=Transport(everybody), **SMALL | RATES)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", ["ho fresh", "ho adamw", "ho act"])
def test_a_half_that_went_wrong_begins_anew_from_the_base_file(way, tmp_path):
    settings = with_shared(WAYS[way], SMALL | {"rounds": 6, "sampled": 3, "digest_every": 1})
    engine = Elsewhere(3)

    def damage(done, *_):
        if done == 3:
            with torch.no_grad():
                engine.endpoints[1].client.replica.tensors[0].view(-1)[0] += 0.5

    found = train(Config(**settings), tmp_path, damage, transport=Transport(engine))
    assert found.replicas.equal
    assert found.replicas.digest == train(Config(**settings)).replicas.digest
    assert engine.endpoints[1].client.applied == 6


def test_the_engine_of_one_process():
    asked = []

    def answer(number, data):
        asked.append(number)
        return data[::-1]

    engine = InProcessEngine(answer, 3)
    assert engine.present() == {0, 1, 2}
    big = bytes(range(256)) * 4096
    assert list(engine.ask({2: b"", 0: big})) == [Reply(2, b""), Reply(0, big[::-1])]
    assert list(engine.ask({})) == []
    for stranger in (3, -1):
        with pytest.raises(EngineError, match="clients 0 to 2"):
            engine.ask({0: b"x", stranger: b"x"})
    asked.clear()
    replies = engine.ask({0: b"a", 1: b"b"})
    next(replies)
    replies.close()
    assert asked == [0]


def offered(tmp_path, **settings):
    engine = Elsewhere(3)
    train(Config(**SMALL | settings), tmp_path / "run", transport=Transport(engine))
    return engine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return offered(tmp_path_factory.mktemp("run"), directions_from="fresh", rule="adamw")


def changed(files, **settings):
    told = json.loads(files["run"])
    told["settings"] |= settings
    return json.dumps(told).encode()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "evil.py:task"}, "name yours with --task"),
        ({"task": "os:system"}, "name yours with --task"),
        ({"task": ["digits"]}, "name yours with --task"),
        ({"method": "evil.py:Method"}, "name yours with --method FILE.py:CLASS"),
        ({"method": "os:system"}, "name yours with --method"),
        ({"method": {}}, "name yours with --method"),
        ({"trains": "peft:/etc/x.json"}, "reads no file by its name"),
        ({"trains": "peft:/etc/x.JSON"}, "reads no file by its name"),
        ({"trains": "peft:x.Json"}, "reads no file by its name"),
        ({"trains": "peft:/etc/x"}, "reads no file by its name"),
        ({"data": "/etc"}, "settings that this version has not: data"),
        ({"model": "/etc"}, "settings that this version has not: model"),
        ({"device": "cuda"}, "settings that this version has not: device"),
        ({"more": 1}, "settings that this version has not: more"),
        ({"rounds": "many"}, "rounds: a whole number"),
        ({"batch": -1}, "batch must be at least 1"),
    ],
)
def test_a_run_that_is_refused(run, settings, says):
    with pytest.raises(JoinError, match=says):
        read_run(changed(run.files, **settings))


def test_one_s_own_where_the_run_s_is_the_library_s(run):
    for own in ({"task": OWN["task"]}, {"method": OWN["method"]}):
        (name,) = own
        with pytest.raises(JoinError, match=f"the library's: leave out --{name}"):
            read_run(run.files["run"], **own)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"null", b'{"settings": {}}', b"[" * 100_000])
def test_what_is_no_run(data):
    with pytest.raises(JoinError, match="is no run"):
        read_run(data)


def test_a_run_of_another_format(run):
    with pytest.raises(JoinError, match="of format 3, this is 4: update hosfl"):
        read_run(json.dumps(json.loads(run.files["run"]) | {"format": 3}).encode())


def test_a_base_that_is_not_the_run_s(run):
    told, config = read_run(run.files["run"])
    with pytest.raises(JoinError, match="SHA-256"):
        client_of(told, config, run.files["base"][:-1] + b"\0", 0)
    other = {**told, "log": "0" * 64}
    with pytest.raises(JoinError, match="not the server's"):
        client_of(other, config, run.files["base"], 0)
    told, config = read_run(changed(run.files, trains="biases"))
    with pytest.raises(JoinError, match="not the server's"):
        client_of(told, config, run.files["base"], 0)


SNAPPED = """
import hosfl, torch
from torch import nn

def net(first, second):
    layers = [nn.Linear(4, 4, bias=False) for _ in range(2)]
    for layer, weight in zip(layers, (first, second)):
        layer.weight.data = weight
    return nn.Sequential(*layers, nn.Linear(4, 2))

def task(first, second):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    data = (x[:40], (x[:40, 0] > 0).long()), (x[40:], (x[40:, 0] > 0).long())
    return hosfl.Task(lambda: net(first, second), *data, nn.functional.cross_entropy, 2, classes=2)

def up_to_a_power_of_two():
    return task(torch.eye(4) * (1 - 2.0**-24), torch.full((4, 4), 1 / 16))

def up_to_another_factor():
    return task(2 * torch.eye(4), torch.full((4, 4), 0.5**0.5))
"""


@pytest.mark.parametrize("name", ["up_to_a_power_of_two", "up_to_another_factor"])
def test_a_base_that_would_be_snapped_otherwise_once_more(name, tmp_path):
    """The first weights are rounded up to where a lattice, or the scale of directions, is another one."""
    (tmp_path / "mine.py").write_text(SNAPPED)
    task = f"{tmp_path}/mine.py:{name}"
    settings = Config(**SMALL | RATES | {"task": task, "directions_from": "fresh", "direction_scale": "rms"})
    parameters = [*assemble(settings)[0].base.parameters()]
    first = make_run(
        settings, [nn.Parameter(p.clone()) for p in load_object(task, "task", {})().model()[:2].parameters()]
    )
    again = make_run(settings, parameters)
    assert again.measures != first.measures
    there = train(settings, tmp_path / "run", transport=Transport(Elsewhere(3, task=task)))
    assert there.replicas.equal
    assert there.replicas.digest == train(settings).replicas.digest


@pytest.mark.parametrize(
    ("measures", "says"),
    [
        ({"factors": [1.0], "quantum": 2.0**-20}, "not the server's: Measures"),
        ({"quantum": None}, "not the server's: Measures"),
        ({"quantum": 2.0**-19}, "not the server's"),
        ({"quantum": 3.0}, "a power of two"),
        ({"quantum": "1"}, "a finite number"),
        ({"quantum": 2.0**200}, "the quantum's exponent"),
        ({"factors": [0.0]}, "a power of two"),
        ({"factors": 1}, "no run"),
        ({"more": 1}, "no run"),
    ],
)
def test_measures_that_are_not_the_run_s(measures, says, tmp_path):
    federation, _ = assemble(Config(**SMALL))
    files = offered_by(federation)
    told = json.loads(files["run"])
    told["measures"] |= measures
    with pytest.raises(JoinError, match=says):
        run, config = read_run(json.dumps(told).encode())
        ClientFactory(run, config, files["base"])


class Direct:
    """A line to a run, whose server asks what it is told to."""

    def __init__(self, files, asks=()):
        self.files, self.asks, self.heard, self.fetched = files, asks, [], []

    def fetch(self, name, deadline=None):
        self.fetched.append(name)
        return self.files[name]

    def serve(self, answer):
        self.heard += [answer(ask) for ask in self.asks]


def test_a_client_keeps_its_base_and_its_state(run, tmp_path, caplog):
    told, config = read_run(run.files["run"])
    done = run.endpoints[0].client
    assert done.applied == 4
    kept = SavedState(tmp_path / "state.safetensors", told["id"], done)
    kept.save()
    again = client_of(told, config, run.files["base"], 0)
    assert again.client.digest() != done.digest()
    SavedState(tmp_path / "state.safetensors", told["id"], again.client).restore()
    assert (again.client.applied, again.client.digest()) == (4, done.digest())
    for moment, other in zip(again.client.replica.moments, done.replica.moments, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(moment, other, strict=True))
    # A state that is damaged, another client's or another run's is passed over: the client begins with its base.
    tensors, plain = load_file(tmp_path / "state.safetensors"), client_of(told, config, run.files["base"], 0)
    base = plain.client.digest()
    whole = (tmp_path / "state.safetensors").read_bytes()
    told_otherwise = [whole.replace(b'"client":"0"', b'"client":"1"'), whole.replace(b'"format":"3"', b'"format":"2"')]
    for name, was, other in [("applied", "4", "5"), ("applied", "4", "-"), ("epoch", "0", "1")]:
        told_otherwise.append(whole.replace(f'"{name}":"{was}"'.encode(), f'"{name}":"{other}"'.encode()))
    assert whole not in told_otherwise
    for data in (whole[:-9], whole[:-1] + b"\x7f", b"", *told_otherwise):
        (tmp_path / "state.safetensors").write_bytes(data)
        SavedState(tmp_path / "state.safetensors", told["id"], plain.client).restore()
        assert (plain.client.applied, plain.client.digest()) == (0, base)
        assert "passed over" in caplog.text
        caplog.clear()
    (tmp_path / "state.safetensors").write_bytes(whole)
    SavedState(tmp_path / "state.safetensors", bytes(8), plain.client).restore()  # a run of the same settings
    assert (plain.client.applied, plain.client.digest()) == (0, base)
    assert "it is of another run" in caplog.text
    (tmp_path / "state.safetensors").unlink()
    os.mkfifo(tmp_path / "state.safetensors")  # it would be waited for
    SavedState(tmp_path / "state.safetensors", told["id"], plain.client).restore()
    assert "no regular file" in caplog.text
    assert (
        fetch_file(Direct({"base": b"1"}, []), "base", sha256(b"1").hexdigest(), tmp_path / "state.safetensors") == b"1"
    )
    (tmp_path / "state.safetensors").unlink()
    done.replica.applied = -2
    kept.save()
    done.replica.applied = 4
    SavedState(tmp_path / "state.safetensors", told["id"], plain.client).restore()
    assert (plain.client.applied, "it is of round -2" in caplog.text) == (0, True)
    SavedState(tmp_path / "nothing.safetensors", told["id"], plain.client).save()
    assert not (tmp_path / "nothing.safetensors").exists()
    save_file(tensors, tmp_path / "state.safetensors")
    SavedState(tmp_path / "state.safetensors", told["id"], plain.client).restore()
    assert plain.client.applied == 0


def test_a_kept_state_is_on_the_lattice_that_its_run_had_come_to(tmp_path):
    made = small("moves", rate=8.0, growth=1.25, headroom=2.0).play(30)
    done, again = made.client(), made.client()
    done.catch_up(made.since(done))
    assert done.replica.lattice != made.run.lattice  # a coarser one
    SavedState(tmp_path / "state.safetensors", bytes(8), done).save()
    SavedState(tmp_path / "state.safetensors", bytes(8), again).restore()
    for round in (30, 31):  # what follows ends in the same bits
        assert (again.applied, again.digest(), again.replica.lattice) == (round, done.digest(), done.replica.lattice)
        made.play(round + 1)
        for client in (done, again):
            client.catch_up(made.since(client))


def asks(files, number):
    """The ask of a server that does not know where the client is."""
    id = np.frombuffer(bytes.fromhex(json.loads(files["run"])["id"]), np.uint8)
    return pack([encode(Invitation(client=number, round=0, run=id))])


def test_why_the_server_refuses_is_in_the_client_s_log_once(run, tmp_path, caplog):
    ask = unpack(asks(run.files, 1))

    def after(*reasons):
        return pack([*(encode(Refusal(client=1, round=0, text=text_array(why))) for why in reasons), *ask])

    line = Direct(run.files, [after(why) for why in ("a second cut", "a second cut", "labels\nof 9", "a second cut")])
    join(line, 1, tmp_path)
    assert {type(decode(said)) for said in line.heard} == {Hello}
    says = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    refuses = "the server refuses what client 1 sends: "
    assert says == [refuses + why for why in ("a second cut", "labels?of 9", "a second cut")]
    assert encode(Refusal(client=1, round=0, text=text_array("long" * 999))).count(b"long") == 250


def test_the_base_is_fetched_once(run, tmp_path):
    ask = asks(run.files, 1)
    line = Direct(run.files, [ask])
    join(line, 1, tmp_path)
    assert line.fetched == ["run", "base"]
    assert len(line.heard) == 1
    again = Direct(run.files)
    join(again, 1, tmp_path)
    assert again.fetched == ["run"]
    (tmp_path / "base.safetensors").write_bytes(b"damaged")
    once_more = Direct(run.files)
    join(once_more, 1, tmp_path)
    assert once_more.fetched == ["run", "base"]


ALONE = SMALL | {"clients": 1, "sampled": 1, "rounds": 8}  # and no digest until the end


class LivesOn:
    """A line of the only client, which stays while one server after another comes: starts, functions of `Transport`."""

    def __init__(self, *starts):
        self.starts, self.fetched, self.found, self.closed = starts, [], [], False
        self.offer(offered_by(assemble(Config(**ALONE))[0]))  # of a run that never begins

    def offer(self, files):
        self.files = files

    def fetch(self, name, deadline=None):
        self.fetched.append(name)
        return self.files[name]

    def serve(self, answer):
        for start in self.starts:
            engine = InProcessEngine(lambda number, data: answer(data), 1)
            engine.offer = self.offer
            self.found.append(start(Transport(engine)))

    def close(self):
        self.closed = True


class Killed(Exception):
    pass


def took_part(folder):
    return [json.loads(line)["took part"] for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", ["ho", "ho adamw", "first-order", "splitfed"])
def test_a_client_that_lives_on_takes_part_in_the_next_run(way, tmp_path):
    """Twice the same settings: everything of the two runs is the same but for their ids."""
    settings = Config(**with_shared(WAYS[way], ALONE))
    folders = [tmp_path / "one", tmp_path / "other"]
    line = LivesOn(*(lambda over, folder=folder: train(settings, folder, transport=over) for folder in folders))
    join(line, 0, tmp_path / "client")
    here = train(settings)
    for folder, found in zip(folders, line.found, strict=True):
        assert found.replicas.equal
        assert (found.replicas.digest, found.loss) == (here.replicas.digest, here.loss)
        assert found.refused == []
        assert took_part(folder) == [[0]] * 8
    assert len({(folder / "id.json").read_text() for folder in folders}) == 2
    assert line.fetched.count("run") == 3


@pytest.mark.parametrize("way", ["ho", "ho adamw", "first-order", "splitfed"])
def test_a_copy_of_a_run_s_folder_is_resumed(way, tmp_path):
    """Clients are ahead of the server: by rounds, and then by epochs."""
    settings = Config(**with_shared(WAYS[way], ALONE))
    run, copies = tmp_path / "run", [tmp_path / "copy", tmp_path / "another copy"]

    def start(folder, over, kill=99, **more):
        def progress(done, *_):
            if done == 2 and not copies[0].exists():
                for copy in copies:
                    shutil.copytree(folder, copy)
            if done == kill:
                raise Killed

        try:
            return train(settings, folder, progress, transport=over, **more)
        except Killed:
            return None

    line = LivesOn(
        lambda over: start(run, over, 5),
        lambda over: start(copies[0], over, 7, resume=True),
        lambda over: start(copies[0], over, 7, resume=True),
        lambda over: start(copies[1], over, resume=True),
    )
    join(line, 0, tmp_path / "client")
    found, here = line.found[-1], train(settings)
    assert found.replicas.equal
    assert (found.replicas.digest, found.loss) == (here.replicas.digest, here.loss)
    assert found.refused == []
    assert took_part(copies[1]) == [[0]] * 8
    assert line.fetched.count("run") == 2


def test_the_next_run_is_none_that_the_client_can_join(run, tmp_path):
    """It ends as it does where that is the first run that it finds."""
    next_run = {**run.files, "run": json.dumps(json.loads(changed(run.files, task="own")) | {"id": "00" * 8}).encode()}

    class Line(Direct):
        closed = False

        def serve(self, answer):
            self.files = next_run
            with pytest.raises(JoinError):
                answer(asks(next_run, 1))
            assert self.closed

        def close(self):
            self.closed = True

    with pytest.raises(JoinError, match="name yours with --task"):
        join(Line(run.files), 1, tmp_path)


@pytest.mark.parametrize("id", ["", "00", "0" * 15 + "g", 7, None])
def test_an_id_that_is_none(run, id):
    with pytest.raises(JoinError, match="is no run"):
        read_run(json.dumps(json.loads(run.files["run"]) | {"id": id}).encode())


def test_two_processes_of_one_client(run, tmp_path):
    class Second(Direct):
        def serve(self, answer):
            with pytest.raises(RunFolderError, match="client"):
                join(Direct(run.files), 1, tmp_path)
            self.heard.append(b"")

    line = Second(run.files)
    join(line, 1, tmp_path)
    assert line.heard


def test_a_client_s_own_data(tmp_path):
    config = Config(**SMALL)
    inputs, labels = np.zeros((5, 1, 8, 8), np.float32), np.arange(5)
    np.savez(tmp_path / "mine.npz", inputs=inputs, labels=labels)
    save_file({"inputs": torch.zeros(6, 1, 8, 8), "labels": torch.arange(6)}, tmp_path / "mine.safetensors")
    (tmp_path / "mine.py").write_text(
        "import torch\ndef data():\n    return torch.zeros(7, 1, 8, 8), torch.arange(7)\n"
    )
    for name, count in (("mine.npz", 5), ("mine.safetensors", 6), ("mine.py:data", 7)):
        assert len(read_client_data(str(tmp_path / name), config, 1)) == count
    np.savez(tmp_path / "evil.npz", inputs=np.array([print], object), labels=labels)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_client_data(str(tmp_path / "evil.npz"), config, 1)
    with pytest.raises(ValueError, match="the task digits reads no files"):
        read_client_data(str(tmp_path), config, 1)


class Rubbish(Elsewhere):
    """Client 1 answers everything with rubbish. The others come when a round was tried five times in vain."""

    def __init__(self, *signals):
        super().__init__(3)
        self.signals, self.tries = signals, 0

    def present(self):
        return frozenset(range(3) if self.tries > 5 else [1])

    def reply(self, number, data):
        if number != 1:
            return super().reply(number, data)
        self.tries += 1
        if self.tries == 5:
            for number in self.signals:
                signal.raise_signal(number)
        return b"rubbish"


def test_what_is_written_of_rounds_survives_a_kill_and_a_clock_that_is_set_back(tmp_path, monkeypatch):
    federation, _ = assemble(Config(**SMALL))
    federation.seconds = {}
    now = [1e9, 100.0]
    monkeypatch.setattr(serve, "time", Namespace(time=lambda: now[0], monotonic=lambda: now[1]))
    events = Events(tmp_path)
    events.round(federation, 1, 1.0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "round": 2, "lo')
    events = Events(tmp_path)
    events.round(federation, 2, 1.0)
    now[:] = 1e9 - 3600, 101.0
    events.round(federation, 3, 1.0)
    found, damaged = read_events(tmp_path / "events.jsonl", 4, 3)
    assert ([event.round for event in found], damaged) == ([1, 2, 3], 1)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["round"], status["time"]) == (3, 1e9 - 3600)


@pytest.mark.parametrize("sampled", [1, 3])
def test_nobody_uses_up_the_rounds_of_the_others(sampled, tmp_path, monkeypatch, caplog, capsys):
    told = []
    status = Events.waiting

    def waits(events, federation, done):
        events._told = 0.0
        status(events, federation, done)
        told.append((done, json.loads((tmp_path / "status.json").read_text())))

    monkeypatch.setattr(Events, "waiting", waits)
    monkeypatch.setattr(trainer, "FIRST_PAUSE", 0.01)
    options, config = Namespace(resume=None, tensorboard=False), Config(**SMALL | {"sampled": sampled})
    assert commands._run(options, config, tmp_path, Transport(Rubbish())) == 0
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events] == [1, 2, 3, 4]
    assert all(event["took part"] and 1 not in event["took part"] for event in events)
    done, waiting = told[0]
    assert (done, waiting["last"]) == (0, {"waiting for": 1, "tried": 1, "missing": {"1": "left out"}})
    assert "of round 1 no cut could be learnt from, tried 1 times so far" in "\n".join(lines(waiting, 0.0))
    assert "round 1 is tried again: the server could learn from no cut; bytes of client 1: 7 bytes" in caplog.text
    assert max(status["last"]["tried"] for _, status in told) >= 5
    # In the end client 1 says nothing of a run in which it never took part.
    replicas = json.loads((tmp_path / "summary.json").read_text())["replicas"]
    assert (replicas["clients"], replicas["equal"], replicas["odd"]) == (3, True, {"1": "no digest"})
    assert f"client 1 gave no digest in the end, not {replicas['digest']}" in capsys.readouterr().err


def test_a_run_that_waits_for_better_cuts_may_be_interrupted(tmp_path):
    summary = train(Config(**SMALL), tmp_path, transport=Transport(Rubbish(signal.SIGINT)))
    assert summary.interrupted
    assert summary.rounds == 0


def test_one_owner_s_run_does_not_wait_for_others(tmp_path):
    """As in one process: that nothing was learnt is told after its rounds."""
    with pytest.raises(NothingLearnt, match="no cut in 4 rounds: bytes of client 1"):
        train(Config(**SMALL), tmp_path, transport=Transport(Rubbish(), patient=False))


def test_an_engine_takes_the_run_s_largest_message(tmp_path):
    class Limited(Elsewhere):
        def limit(self, largest):
            self.largest = largest

    engine = Limited(3)
    train(Config(**SMALL), tmp_path, transport=Transport(engine))
    federation, _ = assemble(Config(**SMALL))
    assert engine.largest == federation.server.largest_message


@pytest.mark.parametrize(
    "wrong", [{"deadline": 0}, {"deadline": -1.0}, {"deadline": math.inf}, {"enough": 0}, {"least": 0}]
)
def test_wrong_numbers(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Transport(Elsewhere(3), **wrong)


@pytest.mark.parametrize("name", ["enough", "least"])
def test_nobody_is_waited_for_who_cannot_come(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be at most 3"):
        train(Config(**SMALL), tmp_path / "run", transport=Transport(Elsewhere(3), **{name: 4}))
    assert not (tmp_path / "run").exists()


def test_a_run_elsewhere_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        train(Config(**SMALL), transport=Transport(Elsewhere(3)))
