"""Probing: directional derivatives of the client half from forward passes. The weights keep their bits."""

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
    displaced,
    evaluate_displaced,
    large_tables,
    no_autocast_cache,
    refuse_writers,
)
from hosfl.probing.forward_mode import Tangents, derivative
from hosfl_kernels import project, replay_

# How a directional derivative is measured. One-sided differences are the paper's: P + 1 passes, and an error that grows
# with the step, by the curvature. Two-sided ones take 2 P + 1 passes. Forward mode has no step. Backward is for clients
# that can backpropagate, perhaps a few samples at a time: one pass measures any number of directions.
ESTIMATORS = ("one-sided", "two-sided", "forward", "backward")

PART = 1 << 16  # elements of the cut that are in float64 at a time
WAITING = 1 << 20  # bytes of small gradients that are kept, to go through the noise kernel together


@dataclass(frozen=True)
class Moved:
    """The tensors that directions move, with the stream of each one's noise and the scale of directions on it.

    factors: the scales, powers of two.
    """

    tensors: Sequence[Tensor]
    streams: Sequence[int]
    factors: Sequence[float]

    @classmethod
    def of(cls, module: nn.Module, factors: Sequence[float] | None = None) -> Moved:
        """The trainable parameters of a module. factors: 1 for each if None."""
        tensors, streams = trainable(module)
        return cls(tensors, streams, [1.0] * len(tensors) if factors is None else factors)

    def subset(self, positions: Sequence[int]) -> Moved:
        """The tensors at these positions."""
        tensors, streams, factors = self.tensors, self.streams, self.factors
        return Moved([tensors[t] for t in positions], [streams[t] for t in positions], [factors[t] for t in positions])


def trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[int]]:
    """The parameters that require grad, and their streams.

    A parameter's stream is its position among *all* parameters, so that freezing one does not change the others' noise.
    Tied parameters are listed once.
    """
    numbered = [(p, stream) for stream, p in enumerate(module.parameters()) if p.requires_grad]
    return [p for p, _ in numbered], [stream for _, stream in numbered]


def inner(multiplier: Tensor, output: Tensor, other: Tensor, distance: float) -> float:
    """<multiplier, output - other> / distance, summed in float64. The difference comes first, since the two inner
    products would nearly cancel. A few samples at a time: in float64 all of them would take six times the cut's memory.
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

    Moves the weights in place. On the lattice that is exact, so that afterwards they hold the same bits, also if
    `forward` raises or is interrupted. It takes one pass over the weights from one point to the next: back along u_p
    and out along u_(p+1) together. It needs no memory of the weights' size. Off the lattice every move rounds: use
    `probe_untouched`.

    module: what `forward` calls, not compiled. If given, only those rows of its large nn.Embedding tables are moved
    that the batch looks up, in a copy of them: the same bits, at the cost of a batch's rows instead of a vocabulary's.
    A table that the model also reads otherwise is copied whole. It must be read as its module's `weight`: a reference
    that the model keeps elsewhere, such as in a list, has the weights that did not move.
    """
    tensors = moved.tensors
    tables = nn.ModuleList() if module is None else large_tables(module, tensors)
    by_row = {id(p) for p in tables.parameters()}
    looked_up = moved.subset([t for t, p in enumerate(tensors) if id(p) in by_row])
    moved = moved.subset([t for t, p in enumerate(tensors) if id(p) not in by_row])
    position: list[tuple[int, float]] = []  # (seed, step) where the weights are now; empty at th

    def rows(seed: int, step: float) -> AbstractContextManager[None]:
        if not looked_up.tensors:
            return nullcontext()
        moves = Displacement(looked_up.tensors, looked_up.streams, seed, step, "rademacher", looked_up.factors)
        return displaced(tables, moves)

    def move(to: list[tuple[int, float]]) -> None:
        seeds = [seed for seed, _ in position + to]
        steps = [-step for _, step in position] + [step for _, step in to]
        with uninterrupted():
            replay_(moved.tensors, seeds, steps, factors=moved.factors, streams=moved.streams)
            position[:] = to

    def output(seed: int, step: float) -> Tensor:
        move([(seed, step)])
        with no_autocast_cache(), rows(seed, step):
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
    """Directional derivatives for weights off the lattice, float32 [P]: reads th in any dtype, never writes it.

    v_p as in `probe_in_place`; each weight of th + mu * u_p is rounded to its dtype. inputs: a tensor, a tuple of
    positional arguments or a mapping of keyword arguments. dist: "rademacher" or "gaussian". moved: the tensors that
    directions move; None: all trainable ones of the module.

    Off the lattice, adding and subtracting would round twice, and a client that probes would drift from one that does
    not. Costs the memory of one layer's weights while that layer runs. Raises as `evaluate_displaced`.
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
    """<multiplier, difference> / distance for every seed. output: (seed, step) -> the cut at th + step * u."""
    scalars = []
    for seed in seeds:
        ahead = output(seed, mu)
        behind, distance = (output(seed, -mu), 2 * mu) if two_sided else (cut, mu)
        scalars.append(inner(multiplier, ahead, behind, distance))
        del ahead, behind  # frees them before the next pass
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

    There is no step and no error of one, which bfloat16 needs. Weights are only read. A pass costs about two to three
    forward passes, the memory of one layer's weights, and twice the activations or more, since torch's derivative of
    BatchNorm makes more temporary tensors. Raises as `hosfl.probing.forward_mode.derivative`.
    """
    moved = moved or Moved.of(module)
    scalars = []
    for seed in seeds:
        tangents = Tangents(moved.tensors, moved.streams, seed, dist, moved.factors)
        change = derivative(module, inputs, tangents)
        scalars.append(inner(multiplier, change, torch.zeros_like(change), 1.0))
        del change  # frees it before the next pass
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

    One forward and one backward pass for any number of directions measure what P forward passes would, without a step.
    The gradient is never in memory as a whole: each tensor's is projected by the noise kernel, and freed, soon after it
    is computed. Backpropagation ends at the first layer with trainable weights, and an embedding's gradient has only
    the rows that were looked up. Weights are only read, and `grad` is afterwards what it was.

    microbatch: samples that go through together, 0: all. The memory is that of their activations. Samples must be the
    first dimension of every tensor of the inputs, and must not depend on each other, as in eval mode they do not.
    moved: as in `probe_untouched`. measured: for each of its tensors, which of the directions move it; None: all.

    Raises: ValueError as `evaluate_displaced`, and with a microbatch as `check_samples_independent`.
    """
    refuse_writers(module)
    if microbatch:
        check_samples_independent(module)
    moved = moved or Moved.of(module)
    parameters = moved.tensors
    projected = _Projected(moved, seeds, dist, measured)
    saved = [p.grad for p in parameters]  # the user's own
    hooks = []
    try:
        for position, parameter in enumerate(parameters):
            parameter.grad = None
            hooks.append(parameter.register_post_accumulate_grad_hook(partial(projected.take, position=position)))
        multipliers = multiplier.split(microbatch or len(multiplier))
        with torch.enable_grad(), recompute_wide_weights(), Lookups(sparse=True):
            for part, m in zip(microbatches(inputs, microbatch), multipliers, strict=True):
                output = call(module, part)
                if output.requires_grad:  # else it does not depend on the weights that move
                    torch.autograd.backward(output, m, inputs=parameters)
        return projected.scalars()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, saved, strict=True):
            parameter.grad = gradient


class _Projected:
    """Sums up <g, u_p> for every direction p, from gradients that arrive tensor by tensor and are freed soon."""

    def __init__(self, moved: Moved, seeds: Sequence[int], dist: str, measured: Sequence[slice] | None) -> None:
        self.moved, self.seeds, self.dist = moved, seeds, dist
        self.measured = [slice(None)] * len(moved.tensors) if measured is None else measured
        self._sums = torch.zeros(len(seeds), dtype=torch.float64)
        self._waiting: dict[int, Tensor] = {}  # gradients by the parameter's position

    def take(self, parameter: Tensor, position: int) -> None:
        """Project a parameter's `grad`, or keep it for later if it is small, and set it to None."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if gradient.is_sparse:
            self._project_rows(gradient.coalesce(), position)
            return
        gradient = gradient.float().contiguous()
        if gradient.nbytes > WAITING:
            self._project({position: gradient})
            return
        # A new tensor, since gradients may share memory with each other and with the multiplier.
        self._waiting[position] = self._waiting.get(position, 0.0) + gradient
        if sum(g.nbytes for g in self._waiting.values()) > WAITING:
            self._project(self._waiting)
            self._waiting.clear()

    def scalars(self) -> Tensor:
        """<g, u_p>, float32 [P], after the last gradient."""
        self._project(self._waiting)
        return self._sums.float()

    def _project(self, gradients: dict[int, Tensor]) -> None:
        measured = self.measured
        # Tensors that the same directions move are neighbours.
        for _, group in groupby(gradients, lambda t: (measured[t].start, measured[t].stop)):
            ts = list(group)
            self._add(measured[ts[0]], [gradients[t] for t in ts], self.moved.subset(ts))

    def _project_rows(self, table: Tensor, position: int) -> None:
        rows, numbers = table.values().float(), table.indices()[0].tolist()
        starts = [number * rows.shape[1] for number in numbers]
        self._add(self.measured[position], rows.unbind(), self.moved.subset([position] * len(rows)), starts)

    def _add(
        self, which: slice, gradients: Sequence[Tensor], moved: Moved, starts: Sequence[int] | None = None
    ) -> None:
        factors, streams = moved.factors, moved.streams
        self._sums[which] += project(
            gradients, self.seeds[which], dist=self.dist, factors=factors, streams=streams, starts=starts
        )


class Lookups(TorchFunctionMode):
    """Makes the gradients of embeddings those of what they compute, as all other estimators measure it.

    torch's leave out the row `padding_idx`, and with `scale_grad_by_freq` divide by a row's frequency.

    sparse: gradients of trainable tables have only the rows that were looked up.
    """

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        if function is nn.functional.embedding:
            arguments = dict(zip(_LOOKUP, args, strict=False)) | arguments
            weight, args = arguments["weight"], ()
            arguments |= {"padding_idx": None, "scale_grad_by_freq": False}
            sparse = self.sparse and weight.is_leaf and weight.requires_grad
            arguments["sparse"] = arguments.get("sparse", False) or sparse
        elif function is nn.functional.embedding_bag:
            arguments = dict(zip(_LOOKUPS, args, strict=False)) | arguments | {"scale_grad_by_freq": False}
            args = ()
        return function(*args, **arguments)


_LOOKUP = [*signature(nn.functional.embedding).parameters]
_LOOKUPS = [*signature(nn.functional.embedding_bag).parameters]
