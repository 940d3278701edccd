"""Zeroth order on both halves (ZO-SFL): forward passes only, on either side.

Per client and round: the cut and P displaced cuts ((1 + P) z) and labels go up; P scalars per missed round come down.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from hosfl.methods.gathered import make_accumulator
from hosfl.methods.ho import HO, SCALARS, ZerothOrderClient
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.losses import LossServer, displaced_outputs, slopes
from hosfl.methods.method import PROBES, Way
from hosfl.methods.server import Server
from hosfl.methods.tensors import usable
from hosfl.probing.displaced import Displacement
from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import clip_to_norm
from hosfl.protocol.messages import Cut, Message, MessageError, ProbedCut, Scalars
from hosfl.protocol.seeds import Purpose, direction_seeds
from hosfl_kernels import replay_


@dataclass
class CutProbingClient(ZerothOrderClient):
    """Zeroth order without multipliers: sends its cut at P moved weights as well, and the server measures the losses.

    Directions are the round's, the same for all, and records are replayed as in HO-SFL: so the P scalars come down,
    no weights, and the log is the client half.
    """

    learns = False  # from anything but records

    def output(self, round: int) -> Cut:
        cut = super().output(round)
        begin = time.perf_counter()
        run, mu = self.run, self.replica.mu
        steps = (mu, -mu) if run.estimator == "two-sided" else (mu,)
        moved = displaced_outputs(self.half, self._inputs, run.seeds(round), steps, run.dist, run.factors)
        self.seconds.answer += time.perf_counter() - begin
        self._count(forward=len(moved))
        return ProbedCut(**vars(cut), displaced=moved)


@dataclass
class ZerothOrderServer(LossServer):
    """Zeroth order on both halves: nothing is ever backpropagated.

    The clients' scalars are differences of the losses of their displaced cuts at the server's weights as they are; the
    server half's are those of the cut itself at P moved weights of the server half, with seeds of its own. Two separate
    estimates: the second costs no bytes, and neither has the other half's noise in it, as moving both halves at once
    would. The server's optimizer takes the estimate as its gradient. Eval mode everywhere.

    steps: of the server per round, from the same cuts: 1 is ZO-SFL; more is MU-SplitFed (unbalanced updates: one of the
    client for tau of the server). Assumed for it: there is one server half, whose steps average the clients; clients
    take their losses before these steps, and the directions of a round are the same for all of them.
    """

    directions: int = field(kw_only=True)
    dist: str = field(kw_only=True)
    mu: float = field(kw_only=True)
    two_sided: bool = field(kw_only=True)
    steps: int = field(kw_only=True, default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._heard: list[Cut] = []
        self._measured: list[Message] = []
        self._seeded = 0  # the step's number, which its directions are drawn from

    def begin(self, round: int) -> None:
        super().begin(round)
        self._heard, self._measured, self._seeded = [], [], round * self.steps

    def end(self) -> tuple[dict[int, Message], float]:
        answers, loss = super().end()
        for number in range(self._round * self.steps + 1, (self._round + 1) * self.steps):
            self._seeded = number
            if sum(map(self._estimate, self._heard)):
                self._take_step()
        return answers, loss

    def _answer_and_loss(self, round: int, message: Cut) -> tuple[Message | None, float]:
        assert isinstance(message, ProbedCut)
        assert isinstance(self.ledger, SeedReplay)
        base, *rest = self._losses(message, [message.cut, *message.displaced])
        scalars = slopes(torch.stack(rest), base, self.ledger.mirror.mu, self.two_sided).float()
        if not torch.isfinite(scalars).all():
            raise MessageError("displaced cuts whose losses differ by infinite or NaN slopes")
        if not self._estimate(message):
            raise MessageError("a cut whose losses at moved weights are infinite or NaN, or too far apart")
        self._heard.append(message)
        self._measured.append(Scalars(client=message.client, round=round, epoch=self.epoch, scalars=scalars))
        return None, float(base)

    def _seeds(self) -> tuple[int, ...]:
        """The step's directions, which are the same for all clients: so that P numbers are one's gradient."""
        return direction_seeds(self.seed, self._seeded, self.directions, Purpose.SERVER)

    def _estimate(self, message: Cut) -> bool:
        """Gather the server half's slopes, as measured with one client's cut; False, and nothing, if there are none."""
        parameters, streams = trainable(self.half)
        steps = (self.mu, -self.mu) if self.two_sided else (self.mu,)
        moves = [Displacement(parameters, streams, seed, step, self.dist) for seed in self._seeds() for step in steps]
        try:
            base, *rest = self._losses(message, [message.cut], [None, *moves])
        except MessageError:
            return False
        found = [slopes(torch.stack(rest), base, self.mu, self.two_sided)]
        if not usable(found):
            return False
        if self.clip is not None:
            size = sum(p.numel() for p in parameters)
            found = clip_to_norm(found, self.clip, np.full(self.directions, size / self.directions**2))
        self._add(found, len(message.cut))
        return True

    def _take_step(self) -> None:
        """One step along the directions by the slopes that are gathered."""
        (found,), self._gathered = self._outliers.clipped(self._gathered.result()), make_accumulator(self.aggregation)
        assert found is not None
        parameters, streams = trainable(self.half)
        gradients = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
        replay_(gradients, self._seeds(), (found / self.directions).tolist(), dist=self.dist, streams=streams)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def commit(self, round: int, messages: Iterable[Message] = ()) -> list[int]:
        """Commit the round with the scalars measured in it; the clients have nothing to answer."""
        return super().commit(round, self._measured)


class ZOBoth(HO):
    """HO-SFL's log of scalars, which the server measures: v_p = (loss at theta + mu u_p - loss at theta) / mu."""

    reads: ClassVar[tuple[str, ...]] = (*SCALARS, "digest_every")
    estimators = ("one-sided", "two-sided")
    server_rates = (0.02, 0.04, 0.08)  # zeroth order there too
    ways: ClassVar[dict[str, Way]] = {"zo-both": ({}, (0.1, 0.2, 0.4))}
    kind = CutProbingClient

    def displaces(self) -> bool:
        return True

    def server(self, **shared: Any) -> Server:
        settings = self.settings
        two_sided, probing = settings.estimator == "two-sided", {name: getattr(settings, name) for name in PROBES}
        probes = settings.directions * (2 if two_sided else 1)
        return ZerothOrderServer(**shared, **probing, probes=probes, two_sided=two_sided, steps=self.steps())

    def steps(self) -> int:
        """Of the server per round."""
        return 1
