"""HO-SFL's client on an inference runtime, without torch.

The same kernels move its weights as at every other client, so they have the same bits. Its measurements differ in the
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
from hosfl.edge.running_statistics import StatisticsEstimator
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

CHUNK = 1 << 16  # elements of the cut that are converted to float64 at a time


class EdgeClient:
    """A client of a run of method ho. It measures differences or, with a graph of its gradient, backpropagates.

    It implements `hosfl.protocol.endpoint.ClientProtocol`, which describes the methods.

    Args:
        number: the client's number.
        half: the client half. Its last pieces are the run's blocks; there may be another piece before the first block.
        run: the terms of the run.
        streams: the noise streams of the trainable tensors, as in the log's header.
        batches: returns the samples of a round.
        weights: returns all arrays in the half's digest, in order.
        wire: the dtype of cuts and multipliers on the wire.
        gradient: computes the gradient, for the estimator "backward".
        microbatch: the samples of one pass of `gradient`; 0: all.
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
        """The number of rounds in its half."""
        return self.replica.applied

    @property
    def epoch(self) -> int:
        """How often the server had been restarted when these rounds were committed."""
        return self.replica.epoch

    def decoded(self, data: bytes) -> Message:
        """Decode a message from the server. Raises MessageError."""
        return decode(data)

    def request_statistics(self) -> Statistics:
        """The message that requests the run's running statistics."""
        return self._statistics(np.empty(0, np.float32), np.empty(0, np.int32))

    def statistics(self, message: Calibration) -> Statistics:
        """Estimate its own running statistics: see `hosfl.methods.client.Client.statistics`."""
        running = self._check_calibration(message)
        if len(message.statistics):
            raise MessageError(f"{len(message.statistics)} statistics in an ask for some")
        if self.applied:
            raise MessageError(f"asked for statistics of round 0 after {self.applied} rounds, of this run or another")
        self.calibrated = False
        values, samples = running.estimate()
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
        """Return the estimator. Raises MessageError if the run has none, or for another client's message."""
        if self.running is None:
            raise MessageError("running statistics in a run that estimates none")
        if message.client != self.number:
            raise MessageError(f"a message for client {message.client}, this is client {self.number}")
        return self.running

    def _statistics(self, values: NDArray[np.float32], samples: NDArray[np.int32]) -> Statistics:
        """Make a message with statistics and the number of samples that they are of."""
        return Statistics(client=self.number, round=0, epoch=self.epoch, statistics=values, samples=samples)

    def hello(self) -> Hello:
        """The message that says which rounds it has applied."""
        return Hello(client=self.number, round=self.applied, epoch=self.epoch)

    def reset(self) -> None:
        """Start again from the base weights."""
        self.replica.reset()

    def load(self, state: ReplicaState) -> None:
        """Load a saved state of the replica."""
        self.replica.load(state)

    def catch_up(self, message: Message) -> Differs | None:
        """Apply records or pool moves. Returns `Differs` if the half turns out to be wrong: see `Replica.follow`."""
        if not isinstance(message, (Records, PoolMoves)):
            raise MessageError(f"client {self.number} expects records, got {type(message).__name__}")
        return self.replica.follow(message, self.number)

    def output(self, round: int) -> Cut:
        """Compute the cut of the round's batch, and return the message that carries it."""
        self._round = round
        self._batch = batch = self.batches(round)
        self._cut = self.half(batch.inputs)
        cut, scales = packed(self._cut, self.wire)
        masks = {"mask": batch.named()[MASK].astype(np.uint8)} if MASK in batch.named() else {}
        labels = batch.labels if batch.labels.dtype == np.float32 else batch.labels.astype(np.int32)
        return Cut(client=self.number, round=round, epoch=self.epoch, cut=cut, scales=scales, labels=labels, **masks)

    def answer(self, message: Message) -> Scalars:
        """Measure the derivatives along the round's directions. The weights have the same bits afterwards."""
        multiplier = self._multiplier(message)
        seeds, scalars = self.run.seeds(self._round), np.zeros(self.run.directions, np.float32)
        parts = list(self.run.parts())
        if self.gradient is None:
            for piece, (block, positions) in enumerate(parts, self.half.pieces - len(parts)):
                scalars[positions] = self._probe(piece, block.tensors, multiplier, seeds[positions])
        else:
            gradients = self._gradients(self.gradient, self.half.pieces - len(parts), multiplier)
            for block, positions in parts:
                noise = _noise_arguments(self.replica, block.tensors)
                scalars[positions] = project([gradients[t] for t in block.tensors], seeds[positions], **noise)
        return Scalars(client=self.number, round=self._round, epoch=self.epoch, scalars=scalars)

    def _multiplier(self, message: Message) -> NDArray[np.float32]:
        """Unpack the message's multiplier. Raises MessageError unless it is finite and of the cut's shape."""
        message = multiplier_of(message, self.number, self._round, self.epoch)
        multiplier = unpacked(message.multiplier, message.scales, self.wire)
        if multiplier.shape != self._cut.shape:
            raise MessageError(f"the cut is {self._cut.shape}, the multiplier {multiplier.shape}")
        if not np.isfinite(multiplier).all():
            raise MessageError("a multiplier with infinite or NaN elements")
        return multiplier

    def _gradients(self, gradient: Gradient, piece: int, multiplier: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Compute the gradient of <multiplier, cut>, one microbatch after the other.

        piece: the first block's piece, where the passes begin.
        """
        size, hidden = self.microbatch or len(multiplier), self.half.piece_input(piece, self._batch.inputs)
        totals = [np.zeros(tensor.shape, np.float32) for tensor in self.replica.tensors]
        for begin in range(0, len(multiplier), size):
            rows = slice(begin, begin + size)
            gradients = gradient(self._batch[rows].inputs, multiplier[rows], None if hidden is None else hidden[rows])
            for total, part in zip(totals, gradients, strict=True):
                total += part
        return totals

    def _probe(
        self, piece: int, block: Sequence[int], multiplier: NDArray[np.float32], seeds: Sequence[int]
    ) -> list[float]:
        """Measure the derivatives along directions that move the tensors of one block.

        piece: the block's, where the passes begin. block: positions of its tensors. seeds: one per direction.
        """
        forward = self.half.forward_from(piece, self._batch.inputs)
        perturbation, mu, scalars = _Perturbation(self.replica, block), self.replica.mu, []
        try:
            for seed in seeds:
                perturbation.move(seed, mu)
                ahead, behind, distance = forward(), self._cut, mu
                if self.run.estimator == "two-sided":
                    perturbation.move(seed, -mu)
                    behind, distance = forward(), 2 * mu
                scalars.append(inner(multiplier, ahead, behind) / distance)
                del ahead, behind  # frees them before the next pass
        finally:
            perturbation.restore()
        return scalars

    def digest(self) -> str:
        """SHA-256 of all weights, in hexadecimal; the same at every client."""
        return digest(self.weights()).hex()


def _noise_arguments(replica: Replica, block: Sequence[int]) -> dict[str, Any]:
    """The keyword arguments of the kernels for noise on a replica's tensors at these positions."""
    factors, streams = [replica.run.factors[t] for t in block], [replica.streams[t] for t in block]
    return {"dist": replica.run.dist, "factors": factors, "streams": streams}


class _Perturbation:
    """Moves some of a replica's tensors: to th + step * u(seed) by `move`, back to th by `restore`.

    On the lattice moves are exact, and one pass goes from one point to the next. Off the lattice every move rounds, so
    th is kept in copies of the tensors.
    """

    def __init__(self, replica: Replica, block: Sequence[int]) -> None:
        self.tensors = [replica.tensors[t] for t in block]
        self.noise = _noise_arguments(replica, block)
        self.saved = None if replica.lattice is not None else [np.copy(t) for t in self.tensors]
        self.applied: list[tuple[int, float]] = []  # the (seed, step) of the current point; empty at th

    def move(self, seed: int, step: float) -> None:
        """Move to th + step * u(seed), from wherever the tensors are."""
        if self.saved is None:
            self._replay([(seed, step)])
        else:
            self.restore()
            perturb_(self.tensors, seed, step, **self.noise)

    def restore(self) -> None:
        """Move back to th."""
        if self.saved is None:
            self._replay([])
            return
        with uninterrupted():
            for tensor, saved in zip(self.tensors, self.saved, strict=True):
                tensor[...] = saved

    def _replay(self, target: list[tuple[int, float]]) -> None:
        """Undo the applied move and make the target's, in one pass."""
        seeds = [seed for seed, _ in self.applied + target]
        steps = [-step for _, step in self.applied] + [step for _, step in target]
        with uninterrupted():
            replay_(self.tensors, seeds, steps, **self.noise)
            self.applied = target


def inner(multiplier: NDArray[np.float32], output: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """<multiplier, output - other>, summed in float64, a few samples at a time: see `hosfl.probing.probe.inner`."""
    size = max(1, CHUNK * len(output) // max(1, output.size))
    rows = (slice(begin, begin + size) for begin in range(0, len(output), size))
    return sum(float(((output[some] - other[some]).astype(np.float64) * multiplier[some]).sum()) for some in rows)
