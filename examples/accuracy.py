"""Maximise accuracy itself, which has no gradient."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from hosfl.optim import ZONormalizedSGD

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
model = nn.Linear(64, 10)
nn.init.zeros_(model.weight)


def error():
    return 1 - (model(x[:1500]).argmax(1) == y[:1500]).double().mean()


# Accuracy is flat nearly everywhere: mu must be large enough to change some answers.
optimizer = ZONormalizedSGD(model.parameters(), lr=0.1, mu=0.1, directions=4)
for step in range(150):
    loss = optimizer.step(error)
    if step % 50 == 49:
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"step {step + 1}: error {loss:.3f}, accuracy on pictures not seen {accuracy:.3f}")
