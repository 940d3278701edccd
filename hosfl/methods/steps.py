"""From a round's aggregated scalars to its record: fresh directions, and a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hosfl.methods.ledger import ChooseLattice, OptimizerFactory, Rate, State, step_size
from hosfl.methods.state import pack_optimizer, part, prefixed, unpack_optimizer
from hosfl.protocol.aggregate import RunningLength, to_lattice
from hosfl.protocol.terms import Pool, Run


@dataclass
class FreshStep:
    """From a round's aggregated scalars vbar_p to its record, where directions are new in every round.

        on a lattice   the move itself, -rate / P * vbar_p, rounded stochastically to its quantum
        elsewhere      the gradient estimate's vbar_p / P, to which replicas apply the run's rule

    Where directions move blocks, P is the number of directions of the block.

    Args:
        run: what all agree on.
        rate: round -> learning rate.
        length: the running length of gradients, by which the rate is divided; None: it is not.
    """

    run: Run
    rate: Rate
    length: RunningLength | None = None

    def __call__(self, round: int, scalars: Tensor, choose_lattice: ChooseLattice) -> tuple[list[float], float]:
        rate = step_size(self.rate, self.length, round, self.run.square(scalars.tolist()))
        mean = [share * v for share, v in zip(self.run.shares(), scalars.tolist(), strict=True)]
        moves = [-rate * v for v in mean]
        lattice = choose_lattice(moves)
        return (mean if lattice is None else to_lattice(moves, lattice, self.run.seed, round)), rate

    def state(self) -> State:
        return {}, {"length": self.length and self.length.state()}

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        if self.length is not None:
            self.length.load(info["length"])


class PoolStep:
    """From a round's aggregated scalars to its record, where a pool of D directions is measured in turn.

    The client half is base + sum_j a_j u_j, and the server trains the coefficients a, float64 [D], with any torch.optim
    optimizer: d loss / d a_j = <g, u_j>, which is what the clients measure. Its rate is rate / P, so that a plain step
    is that of fresh directions, -rate / P sum_p vbar_p u_p. Only the coefficients that were measured move, each with
    its own count of steps. When the pool is replaced the coefficients start from zeros, with a new optimizer. On a
    lattice moves are multiples of the quantum, and what rounding leaves over is carried forward.

    Args:
        run: what all agree on; it has a pool.
        rate: round -> learning rate.
        optimizer: coefficients -> the optimizer that trains them.
        length: the running length of gradients, by which the rate is divided; None: it is not.
    """

    def __init__(self, run: Run, rate: Rate, optimizer: OptimizerFactory, length: RunningLength | None = None) -> None:
        assert run.pool is not None
        self.run, self.rate, self.make_optimizer, self.length = run, rate, optimizer, length
        self.pool: Pool = run.pool
        self._start(0)

    def _start(self, generation: int) -> None:
        self.generation = generation
        self.coefficients = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(self.pool.size)]
        self.optimizer = self.make_optimizer([*self.coefficients])
        self.committed = [0.0] * self.pool.size

    def __call__(self, round: int, scalars: Tensor, choose_lattice: ChooseLattice) -> tuple[list[float], float]:
        if self.pool.generation(round) != self.generation:
            self._start(self.pool.generation(round))
        rate = step_size(self.rate, self.length, round, float(scalars.square().mean()))
        measured = self.pool.measured(round, self.run.directions).tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = rate / self.run.directions
        for j, scalar in zip(measured, scalars.tolist(), strict=True):
            self.coefficients[j].grad = torch.tensor(scalar, dtype=torch.float64)
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: the optimizer leaves alone what was not measured
        wanted = {j: float(self.coefficients[j].detach()) - self.committed[j] for j in measured}
        lattice = choose_lattice([*wanted.values()])
        moves = [float(np.float32(w)) if lattice is None else lattice.nearest(w) for w in wanted.values()]
        for j, move in zip(measured, moves, strict=True):
            self.committed[j] += move
        # Off the lattice a record is a gradient estimate, and plain SGD at rate 1 makes the move of it.
        return (moves, rate) if lattice is not None else ([-m for m in moves], 1.0)

    def state(self) -> State:
        moments, info = pack_optimizer(self.optimizer)
        tensors = prefixed("optimizer", moments)
        tensors["coefficients"] = torch.stack([c.detach() for c in self.coefficients])
        tensors["committed"] = torch.tensor(self.committed, dtype=torch.float64)
        length = self.length and self.length.state()
        return tensors, {"generation": self.generation, "optimizer": info, "length": length}

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        self._start(info["generation"])
        with torch.no_grad():
            for coefficient, value in zip(self.coefficients, tensors["coefficients"], strict=True):
                coefficient.copy_(value)
        self.committed = tensors["committed"].tolist()
        unpack_optimizer(self.optimizer, part("optimizer", tensors), info["optimizer"])
        if self.length is not None:
            self.length.load(info["length"])


POOL_BETAS = (0.5, 0.9)  # a coefficient is measured a few times only before its pool is replaced
