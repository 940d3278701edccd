"""The client: owns its half of the model and its data, and talks in messages only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hosfl.halves.narrow import made_again
from hosfl.probing.displaced import Inputs, call, parts_of
from hosfl.probing.probe import evaluating, probe_backward, probe_forward, probe_in_place, probe_untouched, trainable
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.messages import (
    Cut,
    Differs,
    Gradient,
    Hello,
    Message,
    MessageError,
    Multiplier,
    PoolMoves,
    Records,
    Scalars,
    Weights,
)
from hosfl.protocol.replica import DigestMismatch, Replica, Run, digest, digest_array

Batch = tuple[Inputs, Tensor]  # inputs, labels


@dataclass
class Seconds:
    """Time a client spent: on plain forward passes, and on answering multipliers (probing, or backpropagation)."""

    forward: float = 0.0
    answer: float = 0.0
    rounds: int = 0


@dataclass
class Client:
    """A client whose half stays as it is: the control that every other kind must beat.

    `batch(round)` draws this client's batch. `applied` counts the rounds that its weights contain, `epoch` is the
    server's when they came. passes: where samples that go forward and backward through the half are counted; the
    run's, if it is given. microbatch: samples that a client which backpropagates takes together; 0: all.
    """

    number: int
    half: nn.Module
    batch: Callable[[int], Batch]
    learns = False
    applied: int = 0
    epoch: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    passes: Counter[str] = field(default_factory=Counter)
    microbatch: int = 0

    def __post_init__(self) -> None:
        self._round = -1  # of the last cut: there is none yet

    def hello(self) -> Hello:
        """Ask for everything after the last round applied."""
        return Hello(client=self.number, round=self.applied, epoch=self.epoch)

    def catch_up(self, message: Message) -> Differs | None:
        """Take what was committed since. Returns what the client has to say if its half turns out to be wrong."""
        return None

    def output(self, round: int) -> Cut:
        """Draw the round's batch and send the client half's output for it: eval mode, no graph."""
        self._round = round
        self._inputs, self._labels = self.batch(round)
        begin = time.perf_counter()
        with evaluating(self.half):
            self._cut = call(self.half, self._inputs)
        self.seconds.forward += time.perf_counter() - begin
        self.seconds.rounds += 1
        self._count(forward=1)
        masks = {}
        if isinstance(self._inputs, Mapping) and "attention_mask" in self._inputs:
            masks["mask"] = self._inputs["attention_mask"].to(torch.uint8)
        return Cut(
            client=self.number,
            round=round,
            epoch=self.epoch,
            cut=self._cut,
            labels=self._labels.to(torch.int32),
            **masks,
        )

    def _count(self, forward: int = 0, backward: int = 0) -> None:
        """So many passes of the round's batch."""
        self.passes["client forward"] += forward * len(self._labels)
        self.passes["client backward"] += backward * len(self._labels)

    def answer(self, message: Message) -> Message:
        """What the client sends for its multiplier. Raises MessageError for one that is not for its last cut."""
        raise NotImplementedError("a frozen client is sent no multipliers")

    def _multiplier(self, message: Message) -> Tensor:
        if not isinstance(message, Multiplier):
            raise MessageError(f"client {self.number} expects a multiplier, got {type(message).__name__}")
        if (message.round, message.epoch, message.client) != (self._round, self.epoch, self.number):
            raise MessageError(
                f"client {self.number} is in round {self._round} of epoch {self.epoch}; this multiplier is for client"
                f" {message.client} in round {message.round} of epoch {message.epoch}"
            )
        cut, multiplier = self._cut, message.multiplier
        if (multiplier.shape, multiplier.dtype) != (cut.shape, cut.dtype):
            other = f"{multiplier.dtype} {tuple(multiplier.shape)}"
            raise MessageError(f"the cut is {cut.dtype} {tuple(cut.shape)}, the multiplier {other}")
        if not torch.isfinite(message.multiplier).all():
            raise MessageError("a multiplier with infinite or NaN elements")
        return multiplier.to(cut.device)

    def _check_addressee(self, message: Message) -> None:
        if message.client != self.number:
            raise MessageError(f"a message for client {message.client}, this is client {self.number}")

    def digest(self) -> str:
        """SHA-256 of the client half's parameters and buffers, their bits in order."""
        return digest([*self.half.parameters(), *self.half.buffers()]).hex()


@dataclass
class ZerothOrderClient(Client):
    """HO-SFL's client: P perturbed forward passes per multiplier, P scalars up, committed records replayed.

    With the estimator "backward" the P scalars come from one backward pass instead.
    base: gives the trainable tensors of round 0 again, for a client that must start anew; default: it keeps a copy. A
    device short of memory reads its base model's file.
    """

    run: Run = field(kw_only=True)
    base: Callable[[], Sequence[Tensor]] | None = field(kw_only=True, default=None)
    learns = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parameters, self.streams = trainable(self.half)
        if self.base is None:
            copies = [p.detach().clone() for p in self.parameters]
            self.base = lambda: copies
        self.replica = Replica(self.parameters, self.streams, self.run, self.base)

    def take_up(
        self,
        tensors: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        applied: int,
        epoch: int,
        lattice: Lattice | None,
    ) -> None:
        """Become the copy of a replica's state."""
        self.replica.take_up(tensors, moments, applied, epoch, lattice)
        self.applied, self.epoch = applied, epoch

    def catch_up(self, message: Message) -> Differs | None:
        """Replay what was committed since: see `Replica.apply`.

        A client whose half is not the server's goes back to its base and says so; the server's answer to that brings
        it up to date. Raises MessageError and LatticeError.
        """
        if not isinstance(message, (Records, PoolMoves)):
            raise MessageError(f"client {self.number} expects records, got {type(message).__name__}")
        self._check_addressee(message)
        said = None
        try:
            self.replica.apply(message)
        except DigestMismatch:
            wrong = digest_array(self.replica.digest())
            said = Differs(client=self.number, round=self.replica.applied, epoch=self.replica.epoch, digest=wrong)
            self.replica.reset()
        finally:
            self.applied, self.epoch = self.replica.applied, self.replica.epoch
        return said

    def answer(self, message: Message) -> Scalars:
        """Probe the round's directions. The weights hold the same bits afterwards."""
        multiplier, run = self._multiplier(message), self.run
        seeds = run.seeds(self._round)
        begin = time.perf_counter()
        two_sided = run.estimator == "two-sided"
        with evaluating(self.half):
            if run.estimator == "forward":
                scalars = probe_forward(self.half, self._inputs, multiplier, seeds, run.dist, run.factors)
            elif run.estimator == "backward":
                scalars = probe_backward(
                    self.half, self._inputs, multiplier, seeds, run.dist, run.factors, self.microbatch
                )
            elif run.lattice is not None:
                scalars = probe_in_place(
                    lambda: call(self.half, self._inputs),
                    self.parameters,
                    self.streams,
                    multiplier,
                    self._cut,
                    seeds,
                    self.replica.mu,
                    run.factors,
                    two_sided,
                )
            else:
                scalars = probe_untouched(
                    self.half,
                    self._inputs,
                    multiplier,
                    self._cut,
                    seeds,
                    self.replica.mu,
                    run.dist,
                    run.factors,
                    two_sided,
                )
        self.seconds.answer += time.perf_counter() - begin
        if run.estimator == "backward":
            self._count(forward=1, backward=1)
        else:
            self._count(forward=(2 if two_sided else 1) * len(seeds))
        return Scalars(client=self.number, round=self._round, epoch=self.epoch, scalars=scalars)


def load_vector(vector: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Write a flat vector into parameters, each keeping its dtype and device."""
    with torch.no_grad():
        for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


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
        self._check_addressee(message)
        at, here = (message.epoch, message.round), (self.epoch, self.applied)
        if at < here or (at != here and not len(message.weights)):
            raise MessageError(f"{len(message.weights)} weights of (epoch, round) {at}; this client is at {here}")
        parameters, _ = trainable(self.half)
        weights = message.weights
        if len(weights) not in (0, sum(p.numel() for p in parameters)):
            raise MessageError(f"{len(weights)} weights for a half of {sum(p.numel() for p in parameters)}")
        if not torch.isfinite(weights).all():
            raise MessageError("weights that are infinite or NaN")
        if len(weights):
            load_vector(weights, parameters)
        self.applied, self.epoch = message.round, message.epoch

    def answer(self, message: Message) -> Message:
        """d <multiplier, f(x)> / d weights, as a Gradient."""
        gradient = self._gradient(self._multiplier(message))
        return Gradient(client=self.number, round=self._round, epoch=self.epoch, gradient=gradient)

    def _gradient(self, multiplier: Tensor) -> Tensor:
        """float32 [d], by backpropagation; eval mode as everywhere on clients."""
        parameters, _ = trainable(self.half)
        multipliers = multiplier.split(self.microbatch or len(multiplier))
        begin = time.perf_counter()
        sums: list[Tensor] = []
        with evaluating(self.half), torch.enable_grad(), made_again():
            for part, m in zip(parts_of(self._inputs, self.microbatch), multipliers, strict=True):
                gradients = [g.float() for g in torch.autograd.grad(self._recorded(part), parameters, m)]
                # Not in place: gradients may share memory with each other and with the multiplier.
                sums = [s + g for s, g in zip(sums, gradients, strict=True)] if sums else gradients
        self.seconds.answer += time.perf_counter() - begin
        self._count(forward=1, backward=1)
        return torch.cat([g.reshape(-1) for g in sums])

    def _recorded(self, inputs: Inputs) -> Tensor:
        """The half's output, for backpropagation."""
        cut: Tensor = call(self.half, inputs)
        return cut
