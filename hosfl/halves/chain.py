"""Cut a model with one input tensor and one output: torchvision's, timm's, and most that people write.

`hosfl.halves.follow` traces the forward pass of the model, and of the modules inside it that contain layers; any other
module is one step. A model can be cut before a step if only one value crosses there. All steps before it, including
functions between modules, become the client half; it and all later ones become the server half. Nothing is computed,
and the model is not changed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from hosfl.halves.follow import (
    MODE,
    BufferTracer,
    Constant,
    CutError,
    TrainMode,
    is_free_read,
    non_persistent_buffers,
    trace_forward,
    writes,
)


@dataclass(frozen=True)
class Chain:
    """The steps of a model's forward pass.

    Attributes:
        opened: the modules that were traced into.
        graph: the steps, in order.
        constants: values and modules that steps read and that are in no state dict, by their names in the graph.
    """

    model: nn.Module
    opened: list[nn.Module]
    graph: fx.Graph
    constants: dict[str, Any]

    @property
    def cut_points(self) -> dict[str, int]:
        """The modules before which the model can be cut, by name, with the numbers by which `split` knows them."""
        calls: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and not is_free_read(node):
                calls.setdefault(node.target, node)
        mutable_reads = self._mutable_reads()
        names = [name for name, node in calls.items() if len(self._crossing(node)) == 1]
        names = [*names[:1], *(name for name in names[1:] if not self._shared_state(calls[name], mutable_reads))]
        return {name: number for number, name in enumerate(names) if number}

    def _crossing(self, first: fx.Node) -> list[fx.Node]:
        """The values that are computed before step `first` and used by it or later steps."""
        nodes = list(self.graph.nodes)
        position = nodes.index(first)
        used = {value for node in nodes[position:] for value in node.all_input_nodes}
        return [node for node in nodes[:position] if node in used and not is_free_read(node)]

    def _mutable_reads(self) -> dict[fx.Node, set[str]]:
        """For every step, the names of the tensors that it reads and that some step writes.

        Of what layers write only running statistics are known; comparing the halves with the model finds the rest.
        """
        written = _written_names(self.graph.nodes)
        read: dict[fx.Node, set[str]] = {}
        for node in self.graph.nodes:
            read[node] = {_free_read_name(n) for n in node.all_input_nodes if is_free_read(n)}
            if node.op == "call_module" and not is_free_read(node):
                for path, module in self.model.get_submodule(node.target).named_modules(prefix=node.target):
                    names = {f"{path}.{name}" for name, _ in module.named_buffers(recurse=False)}
                    written |= names if isinstance(module, nn.modules.batchnorm._NormBase) else set()
                    read[node] |= names
        return {node: names & written for node, names in read.items()}

    def _shared_state(self, first: fx.Node, mutable_reads: Mapping[fx.Node, set[str]]) -> list[str]:
        """The names of the written tensors that both sides of a cut before step `first` would read."""
        nodes = list(mutable_reads)
        position = nodes.index(first)
        sides = nodes[:position], nodes[position:]
        client, server = (set[str]().union(*(mutable_reads[node] for node in side)) for side in sides)
        return sorted(client & server)

    def cut(self, name: str) -> tuple[nn.Module, nn.Module]:
        """Cut before the first call of a module, and return (client half, server half).

        Raises CutError if the module is not called, if not exactly one value crosses, or if both sides would read a
        tensor that one of them writes.
        """
        nodes = list(self.graph.nodes)
        first = next((n for n in nodes if n.op == "call_module" and n.target == name), None)
        if first is None:
            raise CutError(f"the forward pass of {type(self.model).__name__} does not call {name}")
        crossing = self._crossing(first)
        if len(crossing) != 1 or crossing[0].op == "placeholder":
            values = ", ".join(str(node) for node in crossing)
            raise CutError(f"cannot cut before {name}: one tensor must cross, and here it is {values}")
        for shared in self._shared_state(first, self._mutable_reads()):
            shared = "a tensor that it makes" if shared in self.constants else shared
            raise CutError(f"cannot cut before {name}: {shared} is written into on one side and read on the other")
        position = nodes.index(first)
        client, server = _HalfGraph(), _HalfGraph()
        for node in nodes[:position]:
            client.add_step(node)
        server.add_input(crossing[0])
        for node in nodes[position:]:
            server.add_step(node)
        client.graph.output(client.copies[crossing[0]])
        return self._make_half(client.graph, "Client"), self._make_half(server.graph, "Server")

    def _make_half(self, graph: fx.Graph, side: str) -> nn.Module:
        """Make a module of a half's graph, in the model's mode. side: the end of its class's name."""
        parts: dict[str, Any] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                parts[node.target] = TrainMode() if node.target == MODE else self._part(node.target)
        non_persistent = non_persistent_buffers(self.model) & {*parts}
        half = fx.GraphModule(parts, graph, f"{type(self.model).__name__}{side}")
        for path, _, name in (target.rpartition(".") for target in non_persistent):
            half.get_submodule(path)._non_persistent_buffers_set.add(name)
        for module in (half, *(m for m in parts.values() if isinstance(m, TrainMode))):
            module.training = self.model.training
        return half

    def _part(self, name: str) -> Any:
        """The module or tensor of this name: the model's own, or a new `Constant`, since halves do not share them."""
        if name not in self.constants:
            return operator.attrgetter(name)(self.model)
        value = self.constants[name]
        return Constant(value.value, value.kind) if isinstance(value, Constant) else value


class _HalfGraph:
    """A new graph with some steps of another one. Free reads are copied just before their first use."""

    def __init__(self) -> None:
        self.graph, self.copies = fx.Graph(tracer_cls=BufferTracer), dict[fx.Node, fx.Node]()

    def add_input(self, value: fx.Node) -> None:
        """Add the cut as the graph's input, in place of a value of the other graph."""
        self.copies[value] = self.graph.placeholder("cut")

    def add_step(self, node: fx.Node) -> None:
        """Copy a step; free reads are copied when a step needs them."""
        if not is_free_read(node):
            self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        """The copy of a node, made with those of its arguments if there is none yet."""
        if node not in self.copies:
            self.copies[node] = self.graph.node_copy(node, self._copy)
        return self.copies[node]


def _free_read_name(node: fx.Node) -> str:
    """The name of what a step reads, if it is a free read, else ""."""
    return str(node.target) if is_free_read(node) else ""


def _written_names(nodes: Iterable[fx.Node]) -> set[str]:
    """The names of tensors that some step writes in place, directly or through a view."""
    sources: dict[fx.Node, set[str]] = {}  # for each step, the tensors that its result may be a view of
    written: set[str] = set()
    for node in nodes:
        first = sources.get(node.args[0], set()) if node.args and isinstance(node.args[0], fx.Node) else set()
        sources[node] = {_free_read_name(node)} if is_free_read(node) else first
        if writes(node):
            written |= first
    return written


def trace_chain(model: nn.Module, at: str | None = None) -> Chain:
    """Trace the steps of a model, so finely that its layers are steps, and so is the module `at` if it is given.

    Raises CutError if fx cannot trace a forward pass, if it differs between train and eval mode, and if it has side
    effects that a half would not have.
    """
    if at is not None:
        parts = at.split(".")
        opened = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]
        return Chain(model, opened, *trace_forward(model, opened))
    chain = Chain(model, [model], *trace_forward(model, [model]))
    tried: set[nn.Module] = set()
    while candidates := [m for m in _called_modules(chain) if m not in tried and _holds_layers(m)]:
        tried.add(candidates[0])
        try:
            opened = [*chain.opened, candidates[0]]
            finer = Chain(model, opened, *trace_forward(model, opened))
        except CutError:
            continue  # the module stays one step
        if len(finer.cut_points) > len(chain.cut_points) - isinstance(candidates[0], nn.Sequential):
            chain = finer
    return chain


def _called_modules(chain: Chain) -> Iterator[nn.Module]:
    """The modules that are steps of a chain, in order."""
    calls = (n for n in chain.graph.nodes if n.op == "call_module" and not is_free_read(n))
    return (chain.model.get_submodule(n.target) for n in calls)


def _holds_layers(module: nn.Module) -> bool:
    """Whether a module is an nn.Sequential with weights, or contains a list of modules that have submodules."""
    lists = [m for m in module.children() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) > 1]
    is_sequential = type(module) is nn.Sequential and any(True for _ in module.parameters())
    return is_sequential or any(all(layer._modules for layer in layers) for layers in lists)
