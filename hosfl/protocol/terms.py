"""The terms of a run, on which client and server agree before round 0, and their form in a log's header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.header import Header, LogError, check_number, check_power_of_two, check_quantum
from hosfl.protocol.lattice import Lattice, spread
from hosfl.protocol.seeds import direction_seeds, pool_seed
from hosfl_kernels import SGD, AdamW

Rule = SGD | AdamW
Rounds = TypeVar("Rounds", int, NDArray[np.int64])


@dataclass(frozen=True)
class Block:
    """A group of the client half's layers, and how many of a round's P directions move it; they move nothing else.

    tensors: positions in the run's list of trainable tensors. The blocks of a run divide all of them, and the P
    directions, among them in this order.
    """

    tensors: tuple[int, ...]
    directions: int


@dataclass(frozen=True)
class Pool:
    """D directions that are measured in turn: every round measures the next P of them.

    Args:
        size: D, their number.
        rounds: G, rounds until all are replaced; 0: never.

    Raises:
        ValueError: a size below 1, or rounds below 0.
    """

    size: int
    rounds: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.rounds < 0:
            raise ValueError(f"a pool has 1 direction or more and 0 rounds or more, got {self.size} and {self.rounds}")

    def generation(self, rounds: Rounds) -> Rounds:
        """The number of the pool that a round measures; for an array of rounds, of each."""
        return rounds // self.rounds if self.rounds else 0 * rounds

    def measured(self, rounds: Rounds, directions: int) -> NDArray[np.int64]:
        """The indices of the directions that these rounds measure: [..., P] for rounds [...]."""
        first = np.asarray(rounds % self.rounds if self.rounds else rounds) * directions
        return (first[..., None] + np.arange(directions)) % self.size


@dataclass(frozen=True)
class Measures:
    """What a run computed from its model's first weights, before it put them on the lattice. A JSON object.

    Computed again from weights on the lattice they may differ: after one is rounded up to a power of two, the quantum
    would be twice as large. So they are sent with the base. factors, quantum: as in a log's header. Raises ValueError.
    """

    factors: tuple[float, ...]
    quantum: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(check_power_of_two(f, "a factor") for f in self.factors))
        if self.quantum is not None:
            object.__setattr__(self, "quantum", check_quantum(self.quantum, "the quantum"))

    @property
    def lattice(self) -> Lattice | None:
        return None if self.quantum is None else Lattice(self.quantum)


@dataclass(frozen=True)
class Run:
    """The terms on which client and server agree before round 0, beside the weights. They are sent only once.

    Args:
        seed: of the run, 0 <= seed < 2^64; every direction follows from it.
        directions: P, directions that are measured in a round.
        dist: of the directions: "rademacher" or "gaussian".
        mu: the size of a probe's step.
        factors: a power of two for each trainable tensor, by which directions are scaled on it.
        lattice: of the client half's weights; None: they are on none, and `rule` makes a round's step.
        rule: `hosfl_kernels.SGD` or `AdamW`, which every replica applies; None on a lattice, where records are moves.
        pool: the directions that are measured in turn; None: new ones in every round.
        estimator: how a directional derivative is measured: "one-sided", "two-sided", "forward" or "backward".
        blocks: groups of tensors and of directions; (): every direction moves all tensors. With blocks there is an
            estimate for each, ghat_b = (1 / P_b) sum_p vbar_p u_p over the P_b directions that move it.

    Raises:
        ValueError: a lattice and a rule, or neither; blocks that do not cover all tensors and directions, or are
            combined with a pool; a pool smaller than P.
    """

    seed: int
    directions: int
    dist: str
    mu: float
    factors: tuple[float, ...]
    lattice: Lattice | None = None
    rule: Rule | None = None
    pool: Pool | None = None
    estimator: str = "one-sided"
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        if self.blocks:
            shared = sorted(t for block in self.blocks for t in block.tensors)
            if shared != list(range(len(self.factors))) or not all(b.directions > 0 for b in self.blocks):
                raise ValueError(
                    f"blocks = {self.blocks} of {len(self.factors)} tensors: every tensor must be in one block, and"
                    " every block have a direction or more"
                )
            counts = [block.directions for block in self.blocks]
            if sum(counts) != self.directions:
                raise ValueError(
                    f"blocks of {counts} directions in a run of {self.directions}: they must add up to these"
                )
            if self.pool is not None:
                raise ValueError("directions of a pool move all tensors: leave out blocks, or pool")
        if (self.lattice is None) == (self.rule is None):
            raise ValueError(
                f"a run has a lattice, where records are moves, or an update rule: give one of them, got lattice ="
                f" {self.lattice} and rule = {self.rule}"
            )
        if self.pool is not None and self.pool.size < self.directions:
            raise ValueError(
                f"cannot measure {self.directions} different directions of a pool of {self.pool.size}: lower directions"
            )

    @property
    def measures(self) -> Measures:
        return Measures(self.factors, None if self.lattice is None else self.lattice.quantum)

    def seeds(self, round: int) -> Sequence[int]:
        """The seeds of the P directions of a round."""
        if self.pool is None:
            return direction_seeds(self.seed, round, self.directions)
        generation = self.pool.generation(round)
        return [pool_seed(self.seed, generation, j) for j in self.pool.measured(round, self.directions).tolist()]

    def parts(self) -> Iterator[tuple[Block, slice]]:
        """The blocks, and for each the slice of the P directions that move it."""
        first = 0
        for block in self.blocks or (Block(tuple(range(len(self.factors))), self.directions),):
            yield block, slice(first, first + block.directions)
            first += block.directions

    def shares(self) -> list[float]:
        """The weight of each direction in its block's estimate, 1 / P_b: [P]."""
        return [1 / block.directions for block, _ in self.parts() for _ in range(block.directions)]

    def square(self, scalars: Sequence[float]) -> float:
        """|g|^2 estimated from one round's scalars [P]: E v_p^2 = |g_b|^2 for a direction that moves block b."""
        return sum(share * v * v for share, v in zip(self.shares(), scalars, strict=True))

    def spread(self, rows: NDArray[np.float32]) -> float:
        """The most that moves [..., P] can move a weight together, in units of its factor: sum |c| over its block."""
        return max(spread(rows[..., positions]) for _, positions in self.parts())


def described(rule: Rule | None) -> dict[str, Any]:
    """A rule as in a log's header."""
    if rule is None:
        return {"name": "moves"}
    if isinstance(rule, SGD):
        return {"name": "sgd", "momentum": rule.momentum, "weight_decay": rule.weight_decay}
    b1, b2 = rule.betas
    return {"name": "adamw", "beta1": b1, "beta2": b2, "eps": rule.eps, "weight_decay": rule.weight_decay}


def _rule(of: Mapping[str, Any]) -> Rule | None:
    constants = dict(of)
    name = constants.pop("name")
    for constant, value in constants.items():
        check_number(value, f"the rule's {constant}")
    match name:
        case "moves":
            return None
        case "sgd":
            return SGD(**constants)
        case "adamw":
            return AdamW(betas=(constants.pop("beta1"), constants.pop("beta2")), **constants)
        case other:
            raise ValueError(f"unknown update rule {other!r}")


def run_of(header: Header) -> Run:
    """The terms that a header describes. Raises LogError for terms that this version does not know."""
    try:
        run = Run(
            seed=header.seed,
            directions=header.directions,
            dist=header.dist,
            mu=header.mu,
            factors=tuple(p.factor for p in header.parameters),
            lattice=None if header.quantum is None else Lattice(header.quantum),
            rule=_rule(header.rule),
            pool=None if header.pool is None else Pool(**header.pool),
            blocks=tuple(Block(tuple(b["tensors"]), b["directions"]) for b in header.blocks),
        )
        if run.lattice is not None:
            check_quantum(run.lattice.quantum, "the quantum")
            run.lattice.nearest(run.mu)
    except (ArithmeticError, TypeError, ValueError, KeyError) as error:
        raise LogError(f"the log's header makes no run: {error}") from error
    if run.lattice is not None and (run.dist != "rademacher" or any(p.dtype != "float32" for p in header.parameters)):
        raise LogError("the log's header makes no run: on a lattice are float32 weights and rademacher directions")
    return run


class Diverged(ArithmeticError):
    """A loss is infinite or NaN: nothing can be learnt from there on."""


class NothingLearnt(RuntimeError):
    """In a whole run the server could learn from no cut, so that nothing was trained."""
