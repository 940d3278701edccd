"""`make bench`: run the suites, print one table, write benchmarks/results/kernels-DEVICE.json.

    python -m benchmarks.report [--elements N] [--threads N ...] [--out FOLDER]

Speed is shown as ratios within one run: to `add_` of a constant on the same tensor with the same threads, which is as
fast as memory allows, and to MeZO's own code. The best of the rounds counts: other programs can only make one slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import LIST_ROOF, MEZO, RANDN, RANDN_PRODUCTS, RANDN_RECORDS, RECORDS, ROOF
from hosfl.runs.report import machine

RESULTS = Path(__file__).parent / "results"
SUITES = ("test_throughput.py", "test_memory.py")  # of this table; steps.py runs test_steps.py, ops.py test_ops.py


def parse_options(
    name: str, about: str | None, result: str, arguments: Sequence[str] | None, sized: bool = True
) -> argparse.Namespace:
    """Parse the options of a command that runs suites, and add `device`, and `result`, the path of the result file.

    sized: whether there is an option --elements.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(about or "").split("\n")[0])
    if sized:
        parser.add_argument("--elements", type=int, default=64 * 2**20, help="of the largest tensor (default: 64 Mi)")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.result = options.out / f"{result}-{options.device}.json"
    return options


def run_suites(names: Sequence[str], elements: int, threads: int, path: Path) -> bool:
    """Run suites, which append their rows to a file of JSON lines. Returns whether every benchmark passed."""
    suites = [str(Path(__file__).parent / name) for name in names]
    command = [sys.executable, "-m", "pytest", *suites, "-q", "-p", "no:cacheprovider"]
    command += [f"--elements={elements}", f"--rows={path}", "--benchmark-quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return subprocess.run(command, env=environment, stdout=sys.stderr).returncode == 0


def collect_rows(names: Sequence[str], elements: int, threads: Sequence[int], result: Path) -> tuple[list[Any], bool]:
    """Run suites with each number of threads. Returns (rows, whether every benchmark passed).

    result: the path of the result file. Rows are kept beside it, as JSON lines, until `write` makes it. Raises
    SystemExit if nothing was measured, and for numbers below 1.
    """
    if min(elements, *threads) < 1:
        raise SystemExit(
            f"--elements and --threads must be 1 or more, got {elements} and {', '.join(map(str, threads))}"
        )
    result.parent.mkdir(parents=True, exist_ok=True)
    saved = result.with_suffix(".jsonl")
    saved.unlink(missing_ok=True)
    passed = [run_suites(names, elements, count, saved) for count in threads]
    rows = [json.loads(line) for line in saved.read_text().splitlines()] if saved.exists() else []
    if not rows:
        raise SystemExit(f"nothing was measured: {result} is left as it was")
    return rows, all(passed)


def write(result: Path, measured: dict[str, Any]) -> None:
    """Write a result file, with the machine, and delete the rows that `collect_rows` kept beside it."""
    result.write_text(json.dumps({"machine": machine(), **measured}, indent=1) + "\n")
    result.with_suffix(".jsonl").unlink(missing_ok=True)


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add to every throughput row its ratios to the roof and to the peers in the same run.

    The roof is the fastest `add_` of as many bytes, in any dtype: on one thread adding to bfloat16 is not limited by
    memory everywhere.
    """

    def reference_seconds(row: dict[str, Any], name: str) -> float | None:
        """Return the least seconds of the contender `name` in the same conditions; None if the group has none."""
        keys = ("device", "threads", "bytes" if name in (ROOF, LIST_ROOF) else "group")
        in_group = any(r["name"] == name and r["group"] == row["group"] for r in rows)
        times = [r["seconds"] for r in rows if r["name"] == name and all(r.get(k) == row[k] for k in keys)]
        return min(times) if times and in_group else None

    for row in rows:
        if "bytes" in row:
            for label, name in (
                ("of_roof", ROOF),
                ("of_roof", LIST_ROOF),
                ("times_mezo", MEZO),
                ("times_randn", RANDN),
                ("times_randn", RANDN_RECORDS),
                ("times_randn", RANDN_PRODUCTS),
            ):
                reference = reference_seconds(row, name)
                if reference is not None:
                    row[label] = reference / row["seconds"]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the tables of throughput and memory."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    speed = Table(title="throughput")
    for column in ("device", "threads", "group", "way", "ms", "share of roof", "x MeZO", f"x {RECORDS} passes"):
        speed.add_column(column, justify="left" if column in ("device", "group", "way") else "right")

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.2f}" if name in row else ""

    memory = Table(title="peak extra memory")
    for column in ("device", "group", "way", "bytes", "of the tensor"):
        memory.add_column(column, justify="left" if column in ("device", "group", "way") else "right")
    for r in rows:
        if "bytes" in r:
            cells = [cell(r, name) for name in ("of_roof", "times_mezo", "times_randn")]
            speed.add_row(r["device"], str(r["threads"]), r["group"], r["name"], f"{r['seconds'] * 1e3:.2f}", *cells)
        else:
            share = f"{r['peak_extra_bytes'] / r['tensor_bytes']:.3f}"
            memory.add_row(r["device"], r["group"][7:], r["name"], f"{r['peak_extra_bytes']:,}", share)
    console.print(speed)
    console.print(memory)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options("report", __doc__, "kernels", arguments)
    rows, passed = collect_rows(SUITES, options.elements, options.threads, options.result)
    # Memory does not depend on threads: once is enough.
    rows = [r for r in rows if "bytes" in r or r["threads"] == options.threads[0]]
    add_ratios(rows)
    show(rows)
    write(options.result, {"elements": options.elements, "rows": rows})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
