"""Messages: encode and decode are inverses, sizes are real bytes, wrong bytes are refused."""

import random

import pytest
import torch

from hosfl.messages import (
    MESSAGES,
    Cut,
    Gradient,
    Hello,
    MessageError,
    Multiplier,
    Records,
    Scalars,
    Weights,
    Wire,
    decode,
    encode,
)

EXAMPLES = [
    Hello(client=3, round=17),
    Records(client=3, round=17, coefficients=torch.randn(4, 5)),
    Records(client=0, round=0, coefficients=torch.empty(0, 5)),
    Cut(client=2**32 - 1, round=2**32 - 1, epoch=7, cut=torch.randn(3, 2, 4), labels=torch.tensor([1, 2, 3]).int()),
    Cut(client=1, round=2, cut=torch.randn(3, 2).bfloat16(), labels=torch.tensor([1, 2, 3]).int()),
    Multiplier(client=1, round=2, multiplier=torch.randn(3, 2, 4).half()),
    Scalars(client=1, round=2, scalars=torch.randn(5)),
    Weights(client=1, round=2, weights=torch.randn(70)),
    Gradient(client=1, round=2, gradient=torch.randn(70)),
]


def arrays(message):
    return [getattr(message, name) for name in message.arrays()]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip_and_size(message):
    data = encode(message)
    assert message.nbytes == len(data)
    back = decode(data)
    assert type(back) is type(message)
    assert (back.client, back.round, back.epoch) == (message.client, message.round, message.epoch)
    for a, b in zip(arrays(message), arrays(back), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)
        assert a.numel() == 0 or a.data_ptr() != b.data_ptr()


def test_every_kind_has_an_example():
    assert {type(m) for m in EXAMPLES} == set(MESSAGES.values())


def test_scalars_cost_four_bytes_each():
    assert EXAMPLES[6].sizes()["scalars up"] == 20
    assert EXAMPLES[1].sizes()["scalars down"] == 4 * 4 * 5


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_truncation_is_refused(message):
    data = encode(message)
    for length in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:length])
    with pytest.raises(MessageError, match="too many"):
        decode(data + b"\0")


def test_flipped_bits_are_refused_or_harmless():
    flip = random.Random(0)
    for _ in range(5000):
        data = bytearray(encode(flip.choice(EXAMPLES)))
        for _ in range(flip.randint(1, 4)):
            data[flip.randrange(len(data))] ^= 1 << flip.randrange(8)
        try:
            message = decode(bytes(data))
        except MessageError:
            continue
        assert encode(message) == bytes(data)


def test_a_huge_claim_allocates_nothing():
    data = bytearray(encode(EXAMPLES[6]))
    data[-24:-20] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(MessageError, match="17179869180 bytes"):
        decode(bytes(data))


def test_wrong_arrays_are_refused_when_encoded():
    with pytest.raises(MessageError, match="float64"):
        encode(Scalars(client=0, round=0, scalars=torch.zeros(5, dtype=torch.float64)))
    with pytest.raises(MessageError, match="dims"):
        encode(Scalars(client=0, round=0, scalars=torch.zeros(5, 1)))


def test_the_wire_counts_and_shares_nothing():
    wire = Wire()
    scalars = torch.ones(5)
    received = wire.carry(Scalars(client=0, round=0, scalars=scalars))
    scalars.zero_()
    assert torch.equal(received.scalars, torch.ones(5))
    wire.carry(Scalars(client=0, round=1, scalars=scalars))
    assert wire.bytes == {"scalars up": 40, "framing up": 2 * 24}
