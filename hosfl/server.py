"""The server: owns the heavy half, makes the multipliers, and keeps what was committed about the client half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hosfl.aggregate import RunningLength, commit, sgd_coefficients, weighted_mean
from hosfl.client import Run
from hosfl.messages import Cut, Gradient, Hello, Message, MessageError, Multiplier, Records, Scalars, Weights
from hosfl.seeds import Purpose, generator

Rate = Callable[[int], float]  # the learning rate of a round


@dataclass
class SeedReplay:
    """HO-SFL: the client half is its base weights and a list of records, P numbers each.

    length: divides the rate, for normalised steps; None for plain SGD.
    """

    run: Run
    rate: Rate
    length: RunningLength | None = None
    records: list[Tensor] = field(default_factory=list)
    expects = Scalars

    def since(self, hello: Hello) -> Records:
        """Every record after the client's last."""
        if hello.round > len(self.records):
            raise MessageError(f"client {hello.client} claims {hello.round} rounds of {len(self.records)}")
        rows = self.records[hello.round :]
        empty = torch.empty(0, self.run.directions)
        return Records(client=hello.client, round=hello.round, coefficients=torch.stack(rows) if rows else empty)

    def check(self, message: Scalars) -> None:
        """Raises MessageError for scalars that cannot be averaged."""
        if len(message.scalars) != self.run.directions:
            raise MessageError(f"{len(message.scalars)} scalars in a run of {self.run.directions} directions")
        if not torch.isfinite(message.scalars).all():
            raise MessageError("infinite or NaN scalars")

    def commit(self, round: int, answers: Sequence[Scalars], weights: Sequence[float]) -> None:
        """Average and commit; with no answers, an empty record: no step."""
        if answers:
            mean = weighted_mean([a.scalars for a in answers], weights)
            length = self.length.update(float((mean**2).mean())) if self.length else 1.0
            coefficients = sgd_coefficients(mean, self.rate(round) / length)
            self.records.append(commit(coefficients, self.run.lattice, self.run.seed, round))
        else:
            self.records.append(torch.zeros(self.run.directions))


@dataclass
class GradientAverage:
    """First-order split learning: the client half's weights live here and travel whole. length: as in SeedReplay."""

    weights: Tensor
    rate: Rate
    length: RunningLength | None = None
    rounds: int = 0
    expects = Gradient

    def since(self, hello: Hello) -> Weights:
        """The weights, unless the client has them."""
        current = hello.round == self.rounds
        weights = torch.empty(0) if current else self.weights
        return Weights(client=hello.client, round=self.rounds, weights=weights)

    def check(self, message: Gradient) -> None:
        """Raises MessageError for a gradient that cannot be averaged."""
        if message.gradient.shape != self.weights.shape:
            raise MessageError(f"{len(message.gradient)} gradient elements for {len(self.weights)} weights")
        if not torch.isfinite(message.gradient).all():
            raise MessageError("infinite or NaN gradient")

    def commit(self, round: int, answers: Sequence[Gradient], weights: Sequence[float]) -> None:
        """One step of SGD with the averaged gradient."""
        if answers:
            mean = weighted_mean([a.gradient for a in answers], weights)
            length = self.length.update(float((mean**2).sum())) if self.length else 1.0
            self.weights = (self.weights.double() - self.rate(round) / length * mean).float()
        self.rounds = round + 1


@dataclass
class Server:
    """The first-order half of HO-SFL.

    loss: (output, labels) -> mean loss over the batch. ledger: what is known of the client half; None where it is
    frozen. cut_shape: of one sample. classes: labels are below it. refused: the reasons for which messages were not
    taken; such a message changes nothing.
    """

    half: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    rate: Rate
    ledger: SeedReplay | GradientAverage | None
    seed: int
    cut_shape: tuple[int, ...]
    classes: int
    refused: list[str] = field(default_factory=list)

    def sample(self, round: int, clients: int, count: int) -> list[int]:
        """The clients of a round, a function of the run's seed."""
        chosen = generator(self.seed, Purpose.SAMPLING, round).choice(clients, count, replace=False)
        return sorted(int(c) for c in chosen)

    def welcome(self, hello: Hello) -> Message | None:
        """What the client must apply before it takes part; None where there is nothing to send, ever."""
        return None if self.ledger is None else self.ledger.since(hello)

    def step(self, round: int, cuts: Sequence[Cut]) -> tuple[dict[int, Multiplier], float]:
        """Forward and backward from every cut as a leaf, one optimizer step; multipliers by client, and the mean loss.

        A multiplier is the gradient of that client's own mean loss, with no 1/K inside; the half's own step takes the
        mean of the K gradients. With nothing acceptable there is no step, and the loss is NaN.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(round)
        self.half.train()
        self.optimizer.zero_grad()
        self._samples: dict[int, int] = {}
        multipliers, losses = {}, []
        for message in cuts:
            try:
                self._check_cut(round, message)
            except MessageError as error:
                self.refused.append(f"round {round}, client {message.client}: {error}")
                continue
            device = next(self.half.parameters()).device
            cut = message.cut.to(device).requires_grad_()
            loss = self.loss(self.half(cut), message.labels.to(device, torch.int64))
            loss.backward()
            assert cut.grad is not None
            multipliers[message.client] = Multiplier(client=message.client, round=round, multiplier=cut.grad)
            self._samples[message.client] = len(cut)
            losses.append(float(loss.detach()))
        if not losses:
            return {}, float("nan")
        for parameter in self.half.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(losses)
        self.optimizer.step()
        return multipliers, sum(losses) / len(losses)

    def _check_cut(self, round: int, message: Cut) -> None:
        if message.round != round:
            raise MessageError(f"a cut of round {message.round}")
        if message.client in self._samples:
            raise MessageError("a second cut in one round")
        shape, labels = tuple(message.cut.shape), message.labels
        if shape[1:] != self.cut_shape or shape[:1] != tuple(labels.shape) or not len(labels):
            raise MessageError(f"a cut of shape {shape}, labels {tuple(labels.shape)}; samples are {self.cut_shape}")
        if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
            raise MessageError(f"labels from {int(labels.min())} to {int(labels.max())} for {self.classes} classes")
        if not torch.isfinite(message.cut).all():
            raise MessageError("infinite or NaN elements in the cut")

    def commit(self, round: int, answers: Sequence[Message]) -> None:
        """Commit the round with those who answered, weighted by their numbers of samples."""
        if self.ledger is None:
            return
        accepted: dict[int, Message] = {}
        for message in answers:
            try:
                if not isinstance(message, self.ledger.expects) or message.round != round:
                    raise MessageError(f"{type(message).__name__} of round {message.round}")
                if message.client not in self._samples or message.client in accepted:
                    raise MessageError("an answer from a client that has no multiplier, or a second one")
                self.ledger.check(message)  # type: ignore[arg-type]
            except MessageError as error:
                self.refused.append(f"round {round}, client {message.client}: {error}")
                continue
            accepted[message.client] = message
        weights = [self._samples[client] for client in accepted]
        self.ledger.commit(round, list(accepted.values()), weights)  # type: ignore[arg-type]
