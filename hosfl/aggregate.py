"""From the clients' scalars to one record: plain functions.

ghat = (1/P) sum_p vbar_p u_p and theta <- theta - rate * ghat, so the record of a round is P coefficients
-rate * vbar_p / P, and the step is theta += sum_p coefficient_p u_p. A rate may be normalised by the gradient's length,
which the scalars tell for nothing: for Rademacher and for normal directions E vbar_p^2 = |g|^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hosfl.lattice import Lattice
from hosfl.seeds import Purpose, round_seed
from hosfl_kernels import derive


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m weights[m] values[m] / sum_m weights[m], in float64; weights are numbers of samples."""
    total = sum(weights)
    return sum(
        (w / total * v.double() for v, w in zip(values, weights, strict=True)), torch.zeros((), dtype=torch.float64)
    )


def sgd_coefficients(mean: Tensor, rate: float) -> list[float]:
    """-rate * vbar_p / P, in float64."""
    return [-rate * v / len(mean) for v in mean.tolist()]


@dataclass
class RunningLength:
    """The length of recent gradients: the root of a bias-corrected running mean of their squares."""

    decay: float = 0.9
    mean: float = 0.0
    weight: float = 0.0

    def update(self, square: float) -> float:
        """Take in one squared length; returns the running length, never zero."""
        self.mean = self.decay * self.mean + (1 - self.decay) * square
        self.weight = self.decay * self.weight + (1 - self.decay)
        return math.sqrt(self.mean / self.weight) + 1e-8


def commit(coefficients: Sequence[float], lattice: Lattice | None, run_seed: int, round: int) -> Tensor:
    """The record that is committed, float32 [P].

    On a lattice each coefficient becomes a multiple of the quantum, stochastically: fresh directions carry no
    remainder to the next round, and a plain rounding would swallow small steps. Raises LatticeError.
    """
    if lattice is not None:
        seed = round_seed(run_seed, Purpose.COEFFICIENTS, round)
        coefficients = [lattice.stochastic(c, derive(seed, p, 0) / 2.0**64) for p, c in enumerate(coefficients)]
    return torch.tensor(coefficients, dtype=torch.float32)
