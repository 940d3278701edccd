"""Compiled forward passes: compiled once for all clients, probes and rounds with the same half and shapes.

Weights are inputs of the compiled code, so that neither moving them nor another client's copy compiles again. A batch
of another size or length compiles once more; from then on sizes are variables.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from hosfl.halves.inputs import Inputs, call


def check_backend(name: str) -> None:
    """Raises ValueError for what is no backend of torch.compile. Debugging backends work, but are not suggested."""
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
