"""What a half takes: a batch's inputs, whole and in parts; and how it is called where nothing is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]  # one argument, positional arguments, keyword arguments


def call(module: nn.Module, inputs: Inputs) -> Any:
    """module(inputs), module(*inputs) for a tuple, module(**inputs) for a mapping."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def mask_of(inputs: Inputs) -> Tensor | None:
    """The attention mask of a batch, where it has one."""
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no graph, as it was before afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def parts_of(inputs: Inputs, samples: int) -> Iterator[Inputs]:
    """The inputs, so many samples at a time; 0: all together. Samples are the first dimension of every tensor."""
    if not samples:
        yield inputs
        return
    count = next(len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor))
    for at in range(0, count, samples):
        yield tree_map_only(Tensor, itemgetter(slice(at, at + samples)), inputs)


Batch = tuple[Inputs, Tensor]  # inputs, labels
