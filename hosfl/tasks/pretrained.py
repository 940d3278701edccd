"""What tasks with pretrained models share: where they are cut, and their optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hosfl.halves.families import pretrained_model
from hosfl.halves.split import SplitModel, split
from hosfl.settings import Settings
from hosfl.tasks.data import Splits
from hosfl.tasks.task import Task


def headed(name: str, head: str, at: int | str, outputs: int) -> SplitModel:
    """A pretrained model under a head, cut in two."""
    return split(pretrained_model(name, head, num_labels=outputs), at)


def pretrained_task(splits: Splits, classes: int, model: Callable[[int | str], SplitModel], config: Settings) -> Task:
    """What tasks with pretrained models share: the place of the cut, the third layer by default, and the optimizer.

    model: from the place of the cut; what is random in it comes from the run's seed.
    """
    at = config.at or "3"

    def seeded(seed: int) -> SplitModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            return model(int(at) if at.isdecimal() else at)

    return Task(
        splits=splits,
        classes=classes,
        model=seeded,
        loss=nn.functional.cross_entropy,
        optimizer=lambda half, decay: torch.optim.AdamW(half.parameters(), betas=(0.9, 0.99), weight_decay=decay),
        tuned={},
    )
