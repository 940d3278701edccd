"""The lattice of the client half: float32 weights on which Rademacher moves are exact. See `hosfl_kernels.snap_`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hosfl_kernels import snap_

STEPS = 1 << 24  # float32 holds every multiple of the quantum up to this many exactly


class LatticeError(ArithmeticError):
    """A move that would leave the lattice: weights or coefficients have grown too large for the quantum."""


@dataclass(frozen=True)
class Lattice:
    """The quantum: every weight, step size and coefficient is a multiple of it, and stays below 2^24 of it."""

    quantum: float

    @classmethod
    def snap(cls, parameters: Sequence[Tensor], headroom: float = 16.0) -> Lattice:
        """Put float32 parameters on their lattice, in place. The same weights give the same lattice everywhere.

        Weights may grow to `headroom` times the largest: room for training from a small initialisation, at the price
        of 3 bits against the tightest lattice. A step of 2^-10 is still a thousand quanta.
        """
        return cls(snap_([p.detach() for p in parameters], headroom=headroom))

    @property
    def limit(self) -> float:
        return STEPS * self.quantum

    def nearest(self, value: float) -> float:
        """The nearest multiple of the quantum; at least one quantum, for a step size must not vanish."""
        return self._times(max(1, round(value / self.quantum)))

    def stochastic(self, value: float, uniform: float) -> float:
        """A neighbouring multiple of the quantum, right on average over uniform in [0, 1)."""
        if not math.isfinite(value) or abs(value) >= self.limit:
            raise LatticeError(
                f"the coefficient {value:g} is beyond the lattice's limit {self.limit:g}: lower the rate"
            )
        return self._times(math.floor(value / self.quantum + uniform))

    def _times(self, steps: int) -> float:
        if abs(steps) >= STEPS:
            raise LatticeError(f"{steps} quanta are beyond the lattice's 2^24")
        return steps * self.quantum


def spread(coefficients: Tensor) -> float:
    """The most that records can move a weight: sum |c|."""
    return float(coefficients.abs().sum(dtype=torch.float64))
