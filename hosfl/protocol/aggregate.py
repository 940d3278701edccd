"""From what K clients say to one step: plain functions, the same for both halves.

An aggregation takes one vector per client, float32 [n] each, and the clients' weights (numbers of samples), and gives
float64 [n]. Client half: ghat = (1/P) sum_p vbar_p u_p, vbar being the aggregate of the clients' scalars. Server half:
the aggregate of its gradients, one of each client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hosfl.protocol.lattice import Lattice
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl_kernels import derive

Aggregation = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
Pieces = Sequence[Tensor | None]  # one client's vector in pieces; None where it has none, which is as good as zeros


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m weights[m] values[m] / sum_m weights[m]: the gradient of the loss over all their samples."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return (shares[:, None] * _stack(values)).sum(0)


def uniform_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of the clients, whatever they own: the paper's."""
    return _stack(values).mean(0)


def median(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The middle value of every element; of an even number the mean of the middle two.

    Holds as long as fewer than half of the clients lie (Yin et al., "Byzantine-robust distributed learning", 2018).
    """
    ordered = _stack(values).sort(0).values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def trimmed_mean(values: Sequence[Tensor], weights: Sequence[float], trim: float = 0.2) -> Tensor:
    """The mean of every element without its largest and smallest: a share `trim` of the clients at either end.

    At least one at either end where there are three clients or more. Holds as long as no more than that many lie.
    """
    ordered = _stack(values).sort(0).values
    n = len(ordered)
    cut = min(max(int(trim * n), 1), (n - 1) // 2)
    return ordered[cut : n - cut].mean(0)


def clip_to_norm(values: Sequence[Tensor], largest: float, dimension: float) -> list[Tensor]:
    """Scale down the clients whose gradient estimate is longer than `largest`; the others stay.

    The length is told by the scalars: E |ghat|^2 = dimension / P^2 sum_p v_p^2, dimension = sum over the trainable
    elements of their squared factor. Never a norm computed on a device, which would depend on the device.
    """
    clipped = []
    for value in values:
        length = math.sqrt(dimension * float(value.double().square().sum())) / len(value)
        clipped.append(value * (largest / length) if length > largest else value)
    return clipped


def shrinking(pieces: Pieces, largest: float) -> float:
    """The factor that takes one client's gradient, in pieces, to the length `largest` where it is longer; else 1."""
    length = math.sqrt(sum(float(p.double().square().sum()) for p in pieces if p is not None))
    return largest / length if length > largest else 1.0


AGGREGATIONS: dict[str, Aggregation] = {
    "weighted": weighted_mean,
    "uniform": uniform_mean,
    "median": median,
    "trimmed": trimmed_mean,
}
# A client's share of those that are means, from its weight.
SHARES: dict[Aggregation, Callable[[float], float]] = {weighted_mean: float, uniform_mean: lambda weight: 1.0}


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.double() for v in values])


class Summed:
    """A mean of the clients' vectors, in the memory of one of them. share: a client's, from its weight."""

    def __init__(self, share: Callable[[float], float]) -> None:
        self.share, self.total = share, 0.0
        self.sums: list[Tensor | None] = []

    def add(self, pieces: Pieces, weight: float) -> None:
        share = self.share(weight)
        self.total += share
        before = self.sums or [None] * len(pieces)
        self.sums = [_plus(s, p, share) for s, p in zip(before, pieces, strict=True)]

    def result(self) -> list[Tensor | None]:
        """The mean; None where nobody had a piece. To be called once, at the end."""
        return [None if s is None else s.div_(self.total) for s in self.sums]


def _plus(total: Tensor | None, piece: Tensor | None, share: float) -> Tensor | None:
    if piece is None:
        return total
    return piece * share if total is None else total.add_(piece, alpha=share)


class Kept:
    """Any aggregation of the clients' vectors. Keeps all K of them until the end, then goes over them by pieces."""

    def __init__(self, aggregation: Aggregation) -> None:
        self.aggregation = aggregation
        self.rows: list[Pieces] = []
        self.weights: list[float] = []

    def add(self, pieces: Pieces, weight: float) -> None:
        self.rows.append(pieces)
        self.weights.append(weight)

    def result(self) -> list[Tensor | None]:
        return [self._aggregate(column) for column in zip(*self.rows, strict=True)]

    def _aggregate(self, column: Pieces) -> Tensor | None:
        like = next((p for p in column if p is not None), None)
        if like is None:
            return None
        flat = [torch.zeros_like(like).reshape(-1) if p is None else p.reshape(-1) for p in column]
        return self.aggregation(flat, self.weights).view_as(like).to(like.dtype)


def gathered(aggregation: Aggregation) -> Summed | Kept:
    """Nothing as yet of what is to be aggregated so."""
    share = SHARES.get(aggregation)
    return Kept(aggregation) if share is None else Summed(share)


@dataclass
class RunningLength:
    """The length of recent gradients: the root of a bias-corrected running mean of their squares.

    The scalars tell it for nothing: for Rademacher and for normal directions E vbar_p^2 = |g|^2.
    """

    decay: float = 0.9
    mean: float = 0.0
    weight: float = 0.0

    def update(self, square: float) -> float:
        """Take in one squared length; returns the running length, never zero."""
        self.mean = self.decay * self.mean + (1 - self.decay) * square
        self.weight = self.decay * self.weight + (1 - self.decay)
        return math.sqrt(self.mean / self.weight) + 1e-8

    def state(self) -> list[float]:
        return [self.mean, self.weight]

    def load(self, state: Sequence[float]) -> None:
        self.mean, self.weight = state


def to_lattice(coefficients: Sequence[float], lattice: Lattice, run_seed: int, round: int) -> list[float]:
    """Each coefficient as a multiple of the quantum, stochastically.

    Fresh directions carry no remainder to the next round, and rounding to the nearest would swallow small steps.
    """
    seed = round_seed(run_seed, Purpose.COEFFICIENTS, round)
    return [lattice.stochastic(c, derive(seed, p, 0) / 2.0**64) for p, c in enumerate(coefficients)]
