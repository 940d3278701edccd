"""Forward passes that torch compiles: once for all clients, probes and rounds whose half and inputs are alike.

Weights are inputs of the compiled code, so that neither a move of them nor another client's copy compiles anew. Batches
of another size or length do once; from then on sizes are variables.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from hosfl.halves.inputs import Inputs, call


def check_backend(name: str) -> None:
    """Raises ValueError for what is no backend of torch.compile. Those for debugging are taken, and not told."""
    if name not in torch._dynamo.list_backends(exclude_tags=()):
        usual = ", ".join(torch._dynamo.list_backends())
        raise ValueError(f"compile must be a backend of torch.compile, such as {usual}, got {name!r}")


def call_compiled(backend: str, module: nn.Module, inputs: Inputs) -> Any:
    """`hosfl.halves.inputs.call`, compiled. backend: of torch.compile, by name.

    A value differs by rounding from what `call` gives. Raises ValueError for a module that torch or the backend cannot
    compile, such as where there is no C++ compiler.
    """
    try:
        return _compiled(backend)(module, inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"compile={backend}: cannot compile the client half: {reason}; leave compile out") from error


@cache
def _compiled(backend: str) -> Any:
    return torch.compile(call, backend=backend)
