"""hosfl.optim: every optimizer x every property; the estimator in numpy; logs; two processes; the examples."""

import copy
import io
import runpy
import signal
from pathlib import Path

import group
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hosfl import optim, optim_log
from hosfl.log import LogError
from hosfl.optim import ZOSGD, ZONormalizedSGD, rebuild
from hosfl.seeds import Purpose, direction_seeds, round_seed
from hosfl_kernels import derive, spec

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))

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
    optimizer = cls(model.parameters(), lr, model=model, **settings)

    def distance():
        return (model.weight.float()[0] - target).square().sum()

    before = float(distance().detach())
    for _ in range(100):
        loss = optimizer.step(distance)
    assert float(distance().detach()) < 0.1 * before
    assert loss.shape == ()


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
    different |= {"two_sided": not optimizer.two_sided, **({"decay": 0.3} if hasattr(optimizer, "decay") else {})}
    assert different.keys() >= {*optimizer.kept} - {"steps"}
    for weights_first in (True, False):
        other = Run(case, **different)
        if weights_first:
            other.model.load_state_dict(saved["model"])
        other.optimizer.load_state_dict(saved["optimizer"])
        if not weights_first:
            other.model.load_state_dict(saved["model"])
        assert other.optimizer.steps == 3
        other.go(3, first=3)
        assert same(other.weights, whole.weights)
        assert str(other.optimizer.state_dict()) == str(whole.optimizer.state_dict())


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


# --- the estimator -----------------------------------------------------------------------------------------------


def numpy_run(xs, rates, mus, loss, steps, directions, two_sided, seed, normalized, pool):
    """The estimator on the lattice, one array per group."""
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
        for g in range(len(xs)):
            mean[g] = 0.9 * mean[g] + (1 - 0.9) * (sum((v / mus[g]) ** 2 for v in d) / directions)
            length = np.sqrt(mean[g] / (1 - 0.9 ** (t + 1))) + 1e-8 if normalized else 1.0
            for p, u in enumerate(us):
                c = -rates[g] * (d[p] / mus[g] / length / directions)
                xs[g] = xs[g] + np.float32(np.floor(c / qs[g] + derive(key, p, g) / 2.0**64) * qs[g]) * u[g]
    return xs


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("directions", "pool"), [(1, 0), (3, 0), (3, 4)])
def test_it_is_the_estimator_in_numpy_bit_for_bit(two_sided, directions, pool, normalized):
    start = [np.random.default_rng(0).normal(size=n).astype(np.float32) for n in (1500, 7)]
    rates, mus = (1e-4, 3e-4), (1e-3, 4e-3)

    def loss(xs):
        return sum(float(np.square(x.astype(np.float64) - 0.1).sum()) for x in xs)

    params = [nn.Parameter(torch.from_numpy(x.copy())) for x in start]
    groups = [{"params": [p], "lr": lr, "mu": mu} for p, lr, mu in zip(params, rates, mus, strict=True)]
    cls = ZONormalizedSGD if normalized else ZOSGD
    optimizer = cls(groups, 1.0, directions=directions, two_sided=two_sided, seed=8, pool=pool)
    before = loss(start)
    for _ in range(4):
        optimizer.step(lambda: loss([p.detach().numpy() for p in params]))
    expected = numpy_run(start, rates, mus, loss, 4, directions, two_sided, 8, normalized, pool)
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


def test_no_tensor_of_the_parameters_size_is_made():
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


def test_ctrl_c_in_the_middle_of_a_move(monkeypatch):
    replay = optim.replay_
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
            patch.setattr(optim, "replay_", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.go(1, first=2)
        # The last move is the step itself: it is taken or not, never half.
        assert run.optimizer.steps == (3 if fatal == 2 else 2)
        assert same(run.weights, undisturbed.weights if fatal == 2 else before)
        run.go(3 - run.optimizer.steps, first=2)
        assert same(run.weights, undisturbed.weights)


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
    assert optim_log.FORMAT == 1


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
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Run(**settings)


def test_wrong_steps_are_refused_and_change_nothing():
    run = Run().go(1)
    before = run.weights
    for closure, error, message in [
        (None, TypeError, "step needs a closure"),
        (lambda: None, TypeError, "NoneType"),
        (lambda: True, TypeError, "bool"),
        (lambda: torch.zeros(2), TypeError, r"\[2\]"),
        (lambda: torch.zeros((), dtype=torch.complex64), TypeError, "complex64"),
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


# --- the examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    assert len(path.read_text().splitlines()) <= 30
