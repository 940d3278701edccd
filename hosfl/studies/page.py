"""A study's folder as one page that needs nothing else, and its figures as PNG: what `hosfl report` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from hosfl.extras import require
from hosfl.files import write_atomically
from hosfl.runs.config import Config
from hosfl.runs.memory import BOUNDED, reference
from hosfl.runs.pages import document, html_image, html_table
from hosfl.runs.report import logarithmic, name_lines, save_figure
from hosfl.studies.folder import saved_memory, saved_result
from hosfl.studies.study import Result, Study, load_study
from hosfl.studies.table import final_jobs, study_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Against what curves are drawn: name, axis, and an evaluation's value on it.
AXES: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
    ("rounds", lambda e: e["round"]),
    ("MB on the wire, all clients", lambda e: e["bytes"] / 1e6),
    ("seconds", lambda e: e["seconds"]),
)


def report(folder: Path) -> Path:
    """Write report.html, curves.png and, where memory was measured, memory.png into a study's folder; the page's path.

    A study that is not finished is shown as far as it is. Raises FileNotFoundError where there is no study, and
    ValueError naming a file of it that is damaged or another study's.
    """
    if not (folder / "study.yaml").exists():
        raise FileNotFoundError(f"{folder} holds no study: there is no study.yaml")
    study = load_study(folder / "study.yaml")
    found = study_table(study, folder)
    runs = {
        method: [r for job in study.final(method, row["trial"]) if (r := saved_result(job, folder)) is not None]
        for method, row in found["methods"].items()
        if row["trial"] is not None
    }
    memory = saved_memory(folder)
    good = {m: [r for r in rs if not r["failure"]] for m, rs in runs.items()}
    if any(good.values()):
        plot_curves(good, folder / "curves.png", found["metric"])
    if memory is not None:
        plot_memory(memory, folder / "memory.png")
    path = folder / "report.html"
    write_atomically(path, page(study, found, runs, memory, folder).encode())
    return path


def plot_curves(runs: dict[str, list[Result]], path: Path, metric: str) -> None:
    """Accuracy and loss on test data against rounds, bytes and seconds: means over seeds, bands of a standard error.

    metric: what the task calls the accuracy.
    """
    figure: Figure = require("matplotlib.figure", path.name).Figure(figsize=(13, 7.2), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharey="row", sharex="col")
    colors = require("matplotlib", path.name).colormaps["tab10" if len(runs) <= 10 else "tab20"].colors
    lines = {}
    for number, (method, results) in enumerate(runs.items()):
        if not results:
            continue
        # Those that all runs have: how often one looks may have changed in between.
        rounds = set.intersection(*({e["round"] for e in r["evaluations"]} for r in results))
        evaluations = [[e for e in r["evaluations"] if e["round"] in rounds] for r in results]
        steps = range(len(rounds))
        for row, quantity in enumerate(("accuracy", "loss")):
            values = [[nan if (v := e[i][quantity]) is None else v for e in evaluations] for i in steps]
            means = [mean(v) for v in values]
            errors = [stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
            for column, (_, where) in enumerate(AXES):
                axis, color = grid[row, column], colors[number % len(colors)]
                x = [mean(where(e[i]) for e in evaluations) for i in steps]
                style = "--" if method in ("frozen", "first-order") else "-"
                dots = "." if len(x) < 3 else None
                (lines[method],) = axis.plot(x, means, style, color=color, lw=1.6, marker=dots)
                low, high = ([m + s * e for m, e in zip(means, errors, strict=True)] for s in (-1, 1))
                axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    for row, quantity in enumerate(("accuracy", "loss")):
        grid[row, 0].set_ylabel(f"test {metric if quantity == 'accuracy' else quantity}")
        for column, (name, _) in enumerate(AXES):
            grid[row, column].grid(alpha=0.3)
            grid[row, column].spines[["top", "right"]].set_visible(False)
            grid[1, column].set_xlabel(name)
    logarithmic(grid[1, 0])
    columns = max(1, min(len(lines), 5, 100 // min(40, max(map(len, lines)))))
    places: list[Any] = list(lines.values())
    legend = figure.legend(places, [""] * len(lines), loc="outside upper center", ncols=columns, frameon=False)
    name_lines(lines, legend)
    save_figure(figure, path, 130)


def plot_memory(measured: dict[str, Any], path: Path) -> None:
    """A bar per way and half: what a client's process grows by, and the bound."""
    halves = measured["halves"]
    figure: Figure = require("matplotlib.figure", path.name).Figure(
        figsize=(4.6 * len(halves) + 2, 4.2), layout="constrained"
    )
    axes = figure.subplots(1, len(halves), squeeze=False)[0]
    for axis, half in zip(axes, halves.values(), strict=True):
        ways = half["ways"]
        colors = ["#888" if w == reference(w) else "#2b6cb0" if w.startswith("ho") else "#c05621" for w in ways]
        sizes = [row["peak_extra"] / 1e6 for row in ways.values()]
        bars = axis.barh(list(ways), sizes, color=colors)
        readable = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # where the bound's line goes through
        axis.bar_label(bars, [f"{size:.1f}" for size in sizes], padding=3, fontsize=8, bbox=readable)
        axis.margins(x=0.15)
        limit = measured["bound"] * (ways["inference"]["peak_extra"] + 3 * ways["inference"]["cut"]) / 1e6
        axis.axvline(limit, color="#222", lw=1, ls=":")
        axis.set_title(f"{half['what']}\nbatch {half['batch']}", fontsize=9)
        axis.set_xlabel("MB above the weights")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    save_figure(figure, path, 130)


def page(
    study: Study, found: dict[str, Any], runs: dict[str, list[Result]], memory: dict[str, Any] | None, folder: Path
) -> str:
    """The page: HTML that holds its images."""
    made = sum(saved_result(job, folder) is not None for job in (*study.tuning(), *final_jobs(study, folder)))
    wanted = len(study.tuning()) + len(study.trials) * len(study.seeds)
    started = [r for results in runs.values() for r in results]
    parts = [f"<p>{escape(_setup(study))}</p>"]
    if not started or (made < wanted and not _is_settled(study, found, runs)):
        parts.append(f"<p><strong>Not finished:</strong> {made} of {wanted} runs are done.</p>")
    if found["methods"]:
        parts += [
            "<h2>Results on test data</h2>",
            _results(found["methods"], found["metric"]),
            f"<p>{escape(_notes(study, found))}</p>",
        ]
    if any(not r["failure"] for r in started):
        text = "Means over seeds; bands: plus and minus one standard error. Dashed: the controls."
        parts += ["<h2>Curves</h2>", html_image(folder / "curves.png", text)]
        parts += ["<h2>Bytes per client and round</h2>", _bytes(found["methods"])]
    if memory is not None:
        parts += [
            "<h2>Memory of a client</h2>",
            html_image(folder / "memory.png", memory_note(memory)),
            _memory(memory),
        ]
    parts += ["<h2>Tuning: every trial, on validation data</h2>", _tuning(study, found)]
    machines = {json.dumps(r["machine"], sort_keys=True): r["machine"] for r in started}
    if memory is not None:
        machines.setdefault("memory", memory["machine"])
    parts.append("<h2>Machine and versions</h2>")
    parts += [f"<p>{escape(text)}</p>" for text in dict.fromkeys(map(_machine, machines.values()))]
    parts += ["<h2>The study's file</h2>", f"<pre>{escape(study.text)}</pre>"]
    return document(_title(study), parts)


def _is_settled(study: Study, found: dict[str, Any], runs: dict[str, list[Result]]) -> bool:
    """Every method has its runs, or none of its trials worked."""
    return all(r["trial"] is None or len(runs[m]) == len(study.seeds) for m, r in found["methods"].items())


def _title(study: Study) -> str:
    return "Study: " + ", ".join(sorted({trials[0].get("task", Config().task) for trials in study.trials.values()}))


def _setup(study: Study) -> str:
    tried = {len(t) for t in study.trials.values()}
    equal = f"{tried.pop()} trials each" if len(tried) == 1 else f"unequal numbers of trials: {study.unequal}"
    return (
        f"{len(study.trials)} methods, {study.rounds} rounds. Settings were chosen on validation data, seeds"
        f" {_comma_separated(study.tuning_seeds)}, {equal}; results are of test data, seeds"
        f" {_comma_separated(study.seeds)}."
    )


def _comma_separated(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _notes(study: Study, found: dict[str, Any]) -> str:
    text = "± is the standard error of the mean over seeds. Seconds are those of a run, one thread, beside other runs."
    if any(r["loss_gap_recovered"] is not None for r in found["methods"].values()):
        text += (
            " Gap recovered: the share of the way from the frozen client to the first-order one; in equal seconds: by"
            " what is reached when first-order's run ends."
        )
    if found["lower_is_better"]:
        text += f" The lower the {found['metric']}, the better."
    text += f" {at_ends(found)}".rstrip()
    both = set(study.seeds) & set(study.tuning_seeds)
    return text + (f" Seeds {_comma_separated(sorted(both))} were also tuned on." if both else "")


def at_ends(found: dict[str, Any]) -> str:
    """Which chosen values lie at an end of what was tried, of three values or more; "" where none does.

    found: as `study_table` gives it. Nothing lies beyond 0, and a grid of two values has ends alone.
    """
    listed = []
    for method, row in found["methods"].items():
        tried = [trial for trial in found["trials"] if trial["method"] == method]
        chosen: dict[str, Any] = next((trial["choice"] for trial in tried if trial["trial"] == row["trial"]), {})
        ends = []
        for name, value in chosen.items():
            if isinstance(value, (str, bool)):
                continue
            values = sorted({trial["choice"][name] for trial in tried})
            if len(values) > 2 and value in (values[0], values[-1]) and value:
                ends.append(f"{name.replace('_', ' ')} {value:g}")
        if ends:
            listed.append(f"{method} ({', '.join(ends)})")
    if not listed:
        return ""
    return f"Chosen at an end of what was tried, where a value beyond might do better: {'; '.join(listed)}."


def number(value: float | None, error: float | None = None, places: int = 4) -> str:
    """A number as the page shows it, with its standard error if there is one."""
    if value is None:
        return ""
    return f"{value + 0.0:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")


def _results(methods: dict[str, Any], metric: str) -> str:
    head = ["", f"test {metric}", "test loss", f"{metric} gap recovered", "loss gap recovered"]
    head += [f"{metric} gap in equal seconds", "loss gap in equal seconds"]
    head += ["kB per client and round", "seconds", "seeds"]
    rows = []
    for method, row in methods.items():
        seeds = _comma_separated(row["seeds"]) or "none"
        if row["trial"] is None:
            seeds = "failed: no trial worked"
        elif row["failures"]:
            seeds = "failed: " + "; ".join(f"seed {s}, {why}" for s, why in row["failures"].items())
        scores = [number(row[q], row[f"{q}_error"]) for q in ("accuracy", "loss")]
        shares = [f"{q}_gap_{at}" for at in ("recovered", "in_equal_seconds") for q in ("accuracy", "loss")]
        gaps = [number(row[share], None, 2) for share in shares]
        moved = sum(row["bytes_per_client_round"].values()) / 1e3 if row["seeds"] else None
        rows.append([method, *scores, *gaps, number(moved, None, 1), number(row["seconds"], None, 1), seeds])
    return html_table(head, rows)


def _bytes(methods: dict[str, Any]) -> str:
    categories = sorted({c for row in methods.values() for c in row["bytes_per_client_round"]})
    rows = [
        [m, *(f"{row['bytes_per_client_round'].get(c, 0.0):,.0f}" for c in categories)] for m, row in methods.items()
    ]
    return html_table(["", *categories], rows)


def memory_note(measured: dict[str, Any]) -> str:
    """What the memory figures are."""
    what = "the allocator's peak" if measured["device"] == "cuda" else "the growth of the resident set"
    return (
        f"One client in a process of its own: {what} during a round, above the weights of its half. The dotted line:"
        f" {measured['bound']:.2f} times float32 inference plus three cut tensors, the bound for"
        f" {', '.join(BOUNDED)}; the last may have two cut tensors more."
    )


def _memory(measured: dict[str, Any]) -> str:
    rows = [
        [f"{name}: {way}", f"{r['peak_extra'] / 1e6:.2f}", f"{r['cut'] / 1e6:.2f}", f"{r['of_bound']:.2f}"]
        for name, half in measured["halves"].items()
        for way, r in half["ways"].items()
    ]
    return html_table(["", "peak, MB", "cut tensor, MB", "of inference + 3 cuts"], rows)


def _tuning(study: Study, found: dict[str, Any]) -> str:
    rows, classes = [], []
    for trial in found["trials"]:
        method = trial["method"]
        choice = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial["choice"].items())
        why = ""
        if trial["failures"]:
            why = f"failed {len(trial['failures'])} of {len(study.tuning_seeds)}: {trial['failures'][0]}"
        rows.append([method, choice, number(trial["accuracy"]), number(trial["loss"]), why])
        classes.append("best" if found["methods"].get(method, {}).get("trial") == trial["trial"] else "")
    return html_table(["", "settings", f"validation {found['metric']}", "validation loss", ""], rows, classes)


def _machine(m: dict[str, Any]) -> str:
    where = m["gpu"] or f"{m['processor']}, {m['cores']} cores"
    sets = ", ".join(f"{name} {isa}" for name, isa in m.get("instruction_sets", {}).items())
    where += f", instruction sets {sets}" if sets else ""  # older runs don't say
    packages = ", ".join(f"{p} {m[p]}" for p in ("hosfl", "torch", "triton", "numpy") if m.get(p))
    threads = f"{m['threads']} thread" + "s" * (m["threads"] > 1)
    return f"{where}, {threads}; {m['system']}, Python {m['python']}, {packages}."
