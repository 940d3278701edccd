"""Evaluate a module at th + s * u without writing th: each displaced weight is made when it is read, and freed soon."""

from __future__ import annotations

import math
from collections import Counter, UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hosfl.halves.inputs import Inputs, call, evaluating
from hosfl.interrupts import uninterrupted
from hosfl_kernels import perturb_, perturb_rows_

# Elements of an embedding's table from which on copying and moving the rows of a batch is cheaper than moving the whole
# table and back.
LARGE = 1 << 20

# Parameters of at most SMALL elements are displaced in groups, of neighbours with at most TOGETHER elements: a call of
# the kernel takes longer than the sums of a small one.
SMALL, TOGETHER = 1 << 14, 1 << 16


class WeightSource(Protocol):
    """Supplies the tensors that a module reads in place of some of its parameters."""

    read: set[int]  # the ids of the parameters that were read

    def replaces(self, parameter: Tensor | None) -> bool:
        """Whether this parameter is replaced."""

    def whole(self, parameter: Tensor) -> Tensor:
        """The tensor in place of a parameter."""

    def table(self, parameter: Tensor) -> Tensor:
        """The tensor in place of an nn.Embedding's weight. It may be made row by row, in lookups."""

    def release(self) -> None:
        """Free what is kept for the rest of a pass: it has ended."""


class WeightCopies:
    """Supplies tensors that exist already. copies: one in place of each parameter."""

    def __init__(self, parameters: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self.copies = {id(p): copy for p, copy in zip(parameters, copies, strict=True)}
        self.read: set[int] = set()

    def replaces(self, parameter: Tensor | None) -> bool:
        return id(parameter) in self.copies

    def whole(self, parameter: Tensor) -> Tensor:
        return self.copies[id(parameter)]

    def table(self, parameter: Tensor) -> Tensor:
        return self.whole(parameter)

    def release(self) -> None:
        pass


class Displacement:
    """Makes th_t + scale * factor_t * z(seed, stream_t) for a parameter t, or some of its rows, when it is read."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        streams: Sequence[int],
        seed: int,
        scale: float,
        dist: str = "rademacher",
        factors: Sequence[float] | None = None,
    ) -> None:
        factors = [1.0] * len(parameters) if factors is None else factors
        self.seed, self.scale, self.dist = seed, scale, dist
        self.noise = {id(p): (s, f) for p, s, f in zip(parameters, streams, factors, strict=True)}  # (stream, factor)
        self.read: set[int] = set()
        self._groups = _groups_of_small(parameters)
        self._existing: dict[int, ref[Tensor]] = {}  # displaced tensors by the parameter's id
        self._last: Tensor | None = None
        self._last_group: list[Tensor] = []

    def replaces(self, parameter: Tensor | None) -> bool:
        return id(parameter) in self.noise

    def whole(self, parameter: Tensor) -> Tensor:
        """Return the displaced parameter, of the same dtype, shape and strides.

        It is not made again while a reference to it exists. A reference to the last one is kept, since layers read
        `weight.dtype` before `weight`, and to those of the last group of small ones. It requires grad as the parameter
        does: torch chooses its matrix product by that, even if no graph is recorded.
        """
        reference = self._existing.get(id(parameter))
        tensor = None if reference is None else reference()
        if tensor is None:
            group = self._groups.get(id(parameter), [parameter])
            self._last = None  # freed before the next one is made, and so is the last group
            if len(group) > 1:
                self._last_group = []
            made = self._make(group)
            if len(group) > 1:
                self._last_group = made
            self._existing |= {id(p): ref(t) for p, t in zip(group, made, strict=True)}
            tensor = next(t for p, t in zip(group, made, strict=True) if p is parameter)
        self._last = tensor
        return tensor

    def release(self) -> None:
        self._last, self._last_group = None, []

    def _make(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Make displaced parameters."""
        tensors = [p.detach().clone(memory_format=torch.contiguous_format) for p in parameters]
        self._perturb(tensors, parameters)
        # channels_last: other strides would choose other kernels.
        return [
            nn.Parameter(tensor if p.is_contiguous() else torch.empty_like(p).copy_(tensor))
            for p, tensor in zip(parameters, tensors, strict=True)
        ]

    def table(self, parameter: Tensor) -> Tensor:
        """Return the displaced weight of an nn.Embedding, whose rows are made in lookups."""
        return DisplacedTable.of(parameter, self)

    def lookup(self, table: Tensor, indices: Tensor) -> Tensor:
        """Return the displaced rows of a [n, d] table at `indices`, [*indices.shape, d]."""
        rows = torch.embedding(table.detach(), indices)
        self._perturb_rows(rows, table, indices)
        return rows

    def _perturb(self, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Perturb in place: contiguous copies of parameters. One call of the kernel for each scale and device."""
        alike: dict[Any, list[tuple[Tensor, int, float]]] = {}
        for tensor, p in zip(tensors, parameters, strict=True):
            alike.setdefault((self._scale_of(p), p.device), []).append((tensor, *self.noise[id(p)]))
        for (scale, _), members in alike.items():
            copies, streams, factors = zip(*members, strict=True)
            perturb_(copies, self.seed, scale, dist=self.dist, factors=factors, streams=streams)

    def _perturb_rows(self, rows: Tensor, table: Tensor, indices: Tensor) -> None:
        """Perturb in place: copies of the table's rows at `indices`."""
        stream, factor = self.noise[id(table)]
        scale = self._scale_of(table)
        perturb_rows_(rows, indices, self.seed, scale, dist=self.dist, factor=factor, stream=stream)

    def _scale_of(self, parameter: Tensor) -> float:
        """The scale of a parameter's displacement; its factor comes to it."""
        return self.scale


def _groups_of_small(parameters: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """The group of every small parameter, by its id: see `SMALL`."""
    groups: list[list[Tensor]] = [[]]
    elements = 0
    for p in parameters:
        if p.numel() > SMALL:
            continue
        if elements + p.numel() > TOGETHER:
            groups.append([])
            elements = 0
        groups[-1].append(p)
        elements += p.numel()
    return {id(p): group for group in groups for p in group}


class DisplacedTable(Tensor):
    """A displaced embedding table without memory: a lookup makes its rows; any other operator gets the whole table."""

    parameter: Tensor
    displacement: Displacement
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(parameter: Tensor, displacement: Displacement) -> DisplacedTable:
        """The table in place of an nn.Embedding's weight."""
        table: DisplacedTable = Tensor._make_wrapper_subclass(
            DisplacedTable,
            parameter.shape,
            strides=parameter.stride(),
            dtype=parameter.dtype,
            device=parameter.device,
            requires_grad=True,
        )
        table.parameter, table.displacement = parameter, displacement
        return table

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DisplacedTable({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        table = args[0]
        if isinstance(table, DisplacedTable):
            if op is torch.ops.aten.embedding.default:
                return table.displacement.lookup(table.parameter, args[1])
            if op is torch.ops.aten.detach.default:
                return DisplacedTable.of(table.parameter, table.displacement)
            if op._schema.is_mutable:
                raise RuntimeError("the model writes its embedding table in its forward pass: it is only to be read")
        args, kwargs = tree_map(lambda a: a.whole() if isinstance(a, DisplacedTable) else a, (args, kwargs or {}))
        return op(*args, **kwargs)

    def whole(self) -> Tensor:
        """The whole table in memory."""
        return self.displacement.whole(self.parameter)


class _ReplacedParameters(UserDict[str, Any]):
    """Takes the place of a module's `_parameters` during a pass: reading a parameter gives the source's tensor.

    `nn.Module.__getattr__` looks weights up here, and so do named_parameters, ParameterList and a parent that reads
    its child's weights. What the model assigns goes to this copy and is dropped with it.
    """

    def __init__(self, module: nn.Module, source: WeightSource) -> None:
        super().__init__(module._parameters)
        self.source, self.is_table = source, isinstance(module, nn.Embedding)

    def __getitem__(self, name: str) -> Any:
        parameter = self.data[name]
        if not self.source.replaces(parameter):
            return parameter
        self.source.read.add(id(parameter))
        return self.source.table(parameter) if self.is_table else self.source.whole(parameter)

    def make_all(self) -> dict[str, Any]:
        """Return all parameters, with the tensors in place of those that are replaced."""
        source = self.source
        replaced = {name: p for name, p in self.data.items() if source.replaces(p)}
        source.read.update(map(id, replaced.values()))  # assumed: what a compiled graph reads is not known
        return self.data | {name: source.whole(p) for name, p in replaced.items()}


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has compiled the module."""
    # By name: importing torch._dynamo, where OptimizedModule is, takes seconds.
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


# Attributes in which modules hold weights: nn.LSTM, GRU and RNN have others beside `_parameters`.
WEIGHT_ATTRIBUTES = ("_parameters", "_flat_weights", "_flat_weight_refs")


@contextmanager
def displaced(module: nn.Module, source: WeightSource) -> Iterator[None]:
    """Context manager: reading a parameter anywhere in the module gives the source's tensor in its place.

    Modules compiled by torch.compile get all of theirs at the start: a graph takes weights as inputs, and would be
    compiled again and again if making them were a part of it.
    """
    compiled = {inner for m in module.modules() if _is_compiled(m) for inner in m.modules()}
    owners = [m for m in module.modules() if any(map(source.replaces, m._parameters.values()))]
    before = [{name: m.__dict__[name] for name in WEIGHT_ATTRIBUTES if name in m.__dict__} for m in owners]

    def restore() -> None:
        with uninterrupted():
            for m, attributes in zip(owners, before, strict=True):
                m.__dict__.update(attributes)
            source.release()

    try:
        try:
            for m in owners:
                parameters = _ReplacedParameters(m, source)
                m.__dict__["_parameters"] = parameters.make_all() if m in compiled else parameters
            yield
        finally:
            restore()
    finally:
        restore()  # again, since Ctrl-C may have come as the first call began


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Context manager: turn autocast's cache of cast weights off.

    The cache would miss moves in place, and keep displaced weights alive.
    """
    before = torch.is_autocast_cache_enabled()
    try:
        try:
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.set_autocast_cache_enabled(before)
    finally:
        torch.set_autocast_cache_enabled(before)  # again, since Ctrl-C may have come as the first call began


def large_tables(module: nn.Module, perturbed: Sequence[Tensor]) -> nn.ModuleList:
    """The nn.Embedding modules whose tables are among these tensors, large, and not shared: see `LARGE`.

    Empty if any part of the module is compiled: a graph takes its weights as inputs.
    """
    modules = list(module.modules())
    if any(map(_is_compiled, modules)):
        return nn.ModuleList()
    owners = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    large = {id(t) for t in perturbed if t.numel() >= LARGE and owners[id(t)] == 1}
    embeddings = (m for m in modules if isinstance(m, nn.Embedding) and m.max_norm is None)
    return nn.ModuleList(m for m in embeddings if id(m._parameters.get("weight")) in large)


def refuse_writers(module: nn.Module) -> None:
    """Raise TypeError for scripted modules, ValueError for modules that write their weights in a forward pass."""
    modules = list(module.modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        raise TypeError(
            "cannot evaluate a scripted module at other weights than its own: pass the module that it was scripted from"
        )
    if any(getattr(m, "max_norm", None) is not None for m in modules):
        raise ValueError("an embedding with max_norm writes its weights in every forward pass: set max_norm=None")


@no_autocast_cache()
def refuse_references(module: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError for a module that reads a weight by another reference, such as one in a list, or by a view.

    Only reading a weight from the module that has it gives the displaced one. As a test, a pass runs in which all
    trainable weights are NaN and their modules read copies instead. Afterwards the weights have the same bits.
    """
    refuse_writers(module)
    weights = [p for p in module.parameters() if p.requires_grad]
    with evaluating(module):
        copies = [nn.Parameter(p.detach().clone()) for p in weights]  # they require grad: see `Displacement.whole`
        expected = call(module, inputs)
        try:
            for weight in weights:
                weight.fill_(math.nan)
            with displaced(module, WeightCopies(weights, copies)):
                output = call(module, inputs)
        finally:
            with uninterrupted():
                for weight, copy in zip(weights, copies, strict=True):
                    weight.copy_(copy)
    if not torch.equal(output, expected):
        raise ValueError(
            "the client half reads a weight by a reference of its own, such as one in a list, or by a view of it: it"
            " could not be evaluated at other weights than its own. Let it read the weight from the module that has it"
        )


@torch.no_grad()
@no_autocast_cache()
def evaluate_displaced(module: nn.Module, inputs: Inputs, displacement: Displacement) -> Any:
    """Compute f(inputs; th + s * u), with the bits of `functional_call` on a displaced copy of the module.

    In memory are one displaced weight at a time, a group of small ones (256 KB in float32), and of an nn.Embedding only
    the rows that are looked up. An nn.LSTM, GRU or RNN keeps all its weights to the end of the pass,
    and so does a compiled module. Assignments to parameters in the forward pass are dropped. Not safe while another
    thread runs the module.

    Raises: TypeError for scripted modules; ValueError for embeddings with max_norm, which write their weights;
    RuntimeError if the forward pass writes an embedding's table in another way.
    """
    refuse_writers(module)
    with displaced(module, displacement):
        return call(module, inputs)
