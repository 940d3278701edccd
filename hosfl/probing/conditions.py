"""What an evaluation finds and leaves beside the weights: the same for all evaluations of a step.

A difference between two losses is to tell what moving the weights does. Dropout, stochastic depth and batches drawn in
the closure would drown that if each evaluation drew other random numbers; and normalisations would take every moved
evaluation into their running statistics as if it were a batch of its own.
"""

from __future__ import annotations

import random
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


class _State(NamedTuple):
    """At one moment: of each generator the state, and buffers with a copy of each."""

    generators: list[Any]
    buffers: list[Tensor]
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
    the step after the one in which they were seen to change. A replayed CUDA graph calls no module.
    """

    def __init__(self) -> None:
        self._slow: Collection[_Generator] = SLOW
        self._modules: list[nn.Module] | None = None  # None: no evaluation was seen
        self._seen: list[Tensor] = []  # buffers that an evaluation changed

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
            states = zip(generators, before.generators, after.generators, strict=True)
            self._slow = [g for g, a, b in states if g in self._slow and not g.equal(a, b)]

    def _watched(self, closure: Closure) -> Any:
        """A step's first evaluation: which modules it calls, or which of their buffers it changes."""
        if self._modules is None:
            with _calls() as called:
                answer = closure()
            self._modules = list({module: None for top in called for module in top.modules()})
            return answer
        versions = [(b, b._version) for m in self._modules for b in _buffers(m)]
        answer = closure()
        moved = [b for b, version in versions if b._version != version and not any(b is s for s in self._seen)]
        self._seen += moved
        return answer

    def _state(self, generators: Collection[_Generator]) -> _State:
        buffers = {id(b): b for b in self._seen}
        for m in self._modules or ():
            if isinstance(m, _NormBase) and m.training:
                buffers |= {id(b): b for b in _buffers(m)}
        kept = list(buffers.values())
        return _State([g.get() for g in generators], kept, [b.clone() for b in kept])


def _buffers(module: nn.Module) -> list[Tensor]:
    return [b for b in module._buffers.values() if b is not None and not b.is_inference()]


def _put(generators: Collection[_Generator], state: _State) -> None:
    for generator, value in zip(generators, state.generators, strict=True):
        generator.put(value)
    if state.buffers:
        torch._foreach_copy_(state.buffers, state.copies)


def _of_torch(kinds: Collection[str]) -> list[_Generator]:
    found = [_Generator(torch.get_rng_state, torch.set_rng_state, torch.equal)]
    for kind in sorted({*kinds} - {"cpu"}):
        module = torch.get_device_module(kind)
        for index in range(module.device_count()):
            get, put = (partial(change, device=index) for change in (module.get_rng_state, module.set_rng_state))
            found.append(_Generator(get, put, torch.equal))
    return found


@contextmanager
def _calls() -> Iterator[list[nn.Module]]:
    """The modules that are called in the block, but for those called within others.

    Not by torch's global hooks: torch.compile guards on them, and would compile every model a second time.
    """
    called: list[nn.Module] = []
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(module)
        nn.Module.__call__ = original  # type: ignore[method-assign]
        try:
            return original(module, *args, **kwargs)
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield called
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
