"""First-order split learning for clients with less memory: activations are computed twice.

Messages and gradients are those of `first_order`; a client keeps fewer activations for backpropagation.
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
    """First-order split learning with activation checkpointing: the same gradients in less memory."""

    def _gradient(self, multiplier: Tensor) -> Tensor:
        self._count(forward=1)  # the recomputation; of a Sequential all but its last part
        return super()._gradient(multiplier)

    def _forward_with_graph(self, inputs: Inputs) -> Tensor:
        with recomputing(self.half):
            return super()._forward_with_graph(inputs)


@contextmanager
def recomputing(half: nn.Module) -> Iterator[None]:
    """Within the block, forward passes keep only the inputs of parts for backpropagation, which recomputes the rest.

    Parts are the items of an nn.ModuleList, such as a transformer's layers, and about the square root of n runs of
    consecutive layers of an nn.Sequential of n layers, the last of which is kept as usual (Chen et al., arXiv
    1604.06174). A module without either is left as it is. Dropout must be off, since random numbers are not kept.
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
        for module, saved in before:
            del module.__dict__["forward"]
            module.__dict__.update(saved)


class Checkpointed(FirstOrder):
    """The gradients and the tuned rates of "first-order", in less memory and more time."""

    ways: ClassVar[dict[str, Way]] = {}

    def client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        return CheckpointedClient(number, half, batch, passes=self.setup.passes, microbatch=self.settings.microbatch)
