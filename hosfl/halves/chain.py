"""Cuts a model with one input tensor and one output: torchvision's, timm's, and most that people write.

`hosfl.halves.follow` traces the forward pass of the model, and of the modules inside it that contain layers; any other
module is one step. A model can be cut before a step where only one value crosses: all steps before it become the client
half, it and all later ones the server half, including functions between modules. Nothing is computed, and the model is
not changed.
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
    """A model's steps. graph: in the order of its forward pass; opened: the modules that were traced into.

    constants: by name in the graph, tensors that steps read and the model's state dict does not have.
    """

    model: nn.Module
    opened: list[nn.Module]
    graph: fx.Graph
    constants: dict[str, Any]

    @property
    def cut_points(self) -> dict[str, int]:
        """By name, the modules before which only one value crosses, and the number of steps before each."""
        calls: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and not is_free_read(node):
                calls.setdefault(node.target, node)
        state = self._state()
        names = [name for name, node in calls.items() if len(self._crossing(node)) == 1]
        names = [*names[:1], *(name for name in names[1:] if not self._torn(calls[name], state))]
        return {name: number for number, name in enumerate(names) if number}

    def _crossing(self, first: fx.Node) -> list[fx.Node]:
        """The values made before a step that it or a later one uses, without weights."""
        nodes = list(self.graph.nodes)
        at = nodes.index(first)
        used = {value for node in nodes[at:] for value in node.all_input_nodes}
        return [node for node in nodes[:at] if node in used and not is_free_read(node)]

    def _state(self) -> dict[fx.Node, set[str]]:
        """Of every step those things it reads that some step writes. Of layers that is known of running statistics;
        what others write is seen where halves are compared."""
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

    def _torn(self, first: fx.Node, state: Mapping[fx.Node, set[str]]) -> list[str]:
        """Of these the ones that both sides of a cut would have, each its own."""
        nodes = list(state)
        at = nodes.index(first)
        mine, theirs = (set[str]().union(*(state[node] for node in part)) for part in (nodes[:at], nodes[at:]))
        return sorted(mine & theirs)

    def cut(self, name: str) -> tuple[nn.Module, nn.Module]:
        """Split the steps before a module's first call in two halves. Raises CutError if several values cross."""
        nodes = list(self.graph.nodes)
        first = next((n for n in nodes if n.op == "call_module" and n.target == name), None)
        if first is None:
            raise CutError(f"the forward pass of {type(self.model).__name__} does not call {name}")
        crossing = self._crossing(first)
        if len(crossing) != 1 or crossing[0].op == "placeholder":
            what = ", ".join(str(node) for node in crossing)
            raise CutError(f"cannot cut before {name}: one tensor must cross, and here it is {what}")
        at = nodes.index(first)
        for what in self._torn(first, self._state()):
            what = "a tensor that it makes" if what in self.constants else what
            raise CutError(f"cannot cut before {name}: {what} is written into on one side and read on the other")
        client, server = _HalfGraph(), _HalfGraph()
        for node in nodes[:at]:
            client.add_step(node)
        server.add_input(crossing[0])
        for node in nodes[at:]:
            server.add_step(node)
        client.graph.output(client.copies[crossing[0]])
        return self._module(client.graph, "Client"), self._module(server.graph, "Server")

    def _module(self, graph: fx.Graph, side: str) -> nn.Module:
        parts: dict[str, Any] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                parts[node.target] = TrainMode() if node.target == MODE else self._part(node.target)
        in_none = non_persistent_buffers(self.model) & {*parts}
        half = fx.GraphModule(parts, graph, f"{type(self.model).__name__}{side}")
        for path, _, name in (target.rpartition(".") for target in in_none):
            half.get_submodule(path)._non_persistent_buffers_set.add(name)
        for module in (half, *(m for m in parts.values() if isinstance(m, TrainMode))):
            module.training = self.model.training
        return half

    def _part(self, name: str) -> Any:
        if name not in self.constants:
            return operator.attrgetter(name)(self.model)
        value = self.constants[name]
        return Constant(value.value, value.kind) if isinstance(value, Constant) else value


class _HalfGraph:
    """A new graph with some steps of another one. Weights and flags are read just before their first use."""

    def __init__(self) -> None:
        self.graph, self.copies = fx.Graph(tracer_cls=BufferTracer), dict[fx.Node, fx.Node]()

    def add_input(self, value: fx.Node) -> None:
        self.copies[value] = self.graph.placeholder("cut")

    def add_step(self, node: fx.Node) -> None:
        if not is_free_read(node):
            self._value(node)

    def _value(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            self.copies[node] = self.graph.node_copy(node, self._value)
        return self.copies[node]


def _free_read_name(node: fx.Node) -> str:
    return str(node.target) if is_free_read(node) else ""


def _written_names(nodes: Iterable[fx.Node]) -> set[str]:
    """The names of tensors that some step writes in place, directly or through a view."""
    source: dict[fx.Node, set[str]] = {}
    written: set[str] = set()
    for node in nodes:
        first = source.get(node.args[0], set()) if node.args and isinstance(node.args[0], fx.Node) else set()
        source[node] = {_free_read_name(node)} if is_free_read(node) else first
        if writes(node):
            written |= first
    return written


def trace_chain(model: nn.Module, at: str | None = None) -> Chain:
    """Trace the steps of a model, so finely that its layers are steps, and so is the module `at` if it is given.

    Raises CutError if fx cannot trace a forward pass, if it differs in train mode, and if it has side effects that no
    half would have.
    """
    if at is not None:
        parts = at.split(".")
        opened = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]
        return Chain(model, opened, *trace_forward(model, opened))
    found = Chain(model, [model], *trace_forward(model, [model]))
    tried: set[nn.Module] = set()
    while candidates := [m for m in _called_modules(found) if m not in tried and _holds_layers(m)]:
        tried.add(candidates[0])
        try:
            opened = [*found.opened, candidates[0]]
            finer = Chain(model, opened, *trace_forward(model, opened))
        except CutError:
            continue  # as one step it can stay
        if len(finer.cut_points) > len(found.cut_points) - isinstance(candidates[0], nn.Sequential):
            found = finer
    return found


def _called_modules(found: Chain) -> Iterator[nn.Module]:
    calls = (n for n in found.graph.nodes if n.op == "call_module" and not is_free_read(n))
    return (found.model.get_submodule(n.target) for n in calls)


def _holds_layers(module: nn.Module) -> bool:
    """Whether a module is a list of modules, or contains a list of modules with submodules, as stages and trunks do."""
    lists = [m for m in module.children() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) > 1]
    of_layers = type(module) is nn.Sequential and any(True for _ in module.parameters())
    return of_layers or any(all(layer._modules for layer in layers) for layers in lists)
