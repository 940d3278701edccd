"""Trace a forward pass with `torch.fx`, through chosen modules, into one graph for eval and train mode.

In-place writes into buffers become steps of the graph. Tensors that the pass makes without its input become constants.
Any other state that a pass leaves for the next one cannot be in the graph, and raises CutError.
"""

from __future__ import annotations

import copy
import operator
import pickle
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hosfl.halves.inputs import generator_states, restoring_state


class CutError(TypeError):
    """A model that cannot be cut, or halves that are not the model."""


MODE = "train_mode"  # the name of this module in a half


class TrainMode(nn.Module):
    """Says whether it is in train mode: a step, and no constant to whatever traces or pickles the half."""

    def forward(self) -> bool:
        return self.training


class Constant(nn.Module):
    """A tensor that a half reads, and that is in no state dict. It goes to other devices with the half.

    kind: "made" in the forward pass, anew in every one; a plain "attribute" of a module; or a "buffer" of one, the only
    one to take another dtype with the half, as it does with the model.
    """

    def __init__(self, value: Tensor, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("value", value, persistent=False)

    value: Tensor

    def forward(self) -> Tensor:
        return self.value.clone() if self.kind == "made" else self.value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constant:
        before = self.value
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.kind != "buffer" and self.value.dtype != before.dtype:
            self.value = before.to(self.value.device)
        return self


# Python's operators that write; torch's have names that end in "_".
IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}


def is_free_read(node: fx.Node) -> bool:
    """Whether a step only reads weights, buffers, constants or the mode, which either half can read by itself."""
    return bool(node.op == "get_attr" or node.meta.get(FREE_READ))


FREE_READ = "hosfl.anywhere"
NO_GRADIENTS = "hosfl.no_gradients"  # of a step that runs where gradients are off
DRAWS = "it is another one in every pass: it draws random numbers apart from its input"


def writes(node: fx.Node) -> bool:
    """Whether a step writes into its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and node.op in ("call_function", "call_method")
    return in_place or name in IN_PLACE or name.strip("_") == "setitem"


class BufferTracer(fx.Tracer):
    """A tracer that records in-place operations on buffers too. Unpickling a half traces it again with this class."""

    proxy_buffer_attributes = True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        found = super().getattr(attr, attr_val, parameter_proxy_cache)
        if isinstance(found, fx.Proxy) and isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            return _BufferProxy(found.node, self, attr_val.shape)
        return found


class _BufferProxy(fx.Proxy):
    """A proxy of a buffer: it knows its fixed shape, and records Python's in-place operators as in-place."""

    def __init__(self, node: fx.Node, tracer: fx.proxy.TracerBase, shape: torch.Size) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim = shape, len(shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, at: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, at, value), {})

    def written(self, by: Callable[..., Any], other: Any) -> _BufferProxy:
        node = self.tracer.create_proxy("call_function", by, (self, other), {}).node
        return _BufferProxy(node, self.tracer, self.shape)


for _kind in IN_PLACE:
    setattr(_BufferProxy, f"__{_kind}__", partialmethod(_BufferProxy.written, vars(operator)[_kind]))


def detached(value: Any) -> Any:
    """The tensors in a value without what is behind them; it is a step itself."""
    if isinstance(value, fx.Proxy):
        made = value.tracer.create_proxy("call_function", detached, (value,), {})
        return _BufferProxy(made.node, value.tracer, value.shape) if isinstance(value, _BufferProxy) else made
    return tree_map_only(Tensor, Tensor.detach, value)


class _Tracer(BufferTracer):
    """Follows the forward passes of `opened`. The first argument keeps its name, those behind it their defaults."""

    def __init__(self, opened: Iterable[nn.Module]) -> None:
        super().__init__()
        self.opened, self.autocasts = set(opened), _autocast_depth()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast_depth() != self.autocasts:  # where a half is verified it may change nothing, and elsewhere much
            raise RuntimeError("it enters autocast, which is in no step: do that in the forward pass of a layer")
        node = super().create_node(*args, **kwargs)
        node.meta[NO_GRADIENTS] = not torch.is_grad_enabled()
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if m not in (self.submodule_paths or {}):  # made in the forward pass
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        behind_self = [*signature(root_fn).parameters.values()][1:]
        kinds = {p.name: p.kind for p in behind_self if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}
        name = next(iter(kinds), "x")
        value = self.create_proxy("placeholder", name, (), {})
        if kinds.get(name) is Parameter.KEYWORD_ONLY:
            return lambda: root_fn(self.root, **{name: value}), []
        return root_fn, [self.root, value]


def _autocast_depth() -> int:
    """How many blocks of autocast are entered here. Torch tells only when one is left."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


class _TraceGuard(TorchDispatchMode):
    """While a pass is traced, refuse what would run once and not be in the graph.

    That is computing with real weights and buffers, writing into other tensors of the model, drawing random numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.beside = {_storage_address(t): n for n, t in _other_attributes(model) if isinstance(t, Tensor)}
        self.held = {_storage_address(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            memory = _storage_address(tensor) if isinstance(tensor, Tensor) else 0
            what = None
            if memory in self.held:
                what = f"it computes with {self.held[memory]} without reading it as an attribute of its module"
            elif memory in self.beside and func._schema.is_mutable:
                what = f"it writes into {self.beside[memory]}, which is no buffer: register it as one"
            if memory and what:
                raise RuntimeError(what)  # no TypeError, which operators take for an answer
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(DRAWS)
        return func(*args, **(kwargs or {}))


def _storage_address(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 on the meta device and for layouts that are not strided."""
    return 0 if tensor.is_meta or tensor.layout != torch.strided else tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class _Trace:
    """A traced forward pass: its graph and nodes, the values of get_attr nodes, and the names that tracing made."""

    graph: fx.Graph
    nodes: list[fx.Node]
    read: dict[fx.Node, Any]
    made: set[str]


def _trace_once(model: nn.Module, opened: list[nn.Module], mode: bool, alone: bool = False) -> _Trace:
    """Trace one pass with train mode `mode`. alone: modules that are not in `opened` are in the other mode."""
    for module in model.modules():
        module.training = mode is not alone
    for module in opened:
        module.training = mode
    there, state = set(vars(model)), _all_generator_states(model)
    modules = list(model.named_modules())
    held = [(path, own, dict(own)) for path, m in modules for own in (m._parameters, m._buffers)]
    with _TraceGuard(model), _sizes_as_tuple():
        graph = _Tracer(opened).trace(model)
    if _all_generator_states(model) != state:
        raise RuntimeError(DRAWS)
    for path, own, before in held:
        for name, value in own.items():
            if value is not before.get(name) and not _is_in_place_result(value, f"{path}.{name}".lstrip(".")):
                raise CutError(_assignment_message(name))
        own.update(before)
    nodes = list(graph.nodes)
    read = {node: operator.attrgetter(node.target)(model) for node in nodes if node.op == "get_attr"}
    made = {node.target for node in read} - there
    made = {name for name in made if name in vars(model)}
    for name in made:
        delattr(model, name)
    return _Trace(graph, nodes, read, made)


@contextmanager
def _sizes_as_tuple() -> Iterator[None]:
    """Context manager: torch.empty, ones, rand, randn and zeros get their sizes as one tuple.

    With a proxy among several separate sizes torch raises: it looks for proxies only inside a tuple.
    """

    def in_one(make: Callable[..., Tensor], *sizes: Any, **named: Any) -> Tensor:
        return make(sizes, **named) if len(sizes) > 1 else make(*sizes, **named)

    own = {name: getattr(torch, name) for name in ("empty", "ones", "rand", "randn", "zeros")}
    try:
        for name, make in own.items():
            setattr(torch, name, partial(in_one, make))
        yield
    finally:
        for name, make in own.items():
            setattr(torch, name, make)


def _all_generator_states(model: nn.Module) -> tuple[Any, ...]:
    """The states of random generators, the global ones and those that modules have."""
    own = random.Random, np.random.Generator, np.random.RandomState
    return generator_states(), [pickle.dumps(value) for _, value in _other_attributes(model) if isinstance(value, own)]


@contextmanager
def _flipped_contexts() -> Iterator[None]:
    """Context manager: flips gradient mode and autocast, each from on to off or from off to on."""
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}  # without a kind: of cuda
    with torch.set_grad_enabled(not torch.is_grad_enabled()):
        try:
            for kind, on in autocast.items():
                torch.set_autocast_enabled(kind, not on)
            yield
        finally:
            for kind, on in autocast.items():
                torch.set_autocast_enabled(kind, on)


def _reason(error: Exception) -> str:
    message = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, fx.proxy.TraceError) or "Proxy" in message or "symbolic tracing" in message:
        return "it takes its input's numbers or shape for Python's, as in if, int, len or range, which only a layer may"
    return message


def _source_location(error: Exception) -> str:
    """The last source line in the traceback that is neither torch's nor this package's, for error messages."""
    not_theirs = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    theirs = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    return f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno}: {theirs[-1].line})" if theirs else ""


def _is_in_place_result(value: Any, name: str) -> bool:
    """Whether it is the tensor of that name after steps in place, which `+=` assigns."""
    node: Any = value.node if isinstance(value, fx.Proxy) else None
    while isinstance(node, fx.Node) and writes(node):
        node = node.args[0]
    return isinstance(node, fx.Node) and (node.op, node.target) == ("get_attr", name)


def _assignment_message(name: str) -> str:
    return f"it assigns {name}, where a half would keep the old one: write into it, {name}.copy_(...)"


def trace_forward(model: nn.Module, opened: list[nn.Module]) -> tuple[fx.Graph, dict[str, Any]]:
    """The forward pass of a model, through the modules `opened`, as one graph for both modes: where a function is told
    the mode, the half's own mode is read. And what its steps read that is in no state dict, by name.

    Raises CutError where fx cannot follow it, where it is another one in train mode, and where it leaves behind what no
    half would.
    """
    for module in opened:
        refuse_overridden_methods(module)
    whose = f"the forward pass of {type(model).__name__}"
    modes, all_modes = ({m.training for m in modules} for modules in (opened, model.modules()))
    # What a forward pass does without its input is really done: to attributes, random generators.
    with (
        restoring_state(model.modules()),
        _restoring_containers(model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            evaluating = _trace_once(model, opened, False)
            left = _attribute_values(model)
            training = _trace_once(model, opened, True)
            changed = _first_change(left, _attribute_values(model))
            with evaluating.graph.inserting_before(evaluating.nodes[0]):
                flag = evaluating.graph.create_node("call_module", MODE)
            merged = (
                _merge_traces(evaluating, training, flag)
                if _gradient_flags(evaluating) == _gradient_flags(training)
                else None
            )
            again = merged or _merge_traces(evaluating, _trace_once(model, opened, False), None)
            if (
                len(all_modes) > 1
                and _merge_traces(evaluating, _trace_once(model, opened, False, alone=True), None) is None
            ):
                modes = all_modes  # it reads those of others as well
            with _flipped_contexts():
                elsewhere = _merge_traces(evaluating, _trace_once(model, opened, False), None)
        except Exception as error:  # whatever a forward pass does with a value that is none yet
            raise CutError(f"cannot follow {whose}: {_reason(error)}{_source_location(error)}") from error
    if merged is None and again is not None:
        raise CutError(
            f"{whose} is another one in train mode than in eval mode: build it without what runs in one of them only, "
            "such as auxiliary classifiers"
        )
    if merged is None:
        raise CutError(
            f"{whose} is another one in every pass: it uses what the pass before left in an attribute or elsewhere"
        )
    if elsewhere is None:
        raise CutError(
            f"{whose} is another one where gradients are off, or under autocast: ask for these in the forward pass of "
            "a layer"
        )
    if changed:
        raise CutError(
            f"{whose} changes {changed}, which is in no half: keep it in a buffer, and write into that in place"
        )
    for node, (args, kwargs) in zip(evaluating.nodes, merged, strict=True):
        node.args, node.kwargs = args, kwargs
    _detach_no_grad_steps(evaluating)
    flag.meta[FREE_READ] = True
    if not flag.users:
        evaluating.graph.erase_node(flag)
    elif len(modes) > 1:
        raise CutError(
            f"some modules of {type(model).__name__} are in train mode and others are not: call its train() or "
            "eval(), cut, and set the modes of the halves' own modules"
        )
    return evaluating.graph, _replace_constants(model, evaluating)


def refuse_overridden_methods(module: nn.Module) -> None:
    """Raises CutError for a module whose forward pass is taken apart, and with it what is beside it in its class."""
    kind = type(module)
    base = next(k for k in kind.__mro__ if k is nn.Module or k.__module__ == "transformers.modeling_utils")
    own = [name for name in ("train", "eval") if getattr(kind, name) is not getattr(base, name) or name in vars(module)]
    if kind.__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
        own.append("__call__")
    if own:
        raise CutError(
            f"cannot cut through {kind.__name__}, whose class has its own {own[0]}, which no half would have: take "
            "that off, or put it into a layer"
        )


def _merge_traces(a: _Trace, b: _Trace, flag: fx.Node | None) -> list[tuple[Any, Any]] | None:
    """Every step's arguments, where b is told True and a is told False the flag's; None for passes that differ."""
    same = dict(zip(b.nodes, a.nodes, strict=False))
    try:
        if len(a.nodes) != len(b.nodes) or not all(_same_step(a, m, b, n) for n, m in same.items()):
            return None
        return [
            (_merge_argument(m.args, n.args, same, flag), _merge_argument(m.kwargs, n.kwargs, same, flag))
            for n, m in same.items()
        ]
    except _TracesDiffer:
        return None


def _gradient_flags(one: _Trace) -> list[bool]:
    return [node.meta[NO_GRADIENTS] for node in one.nodes]


def _detach_no_grad_steps(one: _Trace) -> None:
    """What steps take and make where gradients are off is detached: no half enters `no_grad` in between."""
    for node in one.nodes:
        if not node.meta[NO_GRADIENTS] or node.op == "get_attr":
            continue
        first: Any = node.args[0] if writes(node) else None
        if first is not None:  # what is behind it stays
            node.replace_all_uses_with(first)
        else:
            with one.graph.inserting_after(node):
                made = one.graph.call_function(detached, (node,))
            node.replace_all_uses_with(made, delete_user_cb=partial(operator.is_not, made))
        with one.graph.inserting_before(node):
            for value in node.all_input_nodes:
                if value.target is not detached:
                    node.replace_input_with(value, one.graph.call_function(detached, (value,)))


class _TracesDiffer(Exception):
    pass


def _same_step(a: _Trace, m: fx.Node, b: _Trace, n: fx.Node) -> bool:
    if m.op != n.op or m.op != "get_attr":
        return (m.op, m.target) == (n.op, n.target)
    if m.target in a.made or n.target in b.made:
        return _equal(a.read[m], b.read[n])
    return bool(m.target == n.target and a.read[m] is b.read[n])


def _merge_argument(a: Any, b: Any, same: Mapping[fx.Node, fx.Node], flag: fx.Node | None) -> Any:
    if isinstance(a, fx.Node):
        if same.get(b) is not a:
            raise _TracesDiffer
        return a
    if flag is not None and a is False and b is True:
        return flag
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return type(a)(_merge_argument(x, y, same, flag) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {key: _merge_argument(a[key], b[key], same, flag) for key in a}
    if isinstance(a, slice) and isinstance(b, slice):
        return slice(
            *(_merge_argument(x, y, same, flag) for x, y in zip(_slice_parts(a), _slice_parts(b), strict=True))
        )
    if not _equal(a, b):
        raise _TracesDiffer
    return a


def _equal(a: Any, b: Any) -> bool:
    """Of one kind and equal, NaN to NaN; tensors in dtype, shape and every number. On the meta device there is none."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if (a.dtype, a.shape, a.device, a.layout) != (b.dtype, b.shape, b.device, b.layout):
            return False
        return a.is_meta or torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, 0, 0, equal_nan=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b or (isinstance(a, float) and a != a and b != b))


def _slice_parts(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


MODULE_ATTRIBUTES = {*vars(nn.Module())}  # what every module has


def _other_attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every attribute that modules have beyond those of nn.Module itself."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in MODULE_ATTRIBUTES:
                yield f"{path}.{name}" if path else name, value


@contextmanager
def _restoring_containers(model: nn.Module) -> Iterator[None]:
    """Context manager: restores the contents of lists and dicts that are attributes of modules."""
    kept = [(value, copy.copy(value)) for _, value in _other_attributes(model) if type(value) in (list, dict)]
    try:
        yield
    finally:
        for value, before in kept:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


def _attribute_values(model: nn.Module) -> dict[str, Any]:
    return {name: _snapshot(value) for name, value in _other_attributes(model)}


def _snapshot(value: Any, depth: int = 3) -> Any:
    """A value as it is now: it may be written into. What a pass makes of its input is alike whatever it is."""
    if isinstance(value, (fx.Proxy, fx.Node)):
        return fx.Proxy
    if isinstance(value, Tensor):
        return value.detach().clone()
    if depth and type(value) in (list, tuple):
        return type(value)(_snapshot(v, depth - 1) for v in value)
    if depth and isinstance(value, dict):
        return {key: _snapshot(v, depth - 1) for key, v in value.items()}
    return set(value) if type(value) is set else value


def _first_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    return next((name for name, value in after.items() if name not in before or not _equal(before[name], value)), None)


def _replace_constants(model: nn.Module, one: _Trace) -> dict[str, Any]:
    """Names and modules of those things that are read and that no state dict has, whose steps become calls of these."""
    calls = {str(node.target): node for node in one.nodes if node.op == "call_module"}
    for node in one.nodes:
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), (TrainMode, Constant)):
            node.meta[FREE_READ] = True  # of a half that is cut again
    # A module that is a step has its buffers itself.
    in_none = {name for name in non_persistent_buffers(model) if not any(name.startswith(f"{call}.") for call in calls)}
    saved = {id(t) for t in (*model.parameters(), *model.buffers())}
    found: dict[str, Any] = {}
    steps: dict[str, fx.Node] = {}
    for node, value in one.read.items():
        name = str(node.target)
        if not isinstance(value, Tensor):
            if name in one.made:
                found[name] = value
            continue
        if name not in in_none and id(value) in saved:
            continue
        if name not in steps:  # one step, so that what is written into a tensor is in it afterwards
            kind = "buffer" if name in in_none else "made" if name in one.made else "attribute"
            new = _unused_name(model, found)
            found[new] = Constant(value, kind)
            with one.graph.inserting_before(node):
                steps[name] = one.graph.create_node("call_module", new)
            steps[name].meta[FREE_READ] = True
        node.replace_all_uses_with(steps[name])
        one.graph.erase_node(node)
    return found


def non_persistent_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers that are in no state dict."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.{name}".lstrip(".") for path, m in modules for name in m._non_persistent_buffers_set}


def _unused_name(model: nn.Module, taken: Mapping[str, Any]) -> str:
    number = 0
    while hasattr(model, f"constant_{number}") or f"constant_{number}" in taken:
        number += 1
    return f"constant_{number}"
