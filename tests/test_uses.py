"""Other uses of a round's numbers: what they estimate, what they measure, and that a study takes them."""

import pytest
import torch

from benchmarks import uses
from benchmarks.uses import Measured
from hosfl import Config, train
from hosfl.halves.blocks import allot_directions
from hosfl.protocol.messages import Gradient

BLOCKS = [Measured(0, 8, 3, 1.0), Measured(8, 20, 4, 0.5)]
ROUNDS = 1500
METHODS = ("Averaged", "OwnDirections", "Projection", "SecondMoment", "MoreAtTheEnd", "MoreWhereLong", "MeanOfTheLast")


def ledger(kind, rate=0.0, rounds=ROUNDS):
    weights = torch.zeros(20, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=1.0)
    return kind(weights, optimizer=optimizer, rate=lambda round: rate, blocks=BLOCKS, seed=1, length_of_run=rounds)


def answers(round):
    random = torch.Generator().manual_seed(7)
    return [Gradient(client=m, round=round, gradient=torch.randn(20, generator=random)) for m in range(3)]


@pytest.mark.parametrize("kind", [uses.Averages, uses.Own, uses.Solved, uses.Growing, uses.ByLength, uses.LastMean])
def test_every_estimate_is_the_mean_gradient_on_average(kind):
    made = ledger(kind, rate=-1 / ROUNDS)
    weights = [1.0, 2.0, 5.0]
    for round in range(ROUNDS):
        made.commit(round, answers(round), weights)
    goal = sum(w * a.gradient for w, a in zip(weights, answers(0), strict=True)) / sum(weights)
    error = float((made.weights.detach() - goal).norm() / goal.norm())
    assert error < 4 * (20 / 7 / ROUNDS) ** 0.5


def test_own_directions_are_the_others_where_there_is_one_client():
    shared, own = ledger(uses.Averages, rate=1.0), ledger(uses.Own, rate=1.0)
    for made in (shared, own):
        made.commit(0, answers(0)[:1], [3.0])
    assert torch.equal(shared.weights, own.weights)
    for made in (shared, own):
        made.commit(1, answers(1), [1.0, 1.0, 1.0])
    assert not torch.allclose(shared.weights, own.weights)


def test_what_is_solved_for_has_the_numbers_that_were_measured():
    made = ledger(uses.Solved)
    made.random = torch.Generator().manual_seed(3)
    gradients, shares = torch.randn(3, 8, dtype=torch.float64), torch.tensor([0.5, 0.25, 0.25]).double()
    found = made.estimate(0, gradients, shares, 3)
    made.random = torch.Generator().manual_seed(3)
    u = made.directions(3, 8)
    torch.testing.assert_close(u @ found, u @ (shares @ gradients) * 8 / 3)


def test_scaled_directions_are_long_where_estimates_were_small():
    made = ledger(uses.Scaled)
    slope = torch.ones(1, 8).double()
    slope[0, :4] *= 10
    for round in range(30):
        made.random = torch.Generator().manual_seed(round)
        found = made.estimate(0, slope, torch.ones(1).double(), 64)  # few say little of which are small
    assert found.shape == (8,)
    assert float(made.squares[0][:4].mean()) > 2 * float(made.squares[0][4:].mean())
    made.squares[0] = torch.tensor([16.0] * 4 + [0.0] * 4).double()  # beside their mean, 8: 24 and 8
    found = made.estimate(0, slope, torch.ones(1).double(), 1 << 16) / slope[0]
    assert float(found[4:].mean() / found[:4].mean()) == pytest.approx(3**0.5, rel=0.2)


def test_the_same_work_in_all():
    growing, by_length = ledger(uses.Growing, rounds=300), ledger(uses.ByLength)
    counts = torch.tensor([growing.counts(round) for round in range(300)]).double()
    assert counts.mean(0).tolist() == pytest.approx([3, 4], abs=0.1)
    assert counts[0].tolist() == [2, 2]
    assert counts[-1].tolist() == [5, 6]
    for squares in ([1.0, 1.0], [100.0, 1.0], [1.0, 1e6]):
        by_length.squares = squares
        found = by_length.counts(0)
        assert sum(n * block.share for n, block in zip(found, BLOCKS, strict=True)) <= 1.01 * 5
        assert found == allot_directions(sum(found), [squares[0] * 8, squares[1] * 12], [1.0, 0.5])
    by_length.squares = [100.0, 1.0]
    assert by_length.counts(0)[0] > 3


def test_the_mean_of_the_last_weights_is_shown_alone():
    made = ledger(uses.LastMean, rate=1.0, rounds=9)
    seen = []
    for round in range(9):
        made.commit(round, answers(round), [1.0] * 3)
        seen.append(made.weights.detach().clone())
    half = torch.nn.Linear(4, 4)  # 16 + 4
    made.show(half)
    shown = torch.cat([p.detach().flatten() for p in half.parameters()])
    torch.testing.assert_close(shown, torch.stack(seen[6:]).mean(0))
    assert not torch.allclose(shown, made.weights.detach())


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_each(name):
    settings = {"rounds": 3, "batch": 8, "directions_from": "fresh", "rule": "adamw"}
    summary = train(Config(method=f"benchmarks/uses.py:{name}", server_rate=0.05, client_rate=0.01, **settings))
    assert summary.replicas.equal
    assert summary.failure is None
