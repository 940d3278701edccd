"""What an evaluation finds and leaves beside the weights: the same for all evaluations of a step.

A difference between two losses is to tell what moving the weights does. Dropout, stochastic depth and batches drawn in
the closure would drown that if each evaluation drew other random numbers; and normalisations would take every moved
evaluation into their running statistics as if it were a batch of its own.
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
    """At one moment: of each generator the state; of places which tensor is there, and a copy of what it holds."""

    generators: list[Any]
    buffers: list[tuple[Place, Tensor]]
    copies: list[Tensor]

    def add(self, places: Iterable[Place]) -> None:
        kept = [((m, name), b) for m, name in places if (b := m._buffers.get(name)) is not None]
        copies = [b.clone() for _, b in kept]
        with uninterrupted():  # both or neither
            self.buffers.extend(kept)
            self.copies.extend(copies)


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
    def repeated(self, kinds: Collection[str]) -> Iterator[Evaluations]:
        """For a step, all of it: what evaluates its closure. kinds: of devices.

        After an exception generators and known buffers are as before the step, unless it was kept by then.
        """
        evaluations = Evaluations(self, [*_of_torch(kinds), *self._slow])
        try:
            yield evaluations
        except BaseException:
            evaluations.undo()
            raise
        evaluations.keep()

    def watched(self, closure: Closure, before: _State) -> Any:
        """A step's first evaluation: which modules it calls, or which of their buffers it changes.

        before: the state as it was then; of modules that nobody knew it is completed.
        """
        if self._modules is None:
            modules: dict[nn.Module, None] = {}

            def met(top: nn.Module) -> None:
                new = [m for m in top.modules() if m not in modules]
                modules.update(dict.fromkeys(new))
                before.add(_of_normalisations(new))

            with _calls(met):
                answer = closure()
            self._modules = list(modules)
            return answer
        found = [(place, b, b._version) for m in self._modules for place, b in _buffers(m)]
        answer = closure()
        for (m, name), buffer, version in found:
            if m._buffers.get(name) is not buffer or buffer._version != version:
                self._seen[m, name] = None
        return answer

    def state(self, generators: Collection[_Generator]) -> _State:
        state = _State([g.get() for g in generators], [], [])
        state.add({**self._seen, **_of_normalisations(self._modules or ())})
        return state

    def saw(self, generators: Collection[_Generator], before: _State, after: _State) -> None:
        """Of Python's and numpy's generators only those that the first step drew from are looked at again."""
        if self._slow is SLOW:
            states = zip(generators, before.generators, after.generators, strict=True)
            self._slow = [g for g, a, b in states if g in self._slow and not g.equal(a, b)]


class Evaluations:
    """A step's, each under the conditions of the first: call it with the closure."""

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
        """The step is taken: what its first evaluation left stays, whatever comes."""
        if self._after is not None and not self._kept:
            _put(self._generators, self._after)
            self._conditions.saw(self._generators, self._before, self._after)
        self._kept = True

    def undo(self) -> None:
        """The step is not taken, unless it was kept."""
        if not self._kept:
            _put(self._generators, self._before)


def _of_normalisations(modules: Iterable[nn.Module]) -> dict[Place, None]:
    """The places of what evaluations in train mode write."""
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


# By thread, who is told of what it calls. Of a thread that is inside a module there is no entry.
_watching: dict[int, Callable[[nn.Module], None]] = {}
_changing = threading.Lock()
_original = nn.Module.__call__


def _watch(met: Callable[[nn.Module], None] | None) -> None:
    """From now on this thread's calls are told to `met`, or to nobody.

    While any are told `nn.Module.__call__` is another function. Inside a module torch.compile may look at it.
    """
    global _original
    with uninterrupted(), _changing:
        before = bool(_watching)
        if met is None:
            _watching.pop(threading.get_ident(), None)
        else:
            _watching[threading.get_ident()] = met
        if _watching and not before:
            _original = nn.Module.__call__
            nn.Module.__call__ = _call_watched  # type: ignore[method-assign]
        elif before and not _watching:
            nn.Module.__call__ = _original  # type: ignore[method-assign]


def _call_watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    met = _watching.get(threading.get_ident())
    if met is None:
        return _original(module, *args, **kwargs)
    met(module)
    try:
        _watch(None)
        return _original(module, *args, **kwargs)
    finally:
        _watch(met)


@contextmanager
def _calls(met: Callable[[nn.Module], None]) -> Iterator[None]:
    """`met` is told of the modules that this thread calls in the block before it does, but not of those within others.

    Not by torch's global hooks: torch.compile guards on them, and would compile every model a second time.
    """
    before = _watching.get(threading.get_ident())
    try:
        try:
            _watch(met)
            yield
        finally:
            _watch(before)
    finally:
        _watch(before)  # again: Ctrl-C may have come as the first call began
