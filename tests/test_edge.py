"""The client without torch: the bits that everybody holds, derivatives like a torch client's, and what it refuses."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_fuzz import mutated
from torch import nn

import hosfl
from hosfl import Config, Task
from hosfl.cli import main
from hosfl.edge import travel
from hosfl.edge.client import EdgeClient, _Perturbation
from hosfl.edge.data import Batches, Samples, read_samples, samples_of
from hosfl.edge.export import ExportError
from hosfl.edge.half import Half, HalfError
from hosfl.edge.join import join, make_client
from hosfl.engines.engine import JoinError
from hosfl.engines.in_process import InProcessEngine
from hosfl.engines.saved_state import SavedState
from hosfl.engines.signals import StopOnSignal
from hosfl.methods import travel as with_torch
from hosfl.methods.tensors import tensor
from hosfl.protocol.endpoint import AnotherRun
from hosfl.protocol.messages import (
    Audit,
    Calibration,
    Complaint,
    Cut,
    Differs,
    Hello,
    Invitation,
    MessageError,
    Multiplier,
    Scalars,
    Statistics,
    decode,
    encode,
    pack,
    unpack,
)
from hosfl.runs.assemble import assemble, partition
from hosfl.runs.serve import Transport, offered_files
from hosfl.tasks import items
from hosfl.tasks.data import Dataset
from hosfl.tasks.reading import DataError
from hosfl.tasks.text import read_client_texts

SETTINGS = {"rounds": 6, "clients": 3, "sampled": 3, "batch": 8, "directions": 4, "digest_every": 2, "seed": 5}
FRESH = {"directions_from": "fresh"}
WAYS = {
    "pool": {},
    "two-sided": {**FRESH, "estimator": "two-sided"},
    "adamw": {**FRESH, "rule": "adamw"},
    "gaussian": {**FRESH, "dist": "gaussian"},
    "scaled": {**FRESH, "direction_scale": "rms"},
    "float16": {"wire": "float16"},
    "bfloat16": {"wire": "bfloat16"},
    "int8": {"wire": "int8"},
    "texts": {},
    "texts, xs": {**FRESH, "trains": "xs:2", "blocks": 2},
    "texts, lora": {**FRESH, "trains": "lora:1"},
    "texts, last layer": {**FRESH, "trains": "lora:1:*layer.1.*"},
    "texts, one of two": {**FRESH, "trains": "lora:1:*layer.[12].*", "blocks": 2, "estimator": "two-sided"},
    "pictures": {**FRESH},
    "texts, backward": {**FRESH, "trains": "lora:1", "estimator": "backward", "microbatch": 3, "blocks": 2},
    "texts, int4": {**FRESH, "trains": "lora:1", "frozen": "int4", "blocks": 2},
    "texts, int8, backward": {**FRESH, "trains": "lora:1", "frozen": "int8", "estimator": "backward"},
    "texts, bfloat16": {**FRESH, "trains": "norms", "frozen": "bfloat16"},
    "texts, last layer, backward": {**FRESH, "trains": "lora:1:*layer.1.*", "estimator": "backward"},
    "pictures, backward": {**FRESH, "estimator": "backward"},
    "pictures, blocks": {**FRESH, "blocks": 2},
    "tied, backward": {**FRESH, "estimator": "backward", "microbatch": 3},
    "vectors": {**FRESH},
    "vectors, backward": {**FRESH, "estimator": "backward"},
    "bytes": {**FRESH},
    "bytes, backward": {**FRESH, "estimator": "backward"},
}


def texts():
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (120, 12), generator=chance)
    mask = (torch.arange(12) < torch.randint(3, 13, (120, 1), generator=chance)).long()
    labels = (ids[:, 0] > 47).long()
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24
    )

    def model():
        return transformers.BertForSequenceClassification(config)

    tokens = {"input_ids": ids * mask, "attention_mask": mask}
    train, test = ({k: v[:100] for k, v in tokens.items()}, labels[:100]), (tokens, labels)
    return Task(model, train, test, nn.functional.cross_entropy, at=3)


def pictures():
    x = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def model():
        norm = nn.BatchNorm2d(4)
        norm.running_mean.uniform_(-0.5, 0.5), norm.running_var.uniform_(0.5, 2)
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    return Task(model, (x, (x.sum((1, 2, 3)) > 0).long()), (x[:9], torch.arange(9) % 2), nn.functional.cross_entropy, 3)


def vectors():
    """Texts as vectors, one for each token."""
    chance = torch.Generator().manual_seed(0)
    mask = (torch.arange(12) < torch.randint(3, 10, (100, 1), generator=chance)).long()
    x = {"inputs_embeds": torch.randn(100, 12, 5, generator=chance), "attention_mask": mask}
    labels = (x["inputs_embeds"].sum((1, 2)) > 0).long()

    class Client(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 6)

        def forward(self, inputs_embeds, attention_mask):
            return torch.tanh(self.layer(inputs_embeds)) * attention_mask.unsqueeze(-1)

    class Server(nn.Linear):
        def forward(self, cut, attention_mask):
            return super().forward(cut.sum(1))

    def halves():
        return hosfl.SplitModel(Client(), Server(6, 2))

    return Task(halves, (x, labels), ({k: v[:9] for k, v in x.items()}, labels[:9]), nn.functional.cross_entropy)


def tied():
    """One layer in two places."""
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))

    def model():
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 2))

    return Task(model, (x, (x.sum(1) > 0).long()), (x[:9], torch.arange(9) % 2), nn.functional.cross_entropy, 4)


OFFERED = {}  # by settings: the id of a run and its files, which take long to make


def made(way, **more):
    """A federation, its task, and what it offers to clients without torch."""
    kind, settings = way.partition(",")[0], {**SETTINGS, **WAYS[way], **more}
    tasks = {"texts": texts, "pictures": pictures, "bytes": bytewise, "tied": tied, "vectors": vectors}
    task = tasks.get(kind, lambda: None)()
    if task is not None:
        settings |= {"task": "", "server_rate": 0.05, "client_rate": 0.1, "partition": "iid"}
    federation, task = assemble(Config(**settings), task=task)
    key = repr((way, more))
    if key not in OFFERED:
        OFFERED[key] = federation.id, offered_files(federation, edge=True)
    federation.id, files = OFFERED[key]
    return federation, task, dict(files)


def bytewise():
    """Pictures as they are stored, and a truth value for each pixel."""
    chance = torch.Generator().manual_seed(2)
    x = {
        "pixels": torch.randint(0, 256, (100, 1, 6, 6), generator=chance, dtype=torch.uint8),
        "seen": torch.rand(100, 1, 6, 6, generator=chance) > 0.1,
        "kind": torch.randint(0, 3, (100,), generator=chance, dtype=torch.int32),
    }

    class Client(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.kinds = nn.Conv2d(1, 2, 3), nn.Embedding(3, 32)

        def forward(self, pixels, seen, kind):
            return self.layer(torch.where(seen, pixels.float() / 255, 0.0)).flatten(1) + self.kinds(kind)

    def halves():
        return hosfl.SplitModel(Client(), nn.Linear(32, 2))

    y = (x["pixels"].float().mean((1, 2, 3)) > 127).long()
    return Task(halves, (x, y), ({k: v[:9] for k, v in x.items()}, torch.arange(9) % 2), nn.functional.cross_entropy)


def saved(share, path):
    """A client's samples in a file of arrays."""
    inputs = share.inputs if isinstance(share.inputs, dict) else {"inputs": share.inputs}
    np.savez(path, labels=share.labels.numpy(), **{name: value.numpy() for name, value in inputs.items()})
    return str(path)


def fetch_from(files):
    def fetch(name, sha256, path):
        assert hashlib.sha256(files[name]).hexdigest() == sha256
        path.write_bytes(files[name])
        return files[name]

    return fetch


def endpoint(files, number, folder, data):
    folder.mkdir(exist_ok=True)
    return make_client(files["run"], fetch_from(files), number, folder, data)


def close(one, other, cut, sent, mu):
    """Whether derivatives along the same directions are alike, but for a percent and the outputs' rounding over mu."""
    multiplier = travel.unpacked(sent.multiplier, sent.scales, WIRES[str(sent.multiplier.dtype)])
    values = travel.unpacked(cut.cut, cut.scales, WIRES[str(cut.cut.dtype)])
    rounding = 1e-6 * np.abs(values).max() * np.sqrt(np.square(multiplier).sum()) / mu
    return np.abs(one.scalars - other.scalars).max() < 1e-2 * np.abs(other.scalars).max() + rounding


WIRES = {"float32": "float32", "float16": "float16", "uint16": "bfloat16", "int8": "int8"}
# Exports of half a minute, of what others have in other combinations.
LONG = (
    *("texts, backward", "texts, int8, backward", "texts, last layer, backward"),
    *("texts, bfloat16", "texts, int4", "texts, one of two"),
)


def without_long(ways):
    return [pytest.param(way, marks=[pytest.mark.slow] * (way in LONG)) for way in ways]


@pytest.mark.parametrize("way", without_long(WAYS))
def test_beside_clients_with_torch(way, tmp_path):
    """Client 0 has torch, 1 and 2 have not. Of the first round, whose weights are the same, all numbers are alike."""
    federation, task, files = made(way)
    shares = partition(task, federation.config)
    edges = {n: endpoint(files, n, tmp_path / str(n), saved(shares[n], tmp_path / f"{n}.npz")) for n in (1, 2)}
    heard = {}

    def answer(number, data):
        theirs = federation.endpoint(number).answer(data)
        said = edges[number].answer(data) if number in edges else theirs
        heard.setdefault(number, []).append((decode(theirs), decode(said), decode(unpack(data)[-1])))
        return said

    federation.messenger.engine = InProcessEngine(answer, 3)
    before = edges[1].client.replica.digest()
    losses = [federation.round(0)]
    assert edges[1].client.replica.digest() == before  # probing leaves no trace
    for number in edges:
        kinds = [type(said) for _, said, _ in heard[number]]
        assert kinds == [type(theirs) for theirs, _, _ in heard[number]] == [Hello, Cut, Scalars]
        _, (cut, mine, _), (scalars, measured, sent) = heard[number]
        assert np.array_equal(cut.labels, mine.labels)  # the same samples
        assert np.array_equal(cut.mask, mine.mask)
        assert mine.cut.dtype == cut.cut.dtype
        assert mine.scales.shape == cut.scales.shape
        if mine.cut.dtype == np.float32:
            assert np.allclose(mine.cut, cut.cut, rtol=0, atol=1e-5 * np.abs(cut.cut).max())
        assert close(measured, scalars, cut, sent, edges[number].client.run.mu)
    losses += [federation.round(round) for round in range(1, 6)]
    assert federation.refused == []
    assert np.isfinite(losses).all()
    found = federation.compare_replicas()
    assert (found.equal, found.clients, found.odd) == (True, 4, {})
    assert edges[1].client.applied == 6
    assert edges[1].client.digest() == found.digest


@pytest.mark.parametrize(
    ("way", "pieces", "blocks"),
    [
        ("pool", 1, 1),
        ("texts, lora", 1, 1),
        ("texts, last layer", 2, 1),
        ("texts, xs", 3, 2),
        pytest.param("texts, one of two", 3, 2, marks=pytest.mark.slow),
        ("pictures, blocks", 2, 2),
    ],
)
def test_a_probe_runs_from_its_block_on(way, pieces, blocks, tmp_path, monkeypatch):
    """So what lies in front runs once a round, and what lies between two blocks once more at most."""
    federation, task, files = made(way)
    edge = endpoint(files, 1, tmp_path / "1", saved(partition(task, federation.config)[1], tmp_path / "own.npz"))
    half, run = edge.client.half, federation.make_client(0).run
    assert (half.pieces, len(federation.make_client(0).begins)) == (pieces, blocks)
    ran, one = [0] * pieces, Half._run

    def counted(self, session, *given):
        ran[self._sessions.index(session)] += 1
        return one(self, session, *given)

    monkeypatch.setattr(Half, "_run", counted)
    news = encode(federation.server.welcome(Hello(client=1, round=0)))
    cut = decode(edge.answer(ask(files, news)))
    assert ran == [1] * pieces
    multiplier = pack([encode(Multiplier(client=1, round=0, multiplier=np.ones_like(cut.cut)))])
    first = edge.answer(multiplier)
    assert type(decode(first)) is Scalars
    passes, front = [1] * pieces, pieces - blocks
    for number, (block, _) in enumerate(run.parts()):
        for piece in range(front + number, pieces):
            passes[piece] += block.directions * (2 if run.estimator == "two-sided" else 1)
    for piece in range(1, pieces - 1):  # from there to the next block, whose input is kept then
        passes[piece] += 1
    assert ran == passes
    assert edge.answer(multiplier) == first  # whoever asks again hears the same


@pytest.mark.parametrize(
    ("way", "dtype", "apart"),
    [
        ("pictures", "float32", 1e-5),
        ("pictures, backward", "float32", 1e-5),
        ("pictures, blocks", "float32", 1e-5),
        ("pictures, backward", "bfloat16", 0.02),
    ],
)
def test_running_statistics(way, dtype, apart, tmp_path):
    """Client 0 has torch, 1 and 2 have not; 2 comes after they were estimated, and is told."""
    federation, task, files = made(way, calibrate=3, dtype=dtype)
    shares = [floats(share) for share in partition(task, federation.config)]
    edges = {n: endpoint(files, n, tmp_path / str(n), saved(shares[n], tmp_path / f"{n}.npz")) for n in (1, 2)}
    heard, models = {}, [a.copy() for a in edges[1].client.half.statistics]

    def answer(number, data):
        theirs = federation.endpoint(number).answer(data)
        said = edges[number].answer(data) if number in edges else theirs
        heard.setdefault(number, []).append((decode(theirs), decode(said)))
        return said

    federation.messenger.engine = InProcessEngine(answer, 3)
    federation.messenger.engine.present = lambda: {0, 1}
    federation.calibrate()
    federation.messenger.engine = InProcessEngine(answer, 3)
    assert list(heard) == [0, 1]
    ((theirs, mine),) = heard[1]
    assert type(theirs) is type(mine) is Statistics
    assert np.array_equal(mine.samples, theirs.samples)
    assert np.abs(mine.statistics - theirs.statistics).max() < apart * np.abs(theirs.statistics).max()
    assert all(np.array_equal(a, b) for a, b in zip(edges[1].client.half.statistics, models, strict=True))
    losses = [federation.round(round) for round in range(4)]
    assert np.isfinite(losses).all()
    assert (federation.refused, federation.messenger.complaints) == ([], [])
    for number in edges:
        for theirs, mine in heard[number]:
            assert type(theirs) is type(mine)
            if type(mine) is Cut and mine.round == 0:
                one, other = (travel.unpacked(cut.cut, cut.scales, dtype) for cut in (mine, theirs))
                assert np.allclose(one, other, rtol=0, atol=apart * np.abs(other).max())
    found = federation.compare_replicas()
    assert (found.equal, found.clients) == (True, 4)
    assert edges[2].client.digest() == found.digest
    assert not any(np.array_equal(a, b) for a, b in zip(edges[2].client.half.statistics, models, strict=True))


def test_statistics_that_are_none(tmp_path):
    federation, task, files = made("pictures", calibrate=2)
    edge = endpoint(files, 1, tmp_path / "1", saved(partition(task, federation.config)[1], tmp_path / "own.npz"))
    client, size = edge.client, sum(a.size for a in edge.client.half.statistics)
    before = client.digest()
    right = np.ones(size, np.float32)
    wrong = {
        "7 statistics where normalisations have 8": right[1:],
        "infinite or NaN statistics": right * np.float32(np.inf),
        "negative variances": -right,
        "a message for client 2": None,
    }
    for said, values in wrong.items():
        whom = 2 if values is None else 1
        told = Calibration(client=whom, round=0, statistics=right if values is None else values)
        with pytest.raises(MessageError, match=said):
            client.calibrate(told)
    assert (client.digest(), client.calibrated) == (before, False)
    client.calibrate(Calibration(client=1, round=0, statistics=right))
    assert client.calibrated
    assert client.digest() != before
    with pytest.raises(MessageError, match="has its statistics already"):
        client.calibrate(Calibration(client=1, round=0, statistics=right))
    with pytest.raises(MessageError, match="in an ask for some"):
        client.statistics(Calibration(client=1, round=0, statistics=right))
    empty = Calibration(client=1, round=0, statistics=right[:0])
    client.replica.applied = 2
    with pytest.raises(MessageError, match="asked for statistics of round 0 after 2 rounds"):
        client.statistics(empty)
    client.replica.applied = 0
    assert client.calibrated
    assert client.statistics(empty).statistics.shape == (size,)
    assert not client.calibrated  # those of the run are yet to come
    client.running.open_graph = lambda: lambda inputs: right * np.float32(np.nan)
    with pytest.raises(MessageError, match="a channel needs more than one value"):
        client.statistics(empty)
    client.running.open_graph = lambda: lambda inputs: right[1:]
    with pytest.raises(HalfError, match=r"makes \(7,\), and the half has \(8,\)"):
        client.statistics(empty)
    for told, why in [
        ({"statistics": None}, "offers no graph of them"),
        ({"running": []}, "offers no graph of them"),
        ({"running": ["1.running_mean", "1.running_mean"]}, "named twice"),
        ({"running": ["0.weight", "1.running_var"]}, "named twice"),
        ({"running": ["1.running_mean", "none"]}, "has no 'none'"),
        ({"running": ["1.running_mean", "1.num_batches_tracked"]}, "is I64"),
    ]:
        with pytest.raises((JoinError, HalfError), match=why):
            endpoint(other_edge(files, **told), 1, tmp_path / "1", str(tmp_path / "own.npz"))


@pytest.mark.parametrize(
    ("way", "open_"), [pytest.param("texts, backward", True, marks=pytest.mark.slow), ("texts, lora", False)]
)
def test_frozen_weights_are_constants_where_one_graph_has_them(way, open_):
    """Of constants each session has a copy, and computes a little faster."""
    _, _, files = made(way)
    for graph in (onnx.load_model_from_string(data) for name, data in files.items() if name.endswith(".onnx")):
        given = {value.name for value in graph.graph.input}
        frozen = [w.name for w in graph.graph.initializer if w.external_data and "lora" not in w.name]
        large = [w.name for w in graph.graph.initializer if w.name in frozen and len(w.dims) > 1]
        assert set(given) & set(frozen) == (set(large) if open_ else set())
        assert large


BFLOAT16 = {
    "pictures": {},
    "pictures, backward": {},
    "texts, lora": {"wire": "int8"},
    "texts, xs": {"rule": "adamw", "estimator": "two-sided"},
    "texts, int8, backward": {},
    "tied, backward": {"dist": "gaussian"},
}


@pytest.mark.parametrize("way", without_long(BFLOAT16))
def test_a_half_in_bfloat16(way, tmp_path):
    """The same bits in everybody's weights. What such a client measures has less rounding in it than torch's."""
    federation, task, files = made(way, dtype="bfloat16", **BFLOAT16[way])
    shares, cuts = partition(task, federation.config), []
    edges = {n: endpoint(files, n, tmp_path / str(n), saved(floats(shares[n]), tmp_path / f"{n}.npz")) for n in (1, 2)}
    assert {t.dtype for t in edges[1].client.half.tensors} == {np.dtype(np.uint16)}

    def answer(number, data):
        theirs = federation.endpoint(number).answer(data)
        said = edges[number].answer(data) if number in edges else theirs
        if number == 1 and type(decode(said)) in (Cut, Scalars):
            cuts.append((decode(theirs), decode(said)))
        return said

    federation.messenger.engine = InProcessEngine(answer, 3)
    losses = [federation.round(round) for round in range(4)]
    assert np.isfinite(losses).all()
    assert (federation.refused, federation.messenger.complaints) == ([], [])
    (theirs, mine), (_, measured) = cuts[:2]
    assert mine.cut.dtype == theirs.cut.dtype
    wire = WIRES[str(mine.cut.dtype)]
    one, other = (travel.unpacked(cut.cut, cut.scales, wire) for cut in (mine, theirs))
    assert np.abs(one - other).max() < 0.03 * np.abs(other).max()
    assert np.isfinite(measured.scalars).all()
    if "backward" in way:
        scalars = cuts[1][0].scalars
        assert np.abs(measured.scalars - scalars).max() < 0.05 * np.abs(scalars).max()
    found = federation.compare_replicas()
    assert (found.equal, found.clients) == (True, 4)
    assert edges[1].client.digest() == found.digest
    kept = SavedState(tmp_path / "state.safetensors", b"run", edges[1].client)
    kept.save()
    before = edges[1].client.replica.digest()
    edges[1].client.reset()
    assert edges[1].client.replica.digest() != before
    kept.restore()
    assert (edges[1].client.applied, edges[1].client.replica.digest()) == (4, before)


def floats(share):
    """A client's own, in float32: numpy has no bfloat16."""
    return share.to("cpu", torch.float32)


def test_a_client_that_was_away_and_one_that_is_wrong(tmp_path):
    federation, task, files = made("pool")
    data = saved(partition(task, federation.config)[1], tmp_path / "own.npz")
    edge = endpoint(files, 1, tmp_path / "1", data)
    for round in range(3):
        federation.round(round)
    said = []

    def answer(number, data):
        said.append(decode(edge.answer(data)) if number == 1 else decode(federation.endpoint(number).answer(data)))
        return encode(said[-1])

    federation.messenger.engine = InProcessEngine(answer, 3)
    edge.client.replica.tensors[0][...] += 0.25
    federation.round(3)
    assert [type(m) for m in said if m.client == 1] == [Hello, Differs, Cut, Scalars]
    assert federation.compare_replicas().equal


def ask(files, *before, kind=Invitation, number=1, round=0):
    id = np.frombuffer(bytes.fromhex(json.loads(files["run"])["id"]), np.uint8)
    return pack([*before, encode(kind(client=number, round=round, run=id))])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What is offered, a client's folder and its data."""
    federation, task, files = made("pool")
    folder = tmp_path_factory.mktemp("edge")
    data = saved(partition(task, federation.config)[1], folder / "own.npz")
    news = encode(federation.server.welcome(Hello(client=1, round=0)))
    return files, folder, data, news


def test_multipliers_that_are_none(run, tmp_path):
    files, _, data, news = run
    edge = endpoint(files, 1, tmp_path / "1", data)
    cut = decode(edge.answer(ask(files, news)))
    assert type(cut) is Cut
    before, right = edge.client.replica.digest(), np.ones_like(cut.cut)
    here = {"client": 1, "round": 0}
    wrong = {
        "a multiplier with infinite or NaN": Multiplier(**here, multiplier=right * np.float32(np.nan)),
        "the cut is": Multiplier(**here, multiplier=right[:, :-1]),
        "float16 in a run": Multiplier(**here, multiplier=right.astype(np.float16)),
        "this multiplier is for client 1 in round 9": Multiplier(client=1, round=9, multiplier=right),
        "expects a multiplier, got Scalars": Scalars(**here, scalars=np.ones(4, np.float32)),
    }
    for why, message in wrong.items():
        said = decode(edge.answer(pack([encode(message)])))
        assert type(said) is Complaint
        assert why in bytes(said.text).decode()
    assert type(decode(edge.answer(pack([encode(Multiplier(**here, multiplier=right))])))) is Scalars
    assert edge.client.replica.digest() == before


def test_mutated_bytes_change_nothing(run, tmp_path):
    files, _, data, news = run
    edge, chance = endpoint(files, 1, tmp_path / "1", data), random.Random(0)
    cut = decode(edge.answer(ask(files, news)))
    whole = [news, encode(cut), encode(Multiplier(client=1, round=0, multiplier=np.ones_like(cut.cut)))]
    before, kinds = edge.client.replica.digest(), set()
    for _ in range(1000):
        try:
            kinds.add(type(decode(edge.answer(pack([mutated(whole, chance)])))))
        except AnotherRun:
            kinds.add(AnotherRun)
        assert edge.client.replica.digest() == before
    assert {Complaint, Scalars} <= kinds


class Direct:
    """A line to a server that asks what it is told to."""

    def __init__(self, files, *asks):
        self.files, self.asks, self.heard, self.fetched = files, asks, [], []

    def fetch(self, name, deadline=None):
        self.fetched.append(name)
        return self.files[name]

    def serve(self, answer):
        self.heard += [decode(answer(data)) for data in self.asks]


def test_files_are_fetched_once_and_the_state_is_kept(tmp_path, caplog):
    federation, task, files = made("adamw")
    data = saved(partition(task, federation.config)[1], tmp_path / "own.npz")
    for round in range(4):
        federation.round(round)
    news = encode(federation.server.welcome(Hello(client=1, round=0)))
    line = Direct(files, ask(files, news, round=4), ask(files, kind=Audit, round=4))
    join(line, 1, tmp_path / "state", data=data)
    assert line.fetched == ["run", "base", "header", "half-0.onnx"]
    assert [type(said) for said in line.heard] == [Cut, Hello]
    again = Direct(files, ask(files, kind=Invitation, round=4))
    join(again, 1, tmp_path / "state", data=data)
    assert again.fetched == ["run"]
    assert [(type(said), said.round) for said in again.heard] == [(Hello, 4)]  # not from the beginning
    (tmp_path / "state" / "state.safetensors").write_bytes(b"damaged")
    (tmp_path / "state" / "half-0.onnx").write_bytes(b"damaged")
    once_more = Direct(files, ask(files, kind=Invitation, round=4))
    join(once_more, 1, tmp_path / "state", data=data)
    assert once_more.fetched == ["run", "half-0.onnx"]
    assert once_more.heard[0].round == 0
    assert "is passed over" in caplog.text


def test_files_that_cannot_be_written_are_not_those_of_another_run(run, tmp_path, monkeypatch):
    """onnxruntime reads graphs from the disk. That of another run may fit the base and compute something else."""
    files, _, data, _ = run
    (tmp_path / "1").mkdir()
    model = onnx.load_model_from_string(files["half-0.onnx"])
    model.doc_string = "another"
    (tmp_path / "1" / "half-0.onnx").write_bytes(model.SerializeToString())

    def full(path, content):
        if path.name.endswith(".onnx"):
            raise OSError(errno.ENOSPC, "no space left on device", str(path))
        path.write_bytes(content)

    monkeypatch.setattr("hosfl.engines.joining.write_atomically", full)
    with pytest.raises(OSError, match=r"no space left.*half-0\.onnx"):
        join(Direct(files), 1, tmp_path / "1", data=data)


def test_a_client_that_leaves_its_run_is_gone_before_the_next_is_made(run, tmp_path, monkeypatch):
    """There may not be room for two."""
    files, _, data, _ = run
    made, held = weakref.WeakSet(), []

    class Watched(EdgeClient):
        def __init__(self, *args):
            held.append(len(made))
            super().__init__(*args)
            made.add(self)

    class TwoRuns(Direct):
        def serve(self, answer):
            for self.files in (files, changed(files, id="7" * 16)):
                self.heard.append(decode(answer(ask(self.files))))

    monkeypatch.setattr("hosfl.edge.join.EdgeClient", Watched)
    line = TwoRuns(files)
    join(line, 1, tmp_path / "1", data=data)
    assert [type(said) for said in line.heard] == [Hello, Hello]
    assert held == [0, 0]


def test_no_pass_runs_beside_the_output_of_the_last(run, tmp_path, monkeypatch):
    files, _, data, news = run
    edge, held, through = endpoint(files, 1, tmp_path / "1", data), [], Half._run_pieces
    cut = decode(edge.answer(ask(files, news))).cut

    def watched(*args):
        assert [one for one in held if one() is not None] == []
        held.append(weakref.ref(output := through(*args)))
        return output

    monkeypatch.setattr(Half, "_run_pieces", watched)
    edge.answer(pack([encode(Multiplier(client=1, round=0, multiplier=np.ones_like(cut)))]))
    assert len(held) == SETTINGS["directions"]


def test_an_interrupt_during_a_restore_waits(tmp_path):
    """Off the lattice th is in copies, and whoever is interrupted between two tensors would keep half a step."""
    federation, task, files = made("gaussian")
    data = saved(partition(task, federation.config)[1], tmp_path / "own.npz")
    replica = endpoint(files, 1, tmp_path / "1", data).client.replica
    before, probe = replica.digest(), _Perturbation(replica, range(len(replica.tensors)))
    probe.move(3, 0.5)
    assert replica.digest() != before

    class Interrupted(list):
        def __iter__(self):
            for kept in list.__iter__(self):
                yield kept
                signal.raise_signal(signal.SIGINT)

    probe.saved = Interrupted(probe.saved)
    assert len(probe.saved) > 1
    with pytest.raises(KeyboardInterrupt):
        probe.restore()
    assert replica.digest() == before


ENDLESS = """
import signal, sys
import onnx
import onnxruntime
from onnx import TensorProto, helper
from hosfl.engines.signals import StopOnSignal

flag, x = helper.make_tensor_value_info("flag", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, [1])
times, kept = helper.make_tensor_value_info("times", TensorProto.INT64, []), helper.make_tensor_value_info("y", 1, [1])
same = [helper.make_node("Identity", ["flag"], ["still"]), helper.make_node("Add", ["x", "x"], ["y"])]
still = helper.make_tensor_value_info("still", TensorProto.BOOL, [])
body = helper.make_graph(same, "body", [times, flag, x], [still, kept])
loop = helper.make_node("Loop", ["", "go", "x"], ["y"], body=body)
go = helper.make_tensor("go", TensorProto.BOOL, [], [True])
model = helper.make_model(helper.make_graph([loop], "g", [x], [kept], [go]), ir_version=10)
model.opset_import[0].version = 18
session = onnxruntime.InferenceSession(model.SerializeToString())
with StopOnSignal("client 0 of run run"):
    print("ready", flush=True)
    session.run(None, {"x": [0.0]})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_graph_without_end_is_ended_by_the_second_signal():
    """Python never hears of the first."""
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5)
            for _ in range(2):
                assert process.poll() is None
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            assert process.wait(60) == 130
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_the_line_of_a_client_puts_the_handlers_of_signals_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopOnSignal("client 0 of run run"):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def changed(files, **told):
    return {**files, "run": json.dumps(json.loads(files["run"]) | told).encode()}


def other_settings(files, **settings):
    run = json.loads(files["run"])
    return {**files, "run": json.dumps(run | {"settings": run["settings"] | settings}).encode()}


def other_edge(files, **told):
    return changed(files, edge=json.loads(files["run"])["edge"] | told)


def sealed(files, **others):
    """Files in place of those that are offered, with their right SHA-256."""
    run = json.loads(files["run"])
    for name, data in others.items():
        sha256 = hashlib.sha256(data).hexdigest()
        said = [sha256] if name == "graphs" else sha256
        run = run | {"base": sha256} if name == "base" else run | {"edge": run["edge"] | {name: said}}
    names = {"graphs": "half-0.onnx"}
    return files | {names.get(n, n): data for n, data in others.items()} | {"run": json.dumps(run).encode()}


def reading(place, files):
    """The graph, of which a weight lies in another file."""
    model = onnx.load_model_from_string(files["half-0.onnx"])
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = place
    return model.SerializeToString()


def making(files, what, type, **more):
    """The graph, of whose output one more operator makes something else."""
    model = onnx.load_model_from_string(files["half-0.onnx"])
    model.graph.node.append(onnx.helper.make_node(what, [model.graph.output[0].name], ["other"], **more))
    model.graph.output[0].CopyFrom(onnx.helper.make_value_info("other", type))
    return model.SerializeToString()


TENSOR = onnx.helper.make_tensor_type_proto
SEQUENCE = onnx.helper.make_sequence_type_proto(TENSOR(onnx.TensorProto.FLOAT, None))
REFUSED = {
    "a graph that makes integers": (
        lambda files: sealed(files, graphs=making(files, "Cast", TENSOR(onnx.TensorProto.INT8, None), to=3)),
        r"makes tensor\(int8\)",
    ),
    "a graph that makes a list": (
        lambda files: sealed(files, graphs=making(files, "SequenceConstruct", SEQUENCE)),
        r"makes seq\(tensor\(float\)\)",
    ),
    "no edge": (lambda files: changed(files, edge=None), "has to be started with --edge"),
    "no digest": (lambda files: changed(files, edge={"graphs": [""], "header": ""}), "is no run"),
    "another method": (lambda files: other_settings(files, method="first-order"), "take part in method ho"),
    "forward mode": (lambda files: other_settings(files, estimator="forward"), "not forward"),
    "statistics": (lambda files: other_settings(files, calibrate=2), "calibrate was 0, is 2"),
    "a setting of tomorrow": (lambda files: other_settings(files, tomorrow=1), "update hosfl"),
    "a setting of another type": (lambda files: other_settings(files, batch="many"), "do not work here"),
    "settings that are not its header's": (lambda files: other_settings(files, batch=4), "batch was 8, is 4"),
    "another log": (lambda files: changed(files, log="0" * 64), "header is not that of its log"),
    "no header": (lambda files: sealed(files, header=b"HSFL"), "header is invalid"),
    "a header and more": (lambda files: sealed(files, header=files["header"] + b"\0"), "header is not that of its log"),
    "no base": (lambda files: sealed(files, base=b"rubbish"), "no safetensors file"),
    "another base": (lambda files: sealed(files, base=files["base"][:-1] + b"\1"), "other weights than its log"),
    "graphs of another kind": (lambda files: other_edge(files, graphs=7), "is no run"),
    "no pieces": (lambda files: other_edge(files, graphs=[]), "in 0 pieces, and the run has 1 blocks"),
    "more pieces": (lambda files: other_edge(files, graphs=["0" * 64] * 3), "in 3 pieces"),
    "pieces without end": (lambda files: other_edge(files, graphs=["0" * 64] * 100_000), "in 100000 pieces"),
    "no number": (lambda files: changed(files, cut=[float("inf")]), "is no run"),
    "settings in pairs": (lambda files: changed(files, settings=[[1, 2]]), "update hosfl"),
    "letters for pieces": (lambda files: other_edge(files, graphs="half"), "in 4 pieces"),
    "another graph": (lambda files: other_edge(files, graphs=["0" * 64]), "half-0.onnx has another SHA-256"),
    "a graph that reads other files": (lambda files: sealed(files, graphs=reading("../own.npz", files)), "cannot open"),
    "a graph that reads any file": (lambda files: sealed(files, graphs=reading("/etc/passwd", files)), "cannot open"),
    "no graph": (lambda files: sealed(files, graphs=b"rubbish"), "onnxruntime cannot open"),
    "a digest of more": (lambda files: other_edge(files, digest=["other"]), "has no other"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_runs_that_are_refused(what, run, tmp_path):
    files, _, data, _ = run
    change, why = REFUSED[what]
    with pytest.raises((JoinError, HalfError), match=why):
        join(Direct(change(files)), 1, tmp_path / "1", data=data)


def test_runs_that_a_server_does_not_offer():
    for settings, why in [
        ({"method": "first-order"}, "method ho"),
        ({"estimator": "forward"}, "not forward"),
    ]:
        federation, _ = assemble(Config(**{"clients": 3, "sampled": 3} | settings))
        with pytest.raises(ValueError, match=why):
            Transport(InProcessEngine(lambda number, data: b"", 3), edge=True).connect(federation)


@pytest.mark.parametrize("estimator", ["one-sided", "backward"])
def test_a_graph_is_tried_on_the_longest_texts_that_clients_send(estimator):
    """Those of the sample that it is made of may all be short."""

    class Long(nn.Module):
        def forward(self, y):
            return 2 * y if y.shape[1] > 9 else y

    def model():
        bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
        bert.bert.encoder.layer[0].output.dropout = Long()
        return bert

    ids = torch.randint(5, 50, (120, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:100, 7:] = 0
    tokens, labels = {"input_ids": ids * mask, "attention_mask": mask}, torch.arange(120) % 2
    train = {name: x[:101] for name, x in tokens.items()}, labels[:101]
    task = Task(model, train, (tokens, labels), nn.functional.cross_entropy, at=1)
    config = {**SETTINGS, **FRESH, "task": "", "server_rate": 0.05, "client_rate": 0.1, "partition": "iid"}
    federation, _ = assemble(Config(**config | {"estimator": estimator, "seed": 6}), task=task)
    assert federation.make_client(0).batch(0)[0]["input_ids"].shape[1] == 7
    with pytest.raises(ExportError, match="for 4 samples of 12 tokens, numbers differ"):
        offered_files(federation, edge=True)


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WRONG = {
    "other inputs": ({"inputs": np.zeros((9, 3)), "labels": np.arange(9)}, "does not take these"),
    "inputs by name": ({"pixels": np.zeros((9, 1, 8, 8)), "labels": np.arange(9)}, "was given pixels"),
    "classes": ({"inputs": np.zeros((12, 1, 8, 8)), "labels": np.arange(12)}, "labels are from 0 to 11"),
    "real labels": ({"inputs": np.zeros((9, 1, 8, 8)), "labels": np.ones(9)}, "floating-point numbers"),
    "infinite inputs": ({"inputs": np.full((9, 1, 8, 8), np.inf), "labels": np.arange(9)}, "infinite or NaN"),
    "more labels": ({"inputs": np.zeros((8, 1, 8, 8)), "labels": np.arange(9)}, "9 labels, and inputs of shape"),
    "no labels": ({"inputs": np.zeros((8, 1, 8, 8))}, "one must be called labels"),
    "labels beyond int32": (
        {"inputs": np.zeros((9, 1, 8, 8)), "labels": np.full(9, 2**64 - 1, np.uint64)},
        "travel as int32",
    ),
    "words": ({"inputs": np.zeros((2, 1, 8, 8)), "labels": np.array(["a", "b"])}, "numbers are needed"),
}


@pytest.mark.parametrize("what", WRONG)
def test_data_that_are_refused(what, run, tmp_path):
    files, _, _, _ = run
    arrays, why = WRONG[what]
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(DataError, match=why):
        endpoint(files, 1, tmp_path / "1", str(tmp_path / "own.npz"))


def test_no_data_and_no_arrays(run, tmp_path, monkeypatch):
    files, *_ = run
    with pytest.raises(ValueError, match="--data"):
        join(Direct(files), 1, tmp_path, data="")
    with pytest.raises(ValueError, match=r"reads \.npz"):
        endpoint(files, 1, tmp_path, str(tmp_path))
    with pytest.raises(FileNotFoundError):
        endpoint(files, 1, tmp_path, str(tmp_path / "none.npz"))
    (tmp_path / "own.py").write_text(
        "import numpy as np\ndef make():\n    return np.zeros((9, 1, 8, 8)), np.arange(9)\n"
    )
    assert len(read_samples(f"{tmp_path / 'own.py'}:make")) == 9
    (tmp_path / "own2.py").write_text("def make(x):\n    return x\n")
    with pytest.raises(DataError, match="without arguments"):
        read_samples(f"{tmp_path / 'own2.py'}:make")


def test_numbers_in_bfloat16_are_numbers(tmp_path):
    x, y = torch.randn(5, 3).bfloat16(), torch.randn(5).bfloat16()
    save_file({"inputs": x, "labels": y}, tmp_path / "own.safetensors")
    found = read_samples(str(tmp_path / "own.safetensors"))
    assert np.array_equal(found.inputs, x.float().numpy())
    assert np.array_equal(found.labels, y.float().numpy())


def test_batches_are_those_of_a_client_with_torch():
    task = texts()
    for per_token in (False, True):
        inputs, labels = task.train.inputs, task.train.labels
        labels = inputs["input_ids"].clone() if per_token else labels
        theirs = items.Batches(Dataset(inputs, labels), 3, 7, 2, per_token)
        own = samples_of(({k: v.numpy() for k, v in inputs.items()}, labels.numpy()), "data")
        mine = Batches(own, 3, 7, 2, per_token)
        lengths = set()
        for round in range(20):
            (x, y), batch = theirs(round), mine(round)
            assert np.array_equal(batch.labels, y.numpy())
            assert batch.named().keys() == x.keys()
            assert all(np.array_equal(batch.named()[name], x[name].numpy()) for name in x)
            lengths.add(batch.tokens)
        assert len(lengths) > 2


def test_files_are_as_large_in_memory_as_they_are_stored(tmp_path):
    x = {"bytes": np.zeros((9, 4), np.uint8), "halves": np.zeros((9, 4), np.float16), "wide": np.zeros((9, 4))}
    np.savez(tmp_path / "own.npz", labels=np.arange(9, dtype=np.uint8), **x)
    found = read_samples(str(tmp_path / "own.npz"))
    assert {name: value.dtype for name, value in found.named().items()} == {
        "bytes": np.uint8,
        "halves": np.float16,
        "wide": np.float32,
    }
    batch = Batches(found, 3, 7, 2, False, {"bytes": np.dtype(np.int32)})(0)
    dtypes = {name: value.dtype for name, value in batch.named().items()}
    assert dtypes == {"bytes": np.int32, "halves": np.float32, "wide": np.float32}
    assert Batches(found, 3, 7, 2, False)(0).named()["bytes"].dtype == np.int64


def test_integers_that_are_too_large(tmp_path):
    """A cast would make others of them."""
    x, labels = np.full((3, 2), 2**63 + 5, np.uint64), np.zeros(3, np.int64)
    for dtype, numbers, said in [
        (np.int64, x, "numbers from 0 to 9223372036854775813, and the half takes -9223372036854775808 to"),
        (np.int8, np.full((3, 2), -129), "numbers from -129 to 0, and the half takes -128 to 127"),
        (np.bool_, np.full((3, 2), 2), "numbers from 0 to 2, and the half takes 0 to 1"),
        (np.int64, np.ones((3, 2)), "has float32 numbers, and the half takes int64: save them as integers"),
    ]:
        with pytest.raises(DataError, match=said):
            samples_of((numbers, labels), "data").check_castable({"input": np.dtype(dtype)})
        samples_of((numbers, labels), "data").check_castable({"other": np.dtype(dtype)})
    with pytest.raises(DataError, match="labels from 0 to 18446744073709551615: they travel as int32"):
        samples_of((labels, np.full(3, 2**64 - 1, np.uint64)), "data")


def test_masks_that_are_none():
    ids, labels = np.ones((2, 3), np.int64), np.arange(2)
    for mask in (np.array([[1, 0, 2], [1, 1, 1]]), np.array([[0, 0, 0], [1, 1, 1]]), np.ones(2)):
        with pytest.raises(DataError, match="attention_mask"):
            samples_of({"input_ids": ids, "attention_mask": mask, "labels": labels}, "data")
    with pytest.raises(DataError, match="no samples"):
        Samples(np.zeros((0, 3)), np.zeros(0))


def tricky():
    chance = np.random.default_rng(0)
    values = chance.standard_normal((5, 71)).astype(np.float32) * 10 ** chance.uniform(-30, 4, (5, 1)).astype("f4")
    values[0, :3] = 0, -0.0, 2**-149
    values[1, 64:] = 0
    return values


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16", "int8"])
def test_what_travels_has_the_same_bits(wire):
    values = tricky()
    packed, scales = travel.packed(values, wire)
    theirs, their_scales = with_torch.packed(torch.from_numpy(values), wire)
    assert torch.equal(tensor(packed), theirs)
    assert torch.equal(torch.from_numpy(scales), their_scales)
    back = with_torch.unpacked(theirs, their_scales, wire)
    assert torch.equal(torch.from_numpy(travel.unpacked(packed, scales, wire)), back)
    with pytest.raises(MessageError, match="scales for"):
        travel.unpacked(packed, np.ones(1, np.float32), wire)
    with pytest.raises(MessageError, match="in a run where cuts travel as"):
        travel.unpacked(packed.astype(np.float64), scales, wire)


ALONE = """
import hashlib, json, sys
sys.modules.update(torch=None, triton=None, onnx=None, transformers=None)  # an import of these raises ImportError
from pathlib import Path
from hosfl.edge.join import join
from hosfl.protocol.messages import decode

class Line:
    def fetch(self, name, deadline=None):
        return (Path(sys.argv[1]) / name).read_bytes()
    def serve(self, answer):
        for name in ("invitation", "multiplier", "audit"):
            said = answer((Path(sys.argv[1]) / name).read_bytes())
            (Path(sys.argv[1]) / f"{name}.said").write_bytes(said)

join(Line(), 1, Path(sys.argv[1]) / "state", data=sys.argv[2])
"""


def test_a_process_without_torch(tmp_path):
    federation, task, files = made("texts, lora")
    data = saved(partition(task, federation.config)[1], tmp_path / "own.npz")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    news = encode(federation.server.welcome(Hello(client=1, round=0)))
    here = federation.endpoint(1)
    cut = decode(here.answer(ask(files, news)))
    chance = np.random.default_rng(0)
    sent = Multiplier(client=1, round=0, multiplier=chance.standard_normal(cut.cut.shape).astype(np.float32))
    multiplier = pack([encode(sent)])
    for name, content in {"invitation": ask(files, news), "multiplier": multiplier}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "audit").write_bytes(ask(files, news, kind=Audit))
    python = os.environ.get("PYTHON_WITHOUT_TORCH", sys.executable)  # another processor's: see .ci/arm64
    done = subprocess.run([python, "-c", ALONE, tmp_path, data], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = {name: decode((tmp_path / f"{name}.said").read_bytes()) for name in ("invitation", "multiplier", "audit")}
    assert np.allclose(said["invitation"].cut, cut.cut, rtol=0, atol=1e-5 * np.abs(cut.cut).max())
    assert close(said["multiplier"], decode(here.answer(multiplier)), cut, sent, here.client.run.mu)
    assert said["audit"].digest.tobytes().hex() == here.client.digest()


def test_the_command_s_errors(tmp_path, capsys):
    member = tmp_path / "fed"
    assert main(["federation", "create", str(member), "--clients", "1", "--address", "127.0.0.1"]) == 0
    client = str(member / "clients" / "0")
    for words, why in [
        ([], "with --data"),
        (["--data", "x.npz", "--task", "mine.py:make"], "--task is for clients with torch"),
        (["--data", "x.npz", "--device", "cuda"], "--device is for clients with torch"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["join", client, "--runtime", "onnx", *words])
        assert ended.value.code == 2
        assert why in capsys.readouterr().err


def test_texts_are_the_tokens_that_a_client_with_torch_has(tmp_path, monkeypatch):
    rows = [("a film that is , at last , worth the ticket", 1), ('not " quite "', 0), ("long " * 90, 1)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    words = dict.fromkeys(word for text, _ in rows[:2] for word in text.split())  # "long" is unknown
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path)
    transformers.BertConfig(vocab_size=len(vocabulary)).save_pretrained(tmp_path)
    theirs = read_client_texts(Config(task="sst2", model=str(tmp_path)), tmp_path / "train.tsv", 64)
    assert theirs.inputs["input_ids"].shape == (3, 64)
    (tmp_path / "train.tsv").rename(tmp_path / "reviews.tsv")
    monkeypatch.chdir(tmp_path)
    mine = read_samples(str(Path(__file__).parent.parent / "examples/texts.py") + ":reviews")
    assert np.array_equal(mine.labels, theirs.labels)
    assert set(mine.inputs) <= set(theirs.inputs)
    for name, tokens in mine.inputs.items():
        assert np.array_equal(tokens, theirs.inputs[name])
