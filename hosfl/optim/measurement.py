"""From a closure to derivatives: its losses at moved weights, their differences, and warnings about odd ones."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hosfl.optim.groups import versions
from hosfl.optim.moved import CALLS_BACKWARD, InPlace, ReadOnly
from hosfl.optim.sharded import resharded
from hosfl.optim.terms import Terms
from hosfl.probing.conditions import Closure
from hosfl.probing.displaced import no_autocast_cache

WATCHED_STEPS = 10  # steps whose differences are checked for being all 0


@dataclass(frozen=True)
class Measurement:
    """What a step needs of its evaluations.

    terms: of the directions. derivatives: v_p, by the numbers of the parameters that moved together.
    """

    terms: Terms
    loss: Tensor
    derivatives: dict[tuple[int, ...], list[float]]


def evaluation_points(seeds: Sequence[int], two_sided: bool, moving: bool) -> list[tuple[int, int]]:
    """(seed, sign) of the points th + sign * mu * u(seed) at which a step evaluates the loss; sign 0 is th."""
    if not moving:
        return [(0, 0)]
    if two_sided:
        return [(seed, sign) for seed in seeds for sign in (1, -1)]
    return [(0, 0), *((seed, 1) for seed in seeds)]


def losses_at(
    places: Sequence[tuple[int, int]],
    weights: InPlace | ReadOnly,
    closure: Closure | None,
    evaluate: Callable[[Closure], Any],
    model: nn.Module | None,
) -> tuple[Tensor, bool]:
    """The losses at these points, float64, and whether the closure returned them in half precision.

    evaluate: calls the closure, with the same random numbers every time.
    """
    if not callable(closure):
        raise TypeError("step needs a closure that evaluates the model and returns the loss: step(lambda: loss(...))")
    losses, half_precision = [], False
    for seed, sign in places:
        with weights.at(seed, sign), resharded(model), no_autocast_cache():
            drop_cached_weights()
            before = versions(weights.groups)
            answer = _without_graph(partial(evaluate, closure))
            losses.append(_scalar(answer))
            half_precision = getattr(answer, "dtype", None) in (torch.bfloat16, torch.float16)
            if versions(weights.groups) != before:
                weights.written = True
                raise RuntimeError("the closure writes the weights: it is only to evaluate them")
    return torch.stack(losses), half_precision


def drop_cached_weights() -> None:
    """Clear what torch has computed from weights and kept: the cache of autocast, and that of parametrize.cached()."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _without_graph(evaluate: Closure) -> Any:
    try:
        return evaluate()
    except RuntimeError as error:
        if "does not require grad and does not have a grad_fn" in str(error):  # torch's words
            raise RuntimeError(CALLS_BACKWARD) from error
        raise


def _scalar(loss: Any) -> Tensor:
    """A closure's loss as a float64 scalar, without waiting for its device."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex() or loss.dtype == torch.bool or loss.is_meta:
            raise TypeError(
                f"the closure must return one number, got a tensor {[*loss.shape]} of {loss.dtype} on {loss.device}"
            )
        # Always a copy: a graph's static output would be overwritten by the next evaluation.
        return loss.detach().reshape(()).to(torch.float64, copy=True)
    if isinstance(loss, np.ndarray) and not loss.ndim:
        loss = loss[()]
    if isinstance(loss, bool) or not isinstance(loss, (int, float, np.integer, np.floating)):
        raise TypeError(f"the closure must return the loss, one number, got {type(loss).__name__}")
    return torch.tensor(float(loss), dtype=torch.float64, device="cpu")


def loss_and_differences(losses: Tensor, two_sided: bool, first: bool) -> tuple[Tensor, list[float]]:
    """The loss that a step returns, and d_p. Waits for the device. first: whether it is the first step, for errors."""
    values = losses.cpu()
    if not torch.isfinite(values).all():
        raise FloatingPointError(_unfinite(values.tolist(), two_sided, first))
    if len(values) == 1:  # nothing moves
        return values[0], []
    if two_sided:
        plus, minus = values[0::2], values[1::2]
        return values.mean(), ((plus - minus) / 2).tolist()
    return values[0], (values[1:] - values[0]).tolist()


def _unfinite(losses: list[float], two_sided: bool, first: bool) -> str:
    text = f"the closure returned losses that are infinite or NaN: {losses}"
    bad = [not math.isfinite(loss) for loss in losses]
    if not two_sided and not bad[0]:
        text += ". At the weights themselves the loss is finite, so mu is too large for it"
    elif first:
        text += (
            ". This is the first step: look for NaN in the batch, labels out of range, a mask that leaves nothing "
            "to attend to, the logarithm or a division of 0, or half precision that overflows"
        )
    else:
        text += (
            ". The likely causes are an lr so large that the weights have diverged (lower it), a batch with NaN in "
            "it, half precision that overflows (compute the loss in float32), and a mu that is too large"
        )
    return text


def warn(text: str) -> None:
    """Warn, showing the first line outside of torch and hosfl: the one that called the step."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "hosfl"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def warn_of_unread(names: Sequence[str]) -> None:
    """Warn of weights that move and that the first step's closure did not read from the model. names: theirs."""
    warn(
        f"the closure did not read {names[0]} from `model`{f', nor {len(names) - 1} others' if names[1:] else ''}. A "
        "weight that the loss does not depend on moves at random: freeze it (requires_grad=False). One that the model "
        "reads by another reference, such as one in a list, or by a view, is not seen to move: take it from its module "
        "in every forward pass"
    )


def warn_of_accumulation() -> None:
    """Warn of accelerate's gradient accumulation, which passes on the closure of the last micro-batch alone."""
    module = sys.modules.get("accelerate.state")
    if module is None or not module.GradientState._shared_state:
        return
    count = module.GradientState().num_steps
    if count > 1:
        warn(
            f"accelerate accumulates {count} micro-batches, and calls step(closure) for the last of them only: its "
            "closure must evaluate all of them, and return their mean loss"
        )


class Flatness:
    """Warns, once, if losses of the last steps hardly differ."""

    def __init__(self) -> None:
        self._flat: list[bool] = []  # for each of the last differences, whether it was 0
        self._warned = False

    def update(self, differences: list[float], half_precision: bool) -> None:
        """Take in a step's differences. Flatness is no error: accuracy, for one, is flat nearly everywhere."""
        self._flat = [*self._flat, *(d == 0 for d in differences)][-WATCHED_STEPS * len(differences) :]
        # In half precision many differences are rounded to 0, in float32 hardly any.
        enough = len(self._flat) // 3 if half_precision else len(self._flat)
        if self._warned or len(self._flat) < WATCHED_STEPS * len(differences) or sum(self._flat) < enough:
            return
        self._warned = True
        found = f"of the last {len(self._flat)} differences between losses {sum(self._flat)} were exactly 0"
        if half_precision:
            cause = "the loss is in half precision, which rounds them away"
        else:
            cause = (
                "does the loss depend on the parameters that the optimizer was given, or on another model, on an "
                "output that was kept, or on a parameter that was put in the place of one (module.weight = "
                "nn.Parameter(...))? If it does, it is flat by nature, or computed in half precision"
            )
        warn(f"{found}: {cause}. Compute it in float32, as by loss_of(model(x).float(), y), or raise mu")
