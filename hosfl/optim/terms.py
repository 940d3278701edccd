"""What the steps of a run and their replay share: the seeds of its directions, and SGD off the lattice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hosfl.protocol.header import DISTRIBUTIONS, LogError, check_choice, check_integer
from hosfl.protocol.seeds import Purpose, direction_seeds, pool_seed, round_seed
from hosfl_kernels import SGD, update_

LARGEST_STEP = 2**64 - 1  # and of whatever else seeds are derived from


@dataclass(frozen=True)
class Terms:
    """What replay needs beside the numbers."""

    seed: int
    directions: int
    pool: int
    dist: str

    def seeds(self, step: int) -> tuple[int, ...]:
        """Of the step's directions: its own, or the next ones of the pool."""
        if not self.pool:
            return direction_seeds(self.seed, step, self.directions)
        first = step * self.directions
        return tuple(pool_seed(self.seed, 0, i % self.pool) for i in range(first, first + self.directions))

    def table(self, first: int, steps: int) -> Tensor:
        """The seeds of many steps, the bits of each as int64 [steps, P]."""
        seeds = (seed for step in range(first, first + steps) for seed in self.seeds(step))
        numbers = np.fromiter(seeds, np.uint64, steps * self.directions)
        return torch.from_numpy(numbers.view(np.int64).reshape(steps, self.directions))


def check_terms(values: dict[str, Any]) -> Terms:
    """Raises LogError, which names the field."""
    directions = check_integer(values["directions"], "directions", 1, LARGEST_STEP)
    pool = check_integer(values["pool"], "pool", 0, LARGEST_STEP)
    if 0 < pool < directions:
        raise LogError(f"pool must be 0, or at least the {directions} directions of a step, not {pool}")
    seed = check_integer(values["seed"], "seed", 0, 2**64 - 1)
    return Terms(seed, directions, pool, check_choice(values["dist"], "dist", DISTRIBUTIONS))


def apply_rule(
    terms: Terms,
    momentum: float,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    starts: Sequence[int],
    moments: Sequence[Tensor],
    first: int,
    coefficients: Tensor,
    steps: Tensor,
) -> None:
    """The steps from `first` on, off the lattice, in one pass. coefficients: [R, P]. steps: rate and keep, [R, 2]."""
    rounds = range(first, first + len(steps))
    seeds = terms.table(first, len(steps))
    steps = nn.functional.pad(steps, (0, 1), value=1.0)
    for coarse in (True, False):
        mine = [i for i, t in enumerate(tensors) if (t.dtype == torch.bfloat16) == coarse]
        update_(
            [tensors[i] for i in mine],
            [[moments[i] for i in mine]] if moments else [[]] if momentum else [],
            SGD(momentum=momentum),
            seeds,
            coefficients,
            steps,
            dist=terms.dist,
            streams=[numbers[i] for i in mine],
            starts=[starts[i] for i in mine],
            rounding="stochastic" if coarse else "nearest",
            rounding_seeds=[round_seed(terms.seed, Purpose.WEIGHTS, round) for round in rounds] if coarse else None,
        )


def zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format)
