"""A model cut in two: the client half makes the cut tensor, the server half makes the output from it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class SplitModel:
    """Two modules whose composition is the model: output = server(client(x))."""

    client: nn.Module
    server: nn.Module

    def __call__(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.server(self.client(inputs))
        return output


def split(model: nn.Sequential, at: int) -> SplitModel:
    """Cut a sequential model before its layer `at`, 0 < at < len(model). The halves share the model's layers.

    Raises: TypeError for another kind of module, ValueError for a cut that leaves a half empty.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"can cut an nn.Sequential, not {type(model).__name__}; build a SplitModel of two modules")
    if not 0 < at < len(model):
        raise ValueError(f"the cut must be between 1 and {len(model) - 1}, got {at}")
    return SplitModel(model[:at], model[at:])
