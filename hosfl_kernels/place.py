"""`Place`: which noise each tensor of a list gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

DISTRIBUTIONS = ("rademacher", "gaussian")


class Place(NamedTuple):
    """Which noise each tensor of a list gets. Backends take it along with the tensors.

    Attributes:
        dist: "rademacher" or "gaussian", for all tensors.
        factors: for each tensor, the power of two that scales its noise.
        streams: for each tensor, the number of its noise stream.
        starts: for each tensor, the index of its first element in the unsharded tensor.
    """

    dist: str
    factors: Sequence[float]
    streams: Sequence[int]
    starts: Sequence[int]

    @classmethod
    def single(cls, dist: str = "rademacher", factor: float = 1.0, stream: int = 0, start: int = 0) -> Place:
        """The place of a list of one tensor."""
        return cls(dist, [factor], [stream], [start])

    def subset(self, positions: Sequence[int]) -> Place:
        """The place of the tensors at these positions of the list."""
        factors, streams = [self.factors[t] for t in positions], [self.streams[t] for t in positions]
        return Place(self.dist, factors, streams, [self.starts[t] for t in positions])

    def per_tensor(self) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments for the functions of spec.py, one mapping per tensor."""
        for factor, stream, start in zip(self.factors, self.streams, self.starts, strict=True):
            yield {"dist": self.dist, "factor": factor, "stream": stream, "start": start}
