"""A client that sends anything but what it should: the run is what it would be without it."""

import pickle
import random
import time
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from hosfl import Task
from hosfl.engines.engine import Reply
from hosfl.engines.in_process import InProcessEngine
from hosfl.methods.state import pack_optimizer
from hosfl.methods.tensors import decoded
from hosfl.protocol.messages import (
    LONGEST_TEXT,
    Audited,
    Complaint,
    Cut,
    Gradient,
    Hello,
    Invitation,
    ProbedCut,
    Refusal,
    Scalars,
    Statistics,
    encode,
    text_of,
    unpack,
)
from hosfl.runs.assemble import assemble
from hosfl.runs.config import Config

LIAR, LAST = 1, 2  # the last client's message is not taken before the liar's
SMALL = {"clients": 3, "sampled": 3, "batch": 4, "directions": 2, "directions_from": "fresh", "partition": "iid"}


class WithLiar(InProcessEngine):
    """Two clients as they should be; what another says, `lie` makes of what it was asked and what it ought to say.

    lie: None: it is not there.
    """

    def __init__(self, federation, lie):
        super().__init__(lambda number, data: federation.endpoint(number).answer(data), 3)
        self.lie = lie

    def ask(self, messages, deadline=None):
        for reply in super().ask(messages, deadline):
            if reply.client != LIAR:
                yield reply
            elif self.lie is None:
                yield Reply(LIAR, None, "gone")
            else:
                yield Reply(LIAR, self.lie(messages[LIAR], reply.data))


def outcome(rounds, lie, task=None, **settings):
    settings |= {} if task is None else {"task": "", "server_rate": 0.05, "client_rate": 0.1}
    federation, _ = assemble(Config(**SMALL | settings, rounds=rounds), task=task)
    federation.messenger.engine = WithLiar(federation, lie)
    losses = [federation.round(round) for round in range(rounds)]
    state = [t.clone() for t in federation.server.half.state_dict().values()]
    newcomer = federation.make_client(0)
    assert federation.catch_up(newcomer)
    return federation, losses, newcomer.digest(), state


def same(one, other):
    _, losses, digest, state = one
    _, others, other_digest, other_state = other
    return losses == others and digest == other_digest and all(map(torch.equal, state, other_state))


def as_another(ask, honest):
    return encode(replace(decoded(honest), client=LAST))


def in_another_round(ask, honest):
    message = decoded(honest)
    return encode(replace(message, round=message.round + 1))


def in_another_epoch(ask, honest):
    return encode(replace(decoded(honest), epoch=7))


class Late:
    """Always what it should have said a round ago."""

    def __init__(self):
        self.before = {}

    def __call__(self, ask, honest):
        kind = type(decoded(honest))
        said, self.before[kind] = self.before.get(kind, b""), honest
        return said


def endless_hellos(ask, honest):
    return encode(Hello(client=LIAR, round=0))


def ahead(ask, honest):
    return encode(Hello(client=LIAR, round=2**32 - 1, epoch=65535))


def complaints(ask, honest):
    text = torch.frombuffer(bytearray(b"fake log line\n" * 20), dtype=torch.uint8)
    return encode(Complaint(client=LIAR, round=0, text=text))


def of_another_kind(ask, honest):
    wanted = decoded(unpack(ask)[-1])
    round = wanted.round
    if isinstance(wanted, Invitation):
        return encode(Scalars(client=LIAR, round=round, scalars=torch.ones(2)))
    return encode(Audited(client=LIAR, round=round, digest=torch.zeros(8, dtype=torch.int32)))


def statistics(ask, honest):
    """Of a run that estimates none."""
    none = torch.zeros(0, dtype=torch.int32)
    return encode(Statistics(client=LIAR, round=0, statistics=torch.zeros(0), samples=none))


def too_large(ask, honest):
    return encode(Cut(client=LIAR, round=0, cut=torch.zeros(1_000_000), labels=torch.zeros(1, dtype=torch.int32)))


LIES = [
    *(as_another, in_another_round, in_another_epoch, Late(), endless_hellos, ahead, complaints, of_another_kind),
    *(too_large, statistics),
    lambda ask, honest: b"",
    lambda ask, honest: ask,
    lambda ask, honest: pickle.dumps(print),
    lambda ask, honest: honest * 2,
    lambda ask, honest: honest[:-1],
]


@pytest.fixture(scope="module")
def without():
    return outcome(4, None)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: getattr(lie, "__name__", type(lie).__name__))
def test_a_lie_costs_the_liar_its_rounds_and_nobody_else_anything(lie, without):
    found = outcome(4, lie)
    assert same(found, without)
    federation = found[0]
    said = federation.server.refused + federation.messenger.complaints
    assert said or lie in (endless_hellos, ahead)
    assert all(f"client {LIAR}" in what for what in said), said
    assert all(what.isprintable() for what in said)


def test_what_is_refused_in_place_of_a_cut_is_not_taken_for_one():
    server = outcome(4, statistics)[0].server
    assert server.refused == [f"client {LIAR}: Statistics in a run that does not estimate them"] * 4


def cross_entropy(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)  # IndexError for a class that is none


def shares(outputs, labels):
    return nn.functional.binary_cross_entropy(outputs[:, 0].sigmoid(), labels)  # RuntimeError for what is no share


def picky(outputs, labels):
    assert int(labels.max()) < 2, "of the task's\nown"  # a user's own error, of more than a line
    return cross_entropy(outputs, labels)


WAYS = {
    **{method: {"method": method} for method in ("ho", "zo-both", "mu-splitfed")},
    "hosl": {"method": "hosl", "directions_from": Config().directions_from},  # which it does not read
    "grouped": {"server_batch": 12},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", [cross_entropy, shares, picky])
def test_labels_of_which_no_loss_can_be_made_are_refused(loss, way):
    """A task that does not say its classes: the loss is the first to see that a label is wrong."""

    def lie(ask, honest):
        said = decoded(honest)
        return encode(replace(said, labels=torch.full_like(said.labels, 7))) if isinstance(said, Cut) else honest

    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).to(torch.float32 if loss is shares else torch.int64)
    norm = [] if way == "grouped" else [nn.BatchNorm1d(6)]  # has buffers to put back
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *norm, nn.Dropout(0.3), nn.Linear(6, 2))
    task = Task(net, (x, y), (x, y), loss, at=2)
    found = outcome(3, lie, task, **WAYS[way])
    if way == "grouped":  # the others of a pass are taken again, and differ by rounding and dropout
        assert found[0].server.passes["server backward"] == 3 * 2 * 4
    else:
        assert same(found, outcome(3, None, task, **WAYS[way]))
    server = found[0].server
    assert server.refused.total == 3
    assert all(what.isprintable() and f"client {LIAR}: nothing can be learnt" in what for what in server.refused)


def far_out(ask, honest):
    """Finite, and so are the gradients; their squares are not."""
    said = decoded(honest)
    if isinstance(said, ProbedCut):
        far = torch.arange(1.0, 1 + len(said.displaced)).view(-1, *[1] * said.cut.dim())
        said = replace(said, displaced=said.displaced.sign() * 1e30 * far)
    if isinstance(said, Gradient):
        said = replace(said, gradient=torch.full_like(said.gradient, 1e25))
    if isinstance(said, Cut):  # all samples alike, half of which are far from their labels then
        said = replace(said, cut=torch.full_like(said.cut, 1e30), labels=torch.arange(len(said.labels)).int() % 2)
    return encode(said)


@pytest.mark.parametrize("way", [*WAYS, "first-order"])
def test_what_would_stop_an_optimizer_for_good_is_refused(way):
    """AdamW divides by the root of a mean of squares, which stays infinite once it is: the weight never moves again."""
    unread = {name: getattr(Config(), name) for name in ("directions", "directions_from")}
    settings = WAYS.get(way, {"method": way, **unread})
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    task = Task(net, (x, y), (x, y), cross_entropy, at=2)
    found = outcome(3, far_out, task, **settings)
    if way == "grouped":  # the others of a pass are taken again, and differ by rounding
        assert found[0].server.refused.total == 3
    else:
        assert same(found, outcome(3, None, task, **settings))
    moments, _ = pack_optimizer(found[0].server.optimizer)
    assert moments
    assert all(torch.isfinite(moment).all() for moment in moments.values())


def test_a_complaint_is_cut_to_what_the_other_side_lets_it_be():
    """The last thousand are kept, and ten go into the status."""

    def lie(ask, honest):
        text = torch.full((federation.server.largest_message - 100,), ord("x"), dtype=torch.uint8)
        return encode(Complaint(client=LIAR, round=0, text=text))

    federation, _ = assemble(Config(**SMALL, rounds=1))
    federation.messenger.engine = WithLiar(federation, lie)
    assert federation.server.largest_message > 2 * LONGEST_TEXT
    federation.round(0)
    assert federation.messenger.complaints == [f"client {LIAR}: {LONGEST_TEXT * 'x'}"]


def scalars_that_are_none(ask, honest):
    said = decoded(honest)
    return encode(replace(said, scalars=said.scalars * float("nan"))) if isinstance(said, Scalars) else honest


WHY = {
    "of a cut": (in_another_round, "Cut of round 1, epoch 0, where Cut of round 0, epoch 0 is due"),
    "of scalars": (scalars_that_are_none, "infinite or NaN scalars"),
    "of bytes": (lambda ask, honest: b"rubbish", "7 bytes are too few for a header of 20"),
}


@pytest.mark.parametrize("what", WHY)
def test_who_is_refused_is_told_why_in_the_next_round(what):
    lie, why = WHY[what]
    federation, _ = assemble(Config(**SMALL, rounds=3))
    told = dict.fromkeys(range(3), ())

    def answer(number, data):
        told[number] += tuple(m for m in map(decoded, unpack(data)) if isinstance(m, Refusal))
        honest = federation.endpoint(number).answer(data)
        return lie(data, honest) if number == LIAR and round == 0 else honest

    federation.messenger.engine = InProcessEngine(answer, 3)
    for round in range(3):
        federation.round(round)
        assert len(told[LIAR]) == (round > 0)
    assert federation.server.refused.total >= 1
    assert [(m.client, m.round, text_of(m)) for m in told[LIAR]] == [(LIAR, 1, why)]
    assert told[0] == told[LAST] == ()
    assert federation.took_part == [0, 1, 2]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError, MemoryError])
def test_what_is_the_machine_s_fault_is_nobody_s_message(error, grouped):
    federation, _ = assemble(Config(**SMALL, server_batch=64 * grouped))

    def loss(outputs, labels):
        raise error("the device is gone")

    federation.server.loss = loss
    with pytest.raises(error):
        federation.round(0)


def mutations(seed):
    chance = random.Random(seed)

    def lie(ask, honest):
        data = bytearray(honest)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data[: chance.randrange(1, len(data) + 1)] if chance.random() < 0.3 else data)

    return lie


def mutated(rounds):
    found = outcome(rounds, mutations(0), batch=1)
    assert same(found, outcome(rounds, None, batch=1))
    assert found[0].server.refused.total >= rounds


def test_mutated_messages():
    mutated(100)


@pytest.mark.slow
def test_ten_thousand_mutated_messages():
    mutated(10_000)


class WithMute(WithLiar):
    """One that takes what it is asked, and says nothing until the deadline. clock: in place of the real one."""

    now = 0.0

    def ask(self, messages, deadline=None):
        replies = [Reply(reply.client, reply.data) for reply in super().ask(messages) if reply.client != LIAR]
        if deadline <= 0:
            replies = [Reply(reply.client, None, "late") for reply in replies]
        yield from replies
        if LIAR in messages:
            self.now += deadline
            yield Reply(LIAR, None, "late")


def test_a_client_that_says_nothing_costs_nobody_else_a_round(monkeypatch):
    """Nor those that come in the same round, and have to say first where they are."""
    federation, _ = assemble(Config(**SMALL, rounds=3))
    federation.messenger.engine = engine = WithMute(federation, None)
    federation.messenger.deadline = 60.0
    clock = types.SimpleNamespace(monotonic=lambda: engine.now, perf_counter=time.perf_counter)
    monkeypatch.setattr("hosfl.runs.messenger.time", clock)
    for round in range(3):
        before = engine.now
        federation.round(round)
        assert federation.took_part == [0, LAST]
        assert federation.messenger.failures == {LIAR: "late"}
        assert engine.now - before <= 60.0
    federation.messenger.positions.clear()
    assert federation.compare_replicas().clients == 2 + 1  # and a newcomer


def test_a_client_that_differs_for_ever_is_asked_a_few_times():
    """Every ask costs the server something: a client that always wants to begin anew is left alone for the round."""
    asked = []

    def lie(ask, honest):
        asked.append(ask)
        return endless_hellos(ask, honest)

    outcome(2, lie)
    assert len(asked) <= 2 * 4
