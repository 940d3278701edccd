"""Graphs without weights: these lie in a base file, and a graph that is cut into pieces has in each those it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from hosfl.edge.half import BASE, LAYOUT, PREFIX
from hosfl.edge.original import ExportError, Original
from hosfl.halves.narrow import narrow_names

CONSTANTS = 1 << 20  # bytes of a graph that are no weights, at most: every client of a run fetches it


def externalize_weights(
    model: Any, of: Original, all_matrices: bool, running: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lets the model's weights lie in a base file. Returns those that move or are running, and of the others those that
    are to be no constants, by their names in the graph: those that are stored narrow, or all but the small ones."""
    from onnxscript import ir

    half, base = of.half, of.base
    end = 8 + int.from_bytes(base[:8], "little")
    places: dict[str, Any] = json.loads(base[8:end])
    graph, names = model.graph, dict[int, list[str]]()
    state = half.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    weights, moving, fixed, stored = [], dict[str, Any](), dict[str, Any](), set(narrow_names(half))
    for first, *others in names.values():  # of a tied weight's names a log has the first as well
        tensor = state[first]
        found = [graph.initializers.pop(PREFIX + name, None) for name in (first, *others)]
        value, *same = [value for value in found if value is not None] or [None]
        moves = tensor.requires_grad or first in running
        if value is None and moves:  # it moves, and nothing reads it
            value = ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(tensor.shape))
        if value is None:
            continue
        for other in same:
            ir.convenience.replace_all_uses_with(other, value)
        begin, stop = places[first]["data_offsets"]
        if in_16_bits := places[first]["dtype"] == "BF16":
            value = _cast_to_float32(graph, value)
        value.name = PREFIX + first
        value.const_value = ir.ExternalTensor(
            BASE, end + begin, stop - begin, value.dtype, shape=value.shape, name=value.name
        )
        weights.append(value)
        if moves:
            moving[value.name] = value
        elif first in stored or ((all_matrices or in_16_bits) and tensor.dim() > 1):
            fixed[value.name] = value
    constants = {value.name: value.const_value.nbytes for value in graph.initializers.values()}
    if (size := sum(constants.values())) > CONSTANTS:
        largest = max(constants, key=lambda name: constants[name])
        raise ExportError(
            f"the graph has {size:,} bytes of constants that are no weights, most of them in "
            f"{largest.removeprefix(PREFIX)}: register it as a persistent buffer, so that the base file has it"
        )
    if branches := {node.op_type for node in _inner_nodes(graph) if _subgraphs(node)}:
        raise ExportError(
            f"the graph has loops or branches in one another ({', '.join(sorted(branches))}), over which onnxruntime"
            " may end the process: write that layer's forward pass without them, or cut the model elsewhere"
        )
    for value in weights:
        graph.register_initializer(value)
    taken = {value.name for value in graph.inputs}
    for output in (output for node in graph.all_nodes() for output in node.outputs):
        if output.name in taken:  # as of a half with an argument "linear"
            output.name = f"made {output.name}"
    graph.metadata_props.clear()  # where which line of whose code lies
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    model.metadata_props[LAYOUT] = hashlib.sha256(base[:end]).hexdigest()
    return moving, fixed


def _cast_to_float32(graph: Any, value: Any) -> Any:
    """A weight in bfloat16, of which an operator makes the value in float32."""
    from onnxscript import ir

    stored = ir.Value(type=ir.TensorType(ir.DataType.BFLOAT16), shape=value.shape)
    cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = f"wide {value.name}", value.type, value.shape
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    graph.insert_before(graph[0], cast)
    return stored


def _subgraphs(node: Any) -> list[Any]:
    """The graphs that a node holds, such as a loop's body."""
    return [a.value for a in node.attributes.values() if a.type.name == "GRAPH"]


def _inner_nodes(graph: Any) -> list[Any]:
    """The nodes of the graphs that a graph's own nodes hold, and not of those within them."""
    return [inner for node in graph for body in _subgraphs(node) for inner in body]


def split_graph(model: Any, moving: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[bytes]:
    """The model from its inputs to the first entry, from there to the next, and so on to the cut.

    Each has its weights, of which those that move are inputs as well; the first has those that nothing reads, too.
    """
    from onnxscript import ir

    graph, found = model.graph, []
    given, (cut, *entries) = list(graph.inputs), graph.outputs
    if entries and entries[0].is_graph_input():
        del entries[0]  # nothing is done in front of it
    for begin, end in pairwise((None, *entries, cut)):
        piece = ir.convenience.extract(graph, given if begin is None else [begin, *given], [end])
        if begin is not None:
            remove_unread_inputs(piece)
        found.append(piece)
    _register_unread(
        found[0], {name: v for name, v in moving.items() if not any(name in p.initializers for p in found)}
    )
    return [_serialize(model, piece, {*moving, *fixed}) for piece in found]


def serialize_part(model: Any, piece: Any, moving: Mapping[str, Any], fixed: Mapping[str, Any]) -> bytes:
    """A part of the model's graph as a model by itself, which has all weights that move."""
    _register_unread(piece, {name: value for name, value in moving.items() if name not in piece.initializers})
    return _serialize(model, piece, {*moving, *fixed})


def remove_unread_inputs(piece: Any) -> None:
    """Of a graph's inputs but the first those that nothing reads."""
    for value in piece.inputs[1:]:
        if not value.uses():
            piece.inputs.remove(value)


def _register_unread(piece: Any, weights: Mapping[str, Any]) -> None:
    """Let a graph have weights that nothing reads: whoever opens it gives each of them memory."""
    from onnxscript import ir

    for weight in weights.values():
        copy = ir.Value(name=weight.name, type=weight.type, shape=weight.shape, const_value=weight.const_value)
        piece.register_initializer(copy)


def _serialize(model: Any, piece: Any, open_: Collection[str]) -> bytes:
    """A part of the model's graph as a model; its weights of these names are inputs as well.

    They are those that move, and frozen ones of which a runtime would keep copies if they were constants: wide ones of
    those that are stored narrow, and one for each graph of those that several have.
    """
    from onnxscript import ir

    weights = sorted(piece.initializers.values(), key=lambda value: str(value.name))
    piece.initializers.clear()  # they were in any order
    for value in weights:
        piece.register_initializer(value)
    piece.inputs.extend(value for value in weights if value.name in open_)
    model.graph = piece
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
