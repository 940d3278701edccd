"""The log of a run of `hosfl.optim`: what moved the weights, and how a base model becomes the trained one again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hosfl.files import write_atomically
from hosfl.interrupts import uninterrupted
from hosfl.optim.sharded import reshard, shards, whole
from hosfl.protocol.header import (
    DISTRIBUTIONS,
    LogError,
    check_choice,
    check_integer,
    check_keys,
    check_number,
    check_quantum,
    check_sha256,
)
from hosfl.protocol.lattice import STEPS, Lattice
from hosfl.protocol.replica import digest
from hosfl.protocol.seeds import Purpose, direction_seeds, pool_seed, round_seed
from hosfl_kernels import SGD, replay_, update_

FORMAT = 2  # the first had one momentum for all groups
LARGEST_HEADER = 1 << 25  # characters: where they make many small lists, these take twenty times as much memory
LARGEST_STEP = 2**64 - 1  # and of whatever else seeds are derived from
MOVING = ("torch.float32", "torch.bfloat16", "torch.float16")


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
        first = step * self.directions
        return tuple(pool_seed(self.seed, 0, i % self.pool) for i in range(first, first + self.directions))

    def table(self, first: int, steps: int) -> Tensor:
        """The seeds of many steps, the bits of each as int64 [steps, P]."""
        seeds = (seed for step in range(first, first + steps) for seed in self.seeds(step))
        numbers = np.fromiter(seeds, np.uint64, steps * self.directions)
        return torch.from_numpy(numbers.view(np.int64).reshape(steps, self.directions))


HEADER = ("format", *Terms.__dataclass_fields__, "first", "parameters", "bases", "chapters", "trained")
CHAPTER = ("puts", "groups", "exact")


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
    seeds = terms.table(first, len(steps))
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

    def told(self, before: _Chapter | None) -> dict[str, Any]:
        """As the file has it: off the lattice None for the groups of the chapter before."""
        again = before is not None and not (self.exact or before.exact) and self.groups is before.groups
        groups = None if again else self.groups
        return {"puts": self.puts, "groups": groups, "momenta": self.momenta, "exact": self.exact}


def _without_bits(parameter: Tensor) -> str:
    """Why a parameter, frozen then, has no bits that a digest could be of; or nothing."""
    if is_lazy(parameter):
        return "has no shape yet"
    if parameter.is_meta:  # loaded when it is read, as by accelerate's offloading
        return "is on the meta device"
    return "" if parameter.layout == torch.strided else f"is {parameter.layout}"


def _kind(parameter: Tensor) -> tuple[str, list[int]]:
    """Its dtype and shape, as a log tells them."""
    return str(parameter.dtype), list(parameter.shape)


class RunLog:
    """What moved the weights since the optimizer was made, or its state loaded. `save` writes it.

    The file is safetensors: per chapter, float32 [steps, groups, P + 2]: coefficients, rate, keep; and JSON that says
    what they mean, with SHA-256 of the weights before and after, and of the file's own content.
    """

    def __init__(self, terms: Terms, first: int) -> None:
        self.terms, self.first, self.refusal = terms, first, ""
        self.parameters: list[tuple[str | None, Tensor]] = []
        self.kinds: list[tuple[str, list[int]]] = []  # of each parameter, dtype and shape
        self.bases: list[tuple[int, str]] = []  # how many were there, and the digest of those that came
        self.chapters: list[_Chapter] = []
        self.next = first  # the step that is to come
        self._puts: list[tuple[float, list[int]]] = []

    def refuse(self, why: str) -> None:
        """The run cannot be rebuilt: the first reason stays, and nothing is kept any more."""
        if not self.refusal:
            self.refusal = why
            self.parameters, self.kinds, self.bases, self.chapters, self._puts = [], [], [], [], []

    def admit(self, parameters: list[tuple[str | None, Tensor]]) -> None:
        """Take in those of all parameters that are new: their values now are their base."""
        self._compare(parameters)
        first = len(self.parameters)
        new = parameters[first:]
        unknown = [(name or n, why) for n, (name, p) in enumerate(new, first) if (why := _without_bits(p))]
        twice = [name for name, count in Counter(name for name, _ in parameters if name).items() if count > 1]
        if unknown:
            self.refuse(f"parameter {unknown[0][0]!r} {unknown[0][1]}, so that its bits are not known")
        elif twice:
            self.refuse(f"two parameters are named {twice[0]!r}: give the optimizer names of one module that has both")
        elif new and not self.refusal:
            base = len(parameters), digest(whole(p for _, p in new)).hex()
            with uninterrupted():
                self.bases.append(base)
                self.parameters += new
                self.kinds += [_kind(p) for _, p in new]

    def _compare(self, parameters: list[tuple[str | None, Tensor]]) -> None:
        """What was taken in must be what it was: of another parameter in its place the log knows no base."""
        if len(parameters) < len(self.parameters):
            self.refuse("parameters were taken from the optimizer during the run")
        for n, ((name, was), kind, (_, p)) in enumerate(zip(self.parameters, self.kinds, parameters, strict=False)):
            if p is not was or _kind(p) != kind:
                became = "another" if _kind(p) == kind else f"{_kind(p)[0]} {_kind(p)[1]}"
                what = f"parameter {repr(name) if name else n}, {kind[0]} {kind[1]},"
                return self.refuse(f"{what} became {became} during the run")

    def put(self, quantum: float, numbers: list[int]) -> None:
        if not self.refusal:
            self._puts.append((quantum, numbers))

    def append(
        self, terms: Terms, step: int, groups: list[list[int]], momenta: list[float], exact: bool, rows: list[Row]
    ) -> None:
        if (terms, step) != (self.terms, self.next):
            self.refuse("the optimizer's seed, steps, directions, pool or dist were changed during the run")
        self.next += 1
        if self.refusal:
            return
        last = self.chapters[-1] if self.chapters else None
        if last is not None and last.groups == groups:
            groups = last.groups  # one list, however many chapters: a schedule of the momentum begins one every step
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
        self._compare(self.parameters)
        if self.refusal or not self.chapters:
            raise LogError(self.refusal or "no step was made: there is nothing to save")
        chapters = self.chapters
        if self._puts:  # by a step that was not taken: here it is one that moves nothing
            chapters = [*chapters, _Chapter(self._puts, [], [], True, steps=1)]
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
            "chapters": [c.told(before) for c, before in zip(chapters, [None, *chapters], strict=False)],
            "trained": digest(whole(p for _, p in self.parameters)).hex(),
        }
        text = json.dumps(header)
        if len(text) > LARGEST_HEADER:
            raise LogError(f"what moves changed too often: its header would be {len(text)} characters")
        write_atomically(Path(path), save(tables, {"hosfl.optim": text, "sha256": _checksum(text, tables)}))


def rebuild(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Train a base model again from a log, in place: the weights that the run had at `log.save`, to the bit.

        model = make_model()  # the base, with the weights that the run began with
        hosfl.optim.rebuild(model, "run.safetensors")

    Args:
        model: as it was before the run's first step, on any device, or sharded by FSDP2, where every process must call
            this. Parameters are found by name, where the optimizer was given names or the model; otherwise by position,
            and then the optimizer must have been given `model.parameters()`.
        path: of the log's file.

    One pass over the weights for as long as the same parameters moved on the same lattice, and their moves together
    cannot leave it. Nothing in the file is trusted: all of it is checked before the first write. Time is at most in
    proportion to the file's size times the weights that move. Memory: some copies of the file, a copy on the host of
    the weights that move, from which they are put back, and with momentum a float32 tensor for each.

    Raises, with the model as it was, to the bit, as after an interrupt:
        LogError: the log is damaged, or no run can have written it; the parameters' names, shapes, dtypes or bits are
            not those of the base; or somebody else wrote the weights during the run.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        header, tables = _read(path)
    except LogError as error:
        raise LogError(f"{path} is no log of an optimizer, or a damaged one: {error}") from None
    reshard(model)
    parameters = _matched(model, header)
    with _put_back(_movable(header, parameters)):
        replay = _Replay(header.terms, parameters)
        first = header.first
        for chapter, table in zip(header.chapters, tables, strict=True):
            replay.chapter(first, chapter, table)
            first += len(table)
        if digest(whole(parameters)).hex() != header.trained:
            raise LogError("these are not the weights of the run: somebody else wrote them while it went on")


# --- what the file says -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One that the optimizer was given: its name, or None where it is found by position."""

    name: str | None
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class Chapter:
    """As `_Chapter`, read from a file. quanta: of the lattice of each group; none off the lattice."""

    puts: list[tuple[float, list[int]]]
    groups: list[list[int]]
    momenta: list[float]
    exact: bool
    quanta: list[float]


@dataclass(frozen=True)
class Header:
    """All of a log but its tables, checked: what `RunLog.save` can have written, and nothing else."""

    terms: Terms
    first: int
    parameters: list[Parameter]
    bases: list[tuple[int, str]]
    chapters: list[Chapter]
    trained: str

    @classmethod
    def parse(cls, text: str) -> Header:
        """Raises LogError, which names the field."""
        if len(text) > LARGEST_HEADER:
            raise LogError(f"its header has {len(text)} characters; {LARGEST_HEADER} is the most")
        values = _parsed(text)
        written = values.get("format") if isinstance(values, dict) else None
        if type(written) is not int or written not in (1, FORMAT):
            raise LogError(f"it is of format {reprlib.repr(written)}; this code reads 1 and {FORMAT}")
        check_keys(values, (*HEADER, "momentum") if written == 1 else HEADER, "its header")
        for_all = _momentum(values["momentum"], "momentum") if written == 1 else None
        terms = check_terms(values)
        parameters = [_parameter(p, f"parameter {n}") for n, p in enumerate(_list(values, "parameters"))]
        return cls(
            terms,
            check_integer(values["first"], "first", 0, LARGEST_STEP),
            parameters,
            _bases(_list(values, "bases"), len(parameters)),
            _chapters(_list(values, "chapters"), terms, parameters, for_all),
            check_sha256(values["trained"], "trained"),
        )


def _parsed(text: str) -> Any:
    """JSON in which no key of an object is there twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise LogError(f"its header is no JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is there twice in {reprlib.repr([key for key, _ in pairs])}")
    return found


def _sequence(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise LogError(f"{what} must be a list, not {reprlib.repr(value)}")
    return value


def _list(values: dict[str, Any], name: str) -> list[Any]:
    return _sequence(values[name], name)


def check_terms(values: dict[str, Any]) -> Terms:
    """Raises LogError, which names the field."""
    directions = check_integer(values["directions"], "directions", 1, LARGEST_STEP)
    pool = check_integer(values["pool"], "pool", 0, LARGEST_STEP)
    if 0 < pool < directions:
        raise LogError(f"pool must be 0, or at least the {directions} directions of a step, not {pool}")
    seed = check_integer(values["seed"], "seed", 0, 2**64 - 1)
    return Terms(seed, directions, pool, check_choice(values["dist"], "dist", DISTRIBUTIONS))


def _momentum(value: Any, what: str) -> float:
    momentum = check_number(value, what)
    try:
        SGD(momentum=momentum)
    except ValueError as error:
        raise LogError(f"{what}: {error}") from None
    return momentum


def _parameter(value: Any, what: str) -> Parameter:
    name, dtype, shape = _items(value, 3, what)
    for text in (dtype, "" if name is None else name):
        if not isinstance(text, str):
            raise LogError(f"{what}: its name and dtype must be strings, not {reprlib.repr(text)}")
    sizes = [check_integer(s, f"{what}: a size", 0, 2**63 - 1) for s in _sequence(shape, f"{what}: shape")]
    return Parameter(name or None, dtype, sizes)


def _items(value: Any, count: int, what: str) -> list[Any]:
    if len(_sequence(value, what)) != count:
        raise LogError(f"{what} must have {count} items, not {reprlib.repr(value)}")
    return value


def _bases(values: list[Any], parameters: int) -> list[tuple[int, str]]:
    """Every parameter is in one, so that nothing moves whose bits were not compared."""
    bases, start = [], 0
    for value in values:
        end, sha256 = _items(value, 2, "a base")
        start = check_integer(end, "the end of a base", start + 1, parameters)
        bases.append((start, check_sha256(sha256, "the digest of a base")))
    if start != parameters:
        raise LogError(f"bases must end at the {parameters} parameters, not at {start}")
    return bases


def _chapters(values: list[Any], terms: Terms, parameters: list[Parameter], for_all: float | None) -> list[Chapter]:
    lattices: dict[int, float] = {}
    chapters: list[Chapter] = []
    for k, value in enumerate(values):
        before = chapters[-1] if chapters and for_all is None else None
        chapters.append(_chapter(value, f"chapter {k}", terms, parameters, lattices, for_all, before))
    return chapters


def _chapter(
    value: Any,
    what: str,
    terms: Terms,
    parameters: list[Parameter],
    lattices: dict[int, float],
    for_all: float | None,
    before: Chapter | None,
) -> Chapter:
    """lattices: the quantum of each parameter on one; brought up to date. for_all: the momentum of format 1.

    before: the chapter before this one, where its groups may be meant.
    """
    values = check_keys(value, CHAPTER if for_all is not None else (*CHAPTER, "momenta"), what)
    exact = values["exact"]
    if not isinstance(exact, bool):
        raise LogError(f"{what}: exact must be true or false, not {reprlib.repr(exact)}")
    puts = []
    for put in _sequence(values["puts"], f"{what}: puts"):
        quantum, listed = _items(put, 2, f"{what}: a put")
        numbers = _numbers(listed, f"{what}: a put", parameters, ("torch.float32",))
        quantum = check_quantum(quantum, f"{what}: quantum")
        puts.append((quantum, numbers))
        lattices.update(dict.fromkeys(numbers, quantum))
    if values["groups"] is None and before is not None and not (exact or before.exact):
        groups = before.groups
    else:
        groups = _groups(values["groups"], what, parameters, ("torch.float32",) if exact else MOVING)
    if for_all is not None:
        momenta = [for_all] * len(groups)
    else:
        listed = _items(values["momenta"], len(groups), f"{what}: momenta")
        momenta = [_momentum(m, f"{what}: momentum") for m in listed]
    if not exact:
        lattices.clear()  # as the optimizer does: where moves round, there is no lattice
        return Chapter(puts, groups, momenta, exact, [])
    if terms.dist != "rademacher" or any(momenta):
        raise LogError(f"{what}: exact moves are of rademacher directions and without momentum")
    quanta = [{lattices.get(n, 0.0) for n in group} for group in groups]
    if any(len(mine) > 1 or 0.0 in mine for mine in quanta):
        raise LogError(f"{what}: the parameters of a group were not put on one lattice")
    return Chapter(puts, groups, momenta, exact, [mine.pop() for mine in quanta])


def _groups(value: Any, what: str, parameters: list[Parameter], dtypes: tuple[str, ...]) -> list[list[int]]:
    listed = _sequence(value, f"{what}: groups")
    groups = [_numbers(group, f"{what}: a group", parameters, dtypes) for group in listed]
    moving = [n for group in groups for n in group]
    if len(set(moving)) < len(moving):
        raise LogError(f"{what}: a parameter is in two groups")
    return groups


def _numbers(value: Any, what: str, parameters: list[Parameter], dtypes: tuple[str, ...]) -> list[int]:
    last = len(parameters) - 1
    numbers = [check_integer(n, f"{what}: a number of a parameter", 0, last) for n in _sequence(value, what)]
    if not numbers or len(set(numbers)) < len(numbers):
        raise LogError(f"{what} must name parameters, each once, not {reprlib.repr(value)}")
    for n in numbers:
        check_choice(parameters[n].dtype, f"{what}: the dtype of parameter {n}", dtypes)
    return numbers


def _read(path: Path) -> tuple[Header, list[Tensor]]:
    """The file's content, in memory of our own: nobody writes it after it was checked."""
    if not path.is_file() and path.exists():
        raise LogError("this is no regular file")
    try:
        with safe_open(path, "np") as file:
            metadata, tables = file.metadata() or {}, {}
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape = part.get_shape()
                # Before it is made: numpy knows neither all of the file's dtypes nor all of its shapes.
                if part.get_dtype() != "F32" or len(shape) != 3 or max(shape) >= 2**31:
                    raise LogError(f"table {name!r} is {part.get_dtype()} {shape}")
                tables[name] = torch.from_numpy(file.get_tensor(name))
    except SafetensorError as error:
        raise LogError(str(error)) from None
    text = metadata.get("hosfl.optim", "")
    if metadata.get("sha256") != _checksum(text, tables):
        raise LogError("its checksum is wrong")
    header = Header.parse(text)
    names = [f"{k:06}" for k in range(len(header.chapters))]
    if list(tables) != sorted(names):
        raise LogError(f"{len(tables)} tables, which are not those of its {len(names)} chapters")
    if header.first + sum(len(table) for table in tables.values()) > LARGEST_STEP:
        raise LogError(f"its steps go beyond number {LARGEST_STEP}")
    for name, chapter in zip(names, header.chapters, strict=True):
        _check_table(tables[name], chapter, header.terms.directions, f"chapter {int(name)}")
    return header, [tables[name] for name in names]


def _check_table(table: Tensor, chapter: Chapter, directions: int, what: str) -> None:
    if not len(table) or table.shape[1:] != (len(chapter.groups), directions + 2):
        raise LogError(
            f"{what}: a table of {list(table.shape)}, where steps of {len(chapter.groups)} groups have {directions} "
            "coefficients, rate and keep"
        )
    coefficients, rates, keeps = table[..., :directions], table[..., directions], table[..., directions + 1]
    if not torch.isfinite(table).all() or (rates < 0).any() or (keeps > 1).any():
        raise LogError(f"{what}: numbers that are infinite or NaN, a rate below 0, or a keep above 1")
    if chapter.exact and (keeps != 1).any():
        raise LogError(f"{what}: weights that shrink leave their lattice")
    for g, quantum in enumerate(chapter.quanta):
        quanta = coefficients[:, g].double() / quantum
        if not torch.equal(quanta, quanta.round()):
            raise LogError(f"{what}: moves that are no multiples of the lattice's quantum {quantum:g}")
        if quanta.abs().sum(1).amax() > STEPS:
            raise LogError(f"{what}: a move beyond {STEPS * quantum:g}, where the lattice ends")


def _checksum(text: str, tables: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tables):
        sha.update(tables[name].numpy().tobytes())
    return sha.hexdigest()


# --- what it does to a model --------------------------------------------------------------------------------------


def _matched(model: nn.Module, header: Header) -> list[Tensor]:
    """The model's parameters by number. Raises LogError where they are not the log's."""
    named = {plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    positions = list(model.named_parameters())
    parameters: list[Tensor] = []
    for number, parameter in enumerate(header.parameters):
        name = parameter.name
        what = repr(name) if name else f"number {number}"
        found = named.get(name) if name else None
        if not name and number < len(positions):
            what, found = f"number {number}, {positions[number][0]!r},", positions[number][1]
        if found is None:
            raise LogError(f"the model has no parameter {what}, which the log has")
        if _kind(found) != (parameter.dtype, parameter.shape):
            raise LogError(
                f"{what} is {found.dtype} {list(found.shape)} in the model, {parameter.dtype} {parameter.shape} in the "
                "log"
            )
        parameters.append(found)
    if len({id(p) for p in parameters}) < len(parameters):
        raise LogError("two of the log's parameters are one in the model")
    start = 0
    for end, base in header.bases:
        if digest(whole(parameters[start:end])).hex() != base:
            raise LogError("this is not the model that the run began with: the digest of its weights is another")
        start = end
    return parameters


def _movable(header: Header, parameters: list[Tensor]) -> list[Tensor]:
    """What the log writes of the model. Raises LogError where the kernels would not."""
    lists = {id(c.groups): c.groups for c in header.chapters}.values()  # which many chapters may share
    put = {n for c in header.chapters for _, mine in c.puts for n in mine}
    numbers = sorted(put.union(n for groups in lists for mine in groups for n in mine))
    try:
        tensors, starts = shards(parameters[n] for n in numbers)
        with torch.no_grad():
            replay_(tensors, [], [], streams=numbers, starts=starts)
    except (RuntimeError, TypeError, ValueError) as error:
        raise LogError(f"the log moves parameters {numbers}, which cannot move in this model: {error}") from None
    return tensors


@contextmanager
def _put_back(tensors: list[Tensor]) -> Iterator[None]:
    """These are as they were if what is done in here fails or is interrupted."""
    before = [t.detach().to("cpu", copy=True) for t in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad(), uninterrupted():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
        raise


class _Replay:
    """A model's parameters, by number, and their moments, on the way through a log."""

    def __init__(self, terms: Terms, parameters: list[Tensor]) -> None:
        self.terms, self.parameters = terms, parameters
        self.moments: dict[int, Tensor] = {}

    @torch.no_grad()
    def chapter(self, first: int, chapter: Chapter, table: Tensor) -> None:
        terms = self.terms
        for quantum, numbers in chapter.puts:
            Lattice(quantum).put(shards(self.parameters[n] for n in numbers)[0], [1.0] * len(numbers))
        for g, numbers in enumerate(chapter.groups):
            rows = table[:, g].contiguous()
            coefficients, steps = rows[:, : terms.directions].contiguous(), rows[:, terms.directions :]
            if chapter.exact:
                self._move(first, numbers, chapter.quanta[g], coefficients)
            else:
                tensors, starts = shards(self.parameters[n] for n in numbers)
                pairs = zip(numbers, tensors, strict=True)
                momentum = chapter.momenta[g]
                kept = [self.moments.setdefault(n, zeros(t)) for n, t in pairs] if momentum else []
                apply_rule(terms, momentum, tensors, numbers, starts, kept, first, coefficients, steps)

    def _move(self, first: int, numbers: list[int], quantum: float, coefficients: Tensor) -> None:
        """On the lattice: as many steps in one pass as together cannot leave it."""
        tensors, starts = shards(self.parameters[n] for n in numbers)
        distances = coefficients.double().abs().sum(1).cumsum(0)
        done, gone = 0, 0.0
        while done < len(coefficients):
            room = STEPS * quantum - max(map(_largest, whole(self.parameters[n] for n in numbers)))
            end = int(torch.searchsorted(distances, gone + room, right=True))
            if end <= done:
                raise LogError(f"step {first + done} carries weights beyond the lattice's limit {STEPS * quantum:g}")
            seeds, moves = self.terms.table(first + done, end - done), coefficients[done:end]
            replay_(tensors, seeds.reshape(-1), moves.reshape(-1), dist=self.terms.dist, streams=numbers, starts=starts)
            done, gone = end, float(distances[end - 1])


def _largest(tensor: Tensor) -> float:
    """max |weight|; infinity where one is NaN."""
    size = max(map(abs, map(float, tensor.aminmax()))) if tensor.numel() else 0.0
    return size if math.isfinite(size) else math.inf


def zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format)


def plain(name: str) -> str:
    """A parameter's name without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")
