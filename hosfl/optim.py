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

* Exact, wherever it can be: float32 weights, Rademacher directions, no momentum and no weight decay. At the first step
  the weights are put on a lattice (`hosfl_kernels.snap_`; an error of at most 2^-20 of the largest weight) on which
  moves round nothing. They are moved in place and taken back to the very bits; mu is the nearest multiple of the
  lattice's quantum and a step's coefficients are rounded to multiples stochastically. When weights outgrow the lattice
  it is made 16 times coarser.
* Read only: all else, if the module is given as `model`. Moved weights exist one layer at a time
  (`hosfl.displaced`), the weights themselves change by the update alone; bfloat16 rounds it stochastically.
* Drifting: all else without `model`. Moved in place and back, every move rounded: after one step 29 % of float32 and
  45 % of bfloat16 weights hold other bits than the update alone would give. For float32 that is noise far below the
  update's; for bfloat16 and float16 give `model`.

Momentum keeps one float32 tensor per parameter. Nothing else is ever as large as a parameter, but for a copy, one
parameter at a time, where a digest is taken, at the first step and by `log.save`: of weights on a GPU in the host's
memory, of sharded ones whole on every process.

A closure may replay a captured CUDA graph of the forward pass in the first case and in the last: weights stay at their
addresses, between two evaluations nothing waits for the device, and the loss is copied out of the graph's output. Not
in the second, where the moved weights are elsewhere; and the step itself cannot be captured, since its size is known
only when the losses are. None of this has run on a GPU yet.

Where processes share a model (DDP, or FSDP2's `fully_shard`) its losses are averaged, and all of them hold the bits of
one process with the mean loss. Sharded parameters need `model`, and must be in the first case above; every process must
call `log.save` and `rebuild`.

`optimizer.log.save(path)` writes the run: 4 (P + 2) bytes per step and parameter group. `rebuild(model, path)` makes
the trained weights again from the base model, in one pass. Where weights drift there is no such log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import ParamsT

from hosfl.aggregate import RunningLength
from hosfl.displaced import Displacement, casts_forgotten, displaced, uninterrupted
from hosfl.lattice import Lattice
from hosfl.optim_log import Row, RunLog, Terms, apply_rule, plain, rebuild, zeros
from hosfl.seeds import Purpose, round_seed
from hosfl.sharded import is_sharded, let_go, reshard, shards
from hosfl_kernels import SGD, derive, perturb_, replay_

__all__ = ["ZOSGD", "RunLog", "ZONormalizedSGD", "rebuild"]

Closure = Callable[[], Any]
LARGEST_FLOAT32 = torch.finfo(torch.float32).max


# --- weights out and back ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """What moves of one parameter group: those that require grad, and their numbers, which name their noise.

    tensors, starts: what of each lies here, all of it but for sharded ones; and its first element's index.
    """

    settings: dict[str, Any]
    numbers: list[int]
    parameters: list[Tensor]
    tensors: list[Tensor]
    starts: list[int]
    mu: float

    def versions(self) -> list[int]:
        """Writing a sharded parameter raises its own version, writing what lies here that tensor's."""
        return [t._version for t in (*self.parameters, *self.tensors)]


@dataclass(frozen=True)
class _Measurement:
    """What a step needs to know, from when it was measured: of which parameters, and per group v_p."""

    numbers: list[list[int]]
    loss: Tensor
    derivatives: list[list[float]]


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
        with displaced(self.model, _GroupDisplacement(self.groups, seed, sign, self.dist)):
            yield

    def home(self) -> None:
        pass


# --- the optimizers ----------------------------------------------------------------------------------------------


class ZOSGD(torch.optim.Optimizer):
    """Stochastic gradient descent on a gradient estimated from forward passes; see the module for the formula.

    Args:
        params: as for any torch optimizer: tensors, (name, tensor) pairs, or groups with their own lr, mu and
            weight_decay. float32, bfloat16 or float16, contiguous, on one device. Pass frozen ones too if they may be
            unfrozen later. Only those that require grad move.
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
        seed: of all noise, 0 <= seed < 2^64. Runs of the same seed, weights and losses are the same run.
        model: the module that the closure evaluates and that owns `params` (the compiled one, where it is compiled):
            off the lattice its weights are then read only. Also gives the log the parameters' names.
        process_group: where torch.distributed is initialised, losses are averaged over this group (default: all
            ranks), each rank's for the same, and ranks that began with the same weights keep the same bits. Every rank
            must take every step; where a closure raises on one, the others wait. Pass a group of one to run
            alone. Of sharded parameters it must hold all shards.

    Learning rate schedulers, `state_dict` (a few numbers, and moments), `add_param_group`, torch.compile of the model,
    autocast and closures that loop over micro-batches work as with any optimizer. Where a whole training step is
    compiled, the optimizer runs as Python within it, and so does its closure but for a model that is compiled itself.

    Raises: ValueError, TypeError.
    """

    # What a state keeps beside torch's groups.
    kept: tuple[str, ...] = ("seed", "steps", "directions", "pool", "two_sided", "dist", "momentum")

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
        seed: int = 0,
        model: nn.Module | None = None,
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
            raise ValueError(f"directions must be an integer, 1 or more, got {directions!r}")
        if isinstance(pool, bool) or not isinstance(pool, int) or 0 != pool < directions:
            raise ValueError(f"pool must be 0, or at least the {directions} directions of a step, got {pool!r}")
        if dist not in ("rademacher", "gaussian"):
            raise ValueError(f"dist must be rademacher or gaussian, got {dist!r}")
        SGD(momentum=momentum)  # checks it
        derive(seed, 0, 0)
        self.directions, self.pool, self.momentum = directions, pool, momentum
        self.two_sided, self.dist = bool(two_sided), dist
        self.seed, self.model, self.process_group = seed, model, process_group
        self.steps = 0
        self.lattice: Lattice | None = None
        self._settled: object = None  # what moved in the last step, and on which lattice
        self._versions: list[int] = []  # of these tensors, after it
        self._largest = math.inf  # an upper bound of |weight|, made exact when it matters
        self._measurement: _Measurement | None = None  # of the step that is to be taken next
        super().__init__(params, {"lr": lr, "mu": mu, "weight_decay": weight_decay})
        self._check_model()
        self.log = self._new_log()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; they are numbered on from the last. Raises ValueError, TypeError."""
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len(set(params)) < len(params):
            del self.param_groups[-1]
            raise ValueError("a parameter is twice in one group: pass tied parameters once")

    def _check_model(self) -> None:
        if self.model is None:
            return
        reshard(self.model)
        if any(isinstance(m, torch.jit.ScriptModule) for m in self.model.modules()):
            raise TypeError(
                "cannot evaluate a scripted module at other weights than its own: pass the module as it was"
            )
        if any(getattr(m, "max_norm", None) is not None for m in self.model.modules()):
            raise ValueError("an embedding with max_norm writes its weights in every forward pass: set max_norm=None")
        owned = set(self.model.parameters())
        if not all(p in owned for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "there are parameters that `model` does not own (a sharded module has others while it holds them "
                "gathered: make its optimizer before its first forward pass)"
            )

    # --- a step ---

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:
        """One step. Returns the loss, float64 on the CPU: the mean over all moved weights, one-sided the loss at th.

        Args:
            closure: evaluates the model and returns the loss: a number, or a tensor of one element. No backward. It is
                called 2 P times (one-sided P + 1) and must depend on nothing but the weights: the same batch, eval
                mode or no dropout. It need not be differentiable. Left out where the step was measured before.

        One wait for the device per step, for the losses. If the closure raises or is interrupted the weights are what
        they were before the step (bit for bit, unless they drift), and the optimizer too.

        Raises: TypeError without a closure or for what is no number; FloatingPointError for losses that are infinite
        or NaN, or a step that is; ValueError where no parameter requires grad; RuntimeError where the closure writes
        the weights.
        """
        measurement, self._measurement = self._measurement, None
        with self._weights() as weights:
            if closure is not None or measurement is None:
                measurement = self._measured(closure, weights)
            if measurement.numbers != [group.numbers for group in weights.groups]:
                raise RuntimeError("other parameters require grad than when the step was measured")
            estimates = [self._estimate(g, d) for g, d in zip(weights.groups, measurement.derivatives, strict=True)]
            with uninterrupted():
                self._update(weights, [estimate for estimate, _ in estimates])
                for group, (_, state) in zip(weights.groups, estimates, strict=True):
                    group.settings.update(state)
                self.steps += 1
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
        groups = self._settle()
        weights: _InPlace | _ReadOnly = _InPlace(groups, self.dist)
        if self.lattice is None and self.model is not None:
            weights = _ReadOnly(groups, self.dist, self.model)
        try:
            yield weights
        finally:
            weights.home()
            self._versions = [v for group in groups for v in group.versions()]
            torch.clear_autocast_cache()

    def _settle(self) -> list[_Group]:
        """The parameters that move in this step, on their lattice where there can be one."""
        groups = self._moving()
        tensors = [t for group in groups for t in group.tensors]
        if not tensors:
            raise ValueError("no parameter requires grad: there is nothing to move")
        exact = self._exact(tensors)
        self._check_sharded(groups, exact)
        settled = (exact, [group.numbers for group in groups])
        if settled != self._settled:
            replay_(tensors, [], [])  # dtypes, devices, strides, shared memory: refused before anything moves
            self.log.admit(self._named())
            self._settled, self._versions = settled, []
        if not exact:
            self.lattice = None
            if self.model is None:
                self.log.refusal = "weights that are moved in place off the lattice drift: give the optimizer `model`"
            return groups
        if [v for group in groups for v in group.versions()] != self._versions:
            # New here, or written by somebody else: checkpoints that were loaded, weights swapped for an evaluation.
            self._largest = self._largest_weight(groups)
            # One number stands for all: snap_ would make a copy of each tensor.
            self._put(groups, self.lattice or Lattice.snap([torch.tensor([self._largest])], [1.0]))
        self._make_room(groups, max(float(group.settings["mu"]) for group in groups))
        assert self.lattice is not None
        return [replace(group, mu=self.lattice.nearest(group.mu, at_least_one=True)) for group in groups]

    def _moving(self) -> list[_Group]:
        groups, number = [], 0
        for settings in self.param_groups:
            _check_settings(settings)  # schedulers and users write them
            moving = [(n, p) for n, p in enumerate(settings["params"], number) if p.requires_grad]
            numbers, parameters = [n for n, _ in moving], [p for _, p in moving]
            tensors, starts = shards(parameters)
            groups.append(_Group(settings, numbers, parameters, tensors, starts, float(settings["mu"])))
            number += len(settings["params"])
        return groups

    def _check_sharded(self, groups: list[_Group], exact: bool) -> None:
        if not any(is_sharded(p) for group in groups for p in group.parameters):
            return
        if self.model is None:
            raise ValueError("sharded parameters: give the optimizer `model`, which must gather them at every move")
        if not exact:
            raise ValueError(
                "sharded parameters move only where moves are exact: float32 (FSDP may still compute in bfloat16), "
                'dist="rademacher", no momentum and no weight_decay'
            )
        reshard(self.model)
        owned = set(self.model.parameters())
        if not all(p in owned for group in groups for p in group.parameters):
            raise RuntimeError("a forward pass of the sharded module was cut short: evaluate it once, then go on")

    def _exact(self, tensors: Sequence[Tensor]) -> bool:
        plain = self.momentum == 0 and all(group["weight_decay"] == 0 for group in self.param_groups)
        return plain and self.dist == "rademacher" and all(t.dtype == torch.float32 for t in tensors)

    def _put(self, groups: list[_Group], lattice: Lattice) -> None:
        with uninterrupted():
            for group in groups:
                lattice.put(group.tensors, [1.0] * len(group.tensors))
            self.lattice = lattice
            self._largest += lattice.quantum
            self.log.put(lattice.quantum, [n for group in groups for n in group.numbers])

    def _largest_weight(self, groups: list[_Group]) -> float:
        """max |weight| over all processes."""
        largest = torch.tensor(_largest([t for group in groups for t in group.tensors]))
        sharded = [p for group in groups for p in group.parameters if is_sharded(p)]
        if sharded:
            largest = largest.to(sharded[0].device)
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, self.process_group)
        if not torch.isfinite(largest):
            raise ValueError("there are infinite or NaN weights")
        return float(largest)

    def _make_room(self, groups: list[_Group], distance: float) -> None:
        """A lattice on which weights may move by `distance`. The weights must be at home."""
        assert self.lattice is not None
        if self._largest + distance <= self.lattice.limit / 2:  # half: rounding to the lattice adds its share
            return
        self._largest = self._largest_weight(groups)
        lattice = self.lattice
        while self._largest + distance > lattice.limit / 2:
            lattice = lattice.coarser()
        if lattice != self.lattice:
            self._put(groups, lattice)

    def _losses(self, closure: Closure | None, weights: _InPlace | _ReadOnly) -> list[Tensor]:
        if not callable(closure):
            raise TypeError(
                "step needs a closure that evaluates the model and returns the loss: step(lambda: loss(...))"
            )
        places = [(seed, sign) for seed in self._seeds() for sign in ((1, -1) if self.two_sided else (1,))]
        losses = []
        for seed, sign in places if self.two_sided else [(0, 0), *places]:
            with weights.at(seed, sign), let_go(self.model), casts_forgotten():
                versions = [group.versions() for group in weights.groups]
                losses.append(_scalar(closure()))
                if [group.versions() for group in weights.groups] != versions:
                    self._settled = None
                    raise RuntimeError("the closure writes the weights: it is only to evaluate them")
        return losses

    def _measured(self, closure: Closure | None, weights: _InPlace | _ReadOnly) -> _Measurement:
        loss, differences = self._differences(torch.stack(self._losses(closure, weights)))
        derivatives = [[d / group.mu for d in differences] for group in weights.groups]
        return _Measurement([group.numbers for group in weights.groups], loss, derivatives)

    def _differences(self, stacked: Tensor) -> tuple[Tensor, list[float]]:
        """The loss to return, and d_p: the step's one wait for the device."""
        if distributed.is_available() and distributed.is_initialized():
            stacked = stacked.to(self.param_groups[0]["params"][0].device)
            distributed.all_reduce(stacked, group=self.process_group)
            stacked /= distributed.get_world_size(self.process_group)
        values = stacked.cpu()
        if not torch.isfinite(values).all():
            raise FloatingPointError(f"the closure returned losses that are infinite or NaN: {values.tolist()}")
        if self.two_sided:
            plus, minus = values[0::2], values[1::2]
            return values.mean(), ((plus - minus) / 2).tolist()
        return values[0], (values[1:] - values[0]).tolist()

    def _estimate(self, group: _Group, derivatives: list[float]) -> tuple[list[float], dict[str, float]]:
        """The gradient's coefficients on the directions, and what the group keeps if the step is taken."""
        return [v / self.directions for v in derivatives], {}

    def _update(self, weights: _InPlace | _ReadOnly, estimates: list[list[float]]) -> None:
        """Takes the weights home and makes the step; all or nothing."""
        groups = weights.groups
        rates = [float(group.settings["lr"]) for group in groups]
        reach = max(max(rate, 1.0) * sum(map(abs, e)) for rate, e in zip(rates, estimates, strict=True))
        if not reach < LARGEST_FLOAT32 / 4:
            raise FloatingPointError(f"a step of {reach:g}: lower lr, or raise mu")
        if self.lattice is None:
            weights.home()
            rows = [self._rule_step(g, s, e) for g, s, e in zip(groups, rates, estimates, strict=True)]
        else:
            assert isinstance(weights, _InPlace)
            rows = self._lattice_step(weights, rates, estimates)
        self.log.append([group.numbers for group in groups], self.lattice is not None, rows)

    def _lattice_step(self, weights: _InPlace, rates: list[float], estimates: list[list[float]]) -> list[Row]:
        """Home and on in one pass: th = th - lr * sum_p e_p u_p, the coefficients on the lattice, right on average."""
        assert self.lattice is not None
        groups = weights.groups
        distance = max(rate * sum(map(abs, e)) for rate, e in zip(rates, estimates, strict=True))
        distance += max(group.mu for group in groups)
        if self._largest + distance > self.lattice.limit / 2:
            weights.home()
            self._make_room(groups, distance)
        key = round_seed(self.seed, Purpose.COEFFICIENTS, self.steps)
        moves = [
            [self.lattice.stochastic(-rate * c, derive(key, p, g) / 2.0**64) for p, c in enumerate(estimate)]
            for g, (rate, estimate) in enumerate(zip(rates, estimates, strict=True))
        ]
        weights.move(0, 0, [(self._seeds(), row) for row in moves])
        self._largest += max(sum(map(abs, row)) for row in moves)
        return [Row(row, rate, 1.0) for row, rate in zip(moves, rates, strict=True)]

    def _rule_step(self, group: _Group, rate: float, estimate: list[float]) -> Row:
        rule = SGD(momentum=self.momentum, weight_decay=float(group.settings["weight_decay"]))
        row = Row(estimate, *rule.steps([self.steps], [rate])[0, :2].tolist())
        moments = [self._moment(t) for t in group.tensors] if rule.moments else []
        coefficients, steps = torch.tensor([row.coefficients]), torch.tensor([[row.rate, row.keep]])
        apply_rule(self._terms(), group.tensors, group.numbers, group.starts, moments, self.steps, coefficients, steps)
        return row

    def _moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "moment" not in state:
            state["moment"] = zeros(parameter)
        moment: Tensor = state["moment"]
        return moment

    def _seeds(self) -> Sequence[int]:
        return self._terms().seeds(self.steps)

    # --- what is kept ---

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under "run" the seed, the number of steps, the lattice and the settings that shape a step."""
        run = {name: getattr(self, name) for name in self.kept}
        return {**super().state_dict(), "run": {**run, "quantum": self.lattice.quantum if self.lattice else None}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the weights are the model's to load, before or after. The log starts anew.

        Raises: ValueError where it is the state of another optimizer, or of other parameters.
        """
        run = state_dict.get("run")
        if not isinstance(run, dict) or run.keys() != {*self.kept, "quantum"}:
            raise ValueError(f"this is no state of a {type(self).__name__}")
        super().load_state_dict(state_dict)
        for name in self.kept:
            setattr(self, name, run[name])
        self.lattice = None if run["quantum"] is None else Lattice(run["quantum"])
        self._settled, self._largest, self._measurement = None, math.inf, None
        saved = (state_dict["state"].get(i) for group in state_dict["param_groups"] for i in group["params"])
        for (_, parameter), state in zip(self._named(), saved, strict=True):
            if state:  # torch gives it the parameter's dtype; moments are float32
                self.state[parameter]["moment"] = zeros(parameter).copy_(state["moment"])
        self.log = self._new_log()
        if self.momentum and self.steps:
            self.log.refusal = (
                "a resumed run with momentum cannot be rebuilt: its log starts from moments, not from zeros"
            )

    def _named(self) -> list[tuple[str | None, Tensor]]:
        """All parameters by number, with their names where these are known."""
        known = {p: name for name, p in self.model.named_parameters()} if self.model is not None else {}
        named: list[tuple[str | None, Tensor]] = []
        for group in self.param_groups:
            names = group.get("param_names") or [known.get(p) for p in group["params"]]
            named += [(name and plain(name), p) for name, p in zip(names, group["params"], strict=True)]
        return named

    def _terms(self) -> Terms:
        return Terms(self.seed, self.directions, self.pool, self.dist, self.momentum)

    def _new_log(self) -> RunLog:
        return RunLog(self._terms(), self.steps)


class ZONormalizedSGD(ZOSGD):
    """ZOSGD whose rate is divided by the running length of the gradient, which the scalars tell for nothing.

    th = th - lr / sqrt(E) * (1 / P) sum_p v_p u_p, E the bias-corrected running mean of the steps' (1 / P) sum_p v_p^2:
    for Rademacher and Gaussian directions E v_p^2 = |g|^2. A step then moves every weight by lr / sqrt(P) or so, on
    whatever scale the loss is, and no more as the gradient shrinks. One number per group is all it keeps.

    Args:
        decay: of the running mean, at least 0 and below 1. 0 takes the length from each step alone.
        Everything else as in `ZOSGD`.
    """

    kept = (*ZOSGD.kept, "decay")

    def __init__(self, params: ParamsT, lr: float, mu: float = 1e-3, *, decay: float = 0.9, **settings: Any) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        super().__init__(params, lr, mu, **settings)

    def _estimate(self, group: _Group, derivatives: list[float]) -> tuple[list[float], dict[str, float]]:
        before = group.settings.get("square", 0.0), group.settings.get("square_weight", 0.0)
        running = RunningLength(self.decay, *before)
        length = running.update(sum(v * v for v in derivatives) / len(derivatives))
        estimate = [v / length / self.directions for v in derivatives]
        return estimate, {"square": running.mean, "square_weight": running.weight}


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("lr", "mu", "weight_decay"):
        value = float(settings[name])
        if not 0 <= value < LARGEST_FLOAT32 or (name == "mu" and value == 0):
            raise ValueError(f"{name} must be finite and {'above 0' if name == 'mu' else '0 or more'}, got {value}")


def _scalar(loss: Any) -> Tensor:
    """A closure's answer, float64 [], without waiting for its device."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex() or loss.dtype == torch.bool:
            raise TypeError(f"the closure must return one number, got a tensor {[*loss.shape]} of {loss.dtype}")
        # Always a copy: a graph's static output would be overwritten by the next evaluation.
        return loss.detach().reshape(()).to(torch.float64, copy=True)
    if isinstance(loss, bool) or not isinstance(loss, (int, float, np.integer, np.floating)):
        raise TypeError(f"the closure must return the loss, one number, got {type(loss).__name__}")
    return torch.tensor(float(loss), dtype=torch.float64)


def _largest(tensors: Sequence[Tensor]) -> float:
    """max |x|, with no copy of any tensor; infinite also for NaN, which maxima over processes may lose."""
    ends = [end for t in tensors if t.numel() for end in t.detach().aminmax()]
    largest = float(torch.stack(ends).abs().max()) if ends else 0.0
    return largest if math.isfinite(largest) else math.inf
