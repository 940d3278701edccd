"""Trace a forward pass with `torch.fx`, through chosen modules, into one graph for eval and train mode.

In-place writes into buffers become steps of the graph. Tensors that the pass makes without its input become constants.
A pass that leaves any other state for the next one cannot be a graph: tracing it raises CutError.
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
    """Returns whether it is in train mode: a module, so that a graph reads the mode in a step instead of a constant."""

    def forward(self) -> bool:
        return self.training


class Constant(nn.Module):
    """A tensor that a half reads and that is in no state dict. It moves to other devices with the half.

    kind: "made": every forward pass makes it anew; "attribute": a plain attribute of a module; "buffer": a buffer of a
    module. Only a buffer is cast to another dtype with the half, as with the model.
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


# Python's in-place operators. The names of torch's end in "_".
IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}

# Keys of nodes' meta.
FREE_READ = "hosfl.anywhere"  # see `is_free_read`
NO_GRADIENTS = "hosfl.no_gradients"  # whether the step runs where gradients are off

DRAWS = "it differs from pass to pass: it draws random numbers apart from its input"


def is_free_read(node: fx.Node) -> bool:
    """Whether a step only reads weights, buffers, constants or the mode, so that either half can have it."""
    return bool(node.op == "get_attr" or node.meta.get(FREE_READ))


def writes(node: fx.Node) -> bool:
    """Whether a step writes into its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and node.op in ("call_function", "call_method")
    return in_place or name in IN_PLACE or name.strip("_") == "setitem"


class BufferTracer(fx.Tracer):
    """A tracer that also records in-place operations on buffers. Unpickling a half traces it again with this class."""

    proxy_buffer_attributes = True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        value = super().getattr(attr, attr_val, parameter_proxy_cache)
        if isinstance(value, fx.Proxy) and isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            return _BufferProxy(value.node, self, attr_val.shape)
        return value


class _BufferProxy(fx.Proxy):
    """A proxy of a buffer, with its fixed shape, that records Python's in-place operators as such."""

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

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def apply_in_place(self, function: Callable[..., Any], other: Any) -> _BufferProxy:
        """Record a call of an in-place operator, and return the proxy of its result."""
        node = self.tracer.create_proxy("call_function", function, (self, other), {}).node
        return _BufferProxy(node, self.tracer, self.shape)


for _name in IN_PLACE:
    setattr(_BufferProxy, f"__{_name}__", partialmethod(_BufferProxy.apply_in_place, vars(operator)[_name]))


def detached(value: Any) -> Any:
    """Detach the tensors of a nested structure. Tracing records a call of this function as a step."""
    if isinstance(value, fx.Proxy):
        proxy = value.tracer.create_proxy("call_function", detached, (value,), {})
        return _BufferProxy(proxy.node, value.tracer, value.shape) if isinstance(value, _BufferProxy) else proxy
    return tree_map_only(Tensor, Tensor.detach, value)


class _Tracer(BufferTracer):
    """Traces into the modules `opened`; any other module is one step.

    The first argument of the forward pass is the graph's input, under its own name. Later ones have their defaults.
    """

    def __init__(self, opened: Iterable[nn.Module]) -> None:
        super().__init__()
        self.opened, self.autocasts = set(opened), _autocast_depth()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # Verifying the halves may not detect a lost autocast: on the verifying device it may change nothing.
        if _autocast_depth() != self.autocasts:
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
        after_self = [*signature(root_fn).parameters.values()][1:]
        kinds = {p.name: p.kind for p in after_self if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}
        name = next(iter(kinds), "x")
        needed = [p.name for p in after_self if p.name in kinds and p.default is Parameter.empty]
        if {*needed} - {name}:
            raise TypeError(f"it takes several inputs, {', '.join(needed)}, and only one can be followed")
        value = self.create_proxy("placeholder", name, (), {})
        if kinds.get(name) is Parameter.KEYWORD_ONLY:
            return lambda: root_fn(self.root, **{name: value}), []
        return root_fn, [self.root, value]


def _autocast_depth() -> int:
    """The number of autocast contexts that are entered. torch returns it only when one is left."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


class _TraceGuard(TorchDispatchMode):
    """Mode that refuses, while a pass is traced, operations that would run once and not be in the graph.

    These are computing with real weights and buffers, writing into other tensors of the model, and drawing random
    numbers. Raises RuntimeError.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Names of tensors by the address of their storage.
        self.attributes = {_storage_address(t): n for n, t in _other_attributes(model) if isinstance(t, Tensor)}
        self.state = {_storage_address(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            address = _storage_address(tensor) if isinstance(tensor, Tensor) else 0
            fault = None
            if address in self.state:
                fault = f"it computes with {self.state[address]} without reading it as an attribute of its module"
            elif address in self.attributes and func._schema.is_mutable:
                fault = f"it writes into {self.attributes[address]}, which is no buffer: register it as one"
            if address and fault:
                raise RuntimeError(fault)  # not TypeError: Python's operators would catch it
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(DRAWS)
        return func(*args, **(kwargs or {}))


def _storage_address(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 on the meta device and for layouts that are not strided."""
    return 0 if tensor.is_meta or tensor.layout != torch.strided else tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class _Trace:
    """A traced forward pass.

    values: what each get_attr node reads. new_names: attributes that tracing gave the model, for values that the pass
    made without its input.
    """

    graph: fx.Graph
    nodes: list[fx.Node]
    values: dict[fx.Node, Any]
    new_names: set[str]


def _trace_once(model: nn.Module, opened: list[nn.Module], training: bool, flip_others: bool = False) -> _Trace:
    """Trace one pass with the modules `opened` in train or eval mode.

    flip_others: set all other modules to the other mode. Raises RuntimeError or CutError for a pass that cannot be
    traced.
    """
    for module in model.modules():
        module.training = training is not flip_others
    for module in opened:
        module.training = training
    old_names, states = set(vars(model)), _all_generator_states(model)
    tensors = [(path, own, dict(own)) for path, m in model.named_modules() for own in (m._parameters, m._buffers)]
    with _TraceGuard(model), _sizes_as_tuple():
        graph = _Tracer(opened).trace(model)
    if _all_generator_states(model) != states:
        raise RuntimeError(DRAWS)
    for path, own, before in tensors:
        for name, value in own.items():
            if value is not before.get(name) and not _is_in_place_result(value, f"{path}.{name}".lstrip(".")):
                raise CutError(
                    f"it assigns {name}, where a half would keep the old one: write into it, {name}.copy_(...)"
                )
        own.update(before)
    nodes = list(graph.nodes)
    values = {node: operator.attrgetter(node.target)(model) for node in nodes if node.op == "get_attr"}
    new_names = {node.target for node in values if node.target in vars(model)} - old_names
    for name in new_names:
        delattr(model, name)
    return _Trace(graph, nodes, values, new_names)


@contextmanager
def _sizes_as_tuple() -> Iterator[None]:
    """Context manager: pass sizes to torch.empty, ones, rand, randn and zeros as one tuple.

    With a proxy among several separate sizes torch raises: it looks for proxies only inside a tuple.
    """

    def call_with_tuple(make: Callable[..., Tensor], *sizes: Any, **named: Any) -> Tensor:
        return make(sizes, **named) if len(sizes) > 1 else make(*sizes, **named)

    functions = {name: getattr(torch, name) for name in ("empty", "ones", "rand", "randn", "zeros")}
    try:
        for name, make in functions.items():
            setattr(torch, name, partial(call_with_tuple, make))
        yield
    finally:
        for name, make in functions.items():
            setattr(torch, name, make)


def _all_generator_states(model: nn.Module) -> tuple[Any, ...]:
    """The states of the global random generators and of those that are attributes of modules."""
    kinds = random.Random, np.random.Generator, np.random.RandomState
    return generator_states(), [
        pickle.dumps(value) for _, value in _other_attributes(model) if isinstance(value, kinds)
    ]


@contextmanager
def _flipped_contexts() -> Iterator[None]:
    """Context manager: flip gradient mode and autocast, each from on to off or from off to on."""
    autocast = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    with torch.set_grad_enabled(not torch.is_grad_enabled()):
        try:
            for device, on in autocast.items():
                torch.set_autocast_enabled(device, not on)
            yield
        finally:
            for device, on in autocast.items():
                torch.set_autocast_enabled(device, on)


def _reason(error: Exception) -> str:
    """Why a pass could not be traced, for error messages."""
    message = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, fx.proxy.TraceError) or "Proxy" in message or "symbolic tracing" in message:
        return "it takes its input's numbers or shape for Python's, as in if, int, len or range, which only a layer may"
    return message


def _source_location(error: Exception) -> str:
    """The last line in the traceback that is neither torch's nor this package's, for error messages."""
    excluded = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(excluded)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _is_in_place_result(value: Any, name: str) -> bool:
    """Whether a value results from in-place steps on the tensor of this name, which `+=` assigns to the attribute."""
    node: Any = value.node if isinstance(value, fx.Proxy) else None
    while isinstance(node, fx.Node) and writes(node):
        node = node.args[0]
    return isinstance(node, fx.Node) and (node.op, node.target) == ("get_attr", name)


def trace_forward(model: nn.Module, opened: list[nn.Module]) -> tuple[fx.Graph, dict[str, Any]]:
    """Trace the forward pass of a model, through the modules `opened`, into one graph for train and eval mode.

    Returns the graph and, by name, the values and modules that its steps read and that are in no state dict. Where a
    function is passed the mode, the graph reads it from a `TrainMode`.

    Raises CutError if fx cannot trace the pass, if it differs between modes or from pass to pass, and if it has side
    effects that a half would not have.
    """
    for module in opened:
        refuse_overridden_methods(module)
    forward = f"the forward pass of {type(model).__name__}"
    modes, all_modes = ({m.training for m in modules} for modules in (opened, model.modules()))
    # While a pass is traced, whatever it does without its input is really done, such as changing attributes.
    with (
        restoring_state(model.modules()),
        _restoring_containers(model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            traced = _trace_repeatedly(model, opened, len(all_modes) > 1)
        except Exception as error:  # whatever a forward pass does with a value that is none yet
            raise CutError(f"cannot follow {forward}: {_reason(error)}{_source_location(error)}") from error
    trace, merged = traced.trace, traced.merged
    if merged is None and traced.repeats:
        raise CutError(
            f"{forward} differs between train mode and eval mode: build it without what runs in one of them only, such "
            "as auxiliary classifiers"
        )
    if merged is None:
        raise CutError(
            f"{forward} differs from pass to pass: it uses what the pass before left in an attribute or elsewhere"
        )
    if not traced.ignores_contexts:
        raise CutError(
            f"{forward} differs where gradients are off, or under autocast: ask for these in the forward pass of a"
            " layer"
        )
    if traced.changed:
        raise CutError(
            f"{forward} changes {traced.changed}, which is in no half: keep it in a buffer, and write into that in"
            " place"
        )
    for node, (args, kwargs) in zip(trace.nodes, merged, strict=True):
        node.args, node.kwargs = args, kwargs
    _detach_no_grad_steps(trace)
    traced.flag.meta[FREE_READ] = True
    if not traced.flag.users:
        trace.graph.erase_node(traced.flag)
    elif len(all_modes if traced.reads_other_modes else modes) > 1:
        raise CutError(
            f"some modules of {type(model).__name__} are in train mode and others are not: call its train() or "
            "eval(), cut, and set the modes of the halves' own modules"
        )
    return trace.graph, _replace_constants(model, trace)


@dataclass(frozen=True)
class _Traced:
    """The trace of a pass in eval mode, and what traces of further passes tell about it.

    Attributes:
        flag: the node that reads the mode, the first of the trace's graph.
        merged: see `_merge_traces`; None if the pass differs in train mode.
        repeats: whether a second pass in eval mode is equal.
        reads_other_modes: whether the pass depends on the modes of modules that are not opened.
        ignores_contexts: whether the pass is equal with gradient mode and autocast flipped.
        changed: the name of an attribute that a pass changes, if any.
    """

    trace: _Trace
    flag: fx.Node
    merged: list[tuple[Any, Any]] | None
    repeats: bool
    reads_other_modes: bool
    ignores_contexts: bool
    changed: str | None


def _trace_repeatedly(model: nn.Module, opened: list[nn.Module], mixed_modes: bool) -> _Traced:
    """Trace the forward pass in eval mode, in train mode and in other contexts, and compare the traces.

    mixed_modes: whether some of the model's modules are in train mode and others in eval mode.
    """
    trace = _trace_once(model, opened, False)
    values = _attribute_values(model)
    in_train_mode = _trace_once(model, opened, True)
    changed = _first_change(values, _attribute_values(model))
    with trace.graph.inserting_before(trace.nodes[0]):
        flag = trace.graph.create_node("call_module", MODE)
    merged = None
    if _gradient_flags(trace) == _gradient_flags(in_train_mode):
        merged = _merge_traces(trace, in_train_mode, flag)

    def is_repeated(flip_others: bool = False) -> bool:
        return _merge_traces(trace, _trace_once(model, opened, False, flip_others), None) is not None

    repeats = merged is not None or is_repeated()
    reads_other_modes = mixed_modes and not is_repeated(flip_others=True)
    with _flipped_contexts():
        ignores_contexts = is_repeated()
    return _Traced(trace, flag, merged, repeats, reads_other_modes, ignores_contexts, changed)


def refuse_overridden_methods(module: nn.Module) -> None:
    """Raise CutError for a class with its own `train`, `eval` or `__call__`, which no half would have."""
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
    """Return every step's (args, kwargs), with the flag where a passes False and b passes True; None if passes differ.

    a: a pass in eval mode; the results refer to its nodes. b: one in train mode. flag: None: both passes are in the
    same mode.
    """
    to_a = dict(zip(b.nodes, a.nodes, strict=False))
    try:
        if len(a.nodes) != len(b.nodes) or not all(_is_same_step(a, m, b, n) for n, m in to_a.items()):
            return None
        return [
            (_merge_argument(m.args, n.args, to_a, flag), _merge_argument(m.kwargs, n.kwargs, to_a, flag))
            for n, m in to_a.items()
        ]
    except _TracesDiffer:
        return None


def _gradient_flags(trace: _Trace) -> list[bool]:
    """For every step, whether gradients are off."""
    return [node.meta[NO_GRADIENTS] for node in trace.nodes]


def _detach_no_grad_steps(trace: _Trace) -> None:
    """Detach inputs and outputs of the steps that ran under `no_grad`, which the graph does not enter."""
    for node in trace.nodes:
        if not node.meta[NO_GRADIENTS] or node.op == "get_attr":
            continue
        target: Any = node.args[0] if writes(node) else None
        if target is not None:  # an in-place write: later steps use its target, which keeps its gradient
            node.replace_all_uses_with(target)
        else:
            with trace.graph.inserting_after(node):
                result = trace.graph.call_function(detached, (node,))
            node.replace_all_uses_with(result, delete_user_cb=partial(operator.is_not, result))
        with trace.graph.inserting_before(node):
            for value in node.all_input_nodes:
                if value.target is not detached:
                    node.replace_input_with(value, trace.graph.call_function(detached, (value,)))


class _TracesDiffer(Exception):
    """Raised for arguments of two passes that differ."""


def _is_same_step(a: _Trace, m: fx.Node, b: _Trace, n: fx.Node) -> bool:
    """Whether step m of pass a and step n of pass b are the same, apart from their arguments."""
    if m.op != n.op or m.op != "get_attr":
        return (m.op, m.target) == (n.op, n.target)
    if m.target in a.new_names or n.target in b.new_names:
        return _is_equal(a.values[m], b.values[n])
    return bool(m.target == n.target and a.values[m] is b.values[n])


def _merge_argument(a: Any, b: Any, to_a: Mapping[fx.Node, fx.Node], flag: fx.Node | None) -> Any:
    """Merge an argument of one step in both passes: see `_merge_traces`. Raises _TracesDiffer."""
    if isinstance(a, fx.Node):
        if to_a.get(b) is not a:
            raise _TracesDiffer
        return a
    if flag is not None and a is False and b is True:
        return flag
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return type(a)(_merge_argument(x, y, to_a, flag) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {key: _merge_argument(a[key], b[key], to_a, flag) for key in a}
    if isinstance(a, slice) and isinstance(b, slice):
        parts = zip((a.start, a.stop, a.step), (b.start, b.stop, b.step), strict=True)
        return slice(*(_merge_argument(x, y, to_a, flag) for x, y in parts))
    if not _is_equal(a, b):
        raise _TracesDiffer
    return a


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two values have the same type and are equal. NaN equals NaN.

    Tensors must agree in dtype, shape, device, layout and every element; on the meta device they have no elements.
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if (a.dtype, a.shape, a.device, a.layout) != (b.dtype, b.shape, b.device, b.layout):
            return False
        return a.is_meta or torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, 0, 0, equal_nan=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    return bool(a == b or (isinstance(a, float) and a != a and b != b))


MODULE_ATTRIBUTES = {*vars(nn.Module())}  # the attributes that every module has


def _other_attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every attribute that modules have beyond those of nn.Module itself."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in MODULE_ATTRIBUTES:
                yield f"{path}.{name}" if path else name, value


@contextmanager
def _restoring_containers(model: nn.Module) -> Iterator[None]:
    """Context manager: restore the contents of lists and dicts that are attributes of modules."""
    saved = [(value, copy.copy(value)) for _, value in _other_attributes(model) if type(value) in (list, dict)]
    try:
        yield
    finally:
        for value, before in saved:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


def _attribute_values(model: nn.Module) -> dict[str, Any]:
    """Snapshots of the modules' attributes, by path."""
    return {name: _snapshot(value) for name, value in _other_attributes(model)}


def _snapshot(value: Any, depth: int = 3) -> Any:
    """Copy a value that may be changed in place. All values that depend on the pass's input give the same."""
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
    """The name of the first attribute that is new or changed, if any."""
    return next(
        (name for name, value in after.items() if name not in before or not _is_equal(before[name], value)), None
    )


def _replace_constants(model: nn.Module, trace: _Trace) -> dict[str, Any]:
    """Replace reads of tensors that are in no state dict by calls of `Constant` modules.

    Returns these modules, and other values that the pass made without its input, by the names that the graph gives
    them.
    """
    calls = {str(node.target): node for node in trace.nodes if node.op == "call_module"}
    for node in trace.nodes:
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), (TrainMode, Constant)):
            node.meta[FREE_READ] = True  # the model is itself a half
    # The buffers of a module that is one step go with that module.
    non_persistent = {
        name for name in non_persistent_buffers(model) if not any(name.startswith(f"{call}.") for call in calls)
    }
    state = {id(t) for t in (*model.parameters(), *model.buffers())}
    constants: dict[str, Any] = {}
    steps: dict[str, fx.Node] = {}
    for node, value in trace.values.items():
        name = str(node.target)
        if not isinstance(value, Tensor):
            if name in trace.new_names:
                constants[name] = value
            continue
        if name not in non_persistent and id(value) in state:
            continue
        if name not in steps:  # one step for all reads, so that later ones see in-place writes
            kind = "buffer" if name in non_persistent else "made" if name in trace.new_names else "attribute"
            constant_name = _unused_name(model, constants)
            constants[constant_name] = Constant(value, kind)
            with trace.graph.inserting_before(node):
                steps[name] = trace.graph.create_node("call_module", constant_name)
            steps[name].meta[FREE_READ] = True
        node.replace_all_uses_with(steps[name])
        trace.graph.erase_node(node)
    return constants


def non_persistent_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers that are in no state dict."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.{name}".lstrip(".") for path, m in modules for name in m._non_persistent_buffers_set}


def _unused_name(model: nn.Module, taken: Mapping[str, Any]) -> str:
    """A name that neither the model nor `taken` has."""
    number = 0
    while hasattr(model, f"constant_{number}") or f"constant_{number}" in taken:
        number += 1
    return f"constant_{number}"
