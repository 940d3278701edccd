"""HOSL: the client half by zeroth order, the server half by backpropagation, and no gradient ever comes down.

Per client and round: the cut and 2 P displaced cuts ((1 + 2 P) z) and labels go up, 2 P losses come down; all d weights
go up and down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from hosfl.halves.inputs import Batch
from hosfl.methods.client import Client
from hosfl.methods.ledger import Ledger
from hosfl.methods.losses import LossServer, displaced_outputs
from hosfl.methods.method import LEARNS, PROBES, Way
from hosfl.methods.server import Server
from hosfl.methods.splitfed import SplitFed, SplitFedClient
from hosfl.probing.displaced import refuse_references
from hosfl.protocol.messages import Cut, Losses, Message, MessageError, ProbedCut
from hosfl.protocol.seeds import Purpose, direction_seeds
from hosfl.settings import Settings
from hosfl_kernels import derive, replay_


@dataclass
class HOSLClient(SplitFedClient):
    """HOSL's client: SPSA. Cuts at th +- mu u go up, the server's losses of them come down, and no gradient ever.

    v_p = (loss at th + mu u_p - loss at th - mu u_p) / (2 mu); ghat = (1/P) sum_p v_p u_p, with directions of the
    client's own. Takes its step, and sends its weights to be averaged.

    Assumed, from a description of the method and not from its code: the server learns by backpropagation from the cut
    at th itself, which goes up as well; the losses are those before its step, in eval mode; clients average after
    every step.
    """

    seed: int = field(kw_only=True)
    directions: int = field(kw_only=True)
    dist: str = field(kw_only=True)
    mu: float = field(kw_only=True)

    def output(self, round: int) -> Cut:
        cut = super().output(round)
        begin = time.perf_counter()
        shared = direction_seeds(self.seed, round, self.directions, Purpose.OWN)
        self._seeds = [derive(seed, self.number, 0) for seed in shared]
        factors = [1.0] * len(self.parameters)
        moved = displaced_outputs(self.half, self._inputs, self._seeds, (self.mu, -self.mu), self.dist, factors)
        self.seconds.answer += time.perf_counter() - begin
        self._count(forward=len(moved))
        return ProbedCut(**vars(cut), displaced=moved)

    def answer(self, message: Message) -> Message:
        """A step along the directions by the losses, and the weights. Raises MessageError for other losses."""
        if not isinstance(message, Losses):
            raise MessageError(f"client {self.number} expects losses, got {type(message).__name__}")
        self._check_addressee(message)
        losses = message.losses.double()
        if (message.round, message.epoch) != (self._round, self.epoch) or len(losses) != 2 * self.directions:
            raise MessageError(
                f"{len(losses)} losses of round {message.round}, epoch {message.epoch}; this client waits for"
                f" {2 * self.directions} of round {self._round}, epoch {self.epoch}"
            )
        scalars = (losses[::2] - losses[1::2]) / (2 * self.mu)
        if not torch.isfinite(scalars.float()).all():
            raise MessageError("losses that are infinite or NaN, or too far apart")
        pieces = [torch.zeros(p.shape) for p in self.parameters]
        replay_(pieces, self._seeds, (scalars / len(scalars)).tolist(), dist=self.dist, streams=self.streams)
        return self._step(torch.cat([p.reshape(-1) for p in pieces]), float(scalars.square().mean()))


@dataclass
class HOSLServer(LossServer):
    """Sends the losses of the displaced cuts, and learns by backpropagation from the cut itself."""

    def _answer_and_loss(self, round: int, message: Cut) -> tuple[Message | None, float]:
        assert isinstance(message, ProbedCut)
        losses = self._losses(message, [*message.displaced]).float()
        _, loss = self._backward(message.cut, message.labels, message.mask)
        return Losses(client=message.client, round=round, epoch=self.epoch, losses=losses), loss


class HOSL(SplitFed):
    """SPSA from the server's losses, with a client's own directions; weights are averaged after every step."""

    reads: ClassVar[tuple[str, ...]] = (*LEARNS, *PROBES)
    estimators = ("one-sided", "two-sided")
    ways: ClassVar[dict[str, Way]] = {"hosl": ({}, (0.1, 0.2, 0.4))}

    @classmethod
    def exchanges(cls, settings: Settings) -> int:
        return 1

    def make_ledger(self) -> Ledger:
        refuse_references(self.setup.base, self.setup.sample)
        return super().make_ledger()

    def client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        probing = {name: getattr(self.settings, name) for name in ("seed", *PROBES)}
        return HOSLClient(number, half, batch, **self.own_steps(), **probing)

    def server(self, **shared: Any) -> Server:
        return HOSLServer(**shared, probes=2 * self.settings.directions)
