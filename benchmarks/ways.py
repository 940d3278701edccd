"""The ways to move weights along noise, and to measure along it: ours, the roof, and the peers' own lines."""

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
class Way:
    """One way. `move(x)` changes x in place (or rebinds x.data, where the peer does), or only measures it."""

    group: str
    name: str
    move: Callable[[Tensor], object]


def randn_add(x: Tensor) -> None:
    x.add_(torch.randn_like(x), alpha=SCALE)


def mezo(x: Tensor) -> None:
    """MeZO's perturbation, as in its trainer: a normal tensor, a product, a sum, and a new tensor in .data.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023.
    """
    z = torch.normal(mean=0, std=1, size=x.size(), device=x.device, dtype=x.dtype)
    x.data = x.data + 1 * z * SCALE


def mezo_list(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        mezo(x)


def decomfl(tensors: Sequence[Tensor]) -> None:
    """DeComFL's way: the whole perturbation is there before it is added.

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


def projected(dist: str) -> Callable[[Tensor], object]:
    seeds = list(range(RECORDS))
    return lambda x: hk.project(x, seeds, dist=dist)


def replayed(dist: str) -> Callable[[Tensor], None]:
    seeds, coefficients = list(range(RECORDS)), [SCALE] * RECORDS
    return lambda x: hk.replay_(x, seeds, coefficients, dist=dist)


def waiting(call: Callable[[], object], device: str) -> Callable[[], None]:
    """The call, and the end of what it started on a GPU."""

    def waited() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return waited


def seeds_of(records: int) -> tuple[Tensor, Tensor]:
    return torch.arange(records), torch.full((records,), SCALE)


def called(op: str, dist: str, stochastic: bool = False) -> str:
    return f"hosfl {op} {dist}{', stochastic rounding' if stochastic else ''}"


def with_isa(isa: str, move: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """The same, by the C++ kernels for another instruction set of this processor."""

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
WAYS = [
    Way("perturb", ROOF, lambda x: x.add_(SCALE)),
    Way("perturb", "hosfl Rademacher", lambda x: hk.perturb_(x, 1, SCALE)),
    Way("perturb", "hosfl Gaussian", lambda x: hk.perturb_(x, 1, SCALE, dist="gaussian")),
    Way("perturb", "torch.randn + add_", randn_add),
    Way("perturb", MEZO, mezo),
    Way(f"replay {RECORDS}", "hosfl Rademacher", replayed("rademacher")),
    Way(f"replay {RECORDS}", "hosfl Gaussian", replayed("gaussian")),
    Way(f"replay {RECORDS}", RANDN_RECORDS, randn_records),
    Way(f"project {RECORDS}", "hosfl Rademacher", projected("rademacher")),
    Way(f"project {RECORDS}", "hosfl Gaussian", projected("gaussian")),
    Way(f"project {RECORDS}", RANDN_PRODUCTS, randn_products),
]
BFLOAT16 = [
    Way("perturb bfloat16", ROOF, lambda x: x.add_(SCALE)),
    Way("perturb bfloat16", "hosfl Rademacher", lambda x: hk.perturb_(x, 1, SCALE)),
    Way(
        "perturb bfloat16",
        "hosfl Rademacher, stochastic rounding",
        lambda x: hk.perturb_(x, 1, SCALE, rounding="stochastic", rounding_seed=2),
    ),
    Way("perturb bfloat16", MEZO, mezo),
]
FLOAT16 = [
    Way("perturb float16", ROOF, lambda x: x.add_(SCALE)),
    Way("perturb float16", "hosfl Rademacher", lambda x: hk.perturb_(x, 1, SCALE)),
    Way("perturb float16", "hosfl Gaussian", lambda x: hk.perturb_(x, 1, SCALE, dist="gaussian")),
    Way("perturb float16", MEZO, mezo),
]
# Of a processor that has better ones.
OLDER = [
    Way("perturb", f"hosfl {name} by {isa} alone", with_isa(isa, partial(hk.perturb_, seed=1, scale=SCALE, dist=dist)))
    for isa in ("avx2",)
    if isa in _cpp.supported()[:-1]
    for name, dist in (("Rademacher", "rademacher"), ("Gaussian", "gaussian"))
]


def _with_lists() -> dict[str, Callable[[list[Tensor]], object]]:
    seeds, coefficients = seeds_of(DIRECTIONS)
    ours: dict[str, Callable[[list[Tensor]], object]] = {}
    for dist in DISTRIBUTIONS:
        ours[called("perturb_", dist)] = partial(hk.perturb_, seed=1, scale=SCALE, dist=dist)
        replay = partial(hk.replay_, seeds=seeds, coefficients=coefficients, dist=dist)
        ours[called(f"replay_ {DIRECTIONS}", dist)] = replay
        ours[called(f"project {DIRECTIONS}", dist)] = partial(hk.project, seeds=seeds, dist=dist)
    return {LIST_ROOF: lambda tensors: torch._foreach_add_(tensors, SCALE), MEZO: mezo_list, DECOMFL: decomfl, **ours}


LIST_WAYS = _with_lists()
