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
# with the step and the curvature. Two-sided ones take 2 P + 1 passes. Forward mode has no step. Backward is for clients
# that can backpropagate, perhaps a few samples at a time: one pass measures any number of directions.
ESTIMATORS = ("one-sided", "two-sided", "forward", "backward")

CHUNK = 1 << 16  # elements of the cut that are converted to float64 at a time
MAX_PENDING = 1 << 20  # bytes of small gradients that are collected, to go through the noise kernel together


@dataclass(frozen=True)
class PerturbedTensors:
    """The tensors that directions perturb.

    streams: the number of each tensor's noise stream. factors: the scale of directions on each, a power of two.
    """

    tensors: Sequence[Tensor]
    streams: Sequence[int]
    factors: Sequence[float]

    @classmethod
    def of(cls, module: nn.Module, factors: Sequence[float] | None = None) -> PerturbedTensors:
        """The trainable parameters of a module. factors: None: 1 for each."""
        tensors, streams = trainable(module)
        return cls(tensors, streams, [1.0] * len(tensors) if factors is None else factors)

    def subset(self, positions: Sequence[int]) -> PerturbedTensors:
        """The tensors at these positions."""
        tensors, streams, factors = self.tensors, self.streams, self.factors
        return PerturbedTensors(
            [tensors[t] for t in positions], [streams[t] for t in positions], [factors[t] for t in positions]
        )


def trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[int]]:
    """The parameters that require grad, and their streams.

    A parameter's stream is its position among *all* parameters, so that freezing one does not change the others' noise.
    Tied parameters are listed once.
    """
    numbered = [(p, stream) for stream, p in enumerate(module.parameters()) if p.requires_grad]
    return [p for p, _ in numbered], [stream for _, stream in numbered]


def inner(multiplier: Tensor, output: Tensor, other: Tensor, distance: float) -> float:
    """Compute <multiplier, output - other> / distance, summed in float64.

    The subtraction comes first, since the two inner products would nearly cancel. Works on a few samples at a time: in
    float64 all of them would take six times the cut's memory.
    """
    size = max(1, CHUNK * len(output) // max(1, output.numel()))
    parts = zip(multiplier.split(size), output.split(size), other.split(size), strict=True)
    return float(sum(((ahead - behind).double() * m.double()).sum() for m, ahead, behind in parts)) / distance


def probe_in_place(
    forward: Callable[[], Tensor],
    perturbed: PerturbedTensors,
    multiplier: Tensor,
    cut: Tensor,
    seeds: Sequence[int],
    mu: float,
    two_sided: bool = False,
    module: nn.Module | None = None,
) -> Tensor:
    """Measure directional derivatives along Rademacher directions for weights on the lattice. Returns v, float32 [P].

    v_p = <multiplier, forward() at th + mu * u_p - cut> / mu, with u_p,t = factors[t] * z(seeds[p], streams[t]);
    two_sided: <multiplier, forward() at th + mu * u_p - forward() at th - mu * u_p> / (2 mu).
    Call it under `evaluating`: the weights must not be recorded by autograd.

    Moves the weights in place. On the lattice that is exact, so that afterwards they hold the same bits, also if
    `forward` raises or is interrupted. One pass over the weights goes from one point to the next: back along u_p and
    out along u_(p+1) together. It needs no memory of the weights' size. Off the lattice every move rounds: use
    `probe_untouched`.

    module: the module that `forward` calls, not compiled. If given, large nn.Embedding tables are not moved. Instead
    the rows that the batch looks up are copied and moved: the same bits, at the cost of a batch's rows instead of a
    vocabulary's. A table that the model also reads otherwise is copied whole. The model must read it as its module's
    `weight`: a reference that it keeps elsewhere, such as in a list, gives the weights at th.
    """
    tensors = perturbed.tensors
    tables = nn.ModuleList() if module is None else large_tables(module, tensors)
    table_ids = {id(p) for p in tables.parameters()}
    by_row = perturbed.subset([t for t, p in enumerate(tensors) if id(p) in table_ids])
    in_place = perturbed.subset([t for t, p in enumerate(tensors) if id(p) not in table_ids])
    applied: list[tuple[int, float]] = []  # the (seed, step) of the weights' current point; empty at th

    def rows_displaced(seed: int, step: float) -> AbstractContextManager[None]:
        if not by_row.tensors:
            return nullcontext()
        displacement = Displacement(by_row.tensors, by_row.streams, seed, step, "rademacher", by_row.factors)
        return displaced(tables, displacement)

    def move(target: list[tuple[int, float]]) -> None:
        seeds = [seed for seed, _ in applied + target]
        steps = [-step for _, step in applied] + [step for _, step in target]
        with uninterrupted():
            replay_(in_place.tensors, seeds, steps, factors=in_place.factors, streams=in_place.streams)
            applied[:] = target

    def output(seed: int, step: float) -> Tensor:
        move([(seed, step)])
        with no_autocast_cache(), rows_displaced(seed, step):
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
    perturbed: PerturbedTensors | None = None,
    two_sided: bool = False,
) -> Tensor:
    """Measure directional derivatives without writing the weights, on the lattice or off it. Returns v, float32 [P].

    v_p as in `probe_in_place`; each weight of th + mu * u_p is rounded to its dtype. inputs: a tensor, a tuple of
    positional arguments or a mapping of keyword arguments. dist: "rademacher" or "gaussian". perturbed: None: all
    trainable parameters of the module.

    Off the lattice, adding and subtracting would round twice, and a client that probes would drift from one that does
    not. Costs the memory of one layer's weights while that layer runs. Raises as `evaluate_displaced`.
    """
    tensors = perturbed or PerturbedTensors.of(module)

    def output(seed: int, step: float) -> Tensor:
        displacement = Displacement(tensors.tensors, tensors.streams, seed, step, dist, tensors.factors)
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
    """Compute <multiplier, difference> / distance for every seed. output: the cut at th + step * u(seed)."""
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
    perturbed: PerturbedTensors | None = None,
) -> Tensor:
    """Compute directional derivatives by forward mode. Returns v, float32 [P]: v_p = <multiplier, J u_p>.

    There is no step, and so no error of a step: in bfloat16 that matters. Weights are only read. A pass costs about two
    to three forward passes, the memory of one layer's weights, and twice the activations or more, since torch's
    derivative of BatchNorm makes more temporary tensors. perturbed: as in `probe_untouched`. Raises as
    `hosfl.probing.forward_mode.derivative`.
    """
    perturbed = perturbed or PerturbedTensors.of(module)
    scalars = []
    for seed in seeds:
        tangents = Tangents(perturbed.tensors, perturbed.streams, seed, dist, perturbed.factors)
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
    perturbed: PerturbedTensors | None = None,
    microbatch: int = 0,
    measured: Sequence[slice] | None = None,
) -> Tensor:
    """Compute directional derivatives from the gradient. Returns v, float32 [P]: v_p = <g, u_p>, g = J^T multiplier.

    One forward and one backward pass, for any number of directions, measure what P forward passes would, without a
    step. The gradient is never in memory as a whole: each tensor's is projected by the noise kernel, and freed, soon
    after it is computed. Backpropagation ends at the first layer with trainable weights, and an embedding's gradient
    has only the rows that were looked up. Weights are only read, and `grad` is restored.

    microbatch: samples per pass, 0: all. The memory is that of their activations. Samples must be the first dimension
    of every tensor of the inputs, and must not depend on each other, as in eval mode they do not. perturbed: as in
    `probe_untouched`. measured: for each of its tensors, the slice of the directions that perturb it; None: all.

    Raises: ValueError as `evaluate_displaced`, and with a microbatch as `check_samples_independent`.
    """
    refuse_writers(module)
    if microbatch:
        check_samples_independent(module)
    perturbed = perturbed or PerturbedTensors.of(module)
    parameters = perturbed.tensors
    projection = _GradientProjection(perturbed, seeds, dist, measured)
    saved = [p.grad for p in parameters]
    hooks = []
    try:
        for position, parameter in enumerate(parameters):
            parameter.grad = None
            hooks.append(parameter.register_post_accumulate_grad_hook(partial(projection.add, position=position)))
        multipliers = multiplier.split(microbatch or len(multiplier))
        with torch.enable_grad(), recompute_wide_weights(), EmbeddingGradients(sparse=True):
            for part, m in zip(microbatches(inputs, microbatch), multipliers, strict=True):
                output = call(module, part)
                if output.requires_grad:  # else it does not depend on trainable weights
                    torch.autograd.backward(output, m, inputs=parameters)
        return projection.scalars()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, saved, strict=True):
            parameter.grad = gradient


class _GradientProjection:
    """Sums <g, u_p> for every direction p over gradients that arrive tensor by tensor, and frees these.

    perturbed, measured: as in `probe_backward`.
    """

    def __init__(
        self, perturbed: PerturbedTensors, seeds: Sequence[int], dist: str, measured: Sequence[slice] | None
    ) -> None:
        self.perturbed, self.seeds, self.dist = perturbed, seeds, dist
        self.measured = [slice(None)] * len(perturbed.tensors) if measured is None else measured
        self._sums = torch.zeros(len(seeds), dtype=torch.float64)
        self._pending: dict[int, Tensor] = {}  # small gradients by the parameter's position

    def add(self, parameter: Tensor, position: int) -> None:
        """Project a parameter's `grad`, or keep it for later if it is small, and set it to None."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if gradient.is_sparse:
            self._project_rows(gradient.coalesce(), position)
            return
        gradient = gradient.float().contiguous()
        if gradient.nbytes > MAX_PENDING:
            self._project({position: gradient})
            return
        # A new tensor, since gradients may share memory with each other and with the multiplier.
        self._pending[position] = self._pending.get(position, 0.0) + gradient
        if sum(g.nbytes for g in self._pending.values()) > MAX_PENDING:
            self._project(self._pending)
            self._pending.clear()

    def scalars(self) -> Tensor:
        """Return <g, u_p>, float32 [P], after the last gradient."""
        self._project(self._pending)
        return self._sums.float()

    def _project(self, gradients: dict[int, Tensor]) -> None:
        """Project gradients, by the position of their tensors."""
        measured = self.measured
        # Tensors that the same directions perturb are neighbours.
        for _, group in groupby(gradients, lambda t: (measured[t].start, measured[t].stop)):
            ts = list(group)
            self._add_products(measured[ts[0]], [gradients[t] for t in ts], self.perturbed.subset(ts))

    def _project_rows(self, gradient: Tensor, position: int) -> None:
        """Project a table's gradient, a coalesced sparse tensor of rows."""
        rows, numbers = gradient.values().float(), gradient.indices()[0].tolist()
        starts = [number * rows.shape[1] for number in numbers]
        perturbed = self.perturbed.subset([position] * len(rows))
        self._add_products(self.measured[position], rows.unbind(), perturbed, starts)

    def _add_products(
        self,
        directions: slice,
        gradients: Sequence[Tensor],
        perturbed: PerturbedTensors,
        starts: Sequence[int] | None = None,
    ) -> None:
        """Add <g, u_p> of these directions. starts: the position in its tensor where each gradient starts; None: 0."""
        self._sums[directions] += project(
            gradients,
            self.seeds[directions],
            dist=self.dist,
            factors=perturbed.factors,
            streams=perturbed.streams,
            starts=starts,
        )


class EmbeddingGradients(TorchFunctionMode):
    """Mode in which embeddings have the derivative of what they compute, which is what other estimators measure.

    torch's own gradients leave out the row `padding_idx`, and with `scale_grad_by_freq` are divided by a row's
    frequency. sparse: give trainable tables sparse gradients, with the rows that were looked up.
    """

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        if function is nn.functional.embedding:
            arguments = dict(zip(_EMBEDDING, args, strict=False)) | arguments
            weight, args = arguments["weight"], ()
            arguments |= {"padding_idx": None, "scale_grad_by_freq": False}
            sparse = self.sparse and weight.is_leaf and weight.requires_grad
            arguments["sparse"] = arguments.get("sparse", False) or sparse
        elif function is nn.functional.embedding_bag:
            arguments = dict(zip(_EMBEDDING_BAG, args, strict=False)) | arguments | {"scale_grad_by_freq": False}
            args = ()
        return function(*args, **arguments)


# Names of the functions' parameters, in order.
_EMBEDDING = [*signature(nn.functional.embedding).parameters]
_EMBEDDING_BAG = [*signature(nn.functional.embedding_bag).parameters]
