"""What HO-SFL is compared with, beside the two controls of `hosfl.methods.client`: other ways to train a split model.

Same data, batches, sampling, messages and ledgers as HO-SFL; a method is a client, a server, or both. B samples, P
directions, cuts of size z, d weights on the client, E local steps. Per client and round:

method        up                         down                   what learns, and how
checkpointed  z, labels; d               z; d                   first-order; the client's activations made twice
splitfed      E (z, labels); d           E z; d                 both by backpropagation, E steps between averages
zo-both       (1 + P) z, labels          P per missed round     both by zeroth order: forward passes only
hosl          (1 + 2 P) z, labels; d     2 P; d                 client by zeroth order, server by backpropagation
mu-splitfed   (1 + P) z, labels          P per missed round     as zo-both, E steps of the server per round

FSL-SAGE is left out. Its clients backpropagate through an auxiliary network that stands in for the server half and is
fitted to its gradients now and then: the network is a choice for every task and cut, and the result is mostly its
quality. Without the authors' networks for these tasks a number would say nothing about the method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from hosfl.methods.client import FirstOrderClient, ZerothOrderClient, load_vector
from hosfl.methods.ledger import OptimizerFactory, Rate, SeedReplay, descend, step_size
from hosfl.methods.server import Server
from hosfl.probing.displaced import Displacement, Inputs, casts_forgotten, displaced, evaluate_displaced, refuse_writers
from hosfl.probing.probe import evaluating, trainable
from hosfl.protocol.aggregate import RunningLength, clip_to_norm, gathered
from hosfl.protocol.messages import Cut, Losses, Message, MessageError, ProbedCut, Scalars, Trained
from hosfl.protocol.seeds import Purpose, direction_seeds
from hosfl_kernels import derive, replay_

# --- exact gradients, less memory -----------------------------------------------------------------------------------


@dataclass
class CheckpointedClient(FirstOrderClient):
    """First-order split learning whose backward pass makes the activations again: the same gradients, less memory."""

    def _gradient(self, multiplier: Tensor) -> Tensor:
        self._count(forward=1)  # what backpropagation runs again; of a Sequential all but its last part
        return super()._gradient(multiplier)

    def _recorded(self, inputs: Inputs) -> Tensor:
        with recomputing(self.half):
            return super()._recorded(inputs)


@contextmanager
def recomputing(half: nn.Module) -> Iterator[None]:
    """Forward passes in the block keep for backpropagation the inputs of parts only; the rest is made when needed.

    Parts are the items of an nn.ModuleList, such as a transformer's layers, and of an nn.Sequential of n layers about
    the square root of n runs of neighbours, the last of which is kept as usual (Chen et al., arXiv 1604.06174). A
    module without either is left as it is. The half must have no dropout in force: random numbers are not kept.
    """
    before: list[tuple[nn.Module, dict[str, Any]]] = []

    def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
        before.append((module, {name: module.__dict__[name] for name in ("forward",) if name in module.__dict__}))
        module.__dict__["forward"] = forward

    def visit(module: nn.Module) -> None:
        if isinstance(module, nn.Sequential) and len(module):
            parts = math.ceil(len(module) ** 0.5)
            run = partial(checkpoint_sequential, module, parts, use_reentrant=False, preserve_rng_state=False)
            patch(module, run)
            return
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                run = partial(checkpoint, child.forward, use_reentrant=False, preserve_rng_state=False)
                patch(child, run)
            else:
                visit(child)

    try:
        visit(half)
        yield
    finally:
        for module, held in before:
            del module.__dict__["forward"]
            module.__dict__.update(held)


# --- clients that train by themselves between averages --------------------------------------------------------------


@dataclass
class SplitFedClient(FirstOrderClient):
    """SplitFed's client (Thapa et al., AAAI 2022): takes steps of its own, then sends its weights to be averaged.

    steps: exchanges of a round, each a step; E. What it calls a round is an exchange, of which round r has r E and the
    following. optimizer: of its weights, rate: of an exchange; new every round, as averaging voids moments. normalized:
    the rate over the running length of this round's gradients.

    The server takes one step per exchange from all the clients' cuts, as SplitLoRA's does; the paper of SplitFed leaves
    it to variants, of which the first averages copies of the server half instead.
    """

    optimizer: OptimizerFactory = field(kw_only=True)
    rate: Rate = field(kw_only=True)
    normalized: bool = field(kw_only=True)
    steps: int = field(kw_only=True, default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parameters, self.streams = trainable(self.half)
        # In float32 also where the half is coarser, or small steps would be lost.
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
        """A step; then the next exchange's cut, or the weights after the round's last."""
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


def moved_outputs(
    module: nn.Module, inputs: Inputs, seeds: Sequence[int], steps: Sequence[float], dist: str, factors: Sequence[float]
) -> Tensor:
    """The module's outputs at th + s u_p, for every direction p and every step s in turn: [P x steps, batch, ...].

    The weights are only read, in eval mode; all outputs are held at once.
    """
    parameters, streams = trainable(module)
    moves = [Displacement(parameters, streams, seed, step, dist, factors) for seed in seeds for step in steps]
    with evaluating(module):
        return torch.stack([evaluate_displaced(module, inputs, move) for move in moves])


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
        moved = moved_outputs(self.half, self._inputs, self._seeds, (self.mu, -self.mu), self.dist, factors)
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


# --- clients that never see a gradient, and the servers that measure losses for them --------------------------------


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
        moved = moved_outputs(self.half, self._inputs, run.seeds(round), steps, run.dist, run.factors)
        self.seconds.answer += time.perf_counter() - begin
        self._count(forward=len(moved))
        return ProbedCut(**vars(cut), displaced=moved)


@dataclass
class LossServer(Server):
    """A server that measures the losses of displaced cuts. probes: how many of them come with a cut."""

    probes: int = field(kw_only=True)
    hears = ProbedCut

    def __post_init__(self) -> None:
        super().__post_init__()
        self.largest_message += 4 * self.probes * self.batch * int(torch.Size(self.cut_shape).numel())

    def _check_cut(self, round: int, message: Message) -> ProbedCut:
        checked = super()._check_cut(round, message)
        assert isinstance(checked, ProbedCut)
        moved, shape = checked.displaced, (self.probes, *checked.cut.shape)
        if tuple(moved.shape) != shape or moved.dtype != checked.cut.dtype:
            raise MessageError(f"displaced cuts {moved.dtype} {tuple(moved.shape)}, not {checked.cut.dtype} {shape}")
        if not torch.isfinite(moved).all():
            raise MessageError("infinite or NaN elements in the displaced cuts")
        return checked

    def _losses(self, message: Cut, cuts: Sequence[Tensor], moves: Sequence[Displacement | None] = (None,)) -> Tensor:
        """The loss of each of the cuts at each of the moved weights (None: where they are), float64 [cuts x moves].

        In eval mode, forward only, for the message's labels; differences are to be taken, so from logits on in float64.
        Raises MessageError for losses that are infinite or NaN.
        """
        parameter = next(self.half.parameters())
        labels, masks = message.labels.to(parameter.device, torch.int64), self._masks(message.mask)
        losses = []
        refuse_writers(self.half)
        with evaluating(self.half), casts_forgotten():
            for cut in cuts:
                inputs = cut.to(parameter.device, parameter.dtype)
                for move in moves:
                    if move is None:
                        output = self.half(inputs, **masks)
                    else:
                        with displaced(self.half, move):
                            output = self.half(inputs, **masks)
                    losses.append(self.loss(output.double(), labels).double())
                    self.passes["server forward"] += len(cut)
        found = torch.stack(losses).cpu()
        if not torch.isfinite(found.float()).all():
            raise MessageError("cuts whose losses are infinite or NaN")
        return found


@dataclass
class HOSLServer(LossServer):
    """Sends the losses of the displaced cuts, and learns by backpropagation from the cut itself."""

    def _learn(self, round: int, message: Cut) -> tuple[Message | None, float]:
        assert isinstance(message, ProbedCut)
        losses = self._losses(message, [*message.displaced]).float()
        _, loss = self._backward(message.cut, message.labels, message.mask)
        return Losses(client=message.client, round=round, epoch=self.epoch, losses=losses), loss


def slopes(losses: Tensor, base: Tensor, mu: float, two_sided: bool) -> Tensor:
    """float64 [P]: from losses at th + mu u_p, or with `two_sided` at th + mu u_p and th - mu u_p in turn."""
    return (losses[::2] - losses[1::2]) / (2 * mu) if two_sided else (losses - base) / mu


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

    def step(self, round: int, cuts: Sequence[Message]) -> tuple[dict[int, Message], float]:
        self._heard, self._measured, self._number = [], [], round * self.steps
        answers, loss = super().step(round, cuts)
        for number in range(round * self.steps + 1, (round + 1) * self.steps):
            self._number = number
            if sum(map(self._estimate, self._heard)):
                self._take_step()
        return answers, loss

    def _learn(self, round: int, message: Cut) -> tuple[Message | None, float]:
        assert isinstance(message, ProbedCut)
        assert isinstance(self.ledger, SeedReplay)
        base, *rest = self._losses(message, [message.cut, *message.displaced])
        scalars = slopes(torch.stack(rest), base, self.ledger.mirror.mu, self.two_sided).float()
        if not self._estimate(message):
            raise MessageError("a cut whose losses at moved weights are infinite or NaN")
        self._heard.append(message)
        self._measured.append(Scalars(client=message.client, round=round, epoch=self.epoch, scalars=scalars))
        return None, float(base)

    def _seeds(self) -> tuple[int, ...]:
        """The step's directions, which are the same for all clients: so that P numbers are one's gradient."""
        return direction_seeds(self.seed, self._number, self.directions, Purpose.SERVER)

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
        if self.clip is not None:
            found = clip_to_norm(found, self.clip, sum(p.numel() for p in parameters))
        self._gathered.add(found, len(message.cut) / self.batch)
        return True

    def _take_step(self) -> None:
        """One step along the directions by the slopes that are gathered."""
        (found,), self._gathered = self._gathered.result(), gathered(self.aggregation)
        assert found is not None
        parameters, streams = trainable(self.half)
        gradients = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
        replay_(gradients, self._seeds(), (found / self.directions).tolist(), dist=self.dist, streams=streams)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def commit(self, round: int, answers: Sequence[Message]) -> None:
        """Commit the round with the scalars measured in it; the clients have nothing to answer."""
        super().commit(round, self._measured)
