"""`make results` ends here: writes the tables of results into the README and the pages of docs.

A table stands between the markers `<!-- NAME -->` and `<!-- end -->`. The functions that make tables are in
`learning_tables.py`, `speed_tables.py` and `study_tables.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.learning_tables import curves, digits, liars, tuning, ways, wire
from benchmarks.speed_tables import (
    catchup,
    crowd,
    edge,
    estimators,
    exchanges,
    gpu,
    kernels,
    machines,
    memory,
    ops,
    optim,
    rounds,
    steps,
)
from benchmarks.study_tables import lengths, numbers, overview, rules, study, uses
from benchmarks.tables import ALL_STUDIES, GPU, RESULTS, ROOT, load_result

# Of a page's tables, by name: the results file or a pattern of them, and the function that makes the table.
Sections = dict[str, tuple[str, Callable[[dict[str, Any]], str]]]
STUDIES: Sections = {
    path.parent.name: (str(path.relative_to(RESULTS)), study) for path in sorted(RESULTS.glob("studies/*/table.json"))
}
DOCS = ROOT / "docs"
PAGES: dict[Path, Sections] = {
    ROOT / "README.md": {"overview": (ALL_STUDIES, overview)},
    DOCS / "edge.md": {"edge": ("edge.json", edge)},
    DOCS / "estimators.md": {"estimators": ("estimators-cpu.json", estimators)},
    DOCS / "forward-passes.md": {"rules": ("*/*/table.json", rules)},
    DOCS / "federation.md": {
        "rounds": ("rounds.json", rounds),
        "exchanges": ("engines.json", exchanges),
        "wire": ("digits-wire.json", wire),
        "crowd": ("ray-clients.json", crowd),
    },
    DOCS / "results-digits.md": {
        "digits": ("digits/table.json", digits),
        "ways": ("digits-ways.json", ways),
        "tuning": ("digits-tuning.json", tuning),
    },
    DOCS / "results-optim.md": {"curves": ("optim-curves.json", curves), "optim": ("optim-cpu.json", optim)},
    DOCS / "results-speed.md": {
        "kernels": ("kernels-cpu.json", kernels),
        "machines": ("kernels-cpu*.json", machines),
        "ops": ("ops-cpu.json", ops),
        "gpu": (GPU, gpu),
        "steps": ("steps-cpu.json", steps),
        "catch-up": ("catchup-cpu.json", catchup),
        "memory": ("client-memory.json", memory),
    },
    DOCS / "results-studies.md": {
        **STUDIES,
        "lengths": ("lengths/*/table.json", lengths),
        "uses": ("uses/*/table.json", uses),
        "numbers": (ALL_STUDIES, numbers),
    },
    DOCS / "threats.md": {"liars": ("digits-liars.json", liars)},
}


def updated(page: Path) -> str:
    """Return a page's text with its tables made anew from the results."""
    text = page.read_text()
    for name, (file, make_table) in PAGES[page].items():
        table = make_table(load_result(file))
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{page} has {count} sections named {name}")
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page))
