"""The results of a study: its trials, the best one of each method, and its table."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hosfl.runs.report import LOWER_IS_BETTER, gap_recovered, machine, metric
from hosfl.studies.folder import saved_result
from hosfl.studies.study import QUANTITIES, Job, Result, Study, choices


def trial_rows(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each trial whose runs have all ended: validation figures by seed, and their means.

    The figures of a failed run are None, and so are the means of its trial.
    """
    rows = []
    jobs = study.tuning()
    for (method, n), group in itertools.groupby(jobs, lambda job: (job.method, job.trial)):
        results = [saved_result(job, folder) for job in group]
        runs = [run for run in results if run is not None]
        if len(runs) < len(results):
            continue
        failures = [run["failure"] for run in runs if run["failure"]]
        row = {"method": method, "trial": n, "choice": choices(study.grids[method])[n], "failures": failures}
        for name, plural in zip(QUANTITIES, ("accuracies", "losses"), strict=True):
            row[plural] = [None if run["failure"] else run[name] for run in runs]
            row[name] = None if failures else mean(row[plural])
        rows.append(row)
    return rows


def best_trials(study: Study, folder: Path) -> dict[str, int | None]:
    """Choose the best trial of each method, from the trials whose runs have all ended.

    Trials are compared by the number of failed runs, then by mean validation accuracy (or the task's first score, lower
    if that is better), then by mean loss, then by order. None for a method of which every run of every trial failed.
    """
    chosen: dict[str, int | None] = {}
    sign = -1 if _metric(study, folder)[1] else 1

    def merit(row: dict[str, Any]) -> tuple[float, ...]:
        accuracy, loss = (mean(v for v in row[plural] if v is not None) for plural in ("accuracies", "losses"))
        return -len(row["failures"]), sign * accuracy, -loss

    for method, group in itertools.groupby(trial_rows(study, folder), lambda row: row["method"]):
        rows = [row for row in group if len(row["failures"]) < len(row["losses"])]
        best = max(rows, key=merit, default=None)
        chosen[method] = None if best is None else best["trial"]
    return chosen


def final_jobs(study: Study, folder: Path) -> list[Job]:
    """Return the final runs of each method whose tuning is complete, unless none of its trials worked."""
    ended = Counter(row["method"] for row in trial_rows(study, folder))
    best = best_trials(study, folder).items()
    tuned = [(method, n) for method, n in best if n is not None and ended[method] == len(study.trials[method])]
    return [job for method, n in tuned for job in study.final(method, n)]


def study_table(study: Study, folder: Path) -> dict[str, Any]:
    """Return the study's results so far: a row for each method's final runs, if all trials have ended, and all trials.

    Means are over the runs that did not fail. error: the standard error of a mean over seeds, None for one seed. jobs:
    the numbers of runs at a time of the method's runs; earlier versions did not record it.
    """
    trials = trial_rows(study, folder)
    complete = len(trials) == sum(map(len, study.trials.values()))
    rows: dict[str, Any] = {}
    for method, trial in best_trials(study, folder).items() if complete else ():
        runs = [] if trial is None else [saved_result(job, folder) for job in study.final(method, trial)]
        rows[method] = _row(study, method, trial, [run for run in runs if run is not None])
    _add_gap(rows)
    for row in rows.values():
        del row["curves"]
    name, lower = _metric(study, folder)
    head = {"rounds": study.rounds, "unequal": study.unequal, "metric": name, "lower_is_better": lower}
    return {**head, "machine": machine(), "methods": rows, "trials": trials}


def _metric(study: Study, folder: Path) -> tuple[str, bool]:
    """Return (the name of the task's first score, whether lower is better), from the first run that did not fail."""
    runs = (saved_result(job, folder) for job in study.tuning())
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
    row["jobs"] = sorted({run["jobs"] for run in good if "jobs" in run})  # runs at a time, on which seconds depend
    row["curves"] = [run["evaluations"] for run in good]
    row["replicas_equal"] = all(run["replicas"]["equal"] for run in good) if good else None
    return row


def _add_gap(rows: dict[str, Any]) -> None:
    """Add to every row the share of the gap between the controls that it recovers, if the study has one of each.

    The controls are the frozen client and the first-order one; of several rows of a kind, the one that is called
    "frozen" or "first-order". The share is given at equal rounds and in equal seconds: with a method's value at the end
    of the last of first-order's runs, linearly interpolated between evaluations. A run that has ended by then keeps its
    last value.
    """

    def control(kind: str) -> list[dict[str, Any]]:
        of_kind = {m: r for m, r in rows.items() if r["settings"] and r["settings"].get("method", "ho") == kind}
        chosen = [of_kind[kind]] if kind in of_kind else list(of_kind.values())
        return [r for r in chosen if r["accuracy"] is not None]

    low, high = control("frozen"), control("first-order")
    end = max((curve[-1]["seconds"] for row in high for curve in row["curves"]), default=0.0)
    for row, q in itertools.product(rows.values(), QUANTITIES):
        row[f"{q}_gap_recovered"] = row[f"{q}_gap_in_equal_seconds"] = None
        if len(low) == len(high) == 1 and row["curves"]:
            controls = low[0][q], high[0][q]
            row[f"{q}_gap_recovered"] = gap_recovered(row[q], *controls)
            at_end = [_value_at(curve, end, q) for curve in row["curves"]]
            known = [value for value in at_end if value is not None]
            if len(known) == len(at_end):
                row[f"{q}_gap_in_equal_seconds"] = gap_recovered(mean(known), *controls)


def _value_at(curve: Sequence[Mapping[str, Any]], seconds: float, quantity: str) -> float | None:
    """Return a curve's value after so many seconds, linearly interpolated; None before its first evaluation."""
    curve = [e for e in curve if e[quantity] is not None]
    after = next((n for n, e in enumerate(curve) if e["seconds"] >= seconds), len(curve))
    if after == len(curve):
        return float(curve[-1][quantity])
    a, b = curve[max(0, after - 1)], curve[after]
    if b["seconds"] == seconds:
        return float(b[quantity])
    if after == 0:
        return None
    fraction = (seconds - a["seconds"]) / (b["seconds"] - a["seconds"])
    return float(a[quantity] + fraction * (b[quantity] - a[quantity]))
