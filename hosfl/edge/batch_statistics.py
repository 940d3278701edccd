"""Export of a half's batch statistics as an ONNX graph, for clients without torch: see `running_statistics.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosfl.edge.graph import externalize_weights, serialize_part
from hosfl.edge.half import Half
from hosfl.edge.running_statistics import STATISTICS
from hosfl.edge.source import (
    TOLERANCE,
    WHERE_MOVED,
    ExportError,
    ExportSource,
    as_half_inputs,
    describe_batch,
    export_source,
)
from hosfl.edge.tracing import PositionalHalf, trace_graph
from hosfl.halves.inputs import Inputs
from hosfl.methods import calibration


def export_statistics(half: nn.Module, sample: Inputs, max_sizes: tuple[int, int] = (0, 0)) -> bytes:
    """Export an ONNX model, without weights, of what `calibration.estimate_statistics` computes for one batch.

    Its output has the form of `calibration.flat`. Arguments and weights are as in `export_half`. Raises ExportError,
    also if onnxruntime computes other statistics.
    """
    with export_source(half, sample) as source:
        from onnxscript import ir

        model = trace_graph(source, (), _Statistics)
        moving, fixed = externalize_weights(model, source, False, calibration.running(source.half))
        piece = ir.convenience.extract(model.graph, list(model.graph.inputs), list(model.graph.outputs))
        graph = serialize_part(model, piece, moving, fixed)
        _compare(source, source.batches(max_sizes), graph)
    return graph


class _BatchStatisticsMode(TorchFunctionMode):
    """Mode in which normalisations with running statistics normalise by the batch, as in train mode.

    running: the running statistics of the normalisations concerned. Attribute moments: for each running mean, by its
    id, the (means, unbiased variances) of every call, as train mode would average them into the running statistics.
    """

    def __init__(self, running: Sequence[Tensor]) -> None:
        super().__init__()
        self.running_ids, self.moments = {id(t) for t in running}, dict[int, list[tuple[Tensor, Tensor]]]()

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _NORM_SIGNATURES:
            bound = _NORM_SIGNATURES[function].bind(*args, **(kwargs or {})).arguments
            if id(bound.get("running_mean")) in self.running_ids:
                return self._normalize(by_sample=function is nn.functional.instance_norm, **bound)
        return function(*args, **(kwargs or {}))

    def _normalize(
        self,
        by_sample: bool,
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        **others: Any,
    ) -> Tensor:
        """Normalise by the batch's moments, and record them.

        by_sample: normalise each sample by its own moments, and record their means over the batch.
        """
        mean, variance, unbiased = _moments(
            input, [d for d in range(input.dim()) if d > 1 or (d == 0 and not by_sample)]
        )
        means, variances = ((x.mean(0) if by_sample else x).flatten() for x in (mean, unbiased))
        self.moments.setdefault(id(running_mean), []).append((means, variances))
        return _scale_and_shift((input - mean) * torch.rsqrt(variance + eps), weight, bias)


_NORM_SIGNATURES = {
    function: signature(function) for function in (nn.functional.batch_norm, nn.functional.instance_norm)
}


def _moments(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, variance and unbiased variance over these dimensions, which are kept with size 1."""
    mean = x.mean(dims, keepdim=True)
    squares = (x - mean).square().sum(dims, keepdim=True)
    count = torch.ones_like(x).sum(dims, keepdim=True)
    return mean, squares / count, squares / (count - 1)


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply a normalisation's affine part to x [batch, channels, ...]."""
    shape = [1, -1, *[1] * (x.dim() - 2)]
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


class _Statistics(PositionalHalf):
    """A module whose one output is the batch's statistics, flat as in `calibration.flat`.

    Normalisations that the forward pass does not call keep their current statistics.
    """

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        running = list(calibration.running(self.client).values())
        with _BatchStatisticsMode(running) as mode:
            super().forward(*tensors)
        parts = []
        for mean, variance in zip(running[::2], running[1::2], strict=True):
            moments = mode.moments.get(id(mean), [(mean, variance)])
            parts += [torch.stack(calls).mean(0) for calls in zip(*moments, strict=True)]
        return (torch.cat(parts),)


def _compare(source: ExportSource, batches: Sequence[Mapping[str, Tensor]], graph: bytes) -> None:
    """Raise ExportError where onnxruntime computes other statistics than torch."""
    running = calibration.running(source.half)
    with source.graph_folder(f"the graph of the {source.kind}'s statistics", {STATISTICS: graph}) as folder:
        run = Half(folder, list(source.moving), running=list(running), graphs=[STATISTICS])

        def compare(inputs: Mapping[str, Tensor], where: str = "") -> None:
            labels = torch.empty(len(next(iter(inputs.values()))))
            try:
                batch = as_half_inputs(source.sample, inputs), labels
                expected, _ = calibration.estimate_statistics(source.half, [batch])
            except ValueError:  # this batch has no statistics, for example because it is one sample
                return
            if not expected.isfinite().all():  # see `hosfl.edge.export._difference`
                return
            statistics = run({name: x.numpy() for name, x in inputs.items()})
            sizes = [len(t) for t in running.values()]
            _check(statistics, expected.numpy(), sizes, f"{where}: for {describe_batch(inputs)}")

        for inputs in batches:
            compare(inputs)
        with source.shifted_weights(run.tensors):
            compare(batches[0], WHERE_MOVED)


def _check(statistics: NDArray[Any], expected: NDArray[Any], sizes: Sequence[int], batch: str) -> None:
    """Raise ExportError if statistics differ. sizes: of each normalisation's means and variances. batch: for errors."""
    if statistics.shape != expected.shape:
        raise ExportError(f"the graph's statistics are {statistics.shape}, and the half's {expected.shape}")
    ends = np.cumsum(sizes)[:-1]
    actual_parts, parts = np.split(statistics, ends), np.split(expected, ends)
    for n in range(0, len(parts), 2):  # means, then variances
        deviation = np.sqrt(parts[n + 1].max(initial=0))
        scales = max(np.abs(parts[n]).max(initial=0), deviation), deviation**2
        for actual, part, scale in zip(actual_parts[n : n + 2], parts[n : n + 2], scales, strict=True):
            if not (distance := np.abs(actual - part).max(initial=0)) <= TOLERANCE * scale:
                raise ExportError(
                    f"the graph's statistics are not the half's{batch}, numbers differ by {distance:.3g}, and the"
                    f" largest is {scale:.3g}"
                )
