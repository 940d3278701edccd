"""The lattice of the client half: float32 weights on which Rademacher moves are exact. See `hosfl_kernels.snap_`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.arrays import Array, is_tensor
from hosfl_kernels import snap_

STEPS = 1 << 24  # float32 holds every multiple of the quantum up to this many exactly
COARSER = 16  # a lattice that has become too small makes room for weights 16 times as large


class LatticeError(ArithmeticError):
    """A move that would leave the lattice: weights or coefficients have grown too large for the quantum."""


@dataclass(frozen=True)
class Lattice:
    """The quantum, in units of a tensor's factor.

    Every step size and coefficient is a multiple of it; every weight of tensor t is a multiple of quantum * factor_t
    and stays below 2^24 of that.
    """

    quantum: float

    @classmethod
    def snap(cls, parameters: Sequence[Array], factors: Sequence[float], headroom: float = 16.0) -> Lattice:
        """Put float32 parameters on their lattice, in place. The same weights give the same lattice everywhere.

        Weights may grow to `headroom` times the largest: room for training from a small initialisation, at the price
        of 3 bits against the tightest lattice. A step of 2^-10 is still a thousand quanta.
        """
        plain = [p.detach() if is_tensor(p) else p for p in parameters]
        return cls(snap_(plain, factors=factors, headroom=headroom))

    @classmethod
    def holding(cls, largest: float, headroom: float = 16.0) -> Lattice:
        """The lattice that `snap` makes for weights of this size at most; above 0 and finite."""
        return cls(math.ldexp(1.0, math.frexp(headroom * largest)[1]) / STEPS)

    def put(self, parameters: Sequence[Array], factors: Sequence[float]) -> None:
        """Put parameters on this very lattice, in place: what `snap` did to the same weights in another process."""
        for parameter, factor in zip(parameters, factors, strict=True):
            step = self.quantum * factor
            if is_tensor(parameter):
                parameter.detach().div_(step).round_().mul_(step).add_(0.0)
            else:
                parameter[...] = np.rint(parameter / np.float32(step)) * np.float32(step) + np.float32(0)

    def coarser(self) -> Lattice:
        """The next lattice, for weights that have outgrown this one."""
        return Lattice(self.quantum * COARSER)

    @property
    def exponent(self) -> int:
        """Of the quantum, a power of two."""
        return math.frexp(self.quantum)[1] - 1

    @property
    def limit(self) -> float:
        """The largest weight / factor."""
        return STEPS * self.quantum

    def nearest(self, value: float, at_least_one: bool = False) -> float:
        """The nearest multiple of the quantum, ties to even. A step size must not vanish: at least one quantum."""
        self._check(value)
        steps = round(value / self.quantum)
        return (max(1, steps) if at_least_one else steps) * self.quantum

    def stochastic(self, value: float, uniform: float) -> float:
        """A neighbouring multiple of the quantum, right on average over uniform in [0, 1)."""
        self._check(value)
        return math.floor(value / self.quantum + uniform) * self.quantum

    def _check(self, value: float) -> None:
        if not math.isfinite(value) or abs(value) >= self.limit:
            raise LatticeError(f"{value:g} is beyond the lattice's limit {self.limit:g}: lower the client's rate")


def spread(coefficients: NDArray[np.float32]) -> float:
    """The most that records can move a weight, in units of its factor: sum |c|."""
    return float(np.abs(coefficients).sum(dtype=np.float64))
