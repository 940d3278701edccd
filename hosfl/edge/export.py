"""A client half as ONNX graphs without weights, for clients that have no torch: see `hosfl.edge.half`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hosfl.edge.graph import externalize_weights, split_graph
from hosfl.edge.half import Half, graph_name
from hosfl.edge.original import TOLERANCE, WHERE_MOVED, ExportError, Original, describe_batch, original
from hosfl.edge.tracing import trace_graph
from hosfl.halves.inputs import Inputs, mask_of


def export_half(
    half: nn.Module,
    sample: Inputs,
    entries: Sequence[str] = ("",),
    most: tuple[int, int] = (0, 0),
    beside_gradient: bool = False,
    running: Collection[str] = (),
) -> list[bytes]:
    """A client half as ONNX models without weights: they have them from the half's base file.

    Args:
        half: float32 or bfloat16, on the CPU. One in bfloat16 has a graph that computes in float32, of weights in
            bfloat16.
        sample: inputs as the half takes them, a tensor or tensors by name; their values do not matter, but for the
            checks. Batches may have any size, and texts, which are integers [batch, tokens], any length that the half
            takes.
        entries: of the half's blocks, see `hosfl.halves.blocks.BlockEntry`. There is one model for each block, which
            computes the next block's input, the last one the cut; and one more for the layers before the first block.
            What is cheap and depends on the half's inputs only, such as an attention's mask, each may compute itself.
        most: samples of a batch and tokens of a text, as many as there will ever be: the graph is compared there as
            well.
        beside_gradient: a client has the gradient's graph as well, so that frozen weights are not to be constants: of
            these each session would make a copy of its own, while others are pages of the base file, which all share.
        running: buffers that change as weights do that move, such as running statistics.

    Every tensor of the half's state dict is an initializer whose bytes lie in base.safetensors, which is the file that
    `hosfl.runs.checkpoint.save_module` writes; those that require grad, or are running, are graph inputs as well, so
    that the holder of a session may give it memory of its own for them. onnxruntime then makes the half's output of the
    sample and of other batches, and is seen to follow every weight that moves.

    Raises:
        ExportError: what stands in the way.
        ImportError: onnx or onnxscript is missing.
    """
    with original(half, sample) as of:
        model = trace_graph(of, [entry for entry in entries if entry])
        found = split_graph(model, *externalize_weights(model, of, beside_gradient, running))
        _compare(of, of.batches(most), found, running)
    return found


def _compare(
    of: Original, batches: Sequence[Mapping[str, Tensor]], pieces: Sequence[bytes], running: Collection[str]
) -> None:
    """Raises ExportError where onnxruntime makes something else of the pieces than torch of the half."""
    graphs = {graph_name(number): piece for number, piece in enumerate(pieces)}
    with of.graph_folder(f"the graph of the {of.kind}", graphs) as folder:
        run = Half(folder, list(of.moving), len(pieces), running=list(running))

        def compare(inputs: Mapping[str, Tensor], where: str = "") -> None:
            found = run({name: x.numpy() for name, x in inputs.items()})
            if wrong := _difference(found, of.cut(inputs).numpy(), mask_of(inputs)):
                raise ExportError(
                    f"the graph of the {of.kind} is not the half{where}: of {describe_batch(inputs)} {wrong}"
                )

        for inputs in batches:
            compare(inputs)
        run.check({name: x.numpy() for name, x in batches[-1].items()})
        with of.moved_weights(run.tensors):
            compare(batches[0], WHERE_MOVED)


def _difference(cut: NDArray[Any], wanted: NDArray[Any], mask: Tensor | None) -> str:
    """What is wrong with a graph's output, or nothing. Of padding it must be finite: what it is, nobody looks at, and
    runtimes have their own answers to an attention that looks nowhere. The half's own may be NaN where it looks nowhere
    in a shorter text, or where a root's weight has moved: that says nothing of the graph."""
    if cut.shape != wanted.shape:
        return f"it makes {[*cut.shape]}, and the half {[*wanted.shape]}"
    known = np.isfinite(wanted)
    if not np.isfinite(cut[known]).all():
        return "it makes infinite or NaN numbers"
    if mask is not None and cut.shape[:2] == mask.shape:
        known[mask.numpy() == 0] = False
    cut, wanted = cut[known], wanted[known]
    apart, largest = np.abs(cut - wanted).max(initial=0), np.abs(wanted).max(initial=0)
    return "" if apart <= TOLERANCE * largest else f"numbers differ by {apart:.3g}, and the largest is {largest:.3g}"
