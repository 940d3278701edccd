"""The optimizers: their arguments, a step from the closure to the log, and their states. Read `ZOSGD.step` first.

A step calls four methods. The modules that do the work are on the right:

    _weights    put the weights that move on lattices; restore them in the end    groups, lattices, moved
    _measure    from the closure's losses to v_p                                  measurement
    _estimates  from v_p to coefficients e_p, by each optimizer's own rule
    _update     th = th - lr * sum_p e_p u_p, and a row of the log                update, log
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import ParamsT

from hosfl.interrupts import uninterrupted
from hosfl.optim.groups import (
    Group,
    Parameters,
    check_model,
    check_owned,
    check_sharded,
    check_tensors,
    is_exact,
    number,
)
from hosfl.optim.lattices import Lattices
from hosfl.optim.log import RunLog
from hosfl.optim.measurement import (
    Flatness,
    Measurement,
    drop_cached_weights,
    evaluation_points,
    loss_and_differences,
    losses_at,
    warn,
    warn_of_accumulation,
    warn_of_unread,
)
from hosfl.optim.moved import InPlace, ReadOnly
from hosfl.optim.sharded import averaged, common_seed, is_distributed
from hosfl.optim.state import Saved, read_state, run_state
from hosfl.optim.terms import Terms
from hosfl.optim.update import LARGEST_FLOAT32, check_reach, lattice_step, make_moments, rule_steps
from hosfl.probing.conditions import Closure, Conditions, Evaluations
from hosfl.protocol.aggregate import RunningLength
from hosfl.protocol.lattice import Lattice
from hosfl_kernels import SGD, derive


class ZOSGD(torch.optim.Optimizer):
    """Stochastic gradient descent on a gradient estimated from forward passes; see `hosfl.optim` for the formula.

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
            off the lattice its weights are then read only, and the first step warns of those that the loss did not
            read. Also gives the log the parameters' names.
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

    # The settings of a parameter group, and what a state has beside torch's groups.
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
        if not isinstance(model, (nn.Module, type(None))):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if process_group is not None and not (
            distributed.is_available() and isinstance(process_group, distributed.ProcessGroup)
        ):
            raise TypeError(f"process_group must be a group that this process is in, got {process_group!r}")
        self._drawn, self._seed_agreed = seed is None, False  # and whether all processes have the same
        self.seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if seed is None else seed
        self.directions, self.pool, self.two_sided, self.dist = directions, pool, two_sided, dist
        self._check_terms()
        self.model, self.process_group = model, process_group
        self.steps = 0
        self._in_step = False
        self._lattices = Lattices({}, exact=False)
        self._flatness = Flatness()
        self._warned_refusal = ""  # why the log cannot be saved, once a warning has said so
        self._measurement: Measurement | None = None  # of the step that is to be taken next
        self._invalidate()
        defaults = {"lr": lr, "mu": mu, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **self._more_defaults})
        self.log = self._new_log()

    def _invalidate(self) -> None:
        """Drop what the last step found out about the weights, so that the next one checks them again."""
        self._layout: object = None  # which tensors moved, and their addresses
        self._conditions = Conditions()
        self._lattices.invalidate()

    def _parameters(self) -> Parameters:
        return Parameters(self.param_groups, self.model)

    @property
    def lattice(self) -> Lattice | None:
        """The finest of the weights' lattices: 2^-24 before any has one, None where moves round."""
        return self._lattices.finest

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, numbered after those that are there. Raises ValueError, TypeError; then none is added."""
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
            name = self._parameters().describe(param_group, again[0], len(self.param_groups))
            raise ValueError(f"{name} is in another group too: pass tied parameters once") from error
        try:
            self._check_last_group()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_last_group(self) -> None:
        group = self.param_groups[-1]
        last = {p: n for n, p in enumerate(group["params"])}
        twice = [last[p] for n, p in enumerate(group["params"]) if last[p] > n]
        if twice:
            name = self._parameters().describe(group, twice[0], len(self.param_groups) - 1)
            raise ValueError(f"{name} is twice in one group: pass tied parameters once")
        check_model(self._parameters())

    def _check_terms(self) -> None:
        """Check what is the same for all groups. Integers and booleans of numpy, which are no JSON, become Python's."""
        for name in ("seed", "directions", "pool", "two_sided"):
            value = getattr(self, name)
            setattr(self, name, value.item() if isinstance(value, (np.integer, np.bool_)) else value)
        derive(self.seed, 0, 0)  # raises what is wrong with it
        directions, pool = self.directions, self.pool
        if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
            raise ValueError(f"directions must be an integer, 1 or more, got {directions!r}")
        if isinstance(pool, bool) or not isinstance(pool, int) or 0 != pool < directions:
            raise ValueError(f"pool must be 0, or at least the {directions} directions of a step, got {pool!r}")
        if not isinstance(self.two_sided, bool):
            raise ValueError(f"two_sided must be True or False, got {self.two_sided!r}")
        if self.dist not in ("rademacher", "gaussian"):
            raise ValueError(f"dist must be rademacher or gaussian, got {self.dist!r}")

    def _check_settings(self, settings: dict[str, Any]) -> None:
        for name in ("lr", "mu", "weight_decay"):
            value = number(settings[name], name)
            if not 0 <= value < LARGEST_FLOAT32 or (name == "mu" and value == 0):
                raise ValueError(f"{name} must be finite and {'above 0' if name == 'mu' else '0 or more'}, got {value}")
        SGD(momentum=number(settings["momentum"], "momentum"))  # raises ValueError

    # --- a step ---

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:
        """One step. Returns the loss, float64 on the CPU: the mean over all moved weights, one-sided the loss at th.

        Args:
            closure: evaluates the model and returns the loss, a number or a tensor of one element; no backward. It is
                called 2 P times (one-sided P + 1, once where all rates are 0), each time with the random numbers of the
                first, so that the model may be in train mode: dropout takes the same units away, and running statistics
                take in the first evaluation alone. On all else but the weights it must not depend: the same batch every
                time. It need not be differentiable. None: the step that was measured before is taken; where none was
                and all rates are 0, no step is made and None returned, but moments are there then: this is how
                torch.distributed.checkpoint prepares optimizers.

        Waits for the device for the losses, and before them to see whether somebody wrote the weights; never in
        between. If the step fails or is interrupted the weights are what they were before it (bit for bit, unless they
        drift; but for what a new lattice rounds), and the optimizer, running statistics and torch's generators too.

        Raises:
            TypeError: there is no closure, or what it returns is no number.
            FloatingPointError: losses are infinite or NaN, or the step is too long for float32.
            ValueError: no parameter requires grad, or one cannot move by mu.
            RuntimeError: the closure writes the weights, or computes their gradients, or reads none of those that move,
                or takes a step of its own optimizer. Moved weights that are only read are copies: what it writes there
                is forgotten.
        """
        measurement, self._measurement = self._measurement, None
        if closure is None and measurement is None and not any(float(group["lr"]) for group in self.param_groups):
            make_moments(self.param_groups, self.state)
            return None
        if closure is not None and not self.steps:
            warn_of_accumulation()
        with self._weights() as weights, self._conditions.repeated(self._device_types()) as evaluations:
            if closure is not None or measurement is None:
                measurement = self._measure(closure, weights, evaluations)
            estimates, kept = self._estimates(weights.groups, measurement)
            with uninterrupted():
                self._update(weights, estimates, measurement.terms)
                for settings, state in kept:
                    settings.update(state)
                self.steps += 1
                evaluations.keep()
        if self.log.refusal != self._warned_refusal:
            self._warned_refusal = self.log.refusal
            warn(f"the log of this run cannot be saved: {self._warned_refusal}")
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
        with self._weights() as weights, self._conditions.repeated(self._device_types()) as evaluations:
            measurement = self._measure(closure, weights, evaluations)
            with uninterrupted():
                self._measurement = measurement
                evaluations.keep()
        return measurement.loss

    def _device_types(self) -> set[str]:
        """The types of the parameters' devices, whose random numbers are the same in all evaluations of a step."""
        return {p.device.type for group in self.param_groups for p in group["params"]} - {"meta"}

    @contextmanager
    def _weights(self) -> Iterator[InPlace | ReadOnly]:
        """The weights that this step moves; on exit they are restored if the step was not made."""
        self._refuse_in_step()
        self._check_terms()
        self._agree_on_seed()
        groups = self._prepare()
        weights: InPlace | ReadOnly = InPlace(groups, self.dist)
        if not self._lattices.exact and self.model is not None:
            weights = ReadOnly(groups, self.dist, self.model)
        try:
            self._in_step = True
            try:
                yield weights
            finally:
                self._in_step = False
                weights.restore()
        finally:
            self._in_step = False  # both again, since Ctrl-C may have come as the first began
            weights.restore()
            self._lattices.mark_versions(groups)
            if weights.written:
                self._layout = None
            drop_cached_weights()

    def _refuse_in_step(self) -> None:
        if self._in_step:
            raise RuntimeError(
                "the closure calls `step`, `measure` or `load_state_dict` of the optimizer whose step it is evaluated "
                "for: it is only to evaluate the loss"
            )

    def _agree_on_seed(self) -> None:
        """Before the first step, agree on one seed where several processes have each drawn their own."""
        device = self._parameters().device()
        if self._seed_agreed or not is_distributed():
            return
        seed = common_seed(self.seed, self._drawn, device, self.process_group)
        if seed is not None:
            self.seed = seed
            self.log = self._new_log()
        self._seed_agreed = True

    def _prepare(self) -> list[Group]:
        """Check the parameters that this step moves, and put them on lattices if moves of them can be exact."""
        groups = [group for group in self._requiring_grad() if group.rate and group.numbers]
        exact = is_exact(groups, self.dist)
        check_owned(groups, self.model)
        check_sharded(groups, self.model, exact)
        # A tensor that was converted, moved or given other memory must be checked again.
        layout = (
            exact,
            [
                [
                    (n, id(p), t.dtype, t.device, t.data_ptr())
                    for (n, t), p in zip(g.named_tensors(), g.parameters, strict=True)
                ]
                for g in groups
            ],
        )
        if layout != self._layout:
            check_tensors(groups, self.state)
            self.log.add_parameters(self._parameters().named())
            self._invalidate()
            self._layout = layout
        if exact:
            return self._lattices.place(groups, self.log, self.process_group)
        self._lattices.leave()
        if groups and self.model is None:
            self.log.refuse("weights that are moved in place off the lattice drift: give the optimizer `model`")
        return groups

    def _requiring_grad(self) -> list[Group]:
        given, groups, number = self._parameters(), [], 0
        for index, settings in enumerate(self.param_groups):
            self._check_settings(settings)  # schedulers and users change them between steps
            groups.append(Group.of(given, index, number))
            number += len(settings["params"])
        return groups

    def _measure(self, closure: Closure | None, weights: InPlace | ReadOnly, evaluations: Evaluations) -> Measurement:
        terms, two_sided = self._terms(), self.two_sided  # a closure may change them for the next step
        places = evaluation_points(terms.seeds(self.steps), two_sided, moving=bool(weights.groups))
        losses, half_precision = losses_at(places, weights, closure, evaluations, self.model)
        if self.steps == 0 and isinstance(weights, ReadOnly) and weights.unread:
            warn_of_unread([self._parameters().name(number) for number in weights.unread])
        if is_distributed():
            losses = averaged(losses, self._parameters().device(), self.process_group)
        loss, differences = loss_and_differences(losses, two_sided, first=self.steps == 0)
        if differences:
            self._flatness.update(differences, half_precision)
        derivatives = {tuple(group.numbers): [d / group.mu for d in differences] for group in weights.groups}
        return Measurement(terms, loss, derivatives)

    def _estimate(self, group: Group, derivatives: list[float]) -> tuple[list[float], dict[str, float]]:
        """The gradient's coefficients on the directions, and the group's new state if the step is made."""
        return [v / len(derivatives) for v in derivatives], {}

    def _estimates(
        self, groups: list[Group], measurement: Measurement
    ) -> tuple[list[list[float]], list[tuple[dict[str, Any], dict[str, float]]]]:
        """The coefficients of each group, and (settings, new state) of each parameter group."""
        estimates, kept = [], []
        first: dict[int, tuple[float, list[float]]] = {}
        for group in groups:
            derivatives = measurement.derivatives.get(tuple(group.numbers))
            if derivatives is None:
                raise RuntimeError(
                    "other parameters move than when the step was measured: do not change requires_grad, rates that "
                    "are 0, or weights between `measure` and `step`"
                )
            if group.index not in first:  # the part on the finest lattice, whose mu is nearest to the setting
                estimate, state = self._estimate(group, derivatives)
                first[group.index] = group.mu, estimate
                kept.append((group.settings, state))
            # The other parts moved by another mu: their derivative is d / mu of that.
            mu, estimate = first[group.index]
            estimates.append([c * (mu / group.mu) for c in estimate])
        return estimates, kept

    def _update(self, weights: InPlace | ReadOnly, estimates: list[list[float]], terms: Terms) -> None:
        """Restore the weights and make the step, of all groups or of none. terms: those it was measured with."""
        check_reach(weights.groups, estimates)
        exact = self._lattices.exact
        if exact:
            assert isinstance(weights, InPlace)
            rows = lattice_step(weights, estimates, self._lattices, terms, self.steps, self.log, self.process_group)
        else:
            rows = rule_steps(weights, estimates, self.state, terms, self.steps)
        momenta = [group.momentum for group in weights.groups]
        self.log.append(terms, self.steps, [group.numbers for group in weights.groups], momenta, exact, rows)

    def _terms(self) -> Terms:
        return Terms(self.seed, self.directions, self.pool, self.dist)

    def _new_log(self) -> RunLog:
        return RunLog(self._terms(), self.steps)

    # --- states ---

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
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in self.kept},
            "model": self.model,
            "process_group": self.process_group,
            "log": self.log,
            "_quanta": self._lattices.quanta,
            "_on_lattice": self._lattices.exact,
            "_measurement": self._measurement,
            "_drawn": self._drawn,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state)
        if "_quanta" in own:  # not in those of load_state_dict, which come here too
            self._lattices = Lattices(own.pop("_quanta"), own.pop("_on_lattice"))
        super().__setstate__(own)
        self._flatness, self._warned_refusal, self._seed_agreed = Flatness(), "", False
        self._in_step = False
        self._invalidate()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under "run" in its first group the seed, the number of steps, the settings that shape a step.

        run["optimizer"]: the class. run["shapes"], run["quanta"]: of each parameter, by its number, the shape, and the
        quantum of its lattice; None where it is on none.

        In a group, because torch.distributed.checkpoint saves only groups and moments; in lists, because of a mapping
        it loads only the keys that the new optimizer has.
        """
        # The first of the hooks, so that a user's see the whole state.
        first = self.register_state_dict_post_hook(lambda _, state: self._add_run(state), prepend=True)
        try:
            state: dict[str, Any] = super().state_dict()
        finally:
            first.remove()
        return state

    def _add_run(self, state: dict[str, Any]) -> None:
        """Add to a state what torch's has not. Numbers of numpy, as of some schedules, become ones that torch loads."""
        for group in state["param_groups"]:
            group |= {name: value.item() for name, value in group.items() if isinstance(value, np.generic)}
        kept = {name: getattr(self, name) for name in self.kept}
        parameters = [p for _, p in self._parameters().named()]
        state["param_groups"][0]["run"] = run_state(type(self).__name__, kept, parameters, self._lattices.quanta)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the weights are the model's to load, before or after. The log starts anew.

        Raises: ValueError for what is no state, or that of another optimizer or of other parameters, or of these in
        another order, if they have names; RuntimeError within a closure. Nothing is changed then.
        """
        self._refuse_in_step()
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"this is no state of a {type(self).__name__}: it is a {type(state_dict).__name__}")
        found: list[Saved] = []

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            name, terms = type(self).__name__, (self.kept, self.settable, self._check_settings)
            found.append(read_state(given, name, *terms, self._parameters()))
            for group, mine in zip(found[0].groups, self.param_groups, strict=False):  # torch counts them
                if "param_names" in mine:  # the log has the names of these parameters, not of the saved ones
                    group["param_names"] = mine["param_names"]
            return {**given, "param_groups": found[0].groups}

        # Between a user's hooks: it checks what pre-hooks return, and post-hooks find the state loaded.
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._load(found[0]), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _load(self, saved: Saved) -> None:
        """Load what torch's load_state_dict does not."""
        for name in self.kept:
            setattr(self, name, saved.run[name])
        self._drawn = False
        self._lattices.quanta, self._measurement = saved.run["quanta"], None
        for parameter, moment in saved.moments.items():
            self.state[parameter]["moment"] = moment
        self.log = self._new_log()
        if saved.moments:
            self.log.refuse(
                "a resumed run with momentum cannot be rebuilt: its log starts from moments, not from zeros"
            )


class ZONormalizedSGD(ZOSGD):
    """ZOSGD whose rate is divided by a running mean of the gradient's norm, which the scalars estimate at no cost.

    th = th - lr / sqrt(E) * (1 / P) sum_p v_p u_p, E the bias-corrected running mean of the steps' (1 / P) sum_p v_p^2:
    for Rademacher and Gaussian directions E v_p^2 = |g|^2. A step then moves every weight by lr / sqrt(P) or so, on
    whatever scale the loss is, and does not shrink with the gradient. One number per group is all it keeps.

    Args:
        decay: of the running mean, at least 0 and below 1; groups may have their own. 0 takes the norm from each
            step alone.
        Everything else as in `ZOSGD`.
    """

    settable = (*ZOSGD.settable, "decay")

    def __init__(self, params: ParamsT, lr: float, mu: float = 1e-3, *, decay: float = 0.9, **settings: Any) -> None:
        self._more_defaults = {"decay": decay}
        super().__init__(params, lr, mu, **settings)

    def _add_run(self, state: dict[str, Any]) -> None:
        super()._add_run(state)
        for group in state["param_groups"]:  # from the start, since they are only loaded into keys that are there
            group |= {"square": 0.0, "square_weight": 0.0, **group}

    def _check_settings(self, settings: dict[str, Any]) -> None:
        super()._check_settings(settings)
        if not 0 <= number(settings["decay"], "decay") < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {settings['decay']}")
        for name in ("square", "square_weight"):  # the state of the running mean
            if not 0 <= number(settings.get(name, 0.0), name) < math.inf:
                raise ValueError(f"{name}, of the running mean, must be finite and 0 or more, got {settings[name]}")

    def _estimate(self, group: Group, derivatives: list[float]) -> tuple[list[float], dict[str, float]]:
        before = group.settings.get("square", 0.0), group.settings.get("square_weight", 0.0)
        running = RunningLength(float(group.settings["decay"]), *before)
        square = sum(v * v for v in derivatives) / len(derivatives)
        if not math.isfinite(square):  # it would spoil the running mean, which divides all later steps
            raise FloatingPointError(
                f"derivatives of up to {max(map(abs, derivatives)):g}, whose squares float64 does not hold: scale the "
                "loss down, or raise mu"
            )
        length = running.update(square)
        estimate = [v / length / len(derivatives) for v in derivatives]
        return estimate, {"square": running.mean, "square_weight": running.weight}
