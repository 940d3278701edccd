"""Many probes in one forward pass: perturbed weights get another dimension, with a copy for each probe.

`torch.func.vmap` takes that dimension through the layers. Layers before the first perturbed weight run once. A later
layer with frozen weights sees n copies of a batch as one batch, n times as large. That pays where batches are small, so
that most time goes into reading weights and launching operations; it costs the memory of n batches' activations.
Forward mode gains most: its pass at th, which every tangent needs, runs once for all of them.

An operation without a batching rule runs copy by copy, as fast as separate passes; torch warns of it. Attention on CPUs
is one. Its warning is suppressed: the loop is as fast as one large call, and three times as fast as the matrix products
and the softmax that have rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from hosfl.halves.inputs import Inputs, call
from hosfl.probing.displaced import WeightCopies, displaced, no_autocast_cache, refuse_writers
from hosfl.probing.forward_mode import differentiable
from hosfl.probing.probe import PerturbedTensors, inner
from hosfl_kernels import perturb_

# Set once and for all: changing filters makes Python forget which other warnings it has shown.
warnings.filterwarnings("ignore", ".*batching rule for aten::_scaled_dot_product_flash_attention_for_cpu")


def probe_batched(
    module: nn.Module,
    inputs: Inputs,
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
    dist: str,
    perturbed: PerturbedTensors | None = None,
    two_sided: bool = False,
    *,
    at_once: int,
) -> Tensor:
    """Measure directional derivatives by differences, `at_once` probes per pass. Returns v, float32 [P].

    v_p as in `probe_untouched`, and with the same bits of weights. Larger batches are summed in another order, so that
    v_p differs by the rounding of a pass, divided by mu. at_once: 1 or more; the last pass takes the rest. Other
    arguments are those of `probe_untouched`. Weights are only read, on a lattice or off it.

    Memory: at_once times the perturbed weights, and the activations after the first of them. Call it under
    `evaluating`, as the pass that made `cut`.

    Raises: ValueError for at_once below 1, and for a module that torch cannot batch, though `probe_untouched` may take
    it: nn.LSTM, GRU and RNN, layers of experts, and any that read single values of a tensor, or whose shapes depend on
    values; torch.OutOfMemoryError; else as `evaluate_displaced`.
    """
    target = perturbed or PerturbedTensors.of(module)

    def outputs(chunk: Sequence[int], step: float) -> Tensor:
        weights = _perturbed_copies(target.tensors, target, chunk, step, dist)
        return vmap(lambda *copies: _output_with(module, inputs, target.tensors, copies))(*weights)

    def measure(chunk: Sequence[int]) -> list[float]:
        ahead = outputs(chunk, mu)
        behind, distance = (outputs(chunk, -mu), 2 * mu) if two_sided else (cut.expand_as(ahead), mu)
        return [inner(multiplier, a, b, distance) for a, b in zip(ahead, behind, strict=True)]

    return _in_chunks(module, measure, seeds, at_once)


def probe_forward_batched(
    module: nn.Module,
    inputs: Inputs,
    multiplier: Tensor,
    seeds: Sequence[int],
    dist: str,
    perturbed: PerturbedTensors | None = None,
    *,
    at_once: int,
) -> Tensor:
    """Compute directional derivatives by forward mode, `at_once` per pass. Returns v, float32 [P].

    v_p as in `probe_forward`. A pass computes the output at th once for all of its tangents. All else as in
    `probe_batched`.
    """
    target = perturbed or PerturbedTensors.of(module)
    weights = tuple(p.detach() for p in target.tensors)

    def output(*duals: Tensor) -> Tensor:
        return _output_with(module, inputs, target.tensors, duals)

    def measure(chunk: Sequence[int]) -> list[float]:
        tangents = _perturbed_copies([torch.zeros_like(p) for p in weights], target, chunk, 1.0, dist)
        with differentiable():
            changes = vmap(lambda *us: jvp(output, weights, us)[1])(*tangents)
        return [inner(multiplier, change, torch.zeros_like(change), 1.0) for change in changes]

    return _in_chunks(module, measure, seeds, at_once)


def _perturbed_copies(
    tensors: Sequence[Tensor], target: PerturbedTensors, seeds: Sequence[int], step: float, dist: str
) -> list[Tensor]:
    """Return, for each tensor t, t + step * u_p for every seed: [len(seeds), *t.shape].

    target: has the streams and factors of u_p.
    """
    row_major = torch.contiguous_format
    copies = [t.detach().expand(len(seeds), *t.shape).clone(memory_format=row_major) for t in tensors]
    for number, seed in enumerate(seeds):
        rows = [copy[number] for copy in copies]
        perturb_(rows, seed, step, dist=dist, factors=target.factors, streams=target.streams)
    return copies


def _output_with(module: nn.Module, inputs: Inputs, parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The module's output with these weights in place of its parameters."""
    with displaced(module, WeightCopies(parameters, weights)):
        output: Tensor = call(module, inputs)
    return output


@torch.no_grad()
@no_autocast_cache()
def _in_chunks(
    module: nn.Module, measure: Callable[[Sequence[int]], list[float]], seeds: Sequence[int], at_once: int
) -> Tensor:
    """Measure `at_once` seeds at a time, and return all results. Raises ValueError for what torch cannot batch."""
    if at_once < 1:
        raise ValueError(f"at_once must be 1 or more, got {at_once}")
    refuse_writers(module)
    scalars: list[float] = []
    for first in range(0, len(seeds), at_once):
        chunk = seeds[first : first + at_once]
        try:
            scalars += measure(chunk)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{len(chunk)} probes do not go through this half in one pass: set probes_at_once=1, which takes them"
                f" one by one. torch says: {reason}"
            ) from error
    return torch.tensor(scalars, dtype=torch.float32)
