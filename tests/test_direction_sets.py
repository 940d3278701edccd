"""Sets of directions: which client measures which, and what the server makes of numbers about different directions."""

import copy
from dataclasses import replace

import pytest
import torch
from small import BLOCKS, FACTORS, small
from torch import nn

from hosfl import Config, train
from hosfl.halves.blocks import Begin
from hosfl.methods.ho import ZerothOrderClient, make_run
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.steps import FreshStep
from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import uniform_mean, weighted_mean
from hosfl.protocol.log import Log
from hosfl.protocol.messages import MessageError, Multiplier, Scalars
from hosfl.protocol.rebuild import rebuild as without_torch
from hosfl.protocol.replica import Replica
from hosfl.protocol.terms import Block, Pool, Run
from hosfl.runs.checkpoint import rebuild
from hosfl_kernels import SGD, replay_

CLIENTS, SETS = 4, 3  # client 3 measures what client 0 does
INPUTS = torch.randn(CLIENTS, 6, 3, generator=torch.Generator().manual_seed(1))
MULTIPLIERS = torch.randn(CLIENTS, 6, 2, generator=torch.Generator().manual_seed(2))
WEIGHTS = [1.0, 2.0, 0.5, 4.0]
KINDS = {"together": (), "blocks": (Block((1,), SETS), Block((0,), 3 * SETS))}


@pytest.fixture(params=KINDS)
def run(request):
    """Four directions per client; in blocks, one of the bias and three of the weight."""
    return Run(5, 4 * SETS, "rademacher", 1e-3, FACTORS, rule=SGD(), blocks=KINDS[request.param], sets=SETS)


def half():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def noise(run, round):
    """[S P, 8]: the round's directions end to end over weight and bias, with their factors; zeros elsewhere."""
    rows = []
    tensors, streams = trainable(half())
    for block, positions in run.parts():
        for seed in run.seeds(round)[positions]:
            row = [torch.zeros(t.shape) for t in tensors]
            for t in block.tensors:
                replay_([row[t]], [seed], [1.0], streams=[streams[t]], factors=[run.factors[t]])
            rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows).double()


def gradients():
    """float64 [CLIENTS, 8], exact."""
    found = []
    for x, m in zip(INPUTS, MULTIPLIERS, strict=True):
        model = half()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(model(x), list(model.parameters()), m)]))
    return torch.stack(found).double()


def ledger(run, aggregation=weighted_mean, **settings):
    tensors, streams = trainable(half())
    mirror = Replica(tensors, streams, run, lambda: list(half().parameters()))
    return SeedReplay(
        run, FreshStep(run, lambda round: 0.05), mirror, aggregation=aggregation, digest_every=0, **settings
    )


def test_every_direction_is_one_set_s(run):
    own = [run.positions(client) for client in range(SETS)]
    assert sorted(p for positions in own for p in positions) == list(range(run.directions))
    assert [len(positions) for positions in own] == [run.directions // SETS] * SETS
    assert run.positions(SETS + 1) == own[1]
    for client in range(SETS):  # and of each block as many
        counts = [part.stop - part.start for _, part in run.parts_of(client)]
        assert counts == [block.directions // SETS for block, _ in run.parts()]


@pytest.mark.parametrize(
    ("estimator", "close"), [("one-sided", 1e-2), ("two-sided", 1e-2), ("forward", 1e-5), ("backward", 1e-5)]
)
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_client_measures_its_own_set(run, estimator, close, at_once, below):
    run = replace(run, estimator=estimator)
    u, exact = noise(run, 0), gradients()
    begins = [Begin("", block.tensors, 1.0) for block, _ in run.parts()]
    for number in range(CLIENTS):
        batch = INPUTS[number], torch.zeros(6, dtype=torch.int64)
        client = ZerothOrderClient(number, half(), lambda _, b=batch: b, run=run, begins=begins, probes_at_once=at_once)
        client.output(0)
        found = client.answer(Multiplier(client=number, round=0, multiplier=MULTIPLIERS[number])).scalars
        expected = u[run.positions(number)] @ exact[number]
        below(float((found - expected).abs().max() / expected.abs().max()), close)


@pytest.mark.parametrize(("aggregation", "weights"), [(weighted_mean, WEIGHTS), (uniform_mean, [1.0] * CLIENTS)])
def test_a_record_is_the_mean_of_the_clients_own_estimates(run, aggregation, weights):
    made, u, g = ledger(run, aggregation), noise(run, 0), gradients()
    answers = [Scalars(client=m, round=0, scalars=(u[run.positions(m)] @ g[m]).float()) for m in range(CLIENTS)]
    made.commit(0, answers, WEIGHTS)
    estimate = torch.zeros(8, dtype=torch.float64)
    for m, weight in enumerate(weights):
        for block, own in run.parts_of(m):
            of_block = u[own].T @ (u[own] @ g[m]) / (block.directions // SETS)
            estimate += weight / sum(weights) * of_block
    record = torch.tensor(made.records[0].coefficients).double()
    torch.testing.assert_close(record @ u, estimate, rtol=1e-5, atol=1e-5)


def test_who_is_missing_leaves_a_set_at_rest(run):
    made = ledger(run)
    made.commit(0, [Scalars(client=1, round=0, scalars=torch.ones(4))], [2.0])
    moved = made.records[0].coefficients.nonzero()[0].tolist()
    assert sorted(moved) == sorted(run.positions(1))


def squared_errors(sets, g, rounds=400):
    """Mean squared error of the estimate of the clients' mean gradient, of 4 directions per client."""
    run = Run(5, 4 * sets, "rademacher", 1e-3, FACTORS, rule=SGD(), sets=sets)
    made, total, mean = ledger(run), 0.0, torch.zeros(8, dtype=torch.float64)
    factors = torch.tensor([FACTORS[0]] * 6 + [FACTORS[1]] * 2).double()
    goal = g.mean(0) * factors.square()
    for round in range(rounds):
        u = noise(run, round)
        made.commit(
            round,
            [Scalars(client=m, round=round, scalars=(u[run.positions(m)] @ g[m]).float()) for m in range(len(g))],
            [1.0] * len(g),
        )
        estimate = torch.tensor(made.records[round].coefficients).double() @ u
        total += float((estimate - goal).square().sum()) / rounds
        mean += estimate / rounds
    return total, float((mean - goal).norm() / goal.norm())


def test_the_estimate_is_unbiased_and_its_variance_falls_where_clients_agree():
    """To a K-th where all gradients are the same; not at all where they are orthogonal and as long."""
    same = gradients()[:1].expand(SETS, 8)
    together, own = squared_errors(1, same), squared_errors(SETS, same)
    assert together[0] / own[0] == pytest.approx(SETS, rel=0.3)
    assert max(together[1], own[1]) < 0.25
    apart = torch.zeros(SETS, 8, dtype=torch.float64)
    apart[range(SETS), range(SETS)] = 1.0  # of elements with one factor
    together, own = squared_errors(1, apart), squared_errors(SETS, apart)
    assert together[0] / own[0] == pytest.approx(1, rel=0.3)


def test_clipping_goes_by_what_one_client_says(run):
    made = ledger(run, clip=0.5)
    counts = [block.directions // SETS for block, _ in run.parts() for _ in range(block.directions // SETS)]
    assert len(made.weights) == 4
    sizes = {"blocks": [2.0, 1.5, 1.5, 1.5]}.get("blocks" if run.blocks else "", [3.5] * 4)
    assert made.weights.tolist() == pytest.approx([d / n**2 for d, n in zip(sizes, counts, strict=True)])
    long = Scalars(client=2, round=0, scalars=torch.full((4,), 100.0))
    other = copy.deepcopy(made)
    made.commit(0, [long], [1.0])
    other.commit(0, [replace(long, scalars=long.scalars * 7)], [1.0])
    assert made.records[0].coefficients.tolist() == pytest.approx(other.records[0].coefficients.tolist())
    assert made.records[0].coefficients.any()


def test_numbers_of_all_sets_from_one_client_are_refused(run):
    with pytest.raises(MessageError, match="12 scalars in a run of 4 directions per client"):
        ledger(run).check(Scalars(client=0, round=0, scalars=torch.ones(12)))


def test_terms_that_cannot_be():
    with pytest.raises(ValueError, match="3 sets of equal size do not share out"):
        Run(5, 4, "rademacher", 1e-3, FACTORS, rule=SGD(), sets=3)
    with pytest.raises(ValueError, match="2 sets of equal size do not share out"):
        Run(5, 4, "rademacher", 1e-3, FACTORS, rule=SGD(), blocks=BLOCKS, sets=2)  # 1 and 3 directions
    with pytest.raises(ValueError, match="sets go with fresh directions"):
        Run(5, 4, "rademacher", 1e-3, FACTORS, rule=SGD(), pool=Pool(8), sets=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction_sets": 2}, "direction_sets = 2 would do nothing with directions_from 'pool'"),
        ({"direction_sets": 11, "directions_from": "fresh"}, "direction_sets=11 of 10 clients: nobody would measure"),
        ({"direction_sets": 2, "directions_from": "fresh", "aggregation": "median"}, "aggregation median compares"),
        ({"direction_sets": 2, "directions_from": "fresh", "aggregation": "trimmed"}, "aggregation trimmed compares"),
        ({"direction_sets": 2, "method": "first-order"}, "direction_sets = 2 would do nothing with method"),
        ({"direction_sets": 0, "directions_from": "fresh"}, "direction_sets must be at least 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


@pytest.mark.parametrize("rule", ["normalized", "adamw"])
def test_a_run_in_sets_is_replayed_from_its_log(tmp_path, rule):
    settings = {"directions_from": "fresh", "directions": 2, "direction_sets": 4, "clients": 4, "digest_every": 3}
    summary = train(Config(rounds=6, batch=8, client_rate=0.05, server_rate=0.05, rule=rule, **settings), tmp_path)
    log = Log.read(tmp_path / "hosfl.log")
    assert log.header.directions == 8
    assert all(len(r.coefficients) == 8 and (r.coefficients != 0).sum() <= 2 * 3 for r in log.rounds)
    assert {len({m % 4 for m in r.participants}) for r in log.rounds} == {3}  # sampled
    assert summary.replicas.equal
    for again in (rebuild, without_torch):
        _, replica = again(tmp_path / "hosfl.log", tmp_path / "base.safetensors")
        assert replica.digest() == log.digests[6]


def test_one_set_is_what_there_was_before():
    config = Config(directions_from="fresh")
    parameters = list(half().parameters())
    assert make_run(config, parameters) == replace(make_run(config, parameters), sets=1)
    assert "direction_sets" not in config.decisive()
    assert small("sets").run.sets == 2


def test_terms_of_settings():
    config = Config(directions_from="fresh", rule="sgd", directions=5, direction_sets=3, blocks=2)
    begins = [Begin("", (1,), 1.0), Begin("", (0,), 1.0)]
    run = make_run(config, list(half().parameters()), begins)
    assert (run.directions, run.sets) == (15, 3)
    assert run.blocks == (Block((1,), 3 * 2), Block((0,), 3 * 3))  # of 2 and 6 weights
