"""Self-contained HTML pages, with tables and images, for reports of runs and studies."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th, td, pre { unicode-bidi: plaintext; }
th { border-bottom: 2px solid #888; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 600; background: #f0f6ee; } td.failed { color: #a02020; }
img { max-width: 100%; } p, figcaption { max-width: 48rem; } figure { margin: 1rem 0; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
@media print { body { margin: 0; max-width: none; font-size: 10px; } pre { white-space: pre-wrap; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; } .scroll { overflow: visible; }
  tr.best td { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page. title: text; parts: HTML, one after another."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width">'
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """Return a table. head, rows: cells as text; classes: of the rows."""
    lines = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>"]
    for number, row in enumerate(rows):
        kind = f' class="{classes[number]}"' if classes and classes[number] else ""
        failed = [n > 0 and cell.startswith("failed") for n, cell in enumerate(row)]  # the first cell is a name
        cells = "".join(f"<td{' class=failed' * f}>{escape(c)}</td>" for f, c in zip(failed, row, strict=True))
        lines.append(f"<tr{kind}>{cells}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def html_image(path: Path, caption: str) -> str:
    """Return a PNG, embedded in the page, with a caption."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
