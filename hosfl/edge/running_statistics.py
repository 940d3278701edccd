"""Running statistics without torch: onnxruntime runs a graph that computes the statistics of a batch.

statistics.onnx     that graph, as `hosfl.edge.batch_statistics` exports it, without weights
base.safetensors    the weights of round 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hosfl.edge.data import Arrays, Samples
from hosfl.edge.half import HalfError
from hosfl.edge.travel import assign_rounded, rounded
from hosfl.protocol.arrays import widened
from hosfl.protocol.messages import MessageError

STATISTICS = "statistics.onnx"

Floats = NDArray[np.float32]


class StatisticsEstimator:
    """A half's running statistics, and their estimation from batches.

    Args:
        arrays: for each normalisation its means and its variances, one after the other; changed in place.
        open_graph: opens the graph: a function from a batch's inputs to its statistics, flat. It is called for each
            estimation, and the function is released afterwards.
        batches: returns the batches of an estimation, the same ones every time.
    """

    def __init__(
        self,
        arrays: Sequence[NDArray[Any]],
        open_graph: Callable[[], Callable[[Arrays], Floats]],
        batches: Callable[[], Iterable[Samples]],
    ) -> None:
        self.arrays, self.open_graph, self.batches = list(arrays), open_graph, batches

    def estimate(self) -> tuple[Floats, int]:
        """Return (mean of the batches' statistics, float32 [n]; number of samples).

        As `hosfl.methods.calibration.estimate_statistics`. Raises MessageError for batches without finite statistics,
        such as single samples, and HalfError.
        """
        samples = count = 0
        total: NDArray[np.float64] = np.zeros(sum(a.size for a in self.arrays))
        run = self.open_graph()
        for batch in self.batches():
            statistics = run(batch.inputs)
            if statistics.shape != total.shape:
                raise HalfError(f"the graph of statistics makes {statistics.shape}, and the half has {total.shape}")
            if not np.isfinite(statistics).all():
                raise MessageError(
                    f"a batch of {len(batch)} samples has infinite or NaN statistics: a channel needs more than one"
                    " value"
                )
            total, samples, count = total + statistics, samples + len(batch), count + 1
        return (total / max(1, count)).astype(np.float32), samples

    def load(self, values: Floats) -> None:
        """Write these values, flat, into the arrays.

        Raises MessageError, with nothing changed, for another length or dtype, non-finite values or negative variances.
        """
        sizes = [a.size for a in self.arrays]
        if values.dtype != np.float32 or len(values) != sum(sizes):
            raise MessageError(f"{len(values)} statistics where normalisations have {sum(sizes)}")
        narrow = any(array.dtype == np.uint16 for array in self.arrays)
        if not np.isfinite(widened(rounded(values)) if narrow else values).all():
            raise MessageError("infinite or NaN statistics")
        parts = np.split(values, np.cumsum(sizes)[:-1])
        if any((variances < 0).any() for variances in parts[1::2]):
            raise MessageError("negative variances")
        for array, part in zip(self.arrays, parts, strict=True):
            assign_rounded(array, part)
