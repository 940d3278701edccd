"""Lightning's Trainer with forward passes only: manual optimisation, and the step gets a closure."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hosfl.optim import ZONormalizedSGD


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def training_step(self, batch, _):
        x, y = batch
        self.log("loss", self.optimizers().step(lambda: nn.functional.cross_entropy(self.net(x), y)))

    def configure_optimizers(self):
        return ZONormalizedSGD(self.parameters(), lr=0.06, directions=4, two_sided=False)


digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
trainer = lightning.Trainer(max_epochs=12, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(Digits(), DataLoader(data, batch_size=128, shuffle=True))
print(f"the last batch's loss: {trainer.callback_metrics['loss']:.3f}")
