"""Tasks: data, a model cut in two, and the rates that tuning chose for each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hosfl.halves.split import SplitModel
from hosfl.settings import Rates, Settings
from hosfl.tasks.data import Dataset, Splits, digest

Scores = dict[str, float]


def accuracy(outputs: Tensor, data: Dataset) -> Scores:
    """The share of samples whose largest output is that of their class."""
    return {"accuracy": float((outputs.argmax(-1) == data.labels).double().mean())}


@dataclass(frozen=True)
class Task:
    """What a run needs to know. Its random parts are functions of a seed.

    classes: labels are below it. optimizer: (server half, weight decay) -> its optimizer.
    metric: (outputs for all of a data set, the data set) -> scores by name; the first is the one that tables show and
    that rates are chosen by. groups: int64 [training samples], what clients' data differ by; None: their labels.
    tuned: a method's key, `Method.tuned`, -> rates, chosen on validation data by benchmarks/tune.py.
    """

    splits: Splits
    classes: int
    model: Callable[[int], SplitModel]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    tuned: dict[tuple[str, ...], Rates]
    metric: Callable[[Tensor, Dataset], Scores] = accuracy
    groups: Tensor | None = None

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the data and of what clients' data differ by; nothing of where they lay."""
        return digest({"splits": self.splits, "groups": self.groups})

    def rates(self, key: tuple[str, ...], settings: Settings) -> Rates:
        """The settings' own rates, those tuned for `key` where they name none. ValueError where there are neither.

        key: of `tuned`; a method without a client rate has the key ("frozen",).
        """
        tuned, frozen = self.tuned.get(key), key == ("frozen",)
        if tuned is None:
            client_rate = 1.0 if frozen else settings.client_rate
            if not settings.server_rate or not client_rate:
                what = "server_rate" if frozen else "server_rate and client_rate"
                raise ValueError(f"no rates are tuned for {' '.join(key)}: give {what}")
            tuned = Rates(settings.server_rate, client_rate, 0.0)
        decay = settings.server_decay
        return Rates(
            server=settings.server_rate or tuned.server,
            client=settings.client_rate or tuned.client,
            decay=tuned.decay if decay is None else decay,
        )
