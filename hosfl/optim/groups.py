"""The parameters that a step moves: their numbers and names, groups that move alike, and checks before any moves.

An optimizer numbers its parameters through all of its groups, frozen ones too. Noise, lattices and logs use the number,
error messages the name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hosfl.optim.sharded import is_sharded, reshard, shard
from hosfl.probing.displaced import refuse_writers
from hosfl_kernels import replay_


def number(value: Any, name: str) -> float:
    """A setting as a float. Raises TypeError for what is no number; strings too, which schedulers cannot multiply."""
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


@dataclass(frozen=True)
class Parameters:
    """All parameters of an optimizer, in their groups, and the module that owns them, if it was given."""

    groups: list[dict[str, Any]]
    model: nn.Module | None

    def named(self) -> list[tuple[str | None, Tensor]]:
        """(name, parameter) of all of them, by number; None for names that are not known."""
        known = self._names_in_model()
        named: list[tuple[str | None, Tensor]] = []
        for group in self.groups:
            names = group.get("param_names") or [known.get(p) for p in group["params"]]
            named += [(name and without_prefix(name), p) for name, p in zip(names, group["params"], strict=True)]
        return named

    def name(self, number: int) -> str:
        """How errors call the parameter of this number."""
        places = [(group, at, g) for g, group in enumerate(self.groups) for at in range(len(group["params"]))]
        return self.describe(*places[number])

    def describe(self, group: dict[str, Any], at: int, index: int) -> str:
        """How errors call parameter `at` of a group, which is number `index`: by its name, if that is known."""
        parameter = group["params"][at]
        names = group.get("param_names")
        name = names[at] if names else self._names_in_model().get(parameter)
        if name:
            return f"parameter {without_prefix(name)!r}"
        dtype = str(parameter.dtype).removeprefix("torch.")
        return (
            f"parameter {at} of group {index}, {dtype} {'' if is_lazy(parameter) else list(parameter.shape)}".rstrip()
        )

    def _names_in_model(self) -> dict[Tensor, str]:
        return {p: name for name, p in self.model.named_parameters()} if self.model is not None else {}

    def device(self) -> torch.device:
        """The device of the first parameter that may move. Raises ValueError if there is none."""
        for group in self.groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    return parameter.device
        raise ValueError("no parameter requires grad: there is nothing to move")

    def place(self, number: int, parameter: Tensor) -> tuple[Tensor, int]:
        """`shard` of a parameter. Raises RuntimeError, TypeError, ValueError naming one that cannot move."""
        try:
            if is_lazy(parameter):
                raise RuntimeError("it has no shape yet: evaluate the model once before the first step")
            if parameter.layout != torch.strided:
                raise TypeError(f"{parameter.layout}, where only dense tensors move: freeze it")
            if parameter.is_inference():
                raise RuntimeError("made in inference mode, where writes are not counted: make the model outside of it")
            return shard(parameter)
        except (RuntimeError, TypeError, ValueError) as error:
            raise type(error)(f"{self.name(number)}: {error}") from None


@dataclass(frozen=True)
class Group:
    """Parameters that move alike: those of a parameter group that require grad, or those of them that share a lattice.

    index: of the parameter group. numbers: of the parameters, the streams of their noise. tensors, starts: `shard` of
    each. rate, mu, momentum, weight_decay: copies of the settings, which a closure may change during the step. name:
    number -> how errors call that parameter.
    """

    index: int
    settings: dict[str, Any]
    numbers: list[int]
    parameters: list[Tensor]
    tensors: list[Tensor]
    starts: list[int]
    rate: float
    mu: float
    momentum: float
    weight_decay: float
    name: Callable[[int], str]

    @classmethod
    def of(cls, given: Parameters, index: int, first: int) -> Group:
        """The parameters of group `index` that require grad. first: the number of the group's first parameter."""
        settings = given.groups[index]
        moving = [(n, p) for n, p in enumerate(settings["params"], first) if p.requires_grad]
        places = [given.place(n, p) for n, p in moving]
        return cls(
            index,
            settings,
            [n for n, _ in moving],
            [p for _, p in moving],
            [tensor for tensor, _ in places],
            [start for _, start in places],
            float(settings["lr"]),
            float(settings["mu"]),
            float(settings["momentum"]),
            float(settings["weight_decay"]),
            given.name,
        )

    def versions(self) -> dict[int, tuple[int, int]]:
        """By number, the versions of a parameter and of its local part: either may be the one that is written."""
        pairs = zip(self.parameters, self.tensors, strict=True)
        return {n: (p._version, t._version) for n, (p, t) in zip(self.numbers, pairs, strict=True)}

    def named_tensors(self) -> list[tuple[int, Tensor]]:
        return list(zip(self.numbers, self.tensors, strict=True))

    def part(self, which: Sequence[int]) -> Group:
        """A group of some of these parameters, by position."""
        lists = (self.numbers, self.parameters, self.tensors, self.starts)
        mine: list[list[Any]] = [[values[i] for i in which] for values in lists]
        return replace(self, numbers=mine[0], parameters=mine[1], tensors=mine[2], starts=mine[3])


def versions(groups: Sequence[Group]) -> dict[int, tuple[int, int]]:
    """The versions of all parameters, by number. A write changes them."""
    return {n: version for group in groups for n, version in group.versions().items()}


def sharded_parameters(groups: Sequence[Group]) -> list[Tensor]:
    """The parameters of these groups that are sharded over processes."""
    return [p for group in groups for p, t in zip(group.parameters, group.tensors, strict=True) if p is not t]


def is_exact(groups: Sequence[Group], dist: str) -> bool:
    """Whether moves of these groups can be exact: see `hosfl.optim`."""
    by_lr_alone = all(group.momentum == 0 == group.weight_decay for group in groups)
    return (
        by_lr_alone
        and dist == "rademacher"
        and all(t.dtype == torch.float32 for group in groups for t in group.tensors)
    )


# --- checks ------------------------------------------------------------------------------------------------------


def check_model(given: Parameters) -> None:
    """Raises TypeError and ValueError for a module that cannot read moved weights, or does not own the parameters."""
    if given.model is None:
        return
    refuse_writers(given.model)
    reshard(given.model)
    owned = set(given.model.parameters())
    for number, (_, parameter) in enumerate(given.named()):
        if parameter not in owned:
            raise ValueError(
                f"`model` does not own {given.name(number)} (a sharded module has others while it holds them "
                "gathered: make its optimizer before its first forward pass)"
            )


def check_owned(groups: Sequence[Group], model: nn.Module | None) -> None:
    """Raises RuntimeError if the module no longer owns the parameters that move."""
    if model is None:
        return
    reshard(model)
    owned = set(model.parameters())
    for group in groups:
        for number, parameter in zip(group.numbers, group.parameters, strict=True):
            if parameter not in owned:
                if is_sharded(parameter):
                    raise RuntimeError(
                        "a forward pass of the sharded module was cut short: evaluate it once, then go on"
                    )
                raise RuntimeError(
                    f"`model` no longer owns {group.name(number)}, and its loss does not depend on it: something "
                    "put another parameter in its place. Make the optimizer after that"
                )


def check_sharded(groups: Sequence[Group], model: nn.Module | None, exact: bool) -> None:
    """Raises ValueError for sharded parameters that cannot move."""
    if not sharded_parameters(groups):
        return
    if model is None:
        raise ValueError("sharded parameters: give the optimizer `model`, which must gather them at every move")
    if not exact:
        raise ValueError(
            "sharded parameters move only where moves are exact: float32 (FSDP may still compute in bfloat16), "
            'dist="rademacher", no momentum and no weight_decay'
        )


def check_tensors(groups: Sequence[Group], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Raises what the kernels would for dtypes, devices, strides and shared memory, before anything moves."""
    named = [(group.name, *pair) for group in groups for pair in group.named_tensors()]
    for name, number, tensor in named:
        if tensor.device != named[0][2].device and tensor.device.type != "meta":
            raise RuntimeError(
                f"{name(named[0][1])} is on {named[0][2].device}, {name(number)} on {tensor.device}: "
                "weights that move must be on one device. Load the model without a device_map that spreads it, or "
                "freeze what is elsewhere"
            )
    try:
        replay_([t for _, _, t in named], [], [])
    except (RuntimeError, TypeError, ValueError) as error:
        # Names in place of the kernels' positions in a list.
        text = re.sub(r"tensors\[(\d+)\]", lambda at: named[int(at[1])][0](named[int(at[1])][1]), str(error))
        raise type(error)(text) from None
    for name, number, tensor in named:
        moment = state.get(tensor, {}).get("moment", tensor)
        if (moment.shape, moment.device) != (tensor.shape, tensor.device):
            raise RuntimeError(
                f"{name(number)} is {list(tensor.shape)} on {tensor.device}, its momentum "
                f"{list(moment.shape)} on {moment.device}: make the optimizer after the parameter was changed"
            )


def without_prefix(name: str) -> str:
    """A parameter's name without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")
