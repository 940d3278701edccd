"""Forward passes compiled by torch.compile, once for all clients, probes and rounds with the same half and shapes.

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
    """Raise ValueError for an unknown backend of torch.compile. The message does not list debugging backends."""
    if name not in torch._dynamo.list_backends(exclude_tags=()):
        suggested = ", ".join(torch._dynamo.list_backends())
        raise ValueError(f"compile must be a backend of torch.compile, such as {suggested}, got {name!r}")


def call_compiled(backend: str, module: nn.Module, inputs: Inputs) -> Any:
    """Do what `hosfl.halves.inputs.call` does, compiled. backend: a backend of torch.compile, by name.

    The output differs from that of `call` by rounding. Raises ValueError if torch or the backend cannot compile the
    module, for example because there is no C++ compiler.
    """
    try:
        return _compiled(backend)(module, inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"compile={backend}: cannot compile the client half: {reason}; leave compile out") from error


@cache
def _compiled(backend: str) -> Any:
    """`call`, compiled."""
    return torch.compile(call, backend=backend)
