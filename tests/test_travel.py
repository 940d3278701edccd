"""Cuts and multipliers in fewer bits: what is lost, what is refused, what it saves."""

from dataclasses import replace

import pytest
import torch

from hosfl import train
from hosfl.methods.travel import BLOCK, packed, unpacked
from hosfl.protocol.messages import MessageError
from hosfl.runs.assemble import assemble
from hosfl.runs.config import Config, with_shared

SMALL = {"rounds": 4, "clients": 3, "sampled": 3, "batch": 8, "evaluate_every": 4}
WIRES = ("float32", "bfloat16", "float16", "int8")


@pytest.mark.parametrize("shape", [(1,), (64,), (65,), (3, 5, 7), (0,), (2, 64)])
@pytest.mark.parametrize("wire", WIRES)
def test_what_was_packed_comes_back(shape, wire):
    torch.manual_seed(0)
    values = torch.randn(shape) * 10 ** torch.randint(-3, 3, shape).float()
    sent, scales = packed(values, wire)
    assert sent.shape == values.shape
    back = unpacked(sent, scales, wire)
    assert back.dtype == torch.float32
    flat, found = values.reshape(-1), back.reshape(-1)
    if wire == "float32":
        assert torch.equal(values, back)
    elif wire == "int8":
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK]
            assert ((found[start : start + BLOCK] - block).abs() <= block.abs().max() / 254 * 1.001).all()
    else:
        share = {"bfloat16": 2.0**-8, "float16": 2.0**-10}[wire]
        assert ((found - flat).abs() <= flat.abs() * share + 1e-7).all()


def test_zeros_and_what_is_not_finite():
    assert torch.equal(unpacked(*packed(torch.zeros(100), "int8"), "int8"), torch.zeros(100))
    assert not unpacked(*packed(torch.tensor([1e6, 1.0]), "float16"), "float16").isfinite().all()
    for bad in (float("nan"), float("inf")):
        assert not unpacked(*packed(torch.tensor([bad, 1.0]), "int8"), "int8").isfinite().all()


def test_another_packing_is_refused():
    """But float32 says as much as "as computed", which may be in 16 bits: docs/threats.md."""
    for wire in WIRES:
        for other in WIRES:
            sent, scales = packed(torch.randn(130), other)
            if other == wire or (wire == "float32" and other != "int8"):
                unpacked(sent, scales, wire)
                continue
            with pytest.raises(MessageError, match=f"travel as {wire}"):
                unpacked(sent, scales, wire)
    sent, scales = packed(torch.randn(130), "int8")
    for wrong in (scales[:-1], torch.cat((scales, scales)), scales[None]):
        with pytest.raises(MessageError, match="scales"):
            unpacked(sent, wrong, "int8")


@pytest.mark.parametrize("method", ["ho", "first-order", "splitfed", "frozen"])
def test_a_run_in_fewer_bytes(method):
    found = {
        wire: train(Config(**with_shared({"method": method, "wire": wire, "server_rate": 0.04}, SMALL)))
        for wire in WIRES
    }
    whole = found["float32"].bytes
    for wire, share in (("bfloat16", 0.5), ("float16", 0.5), ("int8", 0.25 + 1 / 64)):
        summary = found[wire]
        assert summary.replicas.equal
        assert not summary.refused
        assert summary.loss == pytest.approx(found["float32"].loss, abs=0.05)
        assert summary.loss != found["float32"].loss
        for category in {"cut up", "multiplier down"} & set(whole):
            assert summary.bytes[category] / whole[category] == pytest.approx(share, rel=0.02)


def test_the_server_refuses_and_nothing_changes():
    federation, _ = assemble(Config(**SMALL, wire="int8"))
    server, client = federation.server, federation.load_client(0)
    good = client.output(0)
    before = {k: v.clone() for k, v in server.half.state_dict().items()}
    for wrong in (
        replace(good, cut=good.cut.float()),
        replace(good, scales=good.scales[1:]),
        replace(good, scales=good.scales * float("nan")),
    ):
        assert server.step(0, [wrong]) == ({}, pytest.approx(float("nan"), nan_ok=True))
    assert len(server.refused) == 3
    assert all(torch.equal(v, before[k]) for k, v in server.half.state_dict().items())
    multipliers, _ = server.step(0, [good])
    with pytest.raises(MessageError, match="scales"):
        client.answer(replace(multipliers[0], scales=torch.empty(0)))
    client.answer(multipliers[0])


def test_methods_that_measure_losses_send_what_they_compute():
    with pytest.raises(ValueError, match="wire = 'int8' would do nothing"):
        Config(method="zo-both", wire="int8")
