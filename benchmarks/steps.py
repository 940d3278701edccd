"""`make bench`: what a step of the server, a client and an optimizer costs beside the passes in it.

    python -m benchmarks.steps [--threads N ...] [--out FOLDER]

Runs test_steps.py with each number of threads. A step's reference is measured in the same run: as many forward passes
alone, or the server's cuts one after another. Best of the rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, collected, write

REFERENCES = ("forward passes alone", "cut after cut")


def _where(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["device"], row["group"], row["threads"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    result = options.out / f"steps-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    rows, passed = collected(["test_steps.py"], 1, options.threads, result)
    alone = {_where(r): r["seconds"] for r in rows if r["name"] in REFERENCES}
    for row in rows:
        if (key := _where(row)) in alone:
            row["of_reference"] = row["seconds"] / alone[key]
    write(result, {"rows": rows})
    print(f"{len(rows)} rows: {result}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
