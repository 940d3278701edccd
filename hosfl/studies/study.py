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
import multiprocessing
import os
import signal
import threading
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from hosfl.files import FolderLock, write_atomically, write_json
from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.terms import Diverged, NothingLearnt
from hosfl.runs.assemble import rates_of, task_of
from hosfl.runs.config import Config, all_with_shared, with_shared
from hosfl.runs.memory import HALVES, client_memory
from hosfl.runs.report import LOWER_IS_BETTER, Evaluation, gap_recovered, machine, metric
from hosfl.runs.trainer import train
from hosfl.settings import FIELDS, NEUTRAL, decisive, differences, typed
from hosfl.tasks.task import Task

OWN = ("seed", "rounds", "evaluate_on")  # settings that the study itself makes
# What no trial can choose: where a run computes or reads, what is kept, when one looks. A model is one that is there.
NO_CHOICE = ("device", *(name for name in NEUTRAL if name != "model"))
TUNING, FINAL = "tuning", "runs"  # the folders of the two phases
QUANTITIES = ("accuracy", "loss")
LONGEST_NAME = 255  # bytes of a file's name, on every file system in use
MOST_TRIALS = 10_000  # of a method
AGAIN = "delete it, and it is made again"


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
        return read_study(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8, at byte {error.start}: save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_study(text: str) -> Study:
    """The study of a file's text. Raises ValueError naming the key that is wrong, ImportError without PyYAML."""
    from hosfl.studies.yaml12 import parse_yaml

    says = _of(dict, parse_yaml(text), "a study")
    _known(says, ("base", "rounds", "seeds", "tuning_seeds", "methods", "memory", "unequal"), "")
    base = _settings(says.get("base") or {}, "base")
    rounds = _of(int, _needed(says, "rounds"), "rounds")
    seeds, tuning_seeds = _seeds(says, "seeds"), _seeds(says, "tuning_seeds")
    if both := sorted({*seeds} & {*tuning_seeds}):
        raise ValueError(
            f"seeds: {', '.join(map(str, both))} is tuned on too, in tuning_seeds: results need seeds of their own"
        )
    methods = _of(dict, _needed(says, "methods"), "methods")
    if not methods:
        raise ValueError("methods: names none")
    trials: dict[str, list[dict[str, Any]]] = {}
    grids: dict[str, dict[str, list[Any]]] = {}
    slugs: dict[str, str] = {}
    owns: list[dict[str, Any]] = []  # every trial's settings, without the base's
    for name, method in methods.items():
        where = f"methods.{name}"
        if not isinstance(name, str) or not slug(name):
            raise ValueError(f"{where}: a method's name needs letters or digits")
        if (size := len(slug(name).encode())) > LONGEST_NAME:
            raise ValueError(f"{where}: its folder's name would have {size} bytes, {LONGEST_NAME} at most: shorten it")
        if slugs.setdefault(slug(name), name) != name:
            raise ValueError(f"{where}: its folder would be that of {slugs[slug(name)]!r}: choose another name")
        method = _of(dict, method or {}, where)
        _known(method, ("settings", "grid"), where)
        settings = _settings(method.get("settings") or {}, f"{where}.settings")
        grids[name] = _grid(method.get("grid") or {}, f"{where}.grid")
        if (many := math.prod(map(len, grids[name].values()))) > MOST_TRIALS:
            raise ValueError(f"{where}.grid: {many} trials, {MOST_TRIALS} at most")
        own = [settings | choice for choice in _choices(grids[name])]
        owns += own
        trials[name] = [with_shared(settings, base) for settings in own]
        for choice in trials[name]:
            for seed in (*seeds, *tuning_seeds):
                try:
                    Config(**{**choice, "rounds": rounds, "seed": seed})
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
    try:
        all_with_shared(owns, base)
    except ValueError as error:
        raise ValueError(f"base: {error}") from None
    unequal = _of(str, says.get("unequal") or "", "unequal")
    counts = {name: len(found) for name, found in trials.items()}
    if len(set(counts.values())) > 1 and not unequal:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"methods: not equally many trials ({listed}): make the grids equal, or give unequal: why")
    memory = _of(list, says.get("memory") or [], "memory")
    for half in memory:
        if half not in list(HALVES):
            raise ValueError(f"memory: {half!r} is none of {', '.join(HALVES)}")
    return Study(text, rounds, seeds, tuning_seeds, trials, grids, tuple(memory), unequal)


def _needed(says: dict[str, Any], key: str) -> Any:
    if says.get(key) is None:
        raise ValueError(f"{key} is missing")
    return says[key]


def _of(kind: type, value: Any, where: str) -> Any:
    names = {dict: "a mapping", list: "a list", int: "a whole number", str: "text"}
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {names[kind]} is needed, got {value!r}")
    return value


def _known(says: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in says:
        if key not in keys:
            raise ValueError(f"{where + '.' if where else ''}{key}: unknown; there are {', '.join(keys)}")


def _seeds(says: dict[str, Any], key: str) -> tuple[int, ...]:
    seeds = [_of(int, seed, key) for seed in _of(list, _needed(says, key), key)]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{key}: one seed or more is needed, each once, got {seeds}")
    return tuple(seeds)


def _settings(says: Any, where: str) -> dict[str, Any]:
    return {name: _value(name, value, where) for name, value in _of(dict, says, where).items()}


def _grid(says: Any, where: str) -> dict[str, list[Any]]:
    grid = {}
    for name, values in _of(dict, says, where).items():
        grid[name] = [_value(name, value, where) for value in _of(list, values, f"{where}.{name}")]
        once = {json.dumps(value, sort_keys=True) for value in grid[name]}
        if not grid[name] or len(once) < len(grid[name]):
            raise ValueError(f"{where}.{name}: one value or more is needed, each once, got {values}")
        if name in NO_CHOICE and len(grid[name]) > 1:
            raise ValueError(f"{where}.{name}: its trials would all be the same run: put one value into settings")
    return grid


def _choices(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _value(name: Any, value: Any, where: str) -> Any:
    """A setting's value, of its type."""
    if name in OWN:
        raise ValueError(f"{where}.{name}: the study makes that itself; it has rounds, seeds and tuning_seeds")
    if name not in Config.names():
        known = ", ".join(n for n in Config.names() if n not in OWN)
        raise ValueError(f"{where}.{name}: no such setting; there are {known}")
    try:
        value = typed(name, value)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    choices = FIELDS[name].metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{where}.{name}: one of {', '.join(choices)} is needed, got {value!r}")
    return value


Result = dict[str, Any]
_warm: list[str] = []  # not empty once this process has trained


def run_job(job: Job) -> Result | None:
    """One run: settings, outcome and evaluations. One that diverges, learns nothing, or ends with a first score that is
    not finite, says so; None: interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluations: list[Evaluation] = []
    begin, done = time.perf_counter(), 0

    def progress(round: int, loss: float, evaluation: Evaluation | None, moved: int) -> None:
        nonlocal done
        done = round
        if evaluation is not None:
            evaluations.append(evaluation)

    outcome: dict[str, Any] = {"failure": None}
    try:
        if not _warm:  # a process's first round waits for imports and caches: nobody's seconds
            _warm.append(job.config.task)
            if train(replace(job.config, rounds=1, server_first=0)).interrupted:
                return None
            begin = time.perf_counter()
        summary = train(job.config, None, progress)
        if summary.interrupted:
            return None
        if not math.isfinite(summary.accuracy):  # by which no trial can be chosen, and which no file holds
            raise Diverged(f"the {metric(summary.scores)} after round {summary.rounds} is not finite")
        # Of this process that may have made other runs: its peak is not this run's.
        outcome |= {k: v for k, v in asdict(summary).items() if k not in ("config", "peak_memory", "interrupted")}
    except (LatticeError, Diverged, NothingLearnt) as error:
        outcome |= {"failure": str(error), "rounds": done, "machine": machine()}
        outcome["seconds"] = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    result = {"phase": job.phase, "method": job.method, "trial": job.trial, "config": asdict(job.config)}
    return {**result, **outcome, "evaluations": [asdict(e) for e in evaluations]}


def _worker(parent: int) -> None:
    """A process of the pool: Ctrl-C is its parent's affair, and without a parent it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def results(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result | None]]:
    """Each job and its result as they are done, in so many processes; one: this one.

    Raises ChildProcessError, after all results that there are, if the system ends a process.
    """
    if workers == 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_worker, initargs=(os.getpid(),))
    # They inherit what this thread blocks: a Ctrl-C while they import torch is not theirs either. Here it only waits.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            of = {pool.submit(run_job, job): job for job in jobs}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        broken = False
        for future in as_completed(of):
            if isinstance(future.exception(), BrokenProcessPool):
                broken = True
            else:
                yield of[future], future.result()
        if broken:
            raise ChildProcessError(
                "the system killed one of the study's processes, most likely for lack of memory: the same command goes"
                " on where it was, and fewer --jobs need less"
            )
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # what it was at is not written anywhere
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class State:
    """How far a study is. seconds_left: None before any run has ended. ended: of the run that just did, a line."""

    phase: str
    done: int
    runs: int
    seconds_left: float | None
    ended: str = ""


def run_study(
    study: Study, folder: Path, workers: int = 1, progress: Callable[[State], None] = lambda state: None
) -> bool:
    """Run what the folder does not hold yet; True if nothing is left, False if Ctrl-C came first.

    Writes table.json when all is there. Raises ValueError if the folder holds another study, naming what differs, or a
    file that is damaged or was made of other data; and if another process is at work in it. Before any run it raises
    what tasks raise whose data, model or rates are not there. Raises ChildProcessError as `results` does.
    """
    try:
        contents = Contents(check_tasks(study))
        folder.mkdir(parents=True, exist_ok=True)
        others = (path for path in folder.iterdir() if path.name != "lock" and not path.name.startswith("."))
        if not (folder / "study.yaml").exists() and any(others):
            raise ValueError(f"{folder} holds no study, and is not empty: choose another folder")
        with closing(FolderLock(folder, "study")):
            take_up(study, folder)
            for job in (*study.tuning(), *finals(study, folder)):
                if (result := held(job, folder)) is not None:
                    contents.check(job, result, folder)
            return _all(study, folder, workers, progress, contents)
    except KeyboardInterrupt:
        return False


def _all(study: Study, folder: Path, workers: int, progress: Callable[[State], None], contents: Contents) -> bool:
    """Both phases, what is to be measured beside them, and the table. False: interrupted."""
    if not _run(study, study.tuning(), folder, workers, progress, contents):
        return False
    if not _run(study, finals(study, folder), folder, workers, progress, contents):
        return False
    if study.memory and measured(folder) is None:
        _write(folder / "client-memory.json", client_memory(study.memory))
    _write(folder / "table.json", table(study, folder))
    return True


Data = tuple[str, str, str, int, str, str]  # the settings that say which data and model


def _data(config: Config) -> Data:
    options = json.dumps(config.options, sort_keys=True)
    return config.task, options, config.data, config.public, config.model, config.at


def check_tasks(study: Study) -> dict[Data, str]:
    """Find out what cannot work now, rather than when a method's turn comes. Raises what tasks raise.

    Returns the digest of each of the study's data.
    """
    tasks: dict[Data, Task] = {}
    for job in study.tuning():
        key = _data(job.config)
        if key not in tasks:
            tasks[key] = task_of(job.config)
        rates_of(tasks[key], job.config)
    return {key: task.digest() for key, task in tasks.items()}


class Contents:
    """What a study's runs are made of: its data have these digests, and runs that begin alike have one model."""

    def __init__(self, data: dict[Data, str]) -> None:
        self.data = data
        self._models: dict[tuple[Any, ...], tuple[str, str]] = {}
        self._warned = False

    def check(self, job: Job, result: Result, folder: Path) -> None:
        """Raises ValueError, naming the job's file, if its result was made of something else than the study's."""
        path, config = folder / job.file, job.config
        if "provenance" not in result:  # made before results said it
            if not self._warned:
                warnings.warn(f"{path} does not say of what data and model it was made: it is taken", stacklevel=2)
            self._warned = True
            return
        data, model = result["provenance"]["data"], result["provenance"]["model"]
        now = self.data[_data(config)]
        if data and now and data != now:
            raise ValueError(
                f"{path} was made of other data than the study's now (digest {data[:16]}, now {now[:16]}): put the data"
                " back, or take another folder"
            )
        calibrated = (config.calibrate, config.aggregation) if config.calibrate else ()
        alike = (*_data(config), config.trains, config.frozen, config.dtype, config.seed, calibrated)
        first, where = self._models.setdefault(alike, (model, job.file)) if model else (model, "")
        if model != first:
            raise ValueError(
                f"{path} was made of another model than {folder / where} (digest {model[:16]}, there {first[:16]}): put"
                " the model back, or take another folder"
            )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _run(
    study: Study,
    jobs: Sequence[Job],
    folder: Path,
    workers: int,
    progress: Callable[[State], None],
    contents: Contents,
) -> bool:
    """The jobs that have no result yet. False: interrupted."""
    todo = [job for job in jobs if held(job, folder) is None]
    took = _seconds(study, folder)
    left = {job.file: job for job in todo}
    total = len(study.tuning()) + len(study.trials) * len(study.seeds)
    before = 0 if jobs and jobs[0].phase == TUNING else len(study.tuning())

    def tell(ended: str = "") -> None:
        known = [s for found in took.values() for s in found]
        waiting = [job.method for job in left.values()]
        if jobs and jobs[0].phase == TUNING:
            waiting += [method for method in study.trials for _ in study.seeds]
        of = {method: mean(took.get(method, known)) for method in waiting} if known else {}
        seconds = sum(of[method] for method in waiting) / workers if known else None
        phase = jobs[0].phase if jobs else FINAL
        progress(State(phase, before + len(jobs) - len(left), total, seconds, ended))

    tell()
    for job, result in results(todo, workers):
        if result is None:
            return False
        # A run that diverged has no summary that says it.
        made_of = {"settings": job.config.decisive(), "data": contents.data[_data(job.config)], "model": "", "log": ""}
        contents.check(job, result := {"provenance": made_of, "jobs": workers, **result}, folder)
        _write(folder / job.file, result)
        del left[job.file]
        took.setdefault(job.method, []).append(result["seconds"])
        tell(_line(job, result))
    return True


def _line(job: Job, result: Result) -> str:
    reached = result["failure"] or f"{metric(result['scores'])} {result['accuracy']:.4f}, loss {result['loss']:.4f}"
    return f"{job.method}, trial {job.trial}, seed {job.config.seed}: {reached}, {result['seconds']:.0f} s"


def _seconds(study: Study, folder: Path) -> dict[str, list[float]]:
    """What each method's runs took so far."""
    took: dict[str, list[float]] = {}
    for job in (*study.tuning(), *finals(study, folder)):
        if (result := held(job, folder)) is not None:
            took.setdefault(job.method, []).append(result["seconds"])
    return took


# What a file must hold, as far as it is read: a type; a mapping's keys, `str` for any; a list's items.
_NUMBER = (int, float)
_MACHINE = dict.fromkeys(("processor", "cores", "gpu", "threads", "system", "python"), object)
_EVALUATION = {
    **dict.fromkeys(("round", "bytes", "seconds"), _NUMBER),
    **dict.fromkeys(QUANTITIES, (*_NUMBER, type(None))),
}
_RUN: dict[Any, Any] = {
    **dict.fromkeys(("phase", "method"), str),
    "trial": int,
    "config": dict,
    "failure": (str, type(None)),
    "seconds": _NUMBER,
    "machine": _MACHINE,
    "evaluations": [_EVALUATION],
}
_GOOD: dict[Any, Any] = {
    **dict.fromkeys((*QUANTITIES, "forward_seconds", "answer_seconds"), _NUMBER),
    "scores": dict,
    "bytes_per_client_round": {str: _NUMBER},
    "replicas": {"equal": bool},
}
_PROVENANCE = {"data": str, "model": str}
_WAY = dict.fromkeys(("peak_extra", "cut", "of_bound"), _NUMBER)
_HALF = {"what": str, "batch": int, "ways": {"inference": _WAY, str: _WAY}}
_MEMORY = {"machine": _MACHINE, "device": str, "bound": _NUMBER, "halves": {str: _HALF}}


def _misfits(value: Any, shape: Any, where: str = "it") -> Iterator[str]:
    """What keeps a value from having a shape."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inside in shape.items():
            if key is not str and key not in value:
                yield f"{where} has no {key}"
            for name in value if key is str else {key} & value.keys():
                yield from _misfits(value[name], inside, f"its {name}" if where == "it" else f"{where}'s {name}")
    elif isinstance(shape, list) and isinstance(value, list):
        for item in value:
            yield from _misfits(item, shape[0], f"one of {where}")
    elif not isinstance(value, type(shape) if isinstance(shape, (dict, list)) else shape):
        yield f"{where} cannot be {str(value)[:40]!r}"


def _read(path: Path, shape: Any) -> Any:
    """What a JSON file holds; None if it is not there. Raises ValueError if it is damaged or has another shape."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(path.read_bytes().decode(), parse_constant=constant)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from None
    _check(path, value, shape)
    return value


def _check(path: Path, value: Any, shape: Any) -> None:
    if (misfit := next(_misfits(value, shape), None)) is not None:
        raise ValueError(f"{path} is not what belongs there ({misfit}): {AGAIN}")


def held(job: Job, folder: Path) -> Result | None:
    """A job's result, if the folder has it. Raises ValueError if the file is damaged or another's, and says why."""
    path = folder / job.file
    result: Result | None = _read(path, _RUN)
    if result is None:
        return None
    if not result["failure"]:
        _check(path, result, _GOOD)
    if "provenance" in result:  # results from before have none
        _check(path, result, {"provenance": _PROVENANCE})
    if "lower_is_better" in result:
        _check(path, result, {"lower_is_better": [str]})
    if "jobs" in result:  # nor these
        _check(path, result, {"jobs": int})
    was = decisive(result["config"])
    now = {"phase": job.phase, "method": job.method, "trial": job.trial}
    changed = differences({**{key: result[key] for key in now}, **was}, {**now, **job.config.decisive()})
    if changed:
        raise ValueError(f"{path} is of another run ({'; '.join(changed)}): {AGAIN}, or take another folder")
    return result


def measured(folder: Path) -> dict[str, Any] | None:
    """A study's client-memory.json, if the folder has it. Raises ValueError if it is damaged."""
    found: dict[str, Any] | None = _read(folder / "client-memory.json", _MEMORY)
    return found


def take_up(study: Study, folder: Path) -> None:
    """Make the folder this study's. Raises ValueError if it is another's, naming the keys that differ.

    Methods may be added: what the others did stays what it is. So does it where settings change that no bit depends on.
    """
    from hosfl.studies.yaml12 import parse_yaml

    path = folder / "study.yaml"
    if not path.exists():
        write_atomically(path, study.text.encode())
        return
    try:
        held = parse_yaml(load_study(path).text)
    except ValueError as error:
        raise ValueError(f"{error}. It is the folder's copy of the study's file: copy that over it") from None
    says = parse_yaml(study.text)
    added = [method for method in says["methods"] if method not in held["methods"]]
    known = {**says, "methods": {name: method for name, method in says["methods"].items() if name not in added}}
    changed = differences(*(dict(_flat(_decisive(of))) for of in (held, known)))
    if changed:
        raise ValueError(
            f"{folder} holds another study; what differs: {'; '.join(changed)}. Choose another folder, or put it back"
        )
    if says != held:
        write_atomically(path, study.text.encode())


def _decisive(says: dict[str, Any]) -> dict[str, Any]:
    """A study's file without the settings that no bit depends on."""
    methods = {name: m or {} for name, m in says["methods"].items()}
    methods = {name: {**m, "settings": decisive(m.get("settings") or {})} for name, m in methods.items()}
    return {**says, "base": decisive(says.get("base") or {}), "methods": methods}


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inside in value.items():
            yield from _flat(inside, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def trials(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Every trial that has all its runs: validation figures by seed and their means. Of a failed run, and of a trial
    that has one, they are None."""
    rows = []
    jobs = study.tuning()
    for (method, n), group in itertools.groupby(jobs, lambda job: (job.method, job.trial)):
        found = [held(job, folder) for job in group]
        runs = [run for run in found if run is not None]
        if len(runs) < len(found):
            continue
        failures = [run["failure"] for run in runs if run["failure"]]
        row = {"method": method, "trial": n, "choice": _choices(study.grids[method])[n], "failures": failures}
        for name, each in zip(QUANTITIES, ("accuracies", "losses"), strict=True):
            row[each] = [None if run["failure"] else run[name] for run in runs]
            row[name] = None if failures else mean(row[each])
        rows.append(row)
    return rows


def best(study: Study, folder: Path) -> dict[str, int | None]:
    """The trial of each method: the best mean validation accuracy, or whatever the task's first score is, the least
    where less is better; at equal accuracy the lower loss, then the first one. A run that failed is worse than any that
    did not: first of all counts how many of a trial did. None where in every trial every run failed."""
    chosen: dict[str, int | None] = {}
    sign = -1 if _metric(study, folder)[1] else 1

    def merit(row: dict[str, Any]) -> tuple[float, ...]:
        accuracy, loss = (mean(v for v in row[each] if v is not None) for each in ("accuracies", "losses"))
        return -len(row["failures"]), sign * accuracy, -loss

    for method, group in itertools.groupby(trials(study, folder), lambda row: row["method"]):
        rows = [row for row in group if len(row["failures"]) < len(row["losses"])]
        top = max(rows, key=merit, default=None)
        chosen[method] = None if top is None else top["trial"]
    return chosen


def finals(study: Study, folder: Path) -> list[Job]:
    """The final runs of each method whose trials have all their runs, as far as one of them worked."""
    ended = Counter(row["method"] for row in trials(study, folder))
    chosen = best(study, folder).items()
    whole = [(method, n) for method, n in chosen if n is not None and ended[method] == len(study.trials[method])]
    return [job for method, n in whole for job in study.final(method, n)]


def table(study: Study, folder: Path) -> dict[str, Any]:
    """What the study found so far: a row per method of its final runs, and every trial.

    Means are over the runs that did not fail; error: the standard error of a mean over seeds, None for one seed. jobs:
    of how many runs at a time the method's were; none where they were made before results said it.
    """
    tried = trials(study, folder)
    complete = len(tried) == sum(map(len, study.trials.values()))
    rows: dict[str, Any] = {}
    for method, trial in best(study, folder).items() if complete else ():
        runs = [] if trial is None else [held(job, folder) for job in study.final(method, trial)]
        rows[method] = _row(study, method, trial, [run for run in runs if run is not None])
    _add_gap(rows)
    for row in rows.values():
        del row["curves"]
    name, lower = _metric(study, folder)
    what = {"rounds": study.rounds, "unequal": study.unequal, "metric": name, "lower_is_better": lower}
    return {**what, "machine": machine(), "methods": rows, "trials": tried}


def _metric(study: Study, folder: Path) -> tuple[str, bool]:
    """What the study's task calls the accuracy, and whether less of it is better, as far as a run has said so."""
    runs = (held(job, folder) for job in study.tuning())
    run: Result = next((run for run in runs if run and not run["failure"]), {"scores": {}})
    name = metric(run["scores"])
    return name, name in (*run.get("lower_is_better", ()), *LOWER_IS_BETTER)


def _row(study: Study, method: str, trial: int | None, runs: Sequence[Result]) -> dict[str, Any]:
    good = [run for run in runs if not run["failure"]]
    row: dict[str, Any] = {
        "trial": trial,
        "settings": None if trial is None else study.trials[method][trial],
        "seeds": [run["config"]["seed"] for run in good],
        "failures": {run["config"]["seed"]: run["failure"] for run in runs if run["failure"]},
    }
    for quantity in QUANTITIES:
        values = [run[quantity] for run in good]
        row[f"each_{quantity}"] = values
        row[quantity] = mean(values) if values else None
        row[f"{quantity}_error"] = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    categories = sorted({c for run in good for c in run["bytes_per_client_round"]})
    row["bytes_per_client_round"] = {
        c: mean(run["bytes_per_client_round"].get(c, 0.0) for run in good) for c in categories
    }
    for name in ("seconds", "forward_seconds", "answer_seconds"):
        row[name] = mean(run[name] for run in good) if good else None
    row["jobs"] = sorted({run["jobs"] for run in good if "jobs" in run})  # at a time, which says what seconds are worth
    row["curves"] = [run["evaluations"] for run in good]
    row["replicas_equal"] = all(run["replicas"]["equal"] for run in good) if good else None
    return row


def _add_gap(rows: dict[str, Any]) -> None:
    """The share of the way from the frozen client to the first-order one, where the study has one of each.

    Of several of a kind the control is the one that is called "frozen" or "first-order".
    At equal rounds, and in equal seconds: what a method has reached when the last of first-order's runs ends, between
    two evaluations by linear interpolation. A run that has ended by then keeps its result.
    """

    def control(kind: str) -> list[dict[str, Any]]:
        of = {m: r for m, r in rows.items() if r["settings"] and r["settings"].get("method", "ho") == kind}
        chosen = [of[kind]] if kind in of else list(of.values())
        return [r for r in chosen if r["accuracy"] is not None]

    low, high = control("frozen"), control("first-order")
    end = max((curve[-1]["seconds"] for row in high for curve in row["curves"]), default=0.0)
    for row, q in itertools.product(rows.values(), QUANTITIES):
        row[f"{q}_gap_recovered"] = row[f"{q}_gap_in_equal_seconds"] = None
        if len(low) == len(high) == 1 and row["curves"]:
            controls = low[0][q], high[0][q]
            row[f"{q}_gap_recovered"] = gap_recovered(row[q], *controls)
            by_then = [_reached(curve, end, q) for curve in row["curves"]]
            known = [value for value in by_then if value is not None]
            if len(known) == len(by_then):
                row[f"{q}_gap_in_equal_seconds"] = gap_recovered(mean(known), *controls)


def _reached(curve: Sequence[Mapping[str, Any]], seconds: float, quantity: str) -> float | None:
    """What a run had reached after so many seconds; None before its first evaluation, when nobody knows."""
    curve = [e for e in curve if e[quantity] is not None]
    after = next((n for n, e in enumerate(curve) if e["seconds"] >= seconds), len(curve))
    if after == len(curve):
        return float(curve[-1][quantity])
    a, b = curve[max(0, after - 1)], curve[after]
    if b["seconds"] == seconds:
        return float(b[quantity])
    if after == 0:
        return None
    part = (seconds - a["seconds"]) / (b["seconds"] - a["seconds"])
    return float(a[quantity] + part * (b[quantity] - a[quantity]))
