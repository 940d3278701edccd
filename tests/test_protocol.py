"""The round: its arithmetic against a few lines of numpy, replay, probing without trace, refusals."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hosfl.aggregate import commit, sgd_coefficients, weighted_mean
from hosfl.client import Run, ZerothOrderClient
from hosfl.config import Config
from hosfl.data import digits, dirichlet_split
from hosfl.lattice import Lattice, LatticeError
from hosfl.messages import Cut, Gradient, MessageError, Multiplier, Records, Scalars
from hosfl.probe import probe_in_place, probe_untouched, trainable
from hosfl.seeds import direction_seeds
from hosfl.server import SeedReplay, Server
from hosfl.split import SplitModel, split
from hosfl.trainer import assemble, replicas
from hosfl_kernels import spec


def small(lattice=True, dist="rademacher", rate=0.5, headroom=16.0):
    """A linear client half of 2 x 3 + 2 parameters, snapped, and its run."""
    torch.manual_seed(0)
    half = nn.Linear(3, 2)
    parameters, _ = trainable(half)
    grid = Lattice.snap(parameters, headroom) if lattice else None
    run = Run(seed=5, directions=4, dist=dist, mu=grid.nearest(1e-3) if grid else 1e-3, lattice=grid)
    return half, run, SeedReplay(run, lambda round: rate)


def batch(round):
    random = torch.Generator().manual_seed(round)
    return torch.randn(6, 3, generator=random), torch.randint(0, 2, (6,), generator=random)


def client_of(half, run, number=0):
    return ZerothOrderClient(number, copy.deepcopy(half), batch, run=run)


def server_of(ledger, classes=2):
    half = nn.Linear(2, classes)
    optimizer = torch.optim.SGD(half.parameters(), lr=0.1)
    return Server(half, nn.functional.cross_entropy, optimizer, lambda round: 0.1, ledger, 5, (2,), classes)


def noise_of(run, round, p):
    """Direction p of a round for Linear(3, 2), by spec.py: weight is stream 0, bias stream 1."""
    seed = direction_seeds(run.seed, round, run.directions)[p]
    return (
        spec.noise(6, seed, stream=0, dist=run.dist).astype(np.float64).reshape(2, 3),
        spec.noise(2, seed, stream=1, dist=run.dist).astype(np.float64),
    )


@pytest.mark.parametrize(("lattice", "dist"), [(True, "rademacher"), (False, "gaussian")])
def test_scalars_and_step_are_the_formula(lattice, dist):
    half, run, ledger = small(lattice, dist)
    client = client_of(half, run)
    x = batch(0)[0].double().numpy()
    cut = client.output(0)
    multiplier = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    answer = client.answer(Multiplier(client=0, round=0, multiplier=multiplier))
    # For a linear half <lam, f(theta + mu u) - f(theta)> / mu = <lam, x U^T + c> exactly.
    lam = multiplier.double().numpy()
    for p in range(4):
        u, c = noise_of(run, 0, p)
        assert answer.scalars[p] == pytest.approx((lam * (x @ u.T + c)).sum(), rel=2e-3, abs=2e-3)
    ledger.commit(0, [answer], [6])
    client.catch_up(ledger.since(client.hello()))
    for name, parameter in client.half.named_parameters():
        index = 0 if name == "weight" else 1
        ghat = sum(float(answer.scalars[p]) * noise_of(run, 0, p)[index] for p in range(4)) / 4
        moved = (parameter - getattr(half, name)).detach().double().numpy()
        assert np.allclose(moved, -0.5 * ghat, atol=1e-5)
    assert cut.cut.shape == (6, 2)


def test_the_estimate_is_the_gradient_on_average():
    # Mean over many directions of v_p u_p: the true gradient lam^T x, within the estimator's own spread.
    half, run, _ = small()
    inputs, lam = batch(0)[0], torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    parameters, streams = trainable(half)
    seeds = list(range(4000))
    with torch.no_grad():
        scalars = probe_in_place(lambda: half(inputs), parameters, streams, lam, half(inputs), seeds, run.mu)
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


@pytest.mark.parametrize("lattice", [True, False])
def test_probing_leaves_no_trace(lattice):
    half, run, _ = small(lattice, "rademacher" if lattice else "gaussian")
    client = client_of(half, run)
    before, version = client.digest(), [m.training for m in client.half.modules()]
    for round in range(50):
        client.output(round)
        client.answer(Multiplier(client=0, round=round, multiplier=torch.randn(6, 2)))
    assert client.digest() == before
    assert [m.training for m in client.half.modules()] == version


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_exception_in_the_model_leaves_no_trace(after):
    torch.manual_seed(0)
    half = Fails(after)
    parameters, _ = trainable(half)
    grid = Lattice.snap(parameters)
    run = Run(seed=5, directions=4, dist="rademacher", mu=grid.nearest(1e-3), lattice=grid)
    client = client_of(half, run)
    before = client.digest()
    client.output(0)
    with pytest.raises(RuntimeError, match="out of luck"):
        client.answer(Multiplier(client=0, round=0, multiplier=torch.randn(6, 2)))
    assert client.digest() == before


def test_probing_off_the_lattice_would_leave_traces_in_place():
    # Why probe_untouched exists: the plain in-place walk changes weights for good.
    torch.manual_seed(0)
    half = nn.Linear(300, 20)
    parameters, streams = trainable(half)
    before = copy.deepcopy(half.state_dict())
    x = torch.randn(2, 300)
    with torch.no_grad():
        probe_in_place(lambda: half(x), parameters, streams, torch.ones(2, 20), half(x), [1, 2, 3], 1e-3)
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
    Lattice.snap(parameters)
    x, lam = torch.randn(4, 3), torch.randn(4, 3)
    with torch.no_grad():
        cut = module(x)
        in_place = probe_in_place(lambda: module(x), parameters, streams, lam, cut, [1, 2], 2.0**-10)
        untouched = probe_untouched(module, x, lam, cut, [1, 2], 2.0**-10, "rademacher")
    assert torch.equal(in_place, untouched)


def test_multipliers_have_no_average_inside():
    _, run, ledger = small()
    server = server_of(ledger)
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


def test_aggregation():
    mean = weighted_mean([torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])], [2, 1])
    assert mean.tolist() == [2.0, 4.0]
    assert sgd_coefficients(mean, 0.1) == pytest.approx([-0.1, -0.2])
    lattice = Lattice(2.0**-20)
    committed = torch.stack([commit([0.3 * 2.0**-20, -1.0], lattice, 1, r) for r in range(2000)]) / lattice.quantum
    assert torch.equal(committed, committed.round())
    assert set(committed[:, 0].tolist()) == {0.0, 1.0}
    assert abs(committed[:, 0].mean() - 0.3) < 0.05  # right on average
    assert (committed[:, 1] == -(2**20)).all()
    assert commit([0.1, 0.2], None, 1, 0).tolist() == torch.tensor([0.1, 0.2]).tolist()


@pytest.mark.parametrize(("lattice", "dist"), [(True, "rademacher"), (False, "gaussian")])
def test_one_by_one_many_at_once_and_twice(lattice, dist):
    half, run, ledger = small(lattice, dist)
    regular, late, random = client_of(half, run), client_of(half, run, 1), torch.Generator().manual_seed(1)
    for round in range(60):
        ledger.commit(round, [Scalars(client=0, round=round, scalars=torch.randn(4, generator=random) * 0.01)], [6])
        news = ledger.since(regular.hello())
        regular.catch_up(news)
        regular.catch_up(news)  # the same message twice is harmless
    everything = ledger.since(late.hello())
    assert everything.coefficients.shape == (60, 4)
    late.catch_up(everything)
    assert late.applied == regular.applied == 60
    assert late.digest() == regular.digest() != client_of(half, run).digest()


def test_records_that_do_not_fit_change_nothing():
    half, run, _ = small()
    client = client_of(half, run)
    before = client.digest()
    for wrong, message in [
        (Records(client=0, round=1, coefficients=torch.zeros(1, 4)), "start at round 1"),
        (Records(client=0, round=0, coefficients=torch.zeros(1, 3)), "3 directions"),
        (Records(client=0, round=0, coefficients=torch.full((1, 4), float("nan"))), "NaN"),
        (Gradient(client=0, round=0, gradient=torch.zeros(8)), "expects records"),
    ]:
        with pytest.raises(MessageError, match=message):
            client.catch_up(wrong)
    assert client.digest() == before
    assert client.applied == 0


def test_leaving_the_lattice_is_an_error_for_every_client_at_the_same_round():
    half, run, _ = small(headroom=2.0)
    rows = torch.full((12, 4), run.lattice.nearest(run.lattice.limit / 12))  # up to a third of the limit per round
    regular, late = client_of(half, run), client_of(half, run, 1)
    with pytest.raises(LatticeError, match="beyond"):
        for round in range(12):
            regular.catch_up(Records(client=0, round=round, coefficients=rows[round : round + 1]))
    with pytest.raises(LatticeError, match=f"round {regular.applied} "):
        late.catch_up(Records(client=1, round=0, coefficients=rows))
    assert 0 < regular.applied == late.applied < 12
    assert regular.digest() == late.digest()


def test_a_multiplier_must_be_for_the_last_cut():
    half, run, _ = small()
    client = client_of(half, run)
    client.output(3)
    for wrong in [
        Multiplier(client=0, round=2, multiplier=torch.zeros(6, 2)),
        Multiplier(client=1, round=3, multiplier=torch.zeros(6, 2)),
        Multiplier(client=0, round=3, multiplier=torch.zeros(6, 3)),
    ]:
        with pytest.raises(MessageError):
            client.answer(wrong)


def test_the_server_refuses_and_goes_on():
    _, run, ledger = small()
    server = server_of(ledger)
    good = Cut(client=0, round=0, cut=torch.randn(6, 2), labels=torch.zeros(6).int())
    nan = torch.full((6, 2), float("nan"))
    wrong = [
        Cut(client=0, round=0, cut=torch.randn(6, 2), labels=torch.zeros(6).int()),  # a second one
        Cut(client=1, round=1, cut=torch.randn(6, 2), labels=torch.zeros(6).int()),
        Cut(client=2, round=0, cut=torch.randn(6, 3), labels=torch.zeros(6).int()),
        Cut(client=3, round=0, cut=torch.randn(6, 2), labels=torch.zeros(5).int()),
        Cut(client=4, round=0, cut=torch.randn(6, 2), labels=torch.full((6,), 2).int()),
        Cut(client=5, round=0, cut=torch.randn(6, 2), labels=torch.full((6,), -1).int()),
        Cut(client=6, round=0, cut=nan, labels=torch.zeros(6).int()),
    ]
    multipliers, _ = server.step(0, [good, *wrong])
    assert list(multipliers) == [0]
    assert len(server.refused) == 7
    alone, _ = (twin := server_of(SeedReplay(run, ledger.rate))).step(0, [])
    assert alone == {}
    assert twin.refused == []
    server.commit(
        0,
        [
            Scalars(client=0, round=0, scalars=torch.full((4,), float("inf"))),
            Scalars(client=0, round=0, scalars=torch.ones(3)),
            Scalars(client=1, round=0, scalars=torch.ones(4)),
            Gradient(client=0, round=0, gradient=torch.ones(8)),
        ],
    )
    assert len(server.refused) == 11
    assert ledger.records[0].tolist() == [0.0] * 4  # nobody answered: an empty record, no step
    server.step(1, [Cut(client=0, round=1, cut=good.cut, labels=good.labels)])
    server.commit(1, [Scalars(client=0, round=1, scalars=torch.ones(4))] * 2)
    assert len(server.refused) == 12
    assert ledger.records[1].tolist() == pytest.approx([-0.5 / 4] * 4, abs=run.lattice.quantum)


def test_random_participation_and_replay_over_400_rounds():
    federation, _ = assemble(Config(rounds=400, batch=4, directions=2))
    visits = np.zeros(10, int)
    for round in range(400):
        federation.round(round)
        visits[federation.server.sample(round, 10, 3)] += 1
    assert (visits > 60).all()
    assert len({c.applied for c in federation.clients}) > 1  # some are late
    base = federation.newcomer().digest()
    outcome = replicas(federation)
    assert outcome.equal
    assert outcome.clients == 11
    assert outcome.digest != base
    assert federation.server.refused == []


def test_every_client_owns_its_weights():
    federation, _ = assemble(Config(rounds=1, directions=1))
    pointers = [p.data_ptr() for c in federation.clients for p in c.half.parameters()]
    assert len(set(pointers)) == len(pointers) == 10 * 4


def test_split_is_the_whole_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    for at in (1, 2):
        halves = split(model, at)
        assert isinstance(halves, SplitModel)
        assert torch.equal(halves(x), model(x))
    for at in (0, 3):
        with pytest.raises(ValueError, match="between 1 and 2"):
            split(model, at)
    with pytest.raises(TypeError, match="Sequential"):
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
