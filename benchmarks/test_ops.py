"""Times of every op by size, dtype and distribution, and of lists of tensors with models' shapes, by pytest-benchmark.

    pytest benchmarks --benchmark-only [--elements N] [-k "list and LoRA"] [--benchmark-json FILE]

A group is a size or a list: its roof, which is torch's own pass over as many bytes; the peers' way; and ours. Sizes are
from 1 K to 1 G elements, up to --elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import hosfl_kernels as hk
from benchmarks.contenders import (
    DIRECTIONS,
    LIST_CONTENDERS,
    LIST_ROOF,
    MEZO,
    RANDN,
    ROOF,
    SCALE,
    mezo,
    op_name,
    record_tensors,
    synchronized,
)
from benchmarks.shapes import LISTS
from hosfl_kernels.place import DISTRIBUTIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROOFS: dict[str, tuple[torch.dtype, float]] = {  # of each type, and what is added
    **{name: (dtype, SCALE) for name, dtype in DTYPES.items()},
    "int16": (torch.int16, 1),  # to 16-bit floats torch adds more slowly than memory allows
}
RECORDS = 8
KINDS = [*product(DTYPES, DISTRIBUTIONS, (False,)), *product(["bfloat16"], DISTRIBUTIONS, (True,))]


def timed(benchmark: Any, call: Callable[[], object], name: str, of: str, dtype: str, nbytes: int, device: str) -> None:
    """Time a call, a small one many times at once. of: the tensor, such as its size; nbytes: its bytes."""

    group = f"{of} {dtype}"
    benchmark.group = f"{device} {group}"
    benchmark.extra_info.update(device=device, group=group, of=of, dtype=dtype, name=name, bytes=2 * nbytes)
    iterations = max(1, min(100, 2**22 // max(1, nbytes)))
    benchmark.pedantic(
        synchronized(call, device), rounds=5 if nbytes > 2**26 else 20, iterations=iterations, warmup_rounds=1
    )


def weights(shapes: Sequence[tuple[int, ...]], dtype: str, device: str) -> list[Tensor]:
    return [torch.full(shape, 0.02, dtype=DTYPES[dtype], device=device) for shape in shapes]


def label(kind: tuple[str, str, bool]) -> str:
    dtype, dist, stochastic = kind
    return f"{dtype} {dist}{' stochastic' if stochastic else ''}"


@pytest.mark.parametrize("name", ROOFS)
def test_roof(benchmark: Any, name: str, device: str, size: int) -> None:
    dtype, constant = ROOFS[name]
    x = torch.zeros(size, dtype=dtype, device=device)
    timed(benchmark, lambda: x.add_(constant), ROOF, f"{size:,}", name, x.nbytes, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mezo(benchmark: Any, dtype: str, device: str, size: int) -> None:
    (x,) = weights([(size,)], dtype, device)
    timed(benchmark, lambda: mezo(x), MEZO, f"{size:,}", dtype, x.nbytes, device)


def ways_to_noise(size: int, device: str) -> dict[str, Callable[[], object]]:
    """Return the ways to make normal numbers and signs: ours, torch's, EvoX's if installed, on a GPU Triton's own."""
    ways: dict[str, Callable[[], object]] = {
        f"hosfl noise {dist}": partial(hk.noise, size, 1, dist=dist, device=device) for dist in DISTRIBUTIONS
    }
    ways[RANDN] = partial(torch.randn, size, device=device)
    if device == "cuda":
        from benchmarks.randn import randn

        ways["tl.randn"] = partial(randn, size)
    if find_spec("evox"):
        from evox.triton_kernels.kernels import philox_normal

        ways["EvoX's philox_normal"] = partial(philox_normal, torch.tensor([1], device=device), size)
    return ways


@pytest.mark.parametrize(
    "way", ["hosfl noise rademacher", "hosfl noise gaussian", RANDN, "tl.randn", "EvoX's philox_normal"]
)
def test_noise(benchmark: Any, way: str, device: str, size: int) -> None:
    ways = ways_to_noise(size, device)
    if way not in ways:
        pytest.skip("pip install evox" if "EvoX" in way else "a kernel of Triton's needs a GPU")
    name = f"EvoX {version('evox')}'s philox_normal" if "EvoX" in way else way
    timed(benchmark, ways[way], name, f"{size:,} new numbers,", "float32", 2 * size, device)


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_perturb(benchmark: Any, kind: tuple[str, str, bool], device: str, size: int) -> None:
    dtype, dist, stochastic = kind
    (x,) = weights([(size,)], dtype, device)
    how: dict[str, Any] = {"rounding": "stochastic", "rounding_seed": 2} if stochastic else {}
    name = op_name("perturb_", dist, stochastic)
    timed(benchmark, lambda: hk.perturb_(x, 1, SCALE, dist=dist, **how), name, f"{size:,}", dtype, x.nbytes, device)


@pytest.mark.parametrize("dist", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perturb_rows(benchmark: Any, dtype: str, dist: str, device: str, size: int) -> None:
    """Time rows of 512 elements of a table with 50,000 of them, in any order."""
    (rows,) = weights([(size // 512, 512)], dtype, device)
    numbers = torch.randint(0, 50_000, (len(rows),), device=device)
    name = op_name("perturb_rows_", dist)
    call = lambda: hk.perturb_rows_(rows, numbers, 1, SCALE, dist=dist)  # noqa: E731
    timed(benchmark, call, name, f"{size:,}", dtype, rows.nbytes, device)


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_replay(benchmark: Any, kind: tuple[str, str, bool], device: str, size: int) -> None:
    dtype, dist, stochastic = kind
    (x,), (seeds, coefficients) = weights([(size,)], dtype, device), record_tensors(RECORDS)
    how: dict[str, Any] = {"rounding": "stochastic", "rounding_seeds": seeds} if stochastic else {}
    name, of = op_name(f"replay_ {RECORDS}", dist, stochastic), f"{size:,} by {RECORDS} records"
    timed(benchmark, lambda: hk.replay_(x, seeds, coefficients, dist=dist, **how), name, of, dtype, x.nbytes, device)


@pytest.mark.parametrize("dist", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_project(benchmark: Any, dtype: str, dist: str, device: str, size: int) -> None:
    (x,), (seeds, _) = weights([(size,)], dtype, device), record_tensors(RECORDS)
    name, of = op_name(f"project {RECORDS}", dist), f"{size:,} by {RECORDS} records"
    timed(benchmark, lambda: hk.project(x, seeds, dist=dist), name, of, dtype, x.nbytes, device)


@pytest.mark.parametrize("dist", DISTRIBUTIONS)
@pytest.mark.parametrize("rule", [hk.SGD(), hk.SGD(momentum=0.9), hk.AdamW()], ids=["sgd", "momentum", "adamw"])
def test_update(benchmark: Any, rule: hk.SGD | hk.AdamW, dist: str, device: str, size: int) -> None:
    (x,) = weights([(size,)], "float32", device)
    moments = [[torch.zeros_like(x)] for _ in range(rule.moments)]
    seeds, coefficients = torch.arange(DIRECTIONS).reshape(1, -1), torch.full((1, DIRECTIONS), SCALE)
    steps = rule.steps([0], [SCALE])
    name, of = op_name(f"update_ {rule.name}", dist), f"{size:,} by a round of {DIRECTIONS}"
    timed(
        benchmark,
        lambda: hk.update_([x], moments, rule, seeds, coefficients, steps, dist=dist),
        name,
        of,
        "float32",
        x.nbytes,
        device,
    )


# --- lists of tensors with models' shapes ---------------------------------------------------------------------------


def test_list_roof(benchmark: Any, device: str, model: str) -> None:
    """Time the roof of two bytes; that of four, and torch's for bfloat16, are in test_list."""
    tensors = [torch.zeros(shape, dtype=torch.int16, device=device) for shape in LISTS[model]()]
    nbytes = sum(x.nbytes for x in tensors)
    timed(benchmark, lambda: torch._foreach_add_(tensors, 1), LIST_ROOF, f"list {model}", "int16", nbytes, device)


@pytest.mark.parametrize("way", LIST_CONTENDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_list(benchmark: Any, way: str, dtype: str, device: str, model: str) -> None:
    shapes = LISTS[model]()
    tensors, call = weights(shapes, dtype, device), LIST_CONTENDERS[way]
    nbytes = sum(map(math.prod, shapes)) * DTYPES[dtype].itemsize
    timed(benchmark, lambda: call(tensors), way, f"list {model}", dtype, nbytes, device)
