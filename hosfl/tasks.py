"""Tasks: data, a model cut in two, and the rates that tuning chose for each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hosfl.config import Config
from hosfl.data import Splits, digits
from hosfl.split import SplitModel, split


@dataclass(frozen=True)
class Task:
    """What a run needs to know. Its random parts are functions of a seed.

    tuned: method -> (server rate, client rate), chosen on validation data; see benchmarks/tune.py.
    """

    splits: Splits
    classes: int
    model: Callable[[int], SplitModel]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    tuned: dict[str, tuple[float, float]]

    def rates(self, config: Config) -> tuple[float, float]:
        """(server rate, client rate): the configuration's own, else the tuned ones."""
        server, client = self.tuned[config.method]
        return config.server_rate or server, config.client_rate or client


def digits_model(seed: int) -> SplitModel:
    """A CNN of 632 + 650 parameters: two convolutions on the client, pooling and one linear layer on the server.

    The server half is weak on purpose: it cannot make up for a client half that never learns, so that a method must
    train the client to do well.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        convolutions = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 16, 3, padding=1)]
        model = nn.Sequential(
            convolutions[0],
            nn.ReLU(),
            convolutions[1],
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.LayerNorm(64, elementwise_affine=False),
            nn.Linear(64, 10),
        )
    with torch.no_grad():
        for convolution in convolutions:
            convolution.weight.mul_(2.0)
    return split(model, at=4)


def digits_task() -> Task:
    return Task(
        splits=digits(),
        classes=10,
        model=digits_model,
        loss=nn.functional.cross_entropy,
        optimizer=lambda half: torch.optim.Adam(half.parameters()),
        tuned={"ho": (0.03, 0.01), "first-order": (0.1, 0.3), "frozen": (0.1, 1.0)},
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits_task}
