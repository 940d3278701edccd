"""A client half as ONNX graphs without weights, for clients that have no torch: see `hosfl.edge.half`."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from hosfl.edge.half import BASE, LAYOUT, PREFIX, STEP, Half, HalfError, graph_name
from hosfl.extras import needed
from hosfl.halves.blocks import at_entry
from hosfl.halves.follow import CutError
from hosfl.halves.inputs import Inputs, call, evaluating, mask_of, unchanged
from hosfl.halves.modules import copied
from hosfl.halves.narrow import in_their_dtype, narrow_names
from hosfl.halves.split import as_dtype
from hosfl.halves.transformer_halves import ClientHalf
from hosfl.protocol.arrays import widened
from hosfl.protocol.weights import as_file
from hosfl.tasks.reading import TOKENS
from hosfl_kernels import perturb_

ROWS = 3  # samples that a graph is made of: a batch of one would be taken for a size that never changes
MANY = 256  # samples of a batch on which it is tried, at most
CONSTANTS = 1 << 20  # bytes of a graph that are no weights, at most: every client of a run fetches it
CLOSE = 1e-4  # of the output's largest number
MOVED = " where its weights have moved"  # for errors


class ExportError(ValueError):
    """A client half that cannot be run without torch."""


def exported(
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
        entries: of the half's blocks, see `hosfl.halves.blocks.Begin`. There is one model for each, which makes of its
            input the next one's and at last the cut, and one more for what lies in front of them. What is cheap and of
            the half's own inputs, such as an attention's mask, each may compute for itself.
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
        model = graph_of(of, [entry for entry in entries if entry])
        pieces = _pieces(model, *without_weights(model, of, beside_gradient, running))
        _compare(of, of.batches(most), pieces, running)
    return pieces


@dataclass(frozen=True)
class Original:
    """A half that graphs are made of and compared with, and a sample of what it takes, both in float32.

    base: the bytes of its base file, in the dtypes that it is stored in. named: the sample by its names in a graph.
    any_length: whether it takes texts of other lengths.
    """

    half: nn.Module
    sample: Inputs
    base: bytes
    named: dict[str, Tensor]
    any_length: bool

    @property
    def kind(self) -> str:
        """The half's class, for errors."""
        return type(self.half).__name__

    @property
    def moving(self) -> dict[str, nn.Parameter]:
        """The weights that move, by name."""
        return {name: p for name, p in self.half.named_parameters() if p.requires_grad}

    def cut(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The half's output for named inputs."""
        output: Tensor = call(self.half, given_as(self.sample, inputs))
        return output

    def traced(self) -> dict[str, Tensor]:
        """The inputs that a graph is made of."""
        return resized(self.named, ROWS, shorter=self.any_length)

    def batches(self, most: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Batches on which graph and half are compared: at the ends of what clients send. The last is the smallest.

        Where a model's code looks at sizes, an export takes the way of the sizes that it sees, and says nothing of
        others. most: see `exported`.
        """
        given, (rows, tokens) = len(next(iter(self.named.values()))), most
        batches = [resized(self.named, given), resized(self.named, ROWS + 1, self.any_length)]
        if rows > given:
            batches.append(resized(self.named, min(rows, MANY), self.any_length))
        if self.any_length:
            longest = max(tokens, *(x.shape[1] for name, x in self.named.items() if is_text(name, x)), 2)
            others = [resized(self.named, ROWS + 1, tokens=length) for length in (longest, 1)]
            batches += [inputs for inputs in others if _takes(self.half, given_as(self.sample, inputs))]
        return [*batches, resized(self.named, 1, self.any_length)]

    @contextmanager
    def elsewhere(self, tensors: Sequence[NDArray[Any]]) -> Iterator[None]:
        """The half's weights that move, and a session's, which these are, have moved together: what lies behind a
        factor that begins with zero, such as that of a block's branch, is seen only from there."""
        weights = list(self.moving.values())
        kept = [p.detach().clone() for p in weights]
        perturb_(tensors, 0, STEP)
        try:
            _assign(weights, [torch.from_numpy(widened(tensor)) for tensor in tensors])
            yield
        finally:
            _assign(weights, kept)

    @contextmanager
    def beside(self, what: str, graphs: Mapping[str, bytes]) -> Iterator[Path]:
        """A folder with these graphs and the base file. what: how an ExportError calls a graph that does not run."""
        with TemporaryDirectory() as name:
            folder = Path(name)
            for file, data in {**graphs, BASE: self.base}.items():
                (folder / file).write_bytes(data)
            try:
                yield folder
            except HalfError as error:
                way = "; let the layer compute in float32 there" * ("NOT_IMPLEMENTED" in str(error))  # as of bfloat16
                raise ExportError(f"{what} does not run: {error}{way}") from error


@torch.no_grad()
def _assign(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


@contextmanager
def original(half: nn.Module, sample: Inputs) -> Iterator[Original]:
    """The half as `Original`, in eval mode and without a graph. Raises what `exported` raises of half and sample."""
    for module in ("onnx", "onnxscript"):
        needed(module, "the export of a client half", "export")
    _check_half(half)
    base, half, sample = as_file(half.state_dict()), _wide(half), _wide_inputs(sample)
    named = _named_inputs(sample)
    with evaluating(half), unchanged(half.modules()):
        _check_cut(half, sample)
        any_length = _takes(half, given_as(sample, resized(named, ROWS, shorter=True)))
        yield Original(half, sample, base, named, any_length)


def _check_half(half: nn.Module) -> None:
    for name, tensor in (*half.named_parameters(), *half.named_buffers()):
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.bfloat16)):
            raise ExportError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}: make the half float32, half.float()"
            )
        if tensor.device.type != "cpu":
            raise ExportError(f"{name} is on {tensor.device}: move the half to the CPU, half.cpu()")


def _wide(half: nn.Module) -> nn.Module:
    """The half in float32; its own copy, where it is bfloat16. A graph computes in float32, of weights as they are
    stored: runtimes for processors have few operators in bfloat16."""
    floats = [t for t in (*half.parameters(), *half.buffers()) if t.is_floating_point()]
    return half if all(t.dtype == torch.float32 for t in floats) else as_dtype(copy.deepcopy(half), torch.float32)


def _wide_inputs(sample: Inputs) -> Inputs:
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, sample)


def _check_cut(half: nn.Module, sample: Inputs) -> None:
    try:
        cut = call(half, sample)
    except Exception as error:  # whatever a model raises
        raise ExportError(f"the {type(half).__name__} does not take the sample: {error}") from error
    if not isinstance(cut, Tensor):
        raise ExportError(f"the cut must be one tensor, and the half makes a {type(cut).__name__}")
    if cut.dtype != torch.float32 or not cut.isfinite().all():
        found = f"{cut.dtype}, and {'all' if cut.isfinite().all() else 'not all'} of it is finite"
        raise ExportError(f"the cut of the sample must be finite and float32: it is {found}; cut the model elsewhere")


def _named_inputs(sample: Inputs) -> dict[str, Tensor]:
    """The inputs by the names that they have in the graph."""
    named: dict[str, Any] = dict(sample) if isinstance(sample, Mapping) else {"input": sample}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ExportError(
                f"{name} is a {type(x).__name__}: a half is exported for a tensor, or for tensors by name"
            )
        if not x.dim() or not len(x):
            raise ExportError(
                f"{name} is {[*x.shape]}: its first dimension must be that of samples, of which one is needed"
            )
    return named


def resized(named: Mapping[str, Tensor], rows: int, shorter: bool = False, tokens: int = 0) -> dict[str, Tensor]:
    """So many samples, the given ones over and over; shorter: texts of fewer tokens, or of two for one; tokens: of so
    many, theirs over and over."""
    found = {}
    for name, x in named.items():
        x = x[torch.arange(rows) % len(x)]
        if (shorter or tokens) and is_text(name, x):
            x = x[:, torch.arange(tokens or max(2, x.shape[1] - 1 - x.shape[1] // 4)) % x.shape[1]]
        found[name] = x
    mask = mask_of(found)
    if mask is not None and mask.dim() == 2:
        mask[~mask.bool().any(1)] = 1  # of a text that lies where no token is left
    return found


def size_of(inputs: Mapping[str, Tensor]) -> str:
    """Of a batch, for errors."""
    name, first = next(iter(inputs.items()))
    return f"{len(first)} samples" + (f" of {first.shape[1]} tokens" if is_text(name, first) else "")


def is_text(name: str, x: Tensor) -> bool:
    """Whether an input is of tokens in its second dimension."""
    return x.dim() > 1 if name in TOKENS else x.dim() == 2 and not x.is_floating_point()


def given_as(sample: Inputs, named: Mapping[str, Tensor]) -> Inputs:
    """Named inputs as the half takes them."""
    return named if isinstance(sample, Mapping) else named["input"]


def _takes(half: nn.Module, inputs: Inputs) -> bool:
    try:
        call(half, inputs)
    except Exception:  # whatever a model raises
        return False
    return True


class Positional(nn.Module):
    """The half as a module of positional arguments, which the exporter counts and names.

    Its outputs are the cut, and what comes to each of the entries.
    """

    def __init__(self, of: Original, entries: Sequence[str]) -> None:
        super().__init__()
        self.client, self.entries = _unchecked(of.half), entries
        self.names = list(of.named) if isinstance(of.sample, Mapping) else None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        reached: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for entry in self.entries:
                hooks.enter_context(at_entry(self.client, entry, partial(reached.setdefault, entry)))
            cut = call(self.client, tensors[0] if self.names is None else dict(zip(self.names, tensors, strict=True)))
        if missed := [entry for entry in self.entries if entry not in reached]:
            raise CutError(f"the forward pass does not come to {missed[0]}")
        return cut, *(reached[entry] for entry in self.entries)


def graph_of(of: Original, entries: Sequence[str], kind: type[Positional] = Positional) -> Any:
    """The exporter's model, in onnxscript's representation; its outputs are those of `Positional`, or another kind."""
    inputs = of.traced()
    texts = {name for name, x in inputs.items() if of.any_length and is_text(name, x)}
    sizes = tuple({0: "batch", **({1: "tokens"} if name in texts else {})} for name in inputs)
    client = kind(of, entries)
    with exporting(of.half), quiet(), in_their_dtype(of.half), Tables():
        program = torch.onnx.export(
            client,
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,  # which would rename weights, and fold what depends on them
            verbose=False,
            input_names=list(inputs),
            output_names=["cut"],
            dynamic_shapes=(sizes,),
        )
    assert program is not None
    return program.model


def _unchecked(half: nn.Module) -> nn.Module:
    """The half without its check of tokens' values, of which a graph has none."""
    if not isinstance(half, ClientHalf) or half.pools is None:
        return half
    own: Any = copied(half)
    own.pools = None
    return own


class Tables(TorchFunctionMode):
    """Lookups in a graph are those of torch. To torch a negative number is an error, and ONNX counts it from the
    table's end: it is made one that lies beyond any table. Sums and means of a text's rows, which the exporter writes
    as loops, are those of their rows.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        told = dict(kwargs or {})
        if function is nn.functional.embedding:
            told = _LOOKUP.bind(*args, **told).arguments
            told["input"] = torch.where(told["input"] < 0, torch.iinfo(torch.int32).max, told["input"])
            return function(**told)
        if function is nn.functional.embedding_bag:
            told = _LOOKUPS.bind(*args, **told).arguments
            if told.get("offsets") is None and told["input"].dim() == 2:
                return _of_bags(**told)
        return function(*args, **(kwargs or {}))


_LOOKUP, _LOOKUPS = signature(nn.functional.embedding), signature(nn.functional.embedding_bag)


def _of_bags(
    input: Tensor,
    weight: Tensor,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    **others: Any,
) -> Tensor:
    """embedding_bag of texts of one length: the sum, mean or largest of each one's rows."""
    rows = nn.functional.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    counts = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counts = input != (padding_idx if padding_idx >= 0 else padding_idx + len(weight))
    any_counts = counts.any(1, keepdim=True)
    if mode == "max":
        largest = rows.masked_fill(~counts.unsqueeze(-1), -torch.inf).amax(1)
        return torch.where(any_counts, largest, 0.0)
    total = torch.where(counts.unsqueeze(-1), rows, 0.0).sum(1)
    return total / counts.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else total


@contextmanager
def exporting(half: nn.Module, otherwise: str = "") -> Iterator[None]:
    """What torch cannot export is an ExportError: the exporter's own errors, and whatever a model raises under it.

    otherwise: what else can be done.
    """
    try:
        yield
    except Exception as error:
        cause = next(e for e in _causes(error) if e.__cause__ is None)
        said = " ".join(str(cause).split())[:500]
        way = "cut the model elsewhere, or replace the module that it names"
        if "grouped_mm" in said:
            way = 'tell transformers\' model `set_experts_implementation("batched_mm")`'
        raise ExportError(
            f"torch cannot export the {type(half).__name__}: {type(cause).__name__}: {said}; {way}{otherwise}"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on what of torchvision is missing and what of torch will change."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def without_weights(
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
            value = made_wide(graph, value)
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
    if branches := {node.op_type for node in _inner_nodes(graph) if _graphs_of(node)}:
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


def made_wide(graph: Any, value: Any) -> Any:
    """A weight in bfloat16, of which an operator makes the value in float32."""
    from onnxscript import ir

    stored = ir.Value(type=ir.TensorType(ir.DataType.BFLOAT16), shape=value.shape)
    cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = f"wide {value.name}", value.type, value.shape
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    graph.insert_before(graph[0], cast)
    return stored


def _graphs_of(node: Any) -> list[Any]:
    """The graphs that a node holds, such as a loop's body."""
    return [a.value for a in node.attributes.values() if a.type.name == "GRAPH"]


def _inner_nodes(graph: Any) -> list[Any]:
    """The nodes of the graphs that a graph's own nodes hold, and not of those within them."""
    return [inner for node in graph for body in _graphs_of(node) for inner in body]


def _pieces(model: Any, moving: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[bytes]:
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
            leave_out_unread(piece)
        found.append(piece)
    _register_unread(
        found[0], {name: v for name, v in moving.items() if not any(name in p.initializers for p in found)}
    )
    return [_serialized(model, piece, {*moving, *fixed}) for piece in found]


def whole(model: Any, piece: Any, moving: Mapping[str, Any], fixed: Mapping[str, Any]) -> bytes:
    """A part of the model's graph as a model by itself, which has all weights that move."""
    _register_unread(piece, {name: value for name, value in moving.items() if name not in piece.initializers})
    return _serialized(model, piece, {*moving, *fixed})


def leave_out_unread(piece: Any) -> None:
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


def _serialized(model: Any, piece: Any, open_: Collection[str]) -> bytes:
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


def _compare(
    of: Original, batches: Sequence[Mapping[str, Tensor]], pieces: Sequence[bytes], running: Collection[str]
) -> None:
    """Raises ExportError where onnxruntime makes something else of the pieces than torch of the half."""
    graphs = {graph_name(number): piece for number, piece in enumerate(pieces)}
    with of.beside(f"the graph of the {of.kind}", graphs) as folder:
        run = Half(folder, list(of.moving), len(pieces), running=list(running))

        def compare(inputs: Mapping[str, Tensor], where: str = "") -> None:
            found = run({name: x.numpy() for name, x in inputs.items()})
            if wrong := _difference(found, of.cut(inputs).numpy(), mask_of(inputs)):
                raise ExportError(f"the graph of the {of.kind} is not the half{where}: of {size_of(inputs)} {wrong}")

        for inputs in batches:
            compare(inputs)
        run.check({name: x.numpy() for name, x in batches[-1].items()})
        with of.elsewhere(run.tensors):
            compare(batches[0], MOVED)


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
    return "" if apart <= CLOSE * largest else f"numbers differ by {apart:.3g}, and the largest is {largest:.3g}"
