"""Forward mode: directional derivatives of a module with respect to its weights, without a step and its error.

Every perturbed weight is read as a dual number th + eps * u with eps^2 = 0. The coefficient of eps in the output is
then J u, up to the rounding of one forward pass. The noise kernel makes u when a layer reads the weight, and it is
freed when the layer has run: that takes the memory of one layer's weights, and of every activation twice. Weights are
only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hosfl.halves.inputs import Inputs, call
from hosfl.probing.displaced import Displacement, displaced, no_autocast_cache, refuse_writers


class Tangents(Displacement):
    """Makes the dual number of th_t and factor_t * z(seed, stream_t) for a parameter t when it is read."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        streams: Sequence[int],
        seed: int,
        dist: str = "rademacher",
        factors: Sequence[float] | None = None,
    ) -> None:
        super().__init__(parameters, streams, seed, 1.0, dist, factors)

    def _make(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        tangents = [_zeros(p, p.shape) for p in parameters]
        self._perturb(tangents, parameters)
        pairs = zip(parameters, tangents, strict=True)
        return [forward_ad.make_dual(p.detach(), tangent.to(p.dtype)) for p, tangent in pairs]

    def lookup(self, table: Tensor, indices: Tensor) -> Tensor:
        tangents = _zeros(table, (*indices.shape, table.shape[1]))
        self._perturb_rows(tangents, table, indices)
        return forward_ad.make_dual(torch.embedding(table.detach(), indices), tangents.to(table.dtype))

    def table(self, parameter: Tensor) -> Tensor:
        return DualTable.of(parameter, self)


def _zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros into which the kernels write a direction; float32 for float64 weights."""
    dtype = torch.float32 if like.dtype == torch.float64 else like.dtype
    return torch.zeros(shape, dtype=dtype, device=like.device)


class DualTable(Tensor):
    """An embedding's weight as dual numbers. A lookup makes only the rows that it needs."""

    parameter: Tensor
    tangents: Tangents

    @staticmethod
    def of(parameter: Tensor, tangents: Tangents) -> DualTable:
        """The table in place of an nn.Embedding's weight."""
        table: DualTable = parameter.detach().as_subclass(DualTable)
        table.parameter, table.tangents = parameter, tangents
        return table

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.embedding and isinstance(table := args[1], DualTable):
            return table.tangents.lookup(table.parameter, args[0])
        if getattr(function, "__name__", "") == "__get__":  # attributes such as dtype and shape, which need no values
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        return function(*map(_whole, args), **{name: _whole(value) for name, value in kwargs.items()})


def _whole(value: Any) -> Any:
    """Replace a DualTable by the whole table; return any other value as it is."""
    return value.tangents.whole(value.parameter) if isinstance(value, DualTable) else value


@contextmanager
def differentiable() -> Iterator[None]:
    """Context manager: replace fused attention, which has no forward-mode derivative, by matrix products and a softmax.

    Raises ValueError for an operation in the block that has none either.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except NotImplementedError as error:
        raise ValueError(
            "an operation of the client half has no forward-mode derivative: choose another estimator than forward."
            f" torch says: {str(error).partition(chr(10))[0]}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
@no_autocast_cache()
def derivative(module: nn.Module, inputs: Inputs, tangents: Tangents) -> Tensor:
    """Compute J u, the derivative of the module's output along one direction, in the output's shape and dtype.

    inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Raises: TypeError and ValueError as `evaluate_displaced`; ValueError for an operation without a forward-mode
    derivative, such as an extension's, or torch's grouped matrix product of experts: use differences there, or call
    `set_experts_implementation("eager")` on transformers' model.
    """
    refuse_writers(module)
    with forward_ad.dual_level(), differentiable(), displaced(module, tangents):
        output = call(module, inputs)
        tangent = forward_ad.unpack_dual(output).tangent
        return torch.zeros_like(output) if tangent is None else tangent.detach().clone()
