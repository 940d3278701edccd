"""Several processes that share a model: a parameter's local part and its place in the whole, and collectives.

Noise is a function of an element's index in the whole parameter. A shard over the first dimension is a range of
consecutive elements, so the kernels only need the index of its first one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # if nobody has imported it, there is none
    return module is not None and isinstance(tensor, module.DTensor)


def shard(parameter: Tensor) -> tuple[Tensor, int]:
    """(the local part of a parameter, sharing its memory; the index of its first element in the whole).

    Raises ValueError for DTensors that are sharded over another dimension than the first, or hold partial sums;
    TypeError for other tensors that are made of tensors, as quantised ones are.
    """
    if not is_sharded(parameter):
        if _is_wrapper(parameter):
            raise TypeError(f"a {type(parameter).__name__}, which cannot move: freeze it")
        return parameter, 0
    parameter = parameter.data  # a DTensor still; `to_local` of what requires grad would record a graph
    with torch.no_grad():
        start = _start(parameter.shape, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        return parameter.to_local(), start  # type: ignore[attr-defined]


def shards(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The local parts of parameters, and the index of the first element of each: see `shard`."""
    pairs = [shard(p) for p in parameters]
    return [tensor for tensor, _ in pairs], [start for _, start in pairs]


@lru_cache(maxsize=1 << 16)
def _start(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> int:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    # Not isinstance: FSDP over tensor parallelism has a subclass of Shard whose pieces are in another order.
    cut = [p for p in placements if type(p) is not Replicate]
    if len(cut) > 1 or any(type(p) is not Shard or p.dim != 0 for p in cut):
        raise ValueError(
            f"{list(shape)}, placed as {placements}: one mesh dimension may shard it, over its first "
            "dimension (what fully_shard does by default), and others replicate it"
        )
    _, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    return offset[0] * math.prod(shape[1:]) if cut else 0


def full_tensors(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each parameter as a plain tensor: sharded ones gathered, one at a time, of quantised ones the inner tensors.

    Every process must call it.
    """
    for parameter in parameters:
        if is_sharded(parameter):
            yield from full_tensors([parameter.detach().full_tensor()])  # type: ignore[attr-defined]
        elif _is_wrapper(parameter):
            inner, _ = parameter.__tensor_flatten__()  # type: ignore[attr-defined]
            yield from full_tensors(getattr(parameter, name) for name in inner)
        else:
            yield parameter


def _is_wrapper(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def reshard(model: nn.Module | None) -> None:
    """Free what FSDP's forward passes have gathered, so that `model.parameters()` are the sharded ones again."""
    for module in _fsdp(model):
        module.reshard()


@contextmanager
def resharded(model: nn.Module | None) -> Iterator[None]:
    """Reshard the model on exit, so that the next forward pass gathers the weights as they are then.

    FSDP keeps what it has gathered until the backward pass, of the root module always, and there is no backward pass.
    """
    try:
        yield
    except BaseException:
        for module in _fsdp(model):
            # An interrupted forward pass would keep what it has gathered. Modules below the root raise.
            with suppress(RuntimeError, AttributeError):  # AttributeError: an older torch
                module.reset_iter_state()
        raise
    finally:
        reshard(model)


def _fsdp(model: nn.Module | None) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None or model is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


# --- collectives -------------------------------------------------------------------------------------------------


def is_distributed() -> bool:
    """Whether torch.distributed is initialised, so that there may be other processes."""
    return distributed.is_available() and distributed.is_initialized()


def max_over_processes(
    values: list[float], parameters: list[Tensor], processes: distributed.ProcessGroup | None
) -> list[float]:
    """Elementwise maxima over all processes that share these sharded parameters; the same values if there are none."""
    if not parameters:
        return values
    tensor = torch.tensor(values, dtype=torch.float32, device=parameters[0].device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX, processes)
    found: list[float] = tensor.tolist()
    return found


def averaged(losses: Tensor, device: torch.device, processes: distributed.ProcessGroup | None) -> Tensor:
    """The mean of each loss over all processes."""
    losses = losses.to(device)
    distributed.all_reduce(losses, group=processes)
    losses /= distributed.get_world_size(processes)
    return losses


def common_seed(seed: int, drawn: bool, device: torch.device, processes: distributed.ProcessGroup | None) -> int | None:
    """The seed for all processes where each has drawn its own; None where all have the same.

    Raises ValueError where seeds differ and one of them was given, not drawn.
    """
    halves = [seed >> 32, seed & 0xFFFFFFFF]
    numbers = [*halves, *(-half for half in halves), int(not drawn)]
    tensor = torch.tensor(numbers, device=device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX, processes)
    high, low, *smallest, given = tensor.tolist()
    if [high, low] == [-half for half in smallest]:
        return None
    if given:
        raise ValueError(f"processes have different seeds, this one {seed}: give all of them the same")
    return high << 32 | low
