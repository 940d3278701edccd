"""Running statistics under onnxruntime: the half that normalises by its batch is a graph, and needs no torch.

statistics.onnx     the statistics of a batch, as `hosfl.edge.by_batch` makes the graph, without weights
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
    """A half's running statistics: arrays, of each normalisation the means and then the variances, changed in place.

    of_batch: gives those of a batch, end to end; it is asked for when it is needed, and let go. batches: those on which
    they are estimated, the same ones every time.
    """

    def __init__(
        self,
        arrays: Sequence[NDArray[Any]],
        of_batch: Callable[[], Callable[[Arrays], Floats]],
        batches: Callable[[], Iterable[Samples]],
    ) -> None:
        self.arrays, self.of_batch, self.batches = list(arrays), of_batch, batches

    def estimated(self) -> tuple[Floats, int]:
        """Means over batches of what each has, float32 [n], and how many samples they are of: see
        `hosfl.methods.calibration.estimate_statistics`.

        Raises MessageError for batches that have none, such as of single samples, and HalfError.
        """
        samples = count = 0
        total: NDArray[np.float64] = np.zeros(sum(a.size for a in self.arrays))
        run = self.of_batch()
        for batch in self.batches():
            found = run(batch.inputs)
            if found.shape != total.shape:
                raise HalfError(f"the graph of statistics makes {found.shape}, and the half has {total.shape}")
            if not np.isfinite(found).all():
                raise MessageError(
                    f"a batch of {len(batch)} samples has infinite or NaN statistics: a channel needs more than one"
                    " value"
                )
            total, samples, count = total + found, samples + len(batch), count + 1
        return (total / max(1, count)).astype(np.float32), samples

    def load(self, values: Floats) -> None:
        """Take these up. Raises MessageError, with nothing changed, where they cannot be the half's own."""
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
