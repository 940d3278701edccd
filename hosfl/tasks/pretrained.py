"""What tasks with pretrained models share: their heads, where they are cut, and their loss."""

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
    """A pretrained model under a head, cut in two."""
    return split(pretrained_model(name, head, num_labels=outputs), at)


def cut_place(config: Settings) -> int | str:
    """Where a pretrained model is cut: the third layer by default."""
    at = config.at or "3"
    return int(at) if at.isdecimal() else at


def pretrained_task(
    data: Splits | Dataset | Items,
    classes: int,
    model: Callable[[int | str], SplitModel],
    config: Settings,
    **more: Any,
) -> Task:
    """What tasks with pretrained models share: the place of the cut, the third layer by default, and cross-entropy.

    data: see `Task.of`. model: from the place of the cut; what is random in it comes from the run's seed. more: of
    `Task`.
    """
    return Task.of(
        data,
        classes=classes,
        model=lambda: model(cut_place(config)),
        loss=nn.functional.cross_entropy,
        **more,
    )
