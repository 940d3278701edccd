"""The log of a run of `hosfl.optim`: what moved the weights, and how a base model becomes the trained one again."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hosfl.checkpoint import write_atomically
from hosfl.lattice import Lattice
from hosfl.log import LogError
from hosfl.replica import digest
from hosfl.seeds import Purpose, direction_seeds, pool_seeds, round_seed
from hosfl.sharded import reshard, shards, whole
from hosfl_kernels import SGD, replay_, update_

FORMAT = 2


@dataclass(frozen=True)
class Terms:
    """What replay needs beside the numbers."""

    seed: int
    directions: int
    pool: int
    dist: str

    def seeds(self, step: int) -> tuple[int, ...]:
        """Of the step's directions: its own, or the next ones of the pool."""
        if not self.pool:
            return direction_seeds(self.seed, step, self.directions)
        pool, first = pool_seeds(self.seed, 0, self.pool), step * self.directions
        return tuple(pool[i % self.pool] for i in range(first, first + self.directions))


def apply_rule(
    terms: Terms,
    momentum: float,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    starts: Sequence[int],
    moments: Sequence[Tensor],
    first: int,
    coefficients: Tensor,
    steps: Tensor,
) -> None:
    """The steps from `first` on, off the lattice, in one pass. coefficients: [R, P]. steps: rate and keep, [R, 2]."""
    rounds = range(first, first + len(steps))
    seeds = [terms.seeds(round) for round in rounds]
    steps = nn.functional.pad(steps, (0, 1), value=1.0)
    for coarse in (True, False):
        mine = [i for i, t in enumerate(tensors) if (t.dtype == torch.bfloat16) == coarse]
        update_(
            [tensors[i] for i in mine],
            [[moments[i] for i in mine]] if moments else [[]] if momentum else [],
            SGD(momentum=momentum),
            seeds,
            coefficients,
            steps,
            dist=terms.dist,
            streams=[numbers[i] for i in mine],
            starts=[starts[i] for i in mine],
            rounding="stochastic" if coarse else "nearest",
            rounding_seeds=[round_seed(terms.seed, Purpose.WEIGHTS, round) for round in rounds] if coarse else None,
        )


@dataclass(frozen=True)
class Row:
    """A step of one group: float32 numbers. On the lattice the coefficients hold the rate and their sign."""

    coefficients: list[float]
    rate: float
    keep: float


@dataclass
class _Chapter:
    """Steps that move the same parameters alike: groups of them by their numbers, and the momentum of each.

    puts: (quantum, numbers) of what was put on a lattice before the first.
    """

    puts: list[tuple[float, list[int]]]
    groups: list[list[int]]
    momenta: list[float]
    exact: bool
    steps: int = 0
    rows: array[float] = field(default_factory=lambda: array("f"))


class RunLog:
    """What moved the weights since the optimizer was made, or its state loaded. `save` writes it.

    The file is safetensors: per chapter, float32 [steps, groups, P + 2]: coefficients, rate, keep; and JSON that says
    what they mean, with SHA-256 of the weights before and after, and of the file's own content.
    """

    def __init__(self, terms: Terms, first: int) -> None:
        self.terms, self.first, self.refusal = terms, first, ""
        self.parameters: list[tuple[str | None, Tensor]] = []
        self.bases: list[tuple[int, str]] = []  # how many were there, and the digest of those that came
        self.chapters: list[_Chapter] = []
        self._puts: list[tuple[float, list[int]]] = []

    def admit(self, parameters: list[tuple[str | None, Tensor]]) -> None:
        """Take in those of all parameters that are new: their values now are their base."""
        new = parameters[len(self.parameters) :]
        if new:
            self.bases.append((len(parameters), digest(whole(p for _, p in new)).hex()))
            self.parameters += new

    def put(self, quantum: float, numbers: list[int]) -> None:
        self._puts.append((quantum, numbers))

    def append(self, groups: list[list[int]], momenta: list[float], exact: bool, rows: list[Row]) -> None:
        last = self.chapters[-1] if self.chapters else None
        if last is None or self._puts or (last.groups, last.momenta, last.exact) != (groups, momenta, exact):
            last = _Chapter(self._puts, groups, momenta, exact)
            self.chapters.append(last)
            self._puts = []
        last.steps += 1
        for row in rows:
            last.rows.extend([*row.coefficients, row.rate, row.keep])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the log and the digest of the weights as they are now. All of it or nothing.

        With sharded parameters every process must call it, each with a path of its own: all write the same.

        Raises: LogError where the run cannot be rebuilt, or has made no step; OSError.
        """
        if self.refusal or not self.chapters:
            raise LogError(self.refusal or "no step was made: there is nothing to save")
        tables = {}
        for k, chapter in enumerate(self.chapters):
            shape = chapter.steps, len(chapter.groups), self.terms.directions + 2
            tables[f"{k:06}"] = torch.from_numpy(np.array(chapter.rows).reshape(shape))
        header = {
            "format": FORMAT,
            **asdict(self.terms),
            "first": self.first,
            "parameters": [[name, str(p.dtype), list(p.shape)] for name, p in self.parameters],
            "bases": self.bases,
            "chapters": [
                {"puts": c.puts, "groups": c.groups, "momenta": c.momenta, "exact": c.exact} for c in self.chapters
            ],
            "trained": digest(whole(p for _, p in self.parameters)).hex(),
        }
        text = json.dumps(header)
        write_atomically(Path(path), save(tables, {"hosfl.optim": text, "sha256": _checksum(text, tables)}))


def rebuild(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Train a base model again from a log, in place: the weights that the run had at `log.save`, to the bit.

    One pass over the weights for as long as the same parameters moved on the same lattice. model: as it was before the
    run's first step, on any device, or sharded by FSDP2, where every process must call this. Parameters are found by
    name, where the optimizer was given names or the model; otherwise by position, and then the optimizer must have been
    given `model.parameters()`.

    Raises: LogError for a damaged log, and for a model whose parameters' names, shapes, dtypes or bits are not those of
    the base, with the model unchanged; and where somebody else wrote the weights during the run, so that they are not
    what the log makes: then the model holds what it makes. OSError.
    """
    header, tables = _read(Path(path))
    reshard(model)
    try:
        terms = Terms(**{f.name: header[f.name] for f in fields(Terms)})
        parameters = _matched(model, header)
        moments: dict[int, Tensor] = {}
        first = header["first"]
        for k, chapter in enumerate(header["chapters"]):
            table = tables[f"{k:06}"]
            _replay_chapter(terms, parameters, moments, first, chapter, table)
            first += len(table)
    except (KeyError, TypeError, IndexError) as error:
        raise LogError(f"{path} is no log of an optimizer: {error!r}") from error
    if digest(whole(parameters)).hex() != header["trained"]:
        raise LogError("these are not the weights of the run: somebody else wrote them while it went on")


@torch.no_grad()
def _replay_chapter(
    terms: Terms,
    parameters: list[Tensor],
    moments: dict[int, Tensor],
    first: int,
    chapter: dict[str, Any],
    table: Tensor,
) -> None:
    for quantum, numbers in chapter["puts"]:
        Lattice(quantum).put(shards(parameters[n] for n in numbers)[0], [1.0] * len(numbers))
    for g, numbers in enumerate(chapter["groups"]):
        tensors, starts = shards(parameters[n] for n in numbers)
        rows = table[:, g].contiguous()
        coefficients, steps = rows[:, : terms.directions].contiguous(), rows[:, terms.directions :]
        if chapter["exact"]:
            seeds = [seed for round in range(first, first + len(table)) for seed in terms.seeds(round)]
            replay_(tensors, seeds, coefficients.reshape(-1), dist=terms.dist, streams=numbers, starts=starts)
        else:
            pairs = zip(numbers, tensors, strict=True)
            momentum = chapter["momenta"][g]
            kept = [moments.setdefault(n, zeros(t)) for n, t in pairs] if momentum else []
            apply_rule(terms, momentum, tensors, numbers, starts, kept, first, coefficients, steps)


def _checksum(text: str, tables: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tables):
        sha.update(tables[name].numpy().tobytes())
    return sha.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tables = dict(zip(names := file.keys(), map(file.get_tensor, names), strict=True))
    except SafetensorError as error:
        raise LogError(f"{path} is no log of an optimizer: {error}") from error
    text = metadata.get("hosfl.optim", "")
    if not text or metadata.get("sha256") != _checksum(text, tables):
        raise LogError(f"{path} is no log of an optimizer, or a damaged one: its checksum is wrong")
    header: dict[str, Any] = json.loads(text)
    if header.get("format") not in (1, FORMAT):
        raise LogError(f"{path} is of format {header.get('format')}; this code reads 1 and {FORMAT}")
    if header["format"] == 1:  # which had one momentum for all
        for chapter in header["chapters"]:
            chapter["momenta"] = [header["momentum"]] * len(chapter["groups"])
    return header, tables


def _matched(model: nn.Module, header: dict[str, Any]) -> list[Tensor]:
    """The model's parameters by number. Raises LogError where they are not the log's."""
    named = {plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    positions = list(model.named_parameters())
    parameters: list[Tensor] = []
    for number, (name, dtype, shape) in enumerate(header["parameters"]):
        what = repr(name) if name else f"number {number}"
        found = named.get(name) if name else None
        if not name and number < len(positions):
            what, found = f"number {number}, {positions[number][0]!r},", positions[number][1]
        if found is None:
            raise LogError(f"the model has no parameter {what}, which the log has")
        if (str(found.dtype), list(found.shape)) != (dtype, shape):
            raise LogError(f"{what} is {found.dtype} {list(found.shape)} in the model, {dtype} {shape} in the log")
        parameters.append(found)
    start = 0
    for end, base in header["bases"]:
        if digest(whole(parameters[start:end])).hex() != base:
            raise LogError("this is not the model that the run began with: the digest of its weights is another")
        start = end
    return parameters


def zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format)


def plain(name: str) -> str:
    """A parameter's name without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")
