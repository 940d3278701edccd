"""Accumulates the clients' gradients of the server half, one after another, until the round's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hosfl.protocol.aggregate import Aggregation, RunningLength, lower_median, uniform_mean, weighted_mean

Pieces = Sequence[Tensor | None]  # one client's vector in pieces; None stands for zeros
OUTLIER = 10.0  # a gradient this many times as long as those of earlier steps is scaled down
# For aggregations that are means: a client's share from its weight.
SHARES: dict[Aggregation, Callable[[float], float]] = {weighted_mean: float, uniform_mean: lambda weight: 1.0}


class RunningMean:
    """A mean of the clients' vectors, in the memory of one of them. share: weight -> the client's share."""

    def __init__(self, share: Callable[[float], float]) -> None:
        self.share, self.total = share, 0.0
        self.sums: list[Tensor | None] = []

    def add(self, pieces: Pieces, weight: float) -> None:
        share = self.share(weight)
        self._add(pieces, share, share)

    def add_sum(self, pieces: Pieces, shares: float) -> None:
        """Add several clients at once. pieces: the sum of their vectors times their shares; shares: the shares' sum."""
        self._add(pieces, 1.0, shares)

    def _add(self, pieces: Pieces, times: float, share: float) -> None:
        self.total += share
        before = self.sums or [None] * len(pieces)
        self.sums = [_plus(s, p, times) for s, p in zip(before, pieces, strict=True)]

    def result(self) -> list[Tensor | None]:
        """The mean; None for pieces that no client had. Call it once, at the end."""
        return [None if s is None else s.div_(self.total) for s in self.sums]


def _plus(total: Tensor | None, piece: Tensor | None, times: float) -> Tensor | None:
    if piece is None:
        return total
    return piece * times if total is None else total.add_(piece, alpha=times)


class KeptVectors:
    """Any aggregation of the clients' vectors. Keeps all K of them until the end, then aggregates piece by piece."""

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


def make_accumulator(aggregation: Aggregation) -> RunningMean | KeptVectors:
    """An empty accumulator for an aggregation."""
    share = SHARES.get(aggregation)
    return KeptVectors(aggregation) if share is None else RunningMean(share)


def length_of(pieces: Pieces) -> float:
    """The L2 norm of a vector in pieces, on one device; 0 without pieces. Waits for a GPU once."""
    norms = [torch.linalg.vector_norm(p.float()) for p in pieces if p is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def clip_factor(pieces: Pieces, largest: float) -> float:
    """The factor that scales a gradient, in pieces, down to the length `largest`; 1 if it is not longer."""
    length = length_of(pieces)
    return largest / length if length > largest else 1.0


class OutlierClipping:
    """Scales down an aggregated gradient that is more than `OUTLIER` times as long as those of the steps before.

    It then has their running length; in the first step, the median length of the clients' gradients. One absurd cut
    would otherwise not only spoil its round but stay in the optimizer's moments, which divide all later steps.
    Gradients of length zero, of which a loss with a margin has many, do not count.

    Attributes:
        length: the running length.
    """

    def __init__(self) -> None:
        self.length = RunningLength()
        self._clients: list[float] = []  # lengths of the clients' gradients, in the first step

    def begin(self) -> None:
        """Begin a step."""
        self._clients = []

    @property
    def ready(self) -> bool:
        """Whether there is a running length, so that the clients' own lengths are not needed."""
        return bool(self.length.weight)

    def observe(self, gradient: Pieces) -> None:
        """Take in one client's gradient."""
        if not self.ready:
            self._clients.append(length_of(gradient))

    def clipped(self, gradient: Pieces) -> Pieces:
        """Scale the step's aggregated gradient down if it is an outlier, and update the running length."""
        length = length_of(gradient)
        if length == 0:
            return gradient
        usual = self.length.value if self.ready else lower_median(filter(None, self._clients))
        self.length.update(min(length, 2 * usual) ** 2)  # grows by at most a seventh per step
        return gradient if length <= OUTLIER * usual else [g if g is None else g * (usual / length) for g in gradient]
