"""Export of a client half's gradient as an ONNX graph, with which an inference runtime backpropagates.

`gradient.py` runs the graph. torch exports the half and its backward pass as one graph of plain operators; its API for
this is not public yet.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_structure

from hosfl.edge.gradient import BLOCK_INPUT, GRADIENT, GRADIENT_PREFIX, MULTIPLIER, Gradient
from hosfl.edge.graph import externalize_weights, remove_unread_inputs, serialize_part
from hosfl.edge.half import BASE
from hosfl.edge.source import TOLERANCE, WHERE_MOVED, ExportError, ExportSource, describe_batch, export_source, is_text
from hosfl.edge.tracing import OnnxEmbeddings, PositionalHalf, as_export_errors, silence_exporter
from hosfl.halves.blocks import capture_entry_input
from hosfl.halves.inputs import Inputs, call
from hosfl.halves.narrow import narrow_bfloat16_as_floats
from hosfl.probing.probe import EmbeddingGradients
from hosfl.protocol.weights import Weights

# Relative to the largest gradient: smaller ones, such as that of a key's bias, may be rounding errors alone.
NEGLIGIBLE = 1e-3
aten = torch.ops.aten


def export_gradient(
    half: nn.Module,
    sample: Inputs,
    entry: str = "",
    max_sizes: tuple[int, int] = (0, 0),
    running: Collection[str] = (),
) -> bytes:
    """Export d <multiplier, cut> / d weights of a client half as an ONNX model without weights.

    half, sample, max_sizes, running: as in `export_half`. entry: that of the half's first block, whose input is then an
    input of the graph; "": the graph begins with the half's own inputs.

    The graph's inputs are the multiplier and those named above; its outputs are the gradients of the trainable weights,
    by name. Weights that the cut does not depend on have no output. For embeddings see `EmbeddingGradients`. The
    gradients are compared with torch's.

    Raises ExportError as `export_half`, and for a half whose backward pass torch cannot export.
    """
    with export_source(half, sample) as source, EmbeddingGradients():
        model = _trace_backward(source, [entry] if entry else [])
        graph = _extract_gradients(model, *externalize_weights(model, source, True, running), bool(entry))
        _compare(source, source.batches(max_sizes), entry, graph, running)
    return graph


class _InnerProduct(PositionalHalf):
    """A module that takes the multiplier and the half's inputs, and makes <multiplier, cut> and the entries' inputs."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        multiplier, *inputs = tensors
        cut, *entry_inputs = super().forward(*inputs)
        return (cut * multiplier).sum(), *entry_inputs


def _trace_backward(source: ExportSource, entries: Sequence[str]) -> Any:
    """Export both passes, and return the model in onnxscript's representation.

    Its outputs are those of `_InnerProduct`, then the gradients.
    """
    from torch.export.experimental import _export_forward_backward

    inputs = source.trace_inputs()
    cut = source.cut(inputs)
    auto = torch.export.Dim.AUTO
    texts = {name for name, x in inputs.items() if source.any_length and is_text(name, x)}
    input_sizes = tuple({0: auto, **({1: auto} if name in texts else {})} for name in inputs)
    cut_sizes = {0: auto, **({1: auto} if texts else {})}
    product = _InnerProduct(source, entries)
    with (
        as_export_errors(source.half, ", or take an estimator without a gradient, such as one-sided"),
        silence_exporter(),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),  # attention as matrix products and a softmax, whose derivatives ONNX has
        _unused_weights_frozen(source.half, source.sample),
        narrow_bfloat16_as_floats(source.half),
        OnnxEmbeddings(),
        _PadAsConcat(),
    ):
        arguments = (torch.ones_like(cut), *inputs.values())
        forward = torch.export.export(product, arguments, dynamic_shapes=((cut_sizes, *input_sizes),))
        _remove_tied_names(forward)
        passes = _export_forward_backward(forward)
        outputs, first = passes.graph_signature.output_specs, _first_names(product)
        names = [first.get(str(output.target)) for output in outputs]
        for output in outputs:
            output.kind = OutputKind.USER_OUTPUT  # the exporter drops outputs of any other kind
        passes.module_call_graph[0].signature.out_spec = tree_structure(tuple(range(len(outputs))))
        passes = passes.run_decompositions(DECOMPOSITIONS)
        program = torch.onnx.export(
            passes,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=[MULTIPLIER, *inputs],
            output_names=[f"output {n}" if name is None else GRADIENT_PREFIX + name for n, name in enumerate(names)],
        )
    assert program is not None
    return program.model


class _PadAsConcat(TorchFunctionMode):
    """Mode in which padding with a constant is a concatenation.

    torch cannot export the backward pass of `pad` for a batch of any size, as in a ResNet's shortcuts.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.pad:
            bound = _PAD.bind(*args, **kwargs).arguments
            if bound.get("mode", "constant") == "constant" and min(bound["pad"]) >= 0:
                return _pad(bound["input"], bound["pad"], bound.get("value") or 0.0)
        return function(*args, **kwargs)


_PAD = signature(nn.functional.pad)


def _pad(x: Tensor, pad: Sequence[int], value: float) -> Tensor:
    """`nn.functional.pad` with a constant, by concatenation."""
    for n, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        shapes = [[*x.shape[: x.dim() - n], size, *x.shape[x.dim() - n + 1 :]] for size in (before, after)]
        if before or after:
            x = torch.cat([x.new_full(shapes[0], value), x, x.new_full(shapes[1], value)], -n)
    return x


def _remove_tied_names(forward: torch.export.ExportedProgram) -> None:
    """Remove from a program the parameters that it does not read: further names of tied weights.

    A program reads a tied weight by one of its names only, and torch makes no gradient for the others.
    """
    specs = forward.graph_signature.input_specs
    inputs = [node for node in forward.graph.nodes if node.op == "placeholder"]
    for spec, node in zip(list(specs), inputs, strict=True):
        if spec.kind is InputKind.PARAMETER and not node.users:
            forward.graph.erase_node(node)
            specs.remove(spec)
            del forward.state_dict[str(spec.target)]


def _first_names(module: nn.Module) -> dict[str, str]:
    """Map each name of a parameter to the first of its names, which is the one in a log."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}


def _extract_gradients(model: Any, moving: Mapping[str, Any], fixed: Mapping[str, Any], from_block: bool) -> bytes:
    """Serialise the part of the model that computes the gradients.

    from_block: whether it begins with a block's input, which is the model's second output.
    """
    from onnxscript import ir

    graph, block_input = model.graph, []
    inputs, (_, *outputs) = list(graph.inputs), graph.outputs
    if from_block:
        block_input = [outputs.pop(0)]
    piece = ir.convenience.extract(graph, [*block_input, *inputs], outputs)
    if from_block:
        piece.inputs[0].name = BLOCK_INPUT
        remove_unread_inputs(piece)
    return serialize_part(model, piece, moving, fixed)


@contextmanager
def _unused_weights_frozen(half: nn.Module, sample: Inputs) -> Iterator[None]:
    """Context manager: freeze the weights that the cut does not depend on, for which torch exports no gradient."""
    weights = [p for p in half.parameters() if p.requires_grad]
    cut = call(half, sample)
    gradients = torch.autograd.grad(cut, weights, torch.ones_like(cut), allow_unused=True)
    unused = [p for p, gradient in zip(weights, gradients, strict=True) if gradient is None]
    try:
        for p in unused:
            p.requires_grad_(False)
        yield
    finally:
        for p in unused:
            p.requires_grad_(True)


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """The backward pass of a convolution as convolutions, which ONNX has.

    Returns (input's gradient, weight's, bias's), with None for those that `output_mask` does not
    select. The weight's gradient is the convolution of the inputs, with samples and channels exchanged, with the
    output's gradient.
    """
    if transposed:
        return NotImplemented
    dims = range(2, x.dim())
    stride, padding, dilation = (  # a single number holds for every dimension
        [*sizes] * (len(dims) // len(sizes)) for sizes in (stride, padding, dilation)
    )
    input_gradient = weight_gradient = bias_gradient = None
    if output_mask[0]:
        covered = [(gradient.shape[d] - 1) * stride[d - 2] + dilation[d - 2] * (weight.shape[d] - 1) + 1 for d in dims]
        uncovered = [x.shape[d] + 2 * padding[d - 2] - size for d, size in zip(dims, covered, strict=True)]
        input_gradient = aten.convolution(gradient, weight, None, stride, padding, dilation, True, uncovered, groups)
    if output_mask[1]:
        samples, channels, rest = x.shape[0], x.shape[1] // groups, x.shape[2:]
        exchanged = x.reshape(samples, groups, channels, *rest).transpose(0, 2)
        exchanged = exchanged.reshape(channels, groups * samples, *rest)
        kernel, zeros = gradient.transpose(0, 1), [0] * len(rest)
        weight_gradient = aten.convolution(exchanged, kernel, None, dilation, padding, stride, False, zeros, groups)
        for d in dims:
            weight_gradient = weight_gradient.narrow(d, 0, weight.shape[d])
        weight_gradient = weight_gradient.transpose(0, 1)
    if output_mask[2]:
        bias_gradient = gradient.sum([0, *dims])
    return input_gradient, weight_gradient, bias_gradient


def _index_put_as_scatter(
    table: Tensor, indices: Sequence[Tensor | None], rows: Tensor, accumulate: bool = False
) -> Any:
    """`index_put` that adds rows to a table's rows, as in an embedding's backward pass, as `scatter_add`.

    Rows with the same index have to be summed, and ONNX does so only in a scatter.
    """
    (index, *more_indices) = indices
    if not accumulate or more_indices or index is None or table.dim() != 2:
        return NotImplemented
    rows = rows.reshape(-1, table.shape[1])
    return table.scatter_add(0, index.reshape(-1, 1).expand(-1, table.shape[1]), rows)


def _avg_pool_backward(
    gradient: Tensor,
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Any:
    """The backward pass of `avg_pool2d`: that of a convolution with equal weights."""
    if ceil_mode or (any(padding) and not count_include_pad):
        return NotImplemented
    channels, stride = x.shape[1], stride or size
    weight = torch.full((channels, 1, *size), 1 / (divisor or math.prod(size)))
    output_mask = [True, False, False]
    return _convolution_backward(
        gradient, x, weight, None, stride, padding, [1] * len(size), False, [0] * len(size), channels, output_mask
    )[0]


# Decompositions of operators that ONNX or the exporter lacks.
DECOMPOSITIONS: dict[Any, Any] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten.index_put.default: _index_put_as_scatter,
    aten.empty_permuted.default: lambda size, order, **how: torch.zeros(size),
}


def _compare(
    source: ExportSource, batches: Sequence[Mapping[str, Tensor]], entry: str, graph: bytes, running: Collection[str]
) -> None:
    """Raise ExportError where onnxruntime computes other gradients than torch."""
    with source.graph_folder(f"the gradient's graph of the {source.kind}", {GRADIENT: graph}) as folder:
        stored, moving = Weights(folder / BASE), source.moving
        weights, statistics = ([stored[name] for name in names] for names in (moving, running))
        run = Gradient(folder, list(moving), weights, running=list(running), statistics=statistics)

        def compare(inputs: Mapping[str, Tensor], where: str = "") -> tuple[Any, Any, Any]:
            """Compare on one batch, and return the arguments with which the graph was run."""
            entry_inputs: list[Tensor] = []
            with torch.enable_grad(), capture_entry_input(source.half, entry, entry_inputs.append):
                cut = source.cut(inputs)
                multiplier = torch.randn(cut.shape, generator=torch.Generator().manual_seed(len(cut)))
                gradients = torch.autograd.grad(cut, list(moving.values()), multiplier, allow_unused=True)
            hidden = entry_inputs[0].numpy() if entry_inputs else None
            arguments = {name: x.numpy() for name, x in inputs.items()}, multiplier.numpy(), hidden
            actual = run(*arguments)
            expected = [np.zeros_like(a) if g is None else g.numpy() for a, g in zip(actual, gradients, strict=True)]
            if not all(np.isfinite(gradient).all() for gradient in expected):  # see `hosfl.edge.export._difference`
                return arguments
            least = NEGLIGIBLE * max(np.abs(gradient).max(initial=0) for gradient in expected)
            for name, a, e in zip(moving, actual, expected, strict=True):
                distance, largest = np.abs(a - e).max(initial=0), np.abs(e).max(initial=0)
                if not distance <= TOLERANCE * max(largest, least):
                    raise ExportError(
                        f"the graph's gradient of {name} is not torch's{where}: for {describe_batch(inputs)}, numbers"
                        f" differ by {distance:.3g}, and the largest is {largest:.3g}"
                    )
            return arguments

        for inputs in batches:
            arguments = compare(inputs)
        run.check(*arguments)
        with source.shifted_weights(run.tensors):
            compare(batches[0], WHERE_MOVED)
