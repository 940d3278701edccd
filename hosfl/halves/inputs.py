"""Calling a half with its inputs, splitting a batch into microbatches, and passes without side effects."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]  # one argument, positional arguments, keyword arguments


def call(module: nn.Module, inputs: Inputs) -> Any:
    """Call module(inputs), module(*inputs) for a tuple, or module(**inputs) for a mapping."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def describe_inputs(inputs: Inputs) -> str:
    """The inputs' dtypes and shapes, for error messages: "uint8 [2, 3, 32, 32]", with names if they have any."""
    named = inputs.items() if isinstance(inputs, Mapping) else [("", x) for x in tree_leaves(inputs)]
    tensors = [(f"{name} ".lstrip(), x) for name, x in named if isinstance(x, Tensor)]
    return ", ".join(f"{name}{str(x.dtype).removeprefix('torch.')} {[*x.shape]}" for name, x in tensors)


def clone_tensors(values: Any) -> Any:
    """Copy a nested structure, with every tensor cloned."""
    return tree_map_only(Tensor, torch.clone, values)


def outputs_match(a: Tensor, b: Tensor) -> bool:
    """Whether the outputs of two passes are equal.

    On the CPU to the bit, NaN included; on a GPU, where sums may change their order, within a few units in the last
    place.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rounding = 0.0 if a.device.type == "cpu" else 16 * torch.finfo(a.dtype).eps * float(a.abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=rounding, equal_nan=True)


def mask_of(inputs: Inputs) -> Tensor | None:
    """The attention mask among the inputs, or None."""
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager: eval mode without gradients; restores the mode of every submodule on exit."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def restoring_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager: undo on exit whatever forward passes change.

    That is attributes, modes, the contents of buffers, and the random generators of torch, numpy and Python.

    Raises TypeError for scripted modules, whose attributes are not Python's.
    """
    modules = list(modules)
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        raise TypeError("a scripted module's state cannot be restored: use the module that it was scripted from")
    attributes = [(own, dict(own)) for m in modules for own in (vars(m), m._parameters, m._buffers)]
    buffers = [b for m in modules for b in m._buffers.values() if b is not None]
    saved = [(b, b._version, b.clone()) for b in buffers if not (b.is_meta or b.is_inference())]
    kind, numbers = accelerators(modules)
    state = generator_states()
    try:
        with torch.random.fork_rng(numbers, device_type=kind):
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        for own, before in attributes:
            own.clear()
            own.update(before)
        with torch.no_grad():
            for buffer, version, values in saved:
                # A write through .data does not change the version; sparse tensors cannot be compared.
                if buffer._version != version or (buffer.layout == torch.strided and not torch.equal(buffer, values)):
                    buffer.copy_(values)


def generator_states() -> tuple[Any, Any]:
    """The states of Python's and numpy's global random generators, in a form that can be compared."""
    kind, words, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (kind, [*words], *rest)


def accelerators(modules: Iterable[nn.Module]) -> tuple[str, list[int]]:
    """Return (type, indices) of the accelerators that modules have parameters on.

    The indices are empty, and the type is "cuda", if all parameters are on the CPU.
    """
    devices = {p.device for m in modules for p in m._parameters.values() if p is not None}
    others = [device for device in devices if device.type not in ("cpu", "meta")]
    return (others[0].type if others else "cuda"), sorted(device.index or 0 for device in others)


def microbatches(inputs: Inputs, samples: int) -> Iterator[Inputs]:
    """Yield the inputs in parts of `samples` samples, by every tensor's first dimension; 0: all at once."""
    if not samples:
        yield inputs
        return
    count = next(len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor))
    for begin in range(0, count, samples):
        yield tree_map_only(Tensor, itemgetter(slice(begin, begin + samples)), inputs)


def check_samples_independent(half: nn.Module) -> None:
    """Raise ValueError if the samples of a batch affect each other in eval mode, so that it cannot be split."""
    for name, module in half.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name or 'the half'} is a {type(module).__name__} without running statistics, so that samples of a"
                " batch affect each other in eval mode too: leave out microbatch, or make it with"
                " track_running_stats=True"
            )


Batch = tuple[Inputs, Tensor]  # (inputs, labels)
