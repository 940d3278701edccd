"""Backpropagation without torch: the half's gradient is an ONNX graph that onnxruntime runs.

gradient.onnx       the graph that `hosfl.edge.backward` exports, without weights
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
# Names of the graph's own inputs and outputs. The blanks keep them apart from the half's arguments.
MULTIPLIER, BLOCK_INPUT, GRADIENT_PREFIX = "the multiplier", "what lies between", "gradient of "


class Gradient:
    """A session that computes d <multiplier, cut> / d weights, for the trainable weights.

    It reads the weights from arrays of its caller, who changes them in place.

    Args:
        folder: holds gradient.onnx and base.safetensors.
        moving: the trainable weights' names.
        tensors: their arrays.
        threads: see `Half`.
        running: names of running statistics.
        statistics: their arrays.

    Raises:
        HalfError: onnxruntime cannot open the graph, or the files are of two halves.
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
        """Open the session again, after closing the one that is open."""
        self._session: Any = None  # frees the old session first: two at once would take twice the memory
        self._session = open_session(
            self._folder / GRADIENT, self._folder / BASE, self._names, self._values, self._threads
        )

    def __call__(
        self, inputs: Arrays, multiplier: NDArray[np.float32], hidden: NDArray[np.float32] | None = None
    ) -> list[NDArray[np.float32]]:
        """Return a gradient for each of the tensors; zeros for those that the cut does not depend on.

        hidden: the input of the half's first block, see `Half.piece_input`; None for a graph that begins with the
        half's own inputs. Raises HalfError.
        """
        named = dict(inputs) if isinstance(inputs, Mapping) else {"input": inputs}
        named |= {MULTIPLIER: multiplier} | ({} if hidden is None else {BLOCK_INPUT: hidden})
        expected = [argument.name for argument in self._session.get_inputs()]
        if hidden is not None:  # a graph that begins with a block takes only some of the half's inputs
            named = {name: value for name, value in named.items() if name in expected}
        try:
            values = self._session.run(None, named)
        except Exception as error:  # onnxruntime's errors have no class in common
            raise HalfError(
                f"the half's gradient does not take these inputs: {error}{negative_input_hint(named)}"
            ) from error
        outputs = [output.name.removeprefix(GRADIENT_PREFIX + PREFIX) for output in self._session.get_outputs()]
        gradients = dict(zip(outputs, values, strict=True))
        return [
            gradients[name] if name in gradients else np.zeros(tensor.shape, np.float32)
            for name, tensor in zip(self.moving, self.tensors, strict=True)
        ]

    def check(self, inputs: Arrays, multiplier: NDArray[np.float32], hidden: NDArray[np.float32] | None) -> None:
        """Raise HalfError unless onnxruntime sees every change of the weights and statistics: see `Half.check`."""
        running = len(self._names) - len(self.moving)
        check_updates_seen(self._names, self._changing, lambda: self(inputs, multiplier, hidden), self._open, running)
