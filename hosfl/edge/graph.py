"""ONNX graphs whose weights are in the base file, and splitting a graph into pieces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from hosfl.edge.half import BASE, LAYOUT, PREFIX
from hosfl.edge.source import ExportError, ExportSource
from hosfl.halves.narrow import narrow_names

MAX_CONSTANTS = 1 << 20  # bytes of a graph's constants that are no weights: every client of a run fetches them


def externalize_weights(
    model: Any, source: ExportSource, all_matrices: bool, running: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the model refer to its weights in the base file instead of holding them.

    model: changed in place. all_matrices: see the second mapping. running: names of running statistics.

    Returns two mappings of the weights by their names in the graph:
    - those that change: trainable ones and running statistics;
    - frozen ones that must not be constants: those stored narrow, matrices in bfloat16 and, with `all_matrices`, all
      other matrices.

    Raises ExportError for a model with large constants that are not weights, or with nested loops or branches.
    """
    header_end = 8 + int.from_bytes(source.base[:8], "little")
    weights, moving, fixed = _externalize(model.graph, source, header_end, all_matrices, running)
    _check_constants(model.graph)
    _check_branches(model.graph)
    for value in weights:
        model.graph.register_initializer(value)
    _rename_outputs_like_inputs(model.graph)
    _remove_metadata(model.graph)
    model.metadata_props[LAYOUT] = hashlib.sha256(source.base[:header_end]).hexdigest()
    return moving, fixed


def _externalize(
    graph: Any, source: ExportSource, header_end: int, all_matrices: bool, running: Collection[str]
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Take the half's weights out of the graph's initializers and give them references to the base file.

    header_end: offset of the base file's first tensor. Returns all weights, and `externalize_weights`'s two mappings.
    """
    from onnxscript import ir

    layout: dict[str, Any] = json.loads(source.base[8:header_end])
    names = dict[int, list[str]]()
    state = source.half.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    weights, moving, fixed, narrow = [], dict[str, Any](), dict[str, Any](), set(narrow_names(source.half))
    for first, *tied in names.values():  # of a tied weight's names a log has the first, too
        tensor = state[first]
        initializers = [graph.initializers.pop(PREFIX + name, None) for name in (first, *tied)]
        value, *duplicates = [value for value in initializers if value is not None] or [None]
        moves = tensor.requires_grad or first in running
        if value is None and moves:  # no operator reads it
            value = ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(tensor.shape))
        if value is None:
            continue
        for duplicate in duplicates:
            ir.convenience.replace_all_uses_with(duplicate, value)
        begin, stop = layout[first]["data_offsets"]
        if in_bfloat16 := layout[first]["dtype"] == "BF16":
            value = _cast_to_float32(graph, value)
        value.name = PREFIX + first
        value.const_value = ir.ExternalTensor(
            BASE, header_end + begin, stop - begin, value.dtype, shape=value.shape, name=value.name
        )
        weights.append(value)
        if moves:
            moving[value.name] = value
        elif first in narrow or ((all_matrices or in_bfloat16) and tensor.dim() > 1):
            fixed[value.name] = value
    return weights, moving, fixed


def _check_constants(graph: Any) -> None:
    """Raise ExportError if the graph's remaining initializers, which are no weights, are larger than MAX_CONSTANTS."""
    constants = {value.name: value.const_value.nbytes for value in graph.initializers.values()}
    if (size := sum(constants.values())) > MAX_CONSTANTS:
        largest = max(constants, key=lambda name: constants[name])
        raise ExportError(
            f"the graph has {size:,} bytes of constants that are no weights, most of them in "
            f"{largest.removeprefix(PREFIX)}: register it as a persistent buffer, so that the base file has it"
        )


def _check_branches(graph: Any) -> None:
    """Raise ExportError for loops or branches within others."""
    if branches := {node.op_type for node in _inner_nodes(graph) if _subgraphs(node)}:
        raise ExportError(
            f"the graph has nested loops or branches ({', '.join(sorted(branches))}), over which onnxruntime"
            " may end the process: write that layer's forward pass without them, or cut the model elsewhere"
        )


def _rename_outputs_like_inputs(graph: Any) -> None:
    """Rename operators' outputs that have the name of a graph input, such as those of a half with argument "linear"."""
    input_names = {value.name for value in graph.inputs}
    for output in (output for node in graph.all_nodes() for output in node.outputs):
        if output.name in input_names:
            output.name = f"made {output.name}"


def _remove_metadata(graph: Any) -> None:
    """Remove the exporter's metadata: the source files and lines that each operator comes from."""
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()


def _cast_to_float32(graph: Any, value: Any) -> Any:
    """Replace a float32 value by a cast of a bfloat16 one, and return the latter."""
    from onnxscript import ir

    stored = ir.Value(type=ir.TensorType(ir.DataType.BFLOAT16), shape=value.shape)
    cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = f"wide {value.name}", value.type, value.shape
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    graph.insert_before(graph[0], cast)
    return stored


def _subgraphs(node: Any) -> list[Any]:
    """A node's subgraphs, such as a loop's body."""
    return [a.value for a in node.attributes.values() if a.type.name == "GRAPH"]


def _inner_nodes(graph: Any) -> list[Any]:
    """The nodes of the graph's subgraphs, one level deep."""
    return [inner for node in graph for body in _subgraphs(node) for inner in body]


def split_graph(model: Any, moving: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[bytes]:
    """Split the model at its entries: inputs to first entry, first to second entry, and so on to the cut.

    Each piece has the weights that it reads; the first also has the moving ones that no piece reads. Weights in
    `moving` and `fixed` are graph inputs as well. Returns serialised models.
    """
    from onnxscript import ir

    graph, pieces = model.graph, []
    inputs, (cut, *entries) = list(graph.inputs), graph.outputs
    if entries and entries[0].is_graph_input():
        del entries[0]  # no operator comes before it
    for begin, end in pairwise((None, *entries, cut)):
        piece = ir.convenience.extract(graph, inputs if begin is None else [begin, *inputs], [end])
        if begin is not None:
            remove_unread_inputs(piece)
        pieces.append(piece)
    _register_unread(
        pieces[0], {name: v for name, v in moving.items() if not any(name in p.initializers for p in pieces)}
    )
    return [_serialize(model, piece, {*moving, *fixed}) for piece in pieces]


def serialize_part(model: Any, piece: Any, moving: Mapping[str, Any], fixed: Mapping[str, Any]) -> bytes:
    """Serialise a part of the model's graph as a model of its own, with all moving weights."""
    _register_unread(piece, {name: value for name, value in moving.items() if name not in piece.initializers})
    return _serialize(model, piece, {*moving, *fixed})


def remove_unread_inputs(piece: Any) -> None:
    """Remove a graph's inputs that no operator reads, except the first."""
    for value in piece.inputs[1:]:
        if not value.uses():
            piece.inputs.remove(value)


def _register_unread(piece: Any, weights: Mapping[str, Any]) -> None:
    """Add weights that no operator reads, since a session is given an array for every moving weight."""
    from onnxscript import ir

    for weight in weights.values():
        copy = ir.Value(name=weight.name, type=weight.type, shape=weight.shape, const_value=weight.const_value)
        piece.register_initializer(copy)


def _serialize(model: Any, piece: Any, as_inputs: Collection[str]) -> bytes:
    """Serialise a part of the model's graph; its weights named in `as_inputs` are graph inputs as well.

    These are the moving weights, and frozen ones of which a runtime would keep copies if they were constants: a wide
    copy of each weight stored narrow, and one copy per graph of each that several graphs read.
    """
    from onnxscript import ir

    weights = sorted(piece.initializers.values(), key=lambda value: str(value.name))
    piece.initializers.clear()  # registered again below, sorted by name
    for value in weights:
        piece.register_initializer(value)
    piece.inputs.extend(value for value in weights if value.name in as_inputs)
    model.graph = piece
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
