"""The server: it has the heavy half, computes the multipliers, and commits the clients' answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hosfl.halves.split import dtype_of
from hosfl.methods.calibration import RunningStatistics
from hosfl.methods.client import Passes, no_passes
from hosfl.methods.cuts import CutSpec
from hosfl.methods.gathered import KeptVectors, OutlierClipping, Pieces, clip_factor, make_accumulator
from hosfl.methods.ledger import Ledger, Rate, State
from hosfl.methods.reasons import Reasons
from hosfl.methods.state import pack_optimizer, part, prefixed, unpack_optimizer
from hosfl.methods.tensors import LONGEST, all_true, decoded, usable
from hosfl.methods.travel import packed
from hosfl.protocol.aggregate import Aggregation, weighted_mean
from hosfl.protocol.messages import (
    Calibration,
    Cut,
    Differs,
    Hello,
    Message,
    MessageError,
    Multiplier,
    Refusal,
    Statistics,
    text_array,
)
from hosfl.protocol.seeds import Purpose, generator, round_seed

AnyMessage = TypeVar("AnyMessage", bound=Message)

# Errors of the machine, for which no message is refused.
MACHINE_ERRORS = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


@contextmanager
def refusing_failures() -> Iterator[None]:
    """Turns errors that a half or a loss raises for a client's cut and labels into a MessageError.

    Also errors in the half or the loss themselves. They refuse every client, and a run in which nothing was learnt ends
    as a failure that says why.
    """
    try:
        yield
    except (MessageError, *MACHINE_ERRORS):
        raise
    except Exception as error:
        text = " ".join(str(error).split())  # on one line
        raise MessageError(f"nothing can be learnt from it: {type(error).__name__}: {text}") from error


@dataclass
class Server:
    """The server of a run: trains its half by backpropagation, and sends each client the gradient at the cut.

    A round is `begin(round)`, `learn(cut)` for every cut and `end()`, or `step` for all three; then
    `accept_answer(round, answer)` for every answer and `commit(round)`. For each client m with cut z_m it computes

        multiplier_m = d loss(half(z_m), labels_m) / d z_m    what the client is sent, [batch, ...]
        gradient_m   = d loss(half(z_m), labels_m) / d half   aggregated into one optimizer step

    An aggregate much longer than those of the steps before is scaled down to their length, so that one absurd cut does
    not stay in the optimizer's moments: see `OutlierClipping`.

    Whatever comes from a client goes through `receive`, `learn`, `accept_answer` or `accept_statistics`. They refuse
    what is not exactly right, and a refused message changes nothing.

    Source: Chen et al., ICML 2026, arXiv 2603.14773.

    Args:
        half: the server half: cut [batch, ...] -> output [batch, ...].
        loss: (output, labels) -> the mean loss over the batch, a tensor of one element.
        optimizer: of the half. With several rates, one per group, the largest becomes `rate`, and their ratios stay.
        rate: step -> learning rate.
        ledger: keeps what is committed of the client half, such as `SeedReplay`; None: nothing ever is.
        seed: of the run, 0 <= seed < 2^64; dropout and the sampling of clients follow from it.
        clients: their number.
        cuts: what clients' cuts and labels look like, and how they travel.
        aggregation: of the clients' gradients of the half; the ledger's own, so that both halves descend one loss.
            Median and trimmed mean keep all K gradients, K times the half's size, until the round's step.
        clip: the largest L2 norm of one client's gradient; None: any.
        statistics: the client half's running statistics, where the run estimates them anew.
        server_first: the number of first rounds in which only this half learns.
        centered: leave out of multipliers what shifts the outputs of all samples alike.

    Attributes:
        refused: why messages were refused.
        untold_refusals: by client, why its last message was refused, until the client has been told.
        differed: the clients that found their half wrong, and when.
        learnt: the number of cuts that were learnt from.
        passes: samples that went forward and backward through either half; clients count theirs in it too.

    Running statistics of the half, such as BatchNorm's: with median or trimmed mean each client's pass starts from
    those at the round's beginning, and the new ones are aggregated like gradients. With a mean each client's pass
    updates them in turn, unguarded: one liar's cut can spoil them.

    Raises:
        ValueError: `centered` with several labels per sample.
    """

    cut_type: ClassVar[type[Cut]] = Cut

    half: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    rate: Rate
    ledger: Ledger | None
    seed: int
    clients: int
    cuts: CutSpec
    aggregation: Aggregation = weighted_mean
    clip: float | None = None
    statistics: RunningStatistics | None = None
    server_first: int = 0
    centered: bool = False
    refused: Reasons = field(default_factory=Reasons, init=False)
    untold_refusals: dict[int, str] = field(default_factory=dict, init=False)
    differed: Reasons = field(default_factory=Reasons, init=False)
    learnt: int = field(default=0, init=False)
    passes: Passes = field(default_factory=no_passes)

    def __post_init__(self) -> None:
        if self.centered and self.cuts.label_shape:
            raise ValueError("multiplier = centered is for tasks with one label per sample: leave it out")
        given = [float(group.get("lr", 1.0)) for group in self.optimizer.param_groups]
        self._rate_ratios = [rate / max(given) if max(given) > 0 else 1.0 for rate in given]
        # The state of the current step, which `begin` resets.
        self._round = 0
        self._gathered = make_accumulator(self.aggregation)
        self._samples: dict[int, int] = {}
        self._answers: dict[int, Message] = {}
        self._client_losses: list[Tensor] = []
        self._generators: list[Tensor] = []  # the generators' states after the last cut
        self._accepted: dict[int, Message] = {}  # for `commit`
        self._estimates: dict[int, Statistics] = {}  # for `calibrate`
        self._outliers = OutlierClipping()
        # The largest cut, answer or statistics; a complaint is at most half of the constant.
        others = 0 if self.ledger is None else self.ledger.largest_answer
        others += 0 if self.statistics is None else len(self.statistics.values)
        self.largest_message = self.cuts.largest + 4 * others + 2048

    @property
    def epoch(self) -> int:
        return 0 if self.ledger is None else self.ledger.epoch

    def sample(self, round: int, clients: int, count: int) -> list[int]:
        """The clients of a round, a function of the run's seed."""
        chosen = generator(self.seed, Purpose.SAMPLING, round).choice(clients, count, replace=False)
        return sorted(int(c) for c in chosen)

    def receive(self, data: bytes, client: int | None = None) -> Message | None:
        """Decode a message from the wire; None if it is refused, as one that is too long, which is not read.

        client: the sender, if the transport knows it; a message in another client's name is refused.
        """
        try:
            message = decoded(data, self.largest_message)
            if client is not None and message.client != client:
                raise MessageError(f"it says that it is client {message.client}'s")
        except MessageError as error:
            self._refuse("bytes from the wire" if client is None else f"bytes of client {client}", client, error)
            return None
        return message

    def _refuse(self, what: str, client: int | None, error: MessageError) -> None:
        """Record why a message is refused. client: its sender, if known."""
        self.refused.add(f"{what}: {error}")
        if client is not None and client < self.clients:
            self.untold_refusals[client] = str(error)

    def refusal(self, client: int, round: int) -> Refusal | None:
        """The message that tells an invited client, once, why its last message was refused; None if it was not."""
        if client not in self.untold_refusals:
            return None
        why = text_array(self.untold_refusals.pop(client))
        return Refusal(client=client, round=round, epoch=self.epoch, text=why)

    def accept_statistics(self, message: Message) -> bool:
        """Keep a client's running statistics for `calibrate`; False where they are refused."""
        with self._refusing(message, "calibration"):
            statistics, committed = self._check_statistics(message)
            if message.client in self._estimates:
                raise MessageError("statistics for the second time")
            committed.samples(statistics)
            self._estimates[message.client] = statistics
            return True
        return False

    def calibrate(self, messages: Iterable[Message] = ()) -> int:
        """Before the first round, commit the clients' running statistics: those that were accepted, and these.

        Returns the number of clients. If it is 0 the half keeps its own statistics.
        """
        for message in messages:
            self.accept_statistics(message)
        accepted, self._estimates = _by_client(self._estimates), {}
        if self.statistics is not None:
            self.statistics.commit(accepted, self.aggregation)
        return len(accepted)

    def calibration(self, asked: Message) -> Calibration | None:
        """The committed running statistics for a client that requests them; None if the request is refused."""
        try:
            message, committed = self._check_statistics(asked)
            if len(message.statistics) or len(message.samples):
                raise MessageError("statistics after those of the run were committed")
        except MessageError as error:
            self._refuse(f"client {asked.client}", asked.client, error)
            return None
        return Calibration(client=asked.client, round=0, epoch=self.epoch, statistics=committed.values)

    def _check_statistics(self, message: Message) -> tuple[Statistics, RunningStatistics]:
        if not isinstance(message, Statistics) or message.round:
            raise MessageError(f"{type(message).__name__} of round {message.round} where Statistics were expected")
        self._check_client(message)
        if self.statistics is None:
            raise MessageError("Statistics in a run that does not estimate them")
        return message, self.statistics

    def welcome(self, hello: Message, from_client: bool = True) -> Message | None:
        """The update that a client must apply before it takes part; None if it is refused or there is none.

        from_client: whether the client itself has reported this position, and may have another history than it thinks.
        False: the server knows the position from what it has sent.
        """
        try:
            if not isinstance(hello, (Hello, Differs)):
                raise MessageError(f"{type(hello).__name__} where Hello was expected")
            self._check_client(hello)
            if self.ledger is None:
                return None
            answer = self.ledger.since(hello, from_client)
        except MessageError as error:
            self._refuse(f"client {hello.client}", hello.client, error)
            return None
        if isinstance(hello, Differs):
            self.differed.add(f"client {hello.client} after round {hello.round}")
        return answer

    def _check_due(self, message: Message, kind: type[Message], round: int) -> None:
        """Raise MessageError unless the message is of the expected kind, round and epoch."""
        if type(message) is not kind or (message.round, message.epoch) != (round, self.epoch):
            raise MessageError(
                f"{type(message).__name__} of round {message.round}, epoch {message.epoch}, where {kind.__name__} of"
                f" round {round}, epoch {self.epoch} is due"
            )

    def _check_client(self, message: Message) -> None:
        if message.client >= self.clients:
            raise MessageError(f"there is no client {message.client} among {self.clients}")

    def step(self, round: int, cuts: Iterable[Message]) -> tuple[dict[int, Message], float]:
        """Learn from the cuts by one optimizer step. Returns the messages to send by client, and the aggregated loss.

        The step takes the aggregate of the K gradients. If all cuts are refused there is no step, and the loss is NaN.
        `begin`, `learn` and `end` are its parts, for cuts that arrive one by one.
        """
        self.begin(round)
        for message in cuts:
            self.learn(message)
        return self.end()

    def begin(self, round: int) -> None:
        """Begin a step. round: the number that its cuts must have."""
        for group, share in zip(self.optimizer.param_groups, self._rate_ratios, strict=True):
            group["lr"] = self.rate(round) * share
        self.half.train()
        self.optimizer.zero_grad()
        self._round, self._gathered = round, make_accumulator(self.aggregation)
        self._samples, self._answers, self._client_losses, self._generators, self._accepted = {}, {}, [], [], {}
        self._outliers.begin()

    def learn(self, message: Message) -> None:
        """Learn from one cut, or refuse it. Call it in the clients' order, on which sums and dropout depend."""
        with self._refusing(message):
            self._learn_checked(self._check_cut(self._round, message))

    def learnt_from(self) -> list[int]:
        """The clients whose cuts the step has learnt from so far."""
        return sorted(self._samples)

    @contextmanager
    def _refusing(self, message: Message, when: str = "") -> Iterator[None]:
        """Turns a MessageError of the block into a refusal. when: named in its reason; by default the step."""
        try:
            yield
        except MessageError as error:
            self._refuse(f"{when or f'round {self._round}'}, client {message.client}", message.client, error)

    def _learn_checked(self, cut: Cut) -> None:
        """Learn from a cut that was checked. Raises MessageError; then nothing has changed."""
        with self._dropout():
            answer, loss = self._answer_and_loss(self._round, cut)
        self._record_cut(cut, answer, loss)

    def _record_cut(self, cut: Cut, answer: Message | None, loss: float) -> None:
        """Record a cut that was learnt from, until the step ends."""
        if answer is not None:
            self._answers[cut.client] = answer
        self._samples[cut.client] = len(cut.labels)
        self._client_losses.append(torch.tensor([loss], dtype=torch.float64))
        self.learnt += 1

    def end(self) -> tuple[dict[int, Message], float]:
        """Make the step. Returns what `step` does."""
        if not self._client_losses:
            return {}, float("nan")
        self._take_step()
        answers = {} if self._round < self.server_first else self._answers
        return answers, float(self.aggregation(self._client_losses, [*self._samples.values()]))

    def _answer_and_loss(self, round: int, message: Cut) -> tuple[Message | None, float]:
        """Learn from a cut by backpropagation; returns the message to send, and the client's loss.

        The multiplier is the gradient of that client's own mean loss, without a factor 1/K. Raises MessageError for a
        cut that cannot be learnt from; then nothing has changed.
        """
        multiplier, loss = self._backward(message.cut, message.labels, message.mask)
        return self._multiplier(round, message.client, multiplier), loss

    def _multiplier(self, round: int, client: int, found: Tensor) -> Multiplier:
        """The message with a multiplier, in the run's wire dtype."""
        multiplier, scales = packed(found, self.cuts.wire)
        return Multiplier(client=client, round=round, epoch=self.epoch, multiplier=multiplier, scales=scales)

    def _take_step(self) -> None:
        """One optimizer step with the aggregated gradient."""
        found, self._gathered = self._gathered.result(), make_accumulator(self.aggregation)
        parameters = self._trained()
        gradients, buffers = self._outliers.clipped(found[: len(parameters)]), found[len(parameters) :]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if buffers:
            _load([*self.half.buffers()], buffers)
        self.optimizer.step()

    def _add(self, gradient: Pieces, samples: int, buffers: Pieces = ()) -> None:
        """Add one client's gradient of the half, and the buffers after its pass, to the aggregate."""
        self._outliers.observe(gradient)
        # A weight of at most 1, so that no finite number becomes infinite.
        self._gathered.add([*gradient, *buffers], samples / self.cuts.batch)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.half.parameters() if p.requires_grad]

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Makes dropout in the half a function of the run's seed and the round, and leaves torch's generators alone."""
        device = next(self.half.parameters()).device
        own = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=own, device_type=device.type):
            if self._generators:  # go on from the previous cut
                torch.set_rng_state(self._generators[0])
                for place, state in zip(own, self._generators[1:], strict=True):
                    torch.get_device_module(place).set_rng_state(state, place)
            else:
                torch.manual_seed(round_seed(self.seed, Purpose.DROPOUT, self._round) % 2**63)
            yield
            self._generators = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in own)]

    def _backward(self, cut: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """Forward and backward for one cut: returns multiplier and loss, and adds the half's gradient to the aggregate.

        Raises MessageError where the half does not take the cut or the loss does not take the labels, and for finite
        values so large that they would make the half NaN; then nothing has changed.
        """
        buffers = [*self.half.buffers()]
        before = [b.detach().clone() for b in buffers]
        device, dtype = next(self.half.parameters()).device, dtype_of(self.half)
        cut = cut.to(device).requires_grad_()
        try:
            with refusing_failures():
                output = self.half(copy_cut(cut, dtype), **self._masks(mask))
                loss = self.loss(output, self._labels(labels))
                self.passes["server forward"] += len(cut)
                self.passes["server backward"] += len(cut)
                multiplier, *gradients = self._gradients(loss, output, cut, torch.ones(len(cut)))
            if not (all_true(torch.isfinite(t).all() for t in (loss, multiplier)) and usable(gradients)):
                raise MessageError(
                    f"a cut whose loss is {loss.item():g}, or whose gradients are infinite or NaN, or longer than"
                    f" {LONGEST:g}"
                )
            if not all_true((b.isfinite() == was.isfinite()).all() for b, was in zip(buffers, before, strict=True)):
                raise MessageError("a cut that makes the half's running statistics infinite or NaN")
        except MessageError:
            _load(buffers, before)
            raise
        if self.clip is not None:
            factor = clip_factor(gradients, self.clip)
            gradients = [g if g is None else g * factor for g in gradients]
        buffers_after: list[Tensor] = []
        if isinstance(self._gathered, KeptVectors):
            buffers_after = [b.detach().clone() for b in buffers]
            _load(buffers, before)
        self._add(gradients, len(cut), buffers_after)
        return multiplier, float(loss.detach())

    def _gradients(self, loss: Tensor, output: Tensor, cut: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """The gradients of a loss for the cut and the half's parameters. weights: [n], proportional to the samples'."""
        if not self.centered:
            return torch.autograd.grad(loss, [cut, *self._trained()], allow_unused=True)
        gradients = torch.autograd.grad(loss, self._trained(), retain_graph=True, allow_unused=True)
        (found,) = torch.autograd.grad(loss, output, retain_graph=True)
        (multiplier,) = torch.autograd.grad(output, cut, centered(found, weights))
        return multiplier, *gradients

    def _labels(self, labels: Tensor) -> Tensor:
        """Labels for the loss: int64 or float32, on the half's device."""
        device = next(self.half.parameters()).device
        return labels.to(device, None if labels.is_floating_point() else torch.int64)

    def _masks(self, mask: Tensor) -> dict[str, Tensor]:
        """The half's keyword arguments beside the cut."""
        return {"attention_mask": mask.to(next(self.half.parameters()).device, torch.int64)} if self.cuts.masked else {}

    def _check_cut(self, round: int, message: Message) -> Cut:
        """The message with its cut unpacked. Raises MessageError for one that cannot be learnt from."""
        self._check_due(message, self.cut_type, round)
        assert isinstance(message, Cut)
        self._check_client(message)
        if message.client in self._samples:
            raise MessageError("a second cut in one round")
        return self.cuts.check(message)

    def accept_answer(self, round: int, message: Message) -> bool:
        """Keep a client's answer for `commit`; False if it is refused."""
        assert self.ledger is not None
        with self._refusing(message, f"round {round}"):
            self._check_due(message, self.ledger.expects, round)
            if message.client not in self._samples:
                raise MessageError("an answer from a client that was sent nothing in this round")
            if message.client in self._accepted:
                raise MessageError("a second answer in one round")
            self.ledger.check(message)
            self._accepted[message.client] = message
            return True
        return False

    def commit(self, round: int, messages: Iterable[Message] = ()) -> list[int]:
        """Commit the round with the accepted answers, and these, weighted by the clients' numbers of samples.

        Returns the clients whose answers were committed.
        """
        if self.ledger is None:
            return []
        for message in messages:
            self.accept_answer(round, message)
        accepted, self._accepted = _by_client(self._accepted), {}
        self.ledger.commit(round, accepted, [self._samples[answer.client] for answer in accepted])
        return [answer.client for answer in accepted]

    def state(self) -> State:
        """What a restarted server needs beside the log: the states of half, optimizer and ledger."""
        moments, optimizer = pack_optimizer(self.optimizer)
        tensors = prefixed("half", self.half.state_dict()) | prefixed("optimizer", moments)
        info = {"optimizer": optimizer, "learnt": self.learnt, "length": self._outliers.length.state()}
        if self.ledger is not None:
            ledger, info["ledger"] = self.ledger.state()
            tensors |= prefixed("ledger", ledger)
        return tensors, info

    def load(self, state: State) -> None:
        """Load a saved state."""
        tensors, info = state
        self.half.load_state_dict(part("half", tensors))
        unpack_optimizer(self.optimizer, part("optimizer", tensors), info["optimizer"])
        self.learnt = info["learnt"]
        self._outliers.length.load(info["length"])
        if self.ledger is not None:
            self.ledger.load(part("ledger", tensors), info["ledger"])


def _by_client(messages: Mapping[int, AnyMessage]) -> list[AnyMessage]:
    return [messages[client] for client in sorted(messages)]


def copy_cut(cut: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a cut in the half's dtype, since the half may begin with an operation in place.

    The copy is not a leaf of the graph, on which autograd forbids those. Beside a pass its cost is negligible.
    """
    return cut.to(dtype, copy=True)


def _load(tensors: Sequence[Tensor], values: Pieces) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            if value is not None:
                tensor.copy_(value)


def centered(gradient: Tensor, weights: Tensor) -> Tensor:
    """A loss's gradient for the outputs of its samples, without the part that shifts all of them alike: [n, ...].

    g_i - w_i (sum_j g_j) / (sum_j w_j), for samples that have weights w_i [n] in the loss. Where the server half has
    learnt its bias, the sum's expectation is 0, and it is the noise of a small batch alone; of a single sample nothing
    is left.
    """
    shares = (weights / weights.sum()).to(gradient)
    return gradient - shares.view(-1, *(1,) * (gradient.dim() - 1)) * gradient.sum(0)
