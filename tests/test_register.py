"""The ops inside torch: schemas, fake tensors, torch.compile."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import hosfl_kernels as hk
from hosfl_kernels import cuda, validation
from hosfl_kernels.place import Place

SEEDS = [1, 2, 3, 2**40, 2**63 + 5, 2**64 - 1, 0, 2**63 + 77, 7, 12345, 99]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(f):
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    return torch.compile(f, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
def test_compile_does_not_recompile_per_seed(dist):
    def f(xs, seed):
        hk.perturb_(xs, seed, 0.5, dist=dist, factors=[1.0, 2.0])
        y = xs[0] * 2
        hk.perturb_(xs, seed, -0.25, dist=dist)
        return y

    compiled, counter = counted(f)
    for seed in SEEDS:
        got, want = [torch.ones(5), torch.ones(7, 3)], [torch.ones(5), torch.ones(7, 3)]
        assert torch.equal(compiled(got, seed), f(want, seed))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count <= 2


def test_compile_does_not_recompile_per_lookup():
    table = torch.randn(50, 3)

    def f(indices, seed):
        rows = table[indices]
        hk.perturb_rows_(rows, indices, seed, 0.5, factor=2.0, stream=3)
        return rows * 2

    compiled, counter = counted(f)
    for count, seed in enumerate(SEEDS, 2):
        indices = torch.arange(count).flip(0)
        assert torch.equal(compiled(indices, seed), f(indices, seed))
    assert counter.frame_count <= 2


def test_compile_does_not_recompile_per_record():
    def f(x, seeds, coefficients):
        hk.replay_(x, seeds, coefficients)
        return x + 1

    compiled, counter = counted(f)
    for count in range(1, 8):
        seeds, coefficients = torch.arange(count) - 3, torch.rand(count)
        got, want = torch.zeros(2000), torch.zeros(2000)
        assert torch.equal(compiled(got, seeds, coefficients), f(want, seeds, coefficients))
        assert torch.equal(got, want)
    assert counter.frame_count <= 2


def test_compile_does_not_recompile_per_projection():
    def f(xs, seeds):
        return hk.project(xs, seeds, factors=[1.0, 2.0]) * 2

    compiled, counter = counted(f)
    xs = [torch.randn(2000, requires_grad=True), torch.randn(3, 5)]
    for count in range(1, 8):
        seeds = torch.arange(count) - 3
        got = compiled(xs, seeds)
        assert torch.equal(got, f(xs, seeds))
        assert not got.requires_grad
    assert counter.frame_count <= 2


def test_compiled_graph_checks_its_arguments():
    compiled, _ = counted(lambda x: hk.perturb_(x, 1, 1.0))
    with pytest.raises(TypeError, match="float64"):
        compiled(torch.zeros(3, dtype=torch.float64))


def test_schemas():
    x = torch.randn(10)
    torch.library.opcheck(torch.ops.hosfl.noise_.default, (x, [1, 0], 0, 0, "gaussian"))
    torch.library.opcheck(torch.ops.hosfl.perturb_.default, ([x], [1, 0], 0.5, "gaussian", [], [], [], []))
    torch.library.opcheck(
        torch.ops.hosfl.perturb_rows_.default,
        (x.reshape(5, 2), torch.arange(5), [1, 0], 0.5, "gaussian", 1.0, 3),
    )
    torch.library.opcheck(
        torch.ops.hosfl.replay_.default,
        ([x], torch.tensor([1, 2]), torch.tensor([0.5, 1.0]), "rademacher", [], [], [], None),
    )
    torch.library.opcheck(torch.ops.hosfl.project.default, ([x], torch.tensor([1, 2]), "gaussian", [], [], []))


@pytest.mark.parametrize("first", ["torch", "hosfl_kernels", "hosfl_kernels.tensors"])
def test_the_ops_are_registered_when_they_are_needed(first):
    """With torch before it, at the import; else with the first tensor, also if torch.compile traces that call."""
    program = f"""
import {first}
import torch, hosfl_kernels as hk
at_once = {first != "hosfl_kernels"}
assert hasattr(torch.ops.hosfl, "perturb_") == at_once
x, y = torch.zeros(100), torch.zeros(100)
torch.compile(lambda t: hk.perturb_(t, 1, 1.0), fullgraph=True, backend="eager")(x)
torch.ops.hosfl.perturb_([y], [1, 0], 1.0, "rademacher", [], [], [], [])
assert torch.equal(x, y) and x.abs().min() == 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compile_takes_numpy_s_numbers():
    rule = hk.SGD(momentum=0.5)

    def f(x, m, seeds, coefficients, steps):
        hk.update_(x, [m], rule, seeds, coefficients, steps)
        return x + 1

    compiled, _ = counted(f)
    seeds, coefficients = np.array([[2**64 - 1, 3]], np.uint64), np.array([[0.5, 0.25]], np.float32)
    got, want = ([torch.zeros(50), torch.zeros(50)] for _ in range(2))
    arguments = (seeds, coefficients, rule.steps([0], [0.1]))
    assert torch.equal(compiled(*got, *arguments), f(*want, *arguments))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_graphs_that_torch_compile_records_leave_the_ops_out():
    """A graph would repeat the seed of the call that it saw."""
    for op in ("noise_", "perturb_", "perturb_rows_", "replay_", "update_", "project"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.hosfl, op).default.tags


def test_where_records_may_lie():
    here = torch.zeros(2, dtype=torch.int64)
    # All that is asked of them. torch makes not even a fake tensor of a GPU that a machine lacks.
    there, other = (SimpleNamespace(device=torch.device(d), is_cpu=False) for d in ("cuda:0", "cuda:1"))
    assert not validation.are_on_gpu({"seeds": here, "rounding_seeds": None}, [there])
    assert not validation.are_on_gpu({"seeds": np.zeros(2)}, [np.zeros(2)])
    assert validation.are_on_gpu({"seeds": there, "coefficients": there, "rounding_seeds": None}, [there])
    for seeds, coefficients, tensors in ((there, here, there), (there, there, here), (other, other, there)):
        with pytest.raises(RuntimeError, match="put all records on the CPU, or all there"):
            validation.are_on_gpu({"seeds": seeds, "coefficients": coefficients}, [tensors])
    with pytest.raises(TypeError, match=r"project takes seeds on the CPU, and they are on cuda:0"):
        validation.check_on_host(there, "project")
    validation.check_on_host(here, "project")
    validation.check_on_host(np.zeros(2), "project")
    with pytest.raises(RuntimeError, match="need Triton's kernels"):
        cuda.replay_([here], here, here.float(), Place.single(), None)
    with pytest.raises(RuntimeError, match="need Triton's kernels"):
        cuda.update_([here], [], "sgd", [], here[:, None], here[:, None], here[:, None], Place.single(), None)


class Asked(NamedTuple):
    """A backend of `update_` that keeps what it is asked for."""

    calls: list[Any]

    def update_(self, *arguments: Any) -> None:
        self.calls.append(arguments)


def there(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose numbers nobody can read."""
    return torch.empty(shape, dtype=dtype, device="meta")


RECORDS = {"seeds": there(2, 3, dtype=torch.int64), "coefficients": there(2, 3), "steps": there(2, 3)}


def updated(backend: Asked, rounding_seeds: torch.Tensor | None, **others: torch.Tensor) -> None:
    run = hk.ops.RUN["update_"]
    run(
        backend,
        [there(5)],
        [],
        "sgd",
        [],
        *{**RECORDS, **others}.values(),
        Place("gaussian", [], [], []),
        rounding_seeds,
    )


@pytest.mark.parametrize("rounding_seeds", [None, there(2, dtype=torch.int64)])
def test_update_leaves_records_on_the_device_unread(rounding_seeds):
    backend = Asked([])
    updated(backend, rounding_seeds)
    ((_, _, rule, _, *records, place, rounding),) = backend.calls
    assert (rule, place) == ("sgd", Place("gaussian", [1.0], [0], [0]))
    assert all(a is b for a, b in zip([*records, rounding], [*RECORDS.values(), rounding_seeds], strict=True))


@pytest.mark.parametrize("name", ["seeds", "coefficients", "steps", "rounding_seeds"])
def test_update_takes_all_records_from_one_place(name):
    backend = Asked([])
    here = {name: torch.zeros(2, 3)}
    with pytest.raises(RuntimeError, match="put all records on the CPU, or all there"):
        updated(backend, **{"rounding_seeds": there(2), **here})
    assert not backend.calls


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"seeds": (2, 3, torch.int32)}, TypeError, "seeds as a tensor must be int64"),
        ({"seeds": (6, torch.int64)}, TypeError, r"seeds as a tensor must be int64 \[rounds, directions\]"),
        ({"coefficients": (2, 3, torch.float64)}, TypeError, "coefficients as a tensor must be float32"),
        ({"coefficients": (2, 2, torch.float32)}, ValueError, r"coefficients must be \[2, 3\]"),
        ({"steps": (2, 3, torch.float16)}, TypeError, "steps as a tensor must be float32"),
        ({"steps": (1, 3, torch.float32)}, ValueError, r"steps must be \[2, 3\]"),
        ({"rounding_seeds": (3, torch.int64)}, ValueError, "2 rounds but 3 rounding_seeds"),
        ({"rounding_seeds": (2, torch.float32)}, TypeError, "rounding_seeds as a tensor must be int64"),
    ],
)
def test_update_names_records_on_the_device_that_it_cannot_take(wrong, error, said):
    kinds = {"seeds": (2, 3, torch.int64), "coefficients": (2, 3, torch.float32), "steps": (2, 3, torch.float32)}
    kinds |= {"rounding_seeds": (2, torch.int64)}
    with FakeTensorMode():
        weights = torch.zeros(5, device="cuda")
        records = {k: torch.zeros(shape, dtype=d, device="cuda") for k, (*shape, d) in {**kinds, **wrong}.items()}
    with pytest.raises(error, match=said):
        hk.update_(weights, [], hk.SGD(), rounding="stochastic", **records)
