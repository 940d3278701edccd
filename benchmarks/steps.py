"""`make bench`: what a step of the server, a client and an optimizer costs beside the passes in it.

    python -m benchmarks.steps [--threads N ...] [--out FOLDER]

Runs test_steps.py with each number of threads. A step's reference is measured in the same run: as many forward passes
alone, or the server's cuts one after another. Best of the rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.report import collected, options_of, write

REFERENCES = ("forward passes alone", "cut after cut")


def _where(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["device"], row["group"], row["threads"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of("steps", __doc__, "steps", arguments, sized=False)
    rows, passed = collected(["test_steps.py"], 1, options.threads, options.result)
    alone = {_where(r): r["seconds"] for r in rows if r["name"] in REFERENCES}
    for row in rows:
        if (key := _where(row)) in alone:
            row["of_reference"] = row["seconds"] / alone[key]
    write(options.result, {"rows": rows})
    print(f"{len(rows)} rows: {options.result}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
