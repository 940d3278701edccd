"""Helpers for the tables of the pages: reading results files, Markdown tables, and cells."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ALL_STUDIES = "studies/*/table.json"  # results of all studies of the pages
GPU = "gpu.json"  # the results file that may be missing


def load_result(file: str) -> Any:
    """Read a result file. None if the GPU's is missing.

    For a pattern: the results by the names of their folders, or of their files if the pattern is of file names.
    """
    if "*" not in file:
        path = RESULTS / file
        return None if file == GPU and not path.exists() else json.loads(path.read_text())
    of_files = "*" in Path(file).name
    paths = sorted(RESULTS.glob(file))
    return {path.stem if of_files else path.parent.name: json.loads(path.read_text()) for path in paths}


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


def ratio(row: dict[str, Any], name: str, digits: int = 2) -> str:
    """Return a ratio of a row, or "" if it has none."""
    return f"{row[name]:,.{digits}f}" if name in row else ""


def plural(count: int, noun: str) -> str:
    """Return a number and its noun: 1 thread, 2 threads."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def by_group_and_name(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """Return a suite's rows by (group, name), and these by the number of threads."""
    sorted_rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        sorted_rows.setdefault((row["group"], row["name"]), {})[row["threads"]] = row
    return sorted_rows


def processor(result: dict[str, Any]) -> str:
    """Return a result's processor in a few words: its name, family and model."""
    name, family, model = re.fullmatch(
        r"(.+?) \(vendor .*family (\d+), model (\d+).*", result["machine"]["processor"]
    ).groups()
    return f"{name}, family {family}, model {model}"
