"""The lattice of the client half: float32 weights on which Rademacher moves are exact. See `hosfl_kernels.snap_`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.arrays import Array, is_tensor
from hosfl_kernels import snap_

STEPS = 1 << 24  # float32 represents every multiple of the quantum up to this one exactly
COARSER = 16  # the ratio of a coarser lattice's quantum to the finer one's


class LatticeError(ArithmeticError):
    """A move would leave the lattice: weights or coefficients have grown too large for the quantum."""


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

        Weights may grow to `headroom` times the largest, as training from a small initialisation needs, which costs 3
        bits of precision. A step of 2^-10 is still a thousand quanta.
        """
        plain = [p.detach() if is_tensor(p) else p for p in parameters]
        return cls(snap_(plain, factors=factors, headroom=headroom))

    @classmethod
    def holding(cls, largest: float, headroom: float = 16.0) -> Lattice:
        """The lattice that `snap` makes for weights of at most this size, which is above 0 and finite."""
        return cls(math.ldexp(1.0, math.frexp(headroom * largest)[1]) / STEPS)

    def put(self, parameters: Sequence[Array], factors: Sequence[float]) -> None:
        """Put parameters on this lattice, in place, as `snap` has done to the same weights in another process."""
        for parameter, factor in zip(parameters, factors, strict=True):
            step = self.quantum * factor
            if is_tensor(parameter):
                parameter.detach().div_(step).round_().mul_(step).add_(0.0)
            else:
                parameter[...] = np.rint(parameter / np.float32(step)) * np.float32(step) + np.float32(0)

    def coarser(self) -> Lattice:
        """The next coarser lattice, for weights that have outgrown this one."""
        return Lattice(self.quantum * COARSER)

    @property
    def exponent(self) -> int:
        """The exponent of the quantum, which is a power of two."""
        return math.frexp(self.quantum)[1] - 1

    @property
    def limit(self) -> float:
        """The bound of |weight| / factor."""
        return STEPS * self.quantum

    def nearest(self, value: float, at_least_one: bool = False) -> float:
        """The nearest multiple of the quantum, ties to even. at_least_one: at least one quantum, as for a step size."""
        self._check(value)
        steps = round(value / self.quantum)
        return (max(1, steps) if at_least_one else steps) * self.quantum

    def stochastic(self, value: float, uniform: float) -> float:
        """Round stochastically to a multiple of the quantum: without bias, if uniform is uniform in [0, 1)."""
        self._check(value)
        return math.floor(value / self.quantum + uniform) * self.quantum

    def _check(self, value: float) -> None:
        if not math.isfinite(value) or abs(value) >= self.limit:
            raise LatticeError(f"{value:g} is beyond the lattice's limit {self.limit:g}: lower the client's rate")


def spread(coefficients: NDArray[np.float32]) -> float:
    """The most that coefficients can move a weight, in units of its factor: sum |c|."""
    return float(np.abs(coefficients).sum(dtype=np.float64))
