"""Compare a model with the two halves that it was cut into, by one forward and one backward pass of each.

Both run in train mode, so that dropout and the like take part, and every random operation starts from the same seed:
then the halves' outputs equal the model's to the bit. Batch normalisations stay in eval mode. A pass must leave the
same values in buffers; if it writes any, a second forward pass starts from them. Everything that a pass changes,
attributes, buffers, gradients, modes and random generators, is restored before the next pass, which gets its own copy
of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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

    halves: `client` and `server`, whose parameters are the model's or equal to the model's. inputs: a few samples.
    On the CPU outputs must be equal to the bit, elsewhere within a few units in the last place; gradients within the
    square root of a unit. Costs two forward and two backward passes; a gradient is gone once it has been looked at.
    Where the model writes into buffers, these must have the same numbers afterwards, and two more forward passes begin
    with them.

    Raises CutError, which names where the difference begins, and for a cut or an output that is not one tensor;
    ExampleError for an example that the model does not take.
    """
    owned = original_parameters(model, halves)
    modules = {*model.modules(), *halves.client.modules(), *halves.server.modules()}
    undisturbed = partial(_isolated_pass, modules, inputs)
    try:
        with undisturbed() as own:
            whole = _PassRecord.of(lambda: output_tensor(_call_whole(model, own)), model.parameters(), modules)
    except CutError:
        raise
    except Exception as error:
        why = str(error) or type(error).__name__  # an assert often says nothing
        raise ExampleError(f"{_name(model)} does not take the example, {describe_inputs(inputs)}: {why}") from error
    if not torch.isfinite(whole.output).all():
        raise ExampleError(f"{_name(model)} makes infinite or NaN outputs of the example")
    try:
        with undisturbed() as own:
            parts = _PassRecord.of(lambda: halves(own), owned, modules)
    except (CutError, ValueError):
        raise
    except Exception as error:
        raise CutError(f"the halves of {_name(model)} do not run: {type(error).__name__}: {error}") from error
    if not outputs_match(whole.output, parts.output):
        where = _first_difference(model, halves, undisturbed, set(owned.values()))
        raise CutError(
            f"the halves are not {_name(model)}: {_describe_difference(whole.output, parts.output)}; {where}"
        )
    _compare_buffers(model, halves, whole, parts)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    summed: dict[Tensor, float] = {}
    for parameter, (sketch, _) in parts.gradients.items():
        summed[owned[parameter]] = summed.get(owned[parameter], 0.0) + sketch
    longest = max((norm for _, norm in whole.gradients.values()), default=0.0)
    for parameter in {**whole.gradients, **summed}:
        sketch, norm = whole.gradients.get(parameter, (0.0, 0.0))
        allowed = torch.finfo(parameter.dtype).eps ** 0.5 * (norm + 1e-4 * longest)
        if not abs(sketch - summed.get(parameter, 0.0)) <= allowed:
            raise CutError(
                f"the halves are not {_name(model)}: their outputs are, but the gradient of {names[parameter]} is "
                f"{'another one' if parameter in summed else 'lost'}"
            )


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _call_whole(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model as the halves are called: a transformer returns a mapping, and caches no keys and values.

    Those that it keeps lie elsewhere in memory than those that it does not, and on some processors attention sums them
    in another order.
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
    """Map each parameter of the halves to the model's: itself, or the one that a tied weight is a copy of."""
    mine: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found: dict[Tensor, Tensor] = {}
    for side, half in (("client", halves.client), ("server", halves.server)):
        for name, parameter in half.named_parameters():
            if parameter in mine:
                found[parameter] = parameter
                continue
            original = _equal_tensor(parameter, name, mine)
            if original is None:
                raise CutError(f"the halves are not {_name(model)}: it has no parameter like the {side} half's {name}")
            found[parameter] = original
    return found


def _equal_tensor(copy: Tensor, name: str, mine: dict[Tensor, str]) -> Tensor | None:
    """Of these that which a half's copy, by its name there, is equal to; None where there is none. Of several, such as
    new normalisations, the one whose name ends alike."""
    like = [t for t in mine if t.shape == copy.shape and t.dtype == copy.dtype and torch.equal(t, copy)]
    return max(like, key=lambda t: _common_suffix(mine[t], name), default=None)


def _common_suffix(name: str, other: str) -> int:
    """The number of equal dotted parts at the end of two names."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass
class _PassRecord:
    """An output, and of every parameter's gradient a linear sketch and the length.

    written: what was left in the buffers that were written. again: the output of a second pass, where there are any.
    """

    output: Tensor
    gradients: dict[Tensor, tuple[float, float]]
    written: dict[Tensor, Tensor]
    again: Tensor

    @classmethod
    def of(cls, forward: Callable[[], Tensor], parameters: Any, modules: set[nn.Module]) -> _PassRecord:
        written = _BufferMonitor(modules)
        found = cls(torch.empty(0), {}, {}, torch.empty(0))
        moving = [p for p in parameters if p.requires_grad]
        kept = [p.grad for p in moving]

        def look(parameter: Tensor) -> None:
            assert parameter.grad is not None
            found.gradients[parameter] = _sketch(parameter.grad)
            parameter.grad = None

        with ExitStack() as stack:
            for parameter, gradient in zip(moving, kept, strict=True):
                parameter.grad = None
                stack.callback(setattr, parameter, "grad", gradient)
                stack.callback(parameter.register_post_accumulate_grad_hook(look).remove)
            output = forward()
            if not isinstance(output, Tensor):
                raise CutError(f"a half must make one tensor, it makes a {type(output).__name__}")
            found.output = output.detach().clone()
            if output.requires_grad:
                weights = torch.arange(output.numel(), device=output.device, dtype=torch.float32).cos()
                (output.float().flatten() * weights).sum().backward()
        found.written = written.now()
        if found.written:
            with torch.no_grad():
                found.again = forward().clone()
        return found


class _BufferMonitor:
    """Detects which buffers of modules are written after its construction. Keys are the buffers' original tensors."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        held = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
        self.held = [(own, name, b, None if b.is_inference() else b._version, b.clone()) for own, name, b in held]

    def now(self) -> dict[Tensor, Tensor]:
        found = {}
        for own, name, buffer, version, before in self.held:
            value = own.get(name)
            if value is not buffer or (version != buffer._version if version is not None else False):
                found[buffer] = torch.empty(0) if value is None else value.clone()
            elif not _same_values(buffer, before):  # what is written through .data counts no version
                found[buffer] = buffer.clone()
        return found


def _same_values(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided or not a.is_floating_point():
        return a.layout != torch.strided or (a.dtype == b.dtype and torch.equal(a, b))
    return outputs_match(a, b)


def _compare_buffers(model: nn.Module, halves: Any, whole: _PassRecord, parts: _PassRecord) -> None:
    """A buffer that both halves write may be two: those of rotary embeddings, which follow from the length, are."""
    names: dict[Tensor, str] = {b: name for name, b in model.named_buffers()}
    copies = {b: name for half in (halves.client, halves.server) for name, b in half.named_buffers() if b not in names}
    for buffer in {**whole.written, **parts.written}:
        own = buffer if buffer in names else _equal_tensor(buffer, copies.get(buffer, ""), names)
        if own is None:
            raise CutError(f"the halves are not {_name(model)}: each writes into a buffer of its own that is one there")
        left = [whole.written.get(own), parts.written.get(buffer)]
        if left[0] is None or left[1] is None or not _same_values(left[0], left[1]):
            raise CutError(
                f"the halves are not {_name(model)}: their outputs are, but a pass leaves something else in the buffer "
                f"{names[own]}"
            )
    if not outputs_match(whole.again, parts.again):
        raise CutError(
            f"the halves are not {_name(model)}: in a second pass, with the buffers that the first one left, "
            f"{_describe_difference(whole.again, parts.again)}"
        )


def _sketch(gradient: Tensor) -> tuple[float, float]:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    rows = values.reshape(len(values) if values.dim() else 1, -1).sum(1, dtype=torch.float64)
    angles = torch.arange(len(rows), device=rows.device, dtype=torch.float64)
    return float((rows * angles.cos()).sum()), float(torch.linalg.vector_norm(values.float()))


class _FixedSeed(TorchDispatchMode):
    """Seeds the generators anew before every random operation, so that earlier draws do not matter."""

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
    """Context manager for one pass: train mode, fixed seed, gradients; yields cloned inputs, restores all on exit."""
    with restoring_state(modules):
        for module in modules:
            module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
        with torch.inference_mode(False), torch.enable_grad(), _FixedSeed(accelerators(modules)[0]):
            # In here: what was made in inference mode can have no gradient behind it.
            yield clone_tensors(inputs)


def _describe_difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"their output is {b.dtype} {[*b.shape]}, the model's {a.dtype} {[*a.shape]}"
    return f"outputs differ by up to {float((a.float() - b.float()).abs().max()):.3g}"


def _first_difference(
    model: nn.Module, halves: Any, undisturbed: Callable[[], AbstractContextManager[Inputs]], held: set[Tensor]
) -> str:
    """Describe the first module whose inputs or outputs differ, by running model and halves once more with hooks.

    undisturbed: what either pass runs in, with its inputs. held: the model's parameters that the halves have.
    """
    names = {module: name for name, module in model.named_modules() if name}
    shared = {m for half in (halves.client, halves.server) for m in half.modules() if m in names}
    with undisturbed() as own:
        whole = _record_calls(names, lambda: _call_whole(model, own))
    with undisturbed() as own:
        parts = _record_calls(shared, lambda: halves(own))
    calls: dict[tuple[nn.Module, str], list[Any]] = {}
    for module, what, seen in parts:
        calls.setdefault((module, what), []).append(seen)
    for module, what, seen in whole:
        if module not in shared:
            weights = set(module.parameters())
            if weights and not held & weights:
                return f"it begins at {names[module]}, which neither half has"
            continue
        later = calls.get((module, what), [])
        if not later:
            return f"it begins at {names[module]}, which does not run in the halves"
        if later.pop(0) != seen:
            return f"it begins {'before' if what == 'inputs' else 'in'} {names[module]}: {what} differ"
    return "it begins behind the last module that both have"


def _record_calls(modules: Any, forward: Callable[[], Any]) -> list[tuple[nn.Module, str, Any]]:
    """(module, "inputs" or "outputs", fingerprint) of every call of these modules, in order."""
    seen: list[tuple[nn.Module, str, Any]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((module, "inputs", _fingerprints((args, kwargs))))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((module, "outputs", _fingerprints(output)))

    with ExitStack() as stack, torch.no_grad():
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        forward()
    return seen


def _fingerprints(values: Any) -> Sequence[Any]:
    tensors = [v for v in tree_leaves(values) if isinstance(v, Tensor)]
    finite = [torch.nan_to_num(t.double()) for t in tensors]
    return [(*t.shape, float(t.sum()), float(t.square().sum())) for t in finite]
