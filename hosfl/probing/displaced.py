"""A module evaluated at th + s * u while th is only read: a displaced weight exists while something uses it."""

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
from hosfl_kernels import perturb_

# Numbers in an embedding's table from which on gathering and moving the rows of a batch costs less than moving the
# whole table and back.
LARGE = 1 << 20


class Displaces(Protocol):
    """What a module reads in the place of the weights that move."""

    read: bool  # whether anybody has asked for one

    def moves(self, parameter: Tensor | None) -> bool: ...

    def whole(self, parameter: Tensor) -> Tensor: ...

    def table(self, parameter: Tensor) -> Tensor:
        """As `whole`, for an nn.Embedding."""


class Copies:
    """Of every weight that moves a copy, made beforehand."""

    def __init__(self, parameters: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self.copies = {id(p): copy for p, copy in zip(parameters, copies, strict=True)}
        self.read = False

    def moves(self, parameter: Tensor | None) -> bool:
        return id(parameter) in self.copies

    def whole(self, parameter: Tensor) -> Tensor:
        return self.copies[id(parameter)]

    def table(self, parameter: Tensor) -> Tensor:
        return self.whole(parameter)


class Displacement:
    """Makes th_t + scale * factor_t * z(seed, stream_t) for single tensors t, or rows of them; never writes th."""

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
        self.place = {id(p): (s, f) for p, s, f in zip(parameters, streams, factors, strict=True)}
        self.made: dict[int, ref[Tensor]] = {}
        self.read = False
        self.last: Tensor | None = None

    def moves(self, parameter: Tensor | None) -> bool:
        return id(parameter) in self.place

    def whole(self, parameter: Tensor) -> Tensor:
        """The displaced parameter: same dtype, shape and strides. Made once for as long as anybody holds it.

        The last one is held here: layers ask for `weight.dtype` before they ask for `weight`. It requires grad as the
        parameter does: torch picks its matrix product by that, also where no graph is recorded.
        """
        made = self.made.get(id(parameter))
        tensor = None if made is None else made()
        if tensor is None:
            self.last = None  # free it before the next one is made
            tensor = self._make(parameter)
            self.made[id(parameter)] = ref(tensor)
        self.last = tensor
        return tensor

    def _make(self, parameter: Tensor) -> Tensor:
        tensor = parameter.detach().clone(memory_format=torch.contiguous_format)
        self._move([tensor], parameter, [0])
        if not parameter.is_contiguous():  # channels_last: other strides would choose other kernels
            tensor = torch.empty_like(parameter).copy_(tensor)
        return nn.Parameter(tensor)

    def table(self, parameter: Tensor) -> Tensor:
        """The displaced weight of an nn.Embedding."""
        return Table.of(parameter, self)

    def rows(self, table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The displaced rows of a [n, d] table that occur in indices, and the indices into those rows."""
        unique, positions = indices.unique(return_inverse=True)
        return self._make_rows(table, unique), positions.to(indices.dtype)

    def _make_rows(self, table: Tensor, numbers: Tensor) -> Tensor:
        rows = table.detach().index_select(0, numbers)
        self._move_rows(rows, table, numbers)
        return rows

    def _move_rows(self, rows: Tensor, table: Tensor, numbers: Tensor) -> None:
        """Move rows that are those of the table by these ascending numbers."""
        # Neighbouring rows move as one tensor: positions 0..L-1 are one run, and so is most of a small vocabulary.
        ends = (numbers.diff() != 1).nonzero().flatten() + 1
        runs = rows.tensor_split(ends.cpu())
        starts = numbers[torch.cat([ends.new_zeros(1), ends])] if len(numbers) else numbers
        self._move(runs[: len(starts)], table, (starts * table.shape[1]).tolist())

    def _move(self, pieces: Sequence[Tensor], parameter: Tensor, starts: Sequence[int]) -> None:
        stream, factor = self.place[id(parameter)]
        n = len(pieces)
        perturb_(
            pieces,
            self.seed,
            self.scale,
            dist=self.dist,
            factors=[factor] * n,
            streams=[stream] * n,
            starts=starts,
        )


class Table(Tensor):
    """A displaced embedding table without memory: an embedding gathers its rows; any other op gets it whole."""

    parameter: Tensor
    displacement: Displacement
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(parameter: Tensor, displacement: Displacement) -> Table:
        table: Table = Tensor._make_wrapper_subclass(
            Table,
            parameter.shape,
            strides=parameter.stride(),
            dtype=parameter.dtype,
            device=parameter.device,
            requires_grad=True,
        )
        table.parameter, table.displacement = parameter, displacement
        return table

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Table({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        table = args[0]
        if isinstance(table, Table):
            if op is torch.ops.aten.embedding.default:
                rows, positions = table.displacement.rows(table.parameter, args[1])
                return torch.embedding(rows, positions)
            if op is torch.ops.aten.detach.default:
                return Table.of(table.parameter, table.displacement)
            if op._schema.is_mutable:
                raise RuntimeError("the model writes its embedding table in its forward pass: it is only to be read")
        args, kwargs = tree_map(lambda a: a.whole() if isinstance(a, Table) else a, (args, kwargs or {}))
        return op(*args, **kwargs)

    def whole(self) -> Tensor:
        return self.displacement.whole(self.parameter)


class Reads(UserDict[str, Any]):
    """A module's `_parameters` for the time of a displaced forward pass: reading a weight that moves displaces it.

    `nn.Module.__getattr__` looks weights up here, and so do named_parameters, ParameterList and a parent that reads
    its child's weights. What the model assigns goes to this copy and is forgotten with it.
    """

    def __init__(self, module: nn.Module, displacement: Displaces) -> None:
        super().__init__(module._parameters)
        self.displacement, self.table = displacement, isinstance(module, nn.Embedding)

    def __getitem__(self, name: str) -> Any:
        parameter = self.data[name]
        if not self.displacement.moves(parameter):
            return parameter
        self.displacement.read = True
        return self.displacement.table(parameter) if self.table else self.displacement.whole(parameter)

    def whole(self) -> dict[str, Any]:
        """All of them, displaced now."""
        move = self.displacement
        move.read = True  # as far as one can know: a compiled graph has its weights beforehand
        return {name: move.whole(p) if move.moves(p) else p for name, p in self.data.items()}


def _compiled(module: nn.Module) -> bool:
    # By name: importing torch._dynamo, where OptimizedModule lives, takes seconds.
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


# What a module holds of its weights: nn.LSTM and its kind keep references of their own beside `_parameters`.
HELD = ("_parameters", "_flat_weights", "_flat_weight_refs")


@contextmanager
def displaced(module: nn.Module, displacement: Displaces) -> Iterator[None]:
    """While it lasts, reading a trainable weight anywhere in the module gives the displaced one, made on the spot.

    Modules in the hands of torch.compile get all of theirs beforehand: a graph takes weights as inputs, and would be
    compiled again and again if reading them were a part of it.
    """
    compiled = {inner for m in module.modules() if _compiled(m) for inner in m.modules()}
    owners = [m for m in module.modules() if any(map(displacement.moves, m._parameters.values()))]
    before = [{name: m.__dict__[name] for name in HELD if name in m.__dict__} for m in owners]

    def put_back() -> None:
        with uninterrupted():
            for m, held in zip(owners, before, strict=True):
                m.__dict__.update(held)

    try:
        try:
            for m in owners:
                reads = Reads(m, displacement)
                m.__dict__["_parameters"] = reads.whole() if m in compiled else reads
            yield
        finally:
            put_back()
    finally:
        put_back()  # again: Ctrl-C may have come as the first call began


@contextmanager
def casts_forgotten() -> Iterator[None]:
    """Autocast keeps no casts: it would take a weight moved in place for what it was, and hold on to displaced ones."""
    kept = torch.is_autocast_cache_enabled()
    try:
        try:
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.set_autocast_cache_enabled(kept)
    finally:
        torch.set_autocast_cache_enabled(kept)  # again: Ctrl-C may have come as the first call began


def large_tables(module: nn.Module, moving: Sequence[Tensor]) -> nn.ModuleList:
    """The embeddings in a module whose tables move, are large, and are no other module's: see `LARGE`.

    None where torch.compile has a hand in the module: a compiled graph takes its weights beforehand.
    """
    modules = list(module.modules())
    if any(map(_compiled, modules)):
        return nn.ModuleList()
    owners = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    wanted = {id(t) for t in moving if t.numel() >= LARGE and owners[id(t)] == 1}
    embeddings = (m for m in modules if isinstance(m, nn.Embedding) and m.max_norm is None)
    return nn.ModuleList(m for m in embeddings if id(m._parameters.get("weight")) in wanted)


def refuse_writers(module: nn.Module) -> None:
    """Raises TypeError and ValueError for modules that cannot be evaluated with weights that are only read."""
    modules = list(module.modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        raise TypeError("cannot evaluate a scripted module at other weights than its own: pass the module as it was")
    if any(getattr(m, "max_norm", None) is not None for m in modules):
        raise ValueError("an embedding with max_norm writes its weights in every forward pass: set max_norm=None")


@casts_forgotten()
def refuse_references(module: nn.Module, inputs: Inputs) -> None:
    """Raises ValueError for a module that reads a weight by a reference of its own, in a list say, or by a view of it.

    Reading the weight from the module that has it is what is displaced. To see that nothing else is read, all that are
    trainable are NaN for a pass in which their modules have copies; afterwards they hold the same bits.
    """
    refuse_writers(module)
    weights = [p for p in module.parameters() if p.requires_grad]
    with evaluating(module):
        copies = [nn.Parameter(p.detach().clone()) for p in weights]  # of their class: see `Displacement.whole`
        want = call(module, inputs)
        try:
            for weight in weights:
                weight.fill_(math.nan)
            with displaced(module, Copies(weights, copies)):
                found = call(module, inputs)
        finally:
            with uninterrupted():
                for weight, copy in zip(weights, copies, strict=True):
                    weight.copy_(copy)
    if not torch.equal(found, want):
        raise ValueError(
            "the client half reads a weight by a reference of its own, such as one in a list, or by a view of it: it"
            " could not be evaluated at other weights than its own. Let it read the weight from the module that has it"
        )


@torch.no_grad()
@casts_forgotten()
def evaluate_displaced(module: nn.Module, inputs: Inputs, displacement: Displacement) -> Any:
    """f(inputs; th + s * u), the bits of `functional_call` with a whole displaced copy.

    Holds one weight at a time beside those that the model itself keeps; of an nn.Embedding the rows that occur. An
    nn.LSTM, GRU or RNN keeps all its weights to the end of the pass, and so does what torch.compile has compiled.

    Raises: TypeError for scripted modules; ValueError for embeddings with max_norm, which write their weights, and
    RuntimeError where the forward pass writes an embedding's table otherwise. What a forward pass assigns to
    parameters is forgotten. Not promised: that another thread can run the module meanwhile.
    """
    refuse_writers(module)
    with displaced(module, displacement):
        return call(module, inputs)
