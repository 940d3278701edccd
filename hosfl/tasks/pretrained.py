"""Shared code of the tasks with pretrained models: the model's head, the place of the cut, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hosfl.halves.hub import pretrained_model
from hosfl.halves.split import SplitModel, split
from hosfl.settings import Settings
from hosfl.tasks.data import Dataset, Splits
from hosfl.tasks.items import Items
from hosfl.tasks.task import Task


def split_pretrained(name: str, head: str, at: int | str, outputs: int) -> SplitModel:
    """Load a pretrained model with a head of `outputs` outputs, and split it."""
    return split(pretrained_model(name, head, num_labels=outputs), at)


def cut_place(config: Settings) -> int | str:
    """Return the place where a pretrained model is cut: the third layer by default."""
    at = config.at or "3"
    return int(at) if at.isdecimal() else at


def pretrained_task(
    data: Splits | Dataset | Items,
    classes: int,
    model: Callable[[int | str], SplitModel],
    config: Settings,
    **arguments: Any,
) -> Task:
    """Make a task with a pretrained model, trained with cross-entropy.

    data: see `Task.of`. model: makes the halves for a place of the cut, under the run's seed. arguments: of `Task`.
    """
    return Task.of(
        data,
        classes=classes,
        model=lambda: model(cut_place(config)),
        loss=nn.functional.cross_entropy,
        **arguments,
    )
