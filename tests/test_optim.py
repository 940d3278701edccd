"""hosfl.optim: every optimizer x every property; the estimator in numpy; logs; two processes; the examples."""

import contextlib
import copy
import inspect
import io
import os
import pickle
import random
import runpy
import signal
import stat
import sys
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path

import group
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hosfl
import hosfl_kernels
from hosfl import optim
from hosfl.files import write_atomically
from hosfl.optim import ZOSGD, ZONormalizedSGD, lattices, log_file, rebuild, terms
from hosfl.protocol.header import LogError
from hosfl.protocol.seeds import Purpose, direction_seeds, round_seed
from hosfl_kernels import derive, spec

OTHERS = ("signs", "texts")  # a method, and a client's data
EXAMPLES = sorted(p for p in (Path(__file__).parent.parent / "examples").glob("*.py") if p.stem not in OTHERS)

# name -> (class, learning rate, settings, dtype, whether the optimizer is given the model)
CASES = {
    "plain": (ZOSGD, 0.02, {}, torch.float32, False),
    "one-sided": (ZOSGD, 0.02, {"two_sided": False, "directions": 3}, torch.float32, False),
    "normalized": (ZONormalizedSGD, 0.02, {"directions": 2}, torch.float32, False),
    "pool": (ZONormalizedSGD, 0.02, {"directions": 2, "pool": 15}, torch.float32, False),
    "drifting": (ZOSGD, 0.02, {"dist": "gaussian"}, torch.float32, False),
    "gaussian": (ZOSGD, 0.02, {"dist": "gaussian", "directions": 2}, torch.float32, True),
    "momentum": (ZOSGD, 0.002, {"momentum": 0.9, "directions": 2}, torch.float32, True),
    "decay": (ZOSGD, 0.02, {"weight_decay": 0.1}, torch.float32, True),
    "bfloat16": (ZONormalizedSGD, 0.02, {"mu": 0.05, "directions": 3}, torch.bfloat16, True),
    "float16": (ZOSGD, 0.02, {"mu": 0.03, "two_sided": False, "momentum": 0.5}, torch.float16, True),
}
WITH_MOMENTUM = [name for name, (_, _, settings, _, _) in CASES.items() if "momentum" in settings]
EXACT = [name for name in CASES if name in ("plain", "one-sided", "normalized", "pool")]
every = pytest.mark.parametrize("case", CASES)


class Run:
    """A small regression: a model, its optimizer and the closure of every step."""

    def __init__(self, case="plain", params=None, **settings):
        cls, lr, given, dtype, with_model = CASES[case]
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
        self.base = copy.deepcopy(self.model)
        settings = {"lr": lr, "seed": 3, "model": self.model if with_model else None, **given, **settings}
        self.optimizer = cls(params(self.model) if params else self.model.named_parameters(), **settings)

    def loss(self, step=0):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return (self.model(x.to(self.model[0].weight.dtype)).float() - x.sum(1, keepdim=True)).square().mean()

    def go(self, steps, first=0):
        for step in range(first, first + steps):
            self.optimizer.step(lambda step=step: self.loss(step))
        return self

    @property
    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- every optimizer ---------------------------------------------------------------------------------------------


@every
def test_a_quadratic_falls_to_its_minimum_s_surroundings(case):
    cls, lr, settings, dtype, _ = CASES[case]
    model = nn.Linear(8, 1, bias=False).to(dtype)
    target = torch.linspace(-0.5, 0.5, 8)
    optimizer = cls(model.parameters(), lr, model=model, seed=0, **settings)

    def distance():
        return (model.weight.float()[0] - target).square().sum()

    before = float(distance().detach())
    for _ in range(100):
        loss = optimizer.step(distance)
    assert float(distance().detach()) < 0.1 * before
    assert loss.shape == ()


def told(state):
    return state["param_groups"][0]["run"]


def as_before(state):
    """As it was when the run lay beside the groups."""
    first, *rest = copy.deepcopy(state["param_groups"])
    run = first.pop("run")
    quanta = {n: q for n, q in enumerate(run["quanta"]) if q is not None}
    run = {key: run[key] for key in ("seed", "steps", "directions", "pool", "two_sided", "dist")}
    return {**state, "param_groups": [first, *rest], "run": {**run, "quanta": quanta}}


@every
def test_a_saved_state_continues_to_the_same_bits(case):
    whole = Run(case).go(6)
    half = Run(case).go(3)
    file = io.BytesIO()
    torch.save({"model": half.model.state_dict(), "optimizer": half.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    optimizer = whole.optimizer
    different = {"seed": 99, "lr": 0.5, "directions": 4, "pool": 0 if optimizer.pool else 7, "momentum": 0.25}
    different |= {"dist": "rademacher" if optimizer.dist == "gaussian" else "gaussian"}
    different |= {"two_sided": not optimizer.two_sided, **({"decay": 0.3} if "decay" in optimizer.settable else {})}
    assert different.keys() >= {*optimizer.kept} - {"steps"}
    for weights_first, state in ((True, saved["optimizer"]), (False, as_before(saved["optimizer"]))):
        other = Run(case, **different)
        if weights_first:
            other.model.load_state_dict(saved["model"])
        other.optimizer.load_state_dict(state)
        if not weights_first:
            other.model.load_state_dict(saved["model"])
        assert other.optimizer.steps == 3
        other.go(3, first=3)
        assert same(other.weights, whole.weights)
        assert str(other.optimizer.state_dict()) == str(whole.optimizer.state_dict())


@every
@pytest.mark.filterwarnings("ignore:torch.distributed is ")
def test_torch_s_checkpoints_continue_to_the_same_bits(case, tmp_path):
    whole, half = Run(case).go(6), Run(case).go(3)
    other = Run(case, seed=99, directions=4, pool=0 if whole.optimizer.pool else 7)
    groups = str(other.optimizer.param_groups)
    saved, read = (
        {"model": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
        for run in (half, other)
    )
    assert same(other.weights, list(other.base.parameters()))
    assert (other.optimizer.steps, str(other.optimizer.param_groups)) == (0, groups)
    checkpoint.save(saved, checkpoint_id=tmp_path)
    checkpoint.load(read, checkpoint_id=tmp_path)
    other.model.load_state_dict(read["model"])
    set_optimizer_state_dict(other.model, other.optimizer, read["optimizer"])
    other.go(3, first=3)
    assert same(other.weights, whole.weights)
    assert str(other.optimizer.state_dict()) == str(whole.optimizer.state_dict())


def test_a_flat_checkpoint_is_refused_and_changes_nothing():
    run, flat = Run().go(1), StateDictOptions(flatten_optimizer_state_dict=True)
    groups = str(run.optimizer.param_groups)
    saved = get_optimizer_state_dict(run.model, run.optimizer, options=flat)
    with pytest.raises(ValueError, match=r"no state of a ZOSGD: .*flatten_optimizer_state_dict"):
        set_optimizer_state_dict(run.model, run.optimizer, saved, options=flat)
    assert (run.optimizer.steps, str(run.optimizer.param_groups)) == (1, groups)


@every
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, "NaN", "shape"])
def test_a_closure_that_fails_leaves_no_trace(case, error):
    run, undisturbed = Run(case).go(2), Run(case).go(2)
    before, state = run.weights, str(run.optimizer.state_dict())
    evaluations = 0

    def count():
        nonlocal evaluations
        evaluations += 1
        return undisturbed.loss(2)

    undisturbed.optimizer.step(count)
    for fatal in range(evaluations):
        calls = 0

        def closure(fatal=fatal):
            nonlocal calls
            calls += 1
            if calls <= fatal:
                return run.loss(2)
            if error == "NaN":
                return run.loss(2) * float("nan")
            if error == "shape":
                return torch.zeros(2)
            raise error

        expected = {"NaN": FloatingPointError, "shape": TypeError}.get(error, error)
        with pytest.raises(expected):
            run.optimizer.step(closure)
        if case != "drifting":
            assert same(run.weights, before)
        assert str(run.optimizer.state_dict()) == state
    if case != "drifting":
        run.go(1, first=2)
        assert same(run.weights, undisturbed.weights)


class Careful:
    """A model whose forward passes draw random numbers and write buffers, and all that a step may leave of them."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.optimizer = ZOSGD(self.model.named_parameters(), 0.01, seed=3, model=self.model, **settings)
        self.x = torch.randn(8, 3)

    def loss(self):
        return self.model(self.x).square().mean()

    @property
    def state(self):
        return [value.clone() for value in self.model.state_dict().values()] + [torch.get_rng_state()]

    def close(self, before):
        """Nothing is elsewhere, but for what a first lattice rounds."""
        return all(torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in zip(self.state, before, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_step_that_fails_after_its_evaluations_leaves_no_trace(steps, momentum):
    """Losses that are NaN, and steps that are too long: running statistics would hold the NaN of one batch for ever."""
    run = Careful(momentum=momentum)
    for _ in range(steps):
        run.optimizer.step(run.loss)
    before = run.state
    run.x[0] = float("nan")
    for attempt in (run.optimizer.step, run.optimizer.measure):
        with pytest.raises(FloatingPointError, match="infinite or NaN"):
            attempt(run.loss)
        assert run.close(before)
    run.x[0] = 0.0
    run.optimizer.param_groups[0]["lr"] = 1e38
    with pytest.raises(FloatingPointError, match="lower lr"):
        run.optimizer.step(run.loss)
    assert run.close(before)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize(("taken", "first"), [(0, 0), (0, 29), (0, 58), *((1, first) for first in range(0, 40, 8))])
def test_ctrl_c_anywhere_in_a_step_leaves_it_taken_or_not(taken, first, momentum, tmp_path):
    """At lines of the library's code, one in forty, of the first step one in ninety."""
    reference = Careful(momentum=momentum)
    states = [reference.state]
    for _ in range(3):
        reference.optimizer.step(reference.loss)
        states.append(reference.state)

    def trace(frame, event, _):
        nonlocal line
        # Not in torch's own decorators: an interrupt as its `no_grad` ends leaves gradients off, in its optimizers too.
        if frame.f_code.co_filename.startswith(traced):
            line += event == "line"
            if line == at and event == "line":
                signal.raise_signal(signal.SIGINT)
            return trace
        return None

    traced = (*hosfl.__path__, *hosfl_kernels.__path__, contextlib.__file__)
    at, line, call = first, first, nn.Module.__call__
    while line >= at:  # until a step has fewer lines
        run, at, line = Careful(momentum=momentum), at + (40 if taken else 90), 0
        base = copy.deepcopy(run.model)
        for _ in range(taken):
            run.optimizer.step(run.loss)
        before = sys.gettrace()
        try:
            sys.settrace(trace)
            run.optimizer.step(run.loss)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert nn.Module.__call__ is call
        assert torch.is_autocast_cache_enabled()
        assert torch.is_grad_enabled()
        assert run.close(states[0]) if run.optimizer.steps == 0 else same(run.state, states[run.optimizer.steps])
        while run.optimizer.steps < 3:
            run.optimizer.step(run.loss)
        assert same(run.state, states[3])
        run.optimizer.log.save(tmp_path / "log")
        rebuild(base, tmp_path / "log")
        assert same(list(base.parameters()), list(run.model.parameters()))


def by_layer(model, **settings_of_the_second):
    first, second = ({"params": [*layer.named_parameters()]} for layer in (model[0], model[2]))
    return [first, {**second, **settings_of_the_second}]


def test_no_memory_for_the_moments_of_a_later_group_leaves_no_trace(monkeypatch):
    run, undisturbed = Run("momentum", by_layer), Run("momentum", by_layer).go(1)
    state, left = str(run.optimizer.state_dict()), iter([0, 0])

    def allocate(parameter):
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return terms.zeros(parameter)

    with monkeypatch.context() as patch:
        patch.setattr(optim.update, "zeros", allocate)
        with pytest.raises(torch.OutOfMemoryError):
            run.go(1)
    assert same(run.weights, list(run.base.parameters()))
    assert str(run.optimizer.state_dict()) == state
    assert same(run.go(1).weights, undisturbed.weights)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_memory_for_the_copies_of_a_later_group_leaves_no_trace(momentum, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 9, 3)).to(memory_format=torch.channels_last)
    groups = [{"params": [(f"{n}.weight", layer.weight)]} for n, layer in enumerate(model)]
    settings = {"momentum": momentum, "weight_decay": 0.1, "model": model, "seed": 0}
    optimizer, empty = ZOSGD(groups, 0.01, **settings), torch.empty
    x = torch.ones(1, 2, 5, 5)
    optimizer.step(lambda: model(x).square().mean())
    optimizer.measure(lambda: model(x).square().mean())
    before, state = [p.detach().clone() for p in model.parameters()], str(optimizer.state_dict())

    def short(*size, **settings):
        if settings.get("dtype") == torch.uint8 and size[0] > model[0].weight.nbytes:
            raise torch.OutOfMemoryError("no memory")
        return empty(*size, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", short)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert same([p.detach() for p in model.parameters()], before)
    assert str(optimizer.state_dict()) == state


@pytest.mark.parametrize("case", [*EXACT, "drifting"])
def test_no_memory_for_a_move_of_a_later_group_leaves_no_trace(case, monkeypatch):
    """Weights in channels_last move through copies, for which there may be no memory."""
    run, undisturbed = Run(case, by_layer).go(1), Run(case, by_layer).go(2)
    before, state, move = run.weights, str(run.optimizer.state_dict()), optim.moved.replay_
    for fatal in range(20):
        calls = iter(range(1000))

        def moves(*args, fatal=fatal, calls=calls, **settings):
            if next(calls) == fatal:
                raise torch.OutOfMemoryError("no memory")
            move(*args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(optim.moved, "replay_", moves)
            try:
                run.go(1, first=1)
            except torch.OutOfMemoryError:
                assert str(run.optimizer.state_dict()) == state
                assert all(map(torch.allclose, run.weights, before))
                assert case == "drifting" or same(run.weights, before)
                continue
        break
    assert 4 <= fatal < 20  # every move of every group
    assert case == "drifting" or same(run.weights, undisturbed.weights)


def test_a_weight_decay_of_a_later_group_that_float32_does_not_hold_leaves_no_trace():
    run = Run("decay", lambda model: by_layer(model, lr=1e20, weight_decay=1e20))
    with pytest.raises(FloatingPointError, match=r"lr \* weight_decay is 1e\+40"):
        run.go(1)
    assert same(run.weights, list(run.base.parameters()))


@every
def test_a_log_rebuilds_the_same_bits(case, tmp_path):
    run = Run(case).go(5)
    if case == "drifting":
        with pytest.raises(LogError, match="drift"):
            run.optimizer.log.save(tmp_path / "log")
        return
    run.model[2].bias.requires_grad_(False)
    run.go(2, first=5)
    run.model[2].bias.requires_grad_(True)
    run.optimizer.param_groups[0]["lr"] *= 0.5
    run.go(3, first=7)
    path = tmp_path / "log"
    run.optimizer.log.save(path)
    assert path.stat().st_size < 3000
    rebuild(run.base, path)
    assert same(list(run.base.parameters()), run.weights)


@every
def test_frozen_parameters_stay_and_change_nobody_else_s_noise(case):
    def groups(model):
        return [{"params": model[0].parameters()}, {"params": model[2].parameters()}]

    frozen, free = Run(case, groups), Run(case, groups)
    for run in (frozen, free):
        nn.init.constant_(run.model[0].bias, 0.25)  # not the largest weight: both have the same lattice
    frozen.model[0].bias.requires_grad_(False)
    before = frozen.weights[1]
    for run in (frozen, free):
        scalars = iter([0.5, 0.25, 0.75, 0.5, 0.125, 0.25, 1.0])  # the same for both
        run.optimizer.step(lambda run=run, scalars=scalars: (run.model[0].weight, next(scalars))[1])
    assert torch.equal(frozen.weights[1], before)
    assert not torch.equal(free.weights[1], before)
    assert frozen.optimizer.lattice == free.optimizer.lattice
    for i in (0, 2, 3):
        assert torch.equal(frozen.weights[i], free.weights[i])
    frozen.model[0].bias.requires_grad_(True)
    frozen.go(1, first=1)
    assert not torch.equal(frozen.weights[1], before)


@every
def test_the_closure_runs_without_a_graph(case):
    run = Run(case)

    def closure():
        assert not torch.is_grad_enabled()
        loss = run.loss()
        assert not loss.requires_grad
        return loss

    run.optimizer.step(closure)
    assert all(p.grad is None for p in run.model.parameters())


@every
def test_measuring_first_and_stepping_later_is_one_step(case):
    whole, halves, dropped = Run(case), Run(case), Run(case)
    for step in range(3):
        expected = whole.optimizer.step(lambda step=step: whole.loss(step))
        if case != "drifting":
            dropped.optimizer.measure(lambda step=step: dropped.loss(9))  # the step's own closure counts
        dropped.optimizer.step(lambda step=step: dropped.loss(step))
        before = halves.weights
        loss = halves.optimizer.measure(lambda step=step: halves.loss(step))
        if step and case != "drifting":
            assert same(halves.weights, before)
        assert halves.optimizer.steps == step
        assert torch.equal(halves.optimizer.step(), loss)
        assert halves.optimizer.steps == step + 1
        with pytest.raises(TypeError, match="step needs a closure"):
            halves.optimizer.step()
        if case != "drifting":
            assert torch.equal(loss, expected)
            assert same(halves.weights, whole.weights)
            assert same(dropped.weights, whole.weights)
    halves.optimizer.measure(halves.loss)
    halves.optimizer.load_state_dict(halves.optimizer.state_dict())
    with pytest.raises(TypeError, match="step needs a closure"):
        halves.optimizer.step()
    halves.optimizer.measure(halves.loss)
    halves.model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="when the step was measured"):
        halves.optimizer.step()


# --- train mode --------------------------------------------------------------------------------------------------


class Forgetful(nn.Module):
    """A transformer's layer, a normalisation by batch statistics and dropout at three places."""

    def __init__(self, dropout, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, "gelu", batch_first=True)
        self.norm, self.drop, self.head = nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.layer(x).mean(1))))


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_with_dropout_the_derivative_is_that_of_backpropagation_with_the_same_masks(dropout, two_sided):
    model = Forgetful(dropout)
    x, y = torch.randn(32, 6, 16), torch.randint(0, 4, (32,))

    def loss():
        return nn.functional.cross_entropy(model(x).double(), y)

    pairs = []
    for seed in range(24):
        optimizer = ZOSGD(model.named_parameters(), 1e-12, 1e-3, seed=seed, two_sided=two_sided)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        measured = []
        optimizer.step(lambda measured=measured: measured.append(float(loss())) or measured[-1])
        after = torch.get_rng_state()
        ends = (measured[0] - measured[1]) / 2 if two_sided else measured[1] - measured[0]
        torch.set_rng_state(before)
        model.zero_grad()
        loss().backward()
        assert torch.equal(torch.get_rng_state(), after)  # as much was drawn as by one evaluation
        (u,) = direction_seeds(seed, 0, 1)
        truth = sum(
            float((p.grad.flatten() * torch.from_numpy(spec.rademacher(p.numel(), u, n))).double().sum())
            for n, p in enumerate(model.parameters())
        )
        pairs.append((ends / 1e-3, truth))
    found, truth = np.array(pairs).T
    # With other masks in every evaluation it is more than 10. What is left is rounding, and if one-sided curvature.
    assert np.abs(found - truth).max() < (2e-3 if two_sided else 0.2) * truth.std()


@every
def test_the_evaluations_of_a_step_draw_the_same_numbers(case):
    run = Run(case)
    seen = []

    def closure():
        seen.append((float(torch.rand(())), random.random(), float(np.random.rand())))
        return run.loss()

    for _ in range(3):
        run.optimizer.step(closure)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
        for evaluate in (run.optimizer.measure, run.optimizer.step):
            with pytest.raises(ZeroDivisionError):
                evaluate(lambda: (closure(), 1 / 0))
        assert (states[1], states[2]) == (random.getstate(), np.random.get_state()[2])
        assert torch.equal(states[0], torch.get_rng_state())
    assert len({*seen}) == 4  # those of an error are the next step's


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_running_statistics_take_in_a_step_s_first_evaluation(two_sided, given):
    class Model(Forgetful):
        def __init__(self):
            super().__init__(0.1)
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    model = Model()
    x, losses, settings = torch.randn(32, 6, 16), [], {"two_sided": two_sided, "directions": 2, "seed": 1}
    optimizer = ZOSGD(model.parameters(), 1e-3, model=model if given else None, **settings)
    statistics = []

    def closure():
        losses.append(float(model(x).square().mean()))
        statistics.append(model.norm.running_mean.clone())
        return losses[-1]

    count = 4 if two_sided else 3
    for step in range(1, 5):
        statistics.clear()
        optimizer.step(closure)
        assert len(statistics) == count
        assert int(model.norm.num_batches_tracked) == step
        assert torch.equal(model.norm.running_mean, statistics[0])
        passes = float(model.passes)
        # What is no normalisation's is seen to change in the second step, and is right from the third on.
        assert passes == (count, count + 1, count + 2, count + 3)[step - 1]
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: (closure(), 1 / 0))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    model.eval()
    optimizer.step(closure)
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"])


def test_watching_leaves_nn_module_as_it_was():
    original = nn.Module.__call__
    run = Run()
    with pytest.raises(ZeroDivisionError):
        run.optimizer.step(lambda: (run.loss(), 1 / 0))
    assert nn.Module.__call__ is original
    run.go(1)
    assert nn.Module.__call__ is original


def test_a_loop_with_dropout_learns_as_in_eval_mode():
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)

    def trained(train):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 10)).train(train)
        optimizer = ZONormalizedSGD(model.parameters(), lr=0.04, directions=4, two_sided=False, seed=0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=400)
        random = torch.Generator().manual_seed(0)

        def loss(rows):
            return nn.functional.cross_entropy(model(x[rows]), y[rows])

        for _ in range(400):
            batch = torch.randint(0, 1500, (128,), generator=random)
            optimizer.step(lambda batch=batch: loss(batch))
            schedule.step()
        model.eval()
        with torch.no_grad():
            return float(loss(slice(0, 1500)))

    still, dropped = trained(False), trained(True)
    start = float(np.log(10))
    assert start - dropped > 0.9 * (start - still)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"momentum": 0.5, "two_sided": False}], ids=str)
@pytest.mark.parametrize("had_gradients", [False, True])
def test_a_closure_that_turns_gradients_on_and_computes_those_of_the_weights_is_refused(settings, had_gradients):
    """As Lightning's automatic optimisation does."""

    def closure(drops=False):
        if drops:
            run.optimizer.zero_grad()
        with torch.enable_grad():
            loss = run.loss()
            loss.backward()
        return loss.detach()

    def with_gradients_of_inputs():
        with torch.enable_grad():
            x = torch.ones(4, 3, requires_grad=True)
            return torch.autograd.grad(run.model(x).sum(), x)[0].square().sum()

    run = Run(**settings)
    run.optimizer.model = run.model
    run.optimizer.step(with_gradients_of_inputs)  # no gradient of a weight
    if had_gradients:
        run.loss().backward()
    before = run.weights
    for drops in (False, True):
        with pytest.raises(RuntimeError, match=r"calls backward\(\).*automatic_optimization = False"):
            run.optimizer.step(lambda drops=drops: closure(drops))
    assert same(run.weights, before)
    run.go(1)


def test_a_closure_that_calls_backward_is_told_so():
    run = Run().go(1)
    before = run.weights
    with pytest.raises(RuntimeError, match=r"calls backward\(\).*leave that and zero_grad\(\) out"):
        run.optimizer.step(lambda: run.loss().backward())
    assert same(run.weights, before)


# --- the estimator -----------------------------------------------------------------------------------------------


def numpy_run(xs, rates, mus, loss, steps, directions, two_sided, seed, normalized, pool, groups):
    """The estimator on the lattice, a lattice per array. groups: the number of each array's, finest lattice first."""
    cycle = [derive(round_seed(seed, Purpose.POOL, 0), j, 0) for j in range(pool)] * steps * directions
    qs = [spec.quantum([float(np.abs(x).max())], [1.0], 16.0) for x in xs]
    xs = [spec.snap(x, q) for x, q in zip(xs, qs, strict=True)]
    mus = [round(mu / q) * q for mu, q in zip(mus, qs, strict=True)]
    mean = [0.0] * len(xs)
    for t in range(steps):
        seeds = cycle[t * directions : (t + 1) * directions] or direction_seeds(seed, t, directions)
        us = [[spec.rademacher(x.size, s, g) for g, x in enumerate(xs)] for s in seeds]
        at = [
            [loss([x + np.float32(s * mu) * z for x, mu, z in zip(xs, mus, u, strict=True)]) for s in (1, -1, 0)]
            for u in us
        ]
        d = [(plus - minus) / 2 if two_sided else plus - base for plus, minus, base in at]
        key = round_seed(seed, Purpose.COEFFICIENTS, t)
        for g in set(groups):
            mean[g] = 0.9 * mean[g] + (1 - 0.9) * (sum((v / mus[groups.index(g)]) ** 2 for v in d) / directions)
        for i, g in enumerate(groups):
            length = np.sqrt(mean[g] / (1 - 0.9 ** (t + 1))) + 1e-8 if normalized else 1.0
            for p, u in enumerate(us):
                first = mus[groups.index(g)]
                c = -rates[i] * (d[p] / first / length / directions * (first / mus[i]))
                xs[i] = xs[i] + np.float32(np.floor(c / qs[i] + derive(key, p, g) / 2.0**64) * qs[i]) * u[i]
    return xs


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("directions", "pool"), [(1, 0), (3, 0), (3, 4)])
@pytest.mark.parametrize("together", [True, False])
def test_it_is_the_estimator_in_numpy_bit_for_bit(two_sided, directions, pool, normalized, together):
    start = [np.random.default_rng(0).normal(size=n).astype(np.float32) for n in (1500, 7)]
    rates, mus = (1e-4, 3e-4), (1e-3, 4e-3)
    if together:  # in one group, on two lattices
        start[1] *= 100
        rates, mus = (1e-4, 1e-4), (1e-3, 1e-3)

    def loss(xs):
        return sum(float(np.square(x.astype(np.float64) - 0.1).sum()) for x in xs)

    params = [nn.Parameter(torch.from_numpy(x.copy())) for x in start]
    groups = [{"params": [p], "lr": lr, "mu": mu} for p, lr, mu in zip(params, rates, mus, strict=True)]
    if together:
        groups = [{"params": params, "lr": rates[0], "mu": mus[0]}]
    cls = ZONormalizedSGD if normalized else ZOSGD
    optimizer = cls(groups, 1.0, directions=directions, two_sided=two_sided, seed=8, pool=pool)
    before = loss(start)
    for _ in range(4):
        optimizer.step(lambda: loss([p.detach().numpy() for p in params]))
    expected = numpy_run(
        start, rates, mus, loss, 4, directions, two_sided, 8, normalized, pool, (0, 0 if together else 1)
    )
    for p, x in zip(params, expected, strict=True):
        assert np.array_equal(p.detach().numpy(), x)
    assert loss(expected) < before


def test_the_returned_loss():
    weight = nn.Parameter(torch.full((4,), 0.5))
    optimizer = ZOSGD([weight], 1e-12, 2.0**-4)
    answers = iter([1.0, 3.0])
    assert float(optimizer.step(lambda: next(answers))) == 2.0
    one_sided = ZOSGD([weight], 1e-12, 2.0**-4, two_sided=False, directions=2)
    answers = iter([1.0, 5.0, 7.0])
    assert float(one_sided.step(lambda: next(answers))) == 1.0
    assert one_sided.step(lambda: weight.sum()).dtype == torch.float64
    assert float(one_sided.step(lambda: weight.sum())) == 2.0


@pytest.mark.parametrize("case", EXACT)
def test_on_the_lattice_weights_are_written_in_place(case):
    run = Run(case).go(1)
    quantum = run.optimizer.lattice.quantum
    pointers = [p.data_ptr() for p in run.model.parameters()]
    seen = []
    run.optimizer.step(lambda: seen.append(run.weights) or run.loss(1))
    assert [p.data_ptr() for p in run.model.parameters()] == pointers
    mu = run.optimizer.lattice.nearest(1e-3)
    moved = [w for w in seen if not same(w, seen[0])]
    assert moved  # every evaluation saw its own weights
    for weights in seen:
        for w in weights:
            assert torch.equal(w / quantum, (w / quantum).round())
    if case == "plain":
        assert all(torch.equal((a - b).abs(), torch.full_like(a, 2 * mu)) for a, b in zip(*seen, strict=True))


def test_read_only_weights_are_never_written():
    run = Run("bfloat16").go(1)
    before, seen = run.weights, []
    versions = [p._version for p in run.model.parameters()]
    parameters = list(run.model.parameters())

    def closure():
        assert [p._version for p in parameters] == versions
        seen.append(run.model[0].weight.clone())
        return run.loss(1)

    run.optimizer.step(closure)
    assert len(seen) == 6
    assert not any(torch.equal(s, before[0]) for s in seen)


def test_no_tensor_of_the_parameters_size_is_made(monkeypatch):
    weight = nn.Parameter(torch.randn(50_000, generator=torch.Generator().manual_seed(0)))
    optimizer = ZONormalizedSGD([weight], 1e-4, directions=2)

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() != weight.data_ptr():
                    self.largest = max(self.largest, leaf.numel())
            return out

    with Watch() as watch:
        for _ in range(3):
            optimizer.step(lambda: weight[:100].square().sum())
    assert 0 < watch.largest <= 100
    monkeypatch.setattr(lattices, "PIECE", 100)
    with torch.no_grad():
        weight.copy_(torch.arange(50_000) % 7 * optimizer.lattice.quantum)  # much smaller, and on the lattice still
    optimizer.param_groups[0].update(mu=optimizer.lattice.quantum, lr=1e-9)
    with Watch() as watch:
        optimizer.step(lambda: weight[:100].square().sum())
    assert 0 < watch.largest <= 100


# --- groups, schedulers, freezing, ties --------------------------------------------------------------------------


@every
def test_a_group_of_rate_zero_stays_and_schedulers_reach_all(case):
    def same(a, b):
        close = 1e-5 if case == "drifting" else 0.0
        return all(torch.allclose(x, y, rtol=0.0, atol=close) for x, y in zip(a, b, strict=True))

    run = Run(case, params=lambda m: [{"params": m[0].parameters(), "lr": 0.0}, {"params": m[2].parameters()}])
    run.go(1)
    before = run.weights
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda epoch: 1.0 if epoch == 0 else 0.0)
    run.go(1)
    middle = run.weights
    assert same(middle[:2], before[:2])
    assert not same(middle[2:], before[2:])
    scheduler.step()
    assert same(run.go(1).weights, middle)


SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda step: 0.8**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {"total_iters": 4},
    "ExponentialLR": {"gamma": 0.7},
    "PolynomialLR": {"total_iters": 6},
    "CosineAnnealingLR": {"T_max": 6},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "OneCycleLR": {"max_lr": 0.02, "total_steps": 8},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.02, "step_size_up": 2},
    "ReduceLROnPlateau": {"patience": 0, "threshold": 0.5},
    "SequentialLR": {"milestones": [3]},
    "ChainedScheduler": {},
}
TURNS_MOMENTUM = ("OneCycleLR", "CyclicLR")


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("case", ["normalized", "gaussian", "momentum", "bfloat16"])
def test_torch_s_schedulers(name, case, tmp_path):
    """The bits of setting by hand what the scheduler sets, by log too, and with a resumed scheduler."""
    of_torch = torch.optim.lr_scheduler
    run, by_hand = Run(case), Run(case)
    for mine in (run, by_hand):
        mine.optimizer.model = mine.model

    def make(optimizer):
        if name in ("SequentialLR", "ChainedScheduler"):
            parts = [of_torch.ExponentialLR(optimizer, 0.9), of_torch.LinearLR(optimizer, 0.5, total_iters=4)]
            arguments = (optimizer, parts) if name == "SequentialLR" else (parts,)
            return getattr(of_torch, name)(*arguments, **SCHEDULERS[name])
        return getattr(of_torch, name)(optimizer, **SCHEDULERS[name])

    def settings(optimizer):
        return {key: optimizer.param_groups[0][key] for key in ("lr", "momentum")}

    schedule, used, losses = make(run.optimizer), [], []
    for step in range(7):
        used.append(settings(run.optimizer))
        losses.append(run.optimizer.step(lambda step=step: run.loss(step)))
        schedule.step(*losses[-1:] if name == "ReduceLROnPlateau" else ())
        if step == 3:
            saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), schedule.state_dict()))
    assert len({s["lr"] for s in used}) > 1
    assert (len({s["momentum"] for s in used}) > 1) == (name in TURNS_MOMENTUM)
    for step, values in enumerate(used):
        by_hand.optimizer.param_groups[0].update(values)
        by_hand.go(1, first=step)
    assert same(run.weights, by_hand.weights)
    run.optimizer.log.save(tmp_path / "log")
    rebuild(run.base, tmp_path / "log")
    assert same(list(run.base.parameters()), run.weights)
    other = Run(case, lr=0.5)
    other.optimizer.model = other.model
    again = make(other.optimizer)
    other.model.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    for step in range(4, 7):
        assert settings(other.optimizer) == used[step]
        other.go(1, first=step)
        again.step(*losses[step : step + 1] if name == "ReduceLROnPlateau" else ())
    assert same(run.weights, other.weights)


def test_all_of_torch_s_schedulers_are_among_these():
    kinds = {name for name in torch.optim.lr_scheduler.__all__ if name != "LRScheduler"}
    assert kinds == {*SCHEDULERS}


@every
def test_groups_have_settings_of_their_own(case, tmp_path):
    """A group moves as it does where all have its settings; the losses of both runs are given."""
    cls, lr, given, dtype, with_model = CASES[case]
    mine = {"lr": 0.5 * lr, "mu": 0.07, "momentum": 0.25, "weight_decay": 0.125}
    mine |= {"decay": 0.5} if cls is ZONormalizedSGD else {}
    assert mine.keys() == {*cls.settable}

    def trained(of_first, of_second):
        run = Run(
            case,
            lambda model: [
                {"params": list(model[i].named_parameters(prefix=str(i))), **own}
                for i, own in ((0, of_first), (2, of_second))
            ],
        )
        run.optimizer.model = run.model  # off the lattice all of them
        scalars = iter(np.random.default_rng(0).normal(size=100))
        for _ in range(3):
            run.optimizer.step(lambda: (run.model(torch.ones(1, 3, dtype=dtype)), next(scalars))[1])
        return run

    run, alone = trained({}, mine), trained(mine, mine)
    assert same(run.weights[2:], alone.weights[2:])
    assert not torch.equal(run.weights[0], alone.weights[0])
    for name in mine:
        without = trained({}, {key: value for key, value in mine.items() if key != name})
        # Of normalised steps the size of a measurement's move is no matter.
        assert torch.equal(run.weights[2], without.weights[2]) == (name == "mu" and cls is ZONormalizedSGD)
    run.optimizer.log.save(tmp_path / "log")
    rebuild(run.base, tmp_path / "log")
    assert same(list(run.base.parameters()), run.weights)
    for name, value in {"lr": -1, "mu": 0, "momentum": 1, "weight_decay": -1, "decay": 1}.items():
        if name in mine:
            before, run.optimizer.param_groups[1][name] = run.optimizer.param_groups[1][name], value
            with pytest.raises(ValueError, match=f"{name} must be"):
                run.go(1)
            run.optimizer.param_groups[1][name] = before


@every
def test_the_representation_tells_every_setting(case):
    cls, lr, given, _, _ = CASES[case]
    text = repr(Run(case, params=lambda m: [{"params": m[0].parameters(), "lr": 0.125}, *_rest(m)]).optimizer)
    assert text.startswith(f"{cls.__name__} (\n")
    settings = {"lr": lr, "mu": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "directions": 1, "pool": 0, "seed": 3}
    settings |= {"two_sided": True, "dist": "rademacher", **({"decay": 0.9} if cls is ZONormalizedSGD else {}), **given}
    for name, value in settings.items():
        assert f"    {name}: {value}\n" in text
    assert "    lr: 0.125\n" in text
    parameters = inspect.signature(cls).parameters.keys() | inspect.signature(ZOSGD).parameters.keys()
    assert settings.keys() == parameters - {"params", "model", "process_group", "settings"}


def _rest(model):
    return [{"params": model[2].parameters()}]


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_a_seed_may_be_an_integer_of_numpy_s(kind, tmp_path):
    run, other = Run(seed=kind(7)).go(2), Run(seed=7).go(2)
    assert same(run.weights, other.weights)
    assert repr(run.optimizer) == repr(other.optimizer)
    run.optimizer.log.save(tmp_path / "log")
    rebuild(run.base, tmp_path / "log")
    assert same(list(run.base.parameters()), run.weights)
    torch.save(run.optimizer.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True)["param_groups"][0]["run"]["seed"] == 7


def test_a_seed_that_is_not_given_is_drawn_from_torch_s_generator(tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 1)
        return [ZOSGD(model.named_parameters(), 0.01) for _ in range(2)], model

    (first, second), _ = made(5)
    assert first.seed != second.seed
    (again, _), model = made(5)
    assert again.seed == first.seed
    assert made(6)[0][0].seed != first.seed
    base = copy.deepcopy(model)
    assert f"seed: {again.seed}" in repr(again)
    assert told(again.state_dict())["seed"] == again.seed
    before = torch.get_rng_state()
    ZOSGD(model.parameters(), 0.01, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    again.step(lambda: model.weight.square().sum())
    again.log.save(tmp_path / "log")
    rebuild(base, tmp_path / "log")
    assert torch.equal(base.weight, model.weight)


@pytest.mark.parametrize("case", [name for name in CASES if name != "drifting"])
def test_weights_in_channels_last_move_like_others(case, tmp_path):
    cls, lr, settings, dtype, _ = CASES[case]

    def trained(format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 2), nn.Conv2d(2, 2, 1)).to(dtype)
        base = copy.deepcopy(model)
        model.to(memory_format=format)
        optimizer = cls(model.named_parameters(), lr, seed=3, **{"model": model, **settings})
        scalars = iter(np.random.default_rng(0).normal(size=100))
        x = torch.randn(2, 3, 6, 6).to(dtype)
        for _ in range(3):
            optimizer.step(lambda: (model(x), next(scalars))[1])
        return base, model, optimizer

    _, plain, _ = trained(torch.contiguous_format)
    base, model, optimizer = trained(torch.channels_last)
    assert not model[0].weight.is_contiguous()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert same(list(plain.parameters()), list(model.parameters()))
    optimizer.log.save(tmp_path / "log")
    for copied in (copy.deepcopy(base), base.to(memory_format=torch.channels_last)):
        rebuild(copied, tmp_path / "log")
        assert same(list(copied.parameters()), list(model.parameters()))


def test_warnings_show_the_line_that_asked_for_the_step():
    run = Run("drifting")
    scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer)  # wraps `step`
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(12):
            run.optimizer.step(lambda: 1.0)
            scheduler.step()
    lines, start = inspect.getsourcelines(test_warnings_show_the_line_that_asked_for_the_step)
    at = next(start + n for n, line in enumerate(lines) if "optimizer.step" in line)
    told = [
        (w.filename, w.lineno) for w in found if "cannot be saved" in str(w.message) or "exactly 0" in str(w.message)
    ]
    assert told == [(__file__, at)] * 2


def test_a_log_that_cannot_be_saved_is_told_at_the_first_step():
    run = Run("drifting")
    with pytest.warns(UserWarning, match="log of this run cannot be saved: .* give the optimizer `model`"):
        run.go(1)
    assert not heard(run.optimizer, run.loss, 3)
    run = Run("momentum").go(1)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert "a resumed run with momentum" in heard(run.optimizer, run.loss, 3)[0]
    assert not heard(Run().optimizer, run.loss, 2)


def test_groups_added_later_are_numbered_on_and_logged(tmp_path):
    run = Run("plain", params=lambda m: m[0].named_parameters(prefix="0")).go(2)
    run.optimizer.add_param_group({"params": list(run.model[2].named_parameters(prefix="2")), "lr": 0.01, "mu": 0.004})
    run.go(3, first=2)
    assert not torch.equal(run.model[2].weight, run.base[2].weight)
    run.optimizer.log.save(tmp_path / "log")
    rebuild(run.base, tmp_path / "log")
    assert same(list(run.base.parameters()), run.weights)


@every
def test_tied_weights_move_once(case):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    cls, lr, settings, dtype, with_model = CASES[case]
    model = Tied().to(dtype)
    optimizer = cls(model.parameters(), lr, model=model if with_model else None, **settings)
    x = torch.randn(8, 4).to(dtype)
    seen = []

    def closure():
        seen.append((model.a.weight.clone(), model.b.weight.clone()))
        return model(x).square().mean()

    optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in seen)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert model.a.weight is model.b.weight
    assert not torch.equal(model.a.weight, seen[0][0])


def test_two_parameters_on_one_memory_are_refused():
    weight = torch.zeros(4)
    optimizer = ZOSGD([{"params": [nn.Parameter(weight)]}, {"params": [nn.Parameter(weight)]}], 0.1)
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step(lambda: 0.0)
    assert not weight.any()


@every
def test_empty_tensors_and_empty_groups(case):
    cls, lr, settings, dtype, with_model = CASES[case]
    model = nn.ParameterList([torch.zeros(0, 3), torch.ones(3), torch.ones(2)]).to(dtype)
    empty, full, frozen = model
    frozen.requires_grad_(False)
    settings = {**settings, "model": model if with_model else None}
    optimizer = cls([{"params": [empty, full]}, {"params": [frozen]}], lr, **settings)
    for _ in range(3):
        optimizer.step(lambda: model[1].float().square().sum())
    assert not torch.equal(full, torch.ones(3, dtype=dtype))
    assert torch.equal(frozen, torch.ones(2, dtype=dtype))
    alone = cls([empty], lr, **settings)
    assert float(alone.step(lambda: 2.0)) == 2.0


def test_weights_that_outgrow_the_lattice_get_a_coarser_one(tmp_path):
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    base = copy.deepcopy(model)
    optimizer = ZOSGD(model.parameters(), 0.1, mu=0.1)
    quanta = []
    for scale in (1, 100, 10_000):
        target = scale * torch.tensor([[3.0, -2.0, 1.0]])
        for _ in range(50):
            optimizer.step(lambda target=target: (model.weight - target).double().square().sum())
            assert float(model.weight.detach().abs().max()) <= optimizer.lattice.limit
        quanta.append(optimizer.lattice.quantum)
        assert torch.allclose(model.weight, target, atol=0.1 * scale)
    assert quanta[0] < quanta[1] < quanta[2]
    optimizer.log.save(tmp_path / "log")
    rebuild(base, tmp_path / "log")
    assert torch.equal(base.weight, model.weight)


def test_weights_written_between_steps_are_put_on_the_lattice_again(tmp_path):
    run = Run().go(2)
    with torch.no_grad():
        run.model[0].weight.add_(1e-3 * torch.rand(4, 3))
    run.go(1, first=2)
    quanta = run.model[0].weight.detach() / run.optimizer.lattice.quantum
    assert torch.equal(quanta, quanta.round())
    run.optimizer.log.save(tmp_path / "log")
    with pytest.raises(LogError, match="somebody else"):
        rebuild(run.base, tmp_path / "log")


@pytest.mark.parametrize("how", ["fails", "is only measured"])
def test_weights_that_a_step_put_on_a_lattice_before_it_was_not_taken_are_rebuilt(how, tmp_path):
    run = Run()
    run.model[2].requires_grad_(False)
    run.go(2)
    run.model[2].requires_grad_(True)
    before = run.weights
    if how == "fails":
        with pytest.raises(FloatingPointError, match="NaN"):
            run.optimizer.step(lambda: float("nan"))
    else:
        run.optimizer.measure(run.loss)
    assert not same(run.weights, before)
    for steps in (0, 2):  # and the run goes on as it would have without saving
        run.go(steps, first=2)
        run.optimizer.log.save(tmp_path / "log")
        rebuilt = copy.deepcopy(run.base)
        rebuild(rebuilt, tmp_path / "log")
        assert same(list(rebuilt.parameters()), run.weights)


def test_ctrl_c_in_the_middle_of_a_move(monkeypatch):
    replay = optim.moved.replay_
    for fatal in range(3):
        run, undisturbed = Run().go(2), Run().go(3)
        before, moves = run.weights, 0

        def interrupted(*args, fatal=fatal, **kwargs):
            nonlocal moves
            replay(*args, **kwargs)
            if moves == fatal:
                signal.raise_signal(signal.SIGINT)
            moves += 1

        with monkeypatch.context() as patch:
            patch.setattr(optim.moved, "replay_", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.go(1, first=2)
        # The last move is the step itself: it is taken or not, never half.
        assert run.optimizer.steps == (3 if fatal == 2 else 2)
        assert same(run.weights, undisturbed.weights if fatal == 2 else before)
        run.go(3 - run.optimizer.steps, first=2)
        assert same(run.weights, undisturbed.weights)


# --- lattices ----------------------------------------------------------------------------------------------------


def quanta(optimizer):
    return [q for q in told(optimizer.state_dict())["quanta"] if q is not None]


def on_lattices(optimizer, parameters):
    return all(torch.equal(p, (p / q).round() * q) for p, q in zip(parameters, quanta(optimizer), strict=True))


SIZES = (0.0, 1e-30, 1e-4, 0.3, 2.0, 0.02, 500.0, 30.0)


def of_sizes(sizes=SIZES):
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(size * (1 - 2 * torch.rand(5, 4))) for size in sizes])


def test_a_large_parameter_coarsens_nobody_else_s_lattice(tmp_path):
    model, base = of_sizes(), of_sizes()
    optimizer = ZOSGD(model.parameters(), 1e-9)
    optimizer.step(lambda: sum(p.double().sum() for p in model))
    assert len(set(quanta(optimizer))) <= 5
    assert optimizer.lattice.quantum == min(quanta(optimizer))
    for quantum, p in zip(quanta(optimizer), base, strict=True):
        assert quantum <= 2.0**-15 * max(float(p.detach().abs().max()), 1e-3 if p.any() else 2.0)
    alone = ZOSGD(of_sizes((0.3,)).parameters(), 1e-9)
    alone.step(lambda: 0.0)
    assert quanta(optimizer)[3] <= 16 * quanta(alone)[0]
    optimizer.step(lambda: sum(p.double().sum() for p in model))
    assert on_lattices(optimizer, [p.detach() for p in model])
    optimizer.log.save(tmp_path / "log")
    rebuild(base, tmp_path / "log")
    assert same(list(base), list(model))


def test_one_that_outgrows_its_lattice_leaves_it_alone():
    model = of_sizes((0.3, 0.4, 0.2))
    optimizer = ZOSGD(model.parameters(), 1e-6)

    def loss():
        return sum(p.square().sum() for p in model)

    optimizer.step(loss)
    (before,) = set(quanta(optimizer))
    with torch.no_grad():
        model[1].mul_(100)
    for _ in range(3):
        optimizer.step(loss)
        assert on_lattices(optimizer, [p.detach() for p in model])
    assert quanta(optimizer)[0] == quanta(optimizer)[2] == before < quanta(optimizer)[1] <= 2.0**-19 * 40


def test_zeros_lie_where_most_of_their_group_does():
    sizes = (0.0, 1.0, 1e-3, 0.0)
    model = of_sizes(sizes)
    optimizer = ZOSGD([{"params": [*model[:3]]}, {"params": [model[3]]}], 1e-9)
    optimizer.step(lambda: 0.0)
    of_zeros, of_ones, small, alone = quanta(optimizer)
    assert of_zeros in (of_ones, small)
    assert alone == 2.0**-24
    wide = nn.ParameterList([nn.Parameter(torch.ones(100)), nn.Parameter(torch.full((3,), 1e-3)), torch.zeros(3)])
    optimizer = ZOSGD(wide.parameters(), 1e-9)
    optimizer.step(lambda: 0.0)
    assert quanta(optimizer)[2] == quanta(optimizer)[0] != quanta(optimizer)[1]
    for size, mu in ((0.0, 1e-12), (1e-42, 1e-42)):
        with pytest.raises(ValueError, match="cannot move by mu=1e-"):
            ZOSGD([nn.Parameter(torch.full((3,), size))], 1e-9, mu=mu).step(lambda: 0.0)


@pytest.mark.parametrize("large", [-1e4, 1e9, -3e38])
def test_a_parameter_that_float32_cannot_move_by_mu_is_named_and_nothing_changes(large):
    model = of_sizes((0.3, 0.1))
    mask = nn.Parameter(torch.full((4, 4), large))
    before = [p.detach().clone() for p in model]

    def loss():
        return sum(p.square().sum() for p in model) + 0 * mask[0, 0]

    named = [("emit", model[0]), ("mask", mask)]
    for params, name in ((named, "parameter 'mask'"), ([*model, mask], r"parameter 2 of group 0, float32 \[4, 4\]")):
        with pytest.raises(ValueError, match=f"{name}, with weights of up to .* cannot move by mu=0.001"):
            ZOSGD(params, 0.1).step(loss)
    assert same(list(model), before)
    # What the error advises.
    ZOSGD([{"params": [mask], "lr": 0.0}, {"params": [*model]}], 1e-3).step(loss)
    mask.requires_grad_(False)
    ZOSGD([*model, mask], 1e-3).step(loss)
    assert torch.equal(mask, torch.full((4, 4), large))
    if abs(large) < 1e5:
        mask.requires_grad_(True)
        ZOSGD([{"params": [mask], "mu": 0.01}, {"params": [*model]}], 1e-3).step(loss)
        assert torch.allclose(mask, torch.full((4, 4), large))
    optimizer = ZOSGD([model[0]], 1e-3)
    optimizer.step(loss)
    before = model[0].detach().clone()
    with pytest.raises(FloatingPointError, match=r"too long: lower lr\. After it parameter 0 of group 0"):
        optimizer.step(iter([1e10, 0.0]).__next__)
    assert torch.equal(before, model[0])
    optimizer.param_groups[0]["mu"] = 1e-9
    with pytest.raises(ValueError, match="cannot move by mu=1e-09"):
        optimizer.step(loss)


@every
def test_at_a_rate_of_zero_no_bit_changes(case, tmp_path):
    run = Run(case, lr=0.0)
    calls = []

    def closure():
        calls.append(run.weights)
        return run.loss()

    loss = run.optimizer.step(closure)
    assert len(calls) == 1
    assert same(calls[0], list(run.base.parameters()))
    assert torch.equal(loss, run.loss().detach().double())
    assert torch.equal(run.optimizer.measure(closure), loss)
    run.optimizer.step()
    assert same(run.weights, list(run.base.parameters()))
    assert run.optimizer.step() is None  # not measured: this is no step
    assert run.optimizer.steps == 2
    # As a schedule's first steps are.
    run.optimizer.param_groups[0]["lr"] = CASES[case][1]
    run.go(2, first=2)
    assert not same(run.weights, list(run.base.parameters()))
    run.optimizer.param_groups[0]["lr"] = 0.0
    before = run.weights
    run.go(1, first=4)
    assert same(run.weights, before)
    if case != "drifting":
        run.optimizer.log.save(tmp_path / "log")
        rebuild(run.base, tmp_path / "log")
        assert same(list(run.base.parameters()), run.weights)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.mul_(0.999),
        lambda w: w.data.copy_(torch.rand(4, 3)),
        lambda w: w.data.mul_(2.0**12),
        lambda w: setattr(w, "data", torch.rand(4, 3)),
        lambda w: w.detach().numpy().__imul__(1.1),
    ],
)
def test_writes_that_torch_does_not_count_are_noticed(write):
    run = Run().go(2)
    write(run.model[0].weight)
    seen = []
    run.optimizer.step(lambda: seen.append(run.weights) or run.loss())
    assert on_lattices(run.optimizer, seen[0])
    before = run.weights
    for _ in range(5):
        with pytest.raises(FloatingPointError):
            run.optimizer.step(iter([1.0, float("nan")]).__next__)
    assert same(run.weights, before)


def test_a_model_that_goes_elsewhere_leaves_no_memory_to_the_optimizer():
    run = Run().go(1)
    memory = weakref.ref(run.model[0].weight.untyped_storage())
    run.model.half()
    assert memory() is None


# --- losses that say nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name, settings in CASES.items() if settings[-1]])
def test_a_loss_that_read_none_of_the_weights_is_an_error(case):
    run = Run(case).go(1)
    parameters, other, before = list(run.model.parameters()), copy.deepcopy(run.model), run.weights
    x = torch.ones(1, 3, dtype=parameters[0].dtype)
    with torch.no_grad():
        kept = run.model(x).sum()
    state = str(run.optimizer.state_dict())
    for closure in (lambda: sum(p.square().sum() for p in parameters), lambda: other(x).sum(), lambda: kept, lambda: 1):
        with pytest.raises(RuntimeError, match="did not depend on the weights that move"):
            run.optimizer.step(closure)
    assert same(run.weights, before)
    assert str(run.optimizer.state_dict()) == state
    run.optimizer.step(lambda: sum(p.float().square().sum() for p in run.model.parameters()))
    assert not same(run.weights, before)


class Unused(nn.Module):
    """Of its three layers the loss reads one properly, one by a list, and one not at all."""

    def __init__(self):
        super().__init__()
        self.read, self.listed, self.unused = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.kept = [self.listed.weight]

    def forward(self, x):
        return nn.functional.linear(self.read(x), self.kept[0]).square().mean()


def test_weights_that_are_not_read_are_named_once():
    model, x = Unused(), torch.randn(4, 3)
    read_only = {"model": model, "dist": "gaussian"}
    optimizer = ZOSGD(model.parameters(), 1e-3, seed=0, **read_only)
    with pytest.warns(UserWarning, match="did not read parameter 'listed.weight' from `model`, nor 1 others"):
        optimizer.step(lambda: model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(x))
        model.listed.requires_grad_(False), model.unused.requires_grad_(False)
        ZOSGD(model.parameters(), 1e-3, seed=0, **read_only).step(lambda: model(x))


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_that_was_replaced_is_named(case):
    run = Run(case)
    run.optimizer.model = run.model
    run.model[0].weight = nn.Parameter(run.model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"no longer owns parameter '0\.weight'"):
        run.go(1)
    assert same(run.weights, list(run.base.parameters()))


def heard(optimizer, closure, steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step(closure)
    return [str(warning.message) for warning in caught]


@every
def test_losses_that_never_differ_are_warned_of_once(case):
    run = Run(case)

    def flat():
        return sum(p.sum() for p in run.model.parameters()) * 0 + 1.0

    assert len(heard(run.optimizer, flat, 9)) == (case == "drifting")  # whose log cannot be saved
    (message,) = heard(run.optimizer, flat, 30)
    dtype = run.model[0].weight.dtype
    assert ("in half precision, which" in message) == (dtype != torch.float32)
    assert ("put in the place" in message) == (dtype == torch.float32)
    assert "float32" in message
    assert "raise mu" in message


def test_a_loss_in_half_precision_is_warned_of_and_accuracy_is_not():
    torch.manual_seed(0)
    model, x, y = nn.Linear(16, 10), torch.randn(64, 16), torch.randint(0, 10, (64,))

    def loss(dtype):
        return nn.functional.cross_entropy(model(x).to(dtype), y)

    for dtype, zeros, expected in [
        (torch.bfloat16, 4, 1),
        (torch.float16, 4, 1),
        (torch.bfloat16, 2, 0),
        (torch.float32, 9, 0),
        (torch.float32, 10, 1),
    ]:
        losses = iter([torch.tensor(1.0 + (e // 2 % 10 >= zeros) * (e % 2), dtype=dtype) for e in range(60)])
        assert len(heard(ZOSGD(model.parameters(), 1e-9), losses.__next__, 30)) == expected
    for dtype, expected in ((torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 0)):
        optimizer = ZOSGD(model.parameters(), 1e-6, 1e-4)
        assert len(heard(optimizer, lambda dtype=dtype: loss(dtype), 60)) == expected
    assert not heard(ZOSGD(model.parameters(), 1e-3, 0.1), lambda: (model(x).argmax(1) == y).double().mean(), 60)


# --- torch's defaults, copies ------------------------------------------------------------------------------------


@pytest.fixture
def defaults():
    """Sets torch's default dtype and device, and resets them."""

    with ExitStack() as devices:  # torch.set_default_device(None) leaves torch 2.8 without any

        def set_to(value):
            if isinstance(value, torch.dtype):
                torch.set_default_dtype(value)
            else:
                devices.enter_context(torch.device(value))

        yield set_to
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
@every
def test_torch_s_defaults_change_no_bit(case, default, defaults, tmp_path):
    run, other = Run(case), Run(case)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))

    def go(run):
        def loss():
            return (run.model(x.to(run.model[0].weight.dtype)).float() - x.sum(1, keepdim=True)).square().mean()

        run.optimizer.step(loss)
        run.optimizer.measure(loss)
        run.optimizer.step()
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer).state_dict())
        if case not in WITH_MOMENTUM:
            run.base = copy.deepcopy(run.model)
        run.optimizer.step(lambda: (loss(), 1.5)[1] if run.optimizer.model else 1.5)
        if case != "drifting" and case not in WITH_MOMENTUM:
            run.optimizer.log.save(tmp_path / "log")
            rebuild(run.base, tmp_path / "log")
            assert same(list(run.base.parameters()), run.weights)

    go(run)
    defaults(default)
    go(other)
    assert same(run.weights, other.weights)


def saved_and_loaded(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), saved_and_loaded])
@every
def test_a_copy_goes_on_to_the_same_bits(case, copied, tmp_path):
    run, other = Run(case).go(3), Run(case)
    other.base, other.model, other.optimizer = copied((run.base, run.model, run.optimizer))
    for mine in (run, other):
        mine.go(2, first=3)
    assert same(run.weights, other.weights)
    assert str(run.optimizer.state_dict()) == str(other.optimizer.state_dict())
    if case != "drifting":
        other.optimizer.log.save(tmp_path / "log")
        rebuild(other.base, tmp_path / "log")
        assert same(list(other.base.parameters()), other.weights)
    run.optimizer.measure(run.loss)
    other.model, other.optimizer = copied((run.model, run.optimizer))
    assert torch.equal(run.optimizer.step(), other.optimizer.step())
    assert same(run.weights, other.weights)
    before = other.weights
    run.go(1, first=6)
    assert same(other.weights, before)


def test_much_smaller_weights_that_somebody_writes_are_not_rounded_away():
    run = Run().go(2)
    written = [w * 1e-6 for w in run.weights]
    for p, w in zip(run.model.parameters(), written, strict=True):
        p.detach().copy_(w)
    run.optimizer.param_groups[0].update(mu=1e-9, lr=1e-12)
    run.go(1)
    for weight, was in zip(run.weights, written, strict=True):
        assert (weight - was).abs().max() <= 2.0**-15 * was.abs().max()


def test_small_weights_that_lie_on_their_lattice_stay_there():
    """As those of a run that is resumed: it goes on to the same bits."""
    run = Run().go(2)
    quanta = dict(run.optimizer._lattices.quanta)
    for n, p in enumerate(run.model.parameters()):
        p.detach().copy_(quanta[n] * torch.arange(p.numel()).reshape(p.shape))
    run.go(1)
    assert run.optimizer._lattices.quanta == quanta


def test_its_source_is_found_by_its_public_name():
    """By `help` and editors; and by pickles of before the package had modules."""
    assert "def step" in inspect.getsource(ZOSGD)
    assert pickle.loads(b"chosfl.optim\nZOSGD\n.") is ZOSGD


def test_a_copy_of_the_optimizer_alone_holds_copies_of_what_it_moves():
    run = Run("gaussian").go(1)
    before = run.weights
    alone = copy.deepcopy(run.optimizer)
    alone.step(lambda: alone.model(torch.ones(1, 3)).sum())
    assert same(run.weights, before)
    assert not same([p for group in alone.param_groups for p in group["params"]], before)


def replace(run):
    run.model[0].weight = run.optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 3))


@pytest.mark.parametrize("case", ["plain", "gaussian"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: setattr(run.optimizer, "seed", 8), "seed, steps, directions, pool or dist were changed"),
        (lambda run: setattr(run.optimizer, "directions", 4), "seed, steps, directions, pool or dist were changed"),
        (lambda run: setattr(run.optimizer, "steps", 0), "seed, steps, directions, pool or dist were changed"),
        (lambda run: copy.copy(run.optimizer).step(run.loss), "seed, steps, directions, pool or dist were changed"),
        (lambda run: run.optimizer.param_groups.pop(), "parameters were taken from the optimizer"),
        (
            lambda run: run.optimizer.param_groups.reverse(),
            r"'0\.weight', torch\.float32 \[4, 3\], became torch\.float32 \[1, 4\]",
        ),
        (replace, r"parameter '0\.weight', torch\.float32 \[4, 3\], became another"),
        (lambda run: run.model.bfloat16(), r"'0\.weight', torch\.float32 \[4, 3\], became torch\.bfloat16 \[4, 3\]"),
        (
            lambda run: run.model[2].requires_grad_(False).bfloat16(),
            r"'2\.weight', \S+ \[1, 4\], became torch\.bfloat16",
        ),
    ],
)
def test_a_run_that_no_log_tells_is_refused_when_it_is_saved(case, change, message, tmp_path):
    """Not when it is rebuilt, once the run is over. And its log no longer grows."""

    def groups(model):
        names = dict(model.named_parameters())
        return [{"params": [(n, p) for n, p in names.items() if n[0] == layer]} for layer in "02"]

    run = Run(case, params=groups).go(2)
    change(run)
    if not message.startswith("'2"):  # frozen, and so not looked at in a step
        with pytest.warns(UserWarning, match=f"the log of this run cannot be saved: .*{message}"):
            run.optimizer.step(lambda: sum(p.float().sum() for p in run.model.parameters()))
    with pytest.raises(LogError, match=message):
        run.optimizer.log.save(tmp_path / "log")
    run.optimizer.step(lambda: sum(p.float().sum() for p in run.model.parameters()))
    assert not (tmp_path / "log").exists()
    assert not run.optimizer.log.chapters
    assert not run.optimizer.log.parameters


def test_two_parameters_of_one_name_are_told_at_the_first_step(tmp_path):
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    optimizer = ZOSGD([{"params": [*model.named_parameters()]} for model in models], 0.01)
    with pytest.warns(UserWarning, match="cannot be saved: two parameters are named 'weight'"):
        optimizer.step(lambda: sum(p.sum() for model in models for p in model.parameters()))
    with pytest.raises(LogError, match="two parameters are named 'weight'"):
        optimizer.log.save(tmp_path / "log")
    both = nn.ModuleList(models)
    optimizer = ZOSGD(both.named_parameters(), 0.01)
    base = copy.deepcopy(both)
    optimizer.step(lambda: sum(p.sum() for p in both.parameters()))
    optimizer.log.save(tmp_path / "log")
    rebuild(base, tmp_path / "log")
    assert same(list(base.parameters()), list(both.parameters()))


def test_a_process_group_is_not_copied():
    run = Run()
    run.optimizer.process_group = object()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copied(run.optimizer)


def test_in_inference_mode_steps_are_the_same():
    for case in CASES:
        run = Run(case)
        with torch.inference_mode():
            run.go(2)
        run.go(1, first=2)
        assert case == "drifting" or same(run.weights, Run(case).go(3).weights)


# --- with the rest of torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_step", [False, True])
@every
def test_a_compiled_model_or_step_is_not_compiled_again(case, whole_step):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run, eager = Run(case), Run(case)
    compiled = torch.compile(run.model, backend=backend)
    cls, lr, settings, dtype, with_model = CASES[case]
    optimizer = cls(compiled.parameters(), lr, seed=3, model=compiled if with_model else None, **settings)

    def step(x):
        return optimizer.step(lambda: (compiled(x) - 1).square().mean())

    if whole_step:
        step = torch.compile(step, backend=backend)
    for i in range(6):
        x = torch.randn(16, 3).to(dtype)
        step(x)
        eager.optimizer.step(lambda x=x: (eager.model(x) - 1).square().mean())
        if i == 1:
            first = len(graphs)
    assert 1 <= first == len(graphs)
    assert case == "drifting" or same(run.weights, eager.weights)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}], ids=["in place", "read only"])
def test_weights_that_are_computed_of_others_are_computed_anew_at_every_evaluation(settings):
    """Within `parametrize.cached()`, too, which keeps them otherwise."""

    def normed(model):
        parametrizations.weight_norm(model[0])
        return model.named_parameters()

    runs = []
    for cached in (parametrize.cached, contextlib.nullcontext):
        run = Run(params=normed, **settings)
        run.optimizer.model = run.model
        with cached():
            run.go(2)
            after = run.loss()
        runs.append(run)
        assert torch.equal(after, run.loss())
    assert same(*(run.weights for run in runs))


def test_autocast_sees_the_weights_as_they_are():
    run, outer = Run(), Run()
    x = torch.randn(16, 3)
    seen = []

    def closure(run):
        out = run.model(x)
        assert out.dtype == torch.bfloat16
        seen.append(out)
        return out.float().square().mean()

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return closure(run)

    for settings in (run, outer):
        settings.optimizer.param_groups[0]["mu"] = 0.1
    run.optimizer.step(inside)
    with torch.autocast("cpu", torch.bfloat16):
        outer.model(x)  # leaves casts in autocast's cache
        outer.optimizer.step(lambda: closure(outer))
        after = outer.model(x)
    assert not torch.equal(seen[0], seen[1])
    assert same(run.weights, outer.weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, outer.model(x))


def half_batches(model, rank):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))[8 * rank : 8 * rank + 8]
    return (model(x.to(model[0].weight.dtype)).double() - x.sum(1, keepdim=True)).square().mean()


def draw_seeds(rank, folder):
    run = Run()
    torch.manual_seed(rank)
    run.optimizer = ZOSGD(run.model.parameters(), 0.02)
    own = run.optimizer.seed
    losses = [run.optimizer.step(run.loss) for _ in range(2)]
    assert run.optimizer.log.terms.seed == run.optimizer.seed
    with pytest.raises(ValueError, match=f"different seeds, this one {rank}: give all of them the same"):
        Run(seed=rank).go(1)
    Run(seed=5).go(1)
    with pytest.raises(ValueError, match="no parameter requires grad"):
        ZOSGD([{"params": []}], 0.1).step(lambda: 0.0)
    first_is_empty = ZOSGD([{"params": []}, {"params": run.model.parameters()}], 0.0)
    assert torch.equal(first_is_empty.step(run.loss), run.loss().double())
    torch.save([own, run.optimizer.seed, losses, run.weights], f"{folder}/{rank}")


def test_processes_agree_on_a_seed(tmp_path):
    group.start(draw_seeds, str(tmp_path))()
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first[0] != second[0]
    assert str(first[1:]) == str(second[1:])


def train_distributed(rank, folder, closures):
    runs = [Run(case) for case in CASES]
    for run in runs:
        for _ in range(5):
            run.optimizer.step(lambda run=run: closures(run.model, rank))
    torch.save([run.weights for run in runs], f"{folder}/{rank}")


def test_two_processes_equal_one_with_both_their_batches(tmp_path):
    join = group.start(train_distributed, str(tmp_path), half_batches)
    # Accumulated over two micro-batches, in the meantime.
    train_distributed(2, tmp_path, lambda model, _: (half_batches(model, 0) + half_batches(model, 1)) / 2)
    join()
    first, second, whole = (torch.load(tmp_path / str(rank)) for rank in range(3))
    for a, b, c in zip(first, second, whole, strict=True):
        assert same(a, b)
        assert same(a, c)
    assert not same(first[0], Run().weights)


# --- the log -----------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path):
    run = Run("one-sided", params=lambda m: m.parameters()).go(4)  # no names: found by position
    run.optimizer.log.save(tmp_path / "log")
    return run, tmp_path / "log"


def test_a_log_takes_a_few_bytes_per_step(logged):
    run, path = logged
    before = path.stat().st_size
    run.go(100, first=4).optimizer.log.save(path)
    assert path.stat().st_size - before <= 100 * 4 * (3 + 2) + 8
    rebuild(run.base, path)
    assert same(list(run.base.parameters()), run.weights)


def test_another_base_is_refused_and_not_changed(logged):
    run, path = logged
    wrong = copy.deepcopy(run.base)
    with torch.no_grad():
        wrong[2].bias += 1e-6
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    for model, message in [
        (wrong, "digest"),
        (other, "number 0, '0.weight', is torch.float32"),
        (copy.deepcopy(run.base).double(), "torch.float64"),
        (run.base[:2], "no parameter number 2"),
        (run.model, "digest"),
    ]:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(LogError, match=message):
            rebuild(model, path)
        assert same(before, list(model.parameters()))


def test_parameters_without_names_in_another_order_are_told_what_is_missing(tmp_path):
    run = Run(params=lambda m: list(m.parameters())[::-1]).go(1)
    run.optimizer.log.save(tmp_path / "log")
    with pytest.raises(LogError, match=r"number 0, '0\.weight', is .* Without names .* given `model.parameters\(\)`"):
        rebuild(run.base, tmp_path / "log")


def test_names_are_followed_and_checked(tmp_path):
    run = Run("gaussian", params=lambda m: list(m.parameters())[::-1]).go(3)  # names come from `model`
    run.optimizer.log.save(tmp_path / "log")
    renamed = nn.Sequential()
    for name, layer in zip("abc", copy.deepcopy(run.base), strict=True):
        renamed.add_module(name, layer)
    with pytest.raises(LogError, match=r"no parameter '2\.bias'"):
        rebuild(renamed, tmp_path / "log")
    rebuild(run.base, tmp_path / "log")
    assert same(list(run.base.parameters()), run.weights)


def test_a_damaged_log_is_refused(logged):
    run, path = logged
    data = path.read_bytes()
    for at in range(0, len(data), 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(LogError):
            rebuild(run.base, path)
        path.write_bytes(data[:at])
        with pytest.raises(LogError):
            rebuild(run.base, path)
    with pytest.raises(FileNotFoundError):
        rebuild(run.base, path.with_name("none"))


def test_a_resumed_run_s_logs_are_rebuilt_one_after_the_other(tmp_path):
    first = Run().go(3)
    first.optimizer.log.save(tmp_path / "1")
    second = Run()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.go(3, first=3).optimizer.log.save(tmp_path / "2")
    rebuild(first.base, tmp_path / "1")
    rebuild(first.base, tmp_path / "2")
    assert same(list(first.base.parameters()), Run().go(6).weights)


def test_logs_that_would_not_rebuild_are_refused(tmp_path):
    with pytest.raises(LogError, match="no step"):
        Run().optimizer.log.save(tmp_path / "log")
    run = Run("momentum").go(1)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    with pytest.raises(LogError, match="momentum"):
        run.go(1).optimizer.log.save(tmp_path / "log")
    assert not list(tmp_path.iterdir())
    assert log_file.FORMAT == 2


# --- files that are no files --------------------------------------------------------------------------------------


def test_a_write_keeps_links_devices_and_modes(tmp_path):
    target, link, chain, dangling = (tmp_path / name for name in ("target", "link", "chain", "dangling"))
    target.write_bytes(b"before")
    target.chmod(0o640)
    (tmp_path / "folder").mkdir()
    link.symlink_to("target")
    chain.symlink_to(link)
    dangling.symlink_to(tmp_path / "folder" / "new")
    for path, data in ((link, b"1"), (chain, b"2"), (dangling, b"3"), (target, b"4")):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert link.is_symlink()
    assert chain.is_symlink()
    assert dangling.is_symlink()
    assert (tmp_path / "folder" / "new").read_bytes() == b"3"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    pipe = tmp_path / "pipe"  # stands for devices too: a test that failed as root would take /dev/null from everybody
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"5")
    assert os.read(reader, 9) == b"5"
    os.close(reader)
    with pytest.raises(OSError, match="a pipe that nobody reads"):  # it would be waited for
        write_atomically(pipe, b"6")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "target.tmp").symlink_to(tmp_path / "folder" / "new")  # whatever a killed writer left
    write_atomically(target, b"6")
    assert (tmp_path / "folder" / "new").read_bytes() == b"3"
    assert {path.name for path in tmp_path.iterdir()} == {"target", "link", "chain", "dangling", "folder", "pipe"}


def test_a_write_that_cannot_be_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        write_atomically(tmp_path, b"")
    with pytest.raises(FileNotFoundError, match="no folder to write this file in"):
        write_atomically(tmp_path / "none" / "file", b"")
    with pytest.raises(NotADirectoryError):
        write_atomically(path / "file", b"")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_log_may_be_saved_through_a_link(logged):
    run, path = logged
    path.with_name("latest").symlink_to(path)
    run.go(1, first=4).optimizer.log.save(path.with_name("latest"))
    assert path.with_name("latest").is_symlink()
    rebuild(run.base, path)
    assert same(list(run.base.parameters()), run.weights)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and 0 or more"),
        ({"lr": float("nan")}, "lr must be"),
        ({"mu": 0.0}, "mu must be finite and above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"directions": 0}, "directions must be"),
        ({"directions": 3, "pool": 2}, "pool must be"),
        ({"pool": -1}, "pool must be"),
        ({"dist": "uniform"}, "dist must be"),
        ({"seed": -1}, "seed must be"),
        ({"model": nn.Linear(1, 1)}, "does not own"),
        ({"params": lambda m: [m[0].weight, m[0].weight]}, "tied parameters once"),
        ({"params": lambda m: []}, "empty"),
        ({"directions": 1.0}, "directions must be an integer"),
        ({"directions": True}, "directions must be an integer"),
        ({"two_sided": "no"}, "two_sided must be True or False, got 'no'"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Run(**settings)


@pytest.mark.parametrize("name", ["lr", "mu", "momentum", "weight_decay", "decay"])
@pytest.mark.parametrize("value", [None, "1e-3", 1j, torch.ones(2)], ids=repr)
def test_what_is_no_number_is_refused_by_name(name, value):
    """Also the text that some YAML makes of 1e-3: schedulers could not multiply it, and "0" is not 0."""
    with pytest.raises(TypeError, match=f"{name} must be a number, got "):
        Run("normalized", **{name: value})
    run = Run("normalized").go(1)
    run.optimizer.param_groups[0][name] = value
    before = run.weights
    with pytest.raises(TypeError, match=f"{name} must be a number, got "):
        run.go(1)
    assert same(run.weights, before)


def test_numbers_of_numpy_s_and_tensors_are_numbers():
    settings = {"mu": np.float32(2.0**-10), "directions": np.int64(2), "pool": np.int32(4), "momentum": torch.zeros(())}
    settings["two_sided"] = np.bool_(True)
    run, other = Run(lr=torch.tensor(0.02), **settings).go(2), Run(mu=2.0**-10, directions=2, pool=4)
    other.optimizer.param_groups[0]["lr"] = float(torch.tensor(0.02))
    assert same(run.weights, other.go(2).weights)
    assert type(run.optimizer.state_dict()["param_groups"][0]["run"]["directions"]) is int


def test_a_schedule_may_compute_with_numpy_and_its_state_is_loaded_as_weights_are():
    run, file = Run(), io.BytesIO()
    torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: np.cos(step))
    run.optimizer.param_groups[0]["lr"] = np.float64(0.5)
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["lr"] == 0.5
    assert type(run.optimizer.param_groups[0]["lr"]) is np.float64  # only the state is converted


def test_derivatives_beyond_float64_do_not_stop_all_later_steps():
    run = Run("normalized", directions=1).go(1)
    before, state = run.weights, str(run.optimizer.state_dict())
    with pytest.raises(
        FloatingPointError, match="whose squares float64 does not hold: scale the loss down, or raise mu"
    ):
        run.optimizer.step(iter([1e200, -1e200]).__next__)
    assert same(run.weights, before)
    assert str(run.optimizer.state_dict()) == state


def test_a_closure_that_changes_settings_changes_the_next_step(tmp_path):
    run, other = Run().go(1), Run().go(2)

    def closure():
        run.optimizer.param_groups[0].update(lr=0.5, mu=0.5, momentum=0.5, weight_decay=0.5)
        return run.loss(1)

    run.optimizer.step(closure)
    assert same(run.weights, other.weights)
    run.optimizer.log.save(tmp_path / "log")
    rebuild(run.base, tmp_path / "log")
    assert same(list(run.base.parameters()), other.weights)


@pytest.mark.parametrize("case", ["plain", "momentum"])
def test_a_closure_that_steps_its_own_optimizer_is_refused_and_changes_nothing(case):
    run, state = Run(case).go(1), Run(case).optimizer.state_dict()
    before = run.weights
    for nested in (
        lambda: run.optimizer.step(run.loss),
        lambda: run.optimizer.measure(run.loss),
        lambda: run.optimizer.load_state_dict(state),
    ):
        for method in (run.optimizer.step, run.optimizer.measure):
            with pytest.raises(RuntimeError, match="the closure calls `step`, `measure` or `load_state_dict`"):
                method(lambda nested=nested: nested() or run.loss())
            assert same(run.weights, before)
            assert run.optimizer.steps == 1
    assert same(run.go(1, first=1).weights, Run(case).go(2).weights)


@pytest.mark.parametrize("case", ["plain", "momentum"])
@pytest.mark.filterwarnings("ignore:the log of this run cannot be saved")
def test_settings_of_all_groups_that_change_within_a_step_are_the_next_one_s(case):
    """Within its closure, or between `measure` and `step`: a step goes along the directions that were measured."""
    whole = Run(case).go(2)

    def change(optimizer):
        optimizer.seed, optimizer.directions, optimizer.pool, optimizer.two_sided = 5, 4, 9, False

    def closure():
        change(within.optimizer)
        return within.loss(1)

    within, between = Run(case).go(1), Run(case).go(1)
    within.optimizer.step(closure)
    between.optimizer.measure(lambda: between.loss(1))
    change(between.optimizer)
    between.optimizer.step()
    assert same(within.weights, whole.weights)
    assert same(between.weights, whole.weights)
    assert same(within.go(1, first=2).weights, between.go(1, first=2).weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": 0}, "directions must be an integer"),
        ({"directions": 3, "pool": 2}, "pool must be"),
        ({"two_sided": "no"}, "two_sided must be True or False"),
        ({"dist": "uniform"}, "dist must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_of_all_groups_are_checked_in_every_step(change, message):
    run = Run().go(1)
    before = run.weights
    for name, value in change.items():
        setattr(run.optimizer, name, value)
    with pytest.raises(ValueError, match=message):
        run.go(1)
    assert same(run.weights, before)


def test_a_model_and_a_group_of_another_kind_are_refused():
    for settings, message in (
        ({"model": lambda x: x}, r"model must be a torch\.nn\.Module, got function"),
        ({"process_group": distributed.GroupMember.NON_GROUP_MEMBER}, "a group that this process is in"),
    ):
        with pytest.raises(TypeError, match=message):
            ZOSGD(nn.Linear(1, 1).parameters(), 0.1, **settings)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got OrderedDict"):
        rebuild(nn.Linear(1, 1).state_dict(), "log")


def test_parameters_without_a_shape_yet_are_named():
    model, x = nn.LazyLinear(2), torch.ones(3, 4)
    for named, name in (
        (model.parameters(), "parameter 0 of group 0, float32"),
        (model.named_parameters(), "'weight'"),
    ):
        optimizer = ZOSGD(named, 0.1)
        with pytest.raises(RuntimeError, match=f"{name}: it has no shape yet: evaluate the model once"):
            optimizer.step(lambda: model(x).sum())
    model(x)
    optimizer.step(lambda: model(x).sum())


def test_a_group_that_the_model_does_not_own_is_not_added():
    run = Run("gaussian")
    with pytest.raises(ValueError, match="`model` does not own parameter 'more'"):
        run.optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})
    assert len(run.optimizer.param_groups) == 1
    run.go(1)


def test_wrong_steps_are_refused_and_change_nothing():
    run = Run().go(1)
    before = run.weights
    for closure, error, message in [
        (None, TypeError, "step needs a closure"),
        (lambda: None, TypeError, "NoneType"),
        (lambda: True, TypeError, "bool"),
        (lambda: torch.zeros(2), TypeError, r"\[2\]"),
        (lambda: torch.zeros((), dtype=torch.complex64), TypeError, "complex64"),
        (lambda: torch.zeros((), device="meta"), TypeError, "on meta"),
        (lambda: float("inf"), FloatingPointError, "infinite or NaN"),
        (lambda: torch.tensor(float("nan")), FloatingPointError, "infinite or NaN"),
        (iter([1e300, -1e300]).__next__, FloatingPointError, "lower lr"),
    ]:
        with pytest.raises(error, match=message):
            run.optimizer.step(closure)
        assert same(run.weights, before)
    run.optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be"):
        run.go(1)
    assert same(run.weights, before)


def test_wrong_parameters_are_refused():
    run = Run()
    run.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires grad"):
        run.go(1)
    with pytest.raises(TypeError, match="float64"):
        ZOSGD([nn.Parameter(torch.zeros(2, dtype=torch.float64))], 0.1).step(lambda: 0.0)
    with pytest.raises(ValueError, match="infinite or NaN weights"):
        ZOSGD([nn.Parameter(torch.tensor([1.0, float("nan")]))], 0.1).step(lambda: 0.0)
    embedding = nn.Embedding(4, 2, max_norm=0.1)
    with pytest.raises(ValueError, match="max_norm"):
        ZOSGD(embedding.parameters(), 0.1, model=embedding)
    with pytest.raises(RuntimeError, match="the closure writes the weights"):
        ZOSGD(embedding.parameters(), 0.1).step(lambda: embedding(torch.arange(4)).sum())
    with pytest.raises(ValueError, match="no state of a ZOSGD"):
        ZOSGD(embedding.parameters(), 0.1).load_state_dict(torch.optim.SGD(embedding.parameters(), 0.1).state_dict())
    with pytest.raises(ValueError, match="decay must be"):
        ZONormalizedSGD(embedding.parameters(), 0.1, decay=1.0)


@pytest.mark.parametrize("key", ["nesterov", "directions", "weightdecay", "square"])
def test_a_group_s_wrong_options_are_named_and_nothing_is_added(key):
    run = Run(params=lambda m: m[0].named_parameters())
    group = {"params": list(run.model[2].named_parameters()), key: 1.0}
    with pytest.raises(ValueError, match=f"'{key}' of its own: it may set lr, mu, momentum, weight_decay"):
        run.optimizer.add_param_group(group)
    with pytest.raises(ValueError, match=f"'{key}' of its own"):
        ZOSGD([group], 0.1)
    assert len(run.optimizer.param_groups) == 1
    run.optimizer.add_param_group({"params": group["params"], "lr": 0.1, "initial_lr": 0.1})
    run.go(1)


NAMELESS = r"parameter 1 of group 0, \S+ \[\d(, \d)?\]"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("settings", [{}, {"dist": "gaussian"}])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.zeros(3, dtype=torch.float64), TypeError, " is torch.float64"),
        (lambda: torch.zeros(3, dtype=torch.complex64), TypeError, " is torch.complex64"),
        (lambda: torch.eye(3).to_sparse(), TypeError, ": torch.sparse_coo"),
        (lambda: torch.zeros(4, 3).T, RuntimeError, " is not contiguous"),
        (lambda: torch.zeros(3, device="meta"), RuntimeError, " is on meta"),
        (lambda: torch.tensor([1.0, float("nan"), 2.0]), ValueError, " has infinite or NaN weights"),
        (lambda: MEMORY[2:], RuntimeError, " share memory"),
    ],
)
def test_errors_name_the_parameter(make, error, message, settings, named):
    first, second = nn.Parameter(MEMORY[:4]), nn.Parameter(make())
    if error is ValueError and settings:
        return  # off the lattice its loss would show it
    params = [("first", first), ("second", second)] if named else [first, second]
    name = "parameter 'second'" if named else NAMELESS
    with pytest.raises(error, match=name + message):
        ZOSGD(params, 0.1, **settings).step(lambda: first.sum())
    assert not MEMORY.any()


def test_weights_on_several_devices_are_refused_by_name_and_frozen_ones_are_not():
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:1")

    named = [("first", nn.Parameter(torch.ones(2))), ("second", nn.Parameter(torch.ones(2)))]
    named[1][1].__class__ = Elsewhere
    optimizer = ZOSGD(named, 0.1)
    with pytest.raises(RuntimeError, match=r"'first' is on cpu, parameter 'second' on cuda:1: .* device_map"):
        optimizer.step(lambda: 0.0)
    named[1][1].requires_grad_(False)
    optimizer.step(lambda: named[0][1].sum())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_frozen_parameters_of_any_dtype_are_a_base_s(dtype, tmp_path):
    def params(model, last=1):
        values = torch.tensor([0, last], dtype=torch.float32).to(dtype)
        model[2].register_parameter("frozen", nn.Parameter(values, requires_grad=False))
        return model.named_parameters()

    run, base, other = (Run(params=params) for _ in range(3))
    run.go(2).optimizer.log.save(tmp_path / "log")
    rebuild(base.model, tmp_path / "log")
    assert same(base.weights[:4], run.weights[:4])
    params(other.model, last=0)
    with pytest.raises(LogError, match="the digest of its weights is another"):
        rebuild(other.model, tmp_path / "log")


def test_with_a_frozen_parameter_on_the_meta_device_there_is_no_log(tmp_path):
    def params(model):
        model[2].register_parameter("away", nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False))
        return model.named_parameters()

    run = Run(params=params)
    with pytest.warns(UserWarning, match=r"cannot be saved: parameter '2\.away' is on the meta device"):
        run.go(1)
    run.go(1, first=1)
    assert same(run.weights[:4], Run().go(2).weights)
    with pytest.raises(LogError, match=r"parameter '2\.away' is on the meta device"):
        run.optimizer.log.save(tmp_path / "log")


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_with_a_frozen_sparse_parameter_steps_go_on_and_there_is_no_log(make, tmp_path):
    """Freezing it is what is advised where it cannot move."""

    def params(model):
        model[2].register_parameter("sparse", nn.Parameter(make(torch.eye(3)), requires_grad=False))
        return model.named_parameters()

    run = Run(params=params)
    with pytest.warns(UserWarning, match=r"cannot be saved: parameter '2\.sparse' is torch\.sparse_\w+, so that"):
        run.go(1)
    run.go(1, first=1)
    assert same(run.weights[:4], Run().go(2).weights)
    with pytest.raises(LogError, match=r"parameter '2\.sparse' is torch\.sparse"):
        run.optimizer.log.save(tmp_path / "log")


@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, torch.Tensor.half, lambda loss: loss.reshape(1, 1)])
def test_a_loss_is_one_number_of_any_kind(kind):
    run = Run()
    loss = run.optimizer.step(lambda: kind(run.loss().detach()))
    assert abs(loss - Run().optimizer.step(run.loss)) < 0.01


@pytest.mark.parametrize(
    ("two_sided", "steps", "losses", "message"),
    [
        (False, 0, [1.0, float("nan")], "At the weights themselves the loss is finite, so mu is too large"),
        (False, 0, [float("inf"), 1.0], "This is the first step: look for NaN in the batch, labels out of range"),
        (True, 0, [1.0, float("nan")], "This is the first step"),
        (True, 2, [1.0, float("nan")], "an lr so large that the weights have diverged"),
    ],
)
def test_a_loss_that_is_nan_names_the_likely_causes(two_sided, steps, losses, message):
    run = Run(two_sided=two_sided).go(steps)
    before = run.weights
    with pytest.raises(FloatingPointError, match=message):
        run.optimizer.step(iter(losses).__next__)
    assert not steps or same(run.weights, before)


MEMORY = torch.zeros(8)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_errors_of_the_constructor_name_the_parameter():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    for params, message in [
        ([("a", a), ("b", b), ("c", b)], "parameter 'c' is twice in one group"),
        ([a, b, b], r"parameter 2 of group 0, float32 \[3\] is twice in one group"),
        ([{"params": [a, b]}, {"params": [b]}], r"parameter 0 of group 1, float32 \[3\] is in another group too"),
    ]:
        with pytest.raises(ValueError, match=message):
            ZOSGD(params, 0.1)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"does not own parameter 1 of group 0, float32 \[3\]"):
        ZOSGD([model.weight, b], 0.1, model=model)
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="parameter 'weight': made in inference mode"):
        ZOSGD(model.named_parameters(), 0.1).step(lambda: 0.0)


def test_a_momentum_that_does_not_fit_is_named_and_nothing_changes():
    run, other = Run("momentum").go(1), Run("momentum").go(1)
    other.model[2].weight.data = torch.zeros(2, 4)
    before = other.weights
    with pytest.raises(RuntimeError, match=r"parameter '2\.weight' is \[2, 4\] on cpu, its momentum \[1, 4\]"):
        other.optimizer.step(lambda: sum(p.sum() for p in other.model.parameters()))
    assert same(other.weights, before)
    saved = run.optimizer.state_dict()
    saved["state"][3] = {"moment": torch.zeros(7)}
    fresh = Run("momentum", seed=9)
    with pytest.raises(ValueError, match=r"the momentum of parameter '2\.bias' is \[7\] in it"):
        fresh.optimizer.load_state_dict(saved)
    assert fresh.optimizer.seed == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "Other"}, "class must be ZONormalizedSGD, not 'Other'"),
        ({"shapes": [[4, 3], [4], [1, 4], [2]]}, r"of these parameters: parameter '2\.bias' is \[2\] in it"),
        ({"directions": 0}, "directions must be"),
        ({"directions": True}, "directions must be"),
        ({"pool": 1}, "pool must be"),
        ({"seed": -1}, "seed must be"),
        ({"steps": -3}, "steps must be"),
        ({"steps": 1.0}, "steps must be"),
        ({"dist": "uniform"}, "dist must be"),
        ({"two_sided": "no"}, "two_sided must be"),
        ({"quanta": [0.0, 1.0, 1.0, 1.0]}, "quantum of parameter 0 must be"),
        ({"quanta": [1.0, 0.3, None, 1.0]}, "quantum of parameter 1 must be"),
        ({"quanta": [2.0**110]}, "quantum's exponent must be"),
        ({"quanta": {4: 1.0}}, "number of a parameter must be"),
        ({"more": 1}, "must have exactly"),
    ],
)
def test_a_state_that_cannot_be_one_is_refused_and_changes_nothing(change, message):
    saved = Run("normalized").go(1).optimizer.state_dict()
    told(saved).update(change)
    other = Run("normalized", seed=9).go(1)
    before = str(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(saved)
    assert str(other.optimizer.state_dict()) == before
    assert len(other.optimizer.log.chapters) == 1
    other.go(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.clear(), "no `state` and `param_groups`"),
        (lambda state: state.pop("state"), "no `state` and `param_groups`"),
        (lambda state: state.update(param_groups=3), "param_groups must be a list of groups, not 3"),
        (lambda state: state.update(param_groups=[3]), r"param_groups must be a list of groups, not \[3\]"),
        (lambda state: state.update(state=3), "state must be a mapping"),
        (lambda state: state["param_groups"][0].pop("params"), "have lists of params"),
        (lambda state: state["state"].update({0: {"step": 1}}), "must keep a moment alone"),
        (lambda state: state["state"].update({0: {"moment": [1]}}), "must keep a moment alone"),
        (lambda state: state["state"][0]["moment"].fill_(float("nan")), "a moment that is infinite or NaN"),
        (lambda state: state["param_groups"][0].update(square=-1.0), "square, of the running mean, must be finite"),
        (lambda state: state["param_groups"][0].update(square_weight=float("inf")), "square_weight, of the running"),
        (lambda state: state["param_groups"][0].update(lr="1"), "lr must be a number"),
        (lambda state: told(state).update(shapes=3), "shapes must be a list"),
        (lambda state: told(state).update(quanta=None), "quanta must be a list"),
    ],
)
def test_a_state_that_is_made_otherwise_is_refused_and_changes_nothing(change, message):
    saved = copy.deepcopy(Run("normalized", momentum=0.5).go(1).optimizer.state_dict())
    change(saved)
    other = Run("normalized", momentum=0.5, seed=9).go(1)
    before = str(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=f"no state of a ZONormalizedSGD: .*{message}"):
        other.optimizer.load_state_dict(saved)
    assert str(other.optimizer.state_dict()) == before


def test_a_state_of_the_same_parameters_in_another_order_is_refused():
    def optimizer(names):
        return ZOSGD([(name, parameters[name]) for name in names], 0.1, momentum=0.5)

    parameters = {name: nn.Parameter(torch.ones(2)) for name in "abc"}
    saved = optimizer("abc").state_dict()
    other = optimizer("acb")
    with pytest.raises(ValueError, match="in another order: number 1 is 'c' here, and 'b' in it"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match="no state of a ZOSGD: it is a NoneType"):
        other.load_state_dict(None)
    optimizer("abc").load_state_dict(saved)


def test_a_resumed_run_s_log_has_the_names_of_its_own_parameters(tmp_path):
    run = Run().go(1)
    whole = nn.ModuleDict({"body": copy.deepcopy(run.model)})
    resumed = ZOSGD(whole.named_parameters(), 0.1)
    resumed.load_state_dict(run.optimizer.state_dict())
    base = copy.deepcopy(whole)
    resumed.step(lambda: whole["body"](torch.ones(2, 3)).sum())
    resumed.log.save(tmp_path / "log")
    rebuild(base, tmp_path / "log")
    assert same(list(base.parameters()), list(whole.parameters()))


@every
def test_hooks_see_states_whole(case):
    """As those of torch's optimizers: what is loaded is what a hook made of it, and later hooks find it loaded."""
    run, other, seen = Run(case).go(1), Run(case, seed=9), []
    run.optimizer.register_state_dict_post_hook(lambda _, told: {"mine": told})
    wrapped = run.optimizer.state_dict()
    assert told(wrapped["mine"])["steps"] == 1
    other.optimizer.register_load_state_dict_pre_hook(lambda _, given: given["mine"])
    other.optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append((optimizer.seed, optimizer.steps)))
    other.optimizer.load_state_dict(wrapped)
    assert seen == [(3, 1)]
    assert other.optimizer.log.first == 1
    with pytest.raises(ValueError, match="no state of a ZO"):
        other.optimizer.load_state_dict({"mine": {}})
    assert [len(getattr(other.optimizer, f"_optimizer_load_state_dict_{w}_hooks")) for w in ("pre", "post")] == [1, 1]
    assert len(run.optimizer._optimizer_state_dict_post_hooks) == 1


def test_another_optimizer_s_state_is_refused_and_changes_nothing():
    plain, normalized, small = Run().go(1), Run("normalized").go(1), Run("decay").go(1)
    more = {**small.optimizer.state_dict(), "param_groups": 2 * small.optimizer.state_dict()["param_groups"]}
    negative = small.optimizer.state_dict()
    negative["param_groups"][0]["mu"] = -1.0
    for run, saved, message in [
        (plain, normalized.optimizer.state_dict(), "no state of a ZOSGD: the class"),
        (normalized, plain.optimizer.state_dict(), "no state of a ZONormalizedSGD: the class"),
        (normalized, as_before(plain.optimizer.state_dict()), "its groups have no decay"),
        (plain, more, "different number of parameter groups"),
        (plain, negative, "no state of a ZOSGD: mu must be"),
    ]:
        before = str(run.optimizer.state_dict())
        with pytest.raises(ValueError, match=message):
            run.optimizer.load_state_dict(saved)
        assert str(run.optimizer.state_dict()) == before
        run.go(1)


def test_a_model_that_is_converted_later_goes_on():
    run = Run("gaussian").go(1)
    run.model.bfloat16()
    run.go(1)
    assert run.optimizer.lattice is None
    run = Run().go(1)
    assert run.optimizer.lattice is not None
    run.model.half()
    run.go(1)
    assert run.optimizer.lattice is None
    run.model[0].double()
    with pytest.raises(TypeError, match=r"parameter '0\.weight' is torch\.float64"):
        run.go(1)


# --- the examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    assert len(path.read_text().splitlines()) <= 30
