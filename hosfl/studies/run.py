"""Running a study to its end, from the results that its folder has."""

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
from hosfl.runs.assemble import make_checked_task, rates_of
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
    """The progress of a study.

    done: of `runs`, those that have ended. seconds_left: an estimate; None before any run has ended. last_result: a
    line about the run that has just ended, or "".
    """

    phase: str
    done: int
    runs: int
    seconds_left: float | None
    last_result: str = ""


def run_study(
    study: Study, folder: Path, workers: int = 1, progress: Callable[[StudyProgress], None] = lambda state: None
) -> bool:
    """Make the runs whose results the folder lacks. Returns True if the study is complete, False after Ctrl-C.

    Writes table.json at the end. A study whose first run cannot start leaves no folder.

    Raises ValueError if the folder holds another study, naming what differs, or a result that is damaged or of other
    data, and if another process works in it. Before any run, raises what tasks raise if data, model or rates are
    missing. Raises ChildProcessError as `run_jobs` does.
    """
    try:
        provenance = ProvenanceCheck(check_tasks(study))
        folder.mkdir(parents=True, exist_ok=True)
        others = (path for path in folder.iterdir() if path.name != "lock" and not path.name.startswith("."))
        if not (folder / "study.yaml").exists() and any(others):
            raise ValueError(f"{folder} holds no study, and is not empty: choose another folder")
        with closing(FolderLock(folder, "study")):
            is_new = not (folder / "study.yaml").exists()
            try:
                claim_folder(study, folder)
                for job in (*study.tuning(), *final_jobs(study, folder)):
                    if (result := saved_result(job, folder)) is not None:
                        provenance.check(job, result, folder)
                return _run_all(study, folder, workers, progress, provenance)
            except Exception:
                if is_new and not (folder / TUNING).exists():  # no result: the corrected study may use this folder
                    for name in ("study.yaml", "lock"):
                        (folder / name).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # it holds files of others
                        folder.rmdir()
                raise
    except KeyboardInterrupt:
        return False


def _run_all(
    study: Study, folder: Path, workers: int, progress: Callable[[StudyProgress], None], provenance: ProvenanceCheck
) -> bool:
    """Run both phases, measure the clients' memory, and write the table. False: interrupted."""
    if not _run_jobs(study, study.tuning(), folder, workers, progress, provenance):
        return False
    if not _run_jobs(study, final_jobs(study, folder), folder, workers, progress, provenance):
        return False
    if study.memory and saved_memory(folder) is None:
        _write(folder / "client-memory.json", client_memory(study.memory))
    _write(folder / "table.json", study_table(study, folder))
    return True


DataKey = tuple[str, str, str, int, str, str]  # the settings that determine data and model


def _data_key(config: Config) -> DataKey:
    options = json.dumps(config.options, sort_keys=True)
    return config.task, options, config.data, config.public, config.model, config.at


def check_tasks(study: Study) -> dict[DataKey, str]:
    """Make every task of the study and look up its rates, so that errors come before the first run.

    Returns the digest of the data of each task. Raises what tasks raise.
    """
    tasks: dict[DataKey, Task] = {}
    for job in study.tuning():
        key = _data_key(job.config)
        if key not in tasks:
            tasks[key] = make_checked_task(job.config)
        rates_of(tasks[key], job.config)
    return {key: task.digest() for key, task in tasks.items()}


class ProvenanceCheck:
    """Checks that runs with the same task used the same data, and runs with the same model settings the same model."""

    def __init__(self, data: dict[DataKey, str]) -> None:
        self.data = data
        self._models: dict[tuple[Any, ...], tuple[str, str]] = {}
        self._warned = False

    def check(self, job: Job, result: Result, folder: Path) -> None:
        """Raises ValueError, naming the job's file, if its result was made of other data or of another model."""
        path, config = folder / job.file, job.config
        if "provenance" not in result:  # an earlier version made it
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
        model_key = (*_data_key(config), config.trains, config.frozen, config.dtype, config.seed, calibrated)
        first, where = self._models.setdefault(model_key, (model, job.file)) if model else (model, "")
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
    provenance: ProvenanceCheck,
) -> bool:
    """Run the jobs of a phase that have no result yet, and write their results. False: interrupted."""
    todo = [job for job in jobs if saved_result(job, folder) is None]
    seconds = _seconds_by_method(study, folder)
    left = {job.file: job for job in todo}
    total = len(study.tuning()) + len(study.trials) * len(study.seeds)
    before = 0 if jobs and jobs[0].phase == TUNING else len(study.tuning())

    def report_progress(last_result: str = "") -> None:
        known = [value for values in seconds.values() for value in values]
        waiting = [job.method for job in left.values()]
        if jobs and jobs[0].phase == TUNING:
            waiting += [method for method in study.trials for _ in study.seeds]
        expected = {method: mean(seconds.get(method, known)) for method in waiting} if known else {}
        seconds_left = sum(expected[method] for method in waiting) / workers if known else None
        phase = jobs[0].phase if jobs else FINAL
        progress(StudyProgress(phase, before + len(jobs) - len(left), total, seconds_left, last_result))

    report_progress()
    for job, result in run_jobs(todo, workers):
        if result is None:
            return False
        source = {  # for a run that diverged, whose result has none
            "settings": job.config.decisive(),
            "data": provenance.data[_data_key(job.config)],
            "model": "",
            "log": "",
        }
        provenance.check(job, result := {"provenance": source, "jobs": workers, **result}, folder)
        _write(folder / job.file, result)
        del left[job.file]
        seconds.setdefault(job.method, []).append(result["seconds"])
        report_progress(_result_line(job, result))
    return True


def _result_line(job: Job, result: Result) -> str:
    outcome = result["failure"] or f"{metric(result['scores'])} {result['accuracy']:.4f}, loss {result['loss']:.4f}"
    return f"{job.method}, trial {job.trial}, seed {job.config.seed}: {outcome}, {result['seconds']:.0f} s"


def _seconds_by_method(study: Study, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of each method's runs so far."""
    seconds: dict[str, list[float]] = {}
    for job in (*study.tuning(), *final_jobs(study, folder)):
        if (result := saved_result(job, folder)) is not None:
            seconds.setdefault(job.method, []).append(result["seconds"])
    return seconds
