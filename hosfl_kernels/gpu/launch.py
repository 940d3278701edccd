"""Which kernel variant serves a call, with which constants and options; and the tables that the kernels read.

offline.py compiles what stands here, so that tests without a GPU look at the kernels that a GPU runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from hosfl_kernels import spec

from .noise import noise
from .perturb import perturb
from .philox import philox_words as philox_words
from .projection import project
from .replay import replay
from .tile import FIELDS
from .update import CONSTANTS, STEP, TRITON, update

# The interpreter is chosen when triton decorates a kernel, by TRITON_INTERPRET.
INTERPRETED = not isinstance(perturb, triton.runtime.JITFunction)

if INTERPRETED and TRITON < (3, 7):
    # `range(n)` in a kernel is int() of an array [1], which numpy refuses from 2.4 on; Triton 3.7 asks for its element.
    from triton.runtime import interpreter

    def _patch_tensor(tensor: Any, *scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = _patch_tensor

# bfloat16 is loaded and stored as integers: see rounding.py.
CELLS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.uint16}

# Fusion would round a product and a sum once instead of twice; nothing here is worth pipelining through shared memory.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


class Variant(NamedTuple):
    """A kernel with its compile-time constants and its number of warps."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int

    def programs(self, n: int, start: int) -> int:
        """One per tile; tiles are aligned to the blocks of the noise and fill whole rows."""
        span = self.constants["BLOCKS"] * self.constants["INNER"] * spec.COLS
        return (start % span + n + span - 1) // span * (spec.COLS // self.constants["WIDTH"])

    def launch(self, programs: int, *arguments: Any) -> None:
        self.kernel[(programs,)](*arguments, **self.constants, num_warps=self.num_warps, **OPTIONS)


def _inner(dist: str) -> int:
    """Rows that share their words: a program's loop takes so many at a time, all loaded before the first is used."""
    return {"rademacher": spec.ROUNDING_ROWS, "gaussian": spec.GAUSSIAN_ROWS}[dist]


@functools.cache
def noise_variant(dist: str) -> Variant:
    return Variant(noise, {"DIST": dist, "BLOCKS": 2, "INNER": _inner(dist), "WIDTH": 512}, num_warps=4)


@functools.cache
def perturb_variant(dtype: torch.dtype, dist: str, stochastic: bool) -> Variant:
    """Tiles of 512 columns, 16 bytes of each row to a thread.

    16 rows of signs spread a Philox call thin enough; 128 would leave most of a GPU idle on a tensor of a million.
    """
    constants = {"CELL": CELLS[dtype], "DIST": dist, "STOCHASTIC": stochastic and dtype == torch.bfloat16}
    constants |= {"BLOCKS": 2, "INNER": _inner(dist), "WIDTH": 512}
    return Variant(perturb, constants, num_warps=512 * dtype.itemsize // (16 * 32))


@functools.cache
def replay_variant(dtype: torch.dtype, dist: str, stochastic: bool) -> Variant:
    """Tiles of 128 columns, one to a thread: 64 rows of signs or 16 of normal numbers in registers."""
    constants = {"CELL": CELLS[dtype], "DIST": dist, "STOCHASTIC": stochastic and dtype == torch.bfloat16}
    constants |= {"BLOCKS": {"rademacher": 8, "gaussian": 4}[dist], "INNER": _inner(dist), "WIDTH": 128}
    return Variant(replay, constants, num_warps=4)


@functools.cache
def project_variant(dtype: torch.dtype, dist: str, stochastic: bool = False) -> Variant:
    """Tiles as replay has them; nothing is rounded to storage."""
    constants = {"CELL": CELLS[dtype], "DIST": dist}
    constants |= {"BLOCKS": {"rademacher": 8, "gaussian": 4}[dist], "INNER": _inner(dist), "WIDTH": 128}
    return Variant(project, constants, num_warps=4)


RULES = ("sgd", "momentum", "adamw")


def update_variant(rule: str, dtype: torch.dtype, dist: str, stochastic: bool) -> Variant:
    """Tiles of 128 columns, one to a thread: as many rows as fit into registers with their moments and sums."""
    constants = {"RULE": rule, "CELL": CELLS[dtype], "DIST": dist}
    constants |= {"STOCHASTIC": stochastic and dtype == torch.bfloat16}
    blocks = 2 if rule == "adamw" and dist == "rademacher" else 4
    constants |= {"BLOCKS": blocks, "INNER": _inner(dist), "WIDTH": 128}
    return Variant(update, constants, num_warps=4)


@functools.cache
def update_variant_of(rule: str) -> Callable[[torch.dtype, str, bool], Variant]:
    """The same function at every call: `plan` remembers by it."""
    return functools.cache(functools.partial(update_variant, rule))


def variants() -> dict[str, Variant]:
    """Every variant that a call can reach, by name."""
    found = {}
    for dist in ("rademacher", "gaussian"):
        found[f"noise-{dist}"] = noise_variant(dist)
        for dtype in CELLS:
            found[f"project-{dist}-{str(dtype).removeprefix('torch.')}"] = project_variant(dtype, dist)
            for stochastic in (False, True) if dtype == torch.bfloat16 else (False,):
                name = f"{dist}-{str(dtype).removeprefix('torch.')}{'-stochastic' if stochastic else ''}"
                found[f"perturb-{name}"] = perturb_variant(dtype, dist, stochastic)
                found[f"replay-{name}"] = replay_variant(dtype, dist, stochastic)
                for rule in RULES:
                    found[f"update-{rule}-{name}"] = update_variant(rule, dtype, dist, stochastic)
    return found


def float_bits(values: Any) -> np.ndarray:
    """float32 values as int32: how they travel in tables and arguments."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32).view(np.int32)


class Launch(NamedTuple):
    """One launch for the tensors of one dtype: rows of int64 and every program's row (int64), on the device.

    A row: address, elements, start, stream, bits of the float32 factor, number of the tensor's first program, and the
    addresses of up to two moments.
    A program reads which row is its own instead of searching: 8 bytes beside the 4 KB of its tile or more.
    """

    variant: Variant
    rows: torch.Tensor
    row_of_program: torch.Tensor

    def __call__(self, *arguments: Any) -> None:
        self.variant.launch(len(self.row_of_program), self.rows, self.row_of_program, *arguments)


@functools.lru_cache(maxsize=32)
def plan(
    variant_of: Callable[[torch.dtype, str, bool], Variant],
    dist: str,
    stochastic: bool,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    addresses: tuple[int, ...],
    sizes: tuple[int, ...],
    starts: tuple[int, ...],
    streams: tuple[int, ...],
    factors: tuple[float, ...],
    moments: tuple[tuple[int, ...], ...],
) -> list[Launch]:
    """The launches for a list of tensors. Addresses are part of the key: `.data` may be rebound at any time."""
    if capturing(device):
        raise RuntimeError("a CUDA graph can't capture the first call with these tensors: make it once before")
    launches = []
    for dtype in CELLS:
        mine = [i for i, n in enumerate(sizes) if n and dtypes[i] == dtype]
        if not mine:
            continue
        variant = variant_of(dtype, dist, stochastic)
        rows = np.zeros((len(mine), FIELDS.value), np.int64)
        for field, column in enumerate((addresses, sizes, starts, streams, float_bits(factors))):
            rows[:, field] = [column[i] for i in mine]
        programs = np.array([variant.programs(sizes[i], starts[i]) for i in mine])
        rows[:, 5] = np.cumsum(programs) - programs
        for k, kept in enumerate(moments):
            rows[:, 6 + k] = [kept[i] for i in mine]
        row_of_program = np.repeat(np.arange(len(mine), dtype=np.int64), programs)
        launches.append(Launch(variant, torch.from_numpy(rows).to(device), torch.from_numpy(row_of_program).to(device)))
    return launches


def record_table(
    seeds: Sequence[int], coefficients: Sequence[float], rounding_seeds: Sequence[int] | None, device: torch.device
) -> torch.Tensor:
    """Rows of int64: seed, bits of the float32 coefficient, rounding seed."""
    rows = np.empty((len(seeds), 3), np.int64)
    rows[:, 0] = np.array(seeds, np.uint64).view(np.int64)
    rows[:, 1] = float_bits(coefficients)
    rows[:, 2] = 0 if rounding_seeds is None else np.array(rounding_seeds, np.uint64).view(np.int64)
    return _on_device(rows, "replay_", device)


def seed_table(seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64: the bits of the seeds."""
    return _on_device(np.array(seeds, np.uint64).view(np.int64), "project", device)


def round_table(
    constants: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    rounding_seeds: Sequence[int] | None,
    device: torch.device,
) -> torch.Tensor:
    """int64, as update.py reads it: the rule's constants, then the rounds."""
    rounds, header = len(steps), np.zeros(CONSTANTS.value, np.int64)
    header[: len(constants)] = float_bits(constants)
    rows = np.empty((rounds, STEP.value + 2 * (len(seeds) // rounds)), np.int64)
    rows[:, :3] = float_bits(steps)
    rows[:, 3] = 0 if rounding_seeds is None else np.array(rounding_seeds, np.uint64).view(np.int64)
    rows[:, STEP.value :: 2] = np.array(seeds, np.uint64).view(np.int64).reshape(rounds, -1)
    rows[:, STEP.value + 1 :: 2] = float_bits(coefficients).reshape(rounds, -1)
    return _on_device(np.concatenate([header, rows.ravel()]), "update_", device)


def _on_device(table: np.ndarray, op: str, device: torch.device) -> torch.Tensor:
    if capturing(device):
        raise RuntimeError(f"a CUDA graph can't capture {op}: its records are copied to the device at the call")
    tensor = torch.from_numpy(table)
    # From pinned memory the host doesn't wait for the device to catch up.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# A captured graph reads its tables at every replay, also after `plan` has forgotten them.
captured: list[list[Launch]] = []
