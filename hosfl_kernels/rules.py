"""Update rules: their moments, constants and step sizes. The arithmetic is `spec.update`.

Numbers that depend only on the round are computed here, in float64 from the round's global number, and rounded once to
float32. So a client that missed rounds computes the same numbers as one that missed none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hosfl_kernels.cpu import ieee_arithmetic

__all__ = ["SGD", "AdamW"]


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent: m = momentum * m + g; x = keep * x - rate * m, without momentum m = g.

    Args:
        momentum: 0 <= momentum < 1 (in float32). The rule has one moment per weight, or none if this is 0.
        weight_decay: 0 or more, decoupled: x shrinks by the factor keep = 1 - rate * weight_decay, and the momentum
            does not include it. Without momentum this is torch.optim.SGD; with momentum, only if weight_decay = 0.

    Raises: ValueError for a number out of range.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction(self.momentum, "momentum")
        _check_weight_decay(self.weight_decay)

    @property
    def moments(self) -> int:
        """How many float32 numbers the rule keeps per weight."""
        return int(self.momentum > 0)

    @property
    def name(self) -> str:
        """The rule's name in spec.py and the kernels."""
        return "momentum" if self.moments else "sgd"

    @property
    def constants(self) -> list[float]:
        """The rule's numbers that no round changes, in the order of spec.py; backends round them to float32."""
        return [self.momentum] if self.moments else []

    @ieee_arithmetic
    def steps(self, rounds: Sequence[int], rates: Sequence[float]) -> NDArray[np.float32]:
        """(rate, keep, root) of every round, a float32 array [R, 3].

        Args:
            rounds: the rounds' global numbers, counted from 0.
            rates: the learning rate of each round, 0 or more.

        Formula: rate = the learning rate, keep = 1 - rate * weight_decay, root = 1 (unused); in float64, rounded once.

        Raises: ValueError, TypeError.
        """
        _check_rounds(rounds, rates)
        return _step_table([(rate, 1 - rate * self.weight_decay, 1.0) for rate in rates])


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, as torch.optim.AdamW (Loshchilov and Hutter, ICLR 2019).

    m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * g^2; x = keep * x - rate * m / (sqrt(v) * root + eps).

    Args:
        betas: b1 and b2, 0 <= beta < 1 (in float32).
        eps: above 0 (in float32): without it the step of a weight that never had a gradient would be 0 / 0.
        weight_decay: 0 or more.

    Raises: ValueError for a number out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if not hasattr(self.betas, "__len__") or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for k, beta in enumerate(self.betas):
            _check_fraction(beta, f"betas[{k}]")
        _check_number(self.eps, "eps")
        if not (self.eps > 2.0**-150 and math.isfinite(self.eps)):  # 2^-150 and less is 0 in float32
            raise ValueError(f"eps must be finite and above 0 in float32, got {self.eps}")
        _check_weight_decay(self.weight_decay)

    @property
    def moments(self) -> int:
        """How many float32 numbers the rule keeps per weight: m, then v."""
        return 2

    @property
    def name(self) -> str:
        """The rule's name in spec.py and the kernels."""
        return "adamw"

    @property
    def constants(self) -> list[float]:
        """b1, 1 - b1, b2, 1 - b2, eps: computed in float64; backends round them to float32."""
        b1, b2 = self.betas
        return [b1, 1 - b1, b2, 1 - b2, self.eps]

    @ieee_arithmetic
    def steps(self, rounds: Sequence[int], rates: Sequence[float]) -> NDArray[np.float32]:
        """(rate, keep, root) of every round, a float32 array [R, 3].

        Args:
            rounds: the rounds' global numbers, counted from 0: Adam's t is round + 1.
            rates: the learning rate of each round, 0 or more.

        Formula, in float64 and rounded once: rate = learning rate / (1 - b1^t), keep = 1 - learning rate *
        weight_decay, root = 1 / sqrt(1 - b2^t).

        Raises: ValueError, TypeError.
        """
        _check_rounds(rounds, rates)
        b1, b2 = self.betas
        rows = []
        for number, rate in zip(rounds, rates, strict=True):
            t = int(number) + 1
            root = 1 / math.sqrt(1 - _power(b2, t))
            rows.append((rate / (1 - _power(b1, t)), 1 - rate * self.weight_decay, root))
        return _step_table(rows)


Rule = SGD | AdamW


def _power(base: float, exponent: int) -> float:
    """base^exponent by squaring: products only, so that the bits do not depend on the machine's `pow`."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _step_table(rows: list[tuple[float, float, float]]) -> NDArray[np.float32]:
    """The rows as float32 [R, 3], rounded once."""
    return np.array(rows, np.float64).reshape(len(rows), 3).astype(np.float32)


def _check_number(value: float, name: str) -> None:
    """Raise TypeError for a value that is not a number."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_fraction(value: float, name: str) -> None:
    """Raise TypeError or ValueError unless 0 <= value < 1 in float32."""
    _check_number(value, name)
    if not 0 <= value < 1 - 2.0**-25:  # larger values round to 1
        raise ValueError(f"{name} must be at least 0 and below 1 in float32, got {value}")


def _check_weight_decay(value: float) -> None:
    """Raise TypeError or ValueError unless the value is finite and 0 or more."""
    _check_number(value, "weight_decay")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"weight_decay must be finite and 0 or more, got {value}")


def _check_rounds(rounds: Sequence[int], rates: Sequence[float]) -> None:
    """Raise TypeError or ValueError unless each round is an integer from 0 on and has a rate from 0 on."""
    for name, values in (("rounds", rounds), ("rates", rates)):
        if not hasattr(values, "__len__"):
            raise TypeError(f"{name} must be a list, one for each round, got {type(values).__name__}")
    if len(rounds) != len(rates):
        raise ValueError(f"{len(rounds)} rounds but {len(rates)} rates")
    for r, number in enumerate(rounds):
        if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
            raise TypeError(f"rounds[{r}] must be an integer, got {type(number).__name__}")
        if number < 0:
            raise ValueError(f"rounds[{r}] must be 0 or more, got {number}")
    for r, rate in enumerate(rates):
        _check_number(rate, f"rates[{r}]")
        if not (rate >= 0 and math.isfinite(rate)):
            raise ValueError(f"rates[{r}] must be finite and 0 or more, got {rate}")
