"""The client: it has its half of the model and its data, and communicates by messages only."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hosfl.halves.inputs import Batch, Inputs, call, evaluating
from hosfl.methods import calibration
from hosfl.methods.tensors import decoded
from hosfl.methods.travel import packed, unpacked
from hosfl.protocol.messages import (
    Calibration,
    Cut,
    Differs,
    Hello,
    Message,
    MessageError,
    Statistics,
    multiplier_of,
)
from hosfl.protocol.replica import digest

# Samples that went through a half, by half and direction. Passes through some layers count as their share of the work.
Passes = defaultdict[str, float]


def no_passes() -> Passes:
    """Counters that begin at 0."""
    return defaultdict(int)


def digested_tensors(half: nn.Module) -> dict[str, Tensor]:
    """The tensors of which a half's digest is, by name: its parameters, tied ones once, and its persistent buffers."""
    stored = half.state_dict()
    return {**dict(half.named_parameters()), **{name: b for name, b in half.named_buffers() if name in stored}}


@dataclass
class Seconds:
    """Seconds that a client spent on plain forward passes, and on answers (probing or backpropagation)."""

    forward: float = 0.0
    answer: float = 0.0
    rounds: int = 0


@dataclass
class Client:
    """A client whose half never learns: the control that every other kind must beat, and their base class.

    In each round the server asks it for `output(round)`, the cut of its half for a batch of its data. Other kinds then
    get a multiplier, `answer` it, and apply what the server has committed by `catch_up`.

    Args:
        number: of the client, from 0.
        half: its own copy of the client half, on the device that it computes on.
        batch: round -> (inputs, labels) of this client, `[batch, ...]` each.
        applied: how many rounds its weights contain.
        epoch: the server's epoch in which the last of them was committed; each restart of the server begins another.
        seconds: counts the time that it spends.
        passes: counts samples that go through the half; shared by a run's clients to count all of them together.
        microbatch: samples that a client which backpropagates takes together; 0: all.
        wire: dtype of cuts and multipliers on the wire: "float32", "bfloat16", "float16" or "int8".
        calibrated: whether it has the run's running statistics.
        calibration_batches: returns the batches on which it estimates running statistics, the same ones every time.
    """

    number: int
    half: nn.Module
    batch: Callable[[int], Batch]
    learns = False
    applied: int = 0
    epoch: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    passes: Passes = field(default_factory=no_passes)
    microbatch: int = 0
    wire: str = "float32"
    calibrated: bool = False
    calibration_batches: Callable[[], Iterable[Batch]] = tuple

    def __post_init__(self) -> None:
        self._round = -1  # of the last cut; there is none yet

    def statistics(self, message: Calibration) -> Statistics:
        """Estimate running statistics of the half's normalisations on its own batches, as an empty message requests.

        The half stays as it is. Statistics of the run that it may have are void. Raises MessageError for another
        message, after round 0, and for batches without statistics, such as single samples.
        """
        self._check_addressee(message)
        if len(message.statistics):
            raise MessageError(f"{len(message.statistics)} statistics in an ask for some")
        if self.applied:
            raise MessageError(f"asked for statistics of round 0 after {self.applied} rounds, of this run or another")
        self.calibrated = False
        try:
            values, samples = calibration.estimate_statistics(self.half, self.calibration_batches())
        except ValueError as error:  # such as BatchNorm's about a single sample
            raise MessageError(str(error)) from None
        self.passes["client forward"] += samples
        count = torch.tensor([samples], dtype=torch.int32)
        return Statistics(client=self.number, round=0, epoch=self.epoch, statistics=values, samples=count)

    def request_statistics(self) -> Statistics:
        """The message that requests the run's running statistics."""
        none = torch.empty(0, dtype=torch.int32)
        return Statistics(client=self.number, round=0, epoch=self.epoch, statistics=torch.empty(0), samples=none)

    def calibrate(self, message: Message) -> None:
        """Load the run's running statistics. Raises MessageError for a message without them, or a second one."""
        if not isinstance(message, Calibration):
            raise MessageError(f"client {self.number} expects statistics, got {type(message).__name__}")
        self._check_addressee(message)
        if self.calibrated:
            raise MessageError(f"client {self.number} has its statistics already")
        calibration.load(self.half, message.statistics)
        self.calibrated = True

    def decoded(self, data: bytes) -> Message:
        """Decode a message from the wire, its arrays as tensors. Raises MessageError."""
        return decoded(data)

    def hello(self) -> Hello:
        """The message that requests everything committed after the last round applied."""
        return Hello(client=self.number, round=self.applied, epoch=self.epoch)

    def reset(self) -> None:
        """Go back to round 0."""
        self.applied = self.epoch = 0

    def catch_up(self, message: Message) -> Differs | None:
        """Apply what was committed since. Returns a message for the server if the half turns out to be wrong."""
        return None

    def output(self, round: int) -> Cut:
        """Draw the round's batch and return the half's output for it as a message: eval mode, no graph."""
        self._round = round
        self._inputs, self._labels = self.batch(round)
        begin = time.perf_counter()
        with evaluating(self.half):
            self._cut = self._forward(self._inputs)
        self.seconds.forward += time.perf_counter() - begin
        self.seconds.rounds += 1
        self._count(forward=1)
        masks = {}
        if isinstance(self._inputs, Mapping) and "attention_mask" in self._inputs:
            masks["mask"] = self._inputs["attention_mask"].to(torch.uint8)
        cut, scales = packed(self._cut, self.wire)
        return Cut(
            client=self.number,
            round=round,
            epoch=self.epoch,
            cut=cut,
            scales=scales,
            labels=self._labels.float() if self._labels.is_floating_point() else self._labels.to(torch.int32),
            **masks,
        )

    def _forward(self, inputs: Inputs) -> Tensor:
        """The half's output."""
        output: Tensor = call(self.half, inputs)
        return output

    def _count(self, forward: float = 0, backward: float = 0) -> None:
        """Count passes of the round's batch, fractions of one where only some layers run."""
        self.passes["client forward"] += forward * len(self._labels)
        self.passes["client backward"] += backward * len(self._labels)

    def answer(self, message: Message) -> Message:
        """The client's answer to a multiplier. Raises MessageError for a multiplier that is not for its last cut."""
        raise NotImplementedError("a frozen client is sent no multipliers")

    def _multiplier(self, message: Message) -> Tensor:
        """The multiplier of a message, for the last cut. Raises MessageError."""
        message = multiplier_of(message, self.number, self._round, self.epoch)
        cut, multiplier = self._cut, unpacked(message.multiplier, message.scales, self.wire)
        if self.wire != "float32":
            multiplier = multiplier.to(cut.dtype)
        if (multiplier.shape, multiplier.dtype) != (cut.shape, cut.dtype):
            other = f"{multiplier.dtype} {tuple(multiplier.shape)}"
            raise MessageError(f"the cut is {cut.dtype} {tuple(cut.shape)}, the multiplier {other}")
        if not torch.isfinite(multiplier).all():
            raise MessageError("a multiplier with infinite or NaN elements")
        return multiplier.to(cut.device)

    def _check_addressee(self, message: Message) -> None:
        if message.client != self.number:
            raise MessageError(f"a message for client {message.client}, this is client {self.number}")

    def digest(self) -> str:
        """SHA-256 of the client half's parameters and of the buffers that its file holds, their bits in order."""
        return digest(digested_tensors(self.half).values()).hex()
