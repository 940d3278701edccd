"""Compare a model with the two halves that it was cut into, by one forward and one backward pass of each.

Both run in train mode, so that dropout and the like take part, and every random operation starts from the same seed:
then the halves' outputs equal the model's to the bit. Batch normalisations stay in eval mode. If a pass writes into
buffers, the halves must leave the same values there as the model, and a second forward pass starts from them.

Each pass gets its own copy of the inputs. What it changes is restored before the next one: attributes, buffers,
gradients, modes and random generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hosfl.halves.follow import CutError
from hosfl.halves.inputs import (
    Inputs,
    accelerators,
    call,
    clone_tensors,
    describe_inputs,
    outputs_match,
    restoring_state,
)
from hosfl.halves.transformer_halves import output_tensor


class ExampleError(ValueError):
    """An example that the model does not take."""


def has_meta_tensors(model: nn.Module) -> bool:
    """Whether a parameter or buffer is on the meta device, so that nothing can be computed."""
    return any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))


def verify_halves(model: nn.Module, halves: Any, inputs: Inputs) -> None:
    """Compare a model with its halves on an example: outputs, and the gradients of all parameters that require them.

    halves: has `client` and `server`, whose parameters are the model's or equal to the model's. inputs: a few samples.
    Outputs must be equal: to the bit on the CPU, within a few units in the last place elsewhere. Gradients must agree
    within the square root of a unit. Costs two forward and two backward passes; each gradient is freed once it has been
    compared. Where the model writes into buffers, these must have equal values afterwards, and two more forward passes
    begin with them.

    Raises CutError, which names the module where the difference begins, also if a half's output is not one tensor;
    ExampleError for an example that the model does not take.
    """
    originals = original_parameters(model, halves)
    modules = {*model.modules(), *halves.client.modules(), *halves.server.modules()}
    isolated = partial(_isolated_pass, modules, inputs)
    try:
        with isolated() as copies:
            whole = _record_pass(lambda: output_tensor(_call_whole(model, copies)), model.parameters(), modules)
    except CutError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__  # an assert often has no message
        raise ExampleError(f"{_name(model)} does not take the example, {describe_inputs(inputs)}: {reason}") from error
    finite = {
        "outputs": bool(torch.isfinite(whole.output).all()),
        "gradients": all(math.isfinite(value) for sketch in whole.gradients.values() for value in sketch),
    }
    for what, is_finite in finite.items():
        if not is_finite:
            raise ExampleError(
                f"{_name(model)} makes infinite or NaN {what} of the example, {describe_inputs(inputs)}: look for such"
                " numbers in the data and in the weights"
            )
    try:
        with isolated() as copies:
            parts = _record_pass(lambda: halves(copies), originals, modules)
    except (CutError, ValueError):
        raise
    except Exception as error:
        raise CutError(f"the halves of {_name(model)} do not run: {type(error).__name__}: {error}") from error
    if not outputs_match(whole.output, parts.output):
        where = _first_difference(model, halves, isolated, set(originals.values()))
        raise CutError(
            f"the halves are not {_name(model)}: {_describe_difference(whole.output, parts.output)}; {where}"
        )
    _compare_buffers(model, halves, whole, parts)
    _compare_gradients(model, originals, whole, parts)


def _compare_gradients(
    model: nn.Module, originals: Mapping[Tensor, Tensor], whole: _PassRecord, parts: _PassRecord
) -> None:
    """Raise CutError for gradients that differ. originals: see `original_parameters`.

    The gradients of the copies of a tied weight are summed.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    sketches: dict[Tensor, float] = {}
    for parameter, (sketch, _) in parts.gradients.items():
        sketches[originals[parameter]] = sketches.get(originals[parameter], 0.0) + sketch
    longest = max((norm for _, norm in whole.gradients.values()), default=0.0)
    for parameter in {**whole.gradients, **sketches}:
        sketch, norm = whole.gradients.get(parameter, (0.0, 0.0))
        tolerance = torch.finfo(parameter.dtype).eps ** 0.5 * (norm + 1e-4 * longest)
        if not abs(sketch - sketches.get(parameter, 0.0)) <= tolerance:
            raise CutError(
                f"the halves are not {_name(model)}: outputs are equal, but the gradient of {names[parameter]} "
                f"{'differs' if parameter in sketches else 'is lost'}"
            )


def _name(model: nn.Module) -> str:
    """The name of a model's class, for error messages."""
    return type(model).__name__


def _call_whole(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model as the halves are called: a transformer returns a mapping, and caches no keys and values.

    Cached keys and values lie elsewhere in memory, and on some processors attention then sums in another order.
    """
    configs: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    with ExitStack() as stack:
        for config in configs:
            for name, value in (("return_dict", True), ("use_cache", False)):
                if hasattr(config, name):
                    stack.callback(setattr, config, name, getattr(config, name))
                    setattr(config, name, value)
        return call(model, inputs)


def original_parameters(model: nn.Module, halves: Any) -> dict[Tensor, Tensor]:
    """Map each parameter of the halves to the model's: itself or, for a copy of a tied weight, the original.

    Raises CutError for a parameter that the model does not have.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    originals: dict[Tensor, Tensor] = {}
    for side, half in (("client", halves.client), ("server", halves.server)):
        for name, parameter in half.named_parameters():
            if parameter in names:
                originals[parameter] = parameter
                continue
            original = _find_original(parameter, name, names)
            if original is None:
                raise CutError(f"the halves are not {_name(model)}: it has no parameter like the {side} half's {name}")
            originals[parameter] = original
    return originals


def _find_original(copy: Tensor, name: str, names: Mapping[Tensor, str]) -> Tensor | None:
    """The model's tensor that a half's tensor is a copy of: an equal one; None if there is none.

    name: the copy's name in the half. names: the model's tensors and their names. Of several equal tensors, such as
    the weights of new normalisations, the one whose name has the longest common end.
    """
    equal = [t for t in names if t.shape == copy.shape and t.dtype == copy.dtype and torch.equal(t, copy)]
    return max(equal, key=lambda t: _common_suffix(names[t], name), default=None)


def _common_suffix(name: str, other: str) -> int:
    """The number of equal dotted parts at the end of two names."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass
class _PassRecord:
    """What one pass computed.

    Attributes:
        output: the forward pass's output.
        gradients: for each parameter a linear sketch and the norm of its gradient.
        written: the buffers that the pass wrote into, and their values afterwards.
        second_output: the output of a second forward pass; empty if `written` is.
    """

    output: Tensor
    gradients: dict[Tensor, tuple[float, float]]
    written: dict[Tensor, Tensor]
    second_output: Tensor


def _record_pass(forward: Callable[[], Tensor], parameters: Iterable[Tensor], modules: set[nn.Module]) -> _PassRecord:
    """Run a forward and a backward pass, and a second forward pass if the first one wrote into buffers.

    parameters: those whose gradients are recorded; their `.grad` is restored. modules: those whose buffers are watched.
    """
    monitor = _BufferMonitor(modules)
    record = _PassRecord(torch.empty(0), {}, {}, torch.empty(0))
    trainable = [p for p in parameters if p.requires_grad]
    saved = [p.grad for p in trainable]

    def record_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        record.gradients[parameter] = _sketch(parameter.grad)
        parameter.grad = None

    with ExitStack() as stack:
        for parameter, gradient in zip(trainable, saved, strict=True):
            parameter.grad = None
            stack.callback(setattr, parameter, "grad", gradient)
            stack.callback(parameter.register_post_accumulate_grad_hook(record_gradient).remove)
        output = forward()
        if not isinstance(output, Tensor):
            raise CutError(f"a half must make one tensor, it makes a {type(output).__name__}")
        record.output = output.detach().clone()
        if output.requires_grad:
            weights = torch.arange(output.numel(), device=output.device, dtype=torch.float32).cos()
            (output.float().flatten() * weights).sum().backward()
    record.written = monitor.written()
    if record.written:
        with torch.no_grad():
            record.second_output = forward().clone()
    return record


class _BufferMonitor:
    """Detects which buffers of modules are written after its construction."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        buffers = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
        self._buffers = [
            (own, name, b, None if b.is_inference() else b._version, b.clone()) for own, name, b in buffers
        ]

    def written(self) -> dict[Tensor, Tensor]:
        """Return the buffers that were written or replaced, as the original tensors, with copies of their values."""
        changed = {}
        for own, name, buffer, version, before in self._buffers:
            value = own.get(name)
            if value is not buffer or (version is not None and version != buffer._version):
                changed[buffer] = torch.empty(0) if value is None else value.clone()
            elif not _has_same_values(buffer, before):  # a write through .data does not change the version
                changed[buffer] = buffer.clone()
        return changed


def _has_same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two buffers are equal: floats as in `outputs_match`, others to the bit. Sparse ones are not compared."""
    if a.layout != torch.strided:
        return True
    return outputs_match(a, b) if a.is_floating_point() else a.dtype == b.dtype and torch.equal(a, b)


def _compare_buffers(model: nn.Module, halves: Any, whole: _PassRecord, parts: _PassRecord) -> None:
    """Raise CutError if the halves leave other values in buffers, or if a second pass with them has another output.

    Both halves may have a copy of a buffer that both write, if the copies stay equal: those of rotary embeddings, for
    example, depend on the length only.
    """
    names: dict[Tensor, str] = {b: name for name, b in model.named_buffers()}
    copies = {b: name for half in (halves.client, halves.server) for name, b in half.named_buffers() if b not in names}
    for buffer in {**whole.written, **parts.written}:
        original = buffer if buffer in names else _find_original(buffer, copies.get(buffer, ""), names)
        if original is None:
            raise CutError(
                f"the halves are not {_name(model)}: each writes into its own copy of what is one buffer in the model"
            )
        values = [whole.written.get(original), parts.written.get(buffer)]
        if values[0] is None or values[1] is None or not _has_same_values(values[0], values[1]):
            raise CutError(
                f"the halves are not {_name(model)}: outputs are equal, but a pass leaves something else in the buffer "
                f"{names[original]}"
            )
    if not outputs_match(whole.second_output, parts.second_output):
        raise CutError(
            f"the halves are not {_name(model)}: in a second pass, with the buffers that the first one left, "
            f"{_describe_difference(whole.second_output, parts.second_output)}"
        )


def _sketch(gradient: Tensor) -> tuple[float, float]:
    """A linear projection of a gradient, and its norm. The projections of a tied weight's copies can be added."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    rows = values.reshape(len(values) if values.dim() else 1, -1).sum(1, dtype=torch.float64)
    angles = torch.arange(len(rows), device=rows.device, dtype=torch.float64)
    return float((rows * angles.cos()).sum()), float(torch.linalg.vector_norm(values.float()))


class _FixedSeed(TorchDispatchMode):
    """Mode that seeds the generators before every random operation, so that earlier draws do not matter."""

    def __init__(self, kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.default_generator.manual_seed(0)
            torch.get_device_module(self.kind).manual_seed(0)
        return func(*args, **(kwargs or {}))


@contextmanager
def _isolated_pass(modules: set[nn.Module], inputs: Inputs) -> Iterator[Inputs]:
    """Context manager for one pass: train mode, fixed seed, gradients on. Yields copies of the inputs.

    Restores on exit what `restoring_state` does.
    """
    with restoring_state(modules):
        for module in modules:
            module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
        with torch.inference_mode(False), torch.enable_grad(), _FixedSeed(accelerators(modules)[0]):
            # Inside: tensors made in inference mode cannot take part in autograd.
            yield clone_tensors(inputs)


def _describe_difference(model_output: Tensor, output: Tensor) -> str:
    """How the halves' output differs from the model's, for error messages."""
    a, b = model_output, output
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"their output is {b.dtype} {[*b.shape]}, the model's {a.dtype} {[*a.shape]}"
    return f"outputs differ by up to {float((a.float() - b.float()).abs().max()):.3g}"


def _first_difference(
    model: nn.Module, halves: Any, isolated: Callable[[], AbstractContextManager[Inputs]], parameters: set[Tensor]
) -> str:
    """Describe the first module whose inputs or outputs differ, by running model and halves once more with hooks.

    isolated: the context manager for a pass, which yields its inputs. parameters: those of the model that a half has.
    """
    names = {module: name for name, module in model.named_modules() if name}
    shared = {m for half in (halves.client, halves.server) for m in half.modules() if m in names}
    with isolated() as copies:
        whole = _record_calls(names, lambda: _call_whole(model, copies))
    with isolated() as copies:
        parts = _record_calls(shared, lambda: halves(copies))
    calls: dict[tuple[nn.Module, str], list[Any]] = {}
    for module, kind, fingerprint in parts:
        calls.setdefault((module, kind), []).append(fingerprint)
    for module, kind, fingerprint in whole:
        if module not in shared:
            weights = set(module.parameters())
            if weights and not parameters & weights:
                return f"it begins at {names[module]}, which neither half has"
            continue
        remaining = calls.get((module, kind), [])
        if not remaining:
            return f"it begins at {names[module]}, which does not run in the halves"
        if remaining.pop(0) != fingerprint:
            return f"it begins {'before' if kind == 'inputs' else 'in'} {names[module]}: {kind} differ"
    return "it begins after the last module that both have"


def _record_calls(modules: Iterable[nn.Module], forward: Callable[[], Any]) -> list[tuple[nn.Module, str, Any]]:
    """Run a forward pass, and return (module, "inputs" or "outputs", fingerprint) of every call of these modules."""
    calls: list[tuple[nn.Module, str, Any]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((module, "inputs", _fingerprints((args, kwargs))))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((module, "outputs", _fingerprints(output)))

    with ExitStack() as stack, torch.no_grad():
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        forward()
    return calls


def _fingerprints(values: Any) -> Sequence[Any]:
    """The shape, sum and sum of squares of every tensor in a nested structure."""
    tensors = [v for v in tree_leaves(values) if isinstance(v, Tensor)]
    finite = [torch.nan_to_num(t.double()) for t in tensors]
    return [(*t.shape, float(t.sum()), float(t.square().sum())) for t in finite]
