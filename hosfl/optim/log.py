"""The log of a run of `hosfl.optim`: every move of the weights, in memory until it is saved."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.parameter import is_lazy

from hosfl.files import write_atomically
from hosfl.interrupts import uninterrupted
from hosfl.optim.log_file import FORMAT, LARGEST_HEADER, checksum, dtype_and_shape
from hosfl.optim.sharded import full_tensors
from hosfl.optim.terms import Terms
from hosfl.protocol.header import LogError
from hosfl.protocol.replica import digest


@dataclass(frozen=True)
class Row:
    """A step of one group, float32 numbers. On the lattice the coefficients are moves: they include -rate."""

    coefficients: list[float]
    rate: float
    keep: float


@dataclass
class _RecordedChapter:
    """A chapter that is being recorded: see `hosfl.optim.log_file.Chapter`. rows: of all steps, concatenated."""

    puts: list[tuple[float, list[int]]]
    groups: list[list[int]]
    momenta: list[float]
    exact: bool
    steps: int = 0
    rows: array[float] = field(default_factory=lambda: array("f"))

    def as_json(self, before: _RecordedChapter | None) -> dict[str, Any]:
        """The chapter in the header. Off the lattice, groups are None if they are those of the chapter before."""
        unchanged = before is not None and not (self.exact or before.exact) and self.groups is before.groups
        groups = None if unchanged else self.groups
        return {"puts": self.puts, "groups": groups, "momenta": self.momenta, "exact": self.exact}


def _why_unreadable(parameter: Tensor) -> str:
    """Why no digest can be taken of a parameter's bits; "" if one can."""
    if is_lazy(parameter):
        return "has no shape yet"
    if parameter.is_meta:  # as with accelerate's offloading, which loads it when it is used
        return "is on the meta device"
    return "" if parameter.layout == torch.strided else f"is {parameter.layout}"


class RunLog:
    """The moves of the weights since the optimizer was made, or its state loaded. `save` writes them to a file.

    The file is safetensors: per chapter, float32 [steps, groups, P + 2]: coefficients, rate, keep; and JSON that says
    what they mean, with SHA-256 of the weights before and after, and of the file's own content.
    """

    def __init__(self, terms: Terms, first: int) -> None:
        self.terms, self.first, self.refusal = terms, first, ""
        self.parameters: list[tuple[str | None, Tensor]] = []
        self.kinds: list[tuple[str, list[int]]] = []  # dtype and shape of each parameter
        self.bases: list[tuple[int, str]] = []  # whenever parameters were added: their number then, digest of new ones
        self.chapters: list[_RecordedChapter] = []
        self.next = first  # the number of the next step
        self._puts: list[tuple[float, list[int]]] = []

    def refuse(self, why: str) -> None:
        """Give up the log, since the run cannot be rebuilt. The first reason is kept."""
        if not self.refusal:
            self.refusal = why
            self.parameters, self.kinds, self.bases, self.chapters, self._puts = [], [], [], [], []

    def add_parameters(self, parameters: list[tuple[str | None, Tensor]]) -> None:
        """Add the new ones among all parameters; their present values are their base."""
        self._compare(parameters)
        first = len(self.parameters)
        new = parameters[first:]
        unknown = [(name or n, why) for n, (name, p) in enumerate(new, first) if (why := _why_unreadable(p))]
        twice = [name for name, count in Counter(name for name, _ in parameters if name).items() if count > 1]
        if unknown:
            self.refuse(f"parameter {unknown[0][0]!r} {unknown[0][1]}, so that its bits are not known")
        elif twice:
            self.refuse(f"two parameters are named {twice[0]!r}: give the optimizer names of one module that has both")
        elif new and not self.refusal:
            base = len(parameters), digest(full_tensors(p for _, p in new)).hex()
            with uninterrupted():
                self.bases.append(base)
                self.parameters += new
                self.kinds += [dtype_and_shape(p) for _, p in new]

    def _compare(self, parameters: list[tuple[str | None, Tensor]]) -> None:
        """Give up the log if a parameter was removed, replaced or converted: there is no base for another one."""
        if len(parameters) < len(self.parameters):
            self.refuse("parameters were taken from the optimizer during the run")
        for n, ((name, was), kind, (_, p)) in enumerate(zip(self.parameters, self.kinds, parameters, strict=False)):
            if p is not was or dtype_and_shape(p) != kind:
                became = "another" if dtype_and_shape(p) == kind else f"{dtype_and_shape(p)[0]} {dtype_and_shape(p)[1]}"
                what = f"parameter {repr(name) if name else n}, {kind[0]} {kind[1]},"
                return self.refuse(f"{what} became {became} during the run")

    def put(self, quantum: float, numbers: list[int]) -> None:
        """Record that parameters were put on a lattice, before the next step."""
        if not self.refusal:
            self._puts.append((quantum, numbers))

    def append(
        self, terms: Terms, step: int, groups: list[list[int]], momenta: list[float], exact: bool, rows: list[Row]
    ) -> None:
        """Record a step: a row for each group of parameters that moved."""
        if (terms, step) != (self.terms, self.next):
            self.refuse("the optimizer's seed, steps, directions, pool or dist were changed during the run")
        self.next += 1
        if self.refusal:
            return
        last = self.chapters[-1] if self.chapters else None
        if last is not None and last.groups == groups:
            groups = last.groups  # share the list: where momentum is scheduled, every step is a chapter
        if last is None or self._puts or (last.groups, last.momenta, last.exact) != (groups, momenta, exact):
            last = _RecordedChapter(self._puts, groups, momenta, exact)
            self.chapters.append(last)
            self._puts = []
        last.steps += 1
        for row in rows:
            last.rows.extend([*row.coefficients, row.rate, row.keep])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the log, and the digest of the weights as they are now, to a file; atomically.

        With sharded parameters every process must call it, each with a path of its own: all write the same.

        Raises: LogError where the run cannot be rebuilt, or has made no step; OSError.
        """
        self._compare(self.parameters)
        if self.refusal or not self.chapters:
            raise LogError(self.refusal or "no step was made: there is nothing to save")
        chapters = self.chapters
        if self._puts:  # of a step that failed after them: recorded as one that moves nothing
            chapters = [*chapters, _RecordedChapter(self._puts, [], [], True, steps=1)]
        tables = {}
        for k, chapter in enumerate(chapters):
            shape = chapter.steps, len(chapter.groups), self.terms.directions + 2
            tables[f"{k:06}"] = torch.from_numpy(np.array(chapter.rows).reshape(shape))
        header = {
            "format": FORMAT,
            **asdict(self.terms),
            "first": self.first,
            "parameters": [[name, *kind] for (name, _), kind in zip(self.parameters, self.kinds, strict=True)],
            "bases": self.bases,
            "chapters": [c.as_json(before) for c, before in zip(chapters, [None, *chapters], strict=False)],
            "trained": digest(full_tensors(p for _, p in self.parameters)).hex(),
        }
        text = json.dumps(header)
        if len(text) > LARGEST_HEADER:
            raise LogError(f"what moves changed too often: its header would be {len(text)} characters")
        write_atomically(Path(path), save(tables, {"hosfl.optim": text, "sha256": checksum(text, tables)}))
