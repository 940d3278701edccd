"""Backpropagation under onnxruntime: the half's gradient is a graph like the half itself, and needs no torch.

gradient.onnx       as `hosfl.edge.backward` makes it, without weights
base.safetensors    the weights of round 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hosfl.edge.half import (
    BASE,
    PREFIX,
    Arrays,
    HalfError,
    check_updates_seen,
    negative_input_hint,
    open_session,
    ort_value,
)

GRADIENT = "gradient.onnx"
# Names in the graph, which no argument of a half has.
MULTIPLIER, BLOCK_INPUT, GRADIENT_PREFIX = "the multiplier", "what lies between", "gradient of "


class Gradient:
    """d <multiplier, cut> / d weights, of the weights that move: of arrays that others hold, and move in place.

    folder: holds gradient.onnx and base.safetensors. moving: the weights' names; tensors: their arrays.
    threads: see `Half`. running, statistics: names and arrays of running statistics, likewise. Raises HalfError.
    """

    def __init__(
        self,
        folder: Path,
        moving: Sequence[str],
        tensors: Sequence[NDArray[Any]],
        threads: int = 0,
        running: Sequence[str] = (),
        statistics: Sequence[NDArray[Any]] = (),
    ) -> None:
        self.moving, self.tensors = list(moving), list(tensors)
        self._folder, self._threads = folder, threads
        self._names, self._changing = [*moving, *running], [*tensors, *statistics]
        self._values = [ort_value(tensor) for tensor in self._changing]
        self._open()

    def _open(self) -> None:
        self._session: Any = None  # never two at once
        self._session = open_session(
            self._folder / GRADIENT, self._folder / BASE, self._names, self._values, self._threads
        )

    def __call__(
        self, inputs: Arrays, multiplier: NDArray[np.float32], between: NDArray[np.float32] | None = None
    ) -> list[NDArray[np.float32]]:
        """A gradient for each of the tensors; zeros for those that the cut does not depend on.

        between: what the half's first block begins with, see `Half.input_of`; None: with the inputs. Raises HalfError.
        """
        named = dict(inputs) if isinstance(inputs, Mapping) else {"input": inputs}
        named |= {MULTIPLIER: multiplier} | ({} if between is None else {BLOCK_INPUT: between})
        takes = [entry.name for entry in self._session.get_inputs()]
        if between is not None:  # a block takes those of the half's own inputs that it needs
            named = {name: value for name, value in named.items() if name in takes}
        try:
            made = self._session.run(None, named)
        except Exception as error:  # onnxruntime's errors have no class in common
            raise HalfError(
                f"the half's gradient does not take these inputs: {error}{negative_input_hint(named)}"
            ) from error
        outputs = [output.name.removeprefix(GRADIENT_PREFIX + PREFIX) for output in self._session.get_outputs()]
        found = dict(zip(outputs, made, strict=True))
        each = zip(self.moving, self.tensors, strict=True)
        return [found[n] if n in found else np.zeros(t.shape, np.float32) for n, t in each]

    def check(self, inputs: Arrays, multiplier: NDArray[np.float32], between: NDArray[np.float32] | None) -> None:
        """As `Half.check`."""
        running = len(self._names) - len(self.moving)
        check_updates_seen(self._names, self._changing, lambda: self(inputs, multiplier, between), self._open, running)
