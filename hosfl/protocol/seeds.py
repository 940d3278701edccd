"""Every random number of a run is derived from the run's seed by hashing. Records have no seeds.

run seed --purpose--> key --round or pool--> a seed --index--> a direction's seed

Rounds that a restarted server runs again use the same seeds as before. What was measured the first time is void, so
nothing is used twice.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hosfl_kernels import derive

CACHED = 1 << 12  # rounds: many clients that catch up need the same ones; more would only take memory


class Purpose(IntEnum):
    """What a seed is for. The numbers are part of the log's format: add, never change."""

    DIRECTIONS = 1
    COEFFICIENTS = 2  # the rounding of coefficients to the lattice
    SAMPLING = 3  # which clients take part
    BATCHES = 4
    PARTITION = 5  # which client owns which sample
    MODEL = 6  # initial weights
    POOL = 7  # directions that are measured again and again
    WEIGHTS = 8  # the rounding of bfloat16 weights
    FAULTS = 9  # what goes wrong in a simulation
    DROPOUT = 10  # of the server half
    SERVER = 11  # directions of the server half, where it learns by zeroth order
    OWN = 12  # directions that a client shares with nobody
    READING = 13  # what is random in reading samples, such as augmentation
    CALIBRATION = 14  # batches on which running statistics are estimated


@lru_cache(maxsize=CACHED)
def round_seed(run_seed: int, purpose: Purpose, round: int) -> int:
    """The seed of one round for one purpose."""
    return derive(derive(run_seed, 0, purpose), round, 0)


@lru_cache(maxsize=CACHED)
def direction_seeds(run_seed: int, round: int, count: int, purpose: Purpose = Purpose.DIRECTIONS) -> tuple[int, ...]:
    """The seeds of the round's own directions u_1 .. u_count, the same for all clients."""
    seed = round_seed(run_seed, purpose, round)
    return tuple(derive(seed, p, 0) for p in range(count))


@lru_cache(maxsize=64)
def pool_seeds(run_seed: int, generation: int, size: int) -> tuple[int, ...]:
    """The seeds of all directions of one generation of the pool."""
    seed = round_seed(run_seed, Purpose.POOL, generation)
    return tuple(derive(seed, j, 0) for j in range(size))


@lru_cache(maxsize=1 << 14)
def pool_seed(run_seed: int, generation: int, index: int) -> int:
    """One of `pool_seeds`, without making the others."""
    return derive(round_seed(run_seed, Purpose.POOL, generation), index, 0)


def drawn(run_seed: int, purpose: Purpose, round: int, client: int, samples: int, size: int) -> NDArray[np.int64]:
    """The indices of a client's samples in a round's batch: `size` of them, or all if there are fewer."""
    return generator(run_seed, purpose, round, client).choice(samples, min(size, samples), replace=False)


def generator(run_seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.Generator:
    """A numpy generator for choices that are not part of the model's arithmetic: sampling, batches, partitions."""
    return np.random.default_rng(derive(round_seed(run_seed, purpose, round), client, 0))
