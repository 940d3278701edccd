"""What was committed about the client half. Two kinds: a log of scalars (HO-SFL), whole weights (gradients averaged, or
the clients' own weights).

A ledger checks the clients' answers, turns a round's into one step, and tells a client what it has missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hosfl.protocol.aggregate import Aggregation, RunningLength, clip_to_norm, shrinking, to_lattice, weighted_mean
from hosfl.protocol.lattice import Lattice, spread
from hosfl.protocol.log import DigestRecord, EpochRecord, Log, LogError, Packed, RoundRecord
from hosfl.protocol.messages import (
    Differs,
    Gradient,
    Hello,
    MessageError,
    PoolMoves,
    Records,
    Scalars,
    Trained,
    Weights,
)
from hosfl.protocol.replica import Pool, Replica, Run, digest_array
from hosfl.runs.snapshot import pack_optimizer, part, prefixed, unpack_optimizer

Rate = Callable[[int], float]  # the learning rate of a round
OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and what JSON holds
NO_DIGEST = torch.empty(0, dtype=torch.int32)


def step_size(rate: Rate, length: RunningLength | None, round: int, square: float) -> float:
    """The round's rate; with `length`, over the running length of the gradients, of which `square` is the newest."""
    return rate(round) / (1.0 if length is None else length.update(square))


# The round's lattice, chosen when its moves are known, before they are rounded to it; None where the run has none.
Choice = Callable[[Sequence[float]], Lattice | None]


class Step(Protocol):
    """From a round's aggregated scalars to its record."""

    def __call__(self, round: int, scalars: Tensor, lattice_for: Choice) -> tuple[list[float], float]:
        """Scalars float64 [P] -> the record's P coefficients and its learning rate."""

    def state(self) -> State: ...

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None: ...


@dataclass
class FreshStep:
    """Fresh directions every round. length: divides the rate, for normalised steps.

    On a lattice the record is the move itself, -rate / P * vbar; elsewhere the gradient estimate's vbar / P, to which
    every replica applies the run's rule.
    """

    run: Run
    rate: Rate
    length: RunningLength | None = None

    def __call__(self, round: int, scalars: Tensor, lattice_for: Choice) -> tuple[list[float], float]:
        rate = step_size(self.rate, self.length, round, float(scalars.square().mean()))
        mean = [v / len(scalars) for v in scalars.tolist()]
        moves = [-rate * v for v in mean]
        lattice = lattice_for(moves)
        return (mean if lattice is None else to_lattice(moves, lattice, self.run.seed, round)), rate

    def state(self) -> State:
        return {}, {"length": self.length and self.length.state()}

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        if self.length is not None:
            self.length.load(info["length"])


class PoolStep:
    """A pool: the client half is base + sum_j a_j u_j, and the server trains a with any torch.optim optimizer.

    d loss / d a_j = <g, u_j>, which is what the clients measure. The optimizer's rate is rate / P, so that a plain step
    is that of fresh directions, -rate / P sum_p vbar_p u_p. Only the coefficients measured in a round move, each
    with its own count of steps. A new generation starts from zeros with a new optimizer. The committed moves are
    multiples of the lattice's quantum, and what rounding leaves over is carried forward.
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

    def __call__(self, round: int, scalars: Tensor, lattice_for: Choice) -> tuple[list[float], float]:
        if self.pool.generation(round) != self.generation:
            self._start(self.pool.generation(round))
        rate = step_size(self.rate, self.length, round, float(scalars.square().mean()))
        measured = self.pool.measured(round, self.run.directions)
        for group in self.optimizer.param_groups:
            group["lr"] = rate / self.run.directions
        for j, scalar in zip(measured, scalars.tolist(), strict=True):
            self.coefficients[j].grad = torch.tensor(scalar, dtype=torch.float64)
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: the optimizer leaves alone what was not measured
        wanted = {j: float(self.coefficients[j].detach()) - self.committed[j] for j in measured}
        lattice = lattice_for([*wanted.values()])
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


def to_records(
    rows: Sequence[RoundRecord],
    run: Run,
    first: int = 0,
    *,
    client: int = 0,
    epoch: int = 0,
    digest: Tensor = NO_DIGEST,
) -> Records:
    """The log's records of rounds `first`, `first` + 1, ... as the message that a replica applies."""
    coefficients = np.array([r.coefficients for r in rows], np.float32).reshape(-1, run.directions)
    rates = np.array([r.rate for r in rows] if run.rule is not None else [], np.float32)
    lattices = [(r.round, Lattice(r.quantum).exponent) for r in rows if r.quantum is not None]
    return Records(
        client=client,
        round=first,
        epoch=epoch,
        coefficients=torch.from_numpy(coefficients),
        rates=torch.from_numpy(rates),
        digest=digest,
        lattices=torch.tensor(lattices, dtype=torch.int32).reshape(-1, 2),
    )


def voided(epochs: Sequence[tuple[int, int]], hello: Hello | Differs) -> bool:
    """Whether rounds that the client applied were voided since: a later epoch began before its round."""
    return any(epoch > hello.epoch and start < hello.round for epoch, start in epochs)


@dataclass
class SeedReplay:
    """HO-SFL: the client half is its base weights and a list of records, P numbers each.

    step: makes records. mirror: the server's own replica, for digests and evaluation. log: where records are kept.
    aggregation, clip: of the clients' scalars, and the largest length of one client's gradient estimate.
    digest_every: rounds; 0 for never. epochs: (epoch, its first round) of every restart; rounds of earlier epochs from
    there on are void.
    """

    run: Run
    step: Step
    mirror: Replica
    log: Log | None = None
    aggregation: Aggregation = weighted_mean
    clip: float | None = None
    digest_every: int = 100
    records: Packed[RoundRecord] = field(init=False)
    epochs: list[tuple[int, int]] = field(default_factory=list)
    expects = Scalars

    def __post_init__(self) -> None:
        self.records = Packed(self.run.directions)

    @property
    def epoch(self) -> int:
        return self.epochs[-1][0] if self.epochs else 0

    def since(self, hello: Hello | Differs) -> Records | PoolMoves:
        """Every record after the client's last; from round 0 on if its half is wrong or holds void rounds."""
        if hello.epoch > self.epoch:
            raise MessageError(f"client {hello.client} has seen epoch {hello.epoch}, this is epoch {self.epoch}")
        start = 0 if isinstance(hello, Differs) or voided(self.epochs, hello) else hello.round
        if isinstance(hello, Differs) and hello.digest.numel() != 8:
            raise MessageError(f"a digest of {hello.digest.numel()} words, not 8")
        if start > len(self.records):
            raise MessageError(f"client {hello.client} claims {hello.round} rounds of {len(self.records)}")
        return self._records(hello.client, start, checked=isinstance(hello, Hello))

    def _records(self, client: int, start: int, checked: bool = False) -> Records | PoolMoves:
        rows = self.records[start:]
        due = checked and self.digest_every and start // self.digest_every != len(self.records) // self.digest_every
        digest = digest_array(self.mirror.digest()) if due else NO_DIGEST
        sums = self._pool_sums(start) if rows else None
        if sums is not None:
            return PoolMoves(
                client=client,
                round=start,
                epoch=self.epoch,
                coefficients=sums,
                until=torch.tensor([len(self.records)], dtype=torch.int32),
                digest=digest,
            )
        return to_records(rows, self.run, start, client=client, epoch=self.epoch, digest=digest)

    def _pool_sums(self, start: int) -> Tensor | None:
        """The moves since `start` by direction of the pool, where that is less to send; None where it is not."""
        pool, end = self.run.pool, len(self.records)
        if pool is None or self.run.lattice is None:
            return None
        first = pool.generation(start)
        generations = pool.generation(end - 1) - first + 1
        if generations * pool.size >= (end - start) * self.run.directions:
            return None
        if any(record.quantum is not None for record in self.records[start:]):
            return None  # putting weights on another lattice rounds them: moves before and after it do not commute
        sums = np.zeros((generations, pool.size))
        for record in self.records[start:]:
            measured = pool.measured(record.round, self.run.directions)
            sums[pool.generation(record.round) - first, measured] += record.coefficients
        result = torch.from_numpy(sums.astype(np.float32))
        # In this order weights pass other values than in the rounds' own, and must stay on the lattice there too.
        return result if self.mirror.fits(2 * spread(result)) else None

    def check(self, message: Scalars) -> None:
        """Raises MessageError for scalars that cannot be averaged."""
        if len(message.scalars) != self.run.directions:
            raise MessageError(f"{len(message.scalars)} scalars in a run of {self.run.directions} directions")
        if not torch.isfinite(message.scalars).all():
            raise MessageError("infinite or NaN scalars")

    def commit(self, round: int, answers: Sequence[Scalars], weights: Sequence[float]) -> None:
        """Aggregate and commit; with no answers, an empty record: no step.

        Where weights have grown to half of what their lattice holds, or this step might carry them beyond, the round
        begins a coarser one. Raises LatticeError, with nothing committed, for a step too large even so, and ValueError
        for a round that is not the next one.
        """
        if round != len(self.records):
            raise ValueError(f"round {round} cannot be committed after {len(self.records)} rounds")
        coefficients, rate = [0.0] * self.run.directions, 0.0
        here = lattice = self.mirror.lattice

        def lattice_for(moves: Sequence[float]) -> Lattice | None:
            nonlocal lattice
            if here is not None:
                rounded = sum(map(abs, moves)) + len(moves) * here.quantum
                lattice = here if self.mirror.fits(max(here.limit / 2, rounded)) else here.coarser()
            return lattice

        if answers:
            values = [a.scalars for a in answers]
            if self.clip is not None:
                values = clip_to_norm(values, self.clip, self.dimension)
            coefficients, rate = self.step(round, self.aggregation(values, weights), lattice_for)
        quantum = None if lattice is None or lattice == here else lattice.quantum
        participants = tuple(a.client for a in answers)
        self._append(RoundRecord(self.epoch, round, rate, np.array(coefficients, np.float32), participants, quantum))

    @property
    def largest_answer(self) -> int:
        """How many numbers a client's answer holds."""
        return self.run.directions

    @property
    def dimension(self) -> float:
        """E |u|^2: the trainable elements, each with its squared factor."""
        return sum(t.numel() * f * f for t, f in zip(self.mirror.tensors, self.run.factors, strict=True))

    def _append(self, record: RoundRecord) -> None:
        self.records.append(record)
        try:
            self.mirror.apply(self._records(0, record.round))
            if self.log is not None:
                self.log.append(record)
        except BaseException:
            self.records.truncate(len(self.records) - 1)
            if self.mirror.applied > len(self.records):  # the log failed, of whatever: the mirror goes back as well
                self.mirror.reset()
                self.mirror.apply(self._records(0, 0))
            raise
        due = self.digest_every and len(self.records) % self.digest_every == 0
        if due and self.log is not None:
            self.log.append(DigestRecord(self.epoch, len(self.records), self.mirror.digest()))

    def restart(self, log: Log, round: int) -> None:
        """Take up a log's records before `round`; those from there on are void, and a new epoch starts.

        Raises LogError for a log that has fewer.
        """
        rounds = log.rounds
        if len(rounds) < round:
            raise LogError(f"the log ends after {len(rounds)} rounds, before the server's round {round}")
        if len(rounds) > round:
            log.append(EpochRecord(log.epoch + 1, round))
        self.log, self.epochs = log, log.epochs
        self.records.truncate(0)
        for record in rounds[:round]:
            self.records.append(record)
        self.mirror.reset()
        self.mirror.apply(self._records(0, 0))

    def state(self) -> State:
        return self.step.state()

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        self.step.load(tensors, info)


def descend(weights: Tensor, gradient: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step of the optimizer of `weights`, float32 [d], with this gradient at this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    weights.grad = gradient.float()
    optimizer.step()


@dataclass
class WholeWeights:
    """The client half's weights live here and travel whole.

    weights: float32 [d]. rounds: those in them. epoch: restarts of the server.
    """

    weights: Tensor
    rounds: int = field(default=0, kw_only=True)
    epoch: int = field(default=0, kw_only=True)

    @property
    def largest_answer(self) -> int:
        """How many numbers a client's answer holds."""
        return len(self.weights)

    def since(self, hello: Hello | Differs) -> Weights:
        """The weights, unless the client has them."""
        current = hello.round == self.rounds and hello.epoch == self.epoch
        weights = torch.empty(0) if current else self.weights.detach()
        return Weights(client=hello.client, round=self.rounds, epoch=self.epoch, weights=weights)

    def state(self) -> State:
        return {"weights": self.weights.detach()}, {"rounds": self.rounds}

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        with torch.no_grad():
            self.weights.copy_(tensors["weights"])
        self.rounds = info["rounds"]
        self.epoch += 1


@dataclass
class GradientAverage(WholeWeights):
    """First-order split learning: clients send gradients, and the weights take a step with their average.

    optimizer: of the weights. length: as in FreshStep; aggregation, clip: as in SeedReplay.
    """

    optimizer: torch.optim.Optimizer
    rate: Rate
    length: RunningLength | None = None
    aggregation: Aggregation = weighted_mean
    clip: float | None = None
    expects = Gradient

    def check(self, message: Gradient) -> None:
        """Raises MessageError for a gradient that cannot be averaged."""
        if message.gradient.shape != self.weights.shape:
            raise MessageError(f"{len(message.gradient)} gradient elements for {len(self.weights)} weights")
        if not torch.isfinite(message.gradient).all():
            raise MessageError("infinite or NaN gradient")

    def commit(self, round: int, answers: Sequence[Gradient], weights: Sequence[float]) -> None:
        """One step of the optimizer with the averaged gradient."""
        if answers:
            values = [a.gradient for a in answers]
            if self.clip is not None:
                values = [v * shrinking([v], self.clip) for v in values]
            mean = self.aggregation(values, weights)
            rate = step_size(self.rate, self.length, round, float(mean.square().sum()))
            descend(self.weights, mean, self.optimizer, rate)
        self.rounds = round + 1

    def state(self) -> State:
        tensors, info = super().state()
        moments, optimizer = pack_optimizer(self.optimizer)
        length = self.length and self.length.state()
        return tensors | prefixed("optimizer", moments), info | {"optimizer": optimizer, "length": length}

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        super().load(tensors, info)
        unpack_optimizer(self.optimizer, part("optimizer", tensors), info["optimizer"])
        if self.length is not None:
            self.length.load(info["length"])


@dataclass
class WeightAverage(WholeWeights):
    """Federated averaging: clients train their halves by themselves and send them; the mean is everybody's next one.

    aggregation: of the clients' weights, each weighted by its number of samples.
    """

    aggregation: Aggregation = weighted_mean
    expects = Trained

    def check(self, message: Trained) -> None:
        """Raises MessageError for weights that cannot be averaged."""
        if message.weights.shape != self.weights.shape:
            raise MessageError(f"{len(message.weights)} weights where the half has {len(self.weights)}")
        if not torch.isfinite(message.weights).all():
            raise MessageError("infinite or NaN weights")

    def commit(self, round: int, answers: Sequence[Trained], weights: Sequence[float]) -> None:
        """The clients' average; with no answers the weights stay."""
        if answers:
            self.weights = self.aggregation([a.weights for a in answers], weights).float()
        self.rounds = round + 1


Ledger = SeedReplay | GradientAverage | WeightAverage
