"""What was committed about the client half. Two kinds: a log of scalars (HO-SFL), whole weights (gradients averaged, or
the clients' own weights).

A ledger checks the clients' answers, turns a round's into one step, and tells a client what it has missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import Aggregation, RunningLength, clip_to_norm, not_beyond, weighted_mean
from hosfl.protocol.header import LogError
from hosfl.protocol.lattice import Lattice, spread
from hosfl.protocol.log import Log
from hosfl.protocol.messages import (
    Differs,
    Hello,
    Message,
    MessageError,
    PoolMoves,
    Records,
    Scalars,
    Weights,
)
from hosfl.protocol.records import DigestRecord, EpochRecord, Packed, RoundRecord
from hosfl.protocol.replica import NO_DIGEST, Replica, digest_array, to_records
from hosfl.protocol.terms import Run
from hosfl_kernels import AdamW

Rate = Callable[[int], float]  # the learning rate of a round
OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and what JSON holds


def step_size(rate: Rate, length: RunningLength | None, round: int, square: float) -> float:
    """The round's rate; with `length`, over the running length of the gradients, of which `square` is the newest."""
    return rate(round) / (1.0 if length is None else length.update(square))


# The round's lattice, chosen when its moves are known, before they are rounded to it; None where the run has none.
ChooseLattice = Callable[[Sequence[float]], Lattice | None]


class Ledger(Protocol):
    """What is committed of the client half. expects: the message that is a client's answer."""

    expects: ClassVar[type[Message]]

    @property
    def epoch(self) -> int:
        """How many times the server was restarted."""

    @property
    def largest_answer(self) -> int:
        """How many numbers a client's answer holds."""

    def since(self, hello: Hello | Differs, from_client: bool = True) -> Message:
        """The message of what a client has missed. from_client: see `Server.welcome`. Raises MessageError."""

    def check(self, message: Any) -> None:
        """Raises MessageError for an answer that cannot be aggregated."""

    def commit(self, round: int, answers: Sequence[Any], weights: Sequence[float]) -> None:
        """One step from the answers, each with its client's number of samples; with none of them there is no step."""

    def show(self, half: nn.Module) -> None:
        """Write the current weights into `half`, the copy made by `Setup.observed`."""

    def state(self) -> State:
        """What a restarted server needs beside the log."""

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Load a saved state."""


class Step(Protocol):
    """From a round's aggregated scalars to its record."""

    def __call__(self, round: int, scalars: Tensor, choose_lattice: ChooseLattice) -> tuple[list[float], float]:
        """Scalars float64 [P] -> the record's P coefficients and its learning rate."""

    def state(self) -> State: ...

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None: ...


def has_void_rounds(epochs: Sequence[tuple[int, int]], hello: Hello | Differs) -> bool:
    """Whether a client holds void rounds: a later epoch began before the round that it is at."""
    return any(epoch > hello.epoch and start < hello.round for epoch, start in epochs)


@dataclass
class SeedReplay:
    """The ledger of HO-SFL: the client half is its base weights and a list of records of P numbers, one for each round.

    Args:
        run: what all agree on.
        step: makes a record of a round's aggregated scalars: `FreshStep` or `PoolStep`.
        mirror: the server's own replica, for digests and evaluation.
        log: where records are kept; None: in memory alone.
        aggregation: of the clients' scalars, float32 [P] each.
        clip: the largest L2 norm of one client's gradient estimate, as its scalars tell it; None: any.
        digest_every: rounds between two digests by which clients check their weights; 0: none.
        epochs: (epoch, its first round) of every restart; rounds of earlier epochs from there on are void.
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
    expects: ClassVar[type[Message]] = Scalars

    def __post_init__(self) -> None:
        self.records = Packed(self.run.directions)
        self._digest: tuple[tuple[int, int], bytes] | None = None  # (epoch, rounds) and the digest of then

    @property
    def epoch(self) -> int:
        return self.epochs[-1][0] if self.epochs else 0

    def since(self, hello: Hello | Differs, from_client: bool = True) -> Records | PoolMoves:
        """Every record after the client's last; from round 0 on if its half is wrong or holds void rounds.

        So too if it has more rounds than there are, or has seen a later epoch, as where a copy of the run's folder has
        been resumed: of what the client holds, nobody knows here. Two copies that are resumed count the same epochs,
        so that what a client says tells nothing of which its rounds are from: the digest that it is sent does.
        """
        if isinstance(hello, Differs) and len(hello.digest) != 8:
            raise MessageError(f"a digest of {len(hello.digest)} words, not 8")
        ahead = hello.epoch > self.epoch or hello.round > len(self.records)
        start = 0 if isinstance(hello, Differs) or ahead or has_void_rounds(self.epochs, hello) else hello.round
        # Of one that has found out that its half is wrong what follows is from the base.
        checked = isinstance(hello, Hello) and ((from_client and start > 0) or self._due(start))
        return self._records(hello.client, start, checked)

    def _due(self, start: int) -> bool:
        """Whether a digest fell due in the rounds from `start` on."""
        every = self.digest_every
        return every > 0 and start // every != len(self.records) // every

    def digest(self) -> bytes:
        """SHA-256 of the replica after all rounds so far; computed once per round."""
        at = self.epoch, len(self.records)
        if self._digest is None or self._digest[0] != at:
            self._digest = at, self.mirror.digest()
        return self._digest[1]

    def _records(self, client: int, start: int, checked: bool = False) -> Records | PoolMoves:
        digest = digest_array(self.digest()) if checked else NO_DIGEST
        rounds = self.records[start:]
        records = to_records(rounds, self.run, start, client=client, epoch=self.epoch, digest=digest)
        sums = self._pool_sums(records) if rounds else None
        if sums is None:
            return records
        until = np.array([len(self.records)], np.int32)
        return PoolMoves(client=client, round=start, epoch=self.epoch, coefficients=sums, until=until, digest=digest)

    def _pool_sums(self, records: Records) -> NDArray[np.float32] | None:
        """The rounds' moves by direction of the pool, where that is less to send; None where it is not."""
        pool, end = self.run.pool, records.round + len(records.coefficients)
        if pool is None or self.run.lattice is None:
            return None
        first = pool.generation(records.round)
        generations = pool.generation(end - 1) - first + 1
        if generations * pool.size >= records.coefficients.size:
            return None
        if len(records.lattices):
            return None  # putting weights on another lattice rounds them: moves before and after it do not commute
        sums = np.zeros((generations, pool.size))
        rounds = np.arange(records.round, end)
        places = pool.generation(rounds)[:, None] - first, pool.measured(rounds, self.run.directions)
        np.add.at(sums, places, records.coefficients)
        result = sums.astype(np.float32)
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

        def choose_lattice(moves: Sequence[float]) -> Lattice | None:
            nonlocal lattice
            if here is not None:
                rounded = sum(map(abs, moves)) + len(moves) * here.quantum  # of blocks more than any of them moves
                lattice = here if self.mirror.fits(max(here.limit / 2, rounded)) else here.coarser()
            return lattice

        if answers:
            values = [a.scalars for a in answers]
            if self.clip is not None:
                values = clip_to_norm(values, self.clip, self.weights)
            step = not_beyond(self.aggregation(values, weights), values, self.weights)
            coefficients, rate = self.step(round, step, choose_lattice)
        quantum = None if lattice is None or lattice == here else lattice.quantum
        participants = tuple(a.client for a in answers)
        self._append(RoundRecord(self.epoch, round, rate, np.array(coefficients, np.float32), participants, quantum))

    @property
    def largest_answer(self) -> int:
        """How many numbers a client's answer holds."""
        return self.run.directions

    @property
    def weights(self) -> NDArray[np.float64]:
        """[P]: weights w with |ghat|^2 = sum_p w_p v_p^2 in expectation.

        w_p = d_b / P_b^2 with d_b = E |u_p|^2 for the block b of direction p: its trainable elements, each with its
        squared factor.
        """
        sizes = [t.numel() * f * f for t, f in zip(self.mirror.tensors, self.run.factors, strict=True)]
        blocks = [(sum(sizes[t] for t in b.tensors) / b.directions**2, b.directions) for b, _ in self.run.parts()]
        return np.repeat([weight for weight, _ in blocks], [count for _, count in blocks])

    def _append(self, record: RoundRecord) -> None:
        self.records.append(record)
        try:
            self.mirror.apply(self._records(0, record.round))
            if self.log is not None:
                self.log.append(record)
        except BaseException:
            self.records.truncate(len(self.records) - 1)
            if self.mirror.applied != len(self.records):  # the log failed, or the move between two blocks
                self.mirror.reset()
                self.mirror.apply(self._records(0, 0))
            raise
        if self._due(record.round) and self.log is not None:
            self.log.append(DigestRecord(self.epoch, len(self.records), self.digest()))

    def restart(self, log: Log, round: int) -> None:
        """Take up a log's records before `round`; those from there on are void, and a new epoch starts.

        It starts also where the log has no later ones: it may have had some, as the log of which this is a copy has.

        Raises LogError for a log that has fewer.
        """
        rounds = log.rounds
        if len(rounds) < round:
            raise LogError(f"the log ends after {len(rounds)} rounds, before the server's round {round}")
        log.append(EpochRecord(log.epoch + 1, round))
        self.log, self.epochs = log, log.epochs
        self.records = rounds[:round]
        self.mirror.reset()
        self.mirror.apply(self._records(0, 0))

    def show(self, half: nn.Module) -> None:
        """No-op: the mirror's tensors are those of `Setup.observed`."""

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

    weights: float32 [d]. rounds: those in them. epoch: which start of the server they are of; whoever takes up a saved
    state says it, for a state does not know of starts after it.
    """

    weights: Tensor
    rounds: int = field(default=0, kw_only=True)
    epoch: int = field(default=0, kw_only=True)

    @property
    def largest_answer(self) -> int:
        """How many numbers a client's answer holds."""
        return len(self.weights)

    def since(self, hello: Hello | Differs, from_client: bool = True) -> Weights:
        """The weights, unless the client has them."""
        current = hello.round == self.rounds and hello.epoch == self.epoch
        weights = torch.empty(0) if current else self.weights.detach()
        return Weights(client=hello.client, round=self.rounds, epoch=self.epoch, weights=weights)

    def show(self, half: nn.Module) -> None:
        """Write the weights into a copy of the client half."""
        load_vector(self.weights, trainable(half)[0])

    def state(self) -> State:
        return {"weights": self.weights.detach()}, {"rounds": self.rounds}

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        with torch.no_grad():
            self.weights.copy_(tensors["weights"])
        self.rounds = info["rounds"]


def load_vector(vector: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Write a flat vector into parameters, each keeping its dtype and device."""
    with torch.no_grad():
        for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


ADAM = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


MOMENTUM = 0.9


def make_optimizer(
    rule: str, parameters: list[Tensor], betas: tuple[float, float] = ADAM.betas
) -> torch.optim.Optimizer:
    """The server's optimizer of numbers that stand for the client half: pool coefficients, or averaged weights."""
    if rule == "adamw":
        return torch.optim.AdamW(parameters, betas=betas, eps=ADAM.eps, weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=1.0, momentum=MOMENTUM if rule == "momentum" else 0.0)
