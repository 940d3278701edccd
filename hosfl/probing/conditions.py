"""Gives all evaluations of a step the same random numbers and buffers.

The difference of two losses should show the effect of moving the weights alone. Dropout, stochastic depth and batches
drawn in the closure would hide it if each evaluation drew other random numbers; and normalisations would take every
evaluation into their running statistics as if it were another batch.
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
    get: Callable[[], Any]
    put: Callable[[Any], Any]
    equal: Callable[[Any, Any], bool]


Place = tuple[nn.Module, str]  # a buffer's module, and its name there


class _State(NamedTuple):
    """A snapshot: the state of each generator; buffers by place, and copies of their values."""

    generators: list[Any]
    buffers: list[tuple[Place, Tensor]]
    copies: list[Tensor]

    def add(self, places: Iterable[Place]) -> None:
        """Add the buffers at these places."""
        found = [((m, name), b) for m, name in places if (b := m._buffers.get(name)) is not None]
        copies = [b.clone() for _, b in found]
        with uninterrupted():  # both or neither
            self.buffers.extend(found)
            self.copies.extend(copies)


# Generators whose states take longer to get than a small model to evaluate.
SLOW = (
    _Generator(random.getstate, random.setstate, lambda a, b: a == b),
    _Generator(np.random.get_state, np.random.set_state, lambda a, b: a[2:] == b[2:] and np.array_equal(a[1], b[1])),
)


class Conditions:
    """Makes a step's evaluations differ in the weights alone; afterwards everything is as the first one left it.

    Repeated are the random numbers of torch's generators, for the CPU and all devices of the weights' types, and of
    Python's and numpy's global ones if the run's first evaluation draws from them; not those of a `torch.Generator`
    that the closure has. Restored are buffers of the modules that the run's first evaluation calls: those of
    normalisations in train mode, and others from the step after the one in which they were seen to change, in place or
    by another tensor. A replayed CUDA graph calls no module, and writes by `.data` are not seen.
    """

    def __init__(self) -> None:
        self._slow: Collection[_Generator] = SLOW
        self._modules: list[nn.Module] | None = None  # those that evaluations call; None before the first one
        self._changed: dict[Place, None] = {}  # buffers that an evaluation has changed

    @contextmanager
    def repeated(self, kinds: Collection[str]) -> Iterator[Evaluations]:
        """A context for one step: yields what evaluates its closure. kinds: types of devices, such as "cuda".

        After an exception, generators and known buffers are as before the step, unless `keep` was called.
        """
        evaluations = Evaluations(self, [*_of_torch(kinds), *self._slow])
        try:
            yield evaluations
        except BaseException:
            evaluations.undo()
            raise
        evaluations.keep()

    def watched(self, closure: Closure, before: _State) -> Any:
        """A step's first evaluation, which shows the modules that it calls, or which of their buffers it changes.

        before: the snapshot of the step's start; buffers of modules that are called for the first time are added.
        """
        if self._modules is None:
            modules: dict[nn.Module, None] = {}

            def on_call(top: nn.Module) -> None:
                new = [m for m in top.modules() if m not in modules]
                modules.update(dict.fromkeys(new))
                before.add(_of_normalisations(new))

            with _calls(on_call):
                answer = closure()
            self._modules = list(modules)
            return answer
        found = [(place, b, b._version) for m in self._modules for place, b in _buffers(m)]
        answer = closure()
        for (m, name), buffer, version in found:
            if m._buffers.get(name) is not buffer or buffer._version != version:
                self._changed[m, name] = None
        return answer

    def state(self, generators: Collection[_Generator]) -> _State:
        """A snapshot of the generators and of all known buffers."""
        state = _State([g.get() for g in generators], [], [])
        state.add({**self._changed, **_of_normalisations(self._modules or ())})
        return state

    def update_generators(self, generators: Collection[_Generator], before: _State, after: _State) -> None:
        """After the first step, drop those of Python's and numpy's generators that it has not drawn from."""
        if self._slow is SLOW:
            states = zip(generators, before.generators, after.generators, strict=True)
            self._slow = [g for g, a, b in states if g in self._slow and not g.equal(a, b)]


class Evaluations:
    """Evaluates a step's closure when called with it, each time under the conditions of the first evaluation."""

    def __init__(self, conditions: Conditions, generators: Collection[_Generator]) -> None:
        self._conditions, self._generators = conditions, generators
        self._before = conditions.state(generators)
        self._after: _State | None = None
        self._kept = False

    def __call__(self, closure: Closure) -> Any:
        if self._after is not None:
            _put(self._generators, self._before)
            return closure()
        answer = self._conditions.watched(closure, self._before)
        self._after = self._conditions.state(self._generators)
        return answer

    def keep(self) -> None:
        """The step is made: leave generators and buffers as its first evaluation left them."""
        if self._after is not None and not self._kept:
            _put(self._generators, self._after)
            self._conditions.update_generators(self._generators, self._before, self._after)
        self._kept = True

    def undo(self) -> None:
        """The step has failed: restore generators and buffers, unless `keep` was called."""
        if not self._kept:
            _put(self._generators, self._before)


def _of_normalisations(modules: Iterable[nn.Module]) -> dict[Place, None]:
    """The buffers of normalisations in train mode, which evaluations write."""
    norms = (m for m in modules if isinstance(m, _NormBase) and m.training)
    return {place: None for m in norms for place, _ in _buffers(m)}


def _buffers(module: nn.Module) -> list[tuple[Place, Tensor]]:
    return [((module, n), b) for n, b in module._buffers.items() if b is not None and not b.is_inference()]


def _put(generators: Collection[_Generator], state: _State) -> None:
    for generator, value in zip(generators, state.generators, strict=True):
        generator.put(value)
    for (module, name), buffer in state.buffers:
        if module._buffers.get(name) is not buffer:
            module._buffers[name] = buffer
    if state.buffers:
        torch._foreach_copy_([buffer for _, buffer in state.buffers], state.copies)


def _of_torch(kinds: Collection[str]) -> list[_Generator]:
    found = [_Generator(torch.get_rng_state, torch.set_rng_state, torch.equal)]
    for kind in sorted({*kinds} - {"cpu"}):
        module = torch.get_device_module(kind)
        for index in range(module.device_count()):
            get, put = (partial(change, device=index) for change in (module.get_rng_state, module.set_rng_state))
            found.append(_Generator(get, put, torch.equal))
    return found


# By thread, the callback for the modules that it calls. Inside a module a thread has none.
_watching: dict[int, Callable[[nn.Module], None]] = {}
_changing = threading.Lock()
_original = nn.Module.__call__


def _watch(on_call: Callable[[nn.Module], None] | None) -> None:
    """Set or remove this thread's callback for calls of modules.

    `nn.Module.__call__` is replaced only while a thread has one, and not inside a module, where torch.compile may look
    at it.
    """
    global _original
    with uninterrupted(), _changing:
        before = bool(_watching)
        if on_call is None:
            _watching.pop(threading.get_ident(), None)
        else:
            _watching[threading.get_ident()] = on_call
        if _watching and not before:
            _original = nn.Module.__call__
            nn.Module.__call__ = _call_watched  # type: ignore[method-assign]
        elif before and not _watching:
            nn.Module.__call__ = _original  # type: ignore[method-assign]


def _call_watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    on_call = _watching.get(threading.get_ident())
    if on_call is None:
        return _original(module, *args, **kwargs)
    on_call(module)
    try:
        _watch(None)
        return _original(module, *args, **kwargs)
    finally:
        _watch(on_call)


@contextmanager
def _calls(on_call: Callable[[nn.Module], None]) -> Iterator[None]:
    """Within the block, `on_call` is called before each module that this thread calls, but not for modules inside one.

    Not by torch's global hooks: torch.compile guards on them, and would compile every model a second time.
    """
    before = _watching.get(threading.get_ident())
    try:
        try:
            _watch(on_call)
            yield
        finally:
            _watch(before)
    finally:
        _watch(before)  # again: Ctrl-C may have come as the first call began
