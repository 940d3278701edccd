"""numpy arrays and torch tensors, seen alike: what the checks and the C++ need to know of either.

Nothing here imports torch, unless for a tensor, whose owner has done so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    Array = NDArray[Any] | Tensor

DTYPES = ("float32", "bfloat16", "float16")
Layouts = list[tuple[int, int, Any, bool]]  # see `layouts`


def is_numpy(x: object) -> TypeGuard[NDArray[Any]]:
    return isinstance(x, np.ndarray)


def may_be_tensor(x: object) -> bool:
    """Whether x is a tensor, or may be one: tensors.py, which needs torch, knows.

    By an attribute that is no method: those torch.compile of torch 2.8 does not see.
    """
    return not is_numpy(x) and hasattr(x, "requires_grad")


def tensors_module() -> Any:
    """The module for tensors. Its import registers the ops with torch."""
    import hosfl_kernels.tensors as tensors  # in half the time that `from hosfl_kernels import tensors` takes

    return tensors


@cache
def dtype_name(dtype: Any) -> str | None:
    """Which of DTYPES a dtype of numpy or torch is, or None. numpy's uint16 holds the bits of bfloat16.

    numpy has no bfloat16 of its own; that of the package ml_dtypes has the same bits.
    """
    name = str(dtype)  # ">f4" for other machines' order of bytes
    name = "bfloat16" if name == "uint16" else name.removeprefix("torch.")
    return name if name in DTYPES else None


def addresses(xs: Sequence[Any]) -> list[int]:
    return [x.ctypes.data for x in xs] if xs and is_numpy(xs[0]) else [x.data_ptr() for x in xs]


def sizes(xs: Sequence[Any]) -> list[int]:
    """Numbers of elements."""
    return [x.size for x in xs] if xs and is_numpy(xs[0]) else [x.numel() for x in xs]


def are_row_major(xs: Sequence[Any]) -> list[bool]:
    """Whether each is contiguous in C order; an array of numpy aligned as well."""
    return (
        [x.flags.c_contiguous and x.flags.aligned for x in xs]
        if xs and is_numpy(xs[0])
        else [x.is_contiguous() for x in xs]
    )


def layouts(xs: Sequence[Any]) -> Layouts:
    """Of each: its address, the one behind it, its device, and what `are_row_major` says."""
    if xs and is_numpy(xs[0]):
        return [(at := x.ctypes.data, at + x.nbytes, "cpu", x.flags.c_contiguous and x.flags.aligned) for x in xs]
    return [(at := x.data_ptr(), at + x.nbytes, x.device, x.is_contiguous()) for x in xs]


def facts(xs: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that the checks read of a list of tensors, to remember it by. None where one is not in C order; for arrays.

    Each fact of all tensors by one map, which calls C for each: a loop that reads them takes three times as long.
    """
    if not xs or is_numpy(xs[0]):
        return None
    kind = tensors_module().Tensor
    if not all(map(kind.is_contiguous, xs)):
        return None
    numbers = (tuple(map(read, xs)) for read in (kind.data_ptr, kind.numel, kind.get_device))
    return *numbers, tuple(map(attrgetter("dtype"), xs))


def is_channels_last(x: Any) -> bool:
    if is_numpy(x):
        return False
    import torch

    formats = (torch.channels_last, torch.channels_last_3d)
    return any(x.is_contiguous(memory_format=f) for f in formats)


def wrong_kind(x: Any, name: str) -> TypeError:
    """The error for what is no array or tensor, or not of the kind of those beside it."""
    if is_numpy(x) or may_be_tensor(x):
        kind, others = ("numpy array", "torch.Tensors") if is_numpy(x) else ("torch.Tensor", "numpy arrays")
        return TypeError(f"{name} is a {kind} among {others}: pass one kind in a call")
    return TypeError(f"{name} is {type(x).__name__}, not a numpy array or a torch.Tensor")


def to_numpy(x: Any) -> NDArray[Any]:
    """The same numbers, of an array or of a tensor on the CPU. A view."""
    return x if is_numpy(x) else x.detach().numpy()


def storage(x: Any) -> NDArray[Any]:
    """An array's memory, or that of a tensor on the CPU, as spec.py sees it: flat, bfloat16 as uint16. A view."""
    if dtype_name(x.dtype) != "bfloat16":
        return to_numpy(x).reshape(-1)
    if not is_numpy(x):
        import torch

        x = x.view(torch.int16)
    return to_numpy(x).reshape(-1).view(np.uint16)


def largest(x: NDArray[np.float32]) -> float:
    """The largest absolute value, 0 of nothing; NaN if there is one."""
    return float(np.maximum(x.max(), -x.min())) if x.size else 0.0


def snap_(x: NDArray[np.float32], step: float) -> None:
    """spec.snap, in place."""
    np.divide(x, np.float32(step), out=x)
    np.rint(x, out=x)
    np.multiply(x, np.float32(step), out=x)
    np.add(x, np.float32(0), out=x)
