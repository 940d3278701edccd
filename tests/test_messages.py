"""Messages: encode and decode are inverses, sizes are real bytes, wrong bytes are refused."""

import random
import struct
import zlib

import pytest
import torch

from hosfl.methods.tensors import decoded as decode
from hosfl.methods.tensors import with_tensors
from hosfl.protocol.messages import (
    CRC,
    HEADER,
    MESSAGES,
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
    Wire,
    encode,
    pack,
    unpack,
)

NO_DIGEST, DIGEST = torch.empty(0, dtype=torch.int32), torch.arange(8, dtype=torch.int32)
RUN = torch.arange(8, dtype=torch.uint8)
EXAMPLES = [
    Hello(client=3, round=17),
    Records(client=3, round=17, coefficients=torch.randn(4, 5), rates=torch.randn(4), digest=DIGEST),
    Records(client=0, round=0, coefficients=torch.empty(0, 5), rates=torch.empty(0), digest=NO_DIGEST),
    PoolMoves(client=1, round=3, coefficients=torch.randn(2, 8), until=torch.tensor([19]).int(), digest=DIGEST),
    Differs(client=1, round=3, epoch=2**16 - 1, digest=DIGEST),
    Cut(client=2**32 - 1, round=2**32 - 1, epoch=7, cut=torch.randn(3, 2, 4), labels=torch.tensor([1, 2, 3]).int()),
    Cut(
        client=1,
        round=2,
        cut=torch.randn(3, 2).bfloat16(),
        labels=torch.tensor([1, 2, 3]).int(),
        mask=torch.ones(3, 2, dtype=torch.uint8),
    ),
    Multiplier(client=1, round=2, multiplier=torch.randn(3, 2, 4).half()),
    Scalars(client=1, round=2, scalars=torch.randn(5)),
    Weights(client=1, round=2, weights=torch.randn(70)),
    Gradient(client=1, round=2, gradient=torch.randn(70)),
    ProbedCut(
        client=1,
        round=2,
        cut=torch.randn(3, 2),
        labels=torch.tensor([1, 2, 3]).int(),
        displaced=torch.randn(4, 3, 2),
    ),
    Losses(client=1, round=2, losses=torch.randn(4)),
    Trained(client=1, round=2, weights=torch.randn(70)),
    Statistics(client=1, round=0, statistics=torch.randn(8), samples=torch.tensor([256]).int()),
    Calibration(client=1, round=0, statistics=torch.randn(8)),
    Cut(
        client=1,
        round=2,
        cut=torch.randint(-127, 128, (4, 33)).to(torch.int8),
        labels=torch.zeros(4, dtype=torch.int32),
        scales=torch.rand(3),
    ),
    Invitation(client=1, round=7, epoch=2, run=RUN),
    Complaint(client=1, round=7, text=torch.tensor([110, 111], dtype=torch.uint8)),
    Audit(client=1, round=7, run=RUN),
    Audited(client=1, round=7, digest=torch.arange(8).int()),
    Refusal(client=1, round=7, text=torch.tensor([110, 111], dtype=torch.uint8)),
    Statistics(client=1, round=0, statistics=torch.empty(0), samples=NO_DIGEST),
    Calibration(client=1, round=0, run=RUN, statistics=torch.empty(0)),
]
SCALARS = EXAMPLES[8]


def sealed(data):
    """The bytes with the checksum that they ought to have."""
    data = bytearray(data)
    crc = zlib.crc32(data[HEADER.size :], zlib.crc32(data[: HEADER.size - CRC.size]))
    data[HEADER.size - CRC.size : HEADER.size] = CRC.pack(crc)
    return bytes(data)


def arrays(message):
    return [getattr(message, name) for name in message.arrays()]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip_and_size(message):
    data = encode(message)
    assert message.nbytes == len(data)
    back = decode(data)
    assert type(back) is type(message)
    assert (back.client, back.round, back.epoch) == (message.client, message.round, message.epoch)
    for a, b in zip(arrays(with_tensors(message)), arrays(back), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)
        assert a.numel() == 0 or a.data_ptr() != b.data_ptr()


def test_every_kind_has_an_example():
    assert {type(m) for m in EXAMPLES} == set(MESSAGES.values())


def test_scalars_cost_four_bytes_each():
    assert SCALARS.sizes()["scalars up"] == 20
    assert EXAMPLES[1].sizes() == {
        "framing down": 20 + 4 * 4 + 4 * 6,
        "scalars down": 4 * 4 * 5 + 16,
        "digest down": 32,
    }
    assert EXAMPLES[0].nbytes == 20


@pytest.mark.parametrize("seal", [bytes, sealed], ids=["as it is", "with a right checksum"])
@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_truncation_is_refused(message, seal):
    data = encode(message)
    for length in range(len(data)):
        cut = data[:length]
        with pytest.raises(MessageError):
            decode(seal(cut) if length >= HEADER.size else cut)
    with pytest.raises(MessageError, match="too many" if seal is sealed else "checksum"):
        decode(seal(data + b"\0"))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_flipped_bit_is_found(message):
    data = encode(message)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MessageError):
            decode(bytes(flipped))


def test_bits_flipped_behind_the_checksum_are_refused_or_harmless():
    flip = random.Random(0)
    for _ in range(3000):
        data = bytearray(encode(flip.choice(EXAMPLES)))
        for _ in range(flip.randint(1, 4)):
            data[flip.randrange(len(data))] ^= 1 << flip.randrange(8)
        data = sealed(data)
        try:
            message = decode(data)
        except MessageError:
            continue
        assert encode(message) == data


def test_a_huge_claim_allocates_nothing():
    data = bytearray(encode(SCALARS))
    data[-24:-20] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(MessageError, match="17179869180 bytes"):
        decode(sealed(data))


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 7 + (0,), (0,) + (2**32 - 1,) * 7, (2**32 - 1, 2**31, 0)])
def test_a_shape_beyond_all_memory_is_refused_though_it_is_empty(shape):
    header = HEADER.pack(b"HSF1", Cut.kind, len(Cut.arrays()), 0, 0, 0, 0)
    cut = struct.pack("<BBH", 1, len(shape), 0) + struct.pack(f"<{len(shape)}I", *shape)
    labels = struct.pack("<BBHI", 4, 1, 0, 0)
    with pytest.raises(MessageError, match="says shape"):
        decode(sealed(header + cut + labels))


def test_too_many_dims_and_too_many_bytes_are_refused():
    header = HEADER.pack(b"HSF1", Cut.kind, len(Cut.arrays()), 0, 0, 0, 0)
    with pytest.raises(MessageError, match="9 dims"):
        decode(sealed(header + struct.pack("<BBH9I", 1, 9, 0, *[1] * 9) + bytes(4)))
    data = encode(SCALARS)
    decode(data, len(data))
    with pytest.raises(MessageError, match="the largest"):
        decode(data, len(data) - 1)


@pytest.mark.parametrize("number", [{"round": 2**32}, {"epoch": 2**16}, {"client": 2**32}, {"round": -1}])
def test_numbers_that_fit_no_header_are_refused_when_encoded(number):
    with pytest.raises(MessageError, match="does not fit a header"):
        encode(Hello(**{"client": 0, "round": 0, **number}))


def test_wrong_arrays_are_refused_when_encoded():
    with pytest.raises(MessageError, match="float64"):
        encode(Scalars(client=0, round=0, scalars=torch.zeros(5, dtype=torch.float64)))
    with pytest.raises(MessageError, match="dims"):
        encode(Scalars(client=0, round=0, scalars=torch.zeros(5, 1)))


def test_the_wire_counts_and_shares_nothing():
    wire = Wire()
    scalars = torch.ones(5)
    one, other = Losses(client=0, round=0, losses=scalars), Audit(client=0, round=0)
    received = unpack(wire.carry(0, [one, other]))
    scalars.zero_()
    assert torch.equal(decode(received[0]).losses, torch.ones(5))
    assert type(decode(received[1])) is Audit
    assert wire.bytes == {"losses down": 20, "framing down": 28 + 28 + 2 * 4}
    wire.count(Scalars(client=0, round=1, scalars=scalars))
    assert wire.bytes == {"losses down": 20, "framing down": 64, "scalars up": 20, "framing up": 28}


def test_messages_that_travel_together():
    parts = [encode(message) for message in EXAMPLES[:3]]
    together = pack(parts)
    assert unpack(together) == parts
    assert unpack(b"") == []
    for end in range(1, len(together)):
        whole = [n for n in range(4) if len(pack(parts[:n])) == end]
        if whole:
            assert unpack(together[:end]) == parts[: whole[0]]
        else:
            with pytest.raises(MessageError, match="cut off"):
                unpack(together[:end])
    assert len(unpack(pack(parts[:1] * 4))) == 4
    with pytest.raises(MessageError, match="more than 4"):
        unpack(pack(parts[:1] * 5))
    with pytest.raises(MessageError, match="4294967295 bytes is cut off"):
        unpack(b"\xff" * 8)
