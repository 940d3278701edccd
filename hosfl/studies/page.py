"""`hosfl report`: a study as one self-contained HTML page, and its figures as PNG."""

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
from hosfl.runs.memory import BOUNDED, reference_way
from hosfl.runs.pages import document, html_image, html_table
from hosfl.runs.report import logarithmic, name_lines, save_figure
from hosfl.studies.folder import saved_memory, saved_result
from hosfl.studies.study import Result, Study, load_study
from hosfl.studies.table import final_jobs, study_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The horizontal axes of the curves: (label, an evaluation's value on the axis).
AXES: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
    ("rounds", lambda e: e["round"]),
    ("MB on the wire, all clients", lambda e: e["bytes"] / 1e6),
    ("seconds", lambda e: e["seconds"]),
)


def report(folder: Path) -> Path:
    """Write report.html and its figures as PNG into a study's folder. Returns the page's path.

    The figures are curves.png and, if memory was measured, memory.png. The page shows an unfinished study as far as it
    has got. Raises FileNotFoundError if the folder holds no study, and ValueError naming a file that is damaged or
    another study's.
    """
    if not (folder / "study.yaml").exists():
        raise FileNotFoundError(f"{folder} holds no study: there is no study.yaml")
    study = load_study(folder / "study.yaml")
    table = study_table(study, folder)
    runs = {
        method: [r for job in study.final(method, row["trial"]) if (r := saved_result(job, folder)) is not None]
        for method, row in table["methods"].items()
        if row["trial"] is not None
    }
    memory = saved_memory(folder)
    good = {m: [r for r in rs if not r["failure"]] for m, rs in runs.items()}
    if any(good.values()):
        plot_curves(good, folder / "curves.png", table["metric"])
    if memory is not None:
        plot_memory(memory, folder / "memory.png")
    path = folder / "report.html"
    write_atomically(path, page(study, table, runs, memory, folder).encode())
    return path


def plot_curves(runs: dict[str, list[Result]], path: Path, metric: str) -> None:
    """Plot accuracy and loss on test data against rounds, bytes and seconds: means and standard errors over seeds.

    metric: the name of the task's first score, which results call the accuracy.
    """
    figure: Figure = require("matplotlib.figure", path.name).Figure(figsize=(13, 7.2), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharey="row", sharex="col")
    colors = require("matplotlib", path.name).colormaps["tab10" if len(runs) <= 10 else "tab20"].colors
    lines = {}
    for number, (method, results) in enumerate(runs.items()):
        if not results:
            continue
        # Only rounds at which all runs were evaluated: evaluate_every may have changed between them.
        rounds = set.intersection(*({e["round"] for e in r["evaluations"]} for r in results))
        evaluations = [[e for e in r["evaluations"] if e["round"] in rounds] for r in results]
        steps = range(len(rounds))
        for row, quantity in enumerate(("accuracy", "loss")):
            values = [[nan if (v := e[i][quantity]) is None else v for e in evaluations] for i in steps]
            means = [mean(v) for v in values]
            errors = [stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
            for column, (_, value_on) in enumerate(AXES):
                axis, color = grid[row, column], colors[number % len(colors)]
                x = [mean(value_on(e[i]) for e in evaluations) for i in steps]
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
    handles: list[Any] = list(lines.values())
    legend = figure.legend(handles, [""] * len(lines), loc="outside upper center", ncols=columns, frameon=False)
    name_lines(lines, legend)
    save_figure(figure, path, 130)


def plot_memory(measured: dict[str, Any], path: Path) -> None:
    """Plot a bar for each half and way to run it, of the memory by which a client's process grows, and the bound."""
    halves = measured["halves"]
    figure: Figure = require("matplotlib.figure", path.name).Figure(
        figsize=(4.6 * len(halves) + 2, 4.2), layout="constrained"
    )
    axes = figure.subplots(1, len(halves), squeeze=False)[0]
    for axis, half in zip(axes, halves.values(), strict=True):
        ways = half["ways"]
        colors = ["#888" if w == reference_way(w) else "#2b6cb0" if w.startswith("ho") else "#c05621" for w in ways]
        sizes = [row["peak_extra"] / 1e6 for row in ways.values()]
        bars = axis.barh(list(ways), sizes, color=colors)
        background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # readable where the bound's line crosses
        axis.bar_label(bars, [f"{size:.1f}" for size in sizes], padding=3, fontsize=8, bbox=background)
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
    study: Study, table: dict[str, Any], runs: dict[str, list[Result]], memory: dict[str, Any] | None, folder: Path
) -> str:
    """Return a study's page as HTML that contains its images.

    table: from `study_table`; runs: each method's final results.
    """
    done = sum(saved_result(job, folder) is not None for job in (*study.tuning(), *final_jobs(study, folder)))
    total = len(study.tuning()) + len(study.trials) * len(study.seeds)
    final = [r for results in runs.values() for r in results]
    parts = [f"<p>{escape(_setup(study))}</p>"]
    if not final or (done < total and not _is_complete(study, table, runs)):
        parts.append(f"<p><strong>Not finished:</strong> {done} of {total} runs are done.</p>")
    if table["methods"]:
        parts += [
            "<h2>Results on test data</h2>",
            _results(table["methods"], table["metric"]),
            f"<p>{escape(_notes(study, table))}</p>",
        ]
    if any(not r["failure"] for r in final):
        text = "Means over seeds; bands: plus and minus one standard error. Dashed: the controls."
        parts += ["<h2>Curves</h2>", html_image(folder / "curves.png", text)]
        parts += ["<h2>Bytes per client and round</h2>", _bytes(table["methods"])]
    if memory is not None:
        parts += [
            "<h2>Memory of a client</h2>",
            html_image(folder / "memory.png", memory_note(memory)),
            _memory(memory),
        ]
    parts += ["<h2>Tuning: every trial, on validation data</h2>", _tuning(study, table)]
    machines = {json.dumps(r["machine"], sort_keys=True): r["machine"] for r in final}
    if memory is not None:
        machines.setdefault("memory", memory["machine"])
    parts.append("<h2>Machine and versions</h2>")
    parts += [f"<p>{escape(text)}</p>" for text in dict.fromkeys(map(_machine, machines.values()))]
    parts += ["<h2>The study's file</h2>", f"<pre>{escape(study.text)}</pre>"]
    return document(_title(study), parts)


def _is_complete(study: Study, table: dict[str, Any], runs: dict[str, list[Result]]) -> bool:
    """Whether every method has all its final runs, except those of which no trial worked."""
    return all(r["trial"] is None or len(runs[m]) == len(study.seeds) for m, r in table["methods"].items())


def _title(study: Study) -> str:
    return "Study: " + ", ".join(sorted({trials[0].get("task", Config().task) for trials in study.trials.values()}))


def _setup(study: Study) -> str:
    counts = {len(t) for t in study.trials.values()}
    trials = f"{counts.pop()} trials each" if len(counts) == 1 else f"unequal numbers of trials: {study.unequal}"
    return (
        f"{len(study.trials)} methods, {study.rounds} rounds. Settings were chosen on validation data, seeds"
        f" {_comma_separated(study.tuning_seeds)}, {trials}; results are of test data, seeds"
        f" {_comma_separated(study.seeds)}."
    )


def _comma_separated(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _notes(study: Study, table: dict[str, Any]) -> str:
    text = "± is the standard error of the mean over seeds. Seconds are those of a run, one thread, beside other runs."
    if any(r["loss_gap_recovered"] is not None for r in table["methods"].values()):
        text += (
            " Gap recovered: the share of the way from the frozen client to the first-order one; in equal seconds: by"
            " what is reached when first-order's run ends."
        )
    if table["lower_is_better"]:
        text += f" The lower the {table['metric']}, the better."
    text += f" {at_ends(table)}".rstrip()
    both = set(study.seeds) & set(study.tuning_seeds)
    return text + (f" Seeds {_comma_separated(sorted(both))} were also tuned on." if both else "")


def at_ends(table: dict[str, Any]) -> str:
    """Return a sentence naming chosen values at an end of their grid, where a wider grid might do better; "" for none.

    table: from `study_table`. Values of 0 are not named, nor grids of fewer than three values.
    """
    listed = []
    for method, row in table["methods"].items():
        trials = [trial for trial in table["trials"] if trial["method"] == method]
        chosen: dict[str, Any] = next((trial["choice"] for trial in trials if trial["trial"] == row["trial"]), {})
        ends = []
        for name, value in chosen.items():
            if isinstance(value, (str, bool)):
                continue
            values = sorted({trial["choice"][name] for trial in trials})
            if len(values) > 2 and value in (values[0], values[-1]) and value:
                ends.append(f"{name.replace('_', ' ')} {value:g}")
        if ends:
            listed.append(f"{method} ({', '.join(ends)})")
    if not listed:
        return ""
    return f"Chosen at an end of what was tried, where a value beyond might do better: {'; '.join(listed)}."


def number(value: float | None, error: float | None = None, places: int = 4) -> str:
    """Format a number for the page, with its standard error if there is one; None as ""."""
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
            seeds = "failed: " + "; ".join(f"seed {s}, {reason}" for s, reason in row["failures"].items())
        scores = [number(row[q], row[f"{q}_error"]) for q in ("accuracy", "loss")]
        shares = [f"{q}_gap_{kind}" for kind in ("recovered", "in_equal_seconds") for q in ("accuracy", "loss")]
        gaps = [number(row[share], None, 2) for share in shares]
        kilobytes = sum(row["bytes_per_client_round"].values()) / 1e3 if row["seeds"] else None
        rows.append([method, *scores, *gaps, number(kilobytes, None, 1), number(row["seconds"], None, 1), seeds])
    return html_table(head, rows)


def _bytes(methods: dict[str, Any]) -> str:
    categories = sorted({c for row in methods.values() for c in row["bytes_per_client_round"]})
    rows = [
        [m, *(f"{row['bytes_per_client_round'].get(c, 0.0):,.0f}" for c in categories)] for m, row in methods.items()
    ]
    return html_table(["", *categories], rows)


def memory_note(measured: dict[str, Any]) -> str:
    """Return a sentence that explains the figures of memory."""
    quantity = "the allocator's peak" if measured["device"] == "cuda" else "the growth of the resident set"
    return (
        f"One client in a process of its own: {quantity} during a round, above the weights of its half. The dotted"
        f" line: {measured['bound']:.2f} times float32 inference plus three cut tensors, the bound for"
        f" {', '.join(BOUNDED)}; the last may have two cut tensors more."
    )


def _memory(measured: dict[str, Any]) -> str:
    rows = [
        [f"{name}: {way}", f"{r['peak_extra'] / 1e6:.2f}", f"{r['cut'] / 1e6:.2f}", f"{r['of_bound']:.2f}"]
        for name, half in measured["halves"].items()
        for way, r in half["ways"].items()
    ]
    return html_table(["", "peak, MB", "cut tensor, MB", "of inference + 3 cuts"], rows)


def _tuning(study: Study, table: dict[str, Any]) -> str:
    rows, classes = [], []
    for trial in table["trials"]:
        method = trial["method"]
        choice = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial["choice"].items())
        failed = ""
        if trial["failures"]:
            failed = f"failed {len(trial['failures'])} of {len(study.tuning_seeds)}: {trial['failures'][0]}"
        rows.append([method, choice, number(trial["accuracy"]), number(trial["loss"]), failed])
        classes.append("best" if table["methods"].get(method, {}).get("trial") == trial["trial"] else "")
    return html_table(["", "settings", f"validation {table['metric']}", "validation loss", ""], rows, classes)


def _machine(m: dict[str, Any]) -> str:
    hardware = m["gpu"] or f"{m['processor']}, {m['cores']} cores"
    sets = ", ".join(f"{name} {isa}" for name, isa in m.get("instruction_sets", {}).items())
    hardware += f", instruction sets {sets}" if sets else ""  # earlier versions did not record them
    packages = ", ".join(f"{p} {m[p]}" for p in ("hosfl", "torch", "triton", "numpy") if m.get(p))
    threads = f"{m['threads']} thread" + "s" * (m["threads"] > 1)
    return f"{hardware}, {threads}; {m['system']}, Python {m['python']}, {packages}."
