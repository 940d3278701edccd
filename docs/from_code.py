"""What the pages take from the code: docstrings as reStructuredText, the command line, and a check that nothing public
is missing."""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
MODULES = ("hosfl", "hosfl.optim", "hosfl.optim.hf", "hosfl_kernels")


# --- public names ---


def public() -> Iterator[tuple[str, object]]:
    """Every public name with its module, and what it is. `hosfl.optim.hf` has one name, and no list of them."""
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ["ZOTrainer"]):
            yield f"{module.__name__}.{name}", getattr(module, name)


def faults() -> list[str]:
    """Public names without a docstring of their own, and those that no page of the reference shows."""
    shown = "".join(page.read_text() for page in HERE.glob("api-*.md"))
    found = []
    for name, what in public():
        text = what.__dict__.get("__doc__") if inspect.isclass(what) else inspect.getdoc(what)
        if not text or text.startswith(f"{name.rpartition('.')[2]}("):  # what a dataclass writes by itself
            found.append(f"{name} has no docstring")
        if not re.search(rf"^\.\. auto(class|function|exception):: {re.escape(name)}$", shown, re.M):
            found.append(f"{name} is on none of docs/api-*.md")
    return found


def check(app) -> None:
    if found := faults():
        raise ExtensionError("; ".join(found))


# --- docstrings ---

_CODE = re.compile(r"(`[^`]+`)")
_NAMES = r"\*{0,2}[A-Za-z]\w*(?:, [a-z]\w*)*"
_ITEM = re.compile(rf"(?:^|(?<=[.;] ))({_NAMES}): (?=\S)")


def _escaped(text: str) -> str:
    """`code` becomes ``code``; what reStructuredText would take for markup is escaped."""
    parts = _CODE.split(text)
    return "".join(f"`{p}`" if _CODE.fullmatch(p) else re.sub(r"([\\*_|])", r"\\\1", p) for p in parts)


def _items(text: str, arguments: set[str]) -> Iterator[str]:
    """A paragraph; what it says of arguments, as a list of definitions."""
    found = [m for m in _ITEM.finditer(text) if {n.strip(" *") for n in m[1].split(",")} <= arguments]
    if before := text[: found[0].start() if found else None].strip():
        yield _escaped(before)
    for item, after in itertools.zip_longest(found, found[1:]):
        names = ", ".join(f"``{name.strip()}``" for name in item[1].split(","))
        about = text[item.end() : after.start() if after else None].strip()
        yield f"{names}\n    {_escaped(about)}"


def as_rst(docstring: str, arguments: set[str]) -> list[str]:
    """A docstring in reStructuredText: an indented block is code, a paragraph or a block "Args:" is about arguments."""
    made: list[str] = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines):
            made.append("::\n\n" + block)
        elif lines[0].lstrip().startswith("* "):
            made.append("\n".join(f"{b[0]}{_escaped(b[1])}" for line in lines for b in [_bullet(line)]))
        elif any(line.startswith("    ") for line in lines[1:]) and not lines[0].endswith("Args:"):
            made.append("\n".join(f"| {_escaped(line)}" for line in lines))  # lines that are to stay lines
        else:
            rest = textwrap.dedent("\n".join(lines[1:])) if lines[0] == "Args:" else block
            for text in re.sub(r"\n +", " ", rest).splitlines() if lines[0] == "Args:" else [" ".join(lines)]:
                made += _items(text, arguments)
    return "\n\n".join(made).splitlines() + [""]


def _bullet(line: str) -> tuple[str, str]:
    mark = re.match(r" *(\* )?", line)[0]
    return mark, line[len(mark) :]


def docstring(app, what, name, obj, options, lines) -> None:
    try:
        arguments = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        arguments = set()
    arguments |= {name for cls in getattr(obj, "__mro__", ()) for name in vars(cls).get("__annotations__", {})}
    lines[:] = as_rst("\n".join(lines), arguments)


def public_name(app, env, node, contnode) -> nodes.Node | None:
    """A signature names a class by the module where it lies: it is documented under its public name."""
    python = env.get_domain("py")
    for module in MODULES:
        name = f"{module}.{node['reftarget'].rpartition('.')[2]}"
        if name in python.objects:
            return python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)
    inside = node.get("refdomain") == "py" and node["reftarget"].startswith("hosfl")
    return contnode if inside else None  # what is not public stays text


# --- the command line ---


def _option(action: argparse.Action) -> str:
    name = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
    text = (action.help or "") % {**vars(action), "prog": "hosfl"}
    if action.choices and action.option_strings:
        text += f" One of {', '.join(f'`{choice}`' for choice in action.choices)}."
    return f"| {name} | {text.replace('|', chr(92) + '|')} |"


def commands(parser: argparse.ArgumentParser, settings: set[str]) -> Iterator[str]:
    """A section in Markdown for every command of a parser. settings: options that are described once, elsewhere."""
    (subs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, sub in subs.choices.items():
        if any(isinstance(a, argparse._SubParsersAction) for a in sub._actions):
            yield from commands(sub, settings)
            continue
        own = [a for a in sub._actions if a.dest not in settings | {"help"}]
        shared = [a for a in sub._actions if a.dest in settings]
        yield f"## {sub.prog}\n\n{sub.description}\n"
        if shared:
            without = sorted(settings - {a.dest for a in shared})
            but = f" but {', '.join(f'`--{dest}`' for dest in without)}" if without else ""
            yield f"Takes the [settings of a run](#settings-of-a-run){but}, and:\n"
        yield "| option | what |\n|---|---|\n" + "\n".join(map(_option, own)) + "\n"


def settings_of_a_run(parser: argparse.ArgumentParser, settings: set[str]) -> str:
    """The settings, in Markdown, as `hosfl train` says them."""
    (subs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    rows = [_option(a) for a in subs.choices["train"]._actions if a.dest in settings]
    return "## Settings of a run\n\n| option | what |\n|---|---|\n" + "\n".join(rows) + "\n"


class Commands(SphinxDirective):
    """Every command and every option, from the parser itself."""

    def run(self) -> list[nodes.Node]:
        from hosfl import Config
        from hosfl.cli import parser

        names = set(Config.names())
        text = "\n".join([*commands(parser(), names), settings_of_a_run(parser(), names)])
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app) -> dict[str, bool]:
    app.connect("builder-inited", check)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("missing-reference", public_name)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
