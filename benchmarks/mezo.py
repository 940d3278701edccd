"""MeZO's trainer in plain torch, a baseline of the optimizers: SGD without weight decay.

Its three methods have their original names and memory traffic: every perturbation generates a normal tensor from the
seed again, and makes a new tensor for `.data`.
Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv 2305.17333.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LARGEST_SEED = 1_000_000_000


class MeZO:
    """th = th - lr * (1 / P) sum_p v_p z_p, v_p = (loss(th + eps z_p) - loss(th - eps z_p)) / (2 eps), z normal.

    It takes the arguments of `hosfl.optim.ZOSGD`: parameters, lr, the distance eps, directions P, a seed.
    `step(closure)` returns the mean of the losses.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, eps: float = 1e-3, *, directions: int = 1, seed: int = 0
    ) -> None:
        self.params = [p for p in params if p.requires_grad]
        self.lr, self.eps, self.directions = lr, eps, directions
        self.seeds = torch.Generator().manual_seed(seed)

    def zo_perturb_parameters(self, seed: int, scaling_factor: float) -> None:
        """th = th + scaling_factor * eps * z(seed)."""
        torch.manual_seed(seed)
        for p in self.params:
            p.data = p.data + scaling_factor * self._normal(p) * self.eps

    def zo_step(self, closure: Callable[[], Tensor], seed: int) -> tuple[float, float]:
        """Return the mean loss and v along z(seed). The weights are restored, up to rounding."""
        self.zo_perturb_parameters(seed, 1)
        plus = float(closure())
        self.zo_perturb_parameters(seed, -2)
        minus = float(closure())
        self.zo_perturb_parameters(seed, 1)
        return (plus + minus) / 2, (plus - minus) / (2 * self.eps)

    def zo_update(self, seed: int, projected_grad: float) -> None:
        """th = th - lr * projected_grad * z(seed)."""
        torch.manual_seed(seed)
        for p in self.params:
            p.data = p.data - self.lr * (projected_grad * self._normal(p))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Measure along P directions, and update. Returns the mean loss."""
        seeds = torch.randint(LARGEST_SEED, (self.directions,), generator=self.seeds).tolist()
        measurements = [(seed, *self.zo_step(closure, seed)) for seed in seeds]
        for seed, _, projected_grad in measurements:
            self.zo_update(seed, projected_grad / self.directions)
        return sum(loss for _, loss, _ in measurements) / self.directions

    @staticmethod
    def _normal(p: Tensor) -> Tensor:
        return torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
