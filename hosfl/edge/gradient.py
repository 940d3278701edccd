"""Backpropagation under onnxruntime: the half's gradient is a graph like the half itself, and needs no torch.

gradient.onnx       as `hosfl.edge.backward` makes it, without weights
base.safetensors    the weights of round 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hosfl.edge.half import BASE, LAYOUT, PREFIX, Arrays, HalfError, layout

GRADIENT, MULTIPLIER, OF = "gradient.onnx", "multiplier", "gradient of "


class Gradient:
    """d <multiplier, cut> / d weights, of the weights that move: of arrays that others hold, and move in place.

    folder: holds gradient.onnx and base.safetensors. moving: the weights' names; tensors: their arrays, float32.
    threads: see `Half`. Raises HalfError.
    """

    def __init__(
        self, folder: Path, moving: Sequence[str], tensors: Sequence[NDArray[np.float32]], threads: int = 0
    ) -> None:
        self.moving, self.tensors = list(moving), list(tensors)
        self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for tensor in self.tensors]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        for name, value in zip(self.moving, self._values, strict=True):
            options.add_initializer(PREFIX + name, value)
        try:
            self._session: Any = onnxruntime.InferenceSession(folder / GRADIENT, options, ["CPUExecutionProvider"])
        except Exception as error:
            raise HalfError(f"onnxruntime cannot open {folder / GRADIENT}: {error}") from error
        if self._session.get_modelmeta().custom_metadata_map.get(LAYOUT) != layout(folder / BASE):
            raise HalfError(f"{folder / GRADIENT} was not made for {folder / BASE}")
        self._outputs = [output.name.removeprefix(OF + PREFIX) for output in self._session.get_outputs()]

    def __call__(self, inputs: Arrays, multiplier: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """A gradient for each of the tensors; zeros for those that the cut does not depend on. Raises HalfError."""
        named = dict(inputs) if isinstance(inputs, Mapping) else {"input": inputs}
        try:
            made = self._session.run(None, {**named, MULTIPLIER: multiplier})
        except Exception as error:
            raise HalfError(f"the half's gradient does not take these inputs: {error}") from error
        found = dict(zip(self._outputs, made, strict=True))
        return [found[n] if n in found else np.zeros_like(t) for n, t in zip(self.moving, self.tensors, strict=True)]
