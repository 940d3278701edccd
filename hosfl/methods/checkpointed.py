"""First-order split learning for clients with less memory: activations are made twice.

What travels, and every gradient, is that of `first_order`; what a client keeps for backpropagation is less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from hosfl.halves.inputs import Batch, Inputs
from hosfl.methods.client import Client
from hosfl.methods.first_order import FirstOrder, FirstOrderClient
from hosfl.methods.method import Way


@dataclass
class CheckpointedClient(FirstOrderClient):
    """First-order split learning whose backward pass makes the activations again: the same gradients, less memory."""

    def _gradient(self, multiplier: Tensor) -> Tensor:
        self._count(forward=1)  # what backpropagation runs again; of a Sequential all but its last part
        return super()._gradient(multiplier)

    def _forward_with_graph(self, inputs: Inputs) -> Tensor:
        with recomputing(self.half):
            return super()._forward_with_graph(inputs)


@contextmanager
def recomputing(half: nn.Module) -> Iterator[None]:
    """Forward passes in the block keep for backpropagation the inputs of parts only; the rest is made when needed.

    Parts are the items of an nn.ModuleList, such as a transformer's layers, and of an nn.Sequential of n layers about
    the square root of n runs of neighbours, the last of which is kept as usual (Chen et al., arXiv 1604.06174). A
    module without either is left as it is. The half must have no dropout in force: random numbers are not kept.
    """
    before: list[tuple[nn.Module, dict[str, Any]]] = []

    def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
        before.append((module, {name: module.__dict__[name] for name in ("forward",) if name in module.__dict__}))
        module.__dict__["forward"] = forward

    def visit(module: nn.Module) -> None:
        if isinstance(module, nn.Sequential) and len(module):
            parts = math.ceil(len(module) ** 0.5)
            run = partial(checkpoint_sequential, module, parts, use_reentrant=False, preserve_rng_state=False)
            patch(module, run)
            return
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                run = partial(checkpoint, child.forward, use_reentrant=False, preserve_rng_state=False)
                patch(child, run)
            else:
                visit(child)

    try:
        visit(half)
        yield
    finally:
        for module, held in before:
            del module.__dict__["forward"]
            module.__dict__.update(held)


class Checkpointed(FirstOrder):
    """The gradients of "first-order", and its rates, in less memory and more time."""

    ways: ClassVar[dict[str, Way]] = {}

    def client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        return CheckpointedClient(number, half, batch, passes=self.setup.passes, microbatch=self.settings.microbatch)
