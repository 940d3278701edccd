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

    tuned: what was tuned -> (server rate, client rate), chosen on validation data by benchmarks/tune.py; the keys are
    ("ho", directions_from, rule), ("first-order", rule) and ("frozen",).
    """

    splits: Splits
    classes: int
    model: Callable[[int], SplitModel]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    tuned: dict[tuple[str, ...], tuple[float, float]]

    def rates(self, config: Config) -> tuple[float, float]:
        """(server rate, client rate): the configuration's own, else the tuned ones. ValueError where none are."""
        if config.server_rate and (config.client_rate or config.method == "frozen"):
            return config.server_rate, config.client_rate or 1.0
        key = {
            "ho": ("ho", config.directions_from, config.rule),
            "first-order": ("first-order", config.rule),
            "frozen": ("frozen",),
        }[config.method]
        if key not in self.tuned:
            raise ValueError(f"no rates are tuned for {' '.join(key)}: give server_rate and client_rate")
        server, client = self.tuned[key]
        return config.server_rate or server, config.client_rate or client


def digits_model(seed: int) -> SplitModel:
    """A CNN of 403 + 290 parameters: two convolutions on the client, pooling and one linear layer on the server.

    The server half is weak on purpose: it sees the largest value of each of 7 channels in each quarter of the picture,
    and cannot make up for a client half that never learns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        convolutions = [nn.Conv2d(1, 12, 5, padding=2), nn.Conv2d(12, 7, 1)]
        with torch.no_grad():
            for convolution in convolutions:
                convolution.weight.mul_(2.0)  # near He's initialisation, which keeps the scale of activations
        model = nn.Sequential(
            convolutions[0],
            nn.ReLU(),
            convolutions[1],
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.LayerNorm(28, elementwise_affine=False),
            nn.Linear(28, 10),
        )
    return split(model, at=4)


def digits_task() -> Task:
    return Task(
        splits=digits(),
        classes=10,
        model=digits_model,
        loss=nn.functional.cross_entropy,
        optimizer=lambda half: torch.optim.Adam(half.parameters()),
        tuned={
            ("ho", "fresh", "normalized"): (0.12, 0.16),
            ("ho", "fresh", "sgd"): (0.06, 0.02),
            ("first-order", "normalized"): (0.03, 0.6),
            ("first-order", "sgd"): (0.03, 0.9),
            ("frozen",): (0.3, 1.0),
        },
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits_task}
