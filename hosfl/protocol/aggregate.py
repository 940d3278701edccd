"""Aggregation of K clients' vectors into one step: plain functions, the same for both halves.

An aggregation takes one vector per client, float32 [n] each, and the clients' weights (numbers of samples), and gives
float64 [n]. Client half: ghat = (1/P) sum_p vbar_p u_p, vbar being the aggregate of the clients' scalars. Server half:
the aggregate of its gradients, one of each client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.arrays import Array, host, is_tensor
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl_kernels import derive

Aggregation = Callable[[Sequence[Array], Sequence[float]], Array]


def weighted_mean(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """sum_m weights[m] values[m] / sum_m weights[m]: the gradient of the loss over all their samples."""
    rows = _stack(values)
    shares = _as(rows, weights) / sum(weights)
    return (shares[:, None] * rows).sum(0)


def uniform_mean(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """The mean of the clients, whatever their numbers of samples: the paper's."""
    return _stack(values).mean(0)


def median(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """The middle value of every element; of an even number the mean of the middle two.

    Holds as long as fewer than half of the clients lie (Yin et al., "Byzantine-robust distributed learning", 2018).
    """
    ordered = _sorted(_stack(values))
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def trimmed_mean(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """The mean of every element without its largest and smallest: a fifth of the clients at either end.

    At least one at either end where there are three clients or more. Holds as long as no more than that many lie.
    """
    ordered = _sorted(_stack(values))
    n = len(ordered)
    cut = min(max(n // 5, 1), (n - 1) // 2)
    return ordered[cut : n - cut].mean(0)


def clip_to_norm(values: Sequence[Array], largest: float, weights: NDArray[np.float64]) -> list[Array]:
    """Scale down the clients whose gradient estimate is longer than `largest`; the others stay.

    The length is estimated from the scalars: E |ghat|^2 = sum_p weights_p v_p^2, weights_p = d / P^2, d the trainable
    elements, each with its squared factor. It is never a norm computed on a device, which would depend on the device.
    """
    clipped = []
    for value in values:
        length = math.sqrt(_squared(value, weights))
        clipped.append(value * (largest / length) if length > largest else value)
    return clipped


def lower_median(lengths: Iterable[float]) -> float:
    """The median of some lengths, of an even number the lower one of the middle two."""
    ordered = sorted(lengths)
    return ordered[(len(ordered) - 1) // 2]


LENGTH_LIMIT = 30.0


def limit_length(aggregate: Array, values: Sequence[Array], weights: NDArray[np.float64]) -> Array:
    """The clients' aggregate, scaled down to at most `LENGTH_LIMIT` times the median length of their estimates.

    A mean is hardly ever so long unless one client's scalars are absurd. Such an answer would otherwise not only spoil
    its round, but leave the lattice, or stay in the running length and the moments that all later rounds divide by.
    Lengths as in `clip_to_norm`. Zero lengths, of which a loss with a margin has many, do not count.
    """
    squares = [square for value in values if (square := _squared(value, weights)) > 0]
    if not squares:
        return aggregate
    longest = LENGTH_LIMIT * math.sqrt(lower_median(squares))
    length = math.sqrt(_squared(aggregate, weights))
    return aggregate * (longest / length) if length > longest else aggregate


AGGREGATIONS: dict[str, Aggregation] = {
    "weighted": weighted_mean,
    "uniform": uniform_mean,
    "median": median,
    "trimmed": trimmed_mean,
}


def _stack(values: Sequence[Array]) -> Array:
    """float64 [K, n], a row per client."""
    if not is_tensor(values[0]):
        return np.stack([np.asarray(v, np.float64) for v in values])
    rows = values[0].detach().double().new_empty((len(values), *values[0].shape))
    for number, value in enumerate(values):
        rows[number] = value.detach()
    return rows


def _as(rows: Array, numbers: Sequence[float]) -> Array:
    return rows.new_tensor(numbers) if is_tensor(rows) else np.array(numbers, np.float64)


def _sorted(rows: Array) -> Array:
    """Every column by size."""
    return rows.sort(0).values if is_tensor(rows) else np.sort(rows, 0)


def _squared(value: Array, weights: NDArray[np.float64]) -> float:
    """sum weights * value^2, in float64."""
    return float((np.square(host(value), dtype=np.float64) * weights).sum())


@dataclass
class RunningLength:
    """The length of recent gradients: the root of a bias-corrected running mean of their squares.

    The scalars estimate it at no cost: for Rademacher and for normal directions E vbar_p^2 = |g|^2.
    """

    decay: float = 0.9
    mean: float = 0.0
    weight: float = 0.0

    def update(self, square: float) -> float:
        """Take in one squared length; returns the running length, which is never zero."""
        self.mean = self.decay * self.mean + (1 - self.decay) * square
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.value

    @property
    def value(self) -> float:
        """The running length, after the first update."""
        return math.sqrt(self.mean / self.weight) + 1e-8

    def state(self) -> list[float]:
        return [self.mean, self.weight]

    def load(self, state: Sequence[float]) -> None:
        self.mean, self.weight = state


def to_lattice(coefficients: Sequence[float], lattice: Lattice, run_seed: int, round: int) -> list[float]:
    """Round each coefficient to a multiple of the quantum, stochastically.

    With fresh directions no remainder can be carried to the next round, and rounding to nearest would lose small steps.
    """
    seed = round_seed(run_seed, Purpose.COEFFICIENTS, round)
    return [lattice.stochastic(c, derive(seed, p, 0) / 2.0**64) for p, c in enumerate(coefficients)]
