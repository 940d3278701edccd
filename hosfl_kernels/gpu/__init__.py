"""The Triton backend: kernels for CUDA, and for CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).

Imports without triton and without a GPU; calls then raise RuntimeError. Arguments are validated by ops.py.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _launch() -> Any:
    """The module launch, imported at the first call: it needs triton, which takes a second to import."""
    try:
        return importlib.import_module(".launch", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise RuntimeError("the Triton backend needs the package triton") from error


def describe() -> str | None:
    """What this backend runs on, or None if it cannot run here."""
    try:
        launch = _launch()
    except RuntimeError:
        return None
    if launch.INTERPRETED:
        return "interpreter"
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"cuda sm_{major}{minor} ({torch.cuda.get_device_name()})"


def _on_device(launch: Any, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context to launch in, for tensors of `device`; refuses tensors that the kernels can't reach."""
    if launch.INTERPRETED:
        if device.type != "cpu":
            raise RuntimeError(f"TRITON_INTERPRET=1: the Triton backend takes CPU tensors, not {device}")
        return contextlib.nullcontext()
    if device.type != "cuda":
        raise RuntimeError(f"the Triton backend takes CUDA tensors (or CPU tensors, TRITON_INTERPRET=1), not {device}")
    return torch.cuda.device(device)


def philox_words(key: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Four words, as spec.py's `philox` makes them."""
    launch = _launch()
    out = torch.empty(4, dtype=torch.int32, device="cpu" if launch.INTERPRETED else "cuda")
    with _on_device(launch, out.device):
        launch.philox_words[(1,)](out, key, *counter)
    return tuple(word & 0xFFFFFFFF for word in out.tolist())


def noise_(out: Tensor, seed: int, stream: int, start: int, dist: str) -> None:
    """Fill the float32 tensor `out` with elements start .. start + n of the noise of (seed, stream)."""
    launch = _launch()
    with _on_device(launch, out.device):
        if n := out.numel():
            variant = launch.noise_variant(dist)
            variant.launch(variant.programs(n, start), out.data_ptr(), n, start, stream, seed)


def perturb_(
    tensors: Sequence[Tensor],
    seed: int,
    scale: float,
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
    rounding_seed: int | None,
) -> None:
    """x += scale * factor * z(seed) for every tensor, one launch per dtype."""
    if not tensors:
        return
    launch = _launch()
    with _on_device(launch, tensors[0].device):
        scale_bits = int(launch.float_bits(scale))
        stochastic = rounding_seed is not None
        for run in _plan(launch, launch.perturb_variant, tensors, dist, factors, streams, starts, stochastic):
            run(seed, scale_bits, rounding_seed or 0)


def replay_(
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
    rounding_seeds: Sequence[int] | None,
) -> None:
    """perturb_ once for every record, in one pass over the tensors and to the same bits. Not for CUDA graphs."""
    if not tensors or not seeds:
        return
    launch = _launch()
    device = tensors[0].device
    with _on_device(launch, device):
        records = launch.record_table(seeds, coefficients, rounding_seeds, device)
        stochastic = rounding_seeds is not None
        for run in _plan(launch, launch.replay_variant, tensors, dist, factors, streams, starts, stochastic):
            run(records, len(seeds))


def update_(
    tensors: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    rule: str,
    constants: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
    rounding_seeds: Sequence[int] | None,
) -> None:
    """len(steps) rounds of an update rule in one pass over weights and moments. Not for CUDA graphs."""
    if not tensors or not steps:
        return
    launch = _launch()
    device = tensors[0].device
    with _on_device(launch, device):
        records = launch.round_table(constants, seeds, coefficients, steps, rounding_seeds, device)
        variant_of, stochastic = launch.update_variant_of(rule), rounding_seeds is not None
        for run in _plan(launch, variant_of, tensors, dist, factors, streams, starts, stochastic, moments):
            run(records, len(steps), len(seeds) // len(steps))


SUMS = 1 << 23  # of tiles, kept at a time: 64 MB


def project(
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
) -> Tensor:
    """<tensors, z(seed)> for every seed, in one pass over the tensors for as many seeds as keep a tile's sums in SUMS.

    The result is on the CPU: the call waits for the device. Not for CUDA graphs.
    """
    if not tensors or not seeds:
        return torch.zeros(len(seeds), dtype=torch.float64, device="cpu")
    launch = _launch()
    device = tensors[0].device
    with _on_device(launch, device):
        scalars = torch.zeros(len(seeds), dtype=torch.float64, device=device)
        table = launch.seed_table(seeds, device)
        for run in _plan(launch, launch.project_variant, tensors, dist, factors, streams, starts, False):
            programs = len(run.row_of_program)
            for some, mine in zip(*(t.split(max(SUMS // programs, 1)) for t in (table, scalars)), strict=True):
                sums = torch.zeros(len(some), programs, dtype=torch.float64, device=device)
                run(some, len(some), sums.data_ptr())
                mine += sums.sum(1)
        return scalars.cpu()


def _plan(
    launch: Any,
    variant_of: Any,
    tensors: Sequence[Tensor],
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
    stochastic: bool,
    moments: Sequence[Sequence[Tensor]] = (),
) -> Any:
    launches = launch.plan(
        variant_of,
        dist,
        stochastic,
        tensors[0].device,
        tuple([x.dtype for x in tensors]),
        tuple([x.data_ptr() for x in tensors]),
        tuple([x.numel() for x in tensors]),
        tuple(starts),
        tuple(streams),
        tuple(factors),
        tuple([tuple([x.data_ptr() for x in kept]) for kept in moments]),
    )
    if launch.capturing(tensors[0].device):
        launch.captured.append(launches)
    return launches
