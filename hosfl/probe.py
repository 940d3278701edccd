"""Probing: the client half's directional derivatives from forward passes. It leaves no trace in the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hosfl.displaced import Displacement, Inputs, casts_forgotten, evaluate_displaced, uninterrupted
from hosfl_kernels import replay_


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
    factors: Sequence[float] | None = None,
) -> Tensor:
    """Directional derivatives along Rademacher directions, float32 [P], for weights on the lattice.

    v_p = <multiplier, forward() at th + mu * u_p - cut> / mu with u_p,t = factors[t] * z(seeds[p], streams[t]).
    Call it under `evaluating`: the weights must not be recorded by autograd.

    Moves the weights themselves: exact there, so that afterwards they hold the same bits, also if `forward` raises or
    is interrupted. From one direction to the next it takes one pass: back along u_p and out along u_(p+1). No memory
    of the weights' size. Off the lattice every move rounds: use `probe_untouched`.
    """
    scalars: list[float] = []
    standing: list[int] = []  # seeds of the directions that the weights stand displaced along: one at most

    def move(to: list[int]) -> None:
        steps = [-mu] * len(standing) + [mu] * len(to)
        with uninterrupted():
            replay_(parameters, standing + to, steps, factors=factors, streams=streams)
            standing[:] = to

    try:
        for seed in seeds:
            move([seed])
            with casts_forgotten():
                scalars.append(inner(multiplier, forward(), cut, mu))
    finally:
        move([])
    return torch.tensor(scalars, dtype=torch.float32)


def probe_untouched(
    module: nn.Module,
    inputs: Inputs,
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
    dist: str,
    factors: Sequence[float] | None = None,
) -> Tensor:
    """Directional derivatives for weights on no lattice, float32 [P]: reads th in any dtype, never writes it.

    v_p as in `probe_in_place`; each weight of th + mu * u_p is rounded to its dtype. inputs: a tensor, a tuple of
    positional arguments or a mapping of keyword arguments. dist: "rademacher" or "gaussian".

    Off the lattice adding and taking away rounds twice, and a client that probes would drift from one that does not.
    Costs the memory of one layer's weights while that layer runs. Raises as `evaluate_displaced`.
    """
    parameters, streams = trainable(module)
    scalars = []
    for seed in seeds:
        displacement = Displacement(parameters, streams, seed, mu, dist, factors)
        scalars.append(inner(multiplier, evaluate_displaced(module, inputs, displacement), cut, mu))
    return torch.tensor(scalars, dtype=torch.float32)
