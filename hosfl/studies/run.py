"""A study from where it is to its end."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from hosfl.files import FolderLock, write_json
from hosfl.runs.assemble import rates_of, task_of
from hosfl.runs.config import Config
from hosfl.runs.memory import client_memory
from hosfl.runs.report import metric
from hosfl.studies.folder import claim_folder, saved_memory, saved_result
from hosfl.studies.jobs import run_jobs
from hosfl.studies.study import FINAL, TUNING, Job, Result, Study
from hosfl.studies.table import final_jobs, study_table
from hosfl.tasks.task import Task


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is. seconds_left: None before any run has ended. ended: of the run that just did, a line."""

    phase: str
    done: int
    runs: int
    seconds_left: float | None
    ended: str = ""


def run_study(
    study: Study, folder: Path, workers: int = 1, progress: Callable[[StudyProgress], None] = lambda state: None
) -> bool:
    """Run what the folder does not hold yet; True if nothing is left, False if Ctrl-C came first.

    Writes table.json when all is there. Raises ValueError if the folder holds another study, naming what differs, or a
    file that is damaged or was made of other data; and if another process is at work in it. Before any run it raises
    what tasks raise whose data, model or rates are not there. Raises ChildProcessError as `run_jobs` does.
    A study whose first run cannot start leaves nothing.
    """
    try:
        contents = ProvenanceCheck(check_tasks(study))
        folder.mkdir(parents=True, exist_ok=True)
        others = (path for path in folder.iterdir() if path.name != "lock" and not path.name.startswith("."))
        if not (folder / "study.yaml").exists() and any(others):
            raise ValueError(f"{folder} holds no study, and is not empty: choose another folder")
        with closing(FolderLock(folder, "study")):
            mine = not (folder / "study.yaml").exists()
            try:
                claim_folder(study, folder)
                for job in (*study.tuning(), *final_jobs(study, folder)):
                    if (result := saved_result(job, folder)) is not None:
                        contents.check(job, result, folder)
                return _run_all(study, folder, workers, progress, contents)
            except Exception:
                if mine and not (folder / TUNING).exists():  # it came to nothing: mended, it may be given again
                    for name in ("study.yaml", "lock"):
                        (folder / name).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # it holds something else, which is not ours
                        folder.rmdir()
                raise
    except KeyboardInterrupt:
        return False


def _run_all(
    study: Study, folder: Path, workers: int, progress: Callable[[StudyProgress], None], contents: ProvenanceCheck
) -> bool:
    """Both phases, what is to be measured beside them, and the table. False: interrupted."""
    if not _run_jobs(study, study.tuning(), folder, workers, progress, contents):
        return False
    if not _run_jobs(study, final_jobs(study, folder), folder, workers, progress, contents):
        return False
    if study.memory and saved_memory(folder) is None:
        _write(folder / "client-memory.json", client_memory(study.memory))
    _write(folder / "table.json", study_table(study, folder))
    return True


DataKey = tuple[str, str, str, int, str, str]  # the settings that say which data and model


def _data_key(config: Config) -> DataKey:
    options = json.dumps(config.options, sort_keys=True)
    return config.task, options, config.data, config.public, config.model, config.at


def check_tasks(study: Study) -> dict[DataKey, str]:
    """Find out what cannot work now, rather than when a method's turn comes. Raises what tasks raise.

    Returns the digest of each of the study's data.
    """
    tasks: dict[DataKey, Task] = {}
    for job in study.tuning():
        key = _data_key(job.config)
        if key not in tasks:
            tasks[key] = task_of(job.config)
        rates_of(tasks[key], job.config)
    return {key: task.digest() for key, task in tasks.items()}


class ProvenanceCheck:
    """Checks that all runs of a study used the same data, and runs with the same settings of a model the same model."""

    def __init__(self, data: dict[DataKey, str]) -> None:
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
        now = self.data[_data_key(config)]
        if data and now and data != now:
            raise ValueError(
                f"{path} was made of other data than the study's now (digest {data[:16]}, now {now[:16]}): put the data"
                " back, or take another folder"
            )
        calibrated = (config.calibrate, config.aggregation) if config.calibrate else ()
        alike = (*_data_key(config), config.trains, config.frozen, config.dtype, config.seed, calibrated)
        first, where = self._models.setdefault(alike, (model, job.file)) if model else (model, "")
        if model != first:
            raise ValueError(
                f"{path} was made of another model than {folder / where} (digest {model[:16]}, there {first[:16]}): put"
                " the model back, or take another folder"
            )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _run_jobs(
    study: Study,
    jobs: Sequence[Job],
    folder: Path,
    workers: int,
    progress: Callable[[StudyProgress], None],
    contents: ProvenanceCheck,
) -> bool:
    """The jobs that have no result yet. False: interrupted."""
    todo = [job for job in jobs if saved_result(job, folder) is None]
    took = _seconds_by_method(study, folder)
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
        progress(StudyProgress(phase, before + len(jobs) - len(left), total, seconds, ended))

    tell()
    for job, result in run_jobs(todo, workers):
        if result is None:
            return False
        # A run that diverged has no summary that says it.
        made_of = {
            "settings": job.config.decisive(),
            "data": contents.data[_data_key(job.config)],
            "model": "",
            "log": "",
        }
        contents.check(job, result := {"provenance": made_of, "jobs": workers, **result}, folder)
        _write(folder / job.file, result)
        del left[job.file]
        took.setdefault(job.method, []).append(result["seconds"])
        tell(_result_line(job, result))
    return True


def _result_line(job: Job, result: Result) -> str:
    reached = result["failure"] or f"{metric(result['scores'])} {result['accuracy']:.4f}, loss {result['loss']:.4f}"
    return f"{job.method}, trial {job.trial}, seed {job.config.seed}: {reached}, {result['seconds']:.0f} s"


def _seconds_by_method(study: Study, folder: Path) -> dict[str, list[float]]:
    """What each method's runs took so far."""
    took: dict[str, list[float]] = {}
    for job in (*study.tuning(), *final_jobs(study, folder)):
        if (result := saved_result(job, folder)) is not None:
            took.setdefault(job.method, []).append(result["seconds"])
    return took
