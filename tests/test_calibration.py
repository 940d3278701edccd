"""Running statistics of the client half: by hand, on the wire, refused, resumed, in every method."""

import copy
import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import shifted
import torch
from safetensors.torch import load_file, save_file
from shifted import moved, net, pictures
from test_fuzz import mutated
from test_join import Elsewhere
from torch import nn

from hosfl import Config, Task, rebuild, train
from hosfl.engines.engine import Reply
from hosfl.engines.in_process import InProcessEngine
from hosfl.methods import METHODS, calibration
from hosfl.methods.tensors import decoded as decode
from hosfl.protocol.endpoint import AnotherRun, Endpoint
from hosfl.protocol.messages import (
    Calibration,
    Complaint,
    Cut,
    Hello,
    Invitation,
    MessageError,
    Statistics,
    Wire,
    encode,
    pack,
    unpack,
)
from hosfl.protocol.provenance import ProvenanceError
from hosfl.protocol.seeds import Purpose
from hosfl.runs.assemble import assemble
from hosfl.runs.config import with_shared
from hosfl.runs.evaluate import evaluate
from hosfl.runs.faults import Faults
from hosfl.runs.federation import Federation
from hosfl.runs.join import WorkerFactory
from hosfl.runs.serve import Transport
from hosfl.runs.simulate import simulate
from hosfl.tasks.items import Batches

CHANNELS, CALIBRATE, BATCH = (4, 6), 3, 8
NUMBERS = 2 * sum(CHANNELS)
OWN = f"{shifted.__file__}:make"
SHARED = {"rounds": 4, "clients": 4, "sampled": 3, "batch": BATCH, "directions": 2, "pool_size": 8, "trains": "norms"}
SHARED |= {"server_rate": 0.01, "client_rate": 0.01, "evaluate_every": 2, "snapshot_every": 2}


@pytest.fixture(scope="module")
def task():
    """A network that has learnt the pictures, and pictures that are not what they were."""
    torch.manual_seed(0)
    model, (x, labels) = net(), pictures(320, 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(80):
        chosen = torch.randperm(320, generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
    test = pictures(100, 1)
    return Task(model, (moved(x), labels), (moved(test[0]), test[1]), nn.functional.cross_entropy, 6, classes=2)


def settings(**own):
    return with_shared({"calibrate": CALIBRATE, **own}, SHARED)


def made(task, **own):
    """A federation before its first round."""
    federation, _ = assemble(Config(task="", **settings(**own)), task=task)
    if federation.config.calibrate:
        federation.calibrate()
    return federation


def of(half):
    return calibration.flat(half)


def test_a_frozen_half_is_better_for_it(task):
    found = {}
    for calibrate in (0, 8):
        federation = made(task, method="frozen", calibrate=calibrate)
        found[calibrate] = evaluate(federation.model(), task.data("test"), task)
    assert found[0][1] > 0.6
    assert found[8][1] < 0.3
    assert found[8][0]["accuracy"] > 0.9
    before, after = (train(task, **settings(method="frozen", calibrate=n)).loss for n in (0, 8))
    assert after < before - 0.1


@pytest.mark.parametrize("aggregation", ["weighted", "uniform", "median"])
def test_the_statistics_are_those_that_one_gets_by_hand(task, aggregation):
    x, labels = task.train.inputs, task.train.labels
    parts = [(x[a:b], labels[a:b]) for a, b in ((0, 5), (5, 100), (100, 200), (200, 320))]  # of the first one 5 samples
    apart = replace(task, train=parts)
    federation = made(apart, aggregation=aggregation, sampled=4)
    half = copy.deepcopy(federation.base)
    rows, counts = [], []
    for number in range(4):
        mine = federation.make_client(number).batch.data
        batches = Batches(mine, BATCH, 0, number, purpose=Purpose.CALIBRATION)
        drawn = [batches(k)[0] for k in range(CALIBRATE)]
        counts.append(sum(len(x) for x in drawn))
        rows.append([])
        for norm, conv in ((half[1], half[0]), (half[4], half[3])):
            drawn = [conv(x).detach() for x in drawn]
            channels = [x.transpose(0, 1).flatten(1) for x in drawn]
            if norm is half[1]:  # by what comes before it, so batches that are put together say the same of its means
                together = torch.cat(channels, 1).mean(1)
                assert torch.allclose(together, torch.stack([c.mean(1) for c in channels]).mean(0), atol=1e-5)
            rows[-1] += [torch.stack([c.mean(1) for c in channels]).mean(0)]
            rows[-1] += [torch.stack([c.var(1) for c in channels]).mean(0)]
            drawn = [
                torch.relu(nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True)).detach()
                for x in drawn
            ]
    assert counts == [15, 24, 24, 24]
    rows = torch.stack([torch.cat(row) for row in rows]).double()
    weights = torch.tensor(counts).double()
    by_hand = {
        "weighted": (rows * weights[:, None]).sum(0) / weights.sum(),
        "uniform": rows.mean(0),
        "median": rows.sort(0).values[1:3].mean(0),
    }[aggregation]
    assert torch.allclose(of(federation.base).double(), by_hand, rtol=1e-4, atol=1e-5)
    assert torch.equal(of(federation.base), of(federation.model().client))


class Odd(nn.Module):
    """A normalisation that is called twice, one that never is, one without statistics, and one of single samples."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.none = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)
        self.none = nn.BatchNorm1d(3, track_running_stats=False)
        self.single = nn.InstanceNorm1d(3, track_running_stats=True)
        self.never.running_mean.fill_(7.0)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.single(self.none(self.twice(self.twice(x) * 3))))


def test_odd_normalisations_and_nothing_changed():
    torch.manual_seed(0)
    half = Odd().train()
    half.twice.momentum = None
    half.single.eval()
    before, modes = copy.deepcopy(half.state_dict()), [m.training for m in half.modules()]
    batches = [(torch.randn(5, 3, 4) + 2, torch.zeros(5)) for _ in range(2)]
    values, samples = calibration.estimate_statistics(half, iter(batches))
    assert samples == 10
    assert list(calibration.running(half)) == [f"{m}.running_{s}" for m in ("twice", "never", "single") for s in S]
    first = torch.stack([x.mean((0, 2)) for x, _ in batches])
    assert torch.allclose(values[:3], first.mean(0) / 2, atol=1e-5)  # of two calls a batch the second has mean 0
    assert values[6:12].tolist() == [7.0] * 3 + [1.0] * 3
    assert torch.allclose(values[12:15], torch.zeros(3), atol=1e-5)
    assert float((values[15:] - 1).abs().min()) > 1e-3  # where nothing was found it would be as at first
    assert all(torch.equal(t, before[name]) for name, t in half.state_dict().items())
    assert [m.training for m in half.modules()] == modes
    assert half.twice.momentum is None
    assert half.single.momentum == 0.1
    assert not any(m._forward_hooks for m in half.modules())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        calibration.estimate_statistics(nn.Sequential(nn.BatchNorm1d(3)), [(torch.randn(1, 3), torch.zeros(1))])


S = ("mean", "var")


def test_two_numbers_per_channel_on_the_wire(task):
    summary = train(task, **settings(rounds=1))
    assert summary.bytes["statistics up"] == 3 * 4 * NUMBERS
    assert summary.bytes["samples up"] == 3 * 4
    assert summary.bytes["statistics down"] == 3 * 4 * NUMBERS
    plain = train(task, **settings(rounds=1, calibrate=0))
    assert not {name for name in plain.bytes if name.startswith(("statistics", "samples"))}
    assert summary.passes["client forward"] == plain.passes["client forward"] + 3 * CALIBRATE * BATCH
    room = made(task).server.largest_message - made(task, calibrate=0).server.largest_message
    assert room == 4 * NUMBERS  # more is not even read
    # Whoever comes later is sent them once.
    longer = train(task, **settings(rounds=8))
    assert longer.bytes["statistics down"] == 4 * 4 * NUMBERS
    assert longer.bytes["statistics up"] == 3 * 4 * NUMBERS


def statistics(client=0, values=None, samples=BATCH, **more):
    values = torch.ones(NUMBERS) if values is None else torch.as_tensor(values, dtype=torch.float32)
    counts = torch.tensor([samples] if isinstance(samples, int) else samples, dtype=torch.int32)
    return Statistics(client=client, **{"round": 0, **more}, statistics=values, samples=counts)


def with_number(at, value):
    values = torch.ones(NUMBERS)
    values[at] = value
    return values


HOSTILE = {
    "too short": (statistics(values=torch.ones(NUMBERS - 1)), "19 statistics where normalisations have 20"),
    "too long": (statistics(values=torch.ones(NUMBERS + 1)), "21 statistics"),
    "none": (statistics(values=[]), "0 statistics"),
    "NaN": (statistics(values=with_number(9, float("nan"))), "infinite or NaN"),
    "infinite": (statistics(values=with_number(0, float("-inf"))), "infinite or NaN"),
    "negative variance": (statistics(values=with_number(4, -1e-6)), "negative variances"),
    "negative variance, last": (statistics(values=with_number(19, -1.0)), "negative variances"),
    "no samples": (statistics(samples=0), "from 1 to 24"),
    "negative samples": (statistics(samples=-1), "from 1 to 24"),
    "too many samples": (statistics(samples=CALIBRATE * BATCH + 1), "from 1 to 24"),
    "samples twice": (statistics(samples=[3, 4]), "from 1 to 24"),
    "unknown client": (statistics(client=4), "no client 4"),
    "of a later round": (statistics(round=1), "of round 1"),
    "no statistics": (Cut(client=0, round=0, cut=torch.ones(1, 2), labels=torch.zeros(1).int()), "Cut of round 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_statistics_are_refused(task, name):
    message, reason = HOSTILE[name]
    server = made(task).server
    before = server.statistics.values.clone()
    server.calibrate([message])
    assert torch.equal(server.statistics.values, before)
    assert server.refused.total == 1
    assert reason in server.refused[0]
    server.calibrate([message, statistics(client=1, values=torch.full((NUMBERS,), 3.0))])
    assert server.statistics.values.tolist() == [3.0] * NUMBERS  # the others count


def test_statistics_for_the_second_time_are_refused(task):
    server = made(task).server
    means = torch.full((NUMBERS,), 2.0)
    server.calibrate(
        [statistics(), statistics(values=means), statistics(client=1, values=4 * means, samples=3 * BATCH)]
    )
    assert server.refused == ["calibration, client 0: statistics for the second time"]
    assert torch.allclose(server.statistics.values, torch.full((NUMBERS,), (1 + 3 * 8) / 4))
    for late in (statistics(), statistics(samples=[]), statistics(values=[])):
        assert server.calibration(late) is None
        assert "after those of the run were committed" in server.refused[-1]
    assert made(task, calibrate=0).server.calibration(statistics()) is None


def test_a_median_holds_against_a_liar(task):
    server = made(task, aggregation="median").server
    server.calibrate([statistics(0), statistics(1), statistics(2, values=torch.full((NUMBERS,), 1e30))])
    assert server.statistics.values.tolist() == [1.0] * NUMBERS


def test_too_large_for_a_narrow_dtype(task):
    largest = torch.full((NUMBERS,), torch.finfo(torch.float32).max)  # finite, and infinite when it is rounded
    narrow, wide = (made(task, dtype=dtype, rule="sgd").server for dtype in ("bfloat16", "float32"))
    for server, refused in ((narrow, 1), (wide, 0)):
        server.calibrate([statistics(values=largest)])
        assert server.refused.total == refused


@pytest.mark.parametrize("name", [n for n, (m, _) in HOSTILE.items() if "samples" not in n and "round" not in n])
def test_hostile_calibration_is_refused(task, name):
    message, _ = HOSTILE[name]
    if isinstance(message, Statistics):
        message = Calibration(client=message.client, round=0, statistics=message.statistics)
    client = made(task).make_client(0)
    before = client.digest()
    with pytest.raises(MessageError):
        client.calibrate(message)
    assert (client.digest(), client.calibrated) == (before, False)
    right = Calibration(client=0, round=0, statistics=torch.ones(NUMBERS))
    client.calibrate(right)
    assert of(client.half).tolist() == [1.0] * NUMBERS
    with pytest.raises(MessageError, match="already"):
        client.calibrate(right)


def test_mutated_bytes_change_nothing(task):
    federation, chance = made(task), random.Random(0)
    server, client = federation.server, federation.make_client(0)
    endpoint = Endpoint(client, calibrates=True)
    whole = [
        encode(statistics()),
        encode(client.request_statistics()),
        encode(Calibration(client=0, round=0, statistics=of(client.half))),
        encode(Calibration(client=0, round=0, statistics=torch.empty(0))),
    ]
    accepted = asked = others = 0
    for _ in range(2000):
        data = mutated(whole, chance)
        before = client.digest()
        try:
            said = decode(endpoint.answer(pack([data])))
            assert isinstance(said, (Statistics, Complaint))
            asked += isinstance(said, Statistics)
        except AnotherRun:
            others += 1
        assert client.digest() == before
        message = server.receive(data)
        if message is None:
            continue
        server.calibrate([message])
        answer = server.calibration(message)
        assert answer is None or torch.isfinite(answer.statistics).all()
        before = client.digest()
        try:
            client.calibrate(message)
            accepted += 1
        except MessageError:
            assert client.digest() == before
        client.calibrated = False
        for values in (server.statistics.values, of(client.half)):
            calibration.check(values, server.statistics.sizes, torch.float32)
    assert min(accepted, asked) > 20
    assert others


def test_a_client_knows_what_it_is_told(task):
    federation = made(task)
    newcomer = federation.make_client(0)
    assert torch.equal(of(newcomer.half), of(task.model[:6]))
    assert not torch.allclose(of(federation.base), of(newcomer.half), atol=0.1)
    assert federation.catch_up(newcomer)
    assert torch.equal(of(newcomer.half), of(federation.base))

    class Lossy(Wire):
        def carry(self, client, messages):
            return None if isinstance(messages[0], Calibration) else super().carry(client, messages)

    federation.messenger.wire = Lossy()
    away = federation.make_client(1)
    assert not federation.catch_up(away)
    assert not away.calibrated
    federation.messenger.wire = Wire()
    assert federation.catch_up(away)
    assert federation.compare_replicas().equal


def test_with_nobody_acceptable_nothing_changes(task, monkeypatch, caplog):
    def fails(*_):
        raise ValueError("more than 1 value per channel")

    monkeypatch.setattr(calibration, "estimate_statistics", fails)
    federation = made(task)
    assert torch.equal(of(federation.base), of(task.model[:6]))
    assert federation.messenger.complaints.total == 3
    assert "1 value per channel" in federation.messenger.complaints[0]
    assert "those of the model stay" in caplog.text
    assert federation.catch_up(federation.make_client(0))


def test_training_s_batches_stay_what_they_were(task):
    one, other = (made(task, calibrate=n).make_client(1).batch for n in (0, CALIBRATE))
    for round in range(4):
        assert torch.equal(one(round)[0], other(round)[0])
        own = replace(other, purpose=Purpose.CALIBRATION)(round)[0]
        assert not torch.equal(one(round)[0], own)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(task, method, tmp_path):
    own = {"method": method, "rounds": 2, "calibrate": 2}
    summary = train(task, tmp_path / "run", **with_shared(own, {**SHARED, "rounds": 2, "local_steps": 2}))
    assert summary.replicas.equal
    assert summary.refused == []
    assert summary.bytes["statistics up"] == 3 * 4 * NUMBERS
    base, client = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("base", "client"))
    moved = {name for name in base if not torch.equal(base[name], client[name])}
    assert not {name for name in moved if "running" in name or "batches" in name}
    assert bool(moved) == (method != "frozen")
    assert float(base["1.running_mean"].abs().max()) > 1
    assert not torch.equal(base["1.running_mean"], task.model[1].running_mean)


class Killed(BaseException):
    """What ends a run in the middle."""


def dying(at):
    def progress(done, *_):
        if done == at:
            raise Killed

    return progress


@pytest.mark.parametrize("own", [{}, {"directions_from": "fresh", "rule": "adamw", "dtype": "bfloat16"}], ids=str)
def test_a_killed_run_goes_on_with_the_statistics_that_it_had(task, own, tmp_path, monkeypatch):
    told, run = settings(**own), tmp_path / "run"
    expected = train(task, tmp_path / "whole", **told)
    for at in (1, 3):
        with pytest.raises(Killed):
            train(task, run, dying(at), resume=run.exists(), **told)

    def forbidden(*_):
        raise AssertionError("estimated for the second time")

    monkeypatch.setattr(Federation, "calibrate", forbidden)
    again = train(task, run, resume=True, **told)
    assert (again.loss, again.replicas) == (expected.loss, expected.replicas)
    for name in ("base", "client", "server"):
        files = [(folder / f"{name}.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
        assert files[0] == files[1]
    tensors, _ = rebuild(run / "hosfl.log", run / "base.safetensors")
    saved = load_file(run / "client.safetensors")
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)
    provenance = [json.loads((folder / "provenance.json").read_text()) for folder in (run, tmp_path / "whole")]
    assert provenance[0] == provenance[1]


def test_statistics_of_another_run_are_refused(task, tmp_path):
    told = settings(rounds=2)
    train(task, tmp_path, **told)
    base = tmp_path / "base.safetensors"
    right = base.read_bytes()
    tensors = load_file(base)
    save_file(tensors | {"1.running_mean": tensors["1.running_mean"] + 1e-3}, base)
    with pytest.raises(ProvenanceError, match="first weights were others"):
        train(task, tmp_path, resume=True, **told)
    save_file({name: t for name, t in tensors.items() if name != "4.running_var"}, base)
    with pytest.raises(ProvenanceError, match=r"has no 4\.running_var"):
        train(task, tmp_path, resume=True, **told)
    base.unlink()  # others may be here by now, who would find other statistics
    with pytest.raises(ProvenanceError, match=r"base\.safetensors cannot be read.*Put it back"):
        train(task, tmp_path, resume=True, **told)
    base.write_bytes(right)
    train(task, tmp_path, resume=True, **told)
    assert base.read_bytes() == right


def test_a_half_without_running_statistics_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="calibrate = 3 needs a client half with running statistics"):
        train(replace(task, at=1), tmp_path / "run", **settings(trains="all"))
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ValueError, match="calibrate must be at least 0"):
        Config(calibrate=-1)


def test_crowds_and_servers_that_die(tmp_path):
    config = Config(**settings(task=OWN, rounds=12, clients=12, partition="iid"))
    faults = Faults(dropout=0.2, absence=0.1, damage=0.05, crash_every=6)
    outcome = simulate(config, faults, tmp_path / "run")
    assert outcome.equal
    assert outcome.deaths
    assert outcome.bytes["statistics up"] == 3 * 4 * NUMBERS
    sent, odd = divmod(outcome.bytes["statistics down"], 4 * NUMBERS)
    assert not odd
    assert 3 <= sent < outcome.visits  # most are of clients who have them already
    tensors, _ = rebuild(tmp_path / "run" / "hosfl.log", tmp_path / "run" / "base.safetensors")
    assert float(tensors["1.running_mean"].abs().max()) > 1


# --- clients elsewhere --------------------------------------------------------------------------------------------


class Apart(Elsewhere):
    """Clients that are made of what is offered alone. wrong: what some of them answer when they are asked for theirs:
    bytes, or None where they are gone."""

    def __init__(self, wrong=None):
        super().__init__(4, task=OWN)
        self.wrong, self.here, self.asked = wrong or {}, frozenset(range(4)), []

    def present(self):
        return self.here

    def ask(self, messages, deadline=None):
        for number, data in messages.items():
            (*_, wanted) = unpack(data)
            asks = isinstance(decode(wanted), Calibration)
            self.asked += [number] if asks else []
            if asks and number in self.wrong:
                answer = self.wrong[number]
                yield Reply(number, answer, "" if answer else "gone")
            else:
                yield Reply(number, self.answer(number, data))


def everybody(files, clients):
    return InProcessEngine(WorkerFactory(files)(), clients)


def alike(here, there):
    assert there.replicas.equal
    assert (there.replicas.digest, there.loss) == (here.replicas.digest, here.loss)
    assert there.provenance == here.provenance
    return there


def test_the_order_in_which_statistics_come_is_nothing(task, monkeypatch):
    """A sum rounds otherwise in another order; and clients of this process leave as they do after a round."""

    class Backwards(InProcessEngine):
        def ask(self, messages, deadline=None):
            yield from reversed(list(super().ask(messages, deadline)))

    federation, _ = assemble(Config(task="", **settings()), task=task)
    federation.messenger.engine = Backwards(federation.messenger.engine.answer, 4)
    statistics = federation.server.statistics
    came, commit = [], statistics.commit
    monkeypatch.setattr(statistics, "commit", lambda answers, how: came.extend(answers) or commit(answers, how))
    left = []
    monkeypatch.setattr(federation, "store_client", left.append)
    federation.calibrate()
    assert len(came) == 3
    assert [message.client for message in came] == sorted(message.client for message in came)
    assert sorted(client.number for client in left) == [message.client for message in came]


@pytest.mark.parametrize("own", [{}, {"trains": "xs:2"}, {"method": "first-order"}, {"method": "frozen"}], ids=str)
def test_the_same_bits_with_clients_elsewhere(own, tmp_path):
    config = Config(**settings(task=OWN, **own))
    here = train(config, tmp_path / "here")
    there = alike(here, train(config, tmp_path / "there", transport=Transport(Apart())))
    assert there.bytes == here.bytes
    for name in ("base", "client", "server"):
        one, other = (tmp_path / way / f"{name}.safetensors" for way in ("here", "there"))
        assert one.read_bytes() == other.read_bytes()


def test_one_process_for_everybody(tmp_path):
    config = Config(**settings(task=OWN, clients=9, rounds=6))
    summary = alike(train(config), train(config, tmp_path, transport=Transport(everybody)))
    assert summary.bytes["statistics down"] == 3 * 4 * NUMBERS  # newcomers begin with what another was told


def test_who_dies_or_lies_costs_nobody_else_anything(tmp_path):
    config = Config(**settings(task=OWN, sampled=4, aggregation="uniform"))
    lie = encode(statistics(2, values=torch.full((NUMBERS,), float("nan"))))
    engine = Apart({0: None, 1: b"no message", 2: lie, 3: encode(statistics(1))})
    summary = train(config, tmp_path / "none", transport=Transport(engine))
    base = load_file(tmp_path / "none" / "base.safetensors")
    assert float(base["1.running_mean"].abs().max()) == 0  # the model's own
    assert [reason for reason in summary.refused if "infinite or NaN" in reason]
    assert [reason for reason in summary.refused if "says that it is client 1's" in reason]
    assert summary.replicas.equal
    one = Apart({n: answer for n, answer in engine.wrong.items() if n != 3})
    summary = train(config, tmp_path / "one", transport=Transport(one))
    assert one.asked == engine.asked == [0, 1, 2, 3]
    assert summary.replicas.equal
    base = load_file(tmp_path / "one" / "base.safetensors")
    client = fresh(one, 3)
    assert torch.equal(torch.cat([base[n] for n in calibration.running(client.client.half)]), own_statistics(client))


def fresh(engine, number):
    """The endpoint of a client that has just come."""
    engine.endpoints.pop(number, None)
    engine.reply(number, pack([]))
    return engine.endpoints[number]


def of_run(endpoint):
    return torch.frombuffer(bytearray(endpoint.run), dtype=torch.uint8)


def own_statistics(endpoint):
    ask = Calibration(client=endpoint.client.number, round=0, run=of_run(endpoint), statistics=torch.empty(0))
    return decode(endpoint.answer(pack([encode(ask)]))).statistics


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    engine = Apart()
    train(Config(**settings(task=OWN)), tmp_path_factory.mktemp("run"), transport=Transport(engine))
    return engine


def test_a_client_that_is_asked_for_its_statistics(offered):
    endpoint = fresh(offered, 1)

    def said(*messages):
        return decode(endpoint.answer(pack([encode(message) for message in messages])))

    run, before = of_run(endpoint), endpoint.client.digest()
    ask = Calibration(client=1, round=0, run=run, statistics=torch.empty(0))
    first, again = said(ask), said(ask)
    assert torch.equal(first.statistics, again.statistics)
    assert first.samples.tolist() == again.samples.tolist() == [CALIBRATE * BATCH]
    assert endpoint.client.digest() == before
    # Told the run's, it holds them, until another server asks before its round 0: those are void.
    told = Calibration(client=1, round=0, run=run, statistics=torch.ones(NUMBERS))
    invitation = Invitation(client=1, round=0, run=run)
    assert len(said(invitation).statistics) == 0
    assert type(said(told, invitation)) is Hello
    assert type(said(invitation)) is Hello
    assert torch.equal(said(ask).statistics, first.statistics)
    assert len(said(invitation).statistics) == 0
    for wrong, why in (
        (Calibration(client=2, round=0, run=run, statistics=torch.empty(0)), "for client 2"),
        (told, "20 statistics in an ask"),
    ):
        assert why in text(said(wrong))
    assert type(said(invitation, ask)) is Hello  # nothing goes before it
    endpoint.client.applied = 3
    assert "after 3 rounds" in text(said(ask))
    endpoint.calibrates = False
    assert "a multiplier, got Calibration" in text(said(ask))


def text(complaint):
    assert type(complaint) is Complaint
    return bytes(complaint.text.tolist()).decode()


def test_a_run_over_an_engine_goes_on_with_its_statistics(tmp_path):
    config = Config(**settings(task=OWN))
    expected = train(config, tmp_path / "here")
    first, again = Apart(), Apart()
    with pytest.raises(Killed):
        train(config, tmp_path / "run", dying(2), transport=Transport(first))
    files = dict(first.files)
    alike(expected, train(config, tmp_path / "run", resume=True, transport=Transport(again)))
    assert (first.asked != [], again.asked) == (True, [])
    assert again.files == files  # so that clients who kept their base need not fetch it


def test_a_client_that_comes_back_is_told_once_more(tmp_path):
    config, engine = Config(**settings(task=OWN, rounds=6)), Apart()

    def forgets(done, *_):
        if done == 3:
            engine.endpoints.clear()

    summary = alike(train(config), train(config, tmp_path, forgets, transport=Transport(engine)))
    assert summary.refused == []
    assert all(endpoint.client.calibrated for endpoint in engine.endpoints.values())


def test_calibration_waits_for_statistics_that_count(task, monkeypatch):
    wrong = {0: encode(statistics(samples=0)), 1: b"junk"}
    federation, _ = assemble(Config(task="", **settings(sampled=4)), task=task)
    answer = federation.messenger.engine.answer
    federation.messenger.engine = InProcessEngine(lambda number, data: wrong.get(number) or answer(number, data), 4)
    federation.enough = 1
    running, came = federation.server.statistics, []
    commit = running.commit
    monkeypatch.setattr(running, "commit", lambda given, how: came.extend(given) or commit(given, how))
    federation.calibrate()
    assert [message.client for message in came] == [2]  # client 3 is not waited for


def test_calibration_waits_for_enough_clients(tmp_path, monkeypatch):
    engine, told = Apart(), []
    engine.here = frozenset({2})

    def come(seconds):
        told.append(json.loads((tmp_path / "run" / "status.json").read_text()))
        engine.here |= {len(told) - 1}

    own = vars(time)  # of the module that waits: other threads of this process sleep too
    monkeypatch.setattr("hosfl.runs.trainer.time", SimpleNamespace(**own | {"sleep": come}))
    config = Config(**settings(task=OWN))
    summary = train(config, tmp_path / "run", transport=Transport(engine, least=3))
    assert engine.asked == [0, 1, 2]
    assert [status["here"] for status in told][:1] == [[2]]
    assert told[0]["last"] == {"waiting for": 3}
    assert summary.replicas.equal

    def interrupted(seconds):
        raise KeyboardInterrupt

    engine.here = frozenset({2})
    monkeypatch.setattr("hosfl.runs.trainer.time", SimpleNamespace(**own | {"sleep": interrupted}))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "other", transport=Transport(engine, least=3))
    assert not (tmp_path / "other").exists()
