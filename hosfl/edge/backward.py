"""A client half's gradient as an ONNX graph: an inference runtime that runs it backpropagates. See `gradient.py`.

torch writes the half and its backward pass as one graph of plain operators. That way of torch's is not public yet.
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
from hosfl.edge.original import TOLERANCE, WHERE_MOVED, ExportError, Original, describe_batch, is_text, original
from hosfl.edge.tracing import OnnxLookups, Positional, as_export_errors, silence_exporter
from hosfl.halves.blocks import capture_entry_input
from hosfl.halves.inputs import Inputs, call
from hosfl.halves.narrow import narrow_bfloat16_as_floats
from hosfl.probing.probe import Lookups
from hosfl.protocol.weights import Weights

NEGLIGIBLE = 1e-3  # of the largest gradient: smaller ones may be rounding alone, such as that of a key's bias
aten = torch.ops.aten


def export_gradient(
    half: nn.Module,
    sample: Inputs,
    entry: str = "",
    most: tuple[int, int] = (0, 0),
    running: Collection[str] = (),
) -> bytes:
    """d <multiplier, cut> / d weights of a client half as an ONNX model without weights: see `export_half`.

    entry: of the half's first block, with whose input the graph begins; "": with the half's own.
    most, running: as there.

    Its inputs are the multiplier and these, its outputs the gradients by the names of the weights that move. Those that
    the cut does not depend on have none. The gradients are compared with torch's. Embeddings have that of `Lookups`.

    Raises ExportError as `export_half`, and where torch has no such graph.
    """
    with original(half, sample) as of, Lookups():
        model = _traced_backward(of, [entry] if entry else [])
        graph = _gradients(model, *externalize_weights(model, of, True, running), bool(entry))
        _compare(of, of.batches(most), entry, graph, running)
    return graph


class _InnerProduct(Positional):
    """<multiplier, cut>, whose gradient it is, and what comes to the entries; the multiplier is the first argument."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        multiplier, *inputs = tensors
        cut, *reached = super().forward(*inputs)
        return (cut * multiplier).sum(), *reached


def _traced_backward(of: Original, entries: Sequence[str]) -> Any:
    """The exporter's model of both passes, in onnxscript's representation.

    Its outputs are those of `_InnerProduct`, then the gradients.
    """
    from torch.export.experimental import _export_forward_backward

    inputs = of.traced()
    cut = of.cut(inputs)
    auto = torch.export.Dim.AUTO
    texts = {name for name, x in inputs.items() if of.any_length and is_text(name, x)}
    sizes = tuple({0: auto, **({1: auto} if name in texts else {})} for name in inputs)
    of_cut = {0: auto, **({1: auto} if texts else {})}
    product = _InnerProduct(of, entries)
    # Attention as products and a softmax, whose derivatives are such too.
    with (
        as_export_errors(of.half, ", or take an estimator without a gradient, such as one-sided"),
        silence_exporter(),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        _without_unread_weights(of.half, of.sample),
        narrow_bfloat16_as_floats(of.half),
        OnnxLookups(),
        _PadAsConcat(),
    ):
        given = (torch.ones_like(cut), *inputs.values())
        forward = torch.export.export(product, given, dynamic_shapes=((of_cut, *sizes),))
        _remove_tied_names(forward)
        both = _export_forward_backward(forward)
        outputs, first = both.graph_signature.output_specs, _first_names(product)
        names = [first.get(str(output.target)) for output in outputs]
        for output in outputs:
            output.kind = OutputKind.USER_OUTPUT  # of others the exporter leaves no trace
        both.module_call_graph[0].signature.out_spec = tree_structure(tuple(range(len(outputs))))
        both = both.run_decompositions(DECOMPOSITIONS)
        program = torch.onnx.export(
            both,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=[MULTIPLIER, *inputs],
            output_names=[f"output {n}" if name is None else GRADIENT_PREFIX + name for n, name in enumerate(names)],
        )
    assert program is not None
    return program.model


class _PadAsConcat(TorchFunctionMode):
    """Padding with a number as a concatenation: torch cannot write the backward pass of its own where the number of
    samples is open, as in a ResNet's shortcuts."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        told = kwargs or {}
        if function is nn.functional.pad:
            found = _PAD.bind(*args, **told).arguments
            if found.get("mode", "constant") == "constant" and min(found["pad"]) >= 0:
                return _pad(found["input"], found["pad"], found.get("value") or 0.0)
        return function(*args, **told)


_PAD = signature(nn.functional.pad)


def _pad(x: Tensor, pad: Sequence[int], value: float) -> Tensor:
    for n, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        beside = [[*x.shape[: x.dim() - n], size, *x.shape[x.dim() - n + 1 :]] for size in (before, after)]
        if before or after:
            x = torch.cat([x.new_full(beside[0], value), x, x.new_full(beside[1], value)], -n)
    return x


def _remove_tied_names(forward: torch.export.ExportedProgram) -> None:
    """Of a weight that has several names a program uses one, and torch makes no gradient of the others."""
    specs = forward.graph_signature.input_specs
    inputs = [node for node in forward.graph.nodes if node.op == "placeholder"]
    for spec, node in zip(list(specs), inputs, strict=True):
        if spec.kind is InputKind.PARAMETER and not node.users:
            forward.graph.erase_node(node)
            specs.remove(spec)
            del forward.state_dict[str(spec.target)]


def _first_names(module: nn.Module) -> dict[str, str]:
    """Of each parameter's name the first of all that it has, by which a log knows it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}


def _gradients(model: Any, moving: Mapping[str, Any], fixed: Mapping[str, Any], begins: bool) -> bytes:
    """The model from its inputs, or from the block's where it begins with one, to the gradients."""
    from onnxscript import ir

    graph, begin = model.graph, []
    given, (_, *outputs) = list(graph.inputs), graph.outputs
    if begins:
        begin = [outputs.pop(0)]
    piece = ir.convenience.extract(graph, [*begin, *given], outputs)
    if begins:
        piece.inputs[0].name = BLOCK_INPUT
        remove_unread_inputs(piece)
    return serialize_part(model, piece, moving, fixed)


@contextmanager
def _without_unread_weights(half: nn.Module, sample: Inputs) -> Iterator[None]:
    """Without the weights that the cut does not depend on, of which torch makes no graph."""
    weights = [p for p in half.parameters() if p.requires_grad]
    cut = call(half, sample)
    found = torch.autograd.grad(cut, weights, torch.ones_like(cut), allow_unused=True)
    unread = [p for p, gradient in zip(weights, found, strict=True) if gradient is None]
    try:
        for p in unread:
            p.requires_grad_(False)
        yield
    finally:
        for p in unread:
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
    wanted: Sequence[bool],
) -> Any:
    """The backward pass of a convolution as convolutions, which ONNX has: by input, weight and bias.

    By the weight it is the convolution of the inputs, samples in the place of channels, with the gradient.
    """
    if transposed:
        return NotImplemented
    dims = range(2, x.dim())
    stride, padding, dilation = (  # one number is that of every dimension
        [*sizes] * (len(dims) // len(sizes)) for sizes in (stride, padding, dilation)
    )
    by_input = by_weight = by_bias = None
    if wanted[0]:
        reached = [(gradient.shape[d] - 1) * stride[d - 2] + dilation[d - 2] * (weight.shape[d] - 1) + 1 for d in dims]
        missed = [x.shape[d] + 2 * padding[d - 2] - size for d, size in zip(dims, reached, strict=True)]
        by_input = aten.convolution(gradient, weight, None, stride, padding, dilation, True, missed, groups)
    if wanted[1]:
        samples, channels, rest = x.shape[0], x.shape[1] // groups, x.shape[2:]
        turned = x.reshape(samples, groups, channels, *rest).transpose(0, 2).reshape(channels, groups * samples, *rest)
        kernel, none = gradient.transpose(0, 1), [0] * len(rest)
        by_weight = aten.convolution(turned, kernel, None, dilation, padding, stride, False, none, groups)
        for d in dims:
            by_weight = by_weight.narrow(d, 0, weight.shape[d])
        by_weight = by_weight.transpose(0, 1)
    if wanted[2]:
        by_bias = gradient.sum([0, *dims])
    return by_input, by_weight, by_bias


def _index_put_as_scatter(
    table: Tensor, indices: Sequence[Tensor | None], rows: Tensor, accumulate: bool = False
) -> Any:
    """Rows added to a table's, as in the backward pass of an embedding. Where several meet in one, ONNX adds them only
    if it scatters them."""
    (index, *others) = indices
    if not accumulate or others or index is None or table.dim() != 2:
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
    """The backward pass of averages over windows: the transpose of a convolution with equal weights."""
    if ceil_mode or (any(padding) and not count_include_pad):
        return NotImplemented
    channels, stride = x.shape[1], stride or size
    weight = torch.full((channels, 1, *size), 1 / (divisor or math.prod(size)))
    wanted = [True, False, False]
    return _convolution_backward(
        gradient, x, weight, None, stride, padding, [1] * len(size), False, [0] * len(size), channels, wanted
    )[0]


# What ONNX, or the exporter, has no operator for.
DECOMPOSITIONS: dict[Any, Any] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten.index_put.default: _index_put_as_scatter,
    aten.empty_permuted.default: lambda size, order, **how: torch.zeros(size),
}


def _compare(
    of: Original, batches: Sequence[Mapping[str, Tensor]], entry: str, graph: bytes, running: Collection[str]
) -> None:
    """Raises ExportError where onnxruntime makes other gradients than torch."""
    with of.graph_folder(f"the gradient's graph of the {of.kind}", {GRADIENT: graph}) as folder:
        stored, moving = Weights(folder / BASE), of.moving
        arrays = [[stored[name] for name in own] for own in (moving, running)]
        run = Gradient(folder, list(moving), arrays[0], running=list(running), statistics=arrays[1])

        def compare(inputs: Mapping[str, Tensor], where: str = "") -> tuple[Any, Any, Any]:
            """What was given to the graph."""
            reached: list[Tensor] = []
            with torch.enable_grad(), capture_entry_input(of.half, entry, reached.append):
                cut = of.cut(inputs)
                multiplier = torch.randn(cut.shape, generator=torch.Generator().manual_seed(len(cut)))
                wanted = torch.autograd.grad(cut, list(moving.values()), multiplier, allow_unused=True)
            arrays, given = {name: x.numpy() for name, x in inputs.items()}, multiplier.numpy()
            between = reached[0].numpy() if reached else None
            found = run(arrays, given, between)
            theirs = [np.zeros_like(f) if w is None else w.numpy() for f, w in zip(found, wanted, strict=True)]
            if not all(np.isfinite(gradient).all() for gradient in theirs):  # see `hosfl.edge.export._difference`
                return arrays, given, between
            least = NEGLIGIBLE * max(np.abs(gradient).max(initial=0) for gradient in theirs)
            for name, one, other in zip(moving, found, theirs, strict=True):
                apart, largest = np.abs(one - other).max(initial=0), np.abs(other).max(initial=0)
                if not apart <= TOLERANCE * max(largest, least):
                    raise ExportError(
                        f"the graph's gradient of {name} is not torch's{where}: of {describe_batch(inputs)} numbers"
                        f" differ by {apart:.3g}, and the largest is {largest:.3g}"
                    )
            return arrays, given, between

        for inputs in batches:
            given = compare(inputs)
        run.check(*given)
        with of.moved_weights(run.tensors):
            compare(batches[0], WHERE_MOVED)
