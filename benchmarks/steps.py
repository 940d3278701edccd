"""`make bench`: a step of the server, a client and an optimizer compared with the passes in it.

    python -m benchmarks.steps [--threads N ...] [--out FOLDER]

Runs test_steps.py with each number of threads. Every step is compared with as many forward passes alone, or with the
server's cuts one after another: in the same run, in turns. Times are the best of the rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.report import collect_rows, parse_options, write


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options("steps", __doc__, "steps", arguments, sized=False)
    rows, passed = collect_rows(["test_steps.py"], 1, options.threads, options.result)
    write(options.result, {"rows": rows})
    print(f"{len(rows)} rows: {options.result}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
