"""HO-SFL's client on an inference runtime, without torch.

Its weights have the same bits as every other client's, since the same kernels move them. Its measurements differ in the
last digits, as they do between any two machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hosfl.edge.data import MASK, Samples
from hosfl.edge.gradient import Gradient
from hosfl.edge.half import Half
from hosfl.edge.running import StatisticsEstimator
from hosfl.edge.travel import packed, unpacked
from hosfl.interrupts import uninterrupted
from hosfl.protocol.arrays import Array
from hosfl.protocol.messages import (
    Calibration,
    Cut,
    Differs,
    Hello,
    Message,
    MessageError,
    PoolMoves,
    Records,
    Scalars,
    Statistics,
    decode,
    multiplier_of,
)
from hosfl.protocol.replica import Replica, ReplicaState, digest
from hosfl.protocol.terms import Run
from hosfl_kernels import perturb_, project, replay_

CHUNK = 1 << 16  # elements of the cut that are in float64 at a time


class EdgeClient:
    """A client of a run of method ho that measures differences or, with a graph of its gradient, backpropagates.

    `hosfl.protocol.endpoint.ClientProtocol` says what its methods do.

    Args:
        number: of the client.
        half: the client half. Its last pieces are the run's blocks; there may be another piece before the first block.
        run: the terms of the run.
        streams: of the noise of its trainable tensors, as in the log's header.
        batches: round -> samples.
        weights: returns all arrays in the half's digest, in their order.
        wire: dtype of cuts and multipliers on the wire.
        gradient: computes the gradient, for the estimator "backward".
        microbatch: samples that it takes together; 0: all.
        running: the half's running statistics, in a run that estimates them.
    """

    def __init__(
        self,
        number: int,
        half: Half,
        run: Run,
        streams: Sequence[int],
        batches: Callable[[int], Samples],
        weights: Callable[[], Iterable[Array]],
        wire: str = "float32",
        gradient: Gradient | None = None,
        microbatch: int = 0,
        running: StatisticsEstimator | None = None,
    ) -> None:
        self.number, self.half, self.run, self.batches, self.wire = number, half, run, batches, wire
        self.weights, self.gradient, self.microbatch = weights, gradient, microbatch
        self.running, self.calibrated = running, running is None
        self.replica = Replica(half.tensors, streams, run, half.base)
        self._round = -1  # of the last cut; there is none yet

    @property
    def applied(self) -> int:
        return self.replica.applied

    @property
    def epoch(self) -> int:
        return self.replica.epoch

    def decoded(self, data: bytes) -> Message:
        return decode(data)

    def request_statistics(self) -> Statistics:
        """The message that requests the run's running statistics."""
        return self._statistics(np.empty(0, np.float32), np.empty(0, np.int32))

    def statistics(self, message: Calibration) -> Statistics:
        """Its own running statistics: see `hosfl.methods.client.Client.statistics`."""
        running = self._check_calibration(message)
        if len(message.statistics):
            raise MessageError(f"{len(message.statistics)} statistics in an ask for some")
        if self.applied:
            raise MessageError(f"asked for statistics of round 0 after {self.applied} rounds, of this run or another")
        self.calibrated = False
        values, samples = running.estimated()
        return self._statistics(values, np.array([samples], np.int32))

    def calibrate(self, message: Message) -> None:
        """Load the run's running statistics. Raises MessageError for a message without them, or a second one."""
        if not isinstance(message, Calibration):
            raise MessageError(f"client {self.number} expects statistics, got {type(message).__name__}")
        running = self._check_calibration(message)
        if self.calibrated:
            raise MessageError(f"client {self.number} has its statistics already")
        running.load(message.statistics)
        self.calibrated = True

    def _check_calibration(self, message: Calibration) -> StatisticsEstimator:
        if self.running is None:
            raise MessageError("running statistics in a run that estimates none")
        if message.client != self.number:
            raise MessageError(f"a message for client {message.client}, this is client {self.number}")
        return self.running

    def _statistics(self, values: NDArray[np.float32], samples: NDArray[np.int32]) -> Statistics:
        return Statistics(client=self.number, round=0, epoch=self.epoch, statistics=values, samples=samples)

    def hello(self) -> Hello:
        return Hello(client=self.number, round=self.applied, epoch=self.epoch)

    def reset(self) -> None:
        self.replica.reset()

    def load(self, state: ReplicaState) -> None:
        self.replica.load(state)

    def catch_up(self, message: Message) -> Differs | None:
        if not isinstance(message, (Records, PoolMoves)):
            raise MessageError(f"client {self.number} expects records, got {type(message).__name__}")
        return self.replica.follow(message, self.number)

    def output(self, round: int) -> Cut:
        """The cut of the round's batch."""
        self._round = round
        self._batch = batch = self.batches(round)
        self._cut = self.half(batch.inputs)
        cut, scales = packed(self._cut, self.wire)
        masks = {"mask": batch.named()[MASK].astype(np.uint8)} if MASK in batch.named() else {}
        labels = batch.labels if batch.labels.dtype == np.float32 else batch.labels.astype(np.int32)
        return Cut(client=self.number, round=round, epoch=self.epoch, cut=cut, scales=scales, labels=labels, **masks)

    def answer(self, message: Message) -> Scalars:
        """Measure along the round's directions. The weights have the same bits afterwards."""
        multiplier = self._multiplier(message)
        seeds, scalars = self.run.seeds(self._round), np.zeros(self.run.directions, np.float32)
        parts = list(self.run.parts())
        if self.gradient is None:
            for piece, (block, positions) in enumerate(parts, self.half.pieces - len(parts)):
                scalars[positions] = self._probe(piece, block.tensors, multiplier, seeds[positions])
        else:
            gradients = self._gradients(self.gradient, self.half.pieces - len(parts), multiplier)
            for block, positions in parts:
                some, place = [gradients[t] for t in block.tensors], _noise_arguments(self.replica, block.tensors)
                scalars[positions] = project(some, seeds[positions], **place)
        return Scalars(client=self.number, round=self._round, epoch=self.epoch, scalars=scalars)

    def _multiplier(self, message: Message) -> NDArray[np.float32]:
        message = multiplier_of(message, self.number, self._round, self.epoch)
        multiplier = unpacked(message.multiplier, message.scales, self.wire)
        if multiplier.shape != self._cut.shape:
            raise MessageError(f"the cut is {self._cut.shape}, the multiplier {multiplier.shape}")
        if not np.isfinite(multiplier).all():
            raise MessageError("a multiplier with infinite or NaN elements")
        return multiplier

    def _gradients(self, gradient: Gradient, piece: int, multiplier: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The gradient of <multiplier, cut>, a few samples at a time; the passes begin at the first block."""
        at_once, between = self.microbatch or len(multiplier), self.half.input_of(piece, self._batch.inputs)
        found = [np.zeros(tensor.shape, np.float32) for tensor in self.replica.tensors]
        for at in range(0, len(multiplier), at_once):
            some = slice(at, at + at_once)
            parts = gradient(self._batch[some].inputs, multiplier[some], None if between is None else between[some])
            for total, part in zip(found, parts, strict=True):
                total += part
        return found

    def _probe(
        self, piece: int, block: Sequence[int], multiplier: NDArray[np.float32], seeds: Sequence[int]
    ) -> list[float]:
        """The derivatives along directions that move the tensors of one block, by passes from its piece on."""
        forward = self.half.at(piece, self._batch.inputs)
        probe, mu, scalars = _Perturbation(self.replica, block), self.replica.mu, []
        try:
            for seed in seeds:
                probe.move(seed, mu)
                ahead, behind, distance = forward(), self._cut, mu
                if self.run.estimator == "two-sided":
                    probe.move(seed, -mu)
                    behind, distance = forward(), 2 * mu
                scalars.append(inner(multiplier, ahead, behind) / distance)
                del ahead, behind  # frees them before the next pass
        finally:
            probe.restore()
        return scalars

    def digest(self) -> str:
        """SHA-256 of the half, as of every client's."""
        return digest(self.weights()).hex()


def _noise_arguments(replica: Replica, block: Sequence[int]) -> dict[str, Any]:
    """The arguments of the kernels for noise on a replica's tensors at these positions."""
    factors, streams = [replica.run.factors[t] for t in block], [replica.streams[t] for t in block]
    return {"dist": replica.run.dist, "factors": factors, "streams": streams}


class _Perturbation:
    """Some of a replica's tensors, at th + step * u(seed) after `move` and at th after `restore`.

    On the lattice they move there and back exactly, in one pass from one place to the next. Elsewhere every move
    rounds, and copies of the tensors keep th meanwhile.
    """

    def __init__(self, replica: Replica, block: Sequence[int]) -> None:
        self.tensors = [replica.tensors[t] for t in block]
        self.place = _noise_arguments(replica, block)
        self.kept = None if replica.lattice is not None else [np.copy(t) for t in self.tensors]
        self.applied: list[tuple[int, float]] = []  # (seed, step) where the weights are now; empty at th

    def move(self, seed: int, step: float) -> None:
        if self.kept is None:
            self._replay([(seed, step)])
        else:
            self.restore()
            perturb_(self.tensors, seed, step, **self.place)

    def restore(self) -> None:
        if self.kept is None:
            self._replay([])
            return
        with uninterrupted():
            for tensor, kept in zip(self.tensors, self.kept, strict=True):
                tensor[...] = kept

    def _replay(self, to: list[tuple[int, float]]) -> None:
        seeds = [seed for seed, _ in self.applied + to]
        steps = [-step for _, step in self.applied] + [step for _, step in to]
        with uninterrupted():
            replay_(self.tensors, seeds, steps, **self.place)
            self.applied = to


def inner(multiplier: NDArray[np.float32], output: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """<multiplier, output - other>, summed in float64, a few samples at a time: see `hosfl.probing.probe.inner`."""
    at_once = max(1, CHUNK * len(output) // max(1, output.size))
    return sum(
        float(((output[at : at + at_once] - other[at : at + at_once]).astype(np.float64) * m).sum())
        for at, m in ((at, multiplier[at : at + at_once]) for at in range(0, len(output), at_once))
    )
