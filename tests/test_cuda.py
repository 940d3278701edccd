"""The CUDA kernels without Triton: every thread's work run by a C++ compiler, and nvcc's machine code read.

A kernel's body is a function of (block, thread). Without a GPU the C++ compiler builds the same file, a launch becomes
two loops, and the bits of every case must be those of spec.py. What only nvcc and a GPU can show is not shown here: the
slow tests build the extension with nvcc, where there is one, and read what it made for three generations of GPUs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path

import pybind11
import pytest
import torch
import triton

import hosfl_kernels as hk
from hosfl_kernels import check, cpu, cuda
from hosfl_kernels.place import DISTRIBUTIONS, Place
from hosfl_kernels.tensors import BACKENDS, DTYPES, cuda_backend

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The module cuda on an extension that runs thread after thread on the CPU."""
    target = tmp_path_factory.mktemp("emulated") / "_cuda.so"
    includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
    # A GPU refuses what this processor forgives: 16 bytes at an address that is no multiple of 16.
    flags += ["-fsanitize=alignment,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    sources = ["-x", "c++", ROOT / "csrc/cuda.cu"]
    subprocess.run(["c++", *flags, *includes, *sources, "-o", target], check=True)
    name = "hosfl_kernels._cuda"
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        yield cuda


@pytest.mark.parametrize("case", check.CASES, ids=str)
def test_case(emulated, case):
    assert check.run_case(emulated, case, "cpu") is None


def test_vectors(emulated):
    vectors = json.loads((ROOT / "tests/noise_vectors.json").read_text())
    results = list(check.vector_cases(vectors, emulated, "cpu"))
    assert len(results) > 30
    assert [(name, wrong) for name, wrong in results if wrong] == []


def many(random):
    """More tensors than a launch takes, of every dtype, some empty, some not where 16 bytes begin."""
    sizes = [0, 1, 700, 1024, 5000, 40_000] + [3 + 7 * k for k in range(60)]
    made = []
    for k, n in enumerate(sizes * 3):
        dtype = DTYPES[k % 3]
        made.append(torch.randn(n + 8, generator=random).to(dtype)[k % 5 : k % 5 + n])
    return made


@pytest.mark.parametrize("dist", DISTRIBUTIONS)
def test_a_long_list_has_the_bits_of_the_cpp_backend(emulated, dist):
    first, second = (many(torch.Generator().manual_seed(1)) for _ in range(2))
    n = len(first)
    place = Place(dist, [2.0 ** (k % 3 - 1) for k in range(n)], list(range(n)), [k * 1000 for k in range(n)])
    for backend, tensors in ((cpu, first), (emulated, second)):
        backend.perturb_(tensors, 2**64 - 1, 1e-2, place, None)
        backend.replay_(tensors, [5, 6, 7], [1e-2, -3e-3, 1e-3], place, None)
        moments = [[torch.zeros(x.shape) for x in tensors] for _ in range(2)]
        constants, steps = [0.9, 0.1, 0.99, 0.01, 1e-8], [[1e-2, 0.99, 3.0], [1e-2, 0.98, 2.0]]
        backend.update_(tensors, moments, "adamw", constants, [1, 2, 3, 4], [0.1] * 4, steps, place, None)
    for a, b in zip(first, second, strict=True):
        # The whole storage: cells before and after the tensor stay as they were.
        whole = [x.untyped_storage() for x in (a, b)]
        assert bytes(whole[0]) == bytes(whole[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8191, 16_381, 16_384])
def test_the_cells_after_a_tensor_stay(emulated, n, dtype):
    # The last tile lacks a part of its last 16 bytes, or nothing.
    x = torch.full((n + 8,), 3.0, dtype=dtype)
    emulated.perturb_([x[:n]], 1, 0.5, Place.single(), None)
    assert set(x[:n].tolist()) == {2.5, 3.5}
    assert x[n:].tolist() == [3.0] * 8


def test_more_directions_than_fit_into_a_kernel_s_parameters(emulated):
    x, y = torch.zeros(3000), torch.zeros(3000)
    seeds, coefficients = list(range(1000)), torch.linspace(-1, 1, 1000).tolist()
    for backend, tensor in ((cpu, x), (emulated, y)):
        backend.replay_([tensor], seeds, coefficients, Place.single(), None)
    assert torch.equal(x, y)


@pytest.mark.parametrize("dist", DISTRIBUTIONS)
def test_project_by_pieces(emulated, dist, monkeypatch):
    monkeypatch.setattr(cuda, "PIECE", 1000)
    x = [torch.randn(2500), torch.randn(0), torch.randn(30, 100).half()]
    place = Place(dist, [1.0, 2.0, 0.5], [0, 1, 2], [131_000, 0, 2**40])
    wrong = emulated.project(x, [1, 2], place).numpy() - cpu.project(x, [1, 2], place)
    assert abs(wrong).max() < 1e-7 * 5500
    assert emulated.project([], [1], Place(dist, [], [], [])).tolist() == [0.0]


def test_flushed_denormals_change_no_bit(emulated):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        records = emulated._extension().records([1], [1e-40], [])
    finally:
        torch.set_flush_denormal(False)
    (coefficient,) = struct.unpack_from("<f", records, 8)
    assert coefficient == torch.tensor(1e-40).item() > 0


# --- which backend serves CUDA tensors ------------------------------------------------------------------------


def test_triton_where_it_is_installed_else_nvcc_s_kernels(monkeypatch):
    monkeypatch.delenv("HOSFL_CUDA", raising=False)
    assert cuda_backend() is BACKENDS["triton"]
    monkeypatch.setenv("HOSFL_CUDA", "1")
    assert cuda_backend() is cuda
    monkeypatch.delenv("HOSFL_CUDA")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda_backend() is cuda


def test_without_either_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hosfl_kernels._cuda", None)
    assert hk.backends()["cuda"] is None
    with pytest.raises(RuntimeError, match=r"pip install triton.*HOSFL_CUDA=1"):
        cuda.perturb_([torch.zeros(3)], 1, 1.0, Place.single(), None)


def test_it_refuses_tensors_that_it_cannot_reach(emulated, monkeypatch):
    monkeypatch.setattr(emulated._extension(), "EMULATED", False)
    with pytest.raises(RuntimeError, match="take CUDA tensors, not cpu"):
        cuda.noise_(torch.zeros(3), 1, Place.single())


# --- what nvcc makes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(source_tree, tmp_path_factory):
    """The extension out of the wheel that HOSFL_CUDA=1 builds."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    directory = tmp_path_factory.mktemp("nvcc")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", directory, source_tree]
    done = subprocess.run(command, env=os.environ | {"HOSFL_CUDA": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"csrc/cuda.*warning", done.stdout + done.stderr)
    (wheel,) = directory.glob("hosfl-*-1cuda-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"hosfl_kernels/_cuda\..*(so|pyd)", name))
        return Path(archive.extract(name, directory))


def cuobjdump(*arguments):
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


@functools.cache
def opcodes(extension, architecture):
    """Kernel name -> how often each opcode stands in it."""
    text = cuobjdump("-sass", "-arch", f"sm_{architecture}", extension)
    kernels = re.split(r"Function : (\S+)", text)[1:]
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    return {name: Counter(instruction.findall(body)) for name, body in zip(kernels[::2], kernels[1::2], strict=True)}


def count(counted, pattern):
    return sum(times for opcode, times in counted.items() if re.match(pattern, opcode))


@pytest.mark.slow
def test_the_extension_needs_neither_a_gpu_nor_libraries_of_cuda_to_be_imported(built):
    linked = subprocess.run(["ldd", built], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"torch|c10|cuda|not found", linked)
    lines = ["import importlib.util as u", f"s = u.spec_from_file_location('hosfl_kernels._cuda', {str(built)!r})"]
    lines += ["m = u.module_from_spec(s)", "s.loader.exec_module(m)", "assert m.EMULATED is False"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_and_no_value_crosses_threads(built, architecture):
    kernels = opcodes(built, architecture)
    assert len(kernels) == 2 + 8 + 6 + 8 + 24 + 1  # noise, perturb, rows, replay, update, philox
    usage = cuobjdump("-res-usage", "-arch", f"sm_{architecture}", built)
    assert len(re.findall(r"STACK:0 SHARED:0 LOCAL:0", usage)) == len(kernels)
    for name, counted in kernels.items():
        assert not count(counted, r"(LDL|STL|LDS|STS|SHFL|BAR)\b"), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_tiles_move_16_bytes_at_a_time(built, architecture):
    # 64 cells to a thread: in 16-byte accesses for whole tiles, one by one for the others.
    for name, counted in opcodes(built, architecture).items():
        cells, wide = 64, 8 if "Float16" in name else 16
        if "Perturb" in name:
            assert count(counted, r"LDG\.E\.128") == wide, name
        if "Perturb" in name or "5Noise" in name:
            assert count(counted, r"STG\.E\.128") == wide, name
            assert count(counted, r"STG") == wide + cells, name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_and_sums_are_not_fused(built, architecture):
    # Square roots and quotients are made of fused operations that together round once; nothing else may have any.
    for name, counted in opcodes(built, architecture).items():
        fused, roots = count(counted, r"FFMA"), count(counted, r"MUFU\.RSQ")
        if "DistE1" not in name and "RuleE2" not in name:  # no normal numbers, no AdamW
            assert fused == roots == 0, name
        elif "RuleE2" not in name:
            assert fused <= 3 * roots, name  # a polynomial fused would add 13 for each root
        assert not count(counted, r"MUFU\.(EX2|LG2|SIN|COS|SQRT|TANH)"), name


@pytest.mark.slow
def test_every_float_operation_is_one_rounding_to_nearest(built):
    ptx = cuobjdump("-ptx", built)
    arithmetic = r"\b(?:add|sub|mul|fma|mad|div|sqrt|rsqrt|rcp|ex2|lg2|sin|cos|tanh)\.\S*f(?:16|32|64)\S*"
    allowed = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "sqrt.rn.f32", "div.rn.f32"}
    assert "target sm_100" in ptx
    assert set(re.findall(arithmetic, ptx)) <= allowed
    assert not re.search(r"\.ftz|\.approx", ptx)
