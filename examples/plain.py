"""Train a digits classifier with forward passes only."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from hosfl.optim import ZONormalizedSGD

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer = ZONormalizedSGD(model.parameters(), lr=0.04, directions=4, two_sided=False)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=400)
for step in range(400):
    batch = torch.randint(0, 1500, (128,))
    loss = optimizer.step(lambda: nn.functional.cross_entropy(model(x[batch]), y[batch]))  # noqa: B023
    schedule.step()
    if step % 100 == 99:
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"step {step + 1}: loss {loss:.3f}, accuracy on pictures not seen {accuracy:.3f}")
