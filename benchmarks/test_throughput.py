"""Seconds per pass over one large tensor, by pytest-benchmark. `make bench` makes the table."""

import pytest
import torch

from benchmarks.ways import BFLOAT16, FLOAT16, RANDN_PRODUCTS, RANDN_RECORDS, WAYS


@pytest.mark.parametrize("way", [*WAYS, *BFLOAT16, *FLOAT16], ids=lambda w: f"{w.group}: {w.name}")
def test_throughput(benchmark, way, device, elements):
    dtype = torch.bfloat16 if way in BFLOAT16 else torch.float16 if way in FLOAT16 else torch.float32
    x = (torch.randn(elements, device=device) * 0.02).to(dtype)

    def once():
        way.move(x)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{device} {way.group}"
    benchmark.extra_info.update(device=device, group=way.group, name=way.name, bytes=2 * x.nbytes)
    on_cpu = device == "cpu"
    if on_cpu and way.name in (RANDN_RECORDS, RANDN_PRODUCTS):  # half a minute a round, and no warm-up matters
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

    def once():
        y.copy_(x)
        torch.cuda.synchronize()

    benchmark.extra_info.update(device="cuda", group="perturb", name="copy (bandwidth)", bytes=2 * x.nbytes)
    once()
    benchmark.pedantic(once, rounds=15)
