"""A task of a user's own file: pictures that are not what a network with BatchNorm has learnt."""

import torch
from torch import nn

from hosfl import Task


def pictures(n, seed):
    """Of two classes: which half is brighter."""
    chance = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(n, 1, 6, 6, generator=chance), torch.arange(n) % 2
    x[labels == 0, :, :3] += 1
    x[labels == 1, :, 3:] += 1
    return x, labels


def net():
    first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Dropout(0.1), nn.Linear(24, 2))


def moved(x):
    return 3 * x + 4


def make():
    (x, labels), test = pictures(160, 0), pictures(40, 1)
    data = (moved(x), labels), (moved(test[0]), test[1])
    return Task(net, *data, nn.functional.cross_entropy, 6, classes=2)
