"""Many probes in one forward pass: weights that move get a dimension more, a copy for each probe; nothing else does.

`torch.func.vmap` takes that dimension through the layers. What comes before the first weight that moves runs once; to
a layer behind it whose weights stay, n copies of a batch are one batch, n times as large. That pays where a batch is
small, and time goes into reading weights and starting operations; it costs the memory of n batches' activations.
Forward mode gains most: its pass at th itself, which every tangent needs, is made once for all of them.

An operation for which torch has no batching rule runs copy by copy, as it would one by one: no gain and no loss. torch
warns of it. Attention on CPUs is one, and the warning is left out: its own loop is as fast as one large call, and three
times as fast as the products and softmax that do have rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from hosfl.halves.inputs import Inputs, call
from hosfl.probing.displaced import Copies, casts_forgotten, displaced, refuse_writers
from hosfl.probing.forward_mode import differentiable
from hosfl.probing.probe import Moved, inner
from hosfl_kernels import perturb_

# For good: a filter that comes and goes makes Python forget which other warnings it has shown already.
warnings.filterwarnings("ignore", ".*batching rule for aten::_scaled_dot_product_flash_attention_for_cpu")


def probe_batched(
    module: nn.Module,
    inputs: Inputs,
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
    dist: str,
    moved: Moved | None = None,
    two_sided: bool = False,
    *,
    at_once: int,
) -> Tensor:
    """Directional derivatives from differences, float32 [P], `at_once` probes in a pass: v_p as in `probe_untouched`.

    A copy's weights have the bits that they have there; a larger batch is summed in another order, so that v_p differs
    by what a pass rounds over mu. at_once: 1 or more; the last pass takes what is left. Other arguments are those of
    `probe_untouched`. Weights are only read, on a lattice or off it: th + mu * u_p is as exact in a copy.

    Memory: at_once times the weights that move, and the activations behind the first of them. Call it under
    `evaluating`, as what made `cut`.

    Raises: ValueError for at_once below 1, and for a module that torch cannot batch though `probe_untouched` may take
    it: nn.LSTM, GRU and RNN, layers of experts, and whatever reads single numbers of a tensor, or whose shapes depend
    on them; torch.OutOfMemoryError; else as `evaluate_displaced`.
    """
    moving = moved or Moved.of(module)

    def outputs(some: Sequence[int], step: float) -> Tensor:
        weights = _copies(moving.tensors, moving, some, step, dist)
        return vmap(lambda *copies: _at(module, inputs, moving.tensors, copies))(*weights)

    def measure(some: Sequence[int]) -> list[float]:
        ahead = outputs(some, mu)
        behind, distance = (outputs(some, -mu), 2 * mu) if two_sided else (cut.expand_as(ahead), mu)
        return [inner(multiplier, a, b, distance) for a, b in zip(ahead, behind, strict=True)]

    return _some_at_a_time(module, measure, seeds, at_once)


def probe_forward_batched(
    module: nn.Module,
    inputs: Inputs,
    multiplier: Tensor,
    seeds: Sequence[int],
    dist: str,
    moved: Moved | None = None,
    *,
    at_once: int,
) -> Tensor:
    """Directional derivatives by forward mode, float32 [P], `at_once` of them in a pass: v_p as in `probe_forward`.

    One pass at th, and for each direction what its tangent takes beside that. All else as in `probe_batched`.
    """
    moving = moved or Moved.of(module)
    at = tuple(p.detach() for p in moving.tensors)

    def output(*duals: Tensor) -> Tensor:
        return _at(module, inputs, moving.tensors, duals)

    def measure(some: Sequence[int]) -> list[float]:
        tangents = _copies([torch.zeros_like(p) for p in at], moving, some, 1.0, dist)
        with differentiable():
            changes = vmap(lambda *us: jvp(output, at, us)[1])(*tangents)
        return [inner(multiplier, change, torch.zeros_like(change), 1.0) for change in changes]

    return _some_at_a_time(module, measure, seeds, at_once)


def _copies(tensors: Sequence[Tensor], moving: Moved, seeds: Sequence[int], step: float, dist: str) -> list[Tensor]:
    """Per tensor [len(seeds), *shape]: t + step * u_p for every seed p, u_p that of what moves."""
    row_major = torch.contiguous_format
    copies = [t.detach().expand(len(seeds), *t.shape).clone(memory_format=row_major) for t in tensors]
    for number, seed in enumerate(seeds):
        rows = [copy[number] for copy in copies]
        perturb_(rows, seed, step, dist=dist, factors=moving.factors, streams=moving.streams)
    return copies


def _at(module: nn.Module, inputs: Inputs, parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The module's output where its parameters are these weights."""
    with displaced(module, Copies(parameters, weights)):
        output: Tensor = call(module, inputs)
    return output


@torch.no_grad()
@casts_forgotten()
def _some_at_a_time(
    module: nn.Module, measure: Callable[[Sequence[int]], list[float]], seeds: Sequence[int], at_once: int
) -> Tensor:
    if at_once < 1:
        raise ValueError(f"at_once must be 1 or more, got {at_once}")
    refuse_writers(module)
    scalars: list[float] = []
    for first in range(0, len(seeds), at_once):
        some = seeds[first : first + at_once]
        try:
            scalars += measure(some)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{len(some)} probes do not go through this half in one pass: set probes_at_once=1, which takes them"
                f" one by one. torch says: {reason}"
            ) from error
    return torch.tensor(scalars, dtype=torch.float32)
