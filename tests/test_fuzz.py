"""Mutated messages: each is refused with a MessageError and changes nothing, or may be accepted as it is."""

import contextlib
import json
import random
import resource
import struct
import tracemalloc
import zlib
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
import torch
from small import SAMPLES, batch, small
from torch import nn

from hosfl.methods.cuts import CutSpec
from hosfl.methods.first_order import FirstOrderClient, GradientAverage
from hosfl.methods.server import Server
from hosfl.methods.tensors import decoded as decode
from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.messages import (
    CRC,
    DTYPES,
    HEADER,
    MESSAGES,
    NUMPY,
    Audit,
    Audited,
    Calibration,
    Complaint,
    Cut,
    Differs,
    Gradient,
    Hello,
    Invitation,
    Losses,
    Message,
    MessageError,
    Multiplier,
    PoolMoves,
    ProbedCut,
    Records,
    Refusal,
    Scalars,
    Statistics,
    Trained,
    Weights,
    encode,
)
from hosfl.protocol.replica import digest, digest_array

ROUND, EPOCH = 16, 1  # in the second generation of the pool
SIZES = (0, 1, 2, 3, 7, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS = (np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -0.0, 1e30, 0.1)
WHOLE = (-1, -(2**31), 2**31 - 1, 0, 1, 2, 15, 16, 17, 255)


# --- mutations: bytes and chance -> bytes -------------------------------------------------------------------------


def flip(data, chance):
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def truncate(data, chance):
    return data[: chance.randrange(len(data))]


def extend(data, chance):
    return data + chance.randbytes(chance.choice((1, 4, 100, 5000)))


def remove(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + data[at + chance.choice((1, 4, 8)) :]


def header(data, chance):
    """Another kind, count, epoch, client or round."""
    where, code, values = chance.choice(
        [
            (4, "<B", [*range(16), 255]),
            (5, "<B", [0, 1, 2, 3, 4, 255]),
            (6, "<H", [0, 1, 2, 3, 65535]),
            (8, "<I", [0, 1, 2, 9, 10, 2**31, 2**32 - 1]),
            (12, "<I", [0, 1, 2, ROUND - 5, ROUND - 1, ROUND, ROUND + 1, 2**31 - 1, 2**31, 2**32 - 1]),
        ]
    )
    struct.pack_into(code, data, where, chance.choice(values))
    return data


def places(data):
    """Of every array of a whole message: (where it starts, dtype's code, dims, where its elements start and end)."""
    at, found = HEADER.size, []
    for _ in range(data[5]):
        code, dims = data[at], data[at + 1]
        begin = at + 4 + 4 * dims
        elements = int(np.prod(struct.unpack_from(f"<{dims}I", data, at + 4), dtype=np.int64))
        end = begin + elements * NUMPY[DTYPES[code]].itemsize
        found.append((at, code, dims, begin, end))
        at = end
    return found


def shape(data, chance):
    """Another dtype, number of dims or size."""
    arrays = places(data)
    if not arrays:
        return header(data, chance)
    at, _, dims, _, _ = chance.choice(arrays)
    what = chance.randrange(4)
    if what == 0:
        data[at] = chance.randrange(8)
    elif what == 1:
        data[at + 1] = chance.choice((0, 1, 2, 3, 8, 9, 255))
    else:
        for _ in range(what - 1 if dims else 0):
            struct.pack_into("<I", data, at + 4 + 4 * chance.randrange(dims), chance.choice(SIZES))
    return data


def vast(data, chance):
    """An array of no elements and huge sizes."""
    arrays = places(data)
    if not arrays:
        return header(data, chance)
    at, code, _, _, end = chance.choice(arrays)
    sizes = [0, *chance.choices(SIZES, k=chance.randrange(8))]
    chance.shuffle(sizes)
    return data[:at] + struct.pack(f"<BBH{len(sizes)}I", code, len(sizes), 0, *sizes) + data[end:]


def elements(data, chance):
    """Other numbers, at their places."""
    arrays = [a for a in places(data) if a[4] > a[3]]
    if not arrays:
        return header(data, chance)
    _, code, _, begin, end = chance.choice(arrays)
    size = NUMPY[DTYPES[code]].itemsize
    for _ in range(chance.choice((1, 1, 3))):
        at = begin + size * chance.randrange((end - begin) // size)
        if code == 4:
            struct.pack_into("<i", data, at, chance.choice(WHOLE))
        elif code == 1:
            struct.pack_into("<f", data, at, np.float32(chance.choice(NUMBERS)))
        else:
            data[at + size - 1] |= 0x7F  # infinite, NaN or huge
    return data


def resized(data, chance):
    """A whole message of its kind with arrays of other sizes, and elements to match."""
    message = decode(bytes(data))
    changed = {}
    for name in message.arrays():
        value = getattr(message, name)
        sizes = [chance.choice((n, n, n + 1, 0, 1, 2 * n)) for n in value.shape]
        changed[name] = torch.zeros(sizes, dtype=value.dtype)
    return bytearray(encode(type(message)(client=message.client, round=message.round, epoch=message.epoch, **changed)))


MUTATIONS = (flip, truncate, extend, remove, header, header, shape, shape, vast, elements, elements, resized)


def seal(data):
    """Make the checksum right."""
    if len(data) >= HEADER.size:
        crc = zlib.crc32(data[HEADER.size :], zlib.crc32(data[: HEADER.size - CRC.size]))
        data[HEADER.size - CRC.size : HEADER.size] = CRC.pack(crc)
    return data


def mutated(whole, chance):
    data = chance.choice(MUTATIONS)(bytearray(chance.choice(whole)), chance)
    if chance.random() < 0.2:
        data = flip(data, chance) if data else data
    return bytes(seal(data) if chance.random() < 0.5 else data)


# --- what they are given to ---------------------------------------------------------------------------------------


def server_half():
    """Absurd numbers give it NaN gradients."""
    return nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))


@dataclass
class Stage:
    """A server and a client in the middle of round ROUND: the client's cut is there, its answer may come."""

    kind: str

    def __post_init__(self):
        self.ledger, self.made = None, None
        if self.kind == "first-order":
            self._first_order()
        else:
            self._zeroth_order()
        torch.manual_seed(1)
        self.cut = self.client.output(ROUND)
        self.multipliers, _ = self.server.step(ROUND, [self.cut])
        self.multiplier = self.multipliers[0]
        self.refusals = self.server.refused.total

    def _zeroth_order(self):
        self.made = small(self.kind).play(ROUND - 3)
        self.ledger = self.made.ledger
        self.ledger.epochs = [(EPOCH, 2)]
        self.made.play(ROUND)
        self.server, self.client = self.made.server(server_half()), self.made.client()
        self.client.catch_up(self.made.since(self.client))

    def _first_order(self):
        torch.manual_seed(0)
        half = nn.Linear(3, 2)
        weights = nn.utils.parameters_to_vector(half.parameters()).detach().clone().requires_grad_()
        optimizer = torch.optim.SGD([weights], lr=1.0, momentum=0.9)
        self.ledger = GradientAverage(weights, optimizer, lambda r: 0.01, rounds=ROUND, epoch=EPOCH)
        server = server_half()
        adam, loss = torch.optim.Adam(server.parameters()), nn.functional.cross_entropy
        self.server = Server(server, loss, adam, lambda r: 0.1, self.ledger, 5, 10, CutSpec((2,), 2, SAMPLES))
        self.client = FirstOrderClient(0, half, batch, applied=ROUND, epoch=EPOCH)

    def examples(self):
        """A right message of every kind at this stage, and of the other kinds of run."""
        here = {"client": 0, "round": ROUND, "epoch": EPOCH}
        again, none = {**here, "round": 9}, torch.empty(0, dtype=torch.int32)
        sums, until = torch.zeros(2, 8), torch.tensor([ROUND], dtype=torch.int32)
        known = digest_array(digest([]))
        rates = torch.full((2,), 0.1) if self.made and self.made.run.rule else torch.empty(0)
        rows = torch.full((2, 4), 2.0**-9)
        messages = [
            *(Hello(**here), Hello(client=3, round=0), Hello(**again)),
            *(Differs(**here, digest=known), Differs(**again, digest=known)),
            *(self.cut, Cut(**here, cut=torch.randn(SAMPLES, 2).bfloat16(), labels=torch.zeros(SAMPLES).int())),
            *(self.multiplier, Multiplier(**here, multiplier=torch.randn(SAMPLES, 2).half())),
            *(Scalars(**here, scalars=torch.randn(4)), Gradient(**here, gradient=torch.randn(8))),
            *(Weights(**here, weights=torch.empty(0)), Weights(**{**here, "round": 17}, weights=torch.randn(8))),
            Records(**here, coefficients=rows, rates=rates, digest=none),
            Records(**here, coefficients=rows, rates=rates, digest=known),
            Records(**again, coefficients=rows, rates=rates, digest=none),
            PoolMoves(**again, coefficients=sums, until=until, digest=none),
            PoolMoves(**here, coefficients=sums[:1] + 2.0**-9, until=until + 2, digest=none),
            PoolMoves(**here, coefficients=sums, until=until + 10, digest=known),
            ProbedCut(**{**vars(self.cut), "displaced": self.cut.cut[None].clone()}),
            *(Losses(**here, losses=torch.randn(2)), Trained(**here, weights=torch.randn(8))),
            Statistics(**here, statistics=torch.rand(4), samples=torch.tensor([SAMPLES], dtype=torch.int32)),
            Statistics(**here, statistics=torch.empty(0), samples=none),
            *(Calibration(**here, statistics=torch.rand(4)), Calibration(**here, statistics=torch.empty(0))),
            *(Invitation(**here), Audit(**here), Audited(**here, digest=known)),
            *(kind(**here, text=torch.zeros(3, dtype=torch.uint8)) for kind in (Complaint, Refusal)),
        ]
        assert {type(m) for m in messages} == set(MESSAGES.values())
        return [encode(m) for m in messages]

    def bits(self):
        """A digest of everything that a refused message must not change."""
        tensors, info = self.server.state()
        flat = [tensors[name] for name in sorted(tensors)] + list(self.client.half.parameters())
        rest = [info, self.ledger.epoch, self.server._samples, self.server.differed, self.client.applied]
        if self.made is not None:
            mirror, replica = self.ledger.mirror, self.client.replica
            flat += [*mirror.tensors, *chain(*mirror.moments, *replica.moments)]
            rest += [len(self.ledger.records), mirror.applied, mirror.epoch, replica.applied, replica.epoch]
        else:
            rest += [self.ledger.rounds]
        return digest(flat), json.dumps([*rest, self.client.epoch])


def to_welcome(stage, message):
    return stage.server.welcome(message) is not None


def to_step(stage, message):
    waiting, stage.server._samples = stage.server._samples, {}
    multipliers, loss = stage.server.step(ROUND, [message])
    if not multipliers:
        assert np.isnan(loss)
        stage.server._samples = waiting
    return bool(multipliers)


def to_commit(stage, message):
    """Refused, the round is committed with nobody: no step. That is taken back."""
    stage.server.commit(ROUND, [message])
    if stage.made is None:
        if stage.server.refused.total > stage.refusals:
            stage.ledger.rounds -= 1
        return stage.server.refused.total == stage.refusals
    record = stage.ledger.records[-1]
    if record.participants:
        return True
    assert not record.coefficients.any()
    stage.ledger.records.truncate(ROUND)
    stage.ledger.mirror.applied -= 1
    return False


def to_catch_up(stage, message):
    stage.client.catch_up(message)
    return True


def to_answer(stage, message):
    answer = stage.client.answer(message)
    assert isinstance(answer, (Scalars, Gradient))
    return True


TARGETS = (to_welcome, to_step, to_commit, to_catch_up, to_answer)


def fuzz(kind, count, seed):
    """Give mutated messages to every target. Returns how many reached one, and how many were accepted somewhere."""
    chance, stage = random.Random(seed), Stage(kind)
    whole, before = stage.examples(), stage.bits()
    reached = accepted = 0
    refusing = set()
    for number in range(count):
        data = mutated(whole, chance)
        message = stage.server.receive(data)
        try:
            decode(data)
        except MessageError:
            assert message is None
        stage.refusals = stage.server.refused.total
        if message is None:
            assert number % 100 or stage.bits() == before
            continue
        assert isinstance(message, Message)
        reached += 1
        for target in TARGETS:
            changed = False
            try:
                changed = target(stage, message)
            except MessageError:
                refusing.add(target)
            except LatticeError:  # moves that are too large; a client applies the rounds before them
                changed = target is to_catch_up
            if not changed:
                assert stage.bits() == before, (number, target.__name__, message)
            elif stage.bits() != before:
                assert all(torch.isfinite(p).all() for p in stage.server.half.parameters())
                stage = Stage(kind)
                assert stage.bits() == before
            accepted += changed
            stage.refusals = stage.server.refused.total
    assert refusing <= {to_catch_up, to_answer}  # the server never raises
    return reached, accepted


KINDS = ("moves", "adamw", "pool", "first-order")


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_messages_are_accepted_where_they_belong(kind):
    stage = Stage(kind)
    before = stage.bits()
    found = set()
    for data in stage.examples():
        for target in TARGETS:
            stage = Stage(kind)
            assert stage.bits() == before
            try:
                if target(stage, decode(data)):
                    found.add(target)
            except MessageError:
                assert stage.bits() == before
    assert found == set(TARGETS)


def grown():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_messages_are_refused_or_harmless(kind):
    Stage(kind)  # what torch imports on first use is not the messages'
    before = grown()
    reached, accepted = fuzz(kind, 1500, seed=0)
    assert reached > 150  # the mutations are not all stopped by the first check
    assert accepted > 20
    assert grown() - before < 2**26


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_hundred_thousand_mutated_messages_are_refused_or_harmless(kind, seed):
    Stage(kind)  # what torch imports on first use is not the messages'
    before = grown()
    fuzz(kind, 5000, seed)
    assert grown() - before < 2**27


def test_decoding_never_takes_more_memory_than_the_message():
    chance, whole = random.Random(0), Stage("pool").examples()
    tracemalloc.start()
    try:
        for _ in range(1500):
            data = mutated(whole, chance)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(MessageError):
                decode(data)
            assert tracemalloc.get_traced_memory()[1] - before < 3 * len(data) + 2**15
    finally:
        tracemalloc.stop()
