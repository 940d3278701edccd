"""What a client that lies can cost the others: its own place in a round, and no more of the run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hosfl.engines.engine import Reply
from hosfl.engines.in_process import InProcessEngine
from hosfl.protocol.aggregate import LENGTH_LIMIT, limit_length, weighted_mean
from hosfl.protocol.messages import Audited, Cut, Differs, ProbedCut, Scalars, decode, encode
from hosfl.runs.assemble import assemble
from hosfl.runs.config import Config
from hosfl.settings import Settings
from hosfl.tasks.task import Task

CLIENTS = 6


class LiarsFirst(InProcessEngine):
    """An engine in which liars are faster than all others. lie: what a message is replaced by."""

    def __init__(self, federation, liars, lie):
        super().__init__(lambda number, data: federation.endpoint(number).answer(data), CLIENTS)
        self.liars, self.lie = liars, lie

    def ask(self, messages, deadline=None):
        for number in sorted(messages, key=lambda number: (number not in self.liars, number)):
            said = decode(self.answer(number, messages[number]))
            yield Reply(number, encode(self.lie(said) if number in self.liars else said))


def made(liars, lie, enough=None, **settings):
    told = {"clients": CLIENTS, "sampled": CLIENTS, "batch": 8, "rounds": 5, "server_rate": 0.1, "client_rate": 0.05}
    federation, _ = assemble(Config(**told | settings))
    federation.messenger.engine = LiarsFirst(federation, liars, lie)
    federation.enough, federation.patient = enough, True
    return federation


def junk(message):
    """Well formed, and no cut."""
    return Audited(client=message.client, round=0, epoch=0, digest=np.zeros(8, np.int32))


def absurd(message):
    """A cut that is finite, and whose loss is not."""
    return replace(message, cut=np.full_like(message.cut, 3e38)) if isinstance(message, Cut) else message


def too_few(message):
    """A right cut, and scalars that are not as many as the directions."""
    if not isinstance(message, Scalars):
        return message
    return Scalars(client=message.client, round=message.round, epoch=0, scalars=np.zeros(1, np.float32))


@pytest.mark.parametrize("server_batch", [1, 64])
@pytest.mark.parametrize("lie", [junk, absurd])
def test_what_is_refused_is_not_waited_for_less(lie, server_batch):
    """Three liars, faster than all: a round goes on without the rest only when three honest clients have taken part."""
    federation = made({0, 1, 2}, lie, enough=3, server_batch=server_batch)
    for round in range(3):
        federation.round(round)
        assert federation.tries == 0
        assert federation.took_part == [3, 4, 5]
        assert federation.server.ledger.records[round].participants == (3, 4, 5)
    assert federation.ever_took_part == {3, 4, 5}
    assert federation.server.refused.total >= 9


def test_with_enough_honest_cuts_nobody_waits_for_more():
    federation = made({0, 1}, junk, enough=2)
    federation.round(0)
    assert federation.took_part == [2, 3]
    assert federation.visits == 2


def test_nobody_speaks_for_another():
    """Not even before the other has spoken."""
    federation = made({0}, lambda message: replace(message, client=5))
    federation.round(0)
    assert federation.took_part == [1, 2, 3, 4, 5]
    assert federation.server.refused == ["bytes of client 0: it says that it is client 5's"]


def test_a_round_that_was_tried_in_vain_is_tried_with_others():
    federation = made(set(range(6)), junk, sampled=4)
    assert np.isnan(federation.round(0))
    first = federation.asked
    assert (federation.tries, len(first)) == (1, 4)
    assert np.isnan(federation.round(0))
    assert (federation.tries, sorted(first + federation.asked)) == (2, list(range(6)))
    assert np.isnan(federation.round(0))
    assert (federation.tries, federation.asked) == (3, first)  # all have been tried: a new turn begins
    federation.messenger.engine.liars = set()
    assert np.isfinite(federation.round(0))
    assert (federation.tries, federation.took_part) == (0, federation.asked)
    assert len(federation.server.ledger.records) == 1
    federation.round(1)
    assert len(federation.asked) == 4


def test_of_several_exchanges_each_waits_for_cuts_that_count():
    def wrong(message):
        return replace(message, cut=message.cut[:, :1]) if isinstance(message, Cut) and message.round % 2 else message

    for liars, enough, took_part in (({0}, None, [1, 2, 3, 4, 5]), ({0}, 3, [1, 2]), ({0, 1, 2}, 3, [])):
        federation = made(liars, wrong, enough, method="splitfed", local_steps=2)
        federation.round(0)
        assert federation.took_part == took_part


def test_whose_answer_is_refused_did_not_take_part():
    for liars, enough, took_part in (({0}, None, [1, 2, 3, 4, 5]), ({0}, 3, [1, 2]), ({0, 1, 2}, 3, [])):
        federation = made(liars, too_few, enough)
        federation.round(0)
        assert federation.took_part == took_part == [*federation.server.ledger.records[0].participants]
        assert federation.ever_took_part == {*took_part}


def large(message, size=3e38):
    return replace(message, scalars=np.full_like(message.scalars, size)) if isinstance(message, Scalars) else message


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"rule": "sgd"}, marks=pytest.mark.slow),
        pytest.param({"rule": "momentum"}, marks=pytest.mark.slow),
        {"directions_from": "fresh"},
        {"directions_from": "fresh", "rule": "adamw"},
        {"dist": "gaussian", "rule": "sgd", "client_rate": 5.0},
    ],
    ids=str,
)
def test_one_absurd_answer_costs_a_round_and_not_the_run(settings):
    """It neither leads off the lattice nor freezes what rounds after it are divided by."""
    moved = {}
    for lie in (large, None):
        federation, moves = made({2}, lambda message: message, rounds=60, **settings), []
        for round in range(35):
            federation.messenger.engine.lie = lie if lie and round == 10 else lambda message: message
            federation.round(round)
            record = federation.server.ledger.records[-1]
            rate = record.rate if federation.server.ledger.run.rule else 1.0
            moves.append(float(np.abs(record.coefficients).max()) * rate)
        assert all(p.isfinite().all() for p in federation.model().client.parameters())
        assert federation.server.refused == federation.messenger.complaints == []
        moved[lie] = np.mean(moves[-10:])
    assert moved[large] > moved[None] / 10


def test_a_mean_is_held_to_the_middle_length():
    weights, ones = np.ones(2), torch.ones(2)
    honest = [ones, 2 * ones, 3 * ones]
    mean = weighted_mean(honest, [1.0] * 3)
    assert limit_length(mean, honest, weights) is mean
    lied = [*honest, 1e30 * ones]
    held = limit_length(weighted_mean(lied, [1.0] * 4), lied, weights)
    torch.testing.assert_close(held, (LENGTH_LIMIT * 2 * ones).double())  # the lower of the middle two
    small = [1e-6 * value for value in lied]  # whatever the unit
    held = limit_length(weighted_mean(small, [1.0] * 4), small, weights)
    torch.testing.assert_close(held, (LENGTH_LIMIT * 2e-6 * ones).double())
    only = [1e30 * ones]
    torch.testing.assert_close(limit_length(only[0], only, weights), only[0])  # nothing to compare it with
    nothing = [0 * ones, 0 * ones, ones]
    torch.testing.assert_close(limit_length(ones / 3, nothing, weights), ones / 3)  # those have nothing to say
    assert not limit_length(0 * ones, [0 * ones], weights).any()


def no_norm(liars, **settings):
    """A federation whose server half has nothing that takes a cut's size back."""
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(300, 16, generator=chance)
    y = (x[:, 0] * x[:, 1] > 0).long()

    def model():
        return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    task = Task(model, (x, y), (x[:9], y[:9]), nn.functional.cross_entropy, at=2)
    told = {
        "clients": CLIENTS,
        "sampled": CLIENTS,
        "batch": 16,
        "rounds": 100,
        "server_rate": 0.01,
        "client_rate": 0.05,
    }
    federation, _ = assemble(Settings(**told | settings), task=task)
    federation.messenger.engine, federation.patient = LiarsFirst(federation, liars, None), True
    return federation


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"server_batch": 64}, marks=pytest.mark.slow),
        pytest.param({"method": "mu-splitfed", "local_steps": 2, "directions": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_absurd_cut_costs_a_round_and_not_the_server_half(settings):
    """It does not stay in what AdamW divides by."""

    def moved(when):
        """How far the half moves in a round, 45 rounds after such a cut, when nothing is left of it in a momentum."""
        federation, moves = no_norm({2}, **settings), []
        weights = [p.detach() for p in federation.model().server.parameters() if p.dim() > 1]  # a bias meets no cut
        for round in range(57):
            before = [p.clone() for p in weights]
            federation.messenger.engine.lie = longer if round == when else lambda message: message
            federation.round(round)
            moves.append(float(torch.cat([(p - b).flatten() for p, b in zip(weights, before, strict=True)]).norm()))
        assert federation.server.refused == []
        return np.mean(moves[-6:])

    honest = moved(None)
    assert moved(12) > 0.6 * honest
    assert moved(0) > 0.1 * honest  # of a first round nobody knows what is usual


def longer(message, times=10_000):
    if not isinstance(message, Cut):
        return message
    displaced = {"displaced": message.displaced * times} if isinstance(message, ProbedCut) else {}
    return replace(message, cut=message.cut * times, **displaced)


def test_how_long_gradients_were_is_known_after_a_restart():
    server, other = no_norm(set()), no_norm(set())
    for round in range(3):
        server.round(round)
    other.server.load(server.server.state())
    gradient = [1e6 * torch.ones(4), None]
    held, none = other.server._outliers.clipped(gradient)
    assert none is None
    assert 0 < float(held.norm()) < 10
    torch.testing.assert_close(held, server.server._outliers.clipped(gradient)[0])
    assert server.server._outliers.clipped([torch.zeros(4)])[0].tolist() == [0.0] * 4  # which tells nothing


def test_the_reason_that_is_told_is_the_newest():
    federation = made({0}, junk)
    federation.messenger.complaints.add("client 1: of a round long ago")
    federation.round(0)
    assert "Audited" in federation.newest_refused[-1]
    assert len(federation.newest_refused) == 1
    for _ in range(1200):
        federation.server.receive(b"junk", 0)
    assert len(federation.server.refused) == 1000
    for _ in range(1200):
        federation.messenger.complaints.add("client 0: of anything")
        federation.server.welcome(Differs(client=0, round=0, digest=np.zeros(8, np.int32)))
    assert (len(federation.server.differed), federation.server.differed.total) == (1000, 1200)
    assert (len(federation.messenger.complaints), federation.messenger.complaints.total) == (1000, 1201)
    federation.round(1)
    assert "round 1, client 0" in federation.newest_refused[-1]
    federation.messenger.engine.lie = lambda message: message
    federation.round(2)
    assert federation.newest_refused == []
