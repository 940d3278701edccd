"""How kernels are launched: variants with their constants and options, and the tables that say which program does what.

Every op's own module has its kernel, its variants and what it launches.
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
from hosfl_kernels.ops import LISTS
from hosfl_kernels.place import DISTRIBUTIONS, Place

from . import choices
from .choices import Shape
from .philox import words
from .tile import FIELDS

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

# The interpreter is chosen when triton decorates a kernel, by TRITON_INTERPRET.
INTERPRETED = not isinstance(words, triton.runtime.JITFunction)

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

    def compile(self, *arguments: Any) -> Any:
        """What a launch with these arguments makes first, and then finds."""
        options = {**self.constants, "num_warps": self.num_warps, **OPTIONS}
        return None if INTERPRETED else self.kernel.run(*arguments, grid=(1,), warmup=True, **options)

    def spills(self, *arguments: Any) -> int:
        """32-bit words of a thread that lie in memory, as the driver counts them; in the interpreter none."""
        if (compiled := self.compile(*arguments)) is None:
            return 0
        compiled._init_handles()  # as Triton's tutorials do: the driver knows it once the kernel is loaded
        return compiled.n_spills


def inner(dist: str) -> int:
    """Rows that share their words: a program's loop takes so many at a time, all loaded before the first is used."""
    return {"rademacher": spec.ROUNDING_ROWS, "gaussian": spec.GAUSSIAN_ROWS}[dist]


class Kind(NamedTuple):
    """What a variant is for beside its op. stochastic: the rounding, of bfloat16 alone."""

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
    """The constants of a kernel that are its tile's."""
    return {"BLOCKS": shape.blocks, "INNER": inner(kind.dist), "WIDTH": shape.width}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel of an op, in a variant for every kind of tensors and shape. `plan` remembers by its identity.

    variant: makes one, the same for the same arguments. default: the shape where choices.json names none. wide: a
    thread has 16 bytes of every row of a tile, where another has one column at least.
    """

    name: str
    variant: Callable[[Kind, Shape], Variant]
    default: Callable[[Kind], Shape]
    wide: bool = False
    kinds: Sequence[Kind] = KINDS

    def at(self, kind: Kind, elements: int, device: torch.device) -> Variant:
        """The variant for a launch of so many elements in all."""
        shapes = choices.of(capability(device), choices.size_of(elements)) if _instead is None else _instead
        return self.variant(kind, shapes.get(f"{self.name}-{kind}") or self.default(kind))

    def impossible(self, kind: Kind, shape: Shape) -> str | None:
        """Why the kernel can't have this shape, or None."""
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


_instead: Mapping[str, Shape] | None = None


@contextlib.contextmanager
def instead(shapes: Mapping[str, Shape]) -> Iterator[None]:
    """Within, a launch of any size takes the shape that is named here, or its default: for checks and timings."""
    global _instead
    before, _instead = _instead, shapes
    remembered.cache_clear()
    try:
        yield
    finally:
        _instead = before
        remembered.cache_clear()


def capability(device: torch.device) -> int | None:
    """90 for sm_90; None where there is none: the interpreter, AMD."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def float_bits(values: Any) -> np.ndarray:
    """float32 values as int32: how they travel in tables and arguments."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32).view(np.int32)


def bits_there(values: torch.Tensor) -> torch.Tensor:
    """The same of a float32 tensor where it lies, as int64."""
    return values.view(torch.int32).to(torch.int64)


class Launch(NamedTuple):
    """One launch for the tensors of one dtype: rows of int64 and every program's row (int32), on the device.

    A row: address, elements, start, stream, bits of the float32 factor, number of the tensor's first program, and the
    addresses of up to two moments.
    A program reads which row is its own instead of searching: 4 bytes beside the 4 KB of its tile or more.
    """

    variant: Variant
    rows: torch.Tensor
    row_of_program: torch.Tensor

    def __call__(self, *arguments: Any) -> None:
        self.variant.launch(len(self.row_of_program), self.rows, self.row_of_program, *arguments)

    def compile(self, *arguments: Any) -> None:
        """Compile what a call runs, once."""
        if (key := (id(self.variant), self.rows.device)) not in _compiled:
            self.variant.compile(self.rows, self.row_of_program, *arguments)
            _compiled.add(key)


_compiled: set[tuple[int, torch.device]] = set()


def run(launches: Sequence[Launch], *arguments: Any) -> None:
    """Launch all; none before each is compiled: a failure there must not leave some of the tensors changed."""
    if len(launches) > 1:
        for launch in launches:
            launch.compile(*arguments)
    for launch in launches:
        launch(*arguments)


class Launches(list[Launch]):
    """Of one list of tensors."""  # a list of Python's own cannot be referred to weakly


def plan(
    kernel: Kernel,
    tensors: Sequence[torch.Tensor],
    place: Place,
    stochastic: bool = False,
    moments: Sequence[Sequence[torch.Tensor]] = (),
) -> Launches:
    """The launches for a list of tensors, remembered.

    Each stream has tables of its own, which it has filled and alone reads. A CUDA graph, which is captured on yet
    another stream, takes those of any: it is replayed after the call that made them, and keeps them.
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
        tuple([tuple([x.data_ptr() for x in kept]) for kept in moments]),
    )
    if transfer.capturing(device):
        if key not in captured:
            captured[key] = _latest(key)
        return captured[key]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return remembered(stream, *key)


def _latest(key: tuple[Any, ...]) -> Launches:
    if key not in latest:
        # One that was forgotten is like the first: see `remembered`.
        raise RuntimeError("a CUDA graph can't capture the first call with these tensors: make it once right before")
    return latest[key]


# The launches that are remembered, whatever the stream.
latest: weakref.WeakValueDictionary[tuple[Any, ...], Launches] = weakref.WeakValueDictionary()


_held = 0  # bytes of the tables that were made since nothing was remembered


def room(device: torch.device) -> int:
    """The most that tables may take, in bytes. A list's are a thousandth of its tensors, or 1 KB: of lists that lie
    elsewhere in every call they would come to as much as the tensors themselves."""
    return torch.cuda.get_device_properties(device).total_memory // 64 if device.type == "cuda" else 2**26


@functools.lru_cache(maxsize=LISTS)
def remembered(
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
    """`plan` by what it is made of. Addresses are part of the key: `.data` may be rebound at any time.

    All is forgotten where there is no room for more.
    """
    global _held
    launches = Launches()
    for dtype in CELLS:
        mine = [i for i, n in enumerate(sizes) if n and dtypes[i] == dtype]
        if not mine:
            continue
        kind = Kind(dtype, place.dist, stochastic and dtype == torch.bfloat16)
        variant = kernel.at(kind, sum(sizes[i] for i in mine), device)
        rows = np.zeros((len(mine), FIELDS.value), np.int64)
        columns = (addresses, sizes, place.starts, place.streams, float_bits(place.factors))
        for field, column in enumerate(columns):
            rows[:, field] = [column[i] for i in mine]
        programs = np.array([variant.programs(sizes[i], place.starts[i]) for i in mine])
        rows[:, 5] = np.cumsum(programs) - programs
        for k, kept in enumerate(moments):
            rows[:, 6 + k] = [kept[i] for i in mine]
        row_of_program = np.repeat(np.arange(len(mine), dtype=np.int32), programs)
        launches.append(Launch(variant, transfer.copied(rows, device), transfer.copied(row_of_program, device)))
    nbytes = sum(launch.rows.nbytes + launch.row_of_program.nbytes for launch in launches)
    _held = nbytes + (_held if remembered.cache_info().currsize else 0)
    if _held > room(device):
        remembered.cache_clear()
        _held = nbytes
    latest[kernel, place, stochastic, device, dtypes, addresses, sizes, moments] = launches
    return launches


def seed_bits(seeds: Sequence[int]) -> np.ndarray:
    """Seeds as int64: how they travel in tables."""
    return np.array(seeds, np.uint64).view(np.int64)


def reach(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context to launch in, for tensors of `device`; refuses tensors that the kernels can't reach."""
    if INTERPRETED:
        if device.type != "cpu":
            raise RuntimeError(f"TRITON_INTERPRET=1: the Triton backend takes CPU tensors, not {device}")
        return contextlib.nullcontext()
    if device.type != "cuda":
        raise RuntimeError(f"the Triton backend takes CUDA tensors (or CPU tensors, TRITON_INTERPRET=1), not {device}")
    return torch.cuda.device(device)


# A captured graph reads its tables at every replay, also after `remembered` has forgotten them. Of each list once.
captured: dict[tuple[Any, ...], Launches] = {}


def philox_words(key: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Four words, as spec.py's `philox` makes them."""
    out = torch.empty(4, dtype=torch.int32, device="cpu" if INTERPRETED else "cuda")
    with reach(out.device):
        words[(1,)](out, key, *counter)
    return tuple(word & 0xFFFFFFFF for word in out.tolist())
