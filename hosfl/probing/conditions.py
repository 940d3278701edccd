"""Give all evaluations of a step the same random numbers and buffers.

The difference of two losses should show only the effect of moving the weights. If each evaluation drew other random
numbers, in dropout, in stochastic depth or for a batch in the closure, these would hide it. And normalisations would
update their running statistics in every evaluation, as if each were another batch.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hosfl.interrupts import uninterrupted

Closure = Callable[[], Any]


class _Generator(NamedTuple):
    """A random generator: functions that get its state, set it, and compare two states."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    is_equal: Callable[[Any, Any], bool]


BufferKey = tuple[nn.Module, str]  # a buffer's module, and its name there


class _Snapshot(NamedTuple):
    """The state of each generator; buffers by key, and copies of their values."""

    generators: list[Any]
    buffers: list[tuple[BufferKey, Tensor]]
    copies: list[Tensor]

    def add(self, keys: Iterable[BufferKey]) -> None:
        """Add the buffers with these keys."""
        buffers = [((m, name), b) for m, name in keys if (b := m._buffers.get(name)) is not None]
        copies = [b.clone() for _, b in buffers]
        with uninterrupted():  # both or neither
            self.buffers.extend(buffers)
            self.copies.extend(copies)


# Python's and numpy's global generators. Getting their states may take longer than evaluating a small model.
GLOBAL_GENERATORS = (
    _Generator(random.getstate, random.setstate, lambda a, b: a == b),
    _Generator(np.random.get_state, np.random.set_state, lambda a, b: a[2:] == b[2:] and np.array_equal(a[1], b[1])),
)


class Conditions:
    """Makes a step's evaluations differ in the weights alone; afterwards everything is as the first one left it.

    Random numbers are repeated from torch's generators, for the CPU and all devices of the weights' types, and from
    Python's and numpy's global ones if the run's first evaluation draws from them. A `torch.Generator` of the closure's
    own is not repeated.

    Buffers are restored of the modules that the run's first evaluation calls: those of normalisations in train mode,
    and others from the step after the one in which they were seen to change, in place or by assignment. A replayed CUDA
    graph calls no module, and writes by `.data` are not seen.
    """

    def __init__(self) -> None:
        self._globals: Collection[_Generator] = GLOBAL_GENERATORS
        self._modules: list[nn.Module] | None = None  # those that evaluations call; None before the first one
        self._changed: dict[BufferKey, None] = {}  # buffers that an evaluation has changed

    @contextmanager
    def repeated(self, device_types: Collection[str]) -> Iterator[Evaluations]:
        """Context manager for one step: yields the object that evaluates its closure. device_types: such as "cuda".

        After an exception, generators and known buffers are as before the step, unless `keep` was called.
        """
        evaluations = Evaluations(self, [*_torch_generators(device_types), *self._globals])
        try:
            yield evaluations
        except BaseException:
            evaluations.undo()
            raise
        evaluations.keep()

    def evaluate_first(self, closure: Closure, before: _Snapshot) -> Any:
        """Run a step's first evaluation, and note the modules that it calls, or which of their buffers it changes.

        before: the snapshot of the step's start, to which the buffers of newly called modules are added.
        """
        if self._modules is None:
            modules: dict[nn.Module, None] = {}

            def on_call(top: nn.Module) -> None:
                new = [m for m in top.modules() if m not in modules]
                modules.update(dict.fromkeys(new))
                before.add(_norm_buffers(new))

            with _on_module_calls(on_call):
                result = closure()
            self._modules = list(modules)
            return result
        buffers = [(key, b, b._version) for m in self._modules for key, b in _buffers(m)]
        result = closure()
        for (m, name), buffer, version in buffers:
            if m._buffers.get(name) is not buffer or buffer._version != version:
                self._changed[m, name] = None
        return result

    def snapshot(self, generators: Collection[_Generator]) -> _Snapshot:
        """Take a snapshot of the generators and of all known buffers."""
        snapshot = _Snapshot([g.get() for g in generators], [], [])
        snapshot.add({**self._changed, **_norm_buffers(self._modules or ())})
        return snapshot

    def drop_unused_generators(self, generators: Collection[_Generator], before: _Snapshot, after: _Snapshot) -> None:
        """After the first step, drop those of Python's and numpy's generators that it has not drawn from."""
        if self._globals is GLOBAL_GENERATORS:
            states = zip(generators, before.generators, after.generators, strict=True)
            self._globals = [g for g, a, b in states if g in self._globals and not g.is_equal(a, b)]


class Evaluations:
    """Evaluates a step's closure when called with it, each time under the conditions of the first evaluation."""

    def __init__(self, conditions: Conditions, generators: Collection[_Generator]) -> None:
        self._conditions, self._generators = conditions, generators
        self._before = conditions.snapshot(generators)
        self._after: _Snapshot | None = None
        self._kept = False

    def __call__(self, closure: Closure) -> Any:
        if self._after is not None:
            _restore(self._generators, self._before)
            return closure()
        result = self._conditions.evaluate_first(closure, self._before)
        self._after = self._conditions.snapshot(self._generators)
        return result

    def keep(self) -> None:
        """End a step that was made: leave generators and buffers as its first evaluation left them."""
        if self._after is not None and not self._kept:
            _restore(self._generators, self._after)
            self._conditions.drop_unused_generators(self._generators, self._before, self._after)
        self._kept = True

    def undo(self) -> None:
        """End a step that failed: restore generators and buffers, unless `keep` was called."""
        if not self._kept:
            _restore(self._generators, self._before)


def _norm_buffers(modules: Iterable[nn.Module]) -> dict[BufferKey, None]:
    """The keys of the buffers of normalisations in train mode, which every evaluation writes."""
    norms = (m for m in modules if isinstance(m, _NormBase) and m.training)
    return {key: None for m in norms for key, _ in _buffers(m)}


def _buffers(module: nn.Module) -> list[tuple[BufferKey, Tensor]]:
    """A module's own buffers and their keys."""
    return [((module, n), b) for n, b in module._buffers.items() if b is not None and not b.is_inference()]


def _restore(generators: Collection[_Generator], snapshot: _Snapshot) -> None:
    """Restore the states of generators and buffers from a snapshot of the same generators."""
    for generator, value in zip(generators, snapshot.generators, strict=True):
        generator.set(value)
    for (module, name), buffer in snapshot.buffers:
        if module._buffers.get(name) is not buffer:
            module._buffers[name] = buffer
    if snapshot.buffers:
        torch._foreach_copy_([buffer for _, buffer in snapshot.buffers], snapshot.copies)


def _torch_generators(device_types: Collection[str]) -> list[_Generator]:
    """torch's default generators: the CPU's, and those of all devices of these types."""
    generators = [_Generator(torch.get_rng_state, torch.set_rng_state, torch.equal)]
    for device_type in sorted({*device_types} - {"cpu"}):
        module = torch.get_device_module(device_type)
        for index in range(module.device_count()):
            get, set_ = (partial(function, device=index) for function in (module.get_rng_state, module.set_rng_state))
            generators.append(_Generator(get, set_, torch.equal))
    return generators


# For each thread, the callback for the modules that it calls; none while it is inside such a module.
_callbacks: dict[int, Callable[[nn.Module], None]] = {}
_lock = threading.Lock()
_original_call = nn.Module.__call__


def _set_callback(on_call: Callable[[nn.Module], None] | None) -> None:
    """Set or remove this thread's callback for calls of modules.

    `nn.Module.__call__` is replaced only while a thread has a callback, and not inside a module, where torch.compile
    may look at it.
    """
    global _original_call
    with uninterrupted(), _lock:
        before = bool(_callbacks)
        if on_call is None:
            _callbacks.pop(threading.get_ident(), None)
        else:
            _callbacks[threading.get_ident()] = on_call
        if _callbacks and not before:
            _original_call = nn.Module.__call__
            nn.Module.__call__ = _call_with_callback  # type: ignore[method-assign]
        elif before and not _callbacks:
            nn.Module.__call__ = _original_call  # type: ignore[method-assign]


def _call_with_callback(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of `nn.Module.__call__` while a thread has a callback."""
    on_call = _callbacks.get(threading.get_ident())
    if on_call is None:
        return _original_call(module, *args, **kwargs)
    on_call(module)
    try:
        _set_callback(None)
        return _original_call(module, *args, **kwargs)
    finally:
        _set_callback(on_call)


@contextmanager
def _on_module_calls(on_call: Callable[[nn.Module], None]) -> Iterator[None]:
    """Context manager: call `on_call` before each module that this thread calls, but not for modules inside another.

    Not by torch's global hooks: torch.compile guards on them, and would compile every model a second time.
    """
    before = _callbacks.get(threading.get_ident())
    try:
        try:
            _set_callback(on_call)
            yield
        finally:
            _set_callback(before)
    finally:
        _set_callback(before)  # again: Ctrl-C may have come as the first call began
