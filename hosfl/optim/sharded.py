"""Processes that share a model: what of its parameters lies here, where it belongs; what they tell each other.

Noise is a function of an element's index in the whole parameter. A shard over the first dimension is a run of
neighbouring elements, so its first one's index is all that the kernels need to know.
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
    module = sys.modules.get("torch.distributed.tensor")  # who has not imported it, which takes a second, has none
    return module is not None and isinstance(tensor, module.DTensor)


def shard(parameter: Tensor) -> tuple[Tensor, int]:
    """What of a parameter lies here, sharing its memory, and the index of its first element in the whole.

    Raises ValueError for DTensors that are sharded over another dimension than the first, or hold partial sums;
    TypeError for other tensors that are made of tensors, as quantised ones are.
    """
    if not is_sharded(parameter):
        if _is_made_of_tensors(parameter):
            raise TypeError(f"a {type(parameter).__name__}, which cannot move: freeze it")
        return parameter, 0
    parameter = parameter.data  # a DTensor still; `to_local` of what requires grad would record a graph
    with torch.no_grad():
        start = _start(parameter.shape, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        return parameter.to_local(), start  # type: ignore[attr-defined]


def shards(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[int]]:
    """`shard` of each: what lies here, and where it starts."""
    pairs = [shard(p) for p in parameters]
    return [tensor for tensor, _ in pairs], [start for _, start in pairs]


@lru_cache(maxsize=1 << 16)
def _start(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> int:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    # Not isinstance: FSDP over tensor parallelism has a kind of Shard whose pieces are in another order.
    cut = [p for p in placements if type(p) is not Replicate]
    if len(cut) > 1 or any(type(p) is not Shard or p.dim != 0 for p in cut):
        raise ValueError(
            f"{list(shape)}, placed as {placements}: one mesh dimension may shard it, over its first "
            "dimension (what fully_shard does by default), and others replicate it"
        )
    _, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    return offset[0] * math.prod(shape[1:]) if cut else 0


def whole(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """The parameters whole, one at a time, and what quantised ones are made of; every process must ask."""
    for parameter in parameters:
        if is_sharded(parameter):
            yield from whole([parameter.detach().full_tensor()])  # type: ignore[attr-defined]
        elif _is_made_of_tensors(parameter):
            yield from whole(getattr(parameter, name) for name in parameter.__tensor_flatten__()[0])  # type: ignore
        else:
            yield parameter


def _is_made_of_tensors(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def reshard(model: nn.Module | None) -> None:
    """Let go of all that forward passes have gathered. `model.parameters()` are the sharded ones again."""
    for module in _fsdp(model):
        module.reshard()


@contextmanager
def let_go(model: nn.Module | None) -> Iterator[None]:
    """What forward passes in here gather is let go of at the end: the next ones gather the weights as they are then.

    FSDP keeps what it gathered until the backward pass, of the root module always, and there is no backward pass.
    """
    try:
        yield
    except BaseException:
        for module in _fsdp(model):
            # A forward pass that was cut short would keep what it gathered. Modules below the root refuse.
            with suppress(RuntimeError, AttributeError):  # AttributeError: an older torch
                module.reset_iter_state()
        raise
    finally:
        reshard(model)


def _fsdp(model: nn.Module | None) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None or model is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


# --- what processes tell each other ------------------------------------------------------------------------------


def together() -> bool:
    """Whether there may be other processes."""
    return distributed.is_available() and distributed.is_initialized()


def largest(values: list[float], parameters: list[Tensor], processes: distributed.ProcessGroup | None) -> list[float]:
    """The largest values over all processes that share these sharded parameters; where there are none, these values."""
    if not parameters:
        return values
    tensor = torch.tensor(values, dtype=torch.float32, device=parameters[0].device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX, processes)
    found: list[float] = tensor.tolist()
    return found


def averaged(losses: Tensor, device: torch.device, processes: distributed.ProcessGroup | None) -> Tensor:
    """Their mean over all processes."""
    losses = losses.to(device)
    distributed.all_reduce(losses, group=processes)
    losses /= distributed.get_world_size(processes)
    return losses


def common_seed(seed: int, drawn: bool, device: torch.device, processes: distributed.ProcessGroup | None) -> int | None:
    """What all are to take where each has drawn its own; None where all have the same.

    Raises ValueError where one of different seeds was given, not drawn.
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
