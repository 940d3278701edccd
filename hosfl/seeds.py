"""Every random number of a run comes from the run's seed, by hashing. A log needs no seeds at all.

run seed --purpose--> key --(round, epoch)--> the round's seed --index--> a direction's seed
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from hosfl_kernels import derive


class Purpose(IntEnum):
    """What a seed is for. The numbers are part of the log's format: add, never change."""

    DIRECTIONS = 1
    COEFFICIENTS = 2  # the rounding of coefficients to the lattice
    SAMPLING = 3  # which clients take part
    BATCHES = 4
    PARTITION = 5  # which client owns which sample
    MODEL = 6  # initial weights


def round_seed(run_seed: int, purpose: Purpose, round: int, epoch: int = 0) -> int:
    """The seed of one round for one purpose."""
    return derive(derive(run_seed, 0, purpose), round, epoch)


def direction_seeds(run_seed: int, round: int, count: int, epoch: int = 0) -> list[int]:
    """The seeds of the round's directions u_1 .. u_count, the same for all clients."""
    seed = round_seed(run_seed, Purpose.DIRECTIONS, round, epoch)
    return [derive(seed, p, 0) for p in range(count)]


def generator(run_seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.Generator:
    """A numpy generator for choices that are not part of the model's arithmetic: sampling, batches, partitions."""
    return np.random.default_rng(derive(round_seed(run_seed, purpose, round), client, 0))
