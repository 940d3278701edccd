"""A run in kilobytes: the base model and the log make the trained model again, to the bit."""

import copy
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from hosfl.optim import ZONormalizedSGD, rebuild

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
base = copy.deepcopy(model)
optimizer = ZONormalizedSGD(model.named_parameters(), lr=0.01, directions=2)
for _ in range(100):
    optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
optimizer.log.save("run.log")

rebuild(base, "run.log")
equal = all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))
weights = sum(p.nbytes for p in model.parameters())
print(f"{Path('run.log').stat().st_size} bytes for {weights} bytes of weights; the same bits: {equal}")
