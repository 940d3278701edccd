"""Probing: the client half's directional derivatives from forward passes. It leaves no trace in the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosfl.halves.inputs import Inputs, call, check_samples_independent, microbatches
from hosfl.halves.narrow import recompute_wide_weights
from hosfl.interrupts import uninterrupted
from hosfl.probing.displaced import (
    Displacement,
    casts_forgotten,
    displaced,
    evaluate_displaced,
    large_tables,
    refuse_writers,
)
from hosfl.probing.forward_mode import Tangents, derivative
from hosfl_kernels import project, replay_

# How a directional derivative is measured. One-sided differences are the paper's: P + 1 passes; their error grows with
# the step, by the curvature. Two-sided ones take 2 P + 1, forward mode has no step at all. Backward is for clients that
# can backpropagate, if only some samples at a time: one pass measures any number of directions.
ESTIMATORS = ("one-sided", "two-sided", "forward", "backward")

PART = 1 << 16  # elements of the cut that are in float64 at a time
WAITING = 1 << 20  # bytes of gradients that may wait for others: small tensors go through the noise kernel together


@dataclass(frozen=True)
class Moved:
    """Tensors that directions move; of each its noise's stream, and the power of two that scales directions on it."""

    tensors: Sequence[Tensor]
    streams: Sequence[int]
    factors: Sequence[float]

    @classmethod
    def of(cls, module: nn.Module, factors: Sequence[float] | None = None) -> Moved:
        """All that is trainable in a module."""
        tensors, streams = trainable(module)
        return cls(tensors, streams, [1.0] * len(tensors) if factors is None else factors)

    def some(self, positions: Sequence[int]) -> Moved:
        """Those at these positions."""
        tensors, streams, factors = self.tensors, self.streams, self.factors
        return Moved([tensors[t] for t in positions], [streams[t] for t in positions], [factors[t] for t in positions])


def trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[int]]:
    """The parameters that move, and their streams.

    A parameter's stream is its position among *all* parameters, so that freezing one changes nobody else's noise.
    Tied parameters are listed once.
    """
    numbered = [(p, stream) for stream, p in enumerate(module.parameters()) if p.requires_grad]
    return [p for p, _ in numbered], [stream for _, stream in numbered]


def inner(multiplier: Tensor, output: Tensor, other: Tensor, distance: float) -> float:
    """<multiplier, output - other> / distance, summed in float64. The difference first: two products would cancel.

    Some samples at a time: all of them in float64 would be six times the cut, which small halves never need.
    """
    at_once = max(1, PART * len(output) // max(1, output.numel()))
    parts = zip(multiplier.split(at_once), output.split(at_once), other.split(at_once), strict=True)
    return float(sum(((ahead - behind).double() * m.double()).sum() for m, ahead, behind in parts)) / distance


def probe_in_place(
    forward: Callable[[], Tensor],
    moved: Moved,
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
    two_sided: bool = False,
    module: nn.Module | None = None,
) -> Tensor:
    """Directional derivatives along Rademacher directions, float32 [P], for weights on the lattice.

    v_p = <multiplier, forward() at th + mu * u_p - cut> / mu, of `moved` u_p,t = factors[t] * z(seeds[p], streams[t]);
    two_sided: <multiplier, forward() at th + mu * u_p - forward() at th - mu * u_p> / (2 mu).
    Call it under `evaluating`: the weights must not be recorded by autograd.

    Moves the weights themselves: exact there, so that afterwards they hold the same bits, also if `forward` raises or
    is interrupted. From one place to the next it takes one pass: back along u_p and out along u_(p+1). No memory of the
    weights' size. Off the lattice every move rounds: use `probe_untouched`.

    module: what `forward` calls, not compiled. Of a large nn.Embedding in it only the rows that a batch looks up are
    moved then, and in a copy of them: the same bits, for the price of the batch in place of the vocabulary's. A
    table of which the model also reads other rows is copied whole meanwhile. It must be read as its module's `weight`:
    who keeps a reference of its own, in a list say, sees it unmoved.
    """
    tensors = moved.tensors
    tables = nn.ModuleList() if module is None else large_tables(module, tensors)
    by_row = {id(p) for p in tables.parameters()}
    looked_up = moved.some([t for t, p in enumerate(tensors) if id(p) in by_row])
    moved = moved.some([t for t, p in enumerate(tensors) if id(p) not in by_row])
    standing: list[tuple[int, float]] = []  # seed and distance of where the weights stand: one at most

    def rows(seed: int, step: float) -> AbstractContextManager[None]:
        if not looked_up.tensors:
            return nullcontext()
        moves = Displacement(looked_up.tensors, looked_up.streams, seed, step, "rademacher", looked_up.factors)
        return displaced(tables, moves)

    def move(to: list[tuple[int, float]]) -> None:
        seeds = [seed for seed, _ in standing + to]
        steps = [-step for _, step in standing] + [step for _, step in to]
        with uninterrupted():
            replay_(moved.tensors, seeds, steps, factors=moved.factors, streams=moved.streams)
            standing[:] = to

    def output(seed: int, step: float) -> Tensor:
        move([(seed, step)])
        with casts_forgotten(), rows(seed, step):
            return forward()

    try:
        return _differences(output, multiplier, cut, seeds, mu, two_sided)
    finally:
        move([])


def probe_untouched(
    module: nn.Module,
    inputs: Inputs,
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
    dist: str,
    moved: Moved | None = None,
    two_sided: bool = False,
) -> Tensor:
    """Directional derivatives for weights on no lattice, float32 [P]: reads th in any dtype, never writes it.

    v_p as in `probe_in_place`; each weight of th + mu * u_p is rounded to its dtype. inputs: a tensor, a tuple of
    positional arguments or a mapping of keyword arguments. dist: "rademacher" or "gaussian". moved: what directions
    move; None: all that is trainable in the module.

    Off the lattice adding and taking away rounds twice, and a client that probes would drift from one that does not.
    Costs the memory of one layer's weights while that layer runs. Raises as `evaluate_displaced`.
    """
    moved = moved or Moved.of(module)

    def output(seed: int, step: float) -> Tensor:
        displacement = Displacement(moved.tensors, moved.streams, seed, step, dist, moved.factors)
        result: Tensor = evaluate_displaced(module, inputs, displacement)
        return result

    return _differences(output, multiplier, cut, seeds, mu, two_sided)


def _differences(
    output: Callable[[int, float], Tensor],
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
    two_sided: bool,
) -> Tensor:
    """output: (seed, step) -> the cut at th + step * u."""
    scalars = []
    for seed in seeds:
        ahead = output(seed, mu)
        behind, distance = (output(seed, -mu), 2 * mu) if two_sided else (cut, mu)
        scalars.append(inner(multiplier, ahead, behind, distance))
        del ahead, behind  # not there while the next pass runs
    return torch.tensor(scalars, dtype=torch.float32)


def probe_forward(
    module: nn.Module,
    inputs: Inputs,
    multiplier: Tensor,
    seeds: Sequence[int],
    dist: str,
    moved: Moved | None = None,
) -> Tensor:
    """Directional derivatives by forward-mode differentiation, float32 [P]: v_p = <multiplier, J u_p>.

    No step, so none of its error: what bfloat16 needs. Weights are only read. A pass costs about two to three forward
    passes, the memory of one layer's weights, and twice the activations or more: torch's derivative of BatchNorm makes
    more such tensors on the way. Raises as `hosfl.probing.forward_mode.derivative`.
    """
    moved = moved or Moved.of(module)
    scalars = []
    for seed in seeds:
        tangents = Tangents(moved.tensors, moved.streams, seed, dist, moved.factors)
        change = derivative(module, inputs, tangents)
        scalars.append(inner(multiplier, change, torch.zeros_like(change), 1.0))
        del change  # not there while the next pass runs
    return torch.tensor(scalars, dtype=torch.float32)


def probe_backward(
    module: nn.Module,
    inputs: Inputs,
    multiplier: Tensor,
    seeds: Sequence[int],
    dist: str,
    moved: Moved | None = None,
    microbatch: int = 0,
    measured: Sequence[slice] | None = None,
) -> Tensor:
    """Directional derivatives from the gradient, float32 [P]: v_p = <g, u_p>, g = J^T multiplier by backpropagation.

    One forward and one backward pass however many directions; what P forward passes measure one by one, without a step.
    The gradient never exists whole: a tensor's goes through the noise kernel soon after it is there, and is freed.
    microbatch: samples that go through together, 0 for all: what has to be kept of them for the backward pass is the
    memory that this costs. Samples must not depend on each other, as in eval mode they do not, and be the first
    dimension of every tensor of the inputs. Backpropagation ends at the first layer that has something to train, and of
    an embedding's gradient only the rows that were looked up exist. Weights are only read, and `grad` is what it was.
    moved: as in `probe_untouched`. measured: of each of its tensors, which of the directions move it; None: all.

    Raises: ValueError as `evaluate_displaced`, and with a microbatch as `check_samples_independent`.
    """
    refuse_writers(module)
    if microbatch:
        check_samples_independent(module)
    moved = moved or Moved.of(module)
    parameters = moved.tensors
    projected = _Projected(moved, seeds, dist, measured)
    held = [p.grad for p in parameters]  # the user's own
    hooks = []
    try:
        for position, parameter in enumerate(parameters):
            parameter.grad = None
            hooks.append(parameter.register_post_accumulate_grad_hook(partial(projected.take, position=position)))
        multipliers = multiplier.split(microbatch or len(multiplier))
        with torch.enable_grad(), recompute_wide_weights(), Lookups(sparse=True):
            for part, m in zip(microbatches(inputs, microbatch), multipliers, strict=True):
                output = call(module, part)
                if output.requires_grad:  # or nothing that moves has a part in it
                    torch.autograd.backward(output, m, inputs=parameters)
        return projected.scalars()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, held, strict=True):
            parameter.grad = gradient


class _Projected:
    """<g, u_p> for every direction p, from gradients g that come tensor by tensor and are freed soon."""

    def __init__(self, moved: Moved, seeds: Sequence[int], dist: str, measured: Sequence[slice] | None) -> None:
        self.moved, self.seeds, self.dist = moved, seeds, dist
        self.measured = [slice(None)] * len(moved.tensors) if measured is None else measured
        self._sums = torch.zeros(len(seeds), dtype=torch.float64)
        self._waiting: dict[int, Tensor] = {}  # gradients by the parameter's position

    def take(self, parameter: Tensor, position: int) -> None:
        """Take a parameter's gradient from it."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if gradient.is_sparse:
            self._project_rows(gradient.coalesce(), position)
            return
        gradient = gradient.float().contiguous()
        if gradient.nbytes > WAITING:
            self._project({position: gradient})
            return
        # A sum of its own: gradients may share memory with each other and with the multiplier.
        self._waiting[position] = self._waiting.get(position, 0.0) + gradient
        if sum(g.nbytes for g in self._waiting.values()) > WAITING:
            self._project(self._waiting)
            self._waiting.clear()

    def scalars(self) -> Tensor:
        """float32 [P], when all gradients were taken."""
        self._project(self._waiting)
        return self._sums.float()

    def _project(self, gradients: dict[int, Tensor]) -> None:
        of = self.measured
        for _, some in groupby(gradients, lambda t: (of[t].start, of[t].stop)):  # tensors moved together lie together
            ts = list(some)
            self._add(of[ts[0]], [gradients[t] for t in ts], self.moved.some(ts))

    def _project_rows(self, table: Tensor, position: int) -> None:
        rows, numbers = table.values().float(), table.indices()[0].tolist()
        starts = [number * rows.shape[1] for number in numbers]
        self._add(self.measured[position], rows.unbind(), self.moved.some([position] * len(rows)), starts)

    def _add(
        self, which: slice, gradients: Sequence[Tensor], moved: Moved, starts: Sequence[int] | None = None
    ) -> None:
        factors, streams = moved.factors, moved.streams
        self._sums[which] += project(
            gradients, self.seeds[which], dist=self.dist, factors=factors, streams=streams, starts=starts
        )


class Lookups(TorchFunctionMode):
    """Embeddings have the gradient of what they compute: torch leaves out that of `padding_idx`, and scales by
    frequency where it is told to, while every other estimator moves such rows like all others.

    sparse: of a table that moves it has the rows that were looked up, and not the whole table's size.
    """

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        told = dict(kwargs or {})
        if function is nn.functional.embedding:
            told = dict(zip(_LOOKUP, args, strict=False)) | told
            weight, args = told["weight"], ()
            told |= {"padding_idx": None, "scale_grad_by_freq": False}
            told["sparse"] = told.get("sparse", False) or (self.sparse and weight.is_leaf and weight.requires_grad)
        elif function is nn.functional.embedding_bag:
            told = dict(zip(_LOOKUPS, args, strict=False)) | told | {"scale_grad_by_freq": False}
            args = ()
        return function(*args, **told)


_LOOKUP = [*signature(nn.functional.embedding).parameters]
_LOOKUPS = [*signature(nn.functional.embedding_bag).parameters]
