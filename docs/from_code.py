"""What the pages take from the code, without Sphinx: public names, docstrings as reStructuredText, the command line."""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from hosfl import Config

HERE = Path(__file__).parent
SETTINGS = set(Config.names())
MODULES = ("hosfl", "hosfl.optim", "hosfl.optim.hf", "hosfl_kernels")


# --- public names ---


def public() -> Iterator[tuple[str, object]]:
    """Every public name with its module, and what it is. `hosfl.optim.hf` has one name, and no list of them."""
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ["ZOTrainer"]):
            yield f"{module.__name__}.{name}", getattr(module, name)


def faults() -> list[str]:
    """Public names without a docstring of their own, or with code that is too wide, and those that no page shows."""
    shown = "".join(page.read_text() for page in HERE.glob("api-*.md"))
    found = []
    for name, what in public():
        text = what.__dict__.get("__doc__") if inspect.isclass(what) else inspect.getdoc(what)
        if not text or text.startswith(f"{name.rpartition('.')[2]}("):  # what a dataclass writes by itself
            found.append(f"{name} has no docstring")
        found += [
            f"{name} shows code of {len(line)} columns: {line.strip()}" for line in _code(inspect.getdoc(what) or "")
        ]
        if not re.search(rf"^\.\. auto(class|function|exception):: {re.escape(name)}$", shown, re.M):
            found.append(f"{name} is on none of docs/api-*.md")
    return found


# --- docstrings ---

WIDEST = 96  # columns of code: more do not fit on a page


def _code(docstring: str) -> Iterator[str]:
    """Its lines of code that are too wide."""
    for block in re.split(r"\n\s*\n", docstring):
        if all(line.startswith("    ") for line in block.splitlines()):
            yield from (line for line in block.splitlines() if len(line) > WIDEST)


_SECTION = re.compile(r"(Args|Attributes|Raises.*):")
_CODE = re.compile(r"(`[^`]+`)")
_NAMES = r"\*{0,2}[A-Za-z]\w*(?:, [a-z]\w*)*"
_ITEM = re.compile(rf"(?:^|(?<=[.;] ))({_NAMES}): (?=\S)")


def _escaped(text: str) -> str:
    """`code` becomes ``code``; what reStructuredText would take for markup is escaped, "P." for the item of a list."""
    parts = _CODE.split(text)
    plain = "".join(f"`{p}`" if _CODE.fullmatch(p) else re.sub(r"([\\*_|])", r"\\\1", p) for p in parts)
    return re.sub(r"^(?=\(?\w+[.)](\s|$))", r"\\", plain)


def _items(text: str, arguments: set[str]) -> Iterator[str]:
    """A paragraph; what it says of arguments, as a list of definitions."""
    found = [m for m in _ITEM.finditer(text) if {n.strip(" *") for n in m[1].split(",")} <= arguments]
    if before := text[: found[0].start() if found else None].strip():
        yield _escaped(before)
    for item, after in itertools.zip_longest(found, found[1:]):
        yield _definition(item[1], text[item.end() : after.start() if after else None].strip())


def _section(title: str, lines: list[str]) -> Iterator[str]:
    """A block such as "Raises:", whose lines are "name: text", as a list of definitions; other lines are paragraphs."""
    if title != "Args:":
        yield title
    for line in re.sub(r"\n +", " ", textwrap.dedent("\n".join(lines))).splitlines():
        item = re.fullmatch(r"(\*{0,2}\w+(?:, \w+)*): (.*)", line)
        yield _definition(item[1], item[2]) if item else _escaped(line)


def _definition(names: str, about: str) -> str:
    """A definition of names that are set apart by commas."""
    return f"{', '.join(f'``{name.strip()}``' for name in names.split(','))}\n    {_escaped(about)}"


def _arguments(of: object) -> set[str]:
    """The names of a function's arguments, or of a class's and its fields."""
    try:
        names = set(inspect.signature(of).parameters)
    except (TypeError, ValueError):
        names = set()
    return names | {name for cls in getattr(of, "__mro__", ()) for name in vars(cls).get("__annotations__", {})}


def as_rst(docstring: str, of: object = None) -> list[str]:
    """A docstring in reStructuredText: an indented block is code, a paragraph or a section may be about arguments."""
    arguments = _arguments(of)
    made: list[str] = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines):
            if made and made[-1].startswith("::"):
                made[-1] += "\n\n" + block  # it goes on behind an empty line
            else:
                made.append("::\n\n" + block)
        elif lines[0].lstrip().startswith("* "):
            made.append("\n".join(f"{b[0]}{_escaped(b[1])}" for line in lines for b in [_bullet(line)]))
        elif _SECTION.fullmatch(lines[0]):
            made += _section(lines[0], lines[1:])
        elif any(line.startswith("    ") for line in lines[1:]):
            made.append("\n".join(f"| {_escaped(line)}" for line in lines))  # lines that are to stay lines
        else:
            made += _items(" ".join(lines), arguments)
    return [*"\n\n".join(made).splitlines(), ""]


def _bullet(line: str) -> tuple[str, str]:
    mark = re.match(r" *(\* )?", line)[0]
    return mark, line[len(mark) :]


# --- the command line ---


def _option(action: argparse.Action) -> str:
    """A row: the option, what stands behind it, what it is for, and what it may be."""
    name = ", ".join(f"`{option}`" for option in action.option_strings)
    metavar = f"`{action.metavar}`" if action.metavar else ""
    text = (action.help or "") % {**vars(action), "prog": "hosfl"}
    if action.choices:
        text += f"; one of {', '.join(f'`{choice}`' for choice in action.choices)}"
    return f"| {' '.join(filter(None, (name, metavar)))} | {text.replace('|', chr(92) + '|')} |"


def command_line() -> str:
    """A section in Markdown for every command, and one for the settings that several share."""
    from hosfl.cli import parser

    named = dict(_commands(parser()))
    settings = {a.dest: a for a in named["hosfl train"]._actions if a.dest in SETTINGS}
    text = []
    for name, command in named.items():
        options = {a.dest: a for a in command._actions if a.dest != "help"}
        text.append(f"## {name}\n\n{command.description}\n")
        if shared := options.keys() & settings.keys():
            without = ", ".join(f"`{a.option_strings[0]}`" for dest, a in settings.items() if dest not in shared)
            but = f" but {without}" if without else ""
            text.append(f"Takes the [settings of a run](#settings-of-a-run){but}, and:\n")
        text.append(_table(a for dest, a in options.items() if dest not in settings))
    return "\n".join([*text, "## Settings of a run\n", _table(settings.values())])


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                deeper = list(_commands(command))
                yield from deeper or [(command.prog, command)]


def _table(actions: Iterable[argparse.Action]) -> str:
    return "| option | what |\n|---|---|\n" + "\n".join(map(_option, actions)) + "\n"
