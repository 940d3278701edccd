"""What a half takes: a batch's inputs, whole and in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]  # one argument, positional arguments, keyword arguments


def call(module: nn.Module, inputs: Inputs) -> Any:
    """module(inputs), module(*inputs) for a tuple, module(**inputs) for a mapping."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def parts_of(inputs: Inputs, samples: int) -> Iterator[Inputs]:
    """The inputs, so many samples at a time; 0: all together. Samples are the first dimension of every tensor."""
    if not samples:
        yield inputs
        return
    count = next(len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor))
    for at in range(0, count, samples):
        yield tree_map_only(Tensor, itemgetter(slice(at, at + samples)), inputs)


Batch = tuple[Inputs, Tensor]  # inputs, labels
