"""The running statistics of a batch as an ONNX graph, for clients that have no torch: see `running.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosfl.edge.graph import externalize_weights, serialize_part
from hosfl.edge.half import Half
from hosfl.edge.original import TOLERANCE, WHERE_MOVED, ExportError, Original, as_half_inputs, describe_batch, original
from hosfl.edge.running import STATISTICS
from hosfl.edge.tracing import Positional, trace_graph
from hosfl.halves.inputs import Inputs
from hosfl.methods import calibration


def export_statistics(half: nn.Module, sample: Inputs, most: tuple[int, int] = (0, 0)) -> bytes:
    """An ONNX model, without weights, that computes what `calibration.estimate_statistics` does for one batch.

    Its output has the form of `calibration.flat`. The file is as in `export_half`. Raises ExportError, also if
    onnxruntime computes other statistics.
    """
    with original(half, sample) as of:
        from onnxscript import ir

        model = trace_graph(of, (), _Statistics)
        moving, fixed = externalize_weights(model, of, False, calibration.running(of.half))
        piece = ir.convenience.extract(model.graph, list(model.graph.inputs), list(model.graph.outputs))
        graph = serialize_part(model, piece, moving, fixed)
        _compare(of, of.batches(most), graph)
    return graph


class _BatchStatisticsMode(TorchFunctionMode):
    """Normalisations with running statistics normalise by the batch, as in train mode.

    found: by the running mean's id the means and the variances of every pass, as train mode would take them in.
    """

    def __init__(self, running: Sequence[Tensor]) -> None:
        super().__init__()
        self.own, self.found = {id(t) for t in running}, dict[int, list[tuple[Tensor, Tensor]]]()

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _NORM_SIGNATURES:
            told = _NORM_SIGNATURES[function].bind(*args, **(kwargs or {})).arguments
            if id(told.get("running_mean")) in self.own:
                return self._normalised(by_sample=function is nn.functional.instance_norm, **told)
        return function(*args, **(kwargs or {}))

    def _normalised(
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
        """by_sample: each sample by itself, whose moments' means are the statistics."""
        mean, variance, unbiased = _moments(
            input, [d for d in range(input.dim()) if d > 1 or (d == 0 and not by_sample)]
        )
        means, variances = ((x.mean(0) if by_sample else x).flatten() for x in (mean, unbiased))
        self.found.setdefault(id(running_mean), []).append((means, variances))
        return _scale_and_shift((input - mean) * torch.rsqrt(variance + eps), weight, bias)


_NORM_SIGNATURES = {
    function: signature(function) for function in (nn.functional.batch_norm, nn.functional.instance_norm)
}


def _moments(x: Tensor, over: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance, and unbiased variance."""
    mean = x.mean(over, keepdim=True)
    squares = (x - mean).square().sum(over, keepdim=True)
    count = torch.ones_like(x).sum(over, keepdim=True)
    return mean, squares / count, squares / (count - 1)


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1, *[1] * (x.dim() - 2)]
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


class _Statistics(Positional):
    """Its one output is the statistics of the batch; of a normalisation that nothing goes through those that it has."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        running = list(calibration.running(self.client).values())
        with _BatchStatisticsMode(running) as mode:
            super().forward(*tensors)
        parts = []
        for mean, variance in zip(running[::2], running[1::2], strict=True):
            passes = mode.found.get(id(mean), [(mean, variance)])
            parts += [torch.stack([one[n] for one in passes]).mean(0) for n in (0, 1)]
        return (torch.cat(parts),)


def _compare(of: Original, batches: Sequence[Mapping[str, Tensor]], graph: bytes) -> None:
    """Raises ExportError where onnxruntime makes other statistics than torch."""
    running = calibration.running(of.half)
    with of.graph_folder(f"the graph of the {of.kind}'s statistics", {STATISTICS: graph}) as folder:
        run = Half(folder, list(of.moving), running=list(running), graphs=[STATISTICS])

        def compare(inputs: Mapping[str, Tensor], where: str = "") -> None:
            labels = torch.empty(len(next(iter(inputs.values()))))
            try:
                wanted, _ = calibration.estimate_statistics(of.half, [(as_half_inputs(of.sample, inputs), labels)])
            except ValueError:  # such a batch has none
                return
            if not wanted.isfinite().all():  # see `hosfl.edge.export._difference`
                return
            found = run({name: x.numpy() for name, x in inputs.items()})
            _check(found, wanted.numpy(), [len(t) for t in running.values()], f"{where}: of {describe_batch(inputs)}")

        for inputs in batches:
            compare(inputs)
        with of.moved_weights(run.tensors):
            compare(batches[0], WHERE_MOVED)


def _check(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], sizes: Sequence[int], batch: str) -> None:
    if found.shape != wanted.shape:
        raise ExportError(f"the graph's statistics are {found.shape}, and the half's {wanted.shape}")
    ends = np.cumsum(sizes)[:-1]
    ones, others = np.split(found, ends), np.split(wanted, ends)
    for n in range(0, len(others), 2):
        spread = np.sqrt(others[n + 1].max(initial=0))
        largest = max(np.abs(others[n]).max(initial=0), spread), spread**2
        for one, other, size in zip(ones[n : n + 2], others[n : n + 2], largest, strict=True):
            if not (apart := np.abs(one - other).max(initial=0)) <= TOLERANCE * size:
                raise ExportError(
                    f"the graph's statistics are not the half's{batch} numbers differ by {apart:.3g}, and the largest"
                    f" is {size:.3g}"
                )
