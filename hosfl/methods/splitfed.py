"""SplitFed: each client trains its half for E steps, then their weights are averaged.

Per client and round: E cuts (E z) and labels go up, E multipliers (E z) come down, all d weights go up and down.
Thapa et al., "SplitFed: when federated learning meets split learning", AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hosfl.halves.inputs import Batch
from hosfl.methods.client import Client
from hosfl.methods.first_order import FirstOrderClient
from hosfl.methods.ledger import (
    Ledger,
    OptimizerFactory,
    Rate,
    WholeWeights,
    descend,
    load_vector,
    make_optimizer,
    step_size,
)
from hosfl.methods.method import LEARNS, MULTIPLIERS, Method, Way
from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import Aggregation, RunningLength, weighted_mean
from hosfl.protocol.messages import Cut, Message, MessageError, Trained
from hosfl.references import short_name
from hosfl.settings import Settings


@dataclass
class SplitFedClient(FirstOrderClient):
    """SplitFed's client (Thapa et al., AAAI 2022): makes E steps of its own, then sends its weights to be averaged.

    Its rounds are exchanges: those of the run's round r have the numbers r E, ..., r E + E - 1.

    steps: E. optimizer: makes the optimizer of its weights, anew in every round, as averaging voids moments. rate:
    exchange -> learning rate. normalized: divide it by the running length of this round's gradients.

    The server makes one step per exchange from all clients' cuts, as in SplitLoRA. The paper of SplitFed has several
    variants, the first of which averages copies of the server half instead.
    """

    optimizer: OptimizerFactory = field(kw_only=True)
    rate: Rate = field(kw_only=True)
    normalized: bool = field(kw_only=True)
    steps: int = field(kw_only=True, default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parameters, self.streams = trainable(self.half)
        # float32 also if the half's dtype is coarser, which would lose small steps.
        self.weights = nn.utils.parameters_to_vector(self.parameters).detach().float().cpu()

    def catch_up(self, message: Message) -> None:
        super().catch_up(message)
        weights: Tensor = message.weights  # type: ignore[attr-defined]
        if len(weights):
            self.weights = weights

    def output(self, round: int) -> Cut:
        if round % self.steps == 0:
            self.weights = self.weights.detach().clone().requires_grad_()
            self._optimizer = self.optimizer([self.weights])
            self._length = RunningLength() if self.normalized else None
        return super().output(round)

    def answer(self, message: Message) -> Message:
        """Make a step. Returns the next exchange's cut, or the weights after the round's last step."""
        gradient = self._gradient(self._multiplier(message)).cpu()
        return self._step(gradient, float(gradient.double().square().sum()))

    def _step(self, gradient: Tensor, square: float) -> Message:
        rate = step_size(self.rate, self._length, self._round, square)
        descend(self.weights, gradient, self._optimizer, rate)
        load_vector(self.weights.detach(), self.parameters)
        if (self._round + 1) % self.steps:
            return self.output(self._round + 1)
        round = self._round // self.steps
        return Trained(client=self.number, round=round, epoch=self.epoch, weights=self.weights)


@dataclass
class WeightAverage(WholeWeights):
    """The ledger of federated averaging: the mean of the clients' weights becomes everyone's next half.

    aggregation: of the clients' weights, each weighted by its number of samples.
    """

    aggregation: Aggregation = weighted_mean
    expects: ClassVar[type[Message]] = Trained

    def check(self, message: Trained) -> None:
        """Raises MessageError for weights that cannot be averaged."""
        if message.weights.shape != self.weights.shape:
            raise MessageError(f"{len(message.weights)} weights where the half has {len(self.weights)}")
        if not torch.isfinite(message.weights).all():
            raise MessageError("infinite or NaN weights")

    def commit(self, round: int, answers: Sequence[Trained], weights: Sequence[float]) -> None:
        """Commit the clients' average; the weights stay if there are no answers."""
        if answers:
            self.weights = self.aggregation([a.weights for a in answers], weights).float()
        self.rounds = round + 1


class SplitFed(Method):
    """Both halves by backpropagation; E = local_steps between two averages of the clients' halves."""

    reads: ClassVar[tuple[str, ...]] = (*LEARNS, *MULTIPLIERS, "microbatch", "local_steps")
    ways: ClassVar[dict[str, Way]] = {"splitfed": ({}, (0.2, 0.4, 0.8))}

    @classmethod
    def tuned(cls, settings: Settings) -> tuple[str, ...]:
        return (short_name(settings.method), settings.rule)

    @classmethod
    def exchanges(cls, settings: Settings) -> int:
        return settings.local_steps

    def make_ledger(self) -> Ledger:
        return WeightAverage(self.setup.flat(), self.setup.aggregation)

    def step_settings(self) -> dict[str, Any]:
        """The arguments of a client that makes its own steps."""
        return {
            "passes": self.setup.passes,
            "microbatch": self.settings.microbatch,
            "optimizer": partial(make_optimizer, self.settings.rule),
            "rate": self.rate(self.setup.rates.client),
            "normalized": self.settings.rule == "normalized",
            "steps": self.exchanges(self.settings),
        }

    def client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        return SplitFedClient(number, half, batch, **self.step_settings())
