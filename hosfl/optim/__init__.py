"""Drop-in optimizers that need forward passes only: no backward, no server, no split, no memory of the model's size.

    optimizer = ZOSGD(model.parameters(), lr=1e-3)
    loss = optimizer.step(lambda: loss_of(model(x), y))  # evaluated twice, at weights moved to either side

A step t draws P directions u_1 .. u_P from the run's seed, moves the weights along each, and sees how the loss changes:

    d_p = (loss(th + mu u_p) - loss(th - mu u_p)) / 2    or one-sided: loss(th + mu u_p) - loss(th)
    v_p = d_p / mu                                       the derivative of the loss along u_p
    th  = th - lr * (1 / P) sum_p v_p u_p

Noise of a parameter depends on its number among all the parameters that were given to the optimizer, in that order, on
the seed and on the step; freezing one (`requires_grad_(False)`) or adding a group changes nobody else's.

Where weights are moved, and what that costs:

* Exact, wherever it can be: float32 weights, Rademacher directions, no momentum and no weight decay. Before their first
  move the weights are put on lattices (as by `hosfl_kernels.snap_`) on which moves round nothing. They are moved in
  place and taken back to the very bits; mu is the nearest multiple of the lattice's quantum and a step's coefficients
  are rounded to multiples stochastically. Parameters of one group share a lattice where their largest weights (or mu,
  if that is larger) are within a factor of 16, so that a weight changes by at most 2^-16 of the largest of its tensor;
  a tensor of zeros lies where most of its group does. A parameter that outgrows its lattice gets a coarser one. One
  whose quantum would be above mu, because float32 has no room for both, is an error that names it.
* Read only: all else, if the module is given as `model`. Moved weights exist one layer at a time
  (`hosfl.probing.displaced`), the weights themselves change by the update alone; bfloat16 rounds it stochastically.
* Drifting: all else without `model`. Moved in place and back, every move rounded: after one step 29 % of float32 and
  45 % of bfloat16 weights hold other bits than the update alone would give. For float32 that is noise far below the
  update's; for bfloat16 and float16 give `model`.

A group whose learning rate is 0 is not moved at all, not even onto a lattice. Where all rates are 0 the closure is
evaluated once, at the weights as they are.

Weights that somebody else writes between steps (a checkpoint that is loaded, weights swapped for an evaluation) are put
on their lattice again by the next step, whether it succeeds or not. Writes through `.data`, which torch does not count,
are noticed by 16 elements of each tensor: not those that change single elements, or that keep to the lattice.

Momentum keeps one float32 tensor per parameter. Nothing else is ever as large as a parameter, but for a copy, one
parameter at a time, where a digest is taken, at the first step and by `log.save`: of weights on a GPU in the host's
memory, of sharded ones whole on every process; and where weights in channels_last move.

A closure may replay a captured CUDA graph of the forward pass in the first case and in the last: weights stay at their
addresses, between two evaluations nothing waits for the device, and the loss is copied out of the graph's output. Not
in the second, where the moved weights are elsewhere; and the step itself cannot be captured: the host reads the losses,
refuses those that are not finite, puts the step on the lattice and writes it into the log. Steps of `hosfl_kernels` can
be, with records on the GPU. None of this has run on a GPU yet.

Where processes share a model (DDP, or FSDP2's `fully_shard`) its losses are averaged, and all of them hold the bits of
one process with the mean loss. Sharded parameters need `model`, and must be in the first case above; every process must
call `log.save` and `rebuild`.

`optimizer.log.save(path)` writes the run: 4 (P + 2) bytes per step, parameter group and lattice in it.
`rebuild(model, path)` makes the trained weights again from the base model, in one pass. Where weights drift there is no
such log.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import ParamsT

from hosfl.interrupts import uninterrupted
from hosfl.optim.log import LARGEST_STEP, Row, RunLog, Terms, apply_rule, check_terms, plain, rebuild, zeros
from hosfl.optim.sharded import is_sharded, let_go, reshard, shard
from hosfl.probing.conditions import Conditions
from hosfl.probing.displaced import Displacement, casts_forgotten, displaced, refuse_writers
from hosfl.protocol.aggregate import RunningLength
from hosfl.protocol.lattice import COARSER, STEPS, Lattice
from hosfl.protocol.log import check_choice, check_integer, check_keys, check_quantum
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl_kernels import SGD, derive, perturb_, replay_

__all__ = ["ZOSGD", "RunLog", "ZONormalizedSGD", "rebuild"]

Closure = Callable[[], Any]
LARGEST_FLOAT32 = torch.finfo(torch.float32).max
SAMPLE = 16  # elements per tensor that are looked at for writes which torch does not count
WATCHED_STEPS = 10  # whose losses are looked at for differences that are all 0


# --- weights out and back ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """What moves alike: of one parameter group those that require grad, on the lattice those that share one.

    index: the parameter group's. numbers: the parameters', which name their noise. tensors, starts: what of each lies
    here, all of it but for sharded ones; and its first element's index. rate, mu: as they are for the whole step.
    """

    index: int
    settings: dict[str, Any]
    numbers: list[int]
    parameters: list[Tensor]
    tensors: list[Tensor]
    starts: list[int]
    rate: float
    mu: float

    def versions(self) -> dict[int, tuple[int, int]]:
        """Writing a sharded parameter raises its own version, writing what lies here that tensor's."""
        pairs = zip(self.parameters, self.tensors, strict=True)
        return {n: (p._version, t._version) for n, (p, t) in zip(self.numbers, pairs, strict=True)}

    def named_tensors(self) -> list[tuple[int, Tensor]]:
        return list(zip(self.numbers, self.tensors, strict=True))

    def part(self, which: Sequence[int]) -> _Group:
        """Some of its parameters, by their position here."""
        lists = (self.numbers, self.parameters, self.tensors, self.starts)
        mine: list[list[Any]] = [[values[i] for i in which] for values in lists]
        return replace(self, numbers=mine[0], parameters=mine[1], tensors=mine[2], starts=mine[3])


@dataclass(frozen=True)
class _Measurement:
    """What a step needs to know, from when it was measured: v_p, by the numbers of the parameters that moved alike."""

    loss: Tensor
    derivatives: dict[tuple[int, ...], list[float]]


@dataclass
class _InPlace:
    """Weights that stand at th + sign * mu * u(seed), or at th: from there to anywhere else in one pass."""

    groups: list[_Group]
    dist: str
    seed: int = 0
    sign: int = 0

    def move(self, seed: int, sign: int, moves: Sequence[tuple[Sequence[int], Sequence[float]]] | None = None) -> None:
        """Go to th + sign * mu * u(seed); `moves`: per group, seeds and coefficients to add to th on the way."""
        with uninterrupted():
            for g, group in enumerate(self.groups):
                records = [(self.seed, -self.sign * group.mu), (seed, sign * group.mu)]
                records += zip(*moves[g], strict=True) if moves else []
                # One record per seed: exact on the lattice, and a record alone costs less than half of two.
                sums: dict[int, float] = {}
                for key, coefficient in records:
                    if coefficient:
                        sums[key] = sums.get(key, 0.0) + coefficient
                replay_(
                    group.tensors,
                    list(sums),
                    list(sums.values()),
                    dist=self.dist,
                    streams=group.numbers,
                    starts=group.starts,
                )
            self.seed, self.sign = seed, sign

    @contextmanager
    def at(self, seed: int, sign: int) -> Iterator[None]:
        """The weights stand there, and stay: the next move takes them on."""
        if sign != self.sign or (sign and seed != self.seed):
            self.move(seed, sign)
        yield

    def home(self) -> None:
        if self.sign:
            self.move(0, 0)


class _GroupDisplacement(Displacement):
    """A displacement whose scale is sign * mu, mu being of the parameter's group."""

    def __init__(self, groups: list[_Group], seed: int, sign: int, dist: str) -> None:
        tensors = [t for group in groups for t in group.tensors]
        super().__init__(tensors, [n for group in groups for n in group.numbers], seed, sign, dist)
        self.mu = {id(t): group.mu for group in groups for t in group.tensors}

    def _move(self, pieces: Sequence[Tensor], parameter: Tensor, starts: Sequence[int]) -> None:
        stream, scale = self.place[id(parameter)][0], self.scale * self.mu[id(parameter)]
        perturb_(pieces, self.seed, scale, dist=self.dist, streams=[stream] * len(pieces), starts=starts)


@dataclass
class _ReadOnly:
    """The same for weights that are never written."""

    groups: list[_Group]
    dist: str
    model: nn.Module

    @contextmanager
    def at(self, seed: int, sign: int) -> Iterator[None]:
        if not sign:
            yield
            return
        displacement = _GroupDisplacement(self.groups, seed, sign, self.dist)
        with displaced(self.model, displacement):
            yield
        if not displacement.read and any(t.numel() for group in self.groups for t in group.tensors):
            raise RuntimeError(
                "the loss did not depend on the weights that move: the closure read none of them from `model`. It must "
                "evaluate that very module, each time anew, and take parameters from it within the closure (a list of "
                "them made before, another module and outputs that were kept have the weights as they were)"
            )

    def home(self) -> None:
        pass


# --- the optimizers ----------------------------------------------------------------------------------------------


class ZOSGD(torch.optim.Optimizer):
    """Stochastic gradient descent on a gradient estimated from forward passes; see the module for the formula.

    Args:
        params: as for any torch optimizer: tensors, (name, tensor) pairs, or groups with their own lr, mu, momentum and
            weight_decay. float32, bfloat16 or float16, contiguous or in channels_last, on one device. Pass frozen ones
            too if they may be unfrozen later. Only those that require grad move, where lr is above 0.
        lr: learning rate, 0 or more. A step moves every weight by lr * |v| / sqrt(P) or so, and |v| is about as large
            as the gradient is long: what fits depends on the loss. `ZONormalizedSGD` takes that out.
        mu: how far weights move to be measured, above 0.
        directions: P, 1 or more: 2 P evaluations per step, P + 1 if one-sided.
        momentum: at least 0, below 1. Costs a float32 tensor per parameter, and the lattice.
        weight_decay: 0 or more, decoupled: x = (1 - lr * weight_decay) x - .... Costs the lattice.
        pool: 0 for new directions in every step. D, at least P: the run has D directions, measured in turn, and stays
            in their span.
        two_sided: measure at th + mu u and th - mu u, or at th + mu u and once at th.
        dist: "rademacher" (+1 or -1) or "gaussian". Gaussian directions cost the lattice.
        seed: of all noise, 0 <= seed < 2^64. Runs of the same seed, weights and losses are the same run. None: drawn
            from torch's generator, so that `torch.manual_seed` decides; `optimizer.seed` tells it, and the log.
        model: the module that the closure evaluates and that owns `params` (the compiled one, where it is compiled):
            off the lattice its weights are then read only. Also gives the log the parameters' names.
        process_group: where torch.distributed is initialised, losses are averaged over this group (default: all
            ranks), each rank's for the same, and ranks that began with the same weights keep the same bits. Every rank
            must take every step; where a closure raises on one, the others wait. Pass a group of one to run
            alone. Of sharded parameters it must hold all shards.

    Learning rate schedulers (OneCycleLR and CyclicLR set momentum too, unless told `cycle_momentum=False`),
    `state_dict` (a few numbers, and moments), `add_param_group`, copies and pickles (of model and optimizer together;
    not with a process_group), torch.compile of the model, autocast and closures that loop over micro-batches work as
    with any optimizer. Where a whole training step is compiled, the optimizer runs as Python within it, and so does its
    closure but for a model that is compiled itself.

    Raises: ValueError, TypeError.
    """

    # What a parameter group may set, and what a state keeps beside torch's groups.
    settable: ClassVar[tuple[str, ...]] = ("lr", "mu", "momentum", "weight_decay")
    kept: ClassVar[tuple[str, ...]] = ("seed", "steps", "directions", "pool", "two_sided", "dist")
    _more_defaults: Mapping[str, Any] = MappingProxyType({})  # of a subclass

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        mu: float = 1e-3,
        *,
        directions: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        pool: int = 0,
        two_sided: bool = True,
        dist: str = "rademacher",
        seed: int | None = None,
        model: nn.Module | None = None,
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
            raise ValueError(f"directions must be an integer, 1 or more, got {directions!r}")
        if isinstance(pool, bool) or not isinstance(pool, int) or 0 != pool < directions:
            raise ValueError(f"pool must be 0, or at least the {directions} directions of a step, got {pool!r}")
        if dist not in ("rademacher", "gaussian"):
            raise ValueError(f"dist must be rademacher or gaussian, got {dist!r}")
        self._drawn, self._agreed = seed is None, False  # and whether all processes have the same
        self.seed: int = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if seed is None else seed
        derive(self.seed, 0, 0)
        self.directions, self.pool = directions, pool
        self.two_sided, self.dist = bool(two_sided), dist
        self.model, self.process_group = model, process_group
        self.steps = 0
        self._quanta: dict[int, float] = {}  # of the lattices that parameters are on, by number
        self._on_lattice = False  # whether all that moved in the last step was
        self._flat: list[bool] = []  # of the last differences between losses, whether they were 0
        self._half_precision = self._warned = False  # whether the last loss was, and whether we have
        self._told = ""  # why the log cannot be saved, if that was said
        self._measurement: _Measurement | None = None  # of the step that is to be taken next
        self._forget()
        defaults = {"lr": lr, "mu": mu, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **self._more_defaults})
        self._check_model()
        self.log = self._new_log()

    def _forget(self) -> None:
        """What is known of the weights from the last step: the next one looks for itself."""
        self._settled: object = None  # what moved, and where it lay
        self._conditions = Conditions()
        self._versions: dict[int, tuple[int, int]] = {}
        self._bounds: dict[int, float] = {}  # upper bounds of max |weight|, by number; made exact when it matters
        self._sampled = _numbers([])  # the quantum of each element of all samples

    @property
    def lattice(self) -> Lattice | None:
        """The finest of the lattices that the weights are on; 2^-24 before any has one; None where moves round."""
        return Lattice(min(self._quanta.values(), default=2.0**-24)) if self._quanta or self._on_lattice else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; they are numbered on from the last. Raises ValueError, TypeError."""
        self._check_settings({**self.defaults, **param_group})
        unknown = [key for key in param_group if key not in (*self.settable, "params", "param_names", "initial_lr")]
        if unknown:
            raise ValueError(
                f"a parameter group cannot have {', '.join(map(repr, unknown))} of its own: it may set "
                f"{', '.join(self.settable)}. What else there is, is an argument of the optimizer, and for all"
            )
        before = {p for group in self.param_groups for p in group["params"]}
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            given = param_group.get("params")  # torch has made a list of it
            again = [n for n, p in enumerate(given) if p in before] if isinstance(given, list) else []
            if not again:
                raise
            name = self._describe(param_group, again[0], len(self.param_groups))
            raise ValueError(f"{name} is in another group too: pass tied parameters once") from error
        params = self.param_groups[-1]["params"]
        last = {p: n for n, p in enumerate(params)}
        twice = [last[p] for n, p in enumerate(params) if last[p] > n]
        if twice:
            group = self.param_groups.pop()
            name = self._describe(group, twice[0], len(self.param_groups))
            raise ValueError(f"{name} is twice in one group: pass tied parameters once")

    def _check_settings(self, settings: dict[str, Any]) -> None:
        for name in ("lr", "mu", "weight_decay"):
            value = float(settings[name])
            if not 0 <= value < LARGEST_FLOAT32 or (name == "mu" and value == 0):
                raise ValueError(f"{name} must be finite and {'above 0' if name == 'mu' else '0 or more'}, got {value}")
        SGD(momentum=float(settings["momentum"]))  # raises ValueError

    def _check_model(self) -> None:
        if self.model is None:
            return
        refuse_writers(self.model)
        reshard(self.model)
        owned = set(self.model.parameters())
        for number, (_, parameter) in enumerate(self._named()):
            if parameter not in owned:
                raise ValueError(
                    f"`model` does not own {self._name(number)} (a sharded module has others while it holds them "
                    "gathered: make its optimizer before its first forward pass)"
                )

    # --- a step ---

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:
        """One step. Returns the loss, float64 on the CPU: the mean over all moved weights, one-sided the loss at th.

        Args:
            closure: evaluates the model and returns the loss: a number, or a tensor of one element. No backward. It is
                called 2 P times (one-sided P + 1, once where all rates are 0), each time with the random numbers of
                the first (`probing.conditions`), so that the model may be in train mode: dropout takes the same units
                away, and running statistics take in the first evaluation alone. On all else but the weights it must
                not depend: the same batch every time. It need not be differentiable. Left out where the step was
                measured before. Left out otherwise, where all rates are 0, no step is made and None returned, but
                moments are there then: this is how torch.distributed.checkpoint prepares optimizers.

        Waits for the device for the losses, and before them to see whether somebody wrote the weights; never in
        between. If the closure raises or is interrupted the weights are what they were before the step (bit for bit,
        unless they drift; but for what a new lattice rounds), and the optimizer and torch's generators too.

        Raises: TypeError without a closure or for what is no number; FloatingPointError for losses that are infinite
        or NaN, or a step that is too long; ValueError where no parameter requires grad, or one cannot move by mu;
        RuntimeError where the closure writes the weights, or reads none of those that move.
        """
        measurement, self._measurement = self._measurement, None
        if closure is None and measurement is None and not any(float(group["lr"]) for group in self.param_groups):
            self._make_moments()
            return None
        if closure is not None:
            self._warn_of_accelerate()
        with self._weights() as weights:
            if closure is not None or measurement is None:
                measurement = self._measured(closure, weights)
            estimates, kept = self._estimates(weights.groups, measurement)
            with uninterrupted():
                self._update(weights, estimates)
                for settings, state in kept:
                    settings.update(state)
                self.steps += 1
        if self.log.refusal != self._told:
            self._told = self.log.refusal
            warnings.warn(f"the log of this run cannot be saved: {self._told}", stacklevel=2)
        return measurement.loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def measure(self, closure: Closure) -> Tensor:
        """The first half of a step, for frameworks that call `step()` themselves, without a closure, a little later.

        Returns what `step(closure)` would. The weights are as before (unless they drift), and the next `step()` goes
        where `step(closure)` would have gone, at the learning rate it finds, for one more pass over the weights. Raises
        as `step` does. What is measured is no part of `state_dict`.
        """
        self._measurement = None
        with self._weights() as weights:
            self._measurement = self._measured(closure, weights)
        return self._measurement.loss

    @contextmanager
    def _weights(self) -> Iterator[_InPlace | _ReadOnly]:
        """All that moves in this step, at home again in the end."""
        self._agree(self._device())
        groups = self._settle()
        weights: _InPlace | _ReadOnly = _InPlace(groups, self.dist)
        if not self._on_lattice and self.model is not None:
            weights = _ReadOnly(groups, self.dist, self.model)
        try:
            yield weights
        finally:
            weights.home()
            self._versions = {n: version for group in groups for n, version in group.versions().items()}
            torch.clear_autocast_cache()

    def _device(self) -> torch.device:
        """Of the parameters that may move, and of what processes tell each other. Raises ValueError without any."""
        moving: Iterator[Tensor] = (p for group in self.param_groups for p in group["params"] if p.requires_grad)
        for parameter in moving:
            return parameter.device
        raise ValueError("no parameter requires grad: there is nothing to move")

    def _agree(self, device: torch.device) -> None:
        """One seed on all processes, before the first step: where each has drawn its own, one that all can tell."""
        if self._agreed or not (distributed.is_available() and distributed.is_initialized()):
            return
        halves = [self.seed >> 32, self.seed & 0xFFFFFFFF]
        numbers = [*halves, *(-half for half in halves), int(not self._drawn)]
        largest = torch.tensor(numbers, device=device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, self.process_group)
        high, low, *smallest, given = largest.tolist()
        if [high, low] != [-half for half in smallest]:
            if given:
                raise ValueError(f"processes have different seeds, this one {self.seed}: give all of them the same")
            self.seed = high << 32 | low
            self.log = self._new_log()
        self._agreed = True

    def _warn_of_accelerate(self) -> None:
        """Of its accumulation, which passes on the closure of the last micro-batch alone."""
        module = sys.modules.get("accelerate.state")
        if module is None or self.steps or not module.GradientState._shared_state:
            return
        count = module.GradientState().num_steps
        if count > 1:
            warnings.warn(
                f"accelerate accumulates {count} micro-batches, and calls step(closure) for the last of them only: its "
                "closure must evaluate all of them, and return their mean loss",
                stacklevel=3,
            )

    def _settle(self) -> list[_Group]:
        """What moves in this step, on lattices where there can be any."""
        candidates = self._requiring_grad()
        groups = [group for group in candidates if group.rate and group.numbers]
        exact = self._exact(groups)
        self._check_owned(groups)
        self._check_sharded(groups, exact)
        # Of a tensor that was converted, moved or bound to other memory, nothing is known.
        settled = exact, [[(n, t.dtype, t.device, t.data_ptr()) for n, t in g.named_tensors()] for g in groups]
        if settled != self._settled:
            self._check_tensors(groups)
            self.log.admit(self._named())
            self._forget()
            self._settled = settled
        self._on_lattice = exact
        if not exact:
            self._quanta = {}
            if groups and self.model is None:
                self.log.refusal = "weights that are moved in place off the lattice drift: give the optimizer `model`"
            return groups
        if self._written(groups):
            sizes = self._sizes(groups)
            unknown = {n: size for n, size in sizes.items() if n not in self._quanta}
            self._quanta |= self._chosen(groups, unknown)
            self._bounds = sizes
            self._put(groups, sizes)
        self._make_room(groups, [group.mu for group in groups])
        return [part for group in groups for part in self._by_lattice(group)]

    def _requiring_grad(self) -> list[_Group]:
        groups, number = [], 0
        for index, settings in enumerate(self.param_groups):
            self._check_settings(settings)  # schedulers and users write them
            moving = [(n, p) for n, p in enumerate(settings["params"], number) if p.requires_grad]
            places = [self._place(n, p) for n, p in moving]
            groups.append(
                _Group(
                    index,
                    settings,
                    [n for n, _ in moving],
                    [p for _, p in moving],
                    [tensor for tensor, _ in places],
                    [start for _, start in places],
                    float(settings["lr"]),
                    float(settings["mu"]),
                )
            )
            number += len(settings["params"])
        return groups

    def _place(self, number: int, parameter: Tensor) -> tuple[Tensor, int]:
        """What of a parameter lies here, and its first element's index."""
        try:
            if parameter.layout != torch.strided:
                raise TypeError(f"{parameter.layout}, where only dense tensors move: freeze it")
            if parameter.is_inference():
                raise RuntimeError("made in inference mode, where nobody sees who writes it: make the model outside")
            return shard(parameter)
        except (RuntimeError, TypeError, ValueError) as error:
            raise type(error)(f"{self._name(number)}: {error}") from None

    def _check_tensors(self, groups: list[_Group]) -> None:
        """dtypes, devices, strides, shared memory: what the kernels refuse is refused before anything moves."""
        named = [pair for group in groups for pair in group.named_tensors()]
        for number, tensor in named:
            if tensor.device != named[0][1].device and tensor.device.type != "meta":
                raise RuntimeError(
                    f"{self._name(named[0][0])} is on {named[0][1].device}, {self._name(number)} on {tensor.device}: "
                    "weights that move must be on one device. Load the model without a device_map that spreads it, or "
                    "freeze what is elsewhere"
                )
        try:
            replay_([t for _, t in named], [], [])
        except (RuntimeError, TypeError, ValueError) as error:
            # They know tensors by their position in a list, people by their name.
            text = re.sub(r"tensors\[(\d+)\]", lambda at: self._name(named[int(at[1])][0]), str(error))
            raise type(error)(text) from None
        for number, tensor in named:
            moment = self.state.get(tensor, {}).get("moment", tensor)
            if (moment.shape, moment.device) != (tensor.shape, tensor.device):
                raise RuntimeError(
                    f"{self._name(number)} is {list(tensor.shape)} on {tensor.device}, its momentum "
                    f"{list(moment.shape)} on {moment.device}: make the optimizer after the parameter was changed"
                )

    def _check_owned(self, groups: list[_Group]) -> None:
        if self.model is None:
            return
        reshard(self.model)
        owned = set(self.model.parameters())
        for group in groups:
            for number, parameter in zip(group.numbers, group.parameters, strict=True):
                if parameter not in owned:
                    if is_sharded(parameter):
                        raise RuntimeError(
                            "a forward pass of the sharded module was cut short: evaluate it once, then go on"
                        )
                    raise RuntimeError(
                        f"`model` no longer owns {self._name(number)}, and its loss does not depend on it: something "
                        "put another parameter in its place. Make the optimizer after that"
                    )

    def _check_sharded(self, groups: list[_Group], exact: bool) -> None:
        if not self._sharded(groups):
            return
        if self.model is None:
            raise ValueError("sharded parameters: give the optimizer `model`, which must gather them at every move")
        if not exact:
            raise ValueError(
                "sharded parameters move only where moves are exact: float32 (FSDP may still compute in bfloat16), "
                'dist="rademacher", no momentum and no weight_decay'
            )

    @staticmethod
    def _sharded(groups: list[_Group]) -> list[Tensor]:
        return [p for group in groups for p, t in zip(group.parameters, group.tensors, strict=True) if p is not t]

    def _exact(self, groups: list[_Group]) -> bool:
        plain = all(group.settings[name] == 0 for group in groups for name in ("momentum", "weight_decay"))
        return (
            plain
            and self.dist == "rademacher"
            and all(t.dtype == torch.float32 for group in groups for t in group.tensors)
        )

    # --- lattices ---

    def _written(self, groups: list[_Group]) -> bool:
        """Whether there are weights that are new here, or that somebody else wrote, on any process."""
        versions = {n: version for group in groups for n, version in group.versions().items()}
        written = versions != self._versions
        if not written and groups:
            # Taken anew every time: views that are kept would keep the memory of a model that goes elsewhere.
            steps = torch.cat([_sample(t) for group in groups for t in group.tensors]) / self._sampled
            written = not bool(((steps == steps.round()) & (steps.abs() <= STEPS / 2)).all())
        return self._largest_of_all([float(written)], groups) != [0.0]

    def _sizes(self, groups: list[_Group]) -> dict[int, float]:
        """max |weight| by number, over all processes, with no copy of any tensor. Raises ValueError for what is NaN."""
        named = [pair for group in groups for pair in group.named_tensors()]
        maxima = [torch.stack(t.detach().aminmax()).abs().amax() if t.numel() else t.new_zeros(()) for _, t in named]
        here = torch.stack(maxima).tolist()
        # Maxima over processes may lose a NaN.
        sizes = self._largest_of_all([size if math.isfinite(size) else math.inf for size in here], groups)
        for (number, _), size in zip(named, sizes, strict=True):
            if math.isinf(size):
                raise ValueError(f"{self._name(number)} has infinite or NaN weights")
        return {number: size for (number, _), size in zip(named, sizes, strict=True)}

    def _largest_of_all(self, values: list[float], groups: list[_Group]) -> list[float]:
        """The largest values over all processes that share the parameters."""
        sharded = self._sharded(groups)
        if not sharded:
            return values
        largest = _numbers(values).to(sharded[0].device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, self.process_group)
        together: list[float] = largest.tolist()
        return together

    def _chosen(self, groups: list[_Group], sizes: dict[int, float]) -> dict[int, float]:
        """Quanta for parameters whose weights reach these sizes, or mu: few of them in each parameter group.

        From the largest parameter down, one joins a lattice that is at most 16 times coarser than its own would be.

        Raises ValueError where a quantum would be above mu.
        """
        chosen: dict[int, float] = {}
        elements: dict[int, Counter[float]] = {group.index: Counter() for group in groups}  # on each lattice
        triples = [(g, n, p) for g in groups for n, p in zip(g.numbers, g.parameters, strict=True)]
        for group, n, p in triples:
            if n in self._quanta and n not in sizes:
                elements[group.index][self._quanta[n]] += p.numel()
        for group, n, p in sorted((t for t in triples if t[1] in sizes), key=lambda triple: -sizes[triple[1]]):
            lattices = elements[group.index]
            own = Lattice.holding(max(sizes[n], group.mu)).quantum
            if own > group.mu:  # with less room to grow, then
                own = Lattice.holding(sizes[n], headroom=2.0).quantum
            own = max(own, 2.0**-100)  # far from where float32 has fewer bits
            fitting = [q for q in lattices if own <= q <= COARSER * own]
            if sizes[n] == 0:  # nothing tells how large it will be: as most of the group, or room for weights below 1/2
                own = max(own, 2.0**-24)
                fitting = [q for q, _ in lattices.most_common(1)]
            chosen[n] = min(fitting, default=own)
            lattices[chosen[n]] += p.numel()
            self._check_mu(group, n, chosen[n], sizes[n])
        return chosen

    def _check_mu(self, group: _Group, number: int, quantum: float, size: float) -> None:
        if quantum > group.mu:
            raise ValueError(
                f"{self._name(number)}, with weights of up to {size:.3g}, cannot move by mu={group.mu:g}: float32 "
                f"holds such weights, and room to train them, in steps of {quantum:g}. Raise mu, freeze it, or give it "
                "a group of its own, with an lr of 0 or a larger mu"
            )

    def _by_lattice(self, group: _Group) -> list[_Group]:
        """The group in parts that share a lattice, the finest first; mu is the nearest multiple of the quantum."""
        parts = []
        for quantum in sorted({self._quanta[n] for n in group.numbers}):
            part = group.part([i for i, n in enumerate(group.numbers) if self._quanta[n] == quantum])
            largest = max(part.numbers, key=lambda n: self._bounds[n])
            self._check_mu(part, largest, quantum, self._bounds[largest])
            parts.append(replace(part, mu=Lattice(quantum).nearest(group.mu)))
        return parts

    def _put(self, groups: list[_Group], numbers: Container[int]) -> None:
        """Put these parameters on their lattices."""
        pairs = [pair for group in groups for pair in group.named_tensors()]
        with uninterrupted():
            for quantum in sorted({self._quanta[n] for n, _ in pairs if n in numbers}):
                mine = [(n, t) for n, t in pairs if n in numbers and self._quanta[n] == quantum]
                Lattice(quantum).put([t for _, t in mine], [1.0] * len(mine))
                self.log.put(quantum, [n for n, _ in mine])
                self._bounds |= {n: self._bounds[n] + quantum for n, _ in mine}
        # By number, as in `_written`: groups may come here in parts.
        quanta = [self._quanta[n] for n, t in sorted(pairs, key=lambda pair: pair[0]) for _ in range(len(_sample(t)))]
        self._sampled = _numbers(quanta).to(pairs[0][1].device)

    def _outgrown(self, groups: list[_Group], distances: list[float]) -> set[tuple[int, float]]:
        """The lattices, by parameter group and quantum, that might not hold all weights when they move so far."""
        return {
            (group.index, self._quanta[n])
            for group, distance in zip(groups, distances, strict=True)
            for n in group.numbers
            # Half: rounding to the lattice adds its share.
            if self._bounds[n] + distance > STEPS / 2 * self._quanta[n]
        }

    def _make_room(self, groups: list[_Group], distances: list[float]) -> None:
        """Coarser lattices for the parameters that would outgrow theirs. The weights must be at home."""
        if not self._outgrown(groups, distances):
            return
        self._bounds |= self._sizes(groups)
        tight = self._outgrown(groups, distances)
        # All that share such a lattice choose anew: some have grown with the one that must leave it.
        needs = {
            n: self._bounds[n] + distance
            for group, distance in zip(groups, distances, strict=True)
            for n in group.numbers
            if (group.index, self._quanta[n]) in tight
        }
        if needs:
            self._quanta |= self._chosen(groups, needs)
            self._put(groups, needs)

    # --- what is measured ---

    def _losses(self, closure: Closure | None, weights: _InPlace | _ReadOnly) -> list[Tensor]:
        if not callable(closure):
            raise TypeError(
                "step needs a closure that evaluates the model and returns the loss: step(lambda: loss(...))"
            )
        places = [(seed, sign) for seed in self._seeds() for sign in ((1, -1) if self.two_sided else (1,))]
        if not weights.groups:
            places = [(0, 0)]
        elif not self.two_sided:
            places = [(0, 0), *places]
        losses = []
        kinds = {p.device.type for group in self.param_groups for p in group["params"]} - {"meta"}
        with self._conditions.repeated(kinds) as evaluate:
            for seed, sign in places:
                with weights.at(seed, sign), let_go(self.model), casts_forgotten():
                    versions = [group.versions() for group in weights.groups]
                    answer = _without_graph(partial(evaluate, closure))
                    losses.append(_scalar(answer))
                    self._half_precision = getattr(answer, "dtype", None) in (torch.bfloat16, torch.float16)
                    if [group.versions() for group in weights.groups] != versions:
                        self._settled = None
                        raise RuntimeError("the closure writes the weights: it is only to evaluate them")
        return losses

    def _measured(self, closure: Closure | None, weights: _InPlace | _ReadOnly) -> _Measurement:
        loss, differences = self._differences(torch.stack(self._losses(closure, weights)))
        if differences:
            self._watch(differences)
        derivatives = {tuple(group.numbers): [d / group.mu for d in differences] for group in weights.groups}
        return _Measurement(loss, derivatives)

    def _watch(self, differences: list[float]) -> None:
        """Warn once where losses hardly ever differ. That is no error: accuracy, for one, is flat nearly everywhere."""
        self._flat = [*self._flat, *(d == 0 for d in differences)][-WATCHED_STEPS * len(differences) :]
        # A loss in half precision shows some differences and rounds others away. One in float32 shows nearly all.
        enough = len(self._flat) // 3 if self._half_precision else len(self._flat)
        if self._warned or len(self._flat) < WATCHED_STEPS * len(differences) or sum(self._flat) < enough:
            return
        self._warned = True
        found = f"of the last {len(self._flat)} differences between losses {sum(self._flat)} were exactly 0"
        if self._half_precision:
            cause = "the loss is in half precision, which rounds them away"
        else:
            cause = (
                "does the loss depend on the parameters that the optimizer was given, or on another model, on an "
                "output that was kept, or on a parameter that was put in the place of one (module.weight = "
                "nn.Parameter(...))? If it does, it is flat by nature, or computed in half precision"
            )
        warnings.warn(
            f"{found}: {cause}. Compute it in float32, as by loss_of(model(x).float(), y), or raise mu", stacklevel=2
        )

    def _differences(self, stacked: Tensor) -> tuple[Tensor, list[float]]:
        """The loss to return, and d_p: the wait for the device."""
        if distributed.is_available() and distributed.is_initialized():
            stacked = stacked.to(self._device())
            distributed.all_reduce(stacked, group=self.process_group)
            stacked /= distributed.get_world_size(self.process_group)
        values = stacked.cpu()
        if not torch.isfinite(values).all():
            raise FloatingPointError(self._unfinite(values.tolist()))
        if len(values) == 1:  # nothing moves
            return values[0], []
        if self.two_sided:
            plus, minus = values[0::2], values[1::2]
            return values.mean(), ((plus - minus) / 2).tolist()
        return values[0], (values[1:] - values[0]).tolist()

    def _unfinite(self, losses: list[float]) -> str:
        text = f"the closure returned losses that are infinite or NaN: {losses}"
        bad = [not math.isfinite(loss) for loss in losses]
        if not self.two_sided and not bad[0]:
            text += ". At the weights themselves the loss is finite, so mu is too large for it"
        elif self.steps == 0:
            text += (
                ". This is the first step: look for NaN in the batch, labels out of range, a mask that leaves nothing "
                "to attend to, the logarithm or a division of 0, or half precision that overflows"
            )
        else:
            text += (
                ". The likely causes are an lr so large that the weights have diverged (lower it), a batch with NaN in "
                "it, half precision that overflows (compute the loss in float32), and a mu that is too large"
            )
        return text

    # --- what is done ---

    def _estimate(self, group: _Group, derivatives: list[float]) -> tuple[list[float], dict[str, float]]:
        """The gradient's coefficients on the directions, and what the parameter group keeps if the step is taken."""
        return [v / self.directions for v in derivatives], {}

    def _estimates(
        self, groups: list[_Group], measurement: _Measurement
    ) -> tuple[list[list[float]], list[tuple[dict[str, Any], dict[str, float]]]]:
        """The coefficients of each part, and what each parameter group keeps."""
        estimates, kept = [], []
        first: dict[int, tuple[float, list[float]]] = {}
        for group in groups:
            derivatives = measurement.derivatives.get(tuple(group.numbers))
            if derivatives is None:
                raise RuntimeError(
                    "other parameters move than when the step was measured: do not change requires_grad, rates that "
                    "are 0, or weights between `measure` and `step`"
                )
            if group.index not in first:  # on its finest lattice, where mu is nearest to what was asked for
                estimate, state = self._estimate(group, derivatives)
                first[group.index] = group.mu, estimate
                kept.append((group.settings, state))
            # The others moved by another mu: d / mu is their derivative, whatever became of it above.
            mu, estimate = first[group.index]
            estimates.append([c * (mu / group.mu) for c in estimate])
        return estimates, kept

    def _update(self, weights: _InPlace | _ReadOnly, estimates: list[list[float]]) -> None:
        """Takes the weights home and makes the step; all or nothing."""
        pairs = zip(weights.groups, estimates, strict=True)
        reach = max((max(group.rate, 1.0) * sum(map(abs, e)) for group, e in pairs), default=0.0)
        if not reach < LARGEST_FLOAT32 / 4:
            raise FloatingPointError(f"a step of {reach:g}: lower lr, or raise mu")
        for group in weights.groups:
            shrinking = group.rate * float(group.settings["weight_decay"])
            if not shrinking < LARGEST_FLOAT32:
                raise FloatingPointError(f"lr * weight_decay is {shrinking:g}: lower one of them")
        if self._on_lattice:
            assert isinstance(weights, _InPlace)
            rows = self._lattice_step(weights, estimates)
        else:
            # The moments of all groups before the first group moves: there may be no memory for them.
            moments = [self._moments(group) for group in weights.groups]
            weights.home()
            triples = zip(weights.groups, estimates, moments, strict=True)
            rows = [self._rule_step(*triple) for triple in triples]
        groups = weights.groups
        momenta = [float(group.settings["momentum"]) for group in groups]
        self.log.append([group.numbers for group in groups], momenta, self._on_lattice, rows)

    def _lattice_step(self, weights: _InPlace, estimates: list[list[float]]) -> list[Row]:
        """Home and on in one pass: th = th - lr * sum_p e_p u_p, the coefficients on the lattice, right on average."""
        distances = [g.rate * sum(map(abs, e)) + g.mu for g, e in zip(weights.groups, estimates, strict=True)]
        if self._outgrown(weights.groups, distances):
            weights.home()
            try:
                self._make_room(weights.groups, distances)
            except ValueError as error:
                raise FloatingPointError(
                    f"a step of {max(distances):g} is too long: lower lr. After it {error}"
                ) from None
            parts = [self._by_lattice(group) for group in weights.groups]
            estimates = [e for e, mine in zip(estimates, parts, strict=True) for _ in mine]
            weights.groups = [part for mine in parts for part in mine]
        key = round_seed(self.seed, Purpose.COEFFICIENTS, self.steps)
        uniforms = {
            g.index: [derive(key, p, g.index) / 2.0**64 for p in range(self.directions)] for g in weights.groups
        }
        rows = []
        for group, estimate in zip(weights.groups, estimates, strict=True):
            lattice = Lattice(self._quanta[group.numbers[0]])
            pairs = zip(estimate, uniforms[group.index], strict=True)
            rows.append(Row([lattice.stochastic(-group.rate * c, u) for c, u in pairs], group.rate, 1.0))
        weights.move(0, 0, [(self._seeds(), row.coefficients) for row in rows])
        for group, row in zip(weights.groups, rows, strict=True):
            self._bounds |= {n: self._bounds[n] + sum(map(abs, row.coefficients)) for n in group.numbers}
        return rows

    def _rule_step(self, group: _Group, estimate: list[float], moments: list[Tensor]) -> Row:
        rule = SGD(float(group.settings["momentum"]), float(group.settings["weight_decay"]))
        row = Row(estimate, *rule.steps([self.steps], [group.rate])[0, :2].tolist())
        coefficients, steps = _numbers([row.coefficients]), _numbers([[row.rate, row.keep]])
        place = group.tensors, group.numbers, group.starts
        apply_rule(self._terms(), rule.momentum, *place, moments, self.steps, coefficients, steps)
        for tensor, moment in zip(group.tensors, moments, strict=False):
            self.state[tensor]["moment"] = moment
        return row

    def _moments(self, group: _Group) -> list[Tensor]:
        """One for each tensor, zeros where there was none; without momentum none at all."""
        if not group.settings["momentum"]:
            return []
        kept = [self.state.get(t, {}).get("moment") for t in group.tensors]
        return [zeros(t) if moment is None else moment for t, moment in zip(group.tensors, kept, strict=True)]

    def _make_moments(self) -> None:
        """Zeros that others are copied into, or that are as good as those which the next step would make."""
        for group in self.param_groups:
            for parameter in group["params"] if group["momentum"] else []:
                if parameter.requires_grad and not self.state.get(parameter):
                    self.state[parameter]["moment"] = zeros(parameter)

    def _seeds(self) -> Sequence[int]:
        return self._terms().seeds(self.steps)

    # --- what is kept ---

    def __repr__(self) -> str:
        """As torch's, and above the groups what is the same for all of them."""
        own = [f"    {name}: {getattr(self, name)}" for name in self.kept if name != "steps"]
        name, groups = super().__repr__().split("\n", 1)
        return "\n".join([name, *own, groups])

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        if self.process_group is not None:
            raise TypeError(
                "an optimizer with a process_group cannot be copied or pickled: make another with a group of its own, "
                "and give it the state_dict of this one"
            )
        own = ("model", "process_group", "log", "_quanta", "_on_lattice", "_measurement", "_drawn")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in (*self.kept, *own)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of load_state_dict, too
        self._flat, self._half_precision, self._warned = [], False, False
        self._told, self._agreed = "", False
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under "run" in its first group the seed, the number of steps, the settings that shape a step.

        run["optimizer"]: the class. run["shapes"], run["quanta"]: of each parameter, by its number, the shape, and the
        quantum of its lattice; None where it is on none.

        In a group, because torch.distributed.checkpoint keeps nothing beside groups and moments; in lists, because it
        loads those keys of a mapping that are there before.
        """
        told: dict[str, Any] = super().state_dict()
        named = self._named()
        told["param_groups"][0]["run"] = {
            "optimizer": type(self).__name__,
            **{name: getattr(self, name) for name in self.kept},
            "shapes": [list(p.shape) for _, p in named],
            "quanta": [self._quanta.get(n) for n in range(len(named))],
        }
        return told

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the weights are the model's to load, before or after. The log starts anew.

        Raises: ValueError where it is the state of another optimizer, or of other parameters. Nothing is changed then.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        run = groups[0].pop("run", None) if groups else None
        try:
            run = self._checked_run(state_dict.get("run") if run is None else run)
            for group in groups:
                absent = [name for name in self.settable if name not in group]
                if absent:
                    raise ValueError(f"its groups have no {', '.join(absent)}")
                self._check_settings(group)
        except ValueError as error:
            raise ValueError(f"this is no state of a {type(self).__name__}: {error}") from None
        saved = [state_dict["state"].get(i, {}) for group in groups for i in group["params"]]
        self._check_shapes(run["shapes"], saved)
        # torch's copies, made below, have the parameters' dtypes; moments are float32.
        pairs = zip(self._named(), saved, strict=False)  # torch counts them
        moments = {p: zeros(p).copy_(state["moment"]) for (_, p), state in pairs if state}
        super().load_state_dict({**state_dict, "param_groups": groups})
        for name in self.kept:
            setattr(self, name, run[name])
        self._drawn = False
        self._quanta, self._measurement = run["quanta"], None
        for parameter, moment in moments.items():
            self.state[parameter]["moment"] = moment
        self.log = self._new_log()
        if moments:
            self.log.refusal = (
                "a resumed run with momentum cannot be rebuilt: its log starts from moments, not from zeros"
            )

    def _checked_run(self, run: Any) -> dict[str, Any]:
        """What a state tells of its run; quanta by number, of parameters that are on a lattice. Raises ValueError."""
        if not isinstance(run, dict):
            raise ValueError("its first group has no `run` (nor has it with flatten_optimizer_state_dict)")
        # Earlier versions had it beside the groups, without class and shapes, and with such quanta.
        run = {"optimizer": type(self).__name__, "shapes": None, **run}
        check_keys(run, ("optimizer", *self.kept, "shapes", "quanta"), "its run")
        check_choice(run["optimizer"], "the class", (type(self).__name__,))
        if not isinstance(run["two_sided"], bool):
            raise ValueError(f"two_sided must be true or false, not {run['two_sided']!r}")
        run |= {**asdict(check_terms(run)), "steps": check_integer(run["steps"], "steps", 0, LARGEST_STEP)}
        quanta, last = run["quanta"], len(self._named()) - 1
        run["quanta"] = {}
        for number, quantum in quanta.items() if isinstance(quanta, dict) else enumerate(quanta):
            if quantum is not None:
                n = check_integer(number, "the number of a parameter", 0, last)
                run["quanta"][n] = check_quantum(quantum, f"the quantum of parameter {n}")
        return run

    def _check_shapes(self, shapes: list[list[int]] | None, saved: list[dict[str, Any]]) -> None:
        """Of parameters, None where they are not known, and of their moments. Raises ValueError."""
        own = [list(p.shape) for _, p in self._named()]
        for number, (shape, found, state) in enumerate(zip(own, shapes or own, saved, strict=False)):
            what = ""
            if found != shape:
                what = f"{self._name(number)} is {found}"
            elif state and list(state["moment"].shape) != shape:
                what = f"the momentum of {self._name(number)} is {list(state['moment'].shape)}"
            if what:
                raise ValueError(f"this is no state of these parameters: {what} in it")

    def _named(self) -> list[tuple[str | None, Tensor]]:
        """All parameters by number, with their names where these are known."""
        known = self._known_names()
        named: list[tuple[str | None, Tensor]] = []
        for group in self.param_groups:
            names = group.get("param_names") or [known.get(p) for p in group["params"]]
            named += [(name and plain(name), p) for name, p in zip(names, group["params"], strict=True)]
        return named

    def _known_names(self) -> dict[Tensor, str]:
        return {p: name for name, p in self.model.named_parameters()} if self.model is not None else {}

    def _describe(self, group: dict[str, Any], at: int, index: int) -> str:
        """How an error speaks of the parameter of that place in a parameter group: by its name, if it has one."""
        parameter = group["params"][at]
        names = group.get("param_names")
        name = names[at] if names else self._known_names().get(parameter)
        if name:
            return f"parameter {plain(name)!r}"
        dtype = str(parameter.dtype).removeprefix("torch.")
        return f"parameter {at} of group {index}, {dtype} {list(parameter.shape)}"

    def _name(self, number: int) -> str:
        places = [(group, at, g) for g, group in enumerate(self.param_groups) for at in range(len(group["params"]))]
        return self._describe(*places[number])

    def _terms(self) -> Terms:
        return Terms(self.seed, self.directions, self.pool, self.dist)

    def _new_log(self) -> RunLog:
        return RunLog(self._terms(), self.steps)


class ZONormalizedSGD(ZOSGD):
    """ZOSGD whose rate is divided by the running length of the gradient, which the scalars tell for nothing.

    th = th - lr / sqrt(E) * (1 / P) sum_p v_p u_p, E the bias-corrected running mean of the steps' (1 / P) sum_p v_p^2:
    for Rademacher and Gaussian directions E v_p^2 = |g|^2. A step then moves every weight by lr / sqrt(P) or so, on
    whatever scale the loss is, and no more as the gradient shrinks. One number per group is all it keeps.

    Args:
        decay: of the running mean, at least 0 and below 1; groups may have their own. 0 takes the length from each
            step alone.
        Everything else as in `ZOSGD`.
    """

    settable = (*ZOSGD.settable, "decay")

    def __init__(self, params: ParamsT, lr: float, mu: float = 1e-3, *, decay: float = 0.9, **settings: Any) -> None:
        self._more_defaults = {"decay": decay}
        super().__init__(params, lr, mu, **settings)

    def state_dict(self) -> dict[str, Any]:
        """As that of `ZOSGD`. Groups have their running means from the start: see there what loads them."""
        told = super().state_dict()
        for group in told["param_groups"]:
            group |= {"square": 0.0, "square_weight": 0.0, **group}
        return told

    def _check_settings(self, settings: dict[str, Any]) -> None:
        super()._check_settings(settings)
        if not 0 <= settings["decay"] < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {settings['decay']}")

    def _estimate(self, group: _Group, derivatives: list[float]) -> tuple[list[float], dict[str, float]]:
        before = group.settings.get("square", 0.0), group.settings.get("square_weight", 0.0)
        running = RunningLength(float(group.settings["decay"]), *before)
        length = running.update(sum(v * v for v in derivatives) / len(derivatives))
        estimate = [v / length / self.directions for v in derivatives]
        return estimate, {"square": running.mean, "square_weight": running.weight}


def _sample(tensor: Tensor) -> Tensor:
    """Elements of it, in memory order: a view."""
    step = max(1, tensor.numel() // SAMPLE)
    return tensor.as_strided([min(SAMPLE, -(-tensor.numel() // step))], [step])


def _without_graph(evaluate: Closure) -> Any:
    try:
        return evaluate()
    except RuntimeError as error:
        if "does not require grad and does not have a grad_fn" in str(error):  # torch's words
            raise RuntimeError(
                "the closure calls backward(), as closures of torch.optim do: leave that and zero_grad() out. It only "
                "evaluates the loss and returns it; no graph is recorded"
            ) from error
        raise


def _scalar(loss: Any) -> Tensor:
    """A closure's answer, float64 [], without waiting for its device."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex() or loss.dtype == torch.bool or loss.is_meta:
            raise TypeError(
                f"the closure must return one number, got a tensor {[*loss.shape]} of {loss.dtype} on {loss.device}"
            )
        # Always a copy: a graph's static output would be overwritten by the next evaluation.
        return loss.detach().reshape(()).to(torch.float64, copy=True)
    if isinstance(loss, bool) or not isinstance(loss, (int, float, np.integer, np.floating)):
        raise TypeError(f"the closure must return the loss, one number, got {type(loss).__name__}")
    return torch.tensor(float(loss), dtype=torch.float64, device="cpu")


def _numbers(values: Sequence[Any]) -> Tensor:
    """float32 on the CPU, whatever torch's defaults are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")
