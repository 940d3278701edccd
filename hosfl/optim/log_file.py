"""Reads and checks the file of a run's log: it accepts only what `RunLog.save` can have written."""

from __future__ import annotations

import hashlib
import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hosfl.optim.terms import LARGEST_STEP, Terms, check_terms
from hosfl.protocol.header import (
    LogError,
    check_choice,
    check_integer,
    check_keys,
    check_number,
    check_quantum,
    check_sha256,
)
from hosfl.protocol.lattice import STEPS
from hosfl_kernels import SGD

FORMAT = 2  # the first had one momentum for all groups
LARGEST_HEADER = 1 << 25  # characters: parsed into many small lists they take twenty times as much memory
MOVING = ("torch.float32", "torch.bfloat16", "torch.float16")
HEADER = ("format", *Terms.__dataclass_fields__, "first", "parameters", "bases", "chapters", "trained")
CHAPTER = ("puts", "groups", "exact")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the optimizer: its name, or None where it is found by position."""

    name: str | None
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class Chapter:
    """Steps that move the same groups of parameters, given by their numbers, with the same momentum each.

    puts: (quantum, numbers) of the parameters that were put on a lattice before the first step. exact: whether all are
    on lattices. quanta: of the lattice of each group; empty off the lattice.
    """

    puts: list[tuple[float, list[int]]]
    groups: list[list[int]]
    momenta: list[float]
    exact: bool
    quanta: list[float]


@dataclass(frozen=True)
class Header:
    """A log without its tables, checked."""

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


def read(path: Path) -> tuple[Header, list[Tensor]]:
    """A file's header and tables, checked. They are copies, so that a later write to the file does not change them."""
    if not path.is_file() and path.exists():
        raise LogError("this is no regular file")
    try:
        with safe_open(path, "np") as file:
            metadata, tables = file.metadata() or {}, {}
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape = part.get_shape()
                # Checked before the array is made, since numpy lacks some of the format's dtypes and shapes.
                if part.get_dtype() != "F32" or len(shape) != 3 or max(shape) >= 2**31:
                    raise LogError(f"table {name!r} is {part.get_dtype()} {shape}")
                tables[name] = torch.from_numpy(file.get_tensor(name))
    except SafetensorError as error:
        raise LogError(str(error)) from None
    text = metadata.get("hosfl.optim", "")
    if metadata.get("sha256") != checksum(text, tables):
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


def checksum(text: str, tables: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tables):
        sha.update(tables[name].numpy().tobytes())
    return sha.hexdigest()


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


def _parsed(text: str) -> Any:
    """Parse JSON. Raises LogError also for an object that has a key twice."""
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
    """The bases. They must cover all parameters, so that none moves whose bits were not compared."""
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
    """Check a chapter.

    lattices: by parameter number, the quantum of its lattice; updated by the chapter's puts. for_all: the momentum of
    all groups, in format 1. before: the chapter before this one, if groups may be omitted because they are the same.
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
        lattices.clear()  # as in the optimizer: there is no lattice where moves round
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


def dtype_and_shape(parameter: Tensor) -> tuple[str, list[int]]:
    """A parameter's dtype and shape, as a log has them."""
    return str(parameter.dtype), list(parameter.shape)
