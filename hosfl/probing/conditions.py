"""What an evaluation finds and leaves beside the weights: the same for all evaluations of a step.

A difference between two losses is to tell what moving the weights does. Dropout, stochastic depth and batches drawn in
the closure would drown that if each evaluation drew other random numbers; and normalisations would take every moved
evaluation into their running statistics as if it were a batch of its own.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Closure = Callable[[], Any]


class _Generator(NamedTuple):
    get: Callable[[], Any]
    put: Callable[[Any], Any]
    equal: Callable[[Any, Any], bool]


Place = tuple[nn.Module, str]  # a buffer's module, and its name there


class _State(NamedTuple):
    """At one moment: of each generator the state; of places which tensor is there, and a copy of what it holds."""

    generators: list[Any]
    buffers: list[tuple[Place, Tensor]]
    copies: list[Tensor]


# Getting their states takes longer than evaluating a small model.
SLOW = (
    _Generator(random.getstate, random.setstate, lambda a, b: a == b),
    _Generator(np.random.get_state, np.random.set_state, lambda a, b: a[2:] == b[2:] and np.array_equal(a[1], b[1])),
)


class Conditions:
    """Makes a step's evaluations alike in all but the weights, and leaves behind what the first of them leaves.

    Random numbers: of torch's generators, for the CPU and all devices of the weights' kinds; of Python's and numpy's
    global ones if the first evaluation of all draws from them. Not of a `torch.Generator` of the closure's own.
    Buffers of the modules that the first evaluation of all calls: of normalisations in train mode, and of others from
    the step after the one in which they were seen to change, in place or by another tensor. A replayed CUDA graph calls
    no module, and what is written by `.data` is not seen.
    """

    def __init__(self) -> None:
        self._slow: Collection[_Generator] = SLOW
        self._modules: list[nn.Module] | None = None  # None: no evaluation was seen
        self._seen: dict[Place, None] = {}  # where an evaluation changed a buffer

    @contextmanager
    def repeated(self, kinds: Collection[str]) -> Iterator[Callable[[Closure], Any]]:
        """For a step: what evaluates its closure, each time under the conditions of the first. kinds: of devices.

        After an exception generators and known buffers are as before the step.
        """
        generators = [*_of_torch(kinds), *self._slow]
        before = self._state(generators)
        after: _State | None = None

        def evaluate(closure: Closure) -> Any:
            nonlocal after
            if after is not None:
                _put(generators, before)
                return closure()
            answer = self._watched(closure)
            after = self._state(generators)
            return answer

        try:
            yield evaluate
        except BaseException:
            _put(generators, before)
            raise
        if after is not None:
            _put(generators, after)
            if self._slow is SLOW:
                states = zip(generators, before.generators, after.generators, strict=True)
                self._slow = [g for g, a, b in states if g in self._slow and not g.equal(a, b)]

    def _watched(self, closure: Closure) -> Any:
        """A step's first evaluation: which modules it calls, or which of their buffers it changes."""
        if self._modules is None:
            with _calls() as called:
                answer = closure()
            self._modules = list({module: None for top in called for module in top.modules()})
            return answer
        before = [(place, b, b._version) for m in self._modules for place, b in _buffers(m)]
        answer = closure()
        for (m, name), buffer, version in before:
            if m._buffers.get(name) is not buffer or buffer._version != version:
                self._seen[m, name] = None
        return answer

    def _state(self, generators: Collection[_Generator]) -> _State:
        places = dict(self._seen)
        for m in self._modules or ():
            if isinstance(m, _NormBase) and m.training:
                places |= dict.fromkeys(place for place, _ in _buffers(m))
        kept = [((m, name), b) for m, name in places if (b := m._buffers.get(name)) is not None]
        return _State([g.get() for g in generators], kept, [b.clone() for _, b in kept])


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


# By thread, what it has called since it began to watch. Of a thread that is inside a module there is no entry.
_watching: dict[int, list[nn.Module]] = {}
_changing = threading.Lock()
_outside = 0  # threads that watch, and are inside no module
_original = nn.Module.__call__


def _count_outside(change: int) -> None:
    """While there are any `nn.Module.__call__` is another function. Inside a module torch.compile may look at it."""
    global _outside, _original
    with _changing:
        if not _outside:
            _original = nn.Module.__call__
            nn.Module.__call__ = _call_watched  # type: ignore[method-assign]
        _outside += change
        if not _outside:
            nn.Module.__call__ = _original  # type: ignore[method-assign]


def _call_watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    called = _watching.pop(threading.get_ident(), None)
    if called is None:
        return _original(module, *args, **kwargs)
    called.append(module)
    _count_outside(-1)
    try:
        return _original(module, *args, **kwargs)
    finally:
        _count_outside(+1)
        _watching[threading.get_ident()] = called


@contextmanager
def _calls() -> Iterator[list[nn.Module]]:
    """The modules that this thread calls in the block, but for those called within others.

    Not by torch's global hooks: torch.compile guards on them, and would compile every model a second time.
    """
    thread, called = threading.get_ident(), list[nn.Module]()
    before = _watching.get(thread)
    _count_outside(+1)
    _watching[thread] = called
    try:
        yield called
    finally:
        _watching.pop(thread, None)
        _count_outside(-1)
        if before is not None:
            _watching[thread] = before
