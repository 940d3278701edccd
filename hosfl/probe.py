"""Probing: the client half's directional derivatives from forward passes. It leaves no trace in the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hosfl_kernels import perturb_, replay_


def trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[int]]:
    """The parameters that move, and their streams.

    A parameter's stream is its position among *all* parameters, so that freezing one changes nobody else's noise.
    Tied parameters are listed once.
    """
    numbered = [(p, stream) for stream, p in enumerate(module.parameters()) if p.requires_grad]
    return [p for p, _ in numbered], [stream for _, stream in numbered]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no graph, as it was before afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def inner(multiplier: Tensor, output: Tensor, cut: Tensor, mu: float) -> float:
    """<multiplier, output - cut> / mu, summed in float64; the difference first, for two products would cancel."""
    return float(((output - cut).double() * multiplier.double()).sum()) / mu


def probe_in_place(
    forward: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    streams: Sequence[int],
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
) -> Tensor:
    """Directional derivatives along Rademacher directions, float32 [P], for weights on the lattice.

    Moves the weights themselves: exact there, so that afterwards they hold the same bits. From one direction to the
    next it takes one pass: back along u_p and out along u_(p+1). If `forward` raises, the weights are put back first.
    """
    scalars: list[float] = []
    moved: list[int] = []  # seeds of the directions that the weights stand displaced along: one at most
    try:
        for seed in seeds:
            replay_(parameters, [*moved, seed], [-mu] * len(moved) + [mu], streams=streams)
            moved = [seed]
            scalars.append(inner(multiplier, forward(), cut, mu))
    finally:
        for seed in moved:
            perturb_(parameters, seed, -mu, streams=streams)
    return torch.tensor(scalars, dtype=torch.float32)


def probe_untouched(
    module: nn.Module,
    inputs: Tensor,
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
    dist: str,
) -> Tensor:
    """Directional derivatives for weights that are on no lattice, float32 [P]: evaluates copies, reads the weights.

    Off the lattice adding and taking away rounds twice, and a client that probes would drift from one that does not.
    Costs one copy of the trainable parameters while it runs.
    """
    parameters, streams = trainable(module)
    copies = [torch.empty_like(p) for p in parameters]
    of = {id(p): copy for p, copy in zip(parameters, copies, strict=True)}
    moved = {name: of[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    scalars = []
    for seed in seeds:
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.copy_(parameter)
        perturb_(copies, seed, mu, dist=dist, streams=streams)
        scalars.append(inner(multiplier, functional_call(module, moved, (inputs,)), cut, mu))
    return torch.tensor(scalars, dtype=torch.float32)
