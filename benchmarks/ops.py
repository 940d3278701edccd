"""`make bench`: every op by size and dtype, and lists with models' shapes, compared with the roof and the peers.

    python -m benchmarks.ops [--elements N] [--threads N ...] [--out FOLDER]

Runs test_ops.py with each number of threads, writes ops-cpu.json (ops-cuda.json on a GPU) and draws ops-cpu.png: the
bytes per second of each way, with the roof. The best of the rounds counts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.contenders import DECOMFL, LIST_ROOF, MEZO, ROOF
from benchmarks.report import add_ratios, collect_rows, parse_options, write
from hosfl.runs.report import save_figure

# The contenders of the figure, with their labels and colors.
ADD = ("torch's add, the roof", "black")
OURS = {
    "hosfl perturb_ rademacher": ("hosfl Rademacher", "tab:blue"),
    "hosfl perturb_ gaussian": ("hosfl Gaussian", "tab:cyan"),
}
PEERS = {MEZO: (MEZO, "tab:red"), DECOMFL: (DECOMFL, "tab:orange")}
ONE_TENSOR, LIST = {ROOF: ADD, **OURS, **PEERS}, {LIST_ROOF: ADD, **OURS, **PEERS}
DTYPES = ("float32", "bfloat16")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot bytes per second: above by the size of one tensor, below by list.

    rows: of one device; those with the smallest number of threads are plotted. The roof is that of the tables:
    torch's fastest dtype, for as many bytes.
    """
    fewest = min(r["threads"] for r in rows)
    speed: dict[tuple[str, str, str], float] = {}
    for r in rows:
        if r["threads"] == fewest:
            roof = r["name"] in (ROOF, LIST_ROOF) and "of_roof" in r
            speed[r["name"], r["dtype"], r["of"]] = r["bytes"] / r["seconds"] / (r["of_roof"] if roof else 1) / 1e9
    ofs = list(dict.fromkeys(of for name, _, of in speed if name in (*ONE_TENSOR, *LIST)))
    lists = [of for of in ofs if of.startswith("list ")]
    sizes = [of for of in ofs if of not in lists]
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 2, sharey=True)
    for dtype, lines, bars in zip(DTYPES, above, below, strict=True):
        for name, (label, color) in ONE_TENSOR.items():
            points = [(int(of.replace(",", "")), speed[key]) for of in sizes if (key := (name, dtype, of)) in speed]
            if points:
                lines.plot(
                    *zip(*points, strict=True), "--" if name == ROOF else "-", color=color, marker="o", label=label
                )
        for place, (name, (label, color)) in enumerate(LIST.items()):
            heights = [speed.get((name, dtype, of), 0.0) for of in lists]
            bars.bar([n + 0.16 * (place - 2) for n in range(len(lists))], heights, 0.15, color=color, label=label)
        lines.set_xscale("log")
        lines.set_yscale("log")
        lines.set_xlabel(f"{dtype} elements of one tensor")
        bars.set_xticks(range(len(lists)), [of.removeprefix("list ").replace(" of ", " of\n") for of in lists])
        bars.set_xlabel(f"{dtype} tensors with the shapes of a model, or of adapters")
        for axes in (lines, bars):
            axes.grid(axis="y", linewidth=0.3)
    for axes in (above[0], below[0]):
        axes.set_ylabel("GB read and written a second")
    figure.legend(*below[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LIST), frameon=False)
    save_figure(figure, path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options("ops", __doc__, "ops", arguments)
    rows, passed = collect_rows(["test_ops.py"], options.elements, options.threads, options.result)
    add_ratios(rows)
    write(options.result, {"elements": options.elements, "rows": rows})
    draw([r for r in rows if r["device"] == options.device], options.result.with_suffix(".png"))
    print(f"{len(rows)} rows: {options.result}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
