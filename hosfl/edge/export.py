"""Export of a client half as ONNX graphs without weights, for clients without torch: see `hosfl.edge.half`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hosfl.edge.graph import externalize_weights, split_graph
from hosfl.edge.half import Half, graph_name
from hosfl.edge.source import TOLERANCE, WHERE_MOVED, ExportError, ExportSource, describe_batch, export_source
from hosfl.edge.tracing import trace_graph
from hosfl.halves.inputs import Inputs, mask_of


def export_half(
    half: nn.Module,
    sample: Inputs,
    entries: Sequence[str] = ("",),
    max_sizes: tuple[int, int] = (0, 0),
    with_gradient: bool = False,
    running: Collection[str] = (),
) -> list[bytes]:
    """Export a client half as ONNX models without weights; a session reads these from the half's base file.

    Args:
        half: float32 or bfloat16, on the CPU. The graph of a bfloat16 half keeps its weights in bfloat16 and computes
            in float32.
        sample: inputs as the half takes them, a tensor or tensors by name. The graph takes batches of any size, and
            texts, which are integers [batch, tokens], of any length that the half takes. The values matter to the
            checks only.
        entries: those of the half's blocks, see `hosfl.halves.blocks.BlockEntry`. There is one model per block, which
            computes the next block's input or, in the last one, the cut; and one for the layers before the first block,
            if any. Cheap values that depend on the half's inputs only, such as attention masks, may be computed in
            several models.
        max_sizes: the largest batch (samples) and the longest text (tokens) that clients will have. The graph is
            compared at these sizes, too.
        with_gradient: whether clients open the gradient's graph beside this one. Frozen matrices are then inputs
            instead of constants, so that both sessions share the base file's pages; each would copy constants.
        running: names of buffers that change during a run, such as running statistics.

    Every tensor of the half's state dict is an initializer whose bytes lie in base.safetensors, which is the file that
    `hosfl.runs.checkpoint.save_module` writes. Tensors that require grad, or are running, are graph inputs as well, so
    that a session can be given arrays for them.

    The models are checked: onnxruntime's outputs must be the half's, for the sample and other batches, and must follow
    every change of a moving weight.

    Raises:
        ExportError: the half cannot be exported, or onnxruntime computes something else.
        ImportError: onnx or onnxscript is missing.
    """
    with export_source(half, sample) as source:
        model = trace_graph(source, [entry for entry in entries if entry])
        pieces = split_graph(model, *externalize_weights(model, source, with_gradient, running))
        _compare(source, source.batches(max_sizes), pieces, running)
    return pieces


def _compare(
    source: ExportSource, batches: Sequence[Mapping[str, Tensor]], pieces: Sequence[bytes], running: Collection[str]
) -> None:
    """Raise ExportError where the pieces under onnxruntime compute something else than the half under torch."""
    graphs = {graph_name(number): piece for number, piece in enumerate(pieces)}
    with source.graph_folder(f"the graph of the {source.kind}", graphs) as folder:
        run = Half(folder, list(source.moving), len(pieces), running=list(running))

        def compare(inputs: Mapping[str, Tensor], where: str = "") -> None:
            cut = run({name: x.numpy() for name, x in inputs.items()})
            if difference := _difference(cut, source.cut(inputs).numpy(), mask_of(inputs)):
                raise ExportError(
                    f"the graph of the {source.kind} is not the half{where}: for {describe_batch(inputs)}, {difference}"
                )

        for inputs in batches:
            compare(inputs)
        run.check({name: x.numpy() for name, x in batches[-1].items()})
        with source.shifted_weights(run.tensors):
            compare(batches[0], WHERE_MOVED)


def _difference(cut: NDArray[Any], expected: NDArray[Any], mask: Tensor | None) -> str:
    """Describe how a graph's cut differs from the half's; "" if it does not.

    At padding the cut must be finite, but may have other values: nothing uses them, and runtimes differ in attention
    over no token. Elements where the half's own cut is not finite are not compared: this happens where a shortened text
    has no token left, or where a weight under a root was shifted, and says nothing of the graph.
    """
    if cut.shape != expected.shape:
        return f"it makes {[*cut.shape]}, and the half {[*expected.shape]}"
    compared = np.isfinite(expected)
    if not np.isfinite(cut[compared]).all():
        return "it makes infinite or NaN numbers"
    if mask is not None and cut.shape[:2] == mask.shape:
        compared[mask.numpy() == 0] = False
    cut, expected = cut[compared], expected[compared]
    distance, largest = np.abs(cut - expected).max(initial=0), np.abs(expected).max(initial=0)
    if distance <= TOLERANCE * largest:
        return ""
    return f"numbers differ by {distance:.3g}, and the largest is {largest:.3g}"
