"""What a state_dict has beside torch's, and the checks of one before anything is loaded."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hosfl.optim.groups import Parameters, without_prefix
from hosfl.optim.terms import LARGEST_STEP, check_terms, zeros
from hosfl.protocol.header import check_choice, check_integer, check_keys, check_quantum


def run_state(
    optimizer: str, kept: Mapping[str, Any], parameters: Sequence[Tensor], quanta: Mapping[int, float]
) -> dict[str, Any]:
    """The run's part of a state: the optimizer's class and attributes; of each parameter its shape and quantum."""
    return {
        "optimizer": optimizer,
        **kept,
        "shapes": [list(p.shape) for p in parameters],
        "quanta": [quanta.get(n) for n in range(len(parameters))],
    }


@dataclass(frozen=True)
class Saved:
    """A state that was checked. run: as `run_state`, but quanta by number. groups: torch's part, without the run."""

    run: dict[str, Any]
    groups: list[dict[str, Any]]
    moments: dict[Tensor, Tensor]


def read_state(
    state_dict: Mapping[str, Any],
    optimizer: str,
    kept: Sequence[str],
    settable: Sequence[str],
    check_settings: Callable[[dict[str, Any]], None],
    given: Parameters,
) -> Saved:
    """Check a state_dict. Raises ValueError for one of another class of optimizer, or of other parameters."""
    named = given.named()
    try:
        groups = _checked_groups(state_dict)
        run = groups[0].pop("run", None) if groups else None
        run = _checked_run(state_dict.get("run") if run is None else run, optimizer, kept, len(named))
        for group in groups:
            absent = [name for name in settable if name not in group]
            if absent:
                raise ValueError(f"its groups have no {', '.join(absent)}")
            check_settings(group)
        saved = [_checked_moment(state_dict["state"], i) for group in groups for i in group["params"]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"this is no state of a {optimizer}: {error}") from None
    _check_order(given, groups)
    _check_shapes(given, run["shapes"], saved)
    # torch's copies have the parameters' dtypes; moments are float32.
    pairs = zip(named, saved, strict=False)  # torch counts them
    return Saved(run, groups, {p: zeros(p).copy_(state["moment"]) for (_, p), state in pairs if state})


def _checked_groups(state_dict: Any) -> list[dict[str, Any]]:
    """Copies of a state's groups. Raises ValueError for what has not the form of torch's states."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("it has no `state` and `param_groups`")
    groups = state_dict["param_groups"]
    if not isinstance(groups, Sequence) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"its param_groups must be a list of groups, not {reprlib.repr(groups)}")
    if not isinstance(state_dict["state"], Mapping) or not all(isinstance(g.get("params"), list) for g in groups):
        raise ValueError("its state must be a mapping, and its groups have lists of params")
    return [dict(group) for group in groups]


def _checked_moment(states: Mapping[Any, Any], parameter: Any) -> dict[str, Any]:
    """A parameter's state: {"moment": tensor}, or empty. Raises ValueError."""
    state = states.get(parameter) or {}
    if state and not (isinstance(state, Mapping) and [*state] == ["moment"] and isinstance(state["moment"], Tensor)):
        raise ValueError(f"of a parameter it must keep a moment alone, not {reprlib.repr(state)}")
    if state and not torch.isfinite(state["moment"]).all():
        raise ValueError("it has a moment that is infinite or NaN")
    return dict(state)


def _checked_run(run: Any, optimizer: str, kept: Sequence[str], parameters: int) -> dict[str, Any]:
    """The run's part of a state, with quanta by parameter number. Raises ValueError."""
    if not isinstance(run, dict):
        raise ValueError("its first group has no `run` (nor has it with flatten_optimizer_state_dict)")
    # Earlier versions had it beside the groups, without class and shapes, and with quanta as a dict.
    run = {"optimizer": optimizer, "shapes": None, **run}
    check_keys(run, ("optimizer", *kept, "shapes", "quanta"), "its run")
    check_choice(run["optimizer"], "the class", (optimizer,))
    if not isinstance(run["two_sided"], bool):
        raise ValueError(f"two_sided must be true or false, not {run['two_sided']!r}")
    run |= {**asdict(check_terms(run)), "steps": check_integer(run["steps"], "steps", 0, LARGEST_STEP)}
    quanta, last = run["quanta"], parameters - 1
    for name, kinds in (("shapes", (list, type(None))), ("quanta", (list, dict))):
        if not isinstance(run[name], kinds):
            raise ValueError(f"{name} must be a list, not {reprlib.repr(run[name])}")
    run["quanta"] = {}
    for number, quantum in quanta.items() if isinstance(quanta, dict) else enumerate(quanta):
        if quantum is not None:
            n = check_integer(number, "the number of a parameter", 0, last)
            run["quanta"][n] = check_quantum(quantum, f"the quantum of parameter {n}")
    return run


def _check_order(given: Parameters, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for the same names in another order. Other names are no error, as in torch's optimizers."""
    own = [name for name, _ in given.named() if name]
    names = [name for group in groups for name in group.get("param_names") or ()]
    saved = [without_prefix(name) for name in names if isinstance(name, str)]
    if saved != own and Counter(saved) == Counter(own):
        number = next(n for n, (a, b) in enumerate(zip(saved, own, strict=True)) if a != b)
        raise ValueError(
            f"this is no state of these parameters, but of them in another order: number {number} is {own[number]!r} "
            f"here, and {saved[number]!r} in it. Noise and momentum belong to the numbers"
        )


def _check_shapes(given: Parameters, shapes: list[list[int]] | None, saved: list[dict[str, Any]]) -> None:
    """Raises ValueError for other shapes of parameters, if known, or of their moments."""
    own = [list(p.shape) for _, p in given.named()]
    for number, (shape, found, state) in enumerate(zip(own, shapes or own, saved, strict=False)):
        what = ""
        if found != shape:
            what = f"{given.name(number)} is {found}"
        elif state and list(state["moment"].shape) != shape:
            what = f"the momentum of {given.name(number)} is {list(state['moment'].shape)}"
        if what:
            raise ValueError(f"this is no state of these parameters: {what} in it")
