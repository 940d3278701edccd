"""First-order split learning: exact gradients on both halves. The upper bound.

Per client and round: the cut (size z) and labels go up, the multiplier (z) comes down, the gradient of all d weights
goes up; the weights (d) come down. Server and client half each take one step of g = mean of the clients' gradients.
Gupta and Raskar, "Distributed learning of deep neural network over multiple agents", 2018.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hosfl.halves.inputs import Batch, Inputs, call, evaluating, microbatches
from hosfl.halves.narrow import recompute_wide_weights
from hosfl.methods.client import Client
from hosfl.methods.gathered import clip_factor
from hosfl.methods.ledger import Ledger, Rate, State, WholeWeights, descend, load_vector, make_optimizer, step_size
from hosfl.methods.method import LEARNS, MULTIPLIERS, Method, Way
from hosfl.methods.state import pack_optimizer, part, prefixed, unpack_optimizer
from hosfl.methods.tensors import LONGEST, usable
from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import Aggregation, RunningLength, weighted_mean
from hosfl.protocol.messages import (
    Gradient,
    Message,
    MessageError,
    Weights,
)
from hosfl.settings import Settings


@dataclass
class FirstOrderClient(Client):
    """First-order split learning's client: backpropagates the multiplier through its half and sends the whole gradient.

        gradient = d <multiplier, f(x; theta)> / d theta      float32 [d]

    The most that a client can tell the server. It costs backpropagation, and d numbers up and d down in every round.

    Source: Gupta and Raskar, "Distributed learning of deep neural network over multiple agents", 2018.

    Args:
        Everything as in `Client`.
    """

    learns = True

    def catch_up(self, message: Message) -> None:
        """Load the averaged weights. Raises MessageError."""
        if not isinstance(message, Weights):
            raise MessageError(f"client {self.number} expects weights, got {type(message).__name__}")
        self._check_addressee(message)
        sent, own = (message.epoch, message.round), (self.epoch, self.applied)
        if sent < own or (sent != own and not len(message.weights)):
            raise MessageError(f"{len(message.weights)} weights of (epoch, round) {sent}; this client is at {own}")
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
        """The gradient, float32 [d], by backpropagation in eval mode, in which clients always run."""
        parameters, _ = trainable(self.half)
        multipliers = multiplier.split(self.microbatch or len(multiplier))
        begin = time.perf_counter()
        sums: list[Tensor] = []
        with evaluating(self.half), torch.enable_grad(), recompute_wide_weights():
            for part, m in zip(microbatches(self._inputs, self.microbatch), multipliers, strict=True):
                gradients = [g.float() for g in torch.autograd.grad(self._forward_with_graph(part), parameters, m)]
                # Not in place, since gradients may share memory with each other and with the multiplier.
                sums = [s + g for s, g in zip(sums, gradients, strict=True)] if sums else gradients
        self.seconds.answer += time.perf_counter() - begin
        self._count(forward=1, backward=1)
        return torch.cat([g.reshape(-1) for g in sums])

    def _forward_with_graph(self, inputs: Inputs) -> Tensor:
        """The half's output, with a graph."""
        cut: Tensor = call(self.half, inputs)
        return cut


@dataclass
class GradientAverage(WholeWeights):
    """The ledger of first-order split learning: the weights take one optimizer step with the clients' average gradient.

    Args:
        weights: of the client half that move, end to end: float32 [d].
        optimizer: of these weights.
        rate: round -> learning rate.
        length: as in `FreshStep`.
        aggregation: of the clients' gradients.
        clip: the largest L2 norm of one client's gradient; None: any.
        rounds: how many are in the weights.
        epoch: of the server: how often it was restarted.
    """

    optimizer: torch.optim.Optimizer
    rate: Rate
    length: RunningLength | None = None
    aggregation: Aggregation = weighted_mean
    clip: float | None = None
    expects: ClassVar[type[Message]] = Gradient

    def check(self, message: Gradient) -> None:
        """Raises MessageError for a gradient that cannot be averaged."""
        if message.gradient.shape != self.weights.shape:
            raise MessageError(f"{len(message.gradient)} gradient elements for {len(self.weights)} weights")
        if not usable([message.gradient]):
            raise MessageError(f"a gradient that is infinite or NaN, or longer than {LONGEST:g}")

    def commit(self, round: int, answers: Sequence[Gradient], weights: Sequence[float]) -> None:
        """One step of the optimizer with the averaged gradient."""
        if answers:
            values = [a.gradient for a in answers]
            if self.clip is not None:
                values = [v * clip_factor([v], self.clip) for v in values]
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


class FirstOrder(Method):
    """Exact gradients. Clients must backpropagate, and weights are sent in every round."""

    reads: ClassVar[tuple[str, ...]] = (*LEARNS, *MULTIPLIERS, "clip", "microbatch", "multiplier", "server_first")
    ways: ClassVar[dict[str, Way]] = {"first-order": ({}, (0.5, 1.0, 2.0))}

    @classmethod
    def tuned(cls, settings: Settings) -> tuple[str, ...]:
        return ("first-order", settings.rule)

    def make_ledger(self) -> Ledger:
        setup, settings = self.setup, self.settings
        weights = setup.flat().requires_grad_()
        optimizer, rate = make_optimizer(settings.rule, [weights]), self.rate(setup.rates.client)
        return GradientAverage(weights, optimizer, rate, setup.length(), setup.aggregation, settings.clip)

    def client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        return FirstOrderClient(number, half, batch, passes=self.setup.passes, microbatch=self.settings.microbatch)
