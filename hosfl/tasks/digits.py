"""Real handwritten digits; and the same, inverted and noisy, for a network pretrained on the originals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hosfl.extras import require
from hosfl.halves.split import SplitModel, split
from hosfl.settings import Rates, Settings
from hosfl.tasks.data import Dataset, Splits
from hosfl.tasks.task import Task


def digits_model(seed: int) -> SplitModel:
    """Make a split CNN of 416 trained and 119 fixed client parameters, and 290 server parameters.

    The client half learns 16 5x5 features of the picture; a fixed 1x1 convolution mixes them into 7 channels. The
    server half is weak on purpose: it gets only the largest value of each channel in each quarter of the picture, and
    cannot make up for a client half that never learns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        features, mixing = nn.Conv2d(1, 16, 5, padding=2), nn.Conv2d(16, 7, 1)
        for convolution in (features, mixing):
            nn.init.orthogonal_(convolution.weight, gain=3**0.5)
        mixing.requires_grad_(False)
        model = nn.Sequential(
            features,
            nn.ReLU(),
            mixing,
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.LayerNorm(28, elementwise_affine=False),
            nn.Linear(28, 10),
        )
    return split(model, at=4)


def digits_task(config: Settings) -> Task:
    """Make the task "digits": handwritten digits and a small CNN, with tuned rates."""
    if config.data or config.model or config.at:
        raise ValueError("the digits task has its own data and model: leave out data, model and at")
    return Task.of(
        digits(),
        classes=10,
        model=lambda: digits_model(torch.initial_seed()),
        loss=nn.functional.cross_entropy,
        rates={
            ("ho", "fresh", "normalized"): Rates(0.04, 0.2, 0.3),
            ("ho", "fresh", "adamw"): Rates(0.04, 0.012, 0.3),
            ("ho", "pool", "normalized"): Rates(0.04, 0.2, 0.3),
            ("ho", "pool", "adamw"): Rates(0.16, 0.1, 0.3),
            ("first-order", "normalized"): Rates(0.16, 2.0, 0.3),
            ("splitfed", "normalized"): Rates(0.08, 0.4, 0.3),
            ("hosl", "normalized"): Rates(0.16, 0.4, 0.3),
            ("zo-both", "pool", "normalized"): Rates(0.04, 0.2, 0.3),
            ("mu-splitfed", "pool", "normalized"): Rates(0.02, 0.1, 0.3),
            ("frozen",): Rates(0.05, 1.0, 0.0),
        },
    )


def inverted_task(config: Settings) -> Task:
    """Make the task "digits-inverted": a network pretrained on the digits, and inverted, noisy digits to adapt it to.

    The model of the digits task is first trained as a whole, with exact gradients, on the original digits. Then every
    picture is inverted and gets normal noise of a fifth of the range. What the first layer has learnt is of little use
    for these, and the server half cannot make up for it.
    """
    clean, splits = digits_task(config), digits()
    changed = invert(splits)

    def model() -> SplitModel:
        return pretrain(digits_model(torch.initial_seed()), splits.train, torch.initial_seed())

    return replace(clean, train=changed.train, validation=changed.validation, test=changed.test, model=model)


def pretrain(halves: SplitModel, data: Dataset, seed: int) -> SplitModel:
    """Train both halves together, in place, with Adam at a rate that falls from 0.02 to zero. Returns them."""
    steps, batch = 300, 128
    parameters = [p for half in (halves.client, halves.server) for p in half.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    random = torch.Generator().manual_seed(seed % 2**63)
    for _ in range(steps):
        part = data[torch.randint(0, len(data), (batch,), generator=random)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(halves(part.inputs), part.labels).backward()
        optimizer.step()
        schedule.step()
    return halves


DIGITS_MEAN, DIGITS_DEVIATION = 0.305, 0.376  # of the training part's pixels, black 0 and white 1


def invert(splits: Splits) -> Splits:
    """Exchange black and white, and add normal noise of a fifth of the range to every pixel; the same in every run."""
    random = torch.Generator().manual_seed(0)

    def change(data: Dataset) -> Dataset:
        assert isinstance(data.inputs, Tensor)
        pixels = data.inputs * DIGITS_DEVIATION + DIGITS_MEAN
        pixels = 1 - pixels + 0.2 * torch.randn(pixels.shape, generator=random)
        return Dataset((pixels - (1 - DIGITS_MEAN)) / DIGITS_DEVIATION, data.labels)

    return Splits(change(splits.train), change(splits.validation), change(splits.test))


def digits() -> Splits:
    """Load the 1,797 handwritten digits that scikit-learn carries, float32 [n, 1, 8, 8]: 60 / 20 / 20 percent.

    They are standardised by mean and deviation of the training part. The parts are stratified, and the same in every
    run.
    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    train_test_split = require("sklearn.model_selection", "the task digits").train_test_split
    x, y = require("sklearn.datasets", "the task digits").load_digits(return_X_y=True)
    inputs = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8)
    inputs = (inputs / 16 - DIGITS_MEAN) / DIGITS_DEVIATION
    labels = torch.tensor(y, dtype=torch.int64)
    train, rest = train_test_split(np.arange(len(y)), train_size=0.6, stratify=y, random_state=0)
    validation, test = train_test_split(rest, train_size=0.5, stratify=y[rest], random_state=0)
    return Splits(*(Dataset(inputs[part], labels[part]) for part in (train, validation, test)))
