"""What steps and their replay share: the seeds of the directions, and the update off the lattice."""

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

LARGEST_STEP = 2**64 - 1  # the limit of every number that seeds are derived from


@dataclass(frozen=True)
class Terms:
    """The settings that replay needs beside a log's rows."""

    seed: int
    directions: int
    pool: int
    dist: str

    def seeds(self, step: int) -> tuple[int, ...]:
        """The seeds of a step's directions: its own, or the next ones of the pool."""
        if not self.pool:
            return direction_seeds(self.seed, step, self.directions)
        first = step * self.directions
        return tuple(pool_seed(self.seed, 0, i % self.pool) for i in range(first, first + self.directions))

    def table(self, first: int, steps: int) -> Tensor:
        """The seeds of consecutive steps, int64 [steps, P] with the bits of unsigned seeds."""
        seeds = (seed for step in range(first, first + steps) for seed in self.seeds(step))
        numbers = np.fromiter(seeds, np.uint64, steps * self.directions)
        return torch.from_numpy(numbers.view(np.int64).reshape(steps, self.directions))


def check_terms(values: dict[str, Any]) -> Terms:
    """Terms from a file. Raises LogError, which names the field."""
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
    """Apply R steps from number `first` on, off the lattice, in one pass.

    coefficients: float32 [R, P]. steps: float32 [R, 2], rate and keep. numbers: of the tensors, the streams of their
    noise; starts: see `shard`. moments: one per tensor, none without momentum.
    """
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
    """float32 zeros of a parameter's shape: a moment."""
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format)
