"""Studies: several methods, tuned equally on validation data and reported on test data, as a YAML file describes.

    base: {task: digits, batch: 64}           # any of Config's settings, for all methods that read them
    rounds: 400
    tuning_seeds: [0, 1]
    seeds: [2, 3, 4]                          # of the report, none that was tuned on
    methods:
      ho: {settings: {directions_from: fresh}, grid: {server_rate: [0.04, 0.08], client_rate: [0.1, 0.2]}}
      first-order: {settings: {method: first-order}, grid: {server_rate: [0.04, 0.08], client_rate: [1, 2]}}
    memory: [minilm]                          # may be left out: client halves to measure, see `hosfl memory`

A trial is one choice from the grid, run over all tuning seeds. All methods must have the same number of trials, unless
`unequal: the reason` is given. Every run is a JSON file in the study's folder, written when the run has ended. So the
same command resumes a study, whatever ended it. Methods may be added to a study's file later, and settings that no
result depends on may change, such as where the data lie. Numbers are those of YAML 1.2; `<<: *base` merges mappings.
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

RESERVED = ("seed", "rounds", "evaluate_on")  # settings that the study sets itself
# Settings that a grid cannot vary: where a run computes or reads, what it keeps, when it evaluates; but the model can.
NOT_TUNABLE = ("device", *(name for name in NEUTRAL if name != "model"))
TUNING, FINAL = "tuning", "runs"  # the folders of the two phases
QUANTITIES = ("accuracy", "loss")
MAX_NAME_BYTES = 255  # the longest file name that every common file system can hold
MAX_TRIALS = 10_000  # of a method


Result = dict[str, Any]  # the content of a run's file


@dataclass(frozen=True)
class Job:
    """One run of a study: its phase, its method, the number of its trial, and its configuration."""

    phase: str
    method: str
    trial: int
    config: Config

    @property
    def file(self) -> str:
        """The path of the run's file in the study's folder."""
        name = f"{self.config.seed}.json" if self.phase == FINAL else f"{self.trial}-{self.config.seed}.json"
        return f"{self.phase}/{slug(self.method)}/{name}"


@dataclass(frozen=True)
class Study:
    """A study's file, checked. text: the file's; trials: by method, the settings of each trial."""

    text: str
    rounds: int
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    trials: dict[str, list[dict[str, Any]]]
    grids: dict[str, dict[str, list[Any]]]
    memory: tuple[str, ...] = ()
    unequal: str = ""

    def tuning(self) -> list[Job]:
        """Return all runs on validation data; they are evaluated at the end only."""
        shared = {"rounds": self.rounds, "evaluate_on": "validation"}
        return [
            Job(TUNING, method, n, Config(**{**settings, **shared, "evaluate_every": self.rounds, "seed": seed}))
            for method, trials in self.trials.items()
            for n, settings in enumerate(trials)
            for seed in self.tuning_seeds
        ]

    def final(self, method: str, trial: int) -> list[Job]:
        """Return a method's runs on test data, with the settings of one of its trials."""
        settings = {**self.trials[method][trial], "rounds": self.rounds, "evaluate_on": "test"}
        return [Job(FINAL, method, trial, Config(**{**settings, "seed": seed})) for seed in self.seeds]


def slug(method: str) -> str:
    """Return the name of a method's folder: the name's letters, marks and digits, of any script, in lower case."""
    name = unicodedata.normalize("NFC", unicodedata.normalize("NFD", method).casefold())
    return "-".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in name).split())


def load_study(path: Path) -> Study:
    """Read a study from a file in UTF-8. Raises OSError, and ValueError naming the file and the invalid key."""
    try:
        return read_study(read_small(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8, at byte {error.start}: save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_study(text: str) -> Study:
    """Read a study from a file's text. Raises ValueError naming the invalid key, ImportError without PyYAML."""
    from hosfl.studies.yaml12 import parse_yaml

    document = _check_type(dict, parse_yaml(text), "a study")
    _check_keys(document, ("base", "rounds", "seeds", "tuning_seeds", "methods", "memory", "unequal"), "")
    base = _parse_settings(_optional(dict, document, "base"), "base")
    rounds = _check_type(int, _required(document, "rounds"), "rounds")
    seeds, tuning_seeds = _parse_seeds(document, "seeds"), _parse_seeds(document, "tuning_seeds")
    if both := sorted({*seeds} & {*tuning_seeds}):
        raise ValueError(
            f"seeds: {', '.join(map(str, both))} is tuned on too, in tuning_seeds: results need seeds of their own"
        )
    methods = _check_type(dict, _required(document, "methods"), "methods")
    if not methods:
        raise ValueError("methods: there is none: name one or more")
    trials, grids = _trials_and_grids(methods, base, rounds, (*seeds, *tuning_seeds))
    unequal = _optional(str, document, "unequal")
    counts = {name: len(settings) for name, settings in trials.items()}
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
    """Return (settings of each trial, grid), both by method. Every trial's settings have been checked by `Config`."""
    trials: dict[str, list[dict[str, Any]]] = {}
    grids: dict[str, dict[str, list[Any]]] = {}
    slugs: dict[str, str] = {}
    without_base: list[dict[str, Any]] = []  # the settings of all trials, without the base's
    for name, method in methods.items():
        where = f"methods.{name}"
        _check_name(name, where)
        if slugs.setdefault(slug(name), name) != name:
            raise ValueError(f"{where}: its folder would be that of {slugs[slug(name)]!r}: choose another name")
        settings, grids[name] = _parse_method(method, where)
        own = [settings | choice for choice in choices(grids[name])]
        without_base += own
        trials[name] = [with_shared(settings, base) for settings in own]
        for trial in trials[name]:
            for seed in seeds:
                try:
                    Config(**{**trial, "rounds": rounds, "seed": seed})
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
    try:
        all_with_shared(without_base, base)
    except ValueError as error:
        raise ValueError(f"base: {error}") from None
    return trials, grids


def _check_name(name: Any, where: str) -> None:
    """Raises ValueError for a method's name that gives no valid folder's name."""
    if not isinstance(name, str) or not slug(name):
        raise ValueError(f"{where}: a method's name needs letters or digits")
    if (size := len(slug(name).encode())) > MAX_NAME_BYTES:
        raise ValueError(f"{where}: its folder's name would have {size} bytes, {MAX_NAME_BYTES} at most: shorten it")


def _parse_method(value: Any, where: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return (settings, grid) of a method's mapping."""
    method = _check_type(dict, {} if value is None else value, where)
    _check_keys(method, ("settings", "grid"), where)
    settings = _parse_settings(_optional(dict, method, "settings", where), f"{where}.settings")
    grid = _parse_grid(_optional(dict, method, "grid", where), f"{where}.grid")
    if (count := math.prod(map(len, grid.values()))) > MAX_TRIALS:
        raise ValueError(f"{where}.grid: {count} trials, {MAX_TRIALS} at most: leave some out")
    return settings, grid


def _required(mapping: dict[str, Any], key: str) -> Any:
    if mapping.get(key) is None:
        raise ValueError(f"{key} is missing: the study's file must say it")
    return mapping[key]


def _optional(kind: type, mapping: dict[str, Any], key: str, where: str = "") -> Any:
    """Return a key's value, or an empty value of its type if it is left out."""
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


def _parse_seeds(mapping: dict[str, Any], key: str) -> tuple[int, ...]:
    seeds = [_check_type(int, seed, key) for seed in _check_type(list, _required(mapping, key), key)]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{key}: one seed or more is needed, each once, got {seeds}")
    return tuple(seeds)


def _parse_settings(mapping: Any, where: str) -> dict[str, Any]:
    return {name: _parse_value(name, value, where) for name, value in _check_type(dict, mapping, where).items()}


def _parse_grid(mapping: Any, where: str) -> dict[str, list[Any]]:
    grid = {}
    for name, values in _check_type(dict, mapping, where).items():
        grid[name] = [_parse_value(name, value, where) for value in _check_type(list, values, f"{where}.{name}")]
        distinct = {json.dumps(value, sort_keys=True) for value in grid[name]}
        if not grid[name] or len(distinct) < len(grid[name]):
            raise ValueError(f"{where}.{name}: one value or more is needed, each once, got {values}")
        if name in NOT_TUNABLE and len(grid[name]) > 1:
            raise ValueError(f"{where}.{name}: its trials would all be the same run: put one value into settings")
    return grid


def choices(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Return the settings of every point of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _parse_value(name: Any, value: Any, where: str) -> Any:
    """Return a setting's value, converted to its type. Raises ValueError if it is invalid."""
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
