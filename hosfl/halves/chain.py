"""How to cut a model that takes one tensor and hands one on: torchvision's, timm's, and most that people write.

`torch.fx` follows the forward pass of the model, and of those modules inside it that hold layers; every other module is
one step, called as it is. A cut is before a step where only one value crosses: all that runs before becomes the client
half, all that runs from there on the server half, functions between modules included. Nothing is computed, and the
model is as it was afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import Parameter, signature
from operator import attrgetter
from typing import Any

from torch import fx, nn

from hosfl.halves.inputs import unchanged


class CutError(TypeError):
    """A model that cannot be cut, or halves that are not the model."""


@dataclass(frozen=True)
class Chain:
    """A model's steps. graph: in the order of its forward pass; opened: the modules that were followed.

    constants: tensors that steps read and that are none of the model's, by the names that fx gave them.
    """

    model: nn.Module
    opened: list[nn.Module]
    graph: fx.Graph
    constants: dict[str, Any]

    @property
    def places(self) -> dict[str, int]:
        """The names of the modules before which one value crosses, and how many of them come before each."""
        calls: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and node.target != MODE:
                calls.setdefault(node.target, node)
        names = [name for name, node in calls.items() if len(self._crossing(node)) == 1]
        return {name: number for number, name in enumerate(names) if number}

    def _crossing(self, first: fx.Node) -> list[fx.Node]:
        """The values made before a step that it or a later one uses. Weights are read where they are used."""
        nodes = list(self.graph.nodes)
        at = nodes.index(first)
        used = {value for node in nodes[at:] for value in node.all_input_nodes}
        return [node for node in nodes[:at] if node in used and not _anywhere(node)]

    def cut(self, name: str) -> tuple[nn.Module, nn.Module]:
        """The halves on either side of a module's first call. Raises CutError where more than one value crosses."""
        nodes = list(self.graph.nodes)
        first = next((n for n in nodes if n.op == "call_module" and n.target == name), None)
        if first is None:
            raise CutError(f"the forward pass of {type(self.model).__name__} does not call {name}")
        crossing = self._crossing(first)
        if len(crossing) != 1 or crossing[0].op == "placeholder":
            what = ", ".join(str(node) for node in crossing)
            raise CutError(f"cannot cut before {name}: one tensor must cross, and here it is {what}")
        at = nodes.index(first)
        client, server = _Half(), _Half()
        for node in nodes[:at]:
            client.take(node)
        server.receive(crossing[0])
        for node in nodes[at:]:
            server.take(node)
        client.graph.output(client.taken[crossing[0]])
        return self._module(client.graph, "Client"), self._module(server.graph, "Server")

    def _module(self, graph: fx.Graph, side: str) -> nn.Module:
        parts: dict[str, Any] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                parts[node.target] = Mode() if node.target == MODE else self._part(node.target)
        half = fx.GraphModule(parts, graph, f"{type(self.model).__name__}{side}")
        for module in (half, *(m for m in parts.values() if isinstance(m, Mode))):
            module.training = self.model.training
        return half

    def _part(self, name: str) -> Any:
        return self.constants[name] if name in self.constants else attrgetter(name)(self.model)


MODE = "train_mode"  # the name of this module in a half


class Mode(nn.Module):
    """Says whether it is in train mode: a step, and no constant to whatever traces or pickles the half."""

    def forward(self) -> bool:
        return self.training


class _Half:
    """A graph that takes over some of another's steps. Weights and flags are read where they are needed first."""

    def __init__(self) -> None:
        self.graph, self.taken = fx.Graph(), dict[fx.Node, fx.Node]()

    def receive(self, value: fx.Node) -> None:
        self.taken[value] = self.graph.placeholder("cut")

    def take(self, node: fx.Node) -> None:
        if not _anywhere(node):
            self._value(node)

    def _value(self, node: fx.Node) -> fx.Node:
        if node not in self.taken:
            self.taken[node] = self.graph.node_copy(node, self._value)
        return self.taken[node]


def _anywhere(node: fx.Node) -> bool:
    """Whether a step reads what either half can read by itself."""
    return bool(node.op == "get_attr" or node.target == MODE)


def chain(model: nn.Module, at: str | None = None) -> Chain:
    """The steps of a model of one tensor; so fine that its layers are steps, or the module by the name `at` is one.

    Raises CutError where fx cannot follow a forward pass, or it is another one in train mode.
    """
    if at is not None:
        parts = at.split(".")
        opened = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]
        return _followed(model, opened)
    found = _followed(model, [model])
    tried: set[nn.Module] = set()
    while candidates := [m for m in _called(found) if m not in tried and _holds_layers(m)]:
        tried.add(candidates[0])
        try:
            finer = _followed(model, [*found.opened, candidates[0]])
        except CutError:
            continue  # as one step it can stay
        if len(finer.places) > len(found.places) - isinstance(candidates[0], nn.Sequential):
            found = finer
    return found


def _called(found: Chain) -> Iterator[nn.Module]:
    return (
        found.model.get_submodule(n.target) for n in found.graph.nodes if n.op == "call_module" and n.target != MODE
    )


def _holds_layers(module: nn.Module) -> bool:
    """A list of modules, or one that has a list of modules that have modules inside: stages, encoders, trunks."""
    lists = [m for m in module.children() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) > 1]
    of_layers = type(module) is nn.Sequential and any(True for _ in module.parameters())
    return of_layers or any(all(layer._modules for layer in layers) for layers in lists)


class _Tracer(fx.Tracer):
    """Follows the forward passes of `opened`. The first argument keeps its name, those behind it their defaults."""

    def __init__(self, opened: Iterable[nn.Module]) -> None:
        super().__init__()
        self.opened = set(opened)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        behind_self = [*signature(root_fn).parameters.values()][1:]
        kinds = {p.name: p.kind for p in behind_self if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}
        name = next(iter(kinds), "x")
        value = self.create_proxy("placeholder", name, (), {})
        if kinds.get(name) is Parameter.KEYWORD_ONLY:
            return lambda: root_fn(self.root, **{name: value}), []
        return root_fn, [self.root, value]


def _followed(model: nn.Module, opened: list[nn.Module]) -> Chain:
    """The forward pass as one graph for both modes: where a function is told the mode, the half's own mode is read."""
    graphs = []
    # What a forward pass does without its input is really done: to buffers, attributes, random generators.
    with unchanged(model.modules()):
        try:
            for mode in (False, True):
                for module in opened:
                    module.training = mode
                graphs.append(_Tracer(opened).trace(model))
        except Exception as error:  # whatever a forward pass does with a value that is none yet
            message = str(error).strip().split("\n")[0]
            raise CutError(f"cannot follow the forward pass of {type(model).__name__}: {message}") from error
        there = dict(vars(model))
    constants = {name: value for name, value in there.items() if name not in vars(model)}
    evaluating, training = graphs
    other = CutError(
        f"the forward pass of {type(model).__name__} is another one in train mode than in eval mode: build it without "
        "what runs in one of them only, such as auxiliary classifiers"
    )
    pairs = list(zip(evaluating.nodes, training.nodes, strict=False))
    if len(evaluating.nodes) != len(training.nodes) or any((a.op, a.target) != (b.op, b.target) for a, b in pairs):
        raise other
    same = {b: a for a, b in pairs}
    flags: list[fx.Node] = []

    def merged(a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node):
            if same.get(b) is not a:
                raise other
            return a
        if a is False and b is True:
            if not flags:
                with evaluating.inserting_before(pairs[0][0]):
                    flags.append(evaluating.create_node("call_module", MODE))
            return flags[0]
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            return type(a)(merged(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: merged(a[key], b[key]) for key in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(*(merged(x, y) for x, y in zip(_ends(a), _ends(b), strict=True)))
        if type(a) is not type(b) or a != b:
            raise other
        return a

    for a, b in pairs:
        a.args, a.kwargs = merged(a.args, b.args), merged(a.kwargs, b.kwargs)
    return Chain(model, opened, evaluating, constants)


def _ends(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step
