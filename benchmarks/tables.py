"""Helpers for the tables of the pages: reading results files, Markdown tables, and cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ALL_STUDIES = "studies/*/table.json"  # results of all studies of the pages
GPU = "gpu.json"  # the results file that may be missing


def load_result(file: str) -> Any:
    """Read a result file; for a pattern, the results by the names of their folders. None if the GPU's is missing."""
    if "*" not in file:
        path = RESULTS / file
        return None if file == GPU and not path.exists() else json.loads(path.read_text())
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(file))}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is aligned left, and the others right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_machine(result: dict[str, Any]) -> str:
    """Describe a result's processor, instruction sets, threads and versions in a line.

    If the rows have numbers of threads, these are named. A file of an earlier version, without "instruction_sets",
    names only those of our kernels, and perhaps not the exact processor.
    """
    m = result["machine"]
    sets = m.get("instruction_sets") or {"hosfl": m["backends"]["cpp"].partition(" ")[0]}
    counts = {r["threads"] for r in result.get("rows", []) if "threads" in r} or {m["threads"]}
    threads = f"{' and '.join(map(str, sorted(counts)))} thread{'s' if counts != {1} else ''}"
    named_sets = ", ".join(f"{name} {isa}" for name, isa in sets.items())
    hardware = f"{m['processor']}, {m['cores']} cores, {threads}, instruction sets: {named_sets}"
    hardware = f"{m['gpu']}; {hardware}" if m["gpu"] else hardware
    return f"{hardware}; Python {m['python']}, torch {m['torch']}, triton {m['triton']}, numpy {m['numpy']}."


def mean_with_error(values: Sequence[float]) -> str:
    """Return the mean of values with its standard error."""
    return f"{mean(values):.4f} ± {stdev(values) / len(values) ** 0.5:.4f}"


def ratio(row: dict[str, Any], name: str) -> str:
    """Return a ratio of a row, or "" if it has none."""
    return f"{row[name]:.2f}" if name in row else ""
