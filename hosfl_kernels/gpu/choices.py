"""The tile shape of a launch: its kernel's default, or what choices.json names for this GPU and size of launch.

    python -m benchmarks.gpu --sweep

times shapes on a GPU and writes a choices.json. Until that was run, the table is empty and says "not measured", and
every launch takes its default. What a kernel writes to weights does not depend on its shape; the float32 sums of
`project` are added in another order.

An entry has the compute capability (90 for sm_90), the kernel's name as in offline.py, the size class, the shape, and
the GPU and the versions with which it was measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import MODULES, module

PATH = Path(__file__).with_name("choices.json")


class Shape(NamedTuple):
    """A program's tile: its numbers of blocks of rows (the rows of one share random words), columns, and warps."""

    blocks: int
    width: int
    num_warps: int


# Classes by the elements of all tensors of a launch. One that can't fill the GPU with programs needs smaller tiles.
# 2,112 programs of 128 threads fill an H100 (132 multiprocessors of 2,048 threads each). A default tile has 2^11 to
# 2^13 elements, so that up to 2^22 elements no kernel fills that GPU, and beyond 2^24 all do.
SIZES = ("small", "large")
SMALL = 2**22


def size_of(elements: int) -> str:
    """The size class of a launch."""
    return "small" if elements <= SMALL else "large"


def kernels() -> dict[str, tuple[Any, Any]]:
    """(kernel, kind) by name, for every kernel and every kind of tensors that it takes: see launch.py."""
    all_kernels = (kernel for op in MODULES for kernel in module(op).KERNELS)
    return {f"{kernel.name}-{kind}": (kernel, kind) for kernel in all_kernels for kind in kernel.kinds}


def shapes_for(capability: int | None, size: str) -> Mapping[str, Shape]:
    """The shapes that choices.json has for a compute capability and a size class, by the kernel's name."""
    return _table().get((capability, size), {})


@functools.cache
def _table() -> dict[tuple[int | None, str], dict[str, Shape]]:
    """The table of choices.json, read once."""
    return read(PATH)


def read(path: Path) -> dict[tuple[int | None, str], dict[str, Shape]]:
    """Read a table: shapes by kernel's name, by (compute capability, size class).

    Raises ValueError, which names file and entry.
    """
    known = kernels()
    table: dict[tuple[int | None, str], dict[str, Shape]] = {}
    try:
        entries = list(json.loads(path.read_text())["choices"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no table of choices: {error!r}") from None
    for number, entry in enumerate(entries):
        try:
            name, shape = _parse_entry(entry, known)
            shapes = table.setdefault((entry["capability"], entry["size"]), {})
            if name in shapes:
                raise ValueError("there is another for this capability, kernel and size")
        except (ValueError, TypeError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: choices[{number}]: {reason}") from None
        shapes[name] = shape
    return table


def _parse_entry(entry: Any, known: Mapping[str, tuple[Any, Any]]) -> tuple[str, Shape]:
    """Check an entry, and return (the kernel's name, the shape). Raises ValueError, TypeError, KeyError."""
    capability, name, size = entry["capability"], entry["kernel"], entry["size"]
    shape = Shape(*(entry[field] for field in Shape._fields))
    if type(capability) is not int or capability < 10:
        raise ValueError(f"{capability!r} is no compute capability: 90 is that of sm_90")
    if name not in known:
        raise ValueError(f"there is no kernel {name!r}")
    if size not in SIZES:
        raise ValueError(f"the size is {size!r}, and not one of {', '.join(SIZES)}")
    if missing := {"gpu", "torch", "triton"} - {*entry["measured"]}:
        raise ValueError(f"what measured it lacks {', '.join(sorted(missing))}")
    kernel, kind = known[name]
    if (reason := kernel.impossible_reason(kind, shape)) is not None:
        raise ValueError(f"{name} can't have {shape}: {reason}")
    return name, shape
