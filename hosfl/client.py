"""The client: owns its half of the model and its data, and talks in messages only."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hosfl.lattice import Lattice, LatticeError, spread
from hosfl.messages import Cut, Gradient, Hello, Message, MessageError, Multiplier, Records, Scalars, Weights
from hosfl.probe import evaluating, probe_in_place, probe_untouched, trainable
from hosfl.seeds import direction_seeds
from hosfl_kernels import replay_

Batch = tuple[Tensor, Tensor]  # inputs, labels


@dataclass(frozen=True)
class Run:
    """What client and server agree on before round 0, beside the weights. It never travels again.

    seed: the run's seed. directions: P. dist: of the directions. mu: the size of a probe's step.
    lattice: where the client half lives, or None where it lives on none.
    """

    seed: int
    directions: int
    dist: str
    mu: float
    lattice: Lattice | None


@dataclass
class Seconds:
    """Time a client spent: on plain forward passes, and on answering multipliers (probing, or backpropagation)."""

    forward: float = 0.0
    answer: float = 0.0
    rounds: int = 0


@dataclass
class Client:
    """A client whose half stays as it is: the control that every other kind must beat.

    `batch(round)` draws this client's batch. `applied` counts the rounds that its weights contain.
    """

    number: int
    half: nn.Module
    batch: Callable[[int], Batch]
    learns = False
    applied: int = 0
    seconds: Seconds = field(default_factory=Seconds)

    def hello(self) -> Hello:
        """Ask for everything after the last round applied."""
        return Hello(client=self.number, round=self.applied)

    def catch_up(self, message: Message) -> None:
        """Take what was committed since; nothing for a frozen half."""

    def output(self, round: int) -> Cut:
        """Draw the round's batch and send the client half's output for it: eval mode, no graph."""
        self._round = round
        self._inputs, labels = self.batch(round)
        begin = time.perf_counter()
        with evaluating(self.half):
            self._cut = self.half(self._inputs)
        self.seconds.forward += time.perf_counter() - begin
        self.seconds.rounds += 1
        return Cut(client=self.number, round=round, cut=self._cut, labels=labels.to(torch.int32))

    def answer(self, message: Multiplier) -> Message:
        """What the client sends for its multiplier. Raises MessageError for one that is not for its last cut."""
        raise NotImplementedError("a frozen client is sent no multipliers")

    def _multiplier(self, message: Multiplier) -> Tensor:
        if message.round != self._round or message.client != self.number:
            raise MessageError(
                f"client {self.number} is in round {self._round}; this multiplier is for client {message.client}"
                f" in round {message.round}"
            )
        if message.multiplier.shape != self._cut.shape:
            raise MessageError(f"the cut is {tuple(self._cut.shape)}, the multiplier {tuple(message.multiplier.shape)}")
        return message.multiplier.to(self._cut.device)

    def digest(self) -> str:
        """SHA-256 of the client half's parameters and buffers, their bits in order."""
        sha = hashlib.sha256()
        for tensor in (*self.half.parameters(), *self.half.buffers()):
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


@dataclass
class ZerothOrderClient(Client):
    """HO-SFL's client: P perturbed forward passes per multiplier, P scalars up, committed records replayed."""

    run: Run = field(kw_only=True)
    learns = True

    def __post_init__(self) -> None:
        self.parameters, self.streams = trainable(self.half)
        self._largest = float("inf")  # an upper bound of |weight|, made exact when it matters

    def catch_up(self, message: Message) -> None:
        """Replay records in one pass. Rounds already applied are skipped: the same message twice is harmless.

        Raises MessageError for records that do not follow on or are malformed, LatticeError for ones that would carry
        a weight off the lattice; rounds before the one at fault are applied, it and later ones are not.
        """
        if not isinstance(message, Records):
            raise MessageError(f"client {self.number} expects records, got {type(message).__name__}")
        rows = message.coefficients
        if message.round > self.applied:
            raise MessageError(f"records start at round {message.round}, client {self.number} is at {self.applied}")
        if rows.shape[1] != self.run.directions:
            raise MessageError(f"records of {rows.shape[1]} directions in a run of {self.run.directions}")
        if not torch.isfinite(rows).all():
            raise MessageError("records with infinite or NaN coefficients")
        self._replay(rows[self.applied - message.round :])

    def _replay(self, rows: Tensor) -> None:
        if not len(rows):
            return
        lattice = self.run.lattice
        if lattice is not None and not self._fits(lattice, spread(rows)):
            if len(rows) == 1:
                raise LatticeError(
                    f"round {self.applied} would carry weights beyond {lattice.limit:g}, where the lattice ends: lower"
                    " the client's rate, or start from weights rescaled to a larger maximum"
                )
            # Together they might; one after another they may not: the order of halves is the order of rounds.
            self._replay(rows[: len(rows) // 2])
            self._replay(rows[len(rows) // 2 :])
            return
        seeds = [
            seed
            for round in range(self.applied, self.applied + len(rows))
            for seed in direction_seeds(self.run.seed, round, self.run.directions)
        ]
        with torch.no_grad():
            replay_(self.parameters, seeds, rows.reshape(-1), dist=self.run.dist, streams=self.streams)
        self.applied += len(rows)
        self._largest += spread(rows)

    def _fits(self, lattice: Lattice, distance: float) -> bool:
        distance += self.run.mu  # probes must fit too
        if self._largest + distance > lattice.limit:
            self._largest = max((float(p.detach().abs().amax()) for p in self.parameters if p.numel()), default=0.0)
        return self._largest + distance <= lattice.limit

    def answer(self, message: Multiplier) -> Scalars:
        """Probe the round's directions. The weights hold the same bits afterwards."""
        multiplier = self._multiplier(message)
        seeds = direction_seeds(self.run.seed, self._round, self.run.directions)
        begin = time.perf_counter()
        with evaluating(self.half):
            if self.run.lattice is not None:
                scalars = probe_in_place(
                    lambda: self.half(self._inputs),
                    self.parameters,
                    self.streams,
                    multiplier,
                    self._cut,
                    seeds,
                    self.run.mu,
                )
            else:
                scalars = probe_untouched(
                    self.half, self._inputs, multiplier, self._cut, seeds, self.run.mu, self.run.dist
                )
        self.seconds.answer += time.perf_counter() - begin
        return Scalars(client=self.number, round=self._round, scalars=scalars)


@dataclass
class FirstOrderClient(Client):
    """First-order split learning: backpropagates the multiplier through its half and sends the whole gradient.

    The upper bound: exact gradients, at the price of a client that can backpropagate and of weights that travel.
    """

    learns = True

    def catch_up(self, message: Message) -> None:
        """Take the averaged weights."""
        if not isinstance(message, Weights):
            raise MessageError(f"client {self.number} expects weights, got {type(message).__name__}")
        parameters, _ = trainable(self.half)
        weights = message.weights
        if message.round == self.applied:
            return
        if len(weights) != sum(p.numel() for p in parameters):
            raise MessageError(f"{len(weights)} weights for a half of {sum(p.numel() for p in parameters)}")
        with torch.no_grad():
            nn.utils.vector_to_parameters(weights.to(parameters[0].device), parameters)
        self.applied = message.round

    def answer(self, message: Multiplier) -> Gradient:
        """d <multiplier, f(x)> / d weights, by backpropagation; eval mode as everywhere on clients."""
        multiplier = self._multiplier(message)
        parameters, _ = trainable(self.half)
        begin = time.perf_counter()
        with evaluating(self.half), torch.enable_grad():
            gradients = torch.autograd.grad(self.half(self._inputs), parameters, multiplier)
        self.seconds.answer += time.perf_counter() - begin
        flat = torch.cat([g.reshape(-1) for g in gradients])
        return Gradient(client=self.number, round=self._round, gradient=flat)
