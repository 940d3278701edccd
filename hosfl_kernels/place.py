"""Where tensors lie in the noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

DISTRIBUTIONS = ("rademacher", "gaussian")


class Place(NamedTuple):
    """What a backend needs to know of a list of tensors beside the tensors: where each of them lies in the noise.

    dist: "rademacher" or "gaussian". Of each tensor: factors, the power of two that its noise is scaled by; streams,
    the number that names its noise; starts, the index of its first element in the unsharded tensor.
    """

    dist: str
    factors: Sequence[float]
    streams: Sequence[int]
    starts: Sequence[int]

    @classmethod
    def of_one(cls, dist: str = "rademacher", factor: float = 1.0, stream: int = 0, start: int = 0) -> Place:
        """The place of a list of one tensor."""
        return cls(dist, [factor], [stream], [start])

    def of(self, tensors: Sequence[int]) -> Place:
        """The place of some of the tensors, given by their positions."""
        factors, streams = [self.factors[t] for t in tensors], [self.streams[t] for t in tensors]
        return Place(self.dist, factors, streams, [self.starts[t] for t in tensors])

    def each(self) -> Iterator[dict[str, Any]]:
        """Of every tensor, as the functions of spec.py take it."""
        for factor, stream, start in zip(self.factors, self.streams, self.starts, strict=True):
            yield {"dist": self.dist, "factor": factor, "stream": stream, "start": start}
