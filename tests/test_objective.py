"""Both halves descend one loss of the clients, and a few clients that lie bend neither."""

import copy
from dataclasses import replace

import pytest
import torch
from test_baselines import directions, flat_gradient
from torch import nn

from hosfl import Config
from hosfl.methods.cuts import CutSpec
from hosfl.methods.first_order import GradientAverage
from hosfl.methods.gathered import KeptVectors, RunningMean, make_accumulator
from hosfl.methods.server import Server
from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import AGGREGATIONS
from hosfl.protocol.messages import Cut, Gradient
from hosfl.protocol.seeds import Purpose, direction_seeds
from hosfl.runs.assemble import assemble
from hosfl.runs.config import with_shared

UNEQUAL = {"batch": 300, "clients": 4, "sampled": 4, "directions": 6, "schedule": "constant", "rule": "sgd"}
UNEQUAL |= {"server_rate": 0.01, "client_rate": 1.0, "local_steps": 1}


def unequal(method, aggregation="weighted", **settings):
    """Clients whose batches are of unequal size."""
    shared = UNEQUAL | {"aggregation": aggregation} | settings
    return Config(**with_shared({"method": method}, shared))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def one_loss(config):
    """In float64: the loss of both halves over the clients of round 0 and its gradients; the numbers of samples."""
    federation, task = assemble(config)
    halves = [copy.deepcopy(half).double().eval() for half in (federation.base, federation.server.half)]
    batches = [federation.make_client(m).batch(0) for m in range(config.clients)]
    samples = torch.tensor([float(len(y)) for _, y in batches])
    weights = samples if config.aggregation == "weighted" else torch.ones_like(samples)
    losses = torch.stack([task.loss(halves[1](halves[0](x.double())), y) for x, y in batches])
    loss = (weights * losses).sum() / weights.sum()
    parameters = [trainable(half)[0] for half in halves]
    gradients = torch.autograd.grad(loss, [*parameters[0], *parameters[1]])
    flat = torch.cat([g.reshape(-1) for g in gradients])
    return float(loss.detach()), *flat.split([sum(p.numel() for p in half) for half in parameters]), samples


def one_round(config):
    """A round of the federation; its loss, the gradients that the server's optimizer saw, the scalars of the ledger."""
    federation, _ = assemble(config)
    server, seen, scalars = federation.server, [], []
    server.optimizer.step = lambda: seen.append(flat_gradient(server.half).double())
    if config.method in ("ho", "zo-both", "mu-splitfed"):
        step = server.ledger.step
        server.ledger.step = lambda r, v, lattice: (scalars.append(v), step(r, v, lattice))[1]
    loss = federation.round(0)
    assert federation.server.refused == federation.messenger.complaints == []
    return federation, loss, seen, scalars


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
@pytest.mark.parametrize("method", ["first-order", "checkpointed", "splitfed"])
def test_both_halves_step_along_the_gradient_of_one_loss(method, aggregation):
    config = unequal(method, aggregation)
    expected, client, server, samples = one_loss(config)
    assert len(set(samples.tolist())) > 1
    federation, loss, seen, _ = one_round(config)
    before = torch.cat([p.detach().reshape(-1) for p in trainable(federation.base)[0]]).double()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert relative(seen[0], server) < 1e-5
    assert relative(before - federation.server.ledger.weights.detach().double(), client) < 1e-5


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
@pytest.mark.parametrize("estimator", ["forward", "backward"])
def test_ho_measures_the_slopes_of_the_loss_that_its_server_descends(estimator, aggregation):
    config = unequal("ho", aggregation, estimator=estimator)
    expected, client, server, _ = one_loss(config)
    federation, loss, seen, (scalars,) = one_round(config)
    u = torch.stack(directions(*trainable(federation.base), federation.server.ledger.run.seeds(0))).double()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert relative(seen[0], server) < 1e-5
    assert relative(scalars, u @ client) < 1e-5


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
@pytest.mark.parametrize("method", ["frozen", "hosl"])
def test_the_server_of_clients_that_send_no_gradient_descends_it_too(method, aggregation):
    config = unequal(method, aggregation)
    expected, _, server, _ = one_loss(config)
    _, loss, seen, _ = one_round(config)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert relative(seen[0], server) < 1e-5


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
@pytest.mark.parametrize("method", ["zo-both", "mu-splitfed"])
def test_slopes_of_both_halves_are_those_of_one_loss(method, aggregation):
    """By differences, and of the server's further steps as well, whose weights stand still here."""
    config = unequal(method, aggregation, estimator="two-sided", local_steps=5)
    expected, client, server, _ = one_loss(config)
    federation, loss, seen, (scalars,) = one_round(config)
    u = torch.stack(directions(*trainable(federation.base), federation.server.ledger.run.seeds(0))).double()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert relative(scalars, u @ client) < 0.03  # the activations have kinks
    assert len(seen) == (1 if method == "zo-both" else config.local_steps)
    for number, found in enumerate(seen):
        seeds = direction_seeds(config.seed, number, config.directions, Purpose.SERVER)
        v = torch.stack(directions(*trainable(federation.server.half), seeds)).double()
        assert relative(found, (v @ server) @ v / config.directions) < 0.03


# --- liars ----------------------------------------------------------------------------------------------------------


def made(aggregation="weighted", clip=None, half=None, ledger=None):
    torch.manual_seed(0)
    half = half or nn.Linear(3, 2)
    optimizer = torch.optim.SGD(half.parameters(), lr=0.0)
    settings = {"aggregation": AGGREGATIONS[aggregation], "clip": clip}
    loss = nn.functional.cross_entropy
    return Server(half, loss, optimizer, lambda round: 0.0, ledger, 5, 10, CutSpec((3,), 2, 8), **settings)


def honest(count=4, size=1.0):
    random = torch.Generator().manual_seed(1)
    return [
        Cut(
            client=m,
            round=0,
            cut=size * torch.randn(8, 3, generator=random),
            labels=torch.arange(8, dtype=torch.int32) % 2,
        )
        for m in range(count)
    ]


def lie(client=4, size=1e6):
    cut = honest(client + 1)[-1]
    return replace(cut, cut=size * cut.cut, labels=1 - cut.labels)


def gradient_of(cuts, **settings):
    server = made(**settings)
    server.step(0, cuts)
    assert server.refused == []
    return flat_gradient(server.half)


@pytest.mark.parametrize("place", range(5))  # of the liar among the honest
@pytest.mark.parametrize("aggregation", ["median", "trimmed"])
def test_a_liar_moves_the_server_half_no_further_than_the_honest_would(aggregation, place):
    cuts = honest()
    each = torch.stack([gradient_of([cut]) for cut in cuts])
    low, high = each.min(0).values - 1e-6, each.max(0).values + 1e-6
    cuts.insert(place, lie())
    found = gradient_of(cuts, aggregation=aggregation)
    assert ((low <= found) & (found <= high)).all()
    everyone = torch.stack([*each, gradient_of([lie()])])
    assert torch.allclose(found, AGGREGATIONS[aggregation]([*everyone], [1.0] * 5).float(), rtol=1e-4)
    mean = gradient_of(cuts)  # which is the liar's, but for its length
    assert not ((low <= mean) & (mean <= high)).all()
    assert float(mean.norm()) == pytest.approx(float(everyone.norm(dim=1).median()), rel=1e-5)


def test_a_client_is_clipped_to_a_length_and_the_others_are_not():
    cuts, largest = honest(), 1.0
    lengths = [float(gradient_of([cut]).norm()) for cut in cuts]
    assert max(lengths) < largest
    assert torch.equal(gradient_of(cuts, clip=largest), gradient_of(cuts))
    liar = gradient_of([lie()])
    expected = (4 * gradient_of(cuts) + liar / liar.norm() * largest) / 5
    assert torch.allclose(gradient_of([*cuts, lie()], clip=largest), expected, atol=1e-6)
    assert float(gradient_of([lie()], clip=largest).norm()) == pytest.approx(largest)


def with_statistics():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.mark.parametrize("aggregation", ["median", "trimmed"])
def test_running_statistics_are_aggregated_like_gradients(aggregation):
    cuts = honest()
    each = []
    for cut in cuts:
        server = made(half=with_statistics())
        server.step(0, [cut])
        each.append(torch.cat([server.half[0].running_mean, server.half[0].running_var]))
    server = made(aggregation, half=with_statistics())
    server.step(0, [lie(), *cuts])
    found = torch.cat([server.half[0].running_mean, server.half[0].running_var])
    low, high = torch.stack(each).min(0).values - 1e-6, torch.stack(each).max(0).values + 1e-6
    assert ((low <= found) & (found <= high)).all()
    assert server.half[0].num_batches_tracked == 1
    assert server.half[0].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_cut_that_would_make_running_statistics_infinite_changes_nothing(aggregation):
    alone, together = (made(aggregation, half=with_statistics()) for _ in range(2))
    alone.step(0, honest())
    answers, _ = together.step(0, [lie(size=1e30), *honest()])
    assert together.refused == ["round 0, client 4: a cut that makes the half's running statistics infinite or NaN"]
    assert [*answers] == [0, 1, 2, 3]
    for a, b in zip(alone.half.state_dict().values(), together.half.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(flat_gradient(alone.half), flat_gradient(together.half))


@pytest.mark.parametrize("aggregation", ["weighted", "median"])
def test_parts_of_the_server_half_that_get_no_gradient_stay_without(aggregation):
    class Idle(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.unused = nn.Parameter(torch.ones(3))

    server = made(aggregation, half=Idle())
    server.step(0, honest())
    assert server.half.unused.grad is None
    assert server.half.weight.grad is not None


def test_what_is_kept():
    """A mean keeps the sum alone; a median all, until the step."""
    for name, kind in [
        ("weighted", RunningMean),
        ("uniform", RunningMean),
        ("median", KeptVectors),
        ("trimmed", KeptVectors),
    ]:
        assert isinstance(make_accumulator(AGGREGATIONS[name]), kind)
    server = made("median")
    server.step(0, honest())
    assert server._gathered.rows == []


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gathered_aggregate_is_the_aggregation(aggregation):
    random = torch.Generator().manual_seed(0)
    rows = [torch.randn(7, generator=random) for _ in range(5)]
    weights = [1.0, 2.0, 3.0, 4.0, 5.0]
    collected = make_accumulator(AGGREGATIONS[aggregation])
    for row, weight in zip(rows, weights, strict=True):
        collected.add([row[:4].view(2, 2), None, row[4:] if weight > 1 else None], weight)
    a, nothing, b = collected.result()
    rows[0][4:] = 0.0
    assert nothing is None
    assert a.shape == (2, 2)
    assert torch.allclose(torch.cat([a.reshape(-1), b]), AGGREGATIONS[aggregation](rows, weights).float())


@pytest.mark.parametrize("settings", [{"aggregation": "median"}, {"server_clip": 3.0}])
def test_zeroth_order_servers_stand_a_liar(settings):
    """Whose slopes are hundreds of times theirs: P slopes are clipped and aggregated, of every step."""
    found = {}
    for liars in (0, 1):
        federation, _ = assemble(unequal("mu-splitfed", batch=16, local_steps=5, **settings))
        server, seen = federation.server, []
        server.half[2] = nn.Identity()  # in place of a normalisation, which no large cut impresses
        server.optimizer.step = lambda seen=seen, s=server: seen.append(flat_gradient(s.half))
        cuts = [federation.load_client(m).output(0) for m in range(4)]
        if liars:
            cuts[2] = replace(cuts[2], cut=1e3 * cuts[2].cut, displaced=1e3 * cuts[2].displaced)
        server.step(0, cuts)
        assert server.refused == []
        found[liars] = torch.stack(seen)
    assert len(found[1]) == 5
    assert 0 < (found[1] - found[0]).norm(dim=1).max() < 2 * found[0].norm(dim=1).max()


def test_clients_gradients_are_clipped():
    weights = torch.zeros(4, requires_grad=True)
    ledger = GradientAverage(weights, torch.optim.SGD([weights]), lambda round: 1.0, clip=2.0)
    sent = [torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 30.0, 40.0, 0])]
    answers = [Gradient(client=m, round=0, gradient=g) for m, g in enumerate(sent)]
    ledger.commit(0, answers, [1.0, 1.0])
    assert weights.tolist() == pytest.approx([-0.5, -0.6, -0.8, 0])
