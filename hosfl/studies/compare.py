"""Comparison of methods with the same seeds, data, batches and rounds, in one table."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from hosfl.files import write_json
from hosfl.protocol.provenance import ProvenanceError
from hosfl.references import short_name
from hosfl.runs.config import Config
from hosfl.runs.report import Evaluation, Summary, gap_recovered, machine, metric, plot_curves
from hosfl.runs.trainer import Progress, interruptible, train
from hosfl.settings import DEFAULTS

log = logging.getLogger(__name__)

CATEGORIES = (
    *("cut up", "labels up", "mask up", "multiplier down", "losses down", "scalars up", "scalars down", "gradient up"),
    *("weights up", "weights down", "statistics up", "samples up", "statistics down"),
)
PASSES = ("client forward", "client backward", "server forward", "server backward")


def compare(
    configs: Sequence[Config], out: Path, bar: Callable[[Config], AbstractContextManager[Progress]]
) -> dict[str, Any]:
    """Run every configuration, write out/table.json, out/curves.png and a folder per run, and return the table.

    bar: context manager that shows the progress of one run. Ctrl-C ends the current run and skips the rest; the table
    then holds the finished runs. So it does where a run raises an error, which is raised again. Raises ValueError for a
    method and seed that occur twice, FileExistsError if `out` holds a comparison, ProvenanceError if the data change
    between runs.
    """
    pairs = [(short_name(config.method), config.seed) for config in configs]
    for method, seed in pairs:
        if pairs.count((method, seed)) > 1:
            raise ValueError(f"method {method} with seed {seed} is there twice: name each method and each seed once")
    out.mkdir(parents=True, exist_ok=True)
    if (out / "table.json").exists():
        raise FileExistsError(f"{out} holds a comparison already: choose another folder or delete it")
    runs: dict[str, list[Summary]] = {}
    curves: dict[str, list[Sequence[Evaluation]]] = {}
    failure: Exception | None = None
    with interruptible() as interrupted:
        for config in configs:
            if interrupted.is_set():
                break
            name = short_name(config.method)
            folder = out / f"{name}-{config.seed}"
            try:
                with bar(config) as progress:
                    summary = train(config, folder, progress)
            except Exception as error:
                if not runs:
                    raise
                failure = error
                break
            if summary.interrupted:
                break
            runs.setdefault(name, []).append(summary)
            data = {s.provenance["data"] for summaries in runs.values() for s in summaries}
            if len(data) > 1:
                raise ProvenanceError(
                    f"the data changed while the runs went on: {folder} saw others than the runs before"
                )
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            curves.setdefault(name, []).append([Evaluation.read(line)[0] for line in lines])
    shared = {k: v for k, v in DEFAULTS.items() if k not in ("method", "seed")}
    for config in configs:  # a method that does not read a setting has its default
        shared |= {k: v for k, v in asdict(config).items() if k in shared and v != DEFAULTS[k]}
    table: dict[str, Any] = {
        "interrupted": sum(map(len, runs.values())) < len(configs),
        "config": shared,
        "machine": machine(),
        "methods": {method: method_row(summaries) for method, summaries in runs.items()},
    }
    _add_gap(table["methods"])
    write_json(out / "table.json", table)
    if curves:
        seeds = max(len(s) for s in runs.values())
        shown = f"mean of {seeds} seeds, band from worst to best" if seeds > 1 else f"seed {configs[0].seed}"
        plot_curves(curves, out / "curves.png", f"{configs[0].task}: {shown}")
    if failure is not None:
        done = sum(map(len, runs.values()))
        log.warning("%s ended in an error; %s has the %d runs before it", folder, out / "table.json", done)
        raise failure
    return table


def method_row(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return a method's row of the table: means over seeds, and the figures of each seed."""
    return {
        "seeds": [s.config["seed"] for s in summaries],
        "accuracy": mean(s.accuracy for s in summaries),
        "scores": {name: mean(s.scores[name] for s in summaries) for name in summaries[0].scores},
        "loss": mean(s.loss for s in summaries),
        "accuracies": [s.accuracy for s in summaries],
        "losses": [s.loss for s in summaries],
        "bytes_per_client_round": {
            category: mean(s.bytes_per_client_round.get(category, 0.0) for s in summaries)
            for category in sorted(set().union(*(s.bytes_per_client_round for s in summaries)))
        },
        "passes_per_client_round": {
            kind: mean(s.passes_per_client_round.get(kind, 0.0) for s in summaries) for kind in PASSES
        },
        "forward_seconds": mean(s.forward_seconds for s in summaries),
        "answer_seconds": mean(s.answer_seconds for s in summaries),
        "seconds": mean(s.seconds for s in summaries),
        "replicas_equal": all(s.replicas is not None and s.replicas.equal for s in summaries),
    }


def _add_gap(methods: dict[str, Any]) -> None:
    """Add to every row the share of the gap between the controls that it recovers, if both controls are there."""
    if not {"frozen", "first-order"} <= set(methods):
        return
    for quantity in ("accuracy", "loss"):
        low, high = methods["frozen"][quantity], methods["first-order"][quantity]
        for row in methods.values():
            row[f"{quantity}_gap_recovered"] = gap_recovered(row[quantity], low, high)


def _score(name: str, row: dict[str, Any]) -> str:
    return f"{row['scores'][name]:.4f}"


def _bytes(category: str, row: dict[str, Any]) -> str:
    return f"{row['bytes_per_client_round'].get(category, 0):,.0f}"


def _passes(kind: str, row: dict[str, Any]) -> str:
    return f"{row['passes_per_client_round'][kind]:,.0f}"


def print_table(table: dict[str, Any]) -> None:
    """Print a comparison: a column for each method, a line for each quantity."""
    methods = table["methods"]
    title = f"{table['config']['task']}, {table['config']['rounds']} rounds"
    printed = Table(title=title, caption="bytes and samples: per client and round")
    printed.add_column("")
    for method, row in methods.items():
        seeds = "1 seed" if len(row["seeds"]) == 1 else f"{len(row['seeds'])} seeds"
        printed.add_column(f"{method} ({seeds})", justify="right")

    def add(label: str, cell: Callable[[dict[str, Any]], str]) -> None:
        printed.add_row(label, *(cell(row) for row in methods.values()))

    def share(row: dict[str, Any], quantity: str) -> str:
        value = row.get(f"{quantity}_gap_recovered")
        return "" if value is None else f"{value + 0.0:.2f}"  # never -0.00

    data = table["config"]["evaluate_on"]
    scores = next(iter(methods.values()))["scores"] if methods else {}
    for name in scores:
        add(f"{data} {name}", partial(_score, name))
    add(f"{data} loss", lambda row: f"{row['loss']:.4f}")
    add(f"{metric(scores)} gap recovered", lambda row: share(row, "accuracy"))
    add("loss gap recovered", lambda row: share(row, "loss"))
    for category in (*CATEGORIES, "framing up", "framing down"):
        if any(category in row["bytes_per_client_round"] for row in methods.values()):
            add(f"bytes, {category}", partial(_bytes, category))
    for kind in PASSES:
        add(f"samples, {kind}", partial(_passes, kind))
    add("client forward, ms", lambda row: f"{row['forward_seconds'] * 1e3:.2f}")
    add("client answer, ms", lambda row: f"{row['answer_seconds'] * 1e3:.2f}")
    add("answer / forward", lambda row: f"{row['answer_seconds'] / row['forward_seconds']:.1f}")
    add("all clients hold the same bits", lambda row: "yes" if row["replicas_equal"] else "NO")
    Console(width=None if sys.stdout.isatty() else 110).print(printed)
