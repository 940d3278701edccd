"""The ops without torch: numpy arrays, in processes that cannot import it; what arrays and tensors have in common."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import without_torch

import hosfl_kernels as hk
from hosfl_kernels import cpu

ROOT = Path(__file__).parent.parent
PLAIN = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "TRITON_INTERPRET")}


def run(program, **environment):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=PLAIN | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_op_on_arrays_and_the_same_errors_as_for_tensors():
    python = os.environ.get("PYTHON_WITHOUT_TORCH", sys.executable)  # another processor's: see .ci/arm64
    command = [python, "tests/without_torch.py", "tests/noise_vectors.json"]
    done = subprocess.run(command, cwd=ROOT, env=PLAIN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_arrays = json.loads(done.stdout)
    of_tensors = without_torch.refused(lambda n, dtype="float32": torch.full((n,), 0.5, dtype=getattr(torch, dtype)))
    assert set(of_arrays) == set(of_tensors) == set(without_torch.BAD)

    def alike(error):
        text = re.sub(r"torch\.(float|int)|strides \(\d+,\)|int64 or uint64", r"\1", error[1])
        return error[0], text.replace(" as a tensor", " as an array").replace("must be int64,", "must be ,")

    for name, error in of_tensors.items():
        assert alike(error) == alike(of_arrays[name]), name


def test_importing_it_and_working_on_arrays_imports_neither_torch_nor_triton():
    run("""
import sys, numpy as np, hosfl_kernels as hk
x = np.zeros(10, np.float32)
hk.perturb_(x, 1, 1.0)
hk.project([x], [1])
hk.project([], [1])
hk.snap_(x)
try:
    hk.perturb_([x, "weights"], 1, 1.0)
except TypeError:
    pass
assert not {"torch", "triton"} & set(sys.modules), sorted(sys.modules)
""")


def test_a_tensor_where_torch_is_missing_says_what_to_install():
    assert "pip install 'hosfl[torch]', or pass device='numpy'" in run("""
import sys
sys.modules.update(torch=None)
import hosfl_kernels as hk
try:
    hk.noise(3, 1)
except ModuleNotFoundError as error:
    print(error)
""")


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_array_gets_the_bits_of_a_tensor(dtype, dist):
    """Two views of the same memory: every op, its numbers in the other kind; seeds by their bits, and backwards."""
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor, copy = x.clone(), x.clone()
    array = copy.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else copy.numpy()
    seeds = np.array([2**64 - 1, 5, 7], np.uint64)
    coefficients = np.array([0.5, -0.25, 1.0], np.float32)
    rule, place = hk.AdamW(), {"dist": dist, "factors": [0.5], "streams": [9], "starts": [2**40 + 3]}
    steps = rule.steps([0, 1, 2], [0.1, 0.2, 0.3])
    moments = [[torch.zeros(3000)], [torch.zeros(3000)]]
    other = [[m.numpy().copy() for m in kept] for kept in moments]
    for xs, kept, kind in ((tensor, moments, np.asarray), (array, other, torch.from_numpy)):
        hk.perturb_(xs, 3, 0.125, **place)
        hk.replay_(xs, kind(seeds.view(np.int64)), kind(coefficients), **place)
        hk.replay_(xs, seeds[::-1], coefficients[::-1], **place)
        numbers = np.arange(299, -1, -1)
        numbers = numbers if kind is torch.from_numpy else torch.from_numpy(numbers.copy())  # of the rows' own kind
        hk.perturb_rows_(xs.reshape(300, 10), numbers, 4, 0.5, dist=dist, factor=0.5, stream=9)
        table = kind(seeds.view(np.int64).reshape(3, 1)), kind(coefficients.reshape(3, 1)), kind(steps)
        hk.update_(xs, kept, rule, *table, **place)
    assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))
    assert not torch.equal(tensor, x)
    for a, b in zip(moments, other, strict=True):
        assert (a[0].numpy() == b[0]).all()
    scalars = hk.project(tensor, seeds, **place), hk.project(array, torch.from_numpy(seeds.view(np.int64)), **place)
    assert isinstance(scalars[0], torch.Tensor)
    assert scalars[1].dtype == np.float64
    assert (scalars[0].numpy() == scalars[1]).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, t: hk.perturb_([x, t], 1, 1.0), TypeError, "tensors\\[1\\] is a torch.Tensor among numpy arrays"),
        (lambda x, t: hk.perturb_([t, x], 1, 1.0), TypeError, "tensors\\[1\\] is a numpy array among torch.Tensors"),
        (lambda x, t: hk.project([t, x], [1]), TypeError, "pass one kind in a call"),
        (
            lambda x, t: hk.update_(x, [t], hk.SGD(momentum=0.5), [[1]], [[1.0]], [[1.0, 1.0, 1.0]]),
            TypeError,
            "moments\\[0\\]\\[0\\] is a torch.Tensor among numpy arrays",
        ),
        (lambda x, t: hk.perturb_(x.astype(x.dtype.newbyteorder()), 1, 1.0), TypeError, "tensors\\[0\\] is [<>]f4;"),
        (lambda x, t: hk.perturb_(np.frombuffer(bytes(32), np.float32), 1, 1.0), ValueError, "\\[0\\] is read-only"),
        (
            lambda x, t: hk.update_(
                [x], [[np.frombuffer(bytes(32), np.float32)]], hk.SGD(momentum=0.5), [[1]], [[1.0]], [[1.0, 1.0, 1.0]]
            ),
            ValueError,
            "moments\\[0\\]\\[0\\] is read-only",
        ),
        (
            lambda x, t: hk.perturb_([x, np.zeros(33, np.uint8)[1:].view(np.float32)], 1, 1.0),
            RuntimeError,
            "tensors\\[1\\] is not aligned",
        ),
        (lambda x, t: hk.perturb_(np.zeros((4, 4), np.float32, order="F"), 1, 1.0), RuntimeError, "not contiguous"),
        (
            lambda x, t: hk.perturb_rows_(x[None], torch.tensor([1]), 1, 1.0),
            TypeError,
            "numbers\\[0\\] is a torch.Tensor",
        ),
        (lambda x, t: hk.perturb_rows_(x[None], np.array([-1]), 1, 1.0), ValueError, "numbers must be at least 0"),
        (lambda x, t: hk.perturb_rows_(x[None], np.array([1], np.uint64), 1, 1.0), TypeError, "numbers is uint64"),
        (lambda x, t: hk.replay_(x, np.array([1], np.int32), [1.0]), TypeError, "seeds as an array must be int64 or"),
        (lambda x, t: hk.replay_(x, [1], np.ones(1)), TypeError, "coefficients as an array must be float32"),
    ],
)
def test_bad_arrays_change_nothing(call, error, message):
    x, t = np.full(8, 0.5, np.float32), torch.full((8,), 0.5)
    with pytest.raises(error, match=message):
        call(x, t)
    assert (x == 0.5).all()
    assert (t == 0.5).all()


def test_a_read_only_array_can_be_read():
    x = np.frombuffer(bytes(32), np.float32)
    assert hk.project(x, [1]).tolist() == [0.0]


# --- threads ------------------------------------------------------------------------------------------------------


def test_torch_says_how_many_threads(threads):
    threads(3)
    assert cpu.threads() == 3


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say")
@pytest.mark.parametrize(("asked", "threads_"), [("3", 3), ("5,2", 5), ("many", None), ("0", None), (None, None)])
def test_without_torch_the_environment_says_how_many_or_the_system(asked, threads_):
    program = "from hosfl_kernels import cpu; print(cpu.threads())"
    environment = {} if asked is None else {"OMP_NUM_THREADS": asked}
    assert int(run(program, **environment)) == (threads_ or len(os.sched_getaffinity(0)))


def test_more_threads_change_no_bit_of_an_array():
    program = """
import hashlib, numpy as np, hosfl_kernels as hk
x = np.arange(1_000_003, dtype=np.float32)
hk.perturb_(x, 3, 1.0, dist="gaussian")
print(hashlib.sha256(x).hexdigest(), hk.project(x, [1, 2]).tolist())
"""
    assert len({run(program, OMP_NUM_THREADS=n) for n in ("1", "2", "4")}) == 1
