"""The states of servers and optimizers as tensors and JSON, without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class SnapshotError(ValueError):
    """A snapshot cannot be written, read or applied; nothing was changed."""


def check_tensor(name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise SnapshotError(f"{name!r} cannot be a tensor's name")
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise SnapshotError(f"{name} is a {type(tensor).__name__}; only plain tensors can be stored")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.is_meta:
        raise SnapshotError(f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; that cannot be stored")


def prefixed(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with "name." before their names, for several owners in one file."""
    return {f"{name}.{key}": value for key, value in tensors.items()}


def part(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `prefixed` has named so, by their own names again."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's `state_dict()` without pickle: tensors by flat names such as "state.3.exp_avg", the rest as JSON.

    The tensors are the optimizer's own, not copies: save them before its next step. Stored are tensors, None, booleans,
    integers, floats, strings, and lists, tuples and dicts of them. Raises SnapshotError that names what is none of
    these.
    """
    tensors: dict[str, Tensor] = {}
    state = _pack(optimizer.state_dict(), "", tensors)
    return tensors, {"optimizer": type(optimizer).__name__, "parameters": _shapes(optimizer), "state": state}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Give an optimizer the state of the one that was packed: it goes on with the same bits. The tensors are copied.

    The optimizer must be of the same class, over parameters of the same shapes and dtypes in the same groups. Names in
    `tensors` that info does not mention are left alone. Raises SnapshotError; the optimizer is then as it was.
    """
    name, shapes = type(optimizer).__name__, _shapes(optimizer)
    if info.get("optimizer") != name:
        raise SnapshotError(f"the state is of {info.get('optimizer')}, the optimizer is {name}")
    if info.get("parameters") != shapes:
        raise SnapshotError(f"the state is for parameters {info.get('parameters')}, the optimizer has {shapes}")
    state = _unpack(info.get("state"), tensors)
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise SnapshotError("there is no state_dict in info")
    try:
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"the state does not fit {name}: {error!r}") from error
    _restore_dtypes(optimizer, state)


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Shape and dtype of every parameter, by group."""
    return [[f"{list(p.shape)} {p.dtype}" for p in group["params"]] for group in optimizer.param_groups]


def _restore_dtypes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Undo casts of `load_state_dict` to the parameter's dtype, which round float32 state of bfloat16 weights."""
    numbers = chain.from_iterable(group["params"] for group in state["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, saved in state["state"].get(number, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(saved, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != saved.dtype:
                optimizer.state[parameter][key] = saved.to(loaded.device)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree: {"tensor": name}, {"tuple": [...]}, {"dict": [[key, value], ...]}, {"float": "nan"}."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if name in tensors:
            raise SnapshotError(f"two tensors have the name {name}")
        tensors[name] = value.detach()
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if type(value) in (list, tuple):
        items = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(type(key) in (int, str) for key in value):
        prefix = f"{name}." if name else ""
        return {"dict": [[key, _pack(item, f"{prefix}{key}", tensors)] for key, item in value.items()]}
    raise SnapshotError(f"{name} is {type(value).__name__} {value!r:.100}, which cannot be stored")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tensor": str(name)} if name in tensors:
            return tensors[name].clone()
        case {"tensor": name}:
            raise SnapshotError(f"the tensor {name!r} is missing")
        case {"float": "nan" | "inf" | "-inf" as number}:
            return float(number)
        case {"tuple": list(items)}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"dict": list(items)} if all(isinstance(item, list) and len(item) == 2 for item in items):
            return {key: _unpack(item, tensors) for key, item in items}
    raise SnapshotError(f"{value!r:.100} is no packed value")
