"""A study: methods x seeds at equal tuning, as one file says. Tuned on validation data, reported on test data.

    base: {task: digits, batch: 64}           # any of Config's settings, for all methods that read them
    rounds: 400
    tuning_seeds: [0, 1]
    seeds: [2, 3, 4]                          # of the report, none that was tuned on
    methods:
      ho: {settings: {directions_from: fresh}, grid: {server_rate: [0.04, 0.08], client_rate: [0.1, 0.2]}}
      first-order: {settings: {method: first-order}, grid: {server_rate: [0.04, 0.08], client_rate: [1, 2]}}
    memory: [minilm]                          # may be left out: client halves to measure, see `hosfl memory`

A trial is one choice from the grid, run over all tuning seeds. Every method must have equally many, unless
`unequal: the reason` is given. Every run is a JSON file in the study's folder, written when the run has ended: whatever
ends a study, the same command goes on where it was. Methods may be added to a study's file later, and what the bits do
not depend on may change, such as where the data lie. Numbers are those of YAML 1.2; `<<: *base` merges mappings.
"""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosfl.files import read_small
from hosfl.runs.config import Config, all_with_shared, with_shared
from hosfl.runs.memory import HALVES
from hosfl.settings import FIELDS, NEUTRAL, typed

RESERVED = ("seed", "rounds", "evaluate_on")  # settings that the study itself makes
# What no trial can choose: where a run computes or reads, what is kept, when one looks. A model is one that is there.
NOT_TUNABLE = ("device", *(name for name in NEUTRAL if name != "model"))
TUNING, FINAL = "tuning", "runs"  # the folders of the two phases
QUANTITIES = ("accuracy", "loss")
MAX_NAME_BYTES = 255  # bytes of a file's name, on every file system in use
MAX_TRIALS = 10_000  # of a method


Result = dict[str, Any]  # what the file of a run holds


@dataclass(frozen=True)
class Job:
    """One run to make: of a phase, a method, the number of its trial, and a configuration."""

    phase: str
    method: str
    trial: int
    config: Config

    @property
    def file(self) -> str:
        name = f"{self.config.seed}.json" if self.phase == FINAL else f"{self.trial}-{self.config.seed}.json"
        return f"{self.phase}/{slug(self.method)}/{name}"


@dataclass(frozen=True)
class Study:
    """What a study's file says, checked. text: the file's; trials: method -> settings of each of its trials."""

    text: str
    rounds: int
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    trials: dict[str, list[dict[str, Any]]]
    grids: dict[str, dict[str, list[Any]]]
    memory: tuple[str, ...] = ()
    unequal: str = ""

    def tuning(self) -> list[Job]:
        """Every run on validation data, evaluated at the end only."""
        shared = {"rounds": self.rounds, "evaluate_on": "validation"}
        return [
            Job(TUNING, method, n, Config(**{**settings, **shared, "evaluate_every": self.rounds, "seed": seed}))
            for method, trials in self.trials.items()
            for n, settings in enumerate(trials)
            for seed in self.tuning_seeds
        ]

    def final(self, method: str, trial: int) -> list[Job]:
        """A method's runs on test data, with what one of its trials says."""
        settings = {**self.trials[method][trial], "rounds": self.rounds, "evaluate_on": "test"}
        return [Job(FINAL, method, trial, Config(**{**settings, "seed": seed})) for seed in self.seeds]


def slug(method: str) -> str:
    """A method's name as the name of its folder: its letters, marks and numbers, of any script, small."""
    name = unicodedata.normalize("NFC", unicodedata.normalize("NFD", method).casefold())
    return "-".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in name).split())


def load_study(path: Path) -> Study:
    """The study that a file describes, in UTF-8. Raises OSError, and ValueError naming the file and the key that is
    wrong."""
    try:
        return read_study(read_small(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8, at byte {error.start}: save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_study(text: str) -> Study:
    """The study of a file's text. Raises ValueError naming the key that is wrong, ImportError without PyYAML."""
    from hosfl.studies.yaml12 import parse_yaml

    document = _check_type(dict, parse_yaml(text), "a study")
    _check_keys(document, ("base", "rounds", "seeds", "tuning_seeds", "methods", "memory", "unequal"), "")
    base = _settings(_optional(dict, document, "base"), "base")
    rounds = _check_type(int, _required(document, "rounds"), "rounds")
    seeds, tuning_seeds = _seeds(document, "seeds"), _seeds(document, "tuning_seeds")
    if both := sorted({*seeds} & {*tuning_seeds}):
        raise ValueError(
            f"seeds: {', '.join(map(str, both))} is tuned on too, in tuning_seeds: results need seeds of their own"
        )
    methods = _check_type(dict, _required(document, "methods"), "methods")
    if not methods:
        raise ValueError("methods: there is none: name one or more")
    trials, grids = _trials_and_grids(methods, base, rounds, (*seeds, *tuning_seeds))
    unequal = _optional(str, document, "unequal")
    counts = {name: len(found) for name, found in trials.items()}
    if len(set(counts.values())) > 1 and not unequal:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"methods: not equally many trials ({listed}): make the grids equal, or give unequal: why")
    memory = _optional(list, document, "memory")
    for half in memory:
        if half not in list(HALVES):
            raise ValueError(f"memory: {half!r} is none of {', '.join(HALVES)}")
    return Study(text, rounds, seeds, tuning_seeds, trials, grids, tuple(memory), unequal)


def _trials_and_grids(
    methods: dict[Any, Any], base: dict[str, Any], rounds: int, seeds: Sequence[int]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, list[Any]]]]:
    """By method, the settings of each of its trials, all of which make a `Config`; and its grid."""
    trials: dict[str, list[dict[str, Any]]] = {}
    grids: dict[str, dict[str, list[Any]]] = {}
    slugs: dict[str, str] = {}
    own: list[dict[str, Any]] = []  # every trial's settings, without the base's
    for name, method in methods.items():
        where = f"methods.{name}"
        _check_name(name, where)
        if slugs.setdefault(slug(name), name) != name:
            raise ValueError(f"{where}: its folder would be that of {slugs[slug(name)]!r}: choose another name")
        settings, grids[name] = _method(method, where)
        of_method = [settings | choice for choice in choices(grids[name])]
        own += of_method
        trials[name] = [with_shared(settings, base) for settings in of_method]
        for choice in trials[name]:
            for seed in seeds:
                try:
                    Config(**{**choice, "rounds": rounds, "seed": seed})
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
    try:
        all_with_shared(own, base)
    except ValueError as error:
        raise ValueError(f"base: {error}") from None
    return trials, grids


def _check_name(name: Any, where: str) -> None:
    """Raises ValueError for a method's name that can be no folder's."""
    if not isinstance(name, str) or not slug(name):
        raise ValueError(f"{where}: a method's name needs letters or digits")
    if (size := len(slug(name).encode())) > MAX_NAME_BYTES:
        raise ValueError(f"{where}: its folder's name would have {size} bytes, {MAX_NAME_BYTES} at most: shorten it")


def _method(given: Any, where: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """A method's settings and grid."""
    method = _check_type(dict, {} if given is None else given, where)
    _check_keys(method, ("settings", "grid"), where)
    settings = _settings(_optional(dict, method, "settings", where), f"{where}.settings")
    grid = _grid(_optional(dict, method, "grid", where), f"{where}.grid")
    if (many := math.prod(map(len, grid.values()))) > MAX_TRIALS:
        raise ValueError(f"{where}.grid: {many} trials, {MAX_TRIALS} at most: leave some out")
    return settings, grid


def _required(mapping: dict[str, Any], key: str) -> Any:
    if mapping.get(key) is None:
        raise ValueError(f"{key} is missing: the study's file must say it")
    return mapping[key]


def _optional(kind: type, mapping: dict[str, Any], key: str, where: str = "") -> Any:
    """What may be left out: then it is empty."""
    value = mapping.get(key)
    return kind() if value is None else _check_type(kind, value, f"{where}.{key}".lstrip("."))


def _check_type(kind: type, value: Any, where: str) -> Any:
    names = {dict: "a mapping", list: "a list", int: "a whole number", str: "text"}
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {names[kind]} is needed, got {value!r}")
    return value


def _check_keys(mapping: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in mapping:
        if key not in keys:
            raise ValueError(f"{where + '.' if where else ''}{key}: unknown; there are {', '.join(keys)}")


def _seeds(mapping: dict[str, Any], key: str) -> tuple[int, ...]:
    seeds = [_check_type(int, seed, key) for seed in _check_type(list, _required(mapping, key), key)]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{key}: one seed or more is needed, each once, got {seeds}")
    return tuple(seeds)


def _settings(given: Any, where: str) -> dict[str, Any]:
    return {name: _value(name, value, where) for name, value in _check_type(dict, given, where).items()}


def _grid(given: Any, where: str) -> dict[str, list[Any]]:
    grid = {}
    for name, values in _check_type(dict, given, where).items():
        grid[name] = [_value(name, value, where) for value in _check_type(list, values, f"{where}.{name}")]
        once = {json.dumps(value, sort_keys=True) for value in grid[name]}
        if not grid[name] or len(once) < len(grid[name]):
            raise ValueError(f"{where}.{name}: one value or more is needed, each once, got {values}")
        if name in NOT_TUNABLE and len(grid[name]) > 1:
            raise ValueError(f"{where}.{name}: its trials would all be the same run: put one value into settings")
    return grid


def choices(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _value(name: Any, value: Any, where: str) -> Any:
    """A setting's value, of its type."""
    if name in RESERVED:
        raise ValueError(f"{where}.{name}: the study makes that itself; it has rounds, seeds and tuning_seeds")
    if name not in Config.names():
        known = ", ".join(n for n in Config.names() if n not in RESERVED)
        raise ValueError(f"{where}.{name}: no such setting; there are {known}")
    try:
        value = typed(name, value)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    choices = FIELDS[name].metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{where}.{name}: one of {', '.join(choices)} is needed, got {value!r}")
    return value
