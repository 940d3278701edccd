"""The round: its arithmetic against a few lines of numpy, replay, probing without trace, refusals."""

import copy
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import DIRECTIONS, FACTORS, batch, small
from torch import nn

from hosfl.engines.engine import Reply
from hosfl.halves.split import SplitModel, split
from hosfl.methods.client import Client
from hosfl.methods.first_order import FirstOrderClient, GradientAverage
from hosfl.methods.ho import ZerothOrderClient, make_run
from hosfl.probing.probe import PerturbedTensors, probe_in_place, probe_untouched, trainable
from hosfl.protocol import replica
from hosfl.protocol.endpoint import Endpoint
from hosfl.protocol.lattice import Lattice, LatticeError
from hosfl.protocol.messages import (
    Complaint,
    Cut,
    Differs,
    Gradient,
    Hello,
    Invitation,
    MessageError,
    Multiplier,
    Records,
    Scalars,
    Weights,
    Wire,
    decode,
    encode,
    pack,
)
from hosfl.protocol.replica import digest
from hosfl.protocol.seeds import direction_seeds
from hosfl.protocol.terms import Run
from hosfl.runs.assemble import assemble
from hosfl.runs.config import Config
from hosfl.tasks.data import dirichlet_split
from hosfl.tasks.digits import digits
from hosfl_kernels import spec

NO_DIGEST = torch.empty(0, dtype=torch.int32)


def records(rows, round=0, **header):
    return Records(client=0, round=round, coefficients=rows, rates=torch.empty(0), digest=NO_DIGEST, **header)


def noise_of(run, round, p):
    """Direction p of a round for Linear(3, 2), by spec.py: weight is stream 0, bias stream 1, each with its factor."""
    seed = direction_seeds(run.seed, round, run.directions)[p]
    return (
        FACTORS[0] * spec.noise(6, seed, stream=0, dist=run.dist).astype(np.float64).reshape(2, 3),
        FACTORS[1] * spec.noise(2, seed, stream=1, dist=run.dist).astype(np.float64),
    )


@pytest.mark.parametrize(("kind", "dist"), [("moves", "rademacher"), ("sgd", "gaussian"), ("sgd", "rademacher")])
def test_scalars_and_step_are_the_formula(kind, dist):
    made = small(kind, rate=0.5, dist=dist)
    client, run = made.client(), made.run
    x = batch(0)[0].double().numpy()
    cut = client.output(0)
    multiplier = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    answer = client.answer(Multiplier(client=0, round=0, multiplier=multiplier))
    # For a linear half <lam, f(theta + mu u) - f(theta)> / mu = <lam, x U^T + c> exactly.
    lam = multiplier.double().numpy()
    for p in range(DIRECTIONS):
        u, c = noise_of(run, 0, p)
        assert answer.scalars[p] == pytest.approx((lam * (x @ u.T + c)).sum(), rel=2e-3, abs=2e-3)
    made.ledger.commit(0, [answer], [6])
    client.catch_up(made.since(client))
    for index, name in enumerate(("weight", "bias")):
        ghat = sum(float(answer.scalars[p]) * noise_of(run, 0, p)[index] for p in range(DIRECTIONS)) / DIRECTIONS
        old, new = (getattr(half, name).detach().double().numpy() for half in (made.half, client.half))
        decay = 0.5 * 0.1 * old if run.rule else 0.0
        assert np.allclose(new - old, -0.5 * ghat - decay, atol=1e-5)
    assert cut.cut.shape == (6, 2)


def test_the_estimate_is_the_gradient_on_average():
    # Mean over many directions of v_p u_p: the true gradient lam^T x, within the estimator's own spread.
    made = small()
    half, run = copy.deepcopy(made.half), replace(made.run, factors=(1.0, 1.0))
    inputs, lam = batch(0)[0], torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    seeds = list(range(4000))
    with torch.no_grad():
        scalars = probe_in_place(lambda: half(inputs), PerturbedTensors.of(half), lam, half(inputs), seeds, run.mu)
    true = (lam.T @ inputs).double().numpy()
    estimates = np.stack([float(v) * spec.noise(6, s).reshape(2, 3) for v, s in zip(scalars, seeds, strict=True)])
    error = np.abs(estimates.mean(0) - true)
    assert (error < 5 * estimates.std(0) / np.sqrt(len(seeds))).all()
    assert np.abs(true).max() > 1


class Fails(nn.Module):
    """A half that raises in its n-th forward pass."""

    def __init__(self, after):
        super().__init__()
        self.linear, self.left = nn.Linear(3, 2), after

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of luck")
        return self.linear(x)


@pytest.mark.parametrize("kind", ["moves", "sgd", "adamw bfloat16", "pool"])
def test_probing_leaves_no_trace(kind):
    client = small(kind).client()
    before, modes = client.digest(), [m.training for m in client.half.modules()]
    for round in range(50):
        cut = client.output(round).cut
        client.answer(Multiplier(client=0, round=round, multiplier=torch.randn(6, 2).to(cut.dtype)))
    assert client.digest() == before
    assert [m.training for m in client.half.modules()] == modes


class Vocabulary(nn.Module):
    """A large table and a layer. other: reads the table by a reference of its own, as some that share weights do."""

    def __init__(self, other):
        super().__init__()
        self.table, self.layer = nn.Embedding(40_000, 32), nn.Linear(32, 4)
        self.references = [self.table.weight] if other else []

    def forward(self, ids):
        return self.layer(self.table(ids) + sum(weight[ids + 1] for weight in self.references))


@pytest.mark.parametrize("other", [False, True])
def test_a_large_vocabulary_is_not_written_by_probing(other):
    """A copy of the rows that a batch looks up moves; else, and for compiled code, all of it, to the same scalars."""
    ids, multiplier = torch.randint(0, 30_000, (2, 5)), torch.randn(2, 5, 4)
    found, written, passes = [], [], []
    for compiled in ("", "eager"):
        torch.manual_seed(0)
        half = Vocabulary(other)
        run = make_run(Config(), trainable(half)[0])
        assert run.lattice is not None
        client = ZerothOrderClient(0, half, lambda round: (ids, torch.zeros(2)), run=run, compile=compiled)
        for round in range(2):
            client.output(round)
            before = half.table.weight._version
            scalars = client.answer(Multiplier(client=0, round=round, multiplier=multiplier * round)).scalars
        found.append(scalars)
        written.append(half.table.weight._version > before)
        passes.append(client.passes["client forward"])
    assert written == [other, True]
    assert torch.equal(*found)
    assert found[0].abs().min() > 0
    assert passes[0] == passes[1] + 2 * len(ids)  # the first probe, both ways


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_exception_in_the_model_leaves_no_trace(after):
    torch.manual_seed(0)
    half = Fails(after)
    parameters, _ = trainable(half)
    grid = Lattice.snap(parameters, (1.0, 1.0))
    run = Run(seed=5, directions=4, dist="rademacher", mu=grid.nearest(1e-3), factors=(1.0, 1.0), lattice=grid)
    client = ZerothOrderClient(0, half, batch, run=run)
    before = client.digest()
    client.output(0)
    with pytest.raises(RuntimeError, match="out of luck"):
        client.answer(Multiplier(client=0, round=0, multiplier=torch.randn(6, 2)))
    assert client.digest() == before


def test_probing_off_the_lattice_would_leave_traces_in_place():
    # Why probe_untouched exists: the plain in-place walk changes weights for good.
    torch.manual_seed(0)
    half = nn.Linear(300, 20)
    before = copy.deepcopy(half.state_dict())
    x = torch.randn(2, 300)
    with torch.no_grad():
        probe_in_place(lambda: half(x), PerturbedTensors.of(half), torch.ones(2, 20), half(x), [1, 2, 3], 1e-3)
        assert (half.weight != before["weight"]).float().mean() > 0.02
        half.load_state_dict(before)
        probe_untouched(half, x, torch.ones(2, 20), half(x), [1, 2, 3], 1e-3, "rademacher")
    assert torch.equal(half.weight, before["weight"])


def test_tied_and_frozen_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.frozen, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.b(self.frozen(self.a(x)))

    torch.manual_seed(0)
    module = Tied()
    parameters, streams = trainable(module)
    assert [p.shape for p in parameters] == [(3, 3), (3,)]
    assert streams == [0, 3]  # the frozen weight and bias keep numbers 1 and 2
    Lattice.snap(parameters, (1.0, 1.0))
    x, lam = torch.randn(4, 3), torch.randn(4, 3)
    with torch.no_grad():
        cut = module(x)
        in_place = probe_in_place(lambda: module(x), PerturbedTensors.of(module), lam, cut, [1, 2], 2.0**-10)
        untouched = probe_untouched(module, x, lam, cut, [1, 2], 2.0**-10, "rademacher")
    assert torch.equal(in_place, untouched)


def test_multipliers_have_no_average_inside():
    server = small().server()
    cuts = [Cut(client=m, round=0, cut=torch.randn(6, 2), labels=torch.randint(0, 2, (6,)).int()) for m in range(3)]
    half = copy.deepcopy(server.half)
    multipliers, loss = server.step(0, cuts)
    gradients, losses = [], []
    for message in cuts:
        z = message.cut.clone().requires_grad_()
        own = nn.functional.cross_entropy(half(z), message.labels.long())
        gradients.append(torch.autograd.grad(own, [z, *half.parameters()]))
        losses.append(float(own.detach()))
        assert torch.allclose(multipliers[message.client].multiplier, gradients[-1][0])
    assert loss == pytest.approx(np.mean(losses))
    for k, (old, new) in enumerate(zip(half.parameters(), server.half.parameters(), strict=True)):
        mean = sum(g[k + 1] for g in gradients) / 3
        assert torch.allclose(new, old - 0.1 * mean, atol=1e-6)


def test_leaving_the_lattice_is_an_error_for_every_client_at_the_same_round():
    made = small(headroom=2.0)
    lattice = made.run.lattice
    rows = torch.full((12, 4), lattice.nearest(lattice.limit / 12))  # up to a third of the limit per round
    regular, late = made.replica(), made.replica()
    with pytest.raises(LatticeError, match="beyond"):
        for round in range(12):
            regular.apply(records(rows[round : round + 1], round))
    with pytest.raises(LatticeError, match=f"round {regular.applied} "):
        late.apply(records(rows))
    assert 0 < regular.applied == late.applied < 12
    assert regular.digest() == late.digest()


def test_a_server_that_leads_off_the_lattice_is_told_so():
    """A client begins anew once, for its weights may be damaged, and then complains: each ask costs one start."""
    made = small(headroom=2.0)
    rows = torch.full((12, 4), made.run.lattice.nearest(made.run.lattice.limit / 12))
    client = made.client()
    client.catch_up(records(rows[:1]))
    assert isinstance(client.catch_up(records(rows[1:], 1)), Differs)
    with pytest.raises(LatticeError, match="beyond"):
        client.catch_up(records(rows))
    assert (client.applied, client.digest()) == (0, made.client().digest())


def test_a_step_beyond_the_lattice_commits_nothing():
    made = small(rate=1e6).play(0)
    before = made.ledger.mirror.digest()
    with pytest.raises(LatticeError, match="rate"):
        made.play(1)
    assert not made.ledger.records
    assert (made.ledger.mirror.applied, made.ledger.mirror.digest()) == (0, before)


def test_a_multiplier_must_be_for_the_last_cut():
    client = small().client()
    early = Multiplier(client=0, round=0, multiplier=torch.zeros(6, 2))
    with pytest.raises(MessageError, match="round -1"):
        client.answer(early)
    client.output(3)
    for wrong, message in [
        (Multiplier(client=0, round=2, multiplier=torch.zeros(6, 2)), "round 2"),
        (Multiplier(client=0, round=3, epoch=1, multiplier=torch.zeros(6, 2)), "epoch 1"),
        (Multiplier(client=1, round=3, multiplier=torch.zeros(6, 2)), "for client 1"),
        (Multiplier(client=0, round=3, multiplier=torch.zeros(6, 3)), "multiplier"),
        (Multiplier(client=0, round=3, multiplier=torch.zeros(6, 2).half()), "float16"),
        (Multiplier(client=0, round=3, multiplier=torch.full((6, 2), torch.nan)), "NaN"),
        (Scalars(client=0, round=3, scalars=torch.zeros(4)), "expects a multiplier"),
    ]:
        with pytest.raises(MessageError, match=message):
            client.answer(wrong)


def test_the_server_refuses_and_goes_on():
    made = small(rate=0.5)
    server, ledger = made.server(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))), made.ledger
    good = Cut(client=0, round=0, cut=torch.randn(6, 2), labels=torch.zeros(6).int())
    wrong = [
        good,  # a second one
        replace(good, client=1, round=1),
        replace(good, client=1, epoch=1),
        replace(good, client=10),
        replace(good, client=2, cut=torch.randn(6, 3)),
        replace(good, client=2, cut=torch.tensor(1.0)),
        replace(good, client=3, labels=torch.zeros(5).int()),
        replace(good, client=3, labels=torch.zeros(6, 1).int()),
        replace(good, client=3, cut=torch.randn(0, 2), labels=torch.zeros(0).int()),
        replace(good, client=3, cut=torch.randn(7, 2), labels=torch.zeros(7).int()),
        replace(good, client=4, labels=torch.full((6,), 2).int()),
        replace(good, client=5, labels=torch.full((6,), -1).int()),
        replace(good, client=5, labels=torch.tensor([-100, 0, 0, 0, 0, 0]).int()),  # which cross_entropy passes over
        replace(good, client=6, cut=torch.full((6, 2), torch.nan)),
        replace(good, client=6, cut=torch.full((6, 2), -torch.inf)),  # of which this half makes zeros
        Hello(client=7, round=0),
    ]
    multipliers, loss = server.step(0, [good, *wrong])
    assert list(multipliers) == [0]
    assert len(server.refused) == server.refused.total == len(wrong)
    twin = small().server()
    assert twin.step(0, [])[0] == {}
    assert twin.refused == []
    before = server.refused.total
    server.commit(
        0,
        [
            Scalars(client=0, round=0, scalars=torch.full((4,), torch.inf)),
            Scalars(client=0, round=0, scalars=torch.ones(3)),
            Scalars(client=0, round=0, epoch=1, scalars=torch.ones(4)),
            Scalars(client=0, round=1, scalars=torch.ones(4)),
            Scalars(client=1, round=0, scalars=torch.ones(4)),
            Gradient(client=0, round=0, gradient=torch.ones(8)),
        ],
    )
    assert server.refused.total == before + 6
    assert ledger.records[0].coefficients.tolist() == [0.0] * 4  # nobody answered: an empty record, no step
    assert ledger.records[0].participants == ()
    server.step(1, [replace(good, round=1)])
    answer = Scalars(client=0, round=1, scalars=torch.ones(4))
    assert [server.accept_answer(1, replace(answer, round=0)), server.accept_answer(1, answer)] == [False, True]
    server.commit(1, [answer])  # for the second time
    assert server.refused.total == before + 8
    assert ledger.records[1].coefficients.tolist() == pytest.approx([-0.5 / 4] * 4, abs=made.run.lattice.quantum)
    assert ledger.records[1].participants == (0,)
    with pytest.raises(ValueError, match="cannot be committed"):
        server.commit(1, [])


def test_a_cut_whose_labels_all_do_not_count_is_refused():
    server = small().server()
    server.cuts = replace(server.cuts, ignore_index=-1)
    server.loss = partial(nn.functional.cross_entropy, ignore_index=-1)
    labels = torch.tensor([-1, -1, 0, 1, 1, -1]).int()
    cut = Cut(client=0, round=0, cut=torch.randn(6, 2), labels=labels)
    answers, _ = server.step(0, [cut, replace(cut, client=1, labels=torch.full_like(labels, -1))])
    assert list(answers) == [0]
    assert "client 1: a cut whose labels are all -1" in server.refused[0]


class Texts(nn.Linear):
    def forward(self, cut, attention_mask):
        return super().forward(cut).sum((1, 2))


@pytest.mark.parametrize(("labels", "why"), [([4], ""), ([[0, 2]], ""), ([[0, 3]], "labels from 0 to 3 for 3 classes")])
def test_labels_that_are_places_end_with_their_text(labels, why):
    """A text of three tokens where the longest has five; a single label is a class, of which there are five, too."""
    labels = torch.tensor(labels).int()
    server = small().server(Texts(2, 2))
    label_shape = tuple(labels.shape[1:])
    server.cuts = replace(server.cuts, shape=(5, 2), classes=5, masked=True, label_shape=label_shape)
    server.loss = lambda outputs, labels: outputs.mean()
    mask = torch.ones(1, 3, dtype=torch.uint8)
    answers, _ = server.step(0, [Cut(client=0, round=0, cut=torch.randn(1, 3, 2), labels=labels, mask=mask)])
    assert list(answers) == ([] if why else [0])
    assert server.refused == [f"round 0, client 0: {why}"] * bool(why)


def test_the_server_refuses_wrong_greetings():
    made = small().play(3)
    server = made.server()
    for wrong, message in [
        (Hello(client=10, round=0), "no client 10"),
        (Differs(client=0, round=0, digest=torch.zeros(7).int()), "7 words"),
        (Scalars(client=0, round=0, scalars=torch.ones(4)), "Scalars where Hello"),
    ]:
        assert server.welcome(wrong) is None
        assert message in server.refused[-1]
    assert server.differed == []
    refusals = server.refused.total
    for ahead in (Hello(client=0, round=4), Hello(client=0, round=2, epoch=1)):  # with rounds that nobody here knows
        news = server.welcome(ahead)
        assert (news.round, len(news.coefficients), news.epoch) == (0, 3, 0)
    assert server.refused.total == refusals
    assert server.receive(b"no message") is None
    assert server.receive(bytes(server.largest_message + 1)) is None
    assert "the largest message" in server.refused[-1]


def test_the_server_of_a_frozen_half_has_nothing_to_tell():
    server = crowd("frozen").server
    assert server.welcome(Hello(client=0, round=0)) is None
    assert server.refused == []


class Absurd(nn.Module):
    """A half whose loss is finite where its gradient is not, with statistics that every batch moves."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(2), nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(self.norm(x)) + (x - 6).square().sqrt()


def test_a_refused_cut_leaves_no_trace_in_the_half():
    torch.manual_seed(0)
    half, labels = Absurd(), torch.zeros(6).int()
    server, twin = (small().server(copy.deepcopy(half)) for _ in range(2))
    good = [Cut(client=m, round=0, cut=torch.randn(6, 2), labels=labels) for m in range(2)]
    wrong = [
        Cut(client=5, round=0, cut=torch.full((6, 2), 6.0), labels=labels),  # the root of zero has no gradient
        Cut(client=6, round=0, cut=torch.full((6, 2), 3e38), labels=labels),
        Cut(client=7, round=0, cut=torch.randn(1, 2), labels=labels[:1]),  # BatchNorm takes no single sample
    ]
    multipliers, loss = server.step(0, [wrong[0], good[0], *wrong[1:], good[1]])
    assert (list(multipliers), server.refused.total) == ([0, 1], 3)
    expected, twin_loss = twin.step(0, good)
    assert loss == twin_loss
    assert all(torch.equal(multipliers[m].multiplier, expected[m].multiplier) for m in range(2))
    for a, b in zip(server.half.state_dict().values(), twin.half.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_first_order_clients_refuse_stale_and_empty_weights():
    torch.manual_seed(0)
    client = FirstOrderClient(0, nn.Linear(3, 2), batch)
    full = Weights(client=0, round=5, epoch=1, weights=torch.ones(8))
    client.catch_up(full)
    assert all((p == 1).all() for p in client.half.parameters())
    before = client.digest()
    client.catch_up(replace(full, weights=torch.empty(0)))  # empty: yours are current
    for wrong, message in [
        (replace(full, round=6, weights=torch.empty(0)), "0 weights of"),
        (replace(full, round=4, weights=torch.zeros(8)), "this client is at"),
        (replace(full, round=9, epoch=0, weights=torch.zeros(8)), "this client is at"),
        (replace(full, client=1, weights=torch.zeros(8)), "for client 1"),
        (replace(full, weights=torch.zeros(7)), "7 weights"),
        (replace(full, weights=torch.full((8,), torch.inf)), "infinite"),
        (records(torch.zeros(1, 4)), "expects weights"),
    ]:
        with pytest.raises(MessageError, match=message):
            client.catch_up(wrong)
        assert (client.digest(), client.applied, client.epoch) == (before, 5, 1)
    client.catch_up(replace(full, round=2, epoch=2, weights=torch.zeros(8)))  # a server that was restarted
    assert (client.applied, client.epoch) == (2, 2)


def test_a_first_order_ledger_sends_weights_once_and_again_after_a_restart():
    weights = torch.zeros(8, requires_grad=True)
    ledger = GradientAverage(weights, torch.optim.SGD([weights], lr=1.0, momentum=0.9), lambda round: 1.0)
    saved = copy.deepcopy(ledger.state())
    ledger.commit(0, [Gradient(client=0, round=0, gradient=torch.ones(8))], [1.0])
    assert ledger.since(Hello(client=0, round=0)).weights.tolist() == [-1.0] * 8
    assert ledger.since(Hello(client=0, round=1)).weights.numel() == 0
    ledger.commit(1, [], [])  # nobody answered: no step
    assert ledger.since(Hello(client=0, round=1)).weights.tolist() == [-1.0] * 8
    ledger.load(*saved)
    ledger.epoch = 1
    assert ledger.rounds == 0
    assert ledger.since(Hello(client=0, round=2)).weights.tolist() == [0.0] * 8
    for wrong in (torch.ones(7), torch.full((8,), torch.nan)):
        with pytest.raises(MessageError):
            ledger.check(Gradient(client=0, round=0, gradient=wrong))


def test_random_participation_and_replay_over_200_rounds():
    federation, _ = assemble(Config(rounds=200, batch=4, directions=2))
    visits = np.zeros(10, int)
    for round in range(200):
        federation.round(round)
        visits[federation.server.sample(round, 10, 3)] += 1
    assert (visits > 30).all()
    assert federation.visits == visits.sum() == 600
    assert len({c.applied for c in federation.clients.values()}) > 1  # some are late
    base = federation.make_client(0).digest()
    outcome = federation.compare_replicas()
    assert outcome.equal
    assert outcome.clients == 11
    assert outcome.digest != base
    assert federation.server.refused == federation.messenger.complaints == []


class Troubled(Wire):
    """Carries what `spoil` makes of a message."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def carry(self, client, messages):
        return super().carry(client, [self.spoil(message) for message in messages])


@pytest.mark.parametrize("kind", [Multiplier, Records])
def test_a_client_that_refuses_costs_nobody_else_the_round(kind):
    def spoil(message):
        if not isinstance(message, kind) or message.client != 1:
            return message
        name = next(iter(message.arrays()))
        return replace(message, **{name: getattr(message, name) * np.float32(np.nan)})

    federation, _ = assemble(Config(rounds=2, batch=4, directions=2, clients=3, sampled=3))
    federation.round(0)
    federation.messenger.wire = Troubled(spoil)
    federation.round(1)
    assert len(federation.messenger.complaints) == 1
    assert "client 1" in federation.messenger.complaints[0]
    assert federation.server.ledger.records[1].participants == (0, 2)
    assert federation.server.refused == []


def test_a_client_in_rounds_that_are_none_begins_anew():
    client = small().play(3).client()
    client.replica.applied = client.applied = -2
    endpoint = Endpoint(client, run=b"a run...")
    invitation = Invitation(client=0, round=3, run=np.frombuffer(endpoint.run, np.uint8))
    said = [decode(endpoint.answer(pack([encode(invitation)]))) for _ in range(2)]
    assert [(type(each), each.round) for each in said] == [(Complaint, 0), (Hello, 0)]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("base", ["there", "out of reach"])
@pytest.mark.parametrize("kind", ["blocks", "blocks adamw"])
def test_an_error_between_two_blocks_leaves_no_half_moved_replica(kind, base, error, monkeypatch):
    made = small(kind, digest_every=0).play(5)
    client, calls = made.client(), []
    client.catch_up(made.since(client))
    made.play(9)

    def failing(op):
        def fails(*values, **options):
            calls.append(op)
            if len(calls) == 2:
                raise error("no memory")
            op(*values, **options)

        return fails

    def unreadable():
        raise OSError("no such disk")

    with monkeypatch.context() as patch:
        for name in ("replay_", "update_"):
            patch.setattr(replica, name, failing(getattr(replica, name)))
        if base == "out of reach":
            patch.setattr(client.replica, "base", unreadable)
        with pytest.raises(OSError if base == "out of reach" else error):
            client.catch_up(made.since(client))
    assert len(calls) == 2
    assert (client.applied, client.replica.applied) == (0, 0)
    client.catch_up(made.since(client))
    assert (client.applied, client.replica.digest()) == (9, made.ledger.mirror.digest())


@pytest.mark.parametrize("known", [True, False])
def test_a_client_whose_damaged_weight_is_off_the_lattice_rebuilds(known):
    """Its moves fit the server's replica, and not its own. known: whether the server knows where it is."""
    federation, _ = assemble(Config(rounds=5, batch=4, directions=2, clients=3, sampled=3))
    federation.round(0)
    federation.round(1)
    damaged = federation.clients[1].replica
    with torch.no_grad():
        damaged.tensors[0].view(-1)[0] = 1e30
    damaged.load(damaged.state()._replace(applied=1))  # as after a restart
    if not known:
        federation.messenger.positions.clear()
    federation.round(2)
    assert federation.messenger.complaints == federation.server.refused == []
    assert federation.server.differed.total == 1
    assert federation.server.ledger.records[2].participants == (0, 1, 2)
    assert federation.compare_replicas().equal


def test_every_client_owns_its_weights():
    federation, _ = assemble(Config(rounds=1, directions=1))
    clients = [federation.load_client(number) for number in range(10)]
    assert federation.load_client(3) is clients[3]
    pointers = [p.data_ptr() for c in clients for p in c.half.parameters()]
    assert len(set(pointers)) == len(pointers) == 10 * 4
    assert not {p.data_ptr() for p in federation.base.parameters()} & set(pointers)


def test_a_client_s_digest_is_of_what_its_half_s_file_holds():
    half = nn.BatchNorm1d(2)
    half.register_buffer("cache", torch.zeros(1), persistent=False)
    client, before = Client(0, half, batch), digest([*half.state_dict().values()]).hex()
    half.cache += 1
    assert client.digest() == before
    half.running_var += 1
    assert client.digest() != before


def test_split_is_the_whole_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    for at in (1, 2):
        halves = split(model, at)
        assert isinstance(halves, SplitModel)
        assert torch.equal(halves(x), model(x))
    for at in (0, 3):
        with pytest.raises(ValueError, match=r"cut points are 1 \(1\), 2 \(2\)"):
            split(model, at)
    with pytest.raises(TypeError, match="cannot cut a Linear: there is no place"):
        split(nn.Linear(2, 2), 1)


def test_digits_and_their_split():
    splits = digits()
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [1078, 359, 360]
    rows = torch.cat([s.inputs.flatten(1) for s in (splits.train, splits.validation, splits.test)])
    assert rows.unique(dim=0).shape[0] > 1790  # the parts do not overlap
    parts = dirichlet_split(splits.train.labels, 10, 0.5, seed=1)
    assert sorted(torch.cat(parts).tolist()) == list(range(1078))
    uneven = [splits.train.labels[p].bincount(minlength=10).max() / len(p) for p in parts]
    even = [
        splits.train.labels[p].bincount(minlength=10).max() / len(p)
        for p in dirichlet_split(splits.train.labels, 10, 1000.0, seed=1)
    ]
    assert np.mean(uneven) > 2 * np.mean(even)
    with pytest.raises(ValueError, match="fewer clients"):
        dirichlet_split(splits.train.labels, 500, 0.5, seed=1)


# --- the server learns while cuts are on their way ------------------------------------------------------------------


class Shuffled:
    """An engine whose replies come in an order of its own; some clients are gone. learnt: by whom the server had learnt
    when a reply left, of every first ask of a round."""

    def __init__(self, federation, order, gone=()):
        self.engine, self.server, self.order, self.gone = federation.messenger.engine, federation.server, order, gone
        self.learnt = []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def ask(self, messages, deadline=None):
        replies = {reply.client: reply for reply in self.engine.ask(messages)}
        for client in sorted(replies, key=self.order.index):
            self.learnt.append((client, [*self.server._samples]))
            yield Reply(client, None, "gone") if client in self.gone else replies[client]


def crowd(method, **told):
    told |= {"clients": 4, "sampled": 4, "rounds": 3, "batch": 8, "evaluate_every": 3}
    told |= {} if method == "frozen" else {"client_rate": 0.05}
    return assemble(Config(method=method, server_rate=0.05, **told))[0]


@pytest.mark.parametrize("method", ["ho", "splitfed", "hosl", "mu-splitfed"])
def test_the_order_in_which_cuts_come_changes_no_bit(method):
    """Cuts are learnt from in the order of their clients, and of those who are gone nobody waits for one."""
    told = {"rule": "adamw"} if method == "ho" else {}
    plain, other = crowd(method, **told), crowd(method, **told)
    if method == "ho":  # with another engine a gone client's half is behind for a round
        plain.messenger.engine = Shuffled(plain, [0, 1, 2, 3], gone=[1])
        other.messenger.engine = Shuffled(other, [3, 0, 2, 1], gone=[1])
    else:
        other.messenger.engine = Shuffled(other, [3, 0, 2, 1])
    assert [plain.round(r) for r in range(3)] == [other.round(r) for r in range(3)]
    for a, b in zip(plain.model().parameters(), other.model().parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_server_learns_while_other_cuts_are_on_their_way():
    federation = crowd("frozen")
    federation.messenger.engine = Shuffled(federation, [1, 0, 3, 2])
    federation.round(0)
    assert federation.messenger.engine.learnt == [(1, []), (0, []), (3, [0, 1]), (2, [0, 1])]
    assert [*federation.server._samples] == [0, 1, 2, 3]
    assert federation.seconds["server"] > 0


def test_nobody_waits_for_a_client_that_is_gone():
    federation = crowd("frozen")
    federation.messenger.engine = Shuffled(federation, [0, 1, 2, 3], gone=[0])
    federation.round(0)
    assert federation.messenger.engine.learnt == [(0, []), (1, []), (2, [1]), (3, [1, 2])]
    assert federation.took_part == [1, 2, 3]


def test_a_multiplier_that_is_lost_costs_its_client_alone():
    class Lossy(Wire):
        def carry(self, client, messages):
            lost = client == 0 and isinstance(messages[-1], Multiplier)
            return None if lost else super().carry(client, messages)

    federation = crowd("splitfed", local_steps=2)
    federation.messenger.wire = Lossy()
    assert np.isfinite(federation.round(0))
    assert (federation.visits, federation.took_part) == (4, [1, 2, 3])


def test_a_round_of_nobody_s_is_committed_where_it_is_not_tried_again():
    federation = crowd("ho")
    federation.messenger.engine = Shuffled(federation, [0, 1, 2, 3], gone=[0, 1, 2, 3])
    assert np.isnan(federation.round(0))
    assert [record.participants for record in federation.server.ledger.records] == [()]


def test_of_a_client_that_is_gone_nobody_knows_where_it_is():
    federation = crowd("ho")
    federation.round(0)
    federation.round(1)
    assert federation.messenger.positions == dict.fromkeys(range(4), (1, 0))
    assert federation.messenger.missing == 0
    federation.messenger.engine = Shuffled(federation, [0, 1, 2, 3], gone=[1])
    federation.round(2)
    assert federation.messenger.positions == dict.fromkeys((0, 2, 3), (2, 0))
    assert (federation.messenger.missing, federation.messenger.failures) == (1, {1: "gone"})
    assert federation.catch_up(federation.make_client(0))  # a newcomer under a number that another client has
    assert federation.messenger.positions == dict.fromkeys((0, 2, 3), (2, 0))


def test_known_clients_are_sent_what_they_miss_at_once_and_no_more():
    """After a restart as well: the records of one round, in the ask for a cut, and no digest that nobody asked for."""
    federation = crowd("ho")
    federation.server.ledger.epochs = [(1, 0)]
    federation.messenger.engine = Shuffled(federation, [0, 1, 2, 3])
    asks, sent = [0], [0]
    for round in range(4):
        federation.round(round)
        asks.append(len(federation.messenger.engine.learnt))
        sent.append(federation.messenger.wire.bytes.get("scalars down", 0))
    assert np.diff(asks).tolist() == [12, 8, 8, 8]  # only at first they have to say where they are
    assert np.diff(sent).tolist() == [0, *[4 * 4 * federation.config.directions] * 3]
    assert "digest down" not in federation.messenger.wire.bytes


def test_all_asks_of_an_exchange_share_its_deadline(monkeypatch):
    """The clients of round 0 say first that they have nothing yet, in a quarter of the time: who is asked again has the
    rest of it."""
    federation, clock, given = crowd("ho"), [0.0], []

    class Slow(Shuffled):
        lasts = 4

        def ask(self, messages, deadline=None):
            given.append(deadline)
            clock[0] += self.lasts
            yield from super().ask(messages)

    federation.messenger.engine, federation.messenger.deadline = Slow(federation, [0, 1, 2, 3]), 10.0
    here = vars(time) | {"monotonic": lambda: clock[0]}  # not for every thread of this process
    monkeypatch.setattr("hosfl.runs.messenger.time", SimpleNamespace(**here))
    federation.round(0)
    assert given == [2.5, 6, 10]  # for greetings, cuts and answers
    federation.messenger.positions.clear()
    federation.messenger.engine.lasts = 11
    federation.round(1)
    assert given[3:] == [2.5, 0, 10]  # none is left, and no less
    federation.messenger.deadline = None
    federation.round(2)
    assert given[6:] == [None, None]


def test_with_enough_cuts_nobody_waits_for_those_before_them():
    federation = crowd("ho")
    federation.enough = 2
    federation.messenger.engine = Shuffled(federation, [3, 1, 0, 2])
    federation.round(0)
    assert federation.took_part == [1, 3]
    greetings = [(client, []) for client in (3, 1, 0, 2)]
    cuts = [(3, []), (1, [])]  # of those that are enough the order is theirs
    assert federation.messenger.engine.learnt == [*greetings, *cuts, (3, [1, 3]), (1, [1, 3])]


def test_the_loss_of_a_round_is_the_mean_of_its_exchanges(monkeypatch):
    federation, losses = crowd("splitfed", local_steps=3), []
    end = federation.server.end

    def noted():
        multipliers, loss = end()
        losses.append(loss)
        return multipliers, loss

    monkeypatch.setattr(federation.server, "end", noted)
    assert federation.round(0) == pytest.approx(np.mean(losses))
    assert len(set(losses)) == 3


def test_dropout_goes_on_from_cut_to_cut_and_is_the_round_s():
    federation = crowd("ho")
    server, cut = federation.server, federation.load_client(0).output(0)
    server.half = nn.Sequential(nn.Dropout(0.5), server.half)
    server.rate = lambda round: 0.0
    cuts = [replace(cut, client=n) for n in range(3)]
    before = torch.get_rng_state()
    first, _ = server.step(0, cuts)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first[0].multiplier, first[1].multiplier)  # the same cut, and another mask
    torch.rand(5)  # what others draw does not matter
    again, _ = server.step(0, [cuts[0], replace(cuts[1], labels=cuts[1].labels + 99), cuts[1], cuts[2]])
    assert all(torch.equal(first[n].multiplier, again[n].multiplier) for n in range(3))
    assert len(server.refused) == 1


@pytest.mark.parametrize(("reason", "equal"), [("gone", True), ("late", True), ("failed: KeyError", False)])
def test_a_client_that_leaves_during_the_audit_is_no_other_bits(reason, equal):
    federation = crowd("ho")
    federation.round(0)

    class Leaves(Shuffled):
        def ask(self, messages, *limits):
            for reply in super().ask(messages):
                yield Reply(2, None, reason) if reply.client == 2 else reply

    federation.messenger.engine = Leaves(federation, [0, 1, 2, 3])
    found = federation.compare_replicas()
    assert (found.clients, found.equal) == (4 if equal else 5, equal)
