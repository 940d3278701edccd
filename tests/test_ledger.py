"""Replicas and ledgers: every way to a round ends in the same bits; pools, epochs, digests, aggregation, rebuilding."""

import copy
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from small import DIRECTIONS, POOL, RULES, Small, round_scalars, small
from torch import nn

from hosfl.methods.ho import power_of_two_scales
from hosfl.methods.ledger import SeedReplay, has_void_rounds
from hosfl.methods.steps import FreshStep, PoolStep
from hosfl.probing.probe import PerturbedTensors, probe_in_place, probe_untouched, trainable
from hosfl.protocol import replica
from hosfl.protocol.aggregate import AGGREGATIONS, RunningLength, clip_to_norm, to_lattice, trimmed_mean, weighted_mean
from hosfl.protocol.header import LogError
from hosfl.protocol.lattice import Lattice, LatticeError
from hosfl.protocol.log import Log
from hosfl.protocol.messages import Differs, Hello, MessageError, Multiplier, PoolMoves, Records, Scalars
from hosfl.protocol.records import DigestRecord, EpochRecord
from hosfl.protocol.replica import DigestMismatch, Replica, digest_array, to_records
from hosfl.protocol.terms import Pool
from hosfl.runs.checkpoint import make_header, rebuild, save_module
from hosfl_kernels import AdamW, spec

ROUNDS = 37  # three generations of the pool and a bit
EMPTY = (3, 4, 20, 36)
NO_DIGEST = torch.empty(0, dtype=torch.int32)


def state(replica):
    return replica.digest(), replica.applied, replica.epoch


def part(made, begin, end, **header):
    """The records of rounds begin .. end - 1 as one message."""
    return replace(to_records(made.ledger.records[begin:end], made.run, begin), epoch=made.ledger.epoch, **header)


# --- the invariant ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RULES)
def test_every_way_to_a_round_ends_in_the_same_bits(kind):
    made = small(kind).play(ROUNDS, EMPTY)
    goal = (made.ledger.mirror.digest(), ROUNDS, 0)
    at_once, singly = made.replica(), made.replica()
    assert at_once.digest() != goal[0]
    at_once.apply(part(made, 0, ROUNDS))
    for round in range(ROUNDS):
        singly.apply(part(made, round, round + 1))
    assert state(at_once) == state(singly) == goal
    chance = random.Random(0)
    for _ in range(10):
        replica = made.replica()
        while replica.applied < ROUNDS:  # chunks that overlap what is there, and empty ones
            begin = chance.randint(0, replica.applied)
            replica.apply(part(made, begin, min(ROUNDS, replica.applied + chance.randint(0, 9))))
        assert state(replica) == goal
    assert all(t.dtype == made.half.weight.dtype for t in at_once.tensors)
    assert len(at_once.moments) == (made.run.rule.moments if made.run.rule else 0)


@pytest.mark.parametrize("start", [0, 5, 10, 11, 25])
def test_sums_over_the_pool_end_in_the_same_bits(start):
    made = small("pool").play(ROUNDS, EMPTY)
    replica = made.replica()
    replica.apply(part(made, 0, start))
    news = made.since(replica)
    assert isinstance(news, PoolMoves)
    assert news.coefficients.shape == ((ROUNDS - 1) // POOL.rounds - start // POOL.rounds + 1, POOL.size)
    replica.apply(news)
    replica.apply(news)  # the same again
    assert state(replica) == (made.ledger.mirror.digest(), ROUNDS, 0)


def test_sums_over_the_pool_are_sent_where_they_are_smaller_and_fit():
    made = small("pool").play(ROUNDS)
    for start in range(ROUNDS + 1):
        news = made.ledger.since(Hello(client=0, round=start))
        generations = (ROUNDS - 1) // POOL.rounds - start // POOL.rounds + 1
        smaller = start < ROUNDS and generations * POOL.size < (ROUNDS - start) * DIRECTIONS
        assert isinstance(news, PoolMoves if smaller else Records), start
        assert news.coefficients.size == min(generations * POOL.size, (ROUNDS - start) * DIRECTIONS)
    assert isinstance(small("pool bfloat16").play(ROUNDS).ledger.since(Hello(client=0, round=0)), Records)
    # The same sums where the lattice has no room for the detour that they may take.
    tight, lattice = small("pool", rate=0.001).play(ROUNDS), made.run.lattice
    mirror = tight.ledger.mirror
    with torch.no_grad():
        mirror.tensors[1].fill_(lattice.nearest(0.999 * lattice.limit))
    mirror._largest = float("inf")
    assert isinstance(tight.ledger.since(Hello(client=0, round=0)), Records)


@pytest.mark.parametrize("kind", RULES)
def test_an_empty_round_changes_nothing(kind):
    made = small(kind).play(5)
    replica = made.replica()
    replica.apply(part(made, 0, 5))
    before = replica.digest()
    rates = torch.full((7,), 0.1) if made.run.rule else torch.empty(0)
    replica.apply(Records(client=0, round=5, coefficients=torch.zeros(7, 4), rates=rates, digest=NO_DIGEST))
    assert (replica.digest(), replica.applied) == (before, 12)
    made.play(6)
    made.ledger.commit(6, [], [])
    assert made.ledger.records[6].rate == 0.0
    assert made.ledger.records[6].participants == ()


# --- a lattice that is outgrown -----------------------------------------------------------------------------------


def growing(kind, **settings):
    """Weights that outgrow their lattice several times."""
    return small(kind, rate={"moves": 8.0, "pool": 0.1}[kind], growth=1.25, headroom=2.0, **settings)


def on(lattice):
    """The round's lattice, whatever its moves are."""
    return lambda moves: lattice


def coarsenings(made):
    return [record.round for record in made.ledger.records if record.quantum is not None]


@pytest.mark.parametrize("kind", ["moves", "pool"])
def test_a_lattice_that_is_outgrown_becomes_coarser_for_everybody(kind):
    made = growing(kind).play(ROUNDS, EMPTY)
    mirror, rounds = made.ledger.mirror, coarsenings(made)
    assert len(rounds) > 1
    assert mirror.lattice.quantum == made.run.lattice.quantum * 16.0 ** len(rounds)
    for tensor, factor in zip(mirror.tensors, made.run.factors, strict=True):
        quanta = tensor.detach().double() / (mirror.lattice.quantum * factor)
        assert torch.equal(quanta, quanta.round())
        assert float(quanta.abs().max()) < 2**24
    goal = (mirror.digest(), ROUNDS, 0, mirror.lattice, mirror.mu)
    at_once, singly = made.replica(), made.replica()
    at_once.apply(part(made, 0, ROUNDS))
    for round in range(ROUNDS):
        singly.apply(part(made, round, round + 1))
        singly.apply(part(made, 0, round + 1))  # again, from the start
    assert (*state(at_once), at_once.lattice, at_once.mu) == (*state(singly), singly.lattice, singly.mu) == goal
    for start in range(ROUNDS):
        client = made.client()
        client.catch_up(part(made, 0, start))
        client.catch_up(made.since(client))
        assert (*state(client.replica), client.replica.lattice, client.replica.mu) == goal
    at_once.reset()
    assert at_once.lattice == made.run.lattice


@pytest.mark.parametrize("kind", ["moves", "pool"])
def test_a_step_too_large_for_its_lattice_begins_a_coarser_one(kind):
    found = []
    for exponent in range(-8, 24):
        made = small(kind, rate=2.0**exponent).play(0)
        before = state(made.ledger.mirror)
        try:
            made.play(1)
            found.append(len(coarsenings(made)))
        except LatticeError:
            found.append(2)
            assert state(made.ledger.mirror) == before
            assert not made.ledger.records
    assert found == sorted(found)
    assert set(found) == {0, 1, 2}
    assert found.count(1) in (4, 5)  # a lattice 16 times as coarse


def test_sums_over_the_pool_are_of_one_lattice():
    made = growing("pool").play(ROUNDS)
    last = coarsenings(made)[-1]
    for start in range(ROUNDS):
        news = made.ledger.since(Hello(client=0, round=start))
        assert start > last or isinstance(news, Records)
    assert len(made.ledger.since(Hello(client=0, round=0)).lattices) == len(coarsenings(made))


def test_probing_on_a_coarser_lattice_leaves_no_trace():
    made = growing("moves").play(ROUNDS)
    client = made.client()
    client.catch_up(made.since(client))
    before, cut = client.digest(), client.output(ROUNDS)
    client.answer(Multiplier(client=0, round=ROUNDS, multiplier=torch.randn(cut.cut.shape)))
    assert client.digest() == before


def test_a_coarser_lattice_is_in_the_log_and_void_with_its_round(tmp_path):
    made = growing("moves")
    save_module(made.half, tmp_path / "base.safetensors")
    with Log.create(tmp_path / "log", make_header(made.run, made.half, {}), sync="never") as log:
        made.ledger.log = log
        made.play(ROUNDS)
        first, *_, last = coarsenings(made)
        client = made.client()
        client.catch_up(made.since(client))
        made.ledger.restart(log, last)
        assert made.ledger.mirror.lattice.quantum < client.replica.lattice.quantum
        made.play(ROUNDS, seed=1)
        client.catch_up(made.since(client))
        mirror = made.ledger.mirror
        assert (*state(client.replica), client.replica.lattice) == (*state(mirror), mirror.lattice)
    for upto in (first, first + 1, last, last + 1, ROUNDS):
        replica = made.replica()
        replica.apply(part(made, 0, upto))
        assert rebuild(tmp_path / "log", tmp_path / "base.safetensors", upto)[1].digest() == replica.digest()


def test_a_rebuilt_model_has_its_tied_weights_under_all_their_names(tmp_path):
    torch.manual_seed(0)
    half = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    half[2].weight = half[0].weight
    parameters, streams = trainable(half)
    factors = power_of_two_scales(parameters)
    lattice = Lattice.snap(parameters, factors)
    run = replace(small().run, lattice=lattice, factors=tuple(factors))
    base = [p.detach().clone() for p in parameters]
    ledger = SeedReplay(run, FreshStep(run, lambda r: 0.05), Replica(parameters, streams, run, lambda: base))
    save_module(half, tmp_path / "base.safetensors")
    with Log.create(tmp_path / "log", make_header(run, half, {}), sync="never") as ledger.log:
        Small(half, run, ledger).play(5)
    tensors, _ = rebuild(tmp_path / "log", tmp_path / "base.safetensors")
    assert set(tensors) == {"0.weight", "1.weight", "1.bias", "2.weight"}
    for name, value in half.state_dict().items():
        assert torch.equal(tensors[name], value), name
    save(tensors)  # which refuses tensors that share memory


def test_a_step_too_large_for_the_coarser_lattice_too_changes_nothing():
    made = growing("moves").play(3)
    replica = made.replica()
    replica.apply(part(made, 0, 3))
    before, lattice = state(replica), replica.lattice.coarser()
    exponents = torch.tensor([[3, lattice.exponent]], dtype=torch.int32)
    for share, fits in [(0.5, False), (0.2, True)]:
        rows = torch.full((1, 4), lattice.nearest(share * lattice.limit))
        news = Records(client=0, round=3, coefficients=rows, rates=torch.empty(0), digest=NO_DIGEST, lattices=exponents)
        if fits:
            replica.apply(news)
            assert (replica.applied, replica.lattice) == (4, lattice)
        else:
            with pytest.raises(LatticeError, match="round 3 would carry"):
                replica.apply(news)
            assert (*state(replica), replica.lattice.coarser()) == (*before, lattice)


def refused(kind):
    """(message to a replica of 10 rounds in epoch 1, part of the reason)."""
    made = small(kind).play(12)
    rule = made.run.rule
    good = replace(part(made, 10, 12), epoch=1)
    rows = good.coefficients
    yield replace(good, round=11), "start at round 11"
    yield replace(good, round=2**32 - 1), "start at round"
    yield replace(good, epoch=0), "records of epoch 0"
    yield replace(good, epoch=2, round=9), "new epoch from round 9"
    yield replace(good, epoch=2**16 - 1, round=1), "new epoch from round 1"
    yield replace(good, coefficients=rows[:, :3]), "3 directions"
    yield replace(good, coefficients=torch.zeros(2, 0)), "0 directions"
    yield replace(good, digest=torch.zeros(3).int()), "3 words"
    for lattices in ([[11, 3]], [[11, 3], [11, 4]], [[11, 4], [10, 5]], [[12, 3]], [[9, 3]], [[11, 104]], [[11, -150]]):
        if rule is not None or lattices != [[11, 3]]:
            yield replace(good, lattices=torch.tensor(lattices, dtype=torch.int32)), "lattices? of"
    yield replace(good, lattices=torch.zeros(1, 3).int()), "lattices of shape"
    for number in (torch.nan, torch.inf, -torch.inf):
        yield replace(good, coefficients=np.where(np.arange(4) == 3, np.float32(number), rows)), "infinite or NaN"
    yield replace(good, rates=torch.ones(3)), "3 rates for 2"
    if rule is None:
        yield replace(good, coefficients=rows + made.run.lattice.quantum / 2), "no multiples"
        exponent = made.run.lattice.exponent
        yield replace(good, lattices=torch.tensor([[11, exponent - 1]], dtype=torch.int32)), "after one of"
        yield replace(good, lattices=torch.tensor([[11, exponent + 20]], dtype=torch.int32)), "no multiples"
    else:
        yield replace(good, rates=torch.tensor([0.1, torch.nan])), "rates"
        yield replace(good, rates=torch.tensor([0.1, -0.1])), "negative"
        yield replace(good, rates=torch.empty(0)), "0 rates for 2"
    if isinstance(rule, AdamW):
        yield replace(good, rates=torch.tensor([0.1, 3.4e38])), "beyond float32"

    def sums(until, generations=1, size=POOL.size, round=10, epoch=1, value=0.0):
        until, coefficients = torch.tensor(until, dtype=torch.int32), torch.full((generations, size), value)
        return PoolMoves(client=0, round=round, epoch=epoch, coefficients=coefficients, until=until, digest=NO_DIGEST)

    if kind != "pool":
        yield sums([12]), "has no pool"
        return
    quantum = made.run.lattice.quantum
    for until in ([-1], [10], [9], [0], [], [12, 13], [-(2**31)]):
        yield sums(until), "sums of 8 directions for rounds 10"
    yield sums([11], size=7), "sums of 7"
    yield sums([12]), "1 generations of a pool where 2"  # round 11 is of the next one
    yield sums([2**31 - 1]), "1 generations"
    yield sums([12], generations=3), "3 generations"
    yield sums([12], generations=2, round=9), "start at round 9"
    yield sums([12], round=11), "start at round 11"
    yield sums([12], generations=2, epoch=2, round=5), "new epoch from round 5"
    yield sums([11], value=quantum / 2), "no multiples"
    yield sums([11], value=torch.nan), "NaN"
    yield sums([11], epoch=0), "epoch 0"
    yield replace(sums([11]), digest=torch.zeros(9).int()), "9 words"


@pytest.mark.parametrize("kind", RULES)
def test_malformed_messages_change_nothing(kind):
    made = small(kind).play(10)
    client = made.client()
    client.catch_up(part(made, 0, 10))
    client.catch_up(replace(part(made, 10, 10), epoch=1))
    before = state(client.replica)
    assert before[1:] == (10, 1)
    wrong = list(refused(kind))
    assert len(wrong) > 12
    for message, reason in [
        *wrong,
        (replace(wrong[0][0], client=1, round=10), "for client 1"),
        (Scalars(client=0, round=10, scalars=torch.zeros(4)), "expects records"),
    ]:
        with pytest.raises(MessageError, match=reason):
            client.catch_up(message)
        assert state(client.replica) == (before[0], client.applied, client.epoch) == before
    client.catch_up(replace(part(made, 2, 8), epoch=1))  # all of it known
    assert state(client.replica) == before


# --- epochs and digests -------------------------------------------------------------------------------------------


def test_which_clients_hold_void_rounds():
    epochs = [(1, 20), (3, 30)]
    for epoch, round, void in [(0, 20, False), (0, 21, True), (1, 30, False), (1, 31, True), (3, 99, False)]:
        assert has_void_rounds(epochs, Hello(client=0, round=round, epoch=epoch)) is void
    assert has_void_rounds([(1, 20), (2, 10)], Hello(client=0, round=15, epoch=1))
    assert not has_void_rounds([], Hello(client=0, round=5))


@pytest.mark.parametrize("kind", RULES)
def test_after_a_restart_void_rounds_are_rebuilt_and_others_go_on(kind, tmp_path):
    made = small(kind)
    base = nn.Linear(3, 2).to(made.half.weight.dtype)
    base.load_state_dict(made.half.state_dict())
    header = make_header(made.run, base, {})
    ledger = made.ledger
    ledger.log = Log.create(tmp_path / "hosfl.log", header)
    made.play(20)
    saved = copy.deepcopy(ledger.state())
    early, there = made.client(), made.client()
    early.catch_up(part(made, 0, 12))
    there.catch_up(part(made, 0, 20))
    made.play(26)
    void = made.client()
    void.catch_up(part(made, 0, 26))
    ledger.log.close()

    again = small(kind)
    again.ledger.load(*saved)
    with Log.open(tmp_path / "hosfl.log") as log:
        again.ledger.restart(log, 20)
        assert again.ledger.epoch == log.epoch == 1
        assert log.records[-1] == EpochRecord(1, 20)
        assert again.ledger.mirror.digest() == there.replica.digest()
        again.play(24, seed=1)  # other rounds than the first time
        start = {"early": (early, 12), "there": (there, 20), "void": (void, 0)}
        for name, (client, begin) in start.items():
            news = again.since(client)
            assert (news.round, news.epoch) == (begin, 1), name
            client.catch_up(news)
        again.play(ROUNDS, EMPTY)
        newcomer = again.client()
        for client in (early, there, void, newcomer):
            client.catch_up(again.since(client))
            assert state(client.replica) == (again.ledger.mirror.digest(), ROUNDS, 1)
        again.ledger.restart(log, ROUNDS)  # nothing void here, but maybe where the log was copied from
        assert again.ledger.epochs == [(1, 20), (2, ROUNDS)]
        news = again.since(newcomer)
        assert (news.round, len(news.coefficients), news.epoch) == (ROUNDS, 0, 2)
        assert again.ledger.mirror.digest() == newcomer.replica.digest()
        with pytest.raises(LogError, match="ends after"):
            again.ledger.restart(log, ROUNDS + 1)
    save_module(base, tmp_path / "base.safetensors")
    assert rebuild(tmp_path / "hosfl.log", tmp_path / "base.safetensors")[1].digest() == newcomer.replica.digest()


def test_the_last_epoch_is_the_last(tmp_path):
    made = small()
    log = Log.create(tmp_path / "hosfl.log", make_header(made.run, made.half, {}))
    log.append(EpochRecord(2**16 - 2, 0))
    made.ledger.restart(log, 0)
    made.play(2)
    client = made.client()
    client.catch_up(made.since(client))
    assert (client.applied, client.epoch) == (2, 2**16 - 1)
    with pytest.raises(LogError, match="epoch"):
        made.ledger.restart(log, 1)
    log.close()


@pytest.mark.parametrize("kind", RULES)
def test_a_client_that_differs_says_so_and_rebuilds(kind):
    made = small(kind, digest_every=10).play(9)
    server, client = made.server(), made.client()
    client.catch_up(made.since(client))
    with torch.no_grad():
        client.moved.tensors[0][1, 2] += 2.0**-4
    made.play(10)
    news = server.welcome(client.hello())
    assert news.digest.size == 8  # it crosses a multiple of ten
    said = client.catch_up(news)
    assert isinstance(said, Differs)
    assert said.round == 10
    assert not np.array_equal(said.digest, digest_array(made.ledger.mirror.digest()))
    assert (client.applied, client.replica.digest()) == (0, made.replica().digest())
    answer = server.welcome(said)
    assert (answer.round, server.differed) == (0, ["client 0 after round 10"])
    assert client.catch_up(answer) is None
    assert state(client.replica) == (made.ledger.mirror.digest(), 10, 0)
    assert server.refused == []
    made.play(11)
    assert server.welcome(client.hello(), from_client=False).digest.size == 0  # not due
    assert server.welcome(client.hello()).digest.size == 8
    assert client.catch_up(made.since(client)) is None


@pytest.mark.parametrize("kind", ["moves", "adamw", "pool"])
def test_a_client_of_another_copy_of_the_run_s_folder_finds_out(kind, tmp_path):
    """Two copies that are resumed count the same epochs, and a client of one may say what one of the other would."""
    made, copy = small(kind), small(kind)
    made.ledger.log = Log.create(tmp_path / "log", make_header(made.run, made.half, {}))
    made.play(6)
    made.ledger.log.close()
    shutil.copy(tmp_path / "log", tmp_path / "copy")
    made.ledger.restart(Log.open(tmp_path / "log"), 6)
    made.play(8, seed=1)
    client = made.client()
    client.catch_up(made.since(client))
    copy.ledger.restart(Log.open(tmp_path / "copy"), 6)
    for rounds in (8, 12):  # as many, and more
        copy.play(rounds, seed=2)
        server, other = copy.server(), made.client()
        other.catch_up(made.since(other))
        assert (other.applied, other.epoch) == (8, copy.ledger.epoch)
        said = other.catch_up(server.welcome(other.hello()))
        assert isinstance(said, Differs)
        assert other.catch_up(server.welcome(said)) is None
        assert other.replica.digest() == copy.ledger.mirror.digest()


@pytest.mark.parametrize("kind", ["blocks", "blocks adamw"])
def test_a_commit_that_fails_between_two_blocks_takes_the_round_back(kind, monkeypatch):
    made, right, calls = small(kind).play(3), small(kind).play(5), []
    for name in ("replay_", "update_"):
        op = getattr(replica, name)

        def fails(*values, op=op, **options):
            calls.append(op)
            if len(calls) == 2:
                raise MemoryError
            op(*values, **options)

        monkeypatch.setattr(replica, name, fails)
    with pytest.raises(MemoryError):
        made.play(4)
    assert (len(made.ledger.records), made.ledger.mirror.applied) == (3, 3)
    assert state(made.play(5).ledger.mirror) == state(right.ledger.mirror)


def test_sums_over_the_pool_are_checked_as_well():
    made = small("pool", digest_every=10).play(ROUNDS)
    right, wrong = made.client(), made.client()
    news = made.since(right)
    assert isinstance(news, PoolMoves)
    assert news.digest.size == 8
    assert right.catch_up(news) is None
    with torch.no_grad():
        wrong.moved.tensors[1][0] += made.run.lattice.quantum
    assert isinstance(wrong.catch_up(news), Differs)
    assert state(wrong.replica) == state(made.replica())


def test_moments_are_part_of_the_digest():
    made = small("adamw", digest_every=10).play(10)
    replica = made.replica()
    again = part(made, 9, 10, digest=digest_array(made.ledger.mirror.digest()))
    replica.apply(part(made, 0, 10))
    replica.apply(again)
    replica.moments[1][0][0, 0] *= 1.0001
    with pytest.raises(DigestMismatch, match="after 10 rounds"):
        replica.apply(again)
    replica.reset()
    assert state(replica) == (made.replica().digest(), 0, 0)


class FullDisk:
    """A log that fails once."""

    def __init__(self):
        self.full, self.kept = True, []

    def append(self, record):
        if self.full:
            self.full = False
            raise OSError("no space left on device")
        self.kept.append(record)


@pytest.mark.parametrize("kind", ["moves", "adamw"])
def test_a_log_that_fails_takes_the_round_back(kind):
    made, twin = small(kind).play(5), small(kind).play(6)
    made.ledger.log = FullDisk()
    before = state(made.ledger.mirror)
    with pytest.raises(OSError, match="no space"):
        made.play(6)
    assert (len(made.ledger.records), state(made.ledger.mirror)) == (5, before)
    made.play(6)
    assert made.ledger.log.kept == [made.ledger.records[5]]
    assert state(made.ledger.mirror) == state(twin.ledger.mirror)


# --- rebuilding ---------------------------------------------------------------------------------------------------


def logged(kind, folder, rounds=23):
    """A run with a log and a base file in a folder; the digests of its half after every round."""
    made = small(kind, digest_every=10)
    base = copy.deepcopy(made.half)
    save_module(base, folder / "base.safetensors")
    with Log.create(folder / "hosfl.log", make_header(made.run, base, {}), sync="never") as log:
        made.ledger.log = log
        digests = [made.ledger.mirror.digest()]
        for round in range(rounds):
            made.play(round + 1, EMPTY)
            digests.append(made.ledger.mirror.digest())
    return made, digests


@pytest.mark.parametrize("kind", RULES)
def test_a_log_and_its_base_are_the_half_after_every_round(kind, tmp_path):
    made, digests = logged(kind, tmp_path)
    assert set(Log.read(tmp_path / "hosfl.log").digests) == {10, 20}
    for upto in (0, 1, 9, 10, 11, 22, 23, None):
        tensors, replica = rebuild(tmp_path / "hosfl.log", tmp_path / "base.safetensors", upto)
        assert replica.digest() == digests[23 if upto is None else upto]
        assert replica.applied == (23 if upto is None else upto)
    assert torch.equal(tensors["weight"], made.ledger.mirror.tensors[0])
    assert torch.equal(tensors["bias"], made.ledger.mirror.tensors[1])


def test_what_cannot_be_rebuilt_is_refused_with_the_reason(tmp_path):
    made, _ = logged("adamw", tmp_path)
    log, base, other = tmp_path / "hosfl.log", tmp_path / "base.safetensors", tmp_path / "other.safetensors"

    def wrong(module, reason):
        save_module(module, other)
        with pytest.raises(LogError, match=reason):
            rebuild(log, other)

    for upto in (24, -1, 2**40):
        with pytest.raises(LogError, match="holds 23 rounds"):
            rebuild(log, base, upto)
    nudged = copy.deepcopy(made.half)
    with torch.no_grad():
        nudged.bias[0] = torch.nextafter(nudged.bias[0], torch.tensor(torch.inf))
    wrong(nudged, "is not the base model")
    wrong(nn.Linear(4, 2), r"'weight' is float32 \(2, 4\)")
    wrong(copy.deepcopy(made.half).bfloat16(), "'weight' is bfloat16")
    wrong(nn.Linear(3, 2, bias=False), "no tensor 'bias'")
    more = copy.deepcopy(made.half)
    more.register_buffer("more", torch.ones(1))
    wrong(more, "is not the base model")
    (tmp_path / "other.txt").write_text("no weights")
    with pytest.raises(ValueError, match=r"other\.txt holds no weights: "):
        rebuild(log, tmp_path / "other.txt")
    data = log.read_bytes()
    for at in (20, len(data) // 2):
        log.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(LogError, match="damaged"):
            rebuild(log, base)


def test_a_rebuilt_half_must_have_the_log_s_digests(tmp_path):
    made, _ = logged("moves", tmp_path, rounds=5)
    log = tmp_path / "hosfl.log"
    with Log.open(log) as opened:
        opened.append(DigestRecord(0, 5, bytes(32)))
    with pytest.raises(LogError, match=r"after round 5 .* digests differ"):
        rebuild(log, tmp_path / "base.safetensors")
    assert rebuild(log, tmp_path / "base.safetensors", 4)[1].applied == 4


# --- the pool -----------------------------------------------------------------------------------------------------


def numpy_adam(rounds, rate, run):
    """The pool's coefficients after every round, and which were measured, in float64 and from Adam's definition."""
    for round in range(rounds):
        if round % POOL.rounds == 0:
            a, m, v, t = (np.zeros(POOL.size) for _ in range(4))
        measured = [(round % POOL.rounds * DIRECTIONS + p) % POOL.size for p in range(DIRECTIONS)]
        g = round_scalars(round).double().numpy()
        t[measured] += 1
        m[measured] = 0.9 * m[measured] + 0.1 * g
        v[measured] = 0.999 * v[measured] + 0.001 * g**2
        root = np.sqrt(v[measured] / (1 - 0.999 ** t[measured])) + 1e-8
        a[measured] -= rate * m[measured] / (1 - 0.9 ** t[measured]) / root
        yield measured, a.copy()


@pytest.mark.parametrize("kind", ["pool", "pool bfloat16"])
def test_the_pool_is_adam_on_its_coefficients(kind):
    made = small(kind, rate=0.003)
    step, lattice = made.ledger.step, made.run.lattice
    for round, (measured, expected) in enumerate(numpy_adam(ROUNDS, 0.003, made.run)):
        if round % POOL.rounds == 0:
            committed = np.zeros(POOL.size)
        before = [float(c.detach()) for c in step.coefficients]
        row, rate = step(round, weighted_mean([round_scalars(round)], [1.0]), on(lattice))
        assert step.generation == round // POOL.rounds
        assert made.run.pool.measured(round, DIRECTIONS).tolist() == measured
        now = [float(c.detach()) for c in step.coefficients]
        assert now == pytest.approx(expected, rel=1e-9, abs=1e-12)
        if round % POOL.rounds:
            assert all(now[j] == before[j] for j in set(range(POOL.size)) - set(measured))
        committed[measured] += np.array(row) * (1 if lattice else -1)
        if lattice is not None:
            assert all(float(c).is_integer() for c in np.array(row) / lattice.quantum)
            # Half a quantum, and not half a quantum per round: the remainder is carried forward.
            assert (abs(committed - now) <= lattice.quantum / 2 * (1 + 1e-9)).all()
        else:
            assert np.allclose(committed, now, rtol=0, atol=1e-9)
            assert rate == 1.0
        assert step.committed == pytest.approx(committed)


def test_a_rate_means_the_same_for_a_pool_and_for_fresh_directions():
    scalars = round_scalars(0).double()
    fresh, pool = small().run, small("pool").run
    expected, _ = FreshStep(fresh, lambda r: 0.5)(0, scalars, on(fresh.lattice))
    found, _ = PoolStep(pool, lambda r: 0.5, lambda p: torch.optim.SGD(p))(0, scalars, on(pool.lattice))
    assert found == pytest.approx(expected, abs=2 * pool.lattice.quantum)
    assert found == pytest.approx((-0.5 / DIRECTIONS * scalars).tolist(), abs=2 * pool.lattice.quantum)
    assert min(map(abs, found)) > 100 * pool.lattice.quantum


def test_small_steps_add_up_in_the_pool():
    made = small("pool")
    step = PoolStep(made.run, lambda r: float(DIRECTIONS), lambda p: torch.optim.SGD(p))
    quantum = made.run.lattice.quantum
    moved = sum(
        np.array(step(round, torch.full((4,), -0.2 * quantum), on(made.run.lattice))[0]) for round in range(0, 10, 2)
    )
    assert moved.tolist() == [quantum] * 4  # five fifths of a quantum


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p),
    "momentum": lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, weight_decay=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("normalized", [False, True])
def test_a_pool_saved_and_loaded_goes_on_with_the_same_bits(name, normalized):
    run = small("pool").run

    def fresh():
        return PoolStep(run, lambda r: 0.01, OPTIMIZERS[name], RunningLength() if normalized else None)

    step = fresh()
    for stop in (1, 3, 11, 15):
        for round in range(stop - 1 if stop < 3 else 0, stop):
            step(round, round_scalars(round).double(), on(run.lattice))
        other = fresh()
        other.load(*copy.deepcopy(step.state()))
        rows = [
            [s(round, round_scalars(round).double(), on(run.lattice)) for round in range(stop, stop + 15)]
            for s in (step, other)
        ]
        assert rows[0] == rows[1]
        assert any(c != 0 for row, _ in rows[0] for c in row)
        step = fresh()


def test_a_fresh_step_saved_and_loaded_goes_on_with_the_same_bits():
    run = small().run
    step = FreshStep(run, lambda r: 0.05, RunningLength())
    other = FreshStep(run, lambda r: 0.05, RunningLength())
    for round in range(5):
        step(round, round_scalars(round).double(), on(run.lattice))
    scalars = round_scalars(5).double()
    assert step(5, scalars, on(run.lattice)) != other(5, scalars, on(run.lattice))
    other.load(*copy.deepcopy(step.state()))
    assert step(6, scalars, on(run.lattice)) == other(6, scalars, on(run.lattice))


def test_pools_that_cannot_be():
    for size, rounds in [(0, 1), (-1, 1), (4, -1)]:
        with pytest.raises(ValueError, match="pool"):
            Pool(size, rounds)
    with pytest.raises(ValueError, match="pool of 3"):
        replace(small("pool").run, pool=Pool(3))
    assert Pool(8, 0).generation(10**9) == 0
    assert [Pool(5, 3).measured(r, 2).tolist() for r in range(4)] == [[0, 1], [2, 3], [4, 0], [0, 1]]


def test_a_run_has_a_lattice_or_a_rule():
    run = small().run
    for wrong in ({"lattice": None}, {"rule": AdamW()}):
        with pytest.raises(ValueError, match="one of them"):
            replace(run, **wrong)


# --- aggregation --------------------------------------------------------------------------------------------------


def test_aggregations_are_numpy_s():
    weights = [3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 2.0]
    for n in range(1, 8):
        values = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32)
        tensors = list(torch.from_numpy(values))
        ordered = np.sort(values.astype(np.float64), 0)
        cut = min(max(int(0.2 * n), 1), (n - 1) // 2)
        expected = {
            "weighted": np.average(values.astype(np.float64), 0, weights[:n]),
            "uniform": values.astype(np.float64).mean(0),
            "median": np.median(values.astype(np.float64), 0),
            "trimmed": ordered[cut : n - cut].mean(0),
        }
        assert expected.keys() == AGGREGATIONS.keys()
        for name, aggregation in AGGREGATIONS.items():
            result = aggregation(tensors, weights[:n])
            assert result.dtype == torch.float64
            assert np.allclose(result.numpy(), expected[name], rtol=1e-12, atol=1e-12), (name, n)
    assert trimmed_mean([torch.tensor([float(v)]) for v in (0, 1, 2, 100)], [1.0] * 4).tolist() == [1.5]


@pytest.mark.parametrize("sign", [1, -1])
def test_one_liar_among_ten(sign):
    honest = list(torch.randn(10, 5, generator=torch.Generator().manual_seed(0)))
    lying = [honest[0] * sign * 1e6, *honest[1:]]
    spread = torch.stack(honest).amax() - torch.stack(honest).amin()
    for name, aggregation in AGGREGATIONS.items():
        moved = (aggregation(lying, [1.0] * 10) - aggregation(honest, [1.0] * 10)).abs().max()
        assert (moved < spread) == (name in ("median", "trimmed")), name
        if name in ("weighted", "uniform"):
            assert moved > 1e4


def test_clipping_goes_by_the_estimate_s_length():
    made = small()
    run, weights = made.run, made.ledger.weights
    dimension = 6 * 0.5**2 + 2 * 1.0**2
    assert weights.tolist() == [dimension / 4**2] * 4
    values = [torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([0.3, 0.4, 0.0, 0.0]), torch.zeros(4)]
    clipped = clip_to_norm(values, 1.0, weights)
    lengths = [np.sqrt(dimension) / 4 * float(v.norm()) for v in clipped]
    assert lengths == pytest.approx([1.0, np.sqrt(dimension) / 4 * 0.5, 0.0])
    assert torch.equal(clipped[1], values[1])
    assert clipped[0][0] / clipped[0][1] == pytest.approx(0.75)
    # On average it is that of the estimate: 1/P sum v_p u_p for many rounds.
    squares = []
    for round in range(400):
        for stream, (size, factor) in enumerate(((6, 0.5), (2, 1.0))):
            u = [factor * spec.noise(size, seed, stream=stream).astype(float) for seed in run.seeds(round)]
            squares.append(((3 * u[0] + 4 * u[1]) ** 2).sum() / 16)
    assert 2 * np.mean(squares) == pytest.approx((np.sqrt(dimension) / 4 * 5) ** 2, rel=0.1)
    made.ledger.clip = 1.0
    answer = Scalars(client=0, round=0, scalars=values[0] * 100)
    made.ledger.commit(0, [answer], [1.0])
    assert made.ledger.records[0].coefficients.tolist() == pytest.approx(
        [-0.05 / 4 * float(c) for c in clipped[0]], abs=run.lattice.quantum
    )


def test_rounding_to_the_lattice_is_right_on_average():
    lattice = Lattice(2.0**-20)
    rows = np.array([to_lattice([0.3 * 2.0**-20, -1.0], lattice, 1, r) for r in range(2000)]) / lattice.quantum
    assert set(rows[:, 0]) == {0.0, 1.0}
    assert abs(rows[:, 0].mean() - 0.3) < 0.05
    assert (rows[:, 1] == -(2**20)).all()
    # A run that is repeated has the same log: which way each is rounded is a function of seed, round and position.
    halves = np.array(to_lattice([0.5 * lattice.quantum] * 12, lattice, 1, 2)) / lattice.quantum
    assert halves.tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1]


# --- scales, factors ----------------------------------------------------------------------------------------------


def test_power_of_two_scales():
    sizes = [1.0, 0.4, 0.3, 0.0, 0.26, 1e-9]
    tensors = [torch.full((3, 2), size) for size in sizes]
    assert power_of_two_scales(tensors) == [1.0, 0.5, 0.25, 0.25, 0.25, 2.0**-20]
    assert power_of_two_scales([torch.zeros(2), torch.ones(2) * 7]) == [1.0, 1.0]
    assert power_of_two_scales([torch.zeros(2), torch.empty(0)]) == [1.0, 1.0]
    assert power_of_two_scales([torch.tensor([torch.inf]), torch.ones(2) * 8, torch.ones(2)]) == [1.0, 1.0, 0.125]
    assert power_of_two_scales([]) == []
    mixed = torch.tensor([3.0, -4.0])  # the root mean square of what is there, not the largest
    assert power_of_two_scales([mixed * 2.0**5, mixed]) == [1.0, 2.0**-5]


def test_putting_on_a_lattice_is_what_snapping_did():
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    other = copy.deepcopy(half)
    factors = power_of_two_scales(list(half.parameters()))
    lattice = Lattice.snap(list(half.parameters()), factors)
    assert not all(torch.equal(a, b) for a, b in zip(half.parameters(), other.parameters(), strict=True))
    for _ in range(2):  # the second time changes nothing
        lattice.put(list(other.parameters()), factors)
        assert all(torch.equal(a, b) for a, b in zip(half.parameters(), other.parameters(), strict=True))
    for parameter, factor in zip(half.parameters(), factors, strict=True):
        steps = parameter.detach().double() / (lattice.quantum * factor)
        assert torch.equal(steps, steps.round())
    zero = torch.tensor([-0.0, lattice.quantum / 4, -lattice.quantum / 4])
    lattice.put([zero], [1.0])
    assert zero.tolist() == [0.0] * 3
    assert not torch.signbit(zero).any()


@pytest.mark.parametrize("in_place", [True, False])
def test_probing_with_factors_is_the_formula(in_place):
    made = small()
    half, run = copy.deepcopy(made.half), made.run
    moved = PerturbedTensors.of(half, run.factors)
    x, lam = torch.randn(6, 3), torch.randn(6, 2)
    with torch.no_grad():
        if in_place:
            found = probe_in_place(lambda: half(x), moved, lam, half(x), [1, 2], run.mu)
        else:
            found = probe_untouched(half, x, lam, half(x), [1, 2], run.mu, run.dist, moved)
    for seed, scalar in zip([1, 2], found.tolist(), strict=True):
        u, c = (f * spec.noise(n, seed, stream=t).astype(float) for t, (n, f) in enumerate(((6, 0.5), (2, 1.0))))
        expected = (lam.double().numpy() * (x.double().numpy() @ u.reshape(2, 3).T + c)).sum()
        assert scalar == pytest.approx(expected, rel=2e-3, abs=2e-3)
