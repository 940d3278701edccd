"""Launching kernels: variants with their constants and options, and the tables that assign tiles to programs.

Each op's kernel and variants are in the op's own module.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from hosfl_kernels import spec, transfer
from hosfl_kernels.ops import MAX_CACHED_LISTS
from hosfl_kernels.place import DISTRIBUTIONS, Place

from . import choices
from .choices import Shape
from .philox import words
from .tile import FIELDS

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

# TRITON_INTERPRET selects the interpreter when triton decorates a kernel.
INTERPRETED = not isinstance(words, triton.runtime.JITFunction)

if INTERPRETED and TRITON < (3, 7):
    # `range(n)` in a kernel calls int() on an array [1], which numpy refuses from 2.4 on. Triton 3.7 reads its element.
    from triton.runtime import interpreter

    def _patch_tensor(tensor: Any, *scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = _patch_tensor

# bfloat16 is loaded and stored as integers: see rounding.py.
CELLS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.uint16}

# Fusion would round a product and a sum once instead of twice. No loop gains from pipelining through shared memory.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


class Variant(NamedTuple):
    """A kernel with its compile-time constants and its number of warps."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int

    def programs(self, n: int, start: int) -> int:
        """The number of programs, one per tile, for n elements from `start` on. Tiles are aligned to noise blocks."""
        span = self.constants["BLOCKS"] * self.constants["INNER"] * spec.COLS
        return (start % span + n + span - 1) // span * (spec.COLS // self.constants["WIDTH"])

    def launch(self, programs: int, *arguments: Any) -> None:
        """Launch the kernel with this number of programs."""
        self.kernel[(programs,)](*arguments, **self.constants, num_warps=self.num_warps, **OPTIONS)

    def compile(self, *arguments: Any) -> Any:
        """Compile as a launch with these arguments would; None in the interpreter."""
        options = {**self.constants, "num_warps": self.num_warps, **OPTIONS}
        return None if INTERPRETED else self.kernel.run(*arguments, grid=(1,), warmup=True, **options)

    def spills(self, *arguments: Any) -> int:
        """The number of 32-bit registers that a thread spills to memory, by the driver; 0 in the interpreter."""
        if (compiled := self.compile(*arguments)) is None:
            return 0
        compiled._init_handles()  # as in Triton's tutorials: loads the kernel, after which the driver knows the number
        return compiled.n_spills


def inner(dist: str) -> int:
    """The number of rows that share their random words; a program's loop loads them together."""
    return {"rademacher": spec.ROUNDING_ROWS, "gaussian": spec.GAUSSIAN_ROWS}[dist]


class Kind(NamedTuple):
    """The kind of tensors and noise of a variant: dtype, distribution, and stochastic rounding (bfloat16 only)."""

    dtype: torch.dtype
    dist: str
    stochastic: bool = False

    def __str__(self) -> str:
        name = f"{self.dist}-{str(self.dtype).removeprefix('torch.')}"
        return f"{name}-stochastic" if self.stochastic else name


KINDS = tuple(
    Kind(dtype, dist, stochastic)
    for dist in DISTRIBUTIONS
    for dtype in CELLS
    for stochastic in ((False, True) if dtype == torch.bfloat16 else (False,))
)


def tile_constants(kind: Kind, shape: Shape) -> dict[str, int]:
    """The compile-time constants of a kernel that describe its tile."""
    return {"BLOCKS": shape.blocks, "INNER": inner(kind.dist), "WIDTH": shape.width}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel of an op, with a variant for every kind of tensors and shape. `plan` caches by its identity.

    Attributes:
        name: its name in choices.json, before the kind.
        variant: returns the variant, the same object for the same arguments.
        default: the shape for a kind if choices.json has none.
        wide: whether a thread accesses 16 bytes of every row of a tile; otherwise it has one column or more.
        kinds: the kinds that it is compiled for.
    """

    name: str
    variant: Callable[[Kind, Shape], Variant]
    default: Callable[[Kind], Shape]
    wide: bool = False
    kinds: Sequence[Kind] = KINDS

    def variant_for(self, kind: Kind, elements: int, device: torch.device) -> Variant:
        """The variant for a launch over tensors with this total number of elements."""
        shapes = (
            choices.shapes_for(capability(device), choices.size_of(elements))
            if _shape_override is None
            else _shape_override
        )
        return self.variant(kind, shapes.get(f"{self.name}-{kind}") or self.default(kind))

    def impossible_reason(self, kind: Kind, shape: Shape) -> str | None:
        """Why the kernel can't have this shape; None if it can."""
        if any(type(x) is not int or x < 1 or x & (x - 1) for x in shape):
            return "each number is a power of two"
        if (rows := shape.blocks * inner(kind.dist)) > spec.RADEMACHER_ROWS:
            return f"{rows} rows; the words of a program's signs are those of {spec.RADEMACHER_ROWS}"
        if shape.width > spec.COLS:
            return f"{shape.width} columns; a row has {spec.COLS}"
        columns = 16 // kind.dtype.itemsize if self.wide else 1
        if (least := 32 * shape.num_warps * columns) > shape.width:
            return f"its threads want {columns} columns each, {least} in all"
        return None


_shape_override: Mapping[str, Shape] | None = None


@contextlib.contextmanager
def override_shapes(shapes: Mapping[str, Shape]) -> Iterator[None]:
    """Context manager: launches of any size take these shapes, or else their defaults. For checks and timings."""
    global _shape_override
    before, _shape_override = _shape_override, shapes
    cached_launches.cache_clear()
    try:
        yield
    finally:
        _shape_override = before
        cached_launches.cache_clear()


def capability(device: torch.device) -> int | None:
    """The compute capability, 90 for sm_90. None in the interpreter and on AMD."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def float_bits(values: Any) -> np.ndarray:
    """Round values to float32, and return the bits as int32, as in tables and arguments."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32).view(np.int32)


def float_bits_on_device(values: torch.Tensor) -> torch.Tensor:
    """The bits of a float32 tensor as int64, on its device."""
    return values.view(torch.int32).to(torch.int64)


class Launch(NamedTuple):
    """One launch for the tensors of one dtype, with its tables on the device.

    rows: int64, one row per tensor: address, elements, start, stream, bits of the float32 factor, number of the
    tensor's first program, and the addresses of up to two moments. row_of_program: int32, the row of each program's
    tensor. Reading it costs 4 bytes beside the tile's 4 KB or more, and saves a search.
    """

    variant: Variant
    rows: torch.Tensor
    row_of_program: torch.Tensor

    def __call__(self, *arguments: Any) -> None:
        self.variant.launch(len(self.row_of_program), self.rows, self.row_of_program, *arguments)

    def compile(self, *arguments: Any) -> None:
        """Compile the kernel for a call with these arguments, unless that was done before."""
        if (key := (id(self.variant), self.rows.device)) not in _compiled:
            self.variant.compile(self.rows, self.row_of_program, *arguments)
            _compiled.add(key)


_compiled: set[tuple[int, torch.device]] = set()


def run(launches: Sequence[Launch], *arguments: Any) -> None:
    """Compile all launches, then run them: a failed compilation must not leave some of the tensors changed."""
    if len(launches) > 1:
        for launch in launches:
            launch.compile(*arguments)
    for launch in launches:
        launch(*arguments)


class Launches(list[Launch]):
    """The launches for one list of tensors. A subclass, because a plain list does not support weak references."""


def plan(
    kernel: Kernel,
    tensors: Sequence[torch.Tensor],
    place: Place,
    stochastic: bool = False,
    moments: Sequence[Sequence[torch.Tensor]] = (),
) -> Launches:
    """Return the launches for a list of tensors, cached.

    Each stream has its own tables, which it alone fills and reads. A CUDA graph is captured on another stream. It uses
    the tables of any stream, since it is replayed after the call that made them; they are kept for it.
    """
    device = tensors[0].device
    key = (
        kernel,
        Place(place.dist, tuple(place.factors), tuple(place.streams), tuple(place.starts)),
        stochastic,
        device,
        tuple([x.dtype for x in tensors]),
        tuple([x.data_ptr() for x in tensors]),
        tuple([x.numel() for x in tensors]),
        tuple([tuple([x.data_ptr() for x in moment]) for moment in moments]),
    )
    if transfer.is_capturing(device):
        if key not in captured_launches:
            captured_launches[key] = _live_launches_of(key)
        return captured_launches[key]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return cached_launches(stream, *key)


def _live_launches_of(key: tuple[Any, ...]) -> Launches:
    """Return existing launches of any stream. Raises RuntimeError if there are none."""
    if key not in live_launches:  # also if the cache has evicted them: see `cached_launches`
        raise RuntimeError("a CUDA graph can't capture the first call with these tensors: make it once right before")
    return live_launches[key]


# The existing launches by the cache's key without the stream.
live_launches: weakref.WeakValueDictionary[tuple[Any, ...], Launches] = weakref.WeakValueDictionary()


_table_bytes = 0  # bytes of the tables made since the cache was last empty


def table_budget(device: torch.device) -> int:
    """The limit for the bytes of cached tables.

    The tables of a list take a thousandth of its tensors' memory, or 1 KB. Without a limit they would grow to the size
    of the tensors themselves if lists have new addresses in every call.
    """
    return torch.cuda.get_device_properties(device).total_memory // 64 if device.type == "cuda" else 2**26


@functools.lru_cache(maxsize=MAX_CACHED_LISTS)
def cached_launches(
    stream: int,
    kernel: Kernel,
    place: Place,
    stochastic: bool,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    addresses: tuple[int, ...],
    sizes: tuple[int, ...],
    moments: tuple[tuple[int, ...], ...],
) -> Launches:
    """`plan`, cached by its key. Addresses are part of the key: `.data` may be rebound at any time.

    The cache is cleared when its tables exceed `table_budget`.
    """
    global _table_bytes
    launches = Launches()
    for dtype in CELLS:
        members = [i for i, n in enumerate(sizes) if n and dtypes[i] == dtype]
        if not members:
            continue
        kind = Kind(dtype, place.dist, stochastic and dtype == torch.bfloat16)
        variant = kernel.variant_for(kind, sum(sizes[i] for i in members), device)
        rows = np.zeros((len(members), FIELDS.value), np.int64)
        columns = (addresses, sizes, place.starts, place.streams, float_bits(place.factors))
        for field, column in enumerate(columns):
            rows[:, field] = [column[i] for i in members]
        programs = np.array([variant.programs(sizes[i], place.starts[i]) for i in members])
        rows[:, 5] = np.cumsum(programs) - programs
        for k, moment_addresses in enumerate(moments):
            rows[:, 6 + k] = [moment_addresses[i] for i in members]
        row_of_program = np.repeat(np.arange(len(members), dtype=np.int32), programs)
        launches.append(
            Launch(variant, transfer.copy_to_device(rows, device), transfer.copy_to_device(row_of_program, device))
        )
    nbytes = sum(launch.rows.nbytes + launch.row_of_program.nbytes for launch in launches)
    _table_bytes = nbytes + (_table_bytes if cached_launches.cache_info().currsize else 0)
    if _table_bytes > table_budget(device):
        cached_launches.cache_clear()
        _table_bytes = nbytes
    live_launches[kernel, place, stochastic, device, dtypes, addresses, sizes, moments] = launches
    return launches


def seed_bits(seeds: Sequence[int]) -> np.ndarray:
    """Return the bits of seeds as int64, as in tables."""
    return np.array(seeds, np.uint64).view(np.int64)


def device_context(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context manager to launch in. Raises RuntimeError for a device that the kernels can't access."""
    if INTERPRETED:
        if device.type != "cpu":
            raise RuntimeError(f"TRITON_INTERPRET=1: the Triton backend takes CPU tensors, not {device}")
        return contextlib.nullcontext()
    if device.type != "cuda":
        raise RuntimeError(f"the Triton backend takes CUDA tensors (or CPU tensors, TRITON_INTERPRET=1), not {device}")
    return torch.cuda.device(device)


# Launches captured by CUDA graphs, which read the tables at every replay, also after the cache has evicted them.
captured_launches: dict[tuple[Any, ...], Launches] = {}


def philox_words(key: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Four words, as spec.py's `philox` makes them."""
    out = torch.empty(4, dtype=torch.int32, device="cpu" if INTERPRETED else "cuda")
    with device_context(out.device):
        words[(1,)](out, key, *counter)
    return tuple(word & 0xFFFFFFFF for word in out.tolist())
