"""`python -m benchmarks.per_weight`: a figure of numbers per weight in a run, and the share of the loss gap recovered.

It has a point for each HO-SFL method of every study whose table is committed, as in docs/results-studies.md.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.study_tables import numbers_of
from benchmarks.tables import ALL_STUDIES, RESULTS, load_result
from hosfl.runs.report import save_figure

OUT = RESULTS / "studies" / "numbers.png"
MARKS = {"one backward pass": "s", "paper": "x"}  # by a part of the method's name; the others run forward passes


def draw(path: Path) -> None:
    """Draw the figure."""
    points = numbers_of(load_result(ALL_STUDIES))
    studies = dict.fromkeys(point.study for point in points)
    colors = dict(zip(studies, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for point in points:
        mark = next((mark for name, mark in MARKS.items() if name in point.method), "o")
        axes.plot(point.per_weight, point.share, mark, color=colors[point.study], markersize=6)
    for study in sorted(studies):
        axes.plot([], [], "o", color=colors[study], label=study)
    for name, mark in {"forward passes": "o", **MARKS}.items():
        axes.plot([], [], mark, color="gray", label=f"({name})")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.annotate(
        "first-order", (0.99, 1.01), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray"
    )
    axes.annotate("frozen", (0.99, 0.01), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray")
    axes.set_xscale("log")
    axes.set_xlabel("numbers per weight in the run: P x rounds / weights that move")
    axes.set_ylabel("share of the loss gap recovered")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    draw(OUT)
