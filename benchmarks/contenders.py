"""The implementations that the benchmarks compare: our kernels, the roof (plain memory traffic), the peers' code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import hosfl_kernels as hk
from hosfl_kernels import _cpp
from hosfl_kernels.place import DISTRIBUTIONS

SCALE = 1e-3
RECORDS, DIRECTIONS = 64, 5


@dataclass(frozen=True)
class Contender:
    """An implementation to time. `move(x)` changes x in place, rebinds x.data as MeZO does, or only reads x."""

    group: str
    name: str
    move: Callable[[Tensor], object]


def randn_add(x: Tensor) -> None:
    x.add_(torch.randn_like(x), alpha=SCALE)


def mezo(x: Tensor) -> None:
    """MeZO's perturbation, as in its trainer: a normal tensor, a product, a sum, and a new tensor as .data.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023.
    """
    z = torch.normal(mean=0, std=1, size=x.size(), device=x.device, dtype=x.dtype)
    x.data = x.data + 1 * z * SCALE


def mezo_list(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        mezo(x)


def decomfl(tensors: Sequence[Tensor]) -> None:
    """DeComFL's perturbation, which is generated as a whole before any of it is added.

    Source: Li et al., "Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order Optimization",
    ICLR 2025, arXiv 2405.15861.
    """
    perturbations = [torch.randn(x.shape, device=x.device, dtype=x.dtype) for x in tensors]
    for x, z in zip(tensors, perturbations, strict=True):
        x.add_(z, alpha=SCALE)


def randn_records(x: Tensor) -> None:
    for _ in range(RECORDS):
        randn_add(x)


def randn_products(x: Tensor) -> list[Tensor]:
    return [torch.dot(x, torch.randn_like(x)) for _ in range(RECORDS)]


def project_with(dist: str) -> Callable[[Tensor], object]:
    seeds = list(range(RECORDS))
    return lambda x: hk.project(x, seeds, dist=dist)


def replay_with(dist: str) -> Callable[[Tensor], None]:
    seeds, coefficients = list(range(RECORDS)), [SCALE] * RECORDS
    return lambda x: hk.replay_(x, seeds, coefficients, dist=dist)


def synchronized(call: Callable[[], object], device: str) -> Callable[[], None]:
    """Return a function that makes the call and, on a GPU, waits for all that it started."""

    def call_and_wait() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return call_and_wait


def record_tensors(records: int) -> tuple[Tensor, Tensor]:
    return torch.arange(records), torch.full((records,), SCALE)


def op_name(op: str, dist: str, stochastic: bool = False) -> str:
    return f"hosfl {op} {dist}{', stochastic rounding' if stochastic else ''}"


def with_isa(isa: str, move: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """Return `move` with the C++ kernels for another instruction set of this processor."""

    def moved(x: Tensor) -> None:
        best = _cpp.isa()
        _cpp.use_isa(isa)
        try:
            move(x)
        finally:
            _cpp.use_isa(best)

    return moved


ROOF, LIST_ROOF = "add_ a constant (the roof)", "torch._foreach_add_ (the roof)"
MEZO, DECOMFL, RANDN = "MeZO's way", "DeComFL's way", "torch.randn"
RANDN_RECORDS = f"{RECORDS} x (torch.randn + add_)"
RANDN_PRODUCTS = f"{RECORDS} x (torch.randn + dot)"
CONTENDERS = [
    Contender("perturb", ROOF, lambda x: x.add_(SCALE)),
    Contender("perturb", "hosfl Rademacher", lambda x: hk.perturb_(x, 1, SCALE)),
    Contender("perturb", "hosfl Gaussian", lambda x: hk.perturb_(x, 1, SCALE, dist="gaussian")),
    Contender("perturb", "torch.randn + add_", randn_add),
    Contender("perturb", MEZO, mezo),
    Contender(f"replay {RECORDS}", "hosfl Rademacher", replay_with("rademacher")),
    Contender(f"replay {RECORDS}", "hosfl Gaussian", replay_with("gaussian")),
    Contender(f"replay {RECORDS}", RANDN_RECORDS, randn_records),
    Contender(f"project {RECORDS}", "hosfl Rademacher", project_with("rademacher")),
    Contender(f"project {RECORDS}", "hosfl Gaussian", project_with("gaussian")),
    Contender(f"project {RECORDS}", RANDN_PRODUCTS, randn_products),
]
BFLOAT16 = [
    Contender("perturb bfloat16", ROOF, lambda x: x.add_(SCALE)),
    Contender("perturb bfloat16", "hosfl Rademacher", lambda x: hk.perturb_(x, 1, SCALE)),
    Contender(
        "perturb bfloat16",
        "hosfl Rademacher, stochastic rounding",
        lambda x: hk.perturb_(x, 1, SCALE, rounding="stochastic", rounding_seed=2),
    ),
    Contender("perturb bfloat16", MEZO, mezo),
]
FLOAT16 = [
    Contender("perturb float16", ROOF, lambda x: x.add_(SCALE)),
    Contender("perturb float16", "hosfl Rademacher", lambda x: hk.perturb_(x, 1, SCALE)),
    Contender("perturb float16", "hosfl Gaussian", lambda x: hk.perturb_(x, 1, SCALE, dist="gaussian")),
    Contender("perturb float16", MEZO, mezo),
]
# torch converts float16 and bfloat16 to add to them: whole numbers show what memory allows two bytes.
INT16 = [Contender("perturb int16", ROOF, lambda x: x.add_(1))]
# For processors that have a newer instruction set: the kernels for an older one.
OLDER_ISAS = [
    Contender(
        "perturb", f"hosfl {name} by {isa} alone", with_isa(isa, partial(hk.perturb_, seed=1, scale=SCALE, dist=dist))
    )
    for isa in ("avx2",)
    if isa in _cpp.supported()[:-1]
    for name, dist in (("Rademacher", "rademacher"), ("Gaussian", "gaussian"))
]


def _list_contenders() -> dict[str, Callable[[list[Tensor]], object]]:
    seeds, coefficients = record_tensors(DIRECTIONS)
    ours: dict[str, Callable[[list[Tensor]], object]] = {}
    for dist in DISTRIBUTIONS:
        ours[op_name("perturb_", dist)] = partial(hk.perturb_, seed=1, scale=SCALE, dist=dist)
        replay = partial(hk.replay_, seeds=seeds, coefficients=coefficients, dist=dist)
        ours[op_name(f"replay_ {DIRECTIONS}", dist)] = replay
        ours[op_name(f"project {DIRECTIONS}", dist)] = partial(hk.project, seeds=seeds, dist=dist)
    return {LIST_ROOF: lambda tensors: torch._foreach_add_(tensors, SCALE), MEZO: mezo_list, DECOMFL: decomfl, **ours}


LIST_CONTENDERS = _list_contenders()
