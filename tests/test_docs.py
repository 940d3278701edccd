"""What the pages show runs: their code, their commands, and what they say of formats, errors and public names."""

import argparse
import filecmp
import importlib
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import hosfl
import hosfl_kernels
from hosfl import cli
from hosfl.protocol import header, log, messages, records
from hosfl.runs.config import Config
from hosfl.studies.study import load_study

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
PROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PYTHON = r"```(?:python|\{code-cell\} python)\n(.*?)```"
SHELL = r"```(?:sh|bash)\n(.*?)```"


def with_blocks(pattern):
    return [pytest.param(page, id=page.name) for page, text in TEXTS.items() if re.search(pattern, text, re.S)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, where the repository's own files are found by their names."""
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", with_blocks(PYTHON))
def test_a_page_s_code_runs(page, folder):
    """All of a page's Python, from top to bottom as one program; of a tutorial, its cells."""
    code = "\n".join(re.findall(PYTHON, TEXTS[page], re.S))
    if "hosfl.edge" in code:
        pytest.importorskip("onnxruntime")
    exec(compile(code, page.name, "exec"), {"__name__": "page"})


# --- commands -----------------------------------------------------------------------------------------------------

# What a command shows for the reader to replace, and data or a model that a network would bring: it is read, not run.
READ_ONLY = re.compile(r"DIR|FILE|NAME|--model|--data|memory")
FEW = {"train": ["--rounds", "2"], "compare": ["--rounds", "2"], "simulate": ["--rounds", "2"]}


def commands(text):
    """The words of every command, without what it is piped into and without assignments before it."""
    for block in re.findall(SHELL, text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index("|")] if "|" in words else words
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def hosfl_command(words, text):
    """Reads a command with the parser; runs it for two rounds where it needs nothing that is not here."""
    options = read(words)
    if options.command == "study":
        load_study(Path(words[1]))
        words = ["study", small_study(text), *words[2:], "--jobs", "1"]
    elif options.command in FEW:
        if READ_ONLY.search(" ".join(words)):
            names = {name: value for name, value in vars(options).items() if name in Config.names()}
            Config(**{**names, "data": "", "model": ""})
            return
        if getattr(options, "resume", None) is None:
            alone = ["--server-first", "1"] if getattr(options, "server_first", 0) else []  # fewer than the rounds
            words = [*words, *FEW[options.command], *alone]
    elif READ_ONLY.search(" ".join(words)):
        return
    assert cli.main(words) == 0


def read(words):
    try:
        return cli.parser().parse_args(words)
    except SystemExit as exit:
        pytest.fail(f"hosfl {shlex.join(words)}: the parser ends with {exit.code}")


def small_study(text):
    """The page's own study, all of it checked, and made small: two rounds, a trial and a seed."""
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    Path("page.yaml").write_text(block)
    load_study(Path("page.yaml"))
    study = yaml.safe_load(block)
    study |= {"rounds": 2, "tuning_seeds": study["tuning_seeds"][:1], "seeds": study["seeds"][:1]}
    for method in study["methods"].values():
        method["grid"] = {name: values[:1] for name, values in method["grid"].items()}
    Path("small.yaml").write_text(yaml.safe_dump(study))
    return "small.yaml"


class Read(Exception):
    """A parser has read the command."""


def module_command(words, monkeypatch):
    """`python -m MODULE ...`: its parser takes the options. Nothing is run."""
    name, *options = words
    if name == "benchmarks.gpu":  # it takes what is there
        assert not options
        return
    module = importlib.import_module(name)
    if "argparse" not in vars(module):
        assert not options, f"{name} takes no options"
        return

    def parse(parser, arguments=None, namespace=None):
        original(parser, arguments, namespace)
        raise Read

    original = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [name, *options])
        with pytest.raises(Read):
            module.main()


def make_command(words):
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"\$\({name}\)" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, MAKEFILE, re.M), f"make {word}"


def pip_command(words):
    extras = set(re.findall(r"^(\w+) = \[", PROJECT.partition("[project.optional-dependencies]")[2], re.M))
    assert words[0] == "install"
    for word in words[1:]:
        name, _, named = word.rstrip("]").partition("[")
        assert name in ("hosfl", ".")
        assert not named or set(named.split(",")) <= extras, word


def check(words, text, monkeypatch):
    program, *rest = words
    if program == "hosfl":
        hosfl_command(rest, text)
    elif words[:2] == ["python", "-m"]:
        module_command(words[2:], monkeypatch)
    elif program == "make":
        make_command(rest)
    elif program == "pip":
        pip_command(rest)
    elif program == "nats-server":  # another's program: tests/test_serve.py starts it so
        assert rest[0] == "-c"
    elif program == "cmp":
        assert filecmp.cmp(*rest, shallow=False)
    else:
        pytest.fail(f"no command that is known here: {shlex.join(words)}")


@pytest.mark.parametrize("page", with_blocks(SHELL))
def test_a_page_s_commands_run(page, folder, monkeypatch):
    """In their order, in one folder, where the page's own files lie: blocks of Python that begin with a file's name."""
    for name, block in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXTS[page], re.S):
        Path(name).write_text(block)
    for words in commands(TEXTS[page]):
        check(words, TEXTS[page], monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "hosfl train --no-such-option 1",
        "hosfl train --task sst2 --data DIR --method no-such-method",
        "hosfl study no-such-file.yaml --out DIR",
        "hosfl no-such-command",
        "python -m benchmarks.liars --no-such-option",
        "python -m benchmarks.estimators --no-such-option",
        "make no-such-target",
        "make pair NO_SUCH_VARIABLE=1",
        'pip install "hosfl[no-such-extra]"',
        "cmp README.md pyproject.toml",
        "curl example.org",
    ],
)
def test_a_wrong_command_is_found(command, folder, monkeypatch):
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, OSError, SystemExit)):
        for words in commands(f"```sh\n{command}\n```"):
            check(words, "", monkeypatch)


def names_of_options(parser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from names_of_options(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_the_text_are_those_that_there_are(page, monkeypatch):
    """`hosfl train --resume DIR` is read by the parser, `--rounds` is an option of some command."""
    known = set(names_of_options(cli.parser()))
    subcommands = cli.parser()._subparsers._group_actions[0].choices
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose):
        program, *words = code.split()
        if program == "hosfl" and len(words) > 1:
            read(shlex.split(code)[1:])
        elif program == "hosfl" and words:
            assert words[0] in subcommands, code
        elif program.startswith("--"):
            unknown = [word for word in code.split() if word.startswith("--") and word not in known]
            assert not unknown, code
        elif code.startswith("python -m "):
            module_command(words[1:], monkeypatch)
        elif program == "make" and words:
            make_command(shlex.split(code)[1:])


# --- what the pages say of the code -------------------------------------------------------------------------------


def test_every_public_name_has_a_docstring_and_a_place(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from_code = importlib.import_module("from_code")
    assert from_code.faults() == []
    monkeypatch.setattr(hosfl, "__all__", [*hosfl.__all__, "nameless"])
    monkeypatch.setattr(hosfl, "nameless", nameless := lambda: None, raising=False)
    assert from_code.faults() == ["hosfl.nameless has no docstring", "hosfl.nameless is on none of docs/api-*.md"]
    nameless.__doc__ = f"Wide.\n\n    {'x' * 93}\n\nArgs:\n    x: {'x' * 93}"
    assert from_code.faults()[0] == f"hosfl.nameless shows code of 97 columns: {'x' * 93}"


SAID = """What it is.

    class A:

        x = 1

Args:
    directions: P.
    seed: of the run,
        below 2^64.
    Everything else as before.

Attributes:
    applied, epoch: (1) how many rounds.

Raises, with nothing changed:
    ValueError, TypeError: a number out of range.
"""


def test_sections_of_docstrings_are_lists_of_definitions(monkeypatch):
    """In reStructuredText "P." and "(1)" alone would begin a list of their own, and be gone from the page."""
    monkeypatch.syspath_prepend(DOCS)
    found = "\n".join(importlib.import_module("from_code").as_rst(SAID)).split("\n\n")
    assert found == [
        "What it is.",
        "::",
        "    class A:",
        "        x = 1",
        "``directions``\n    \\P.",
        "``seed``\n    of the run, below 2^64.",
        "Everything else as before.",
        "Attributes:",
        "``applied``, ``epoch``\n    \\(1) how many rounds.",
        "Raises, with nothing changed:",
        "``ValueError``, ``TypeError``\n    a number out of range.\n",
    ]


def test_every_command_and_option_is_on_the_page_of_commands(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    text = importlib.import_module("from_code").command_line()
    for command in ("hosfl train", "hosfl simulate", "hosfl log verify"):
        assert f"## {command}\n" in text
    missing = [name for name in names_of_options(cli.parser()) if f"`{name}`" not in text]
    assert sorted(set(missing)) == ["--help", "--version", "-h"]


def test_the_page_of_formats_has_the_formats_of_the_code():
    page = TEXTS[DOCS / "formats.md"]
    for magic, formats in [
        (messages.MAGIC, (messages.HEADER, messages.ARRAY)),
        (header.MAGIC, (header.HEADER, log.FRAME, records.FIELDS)),
    ]:
        assert f"`{magic.decode()}`" in page
        for each in formats:
            assert f"| `{each.format}` |" in page
    assert re.findall(r"[Ff]ormat version (\d) is", page) == [str(header.VERSION), str(header.WITH_BLOCKS)]
    for path in re.findall(r"`(hosfl/[\w/]+\.py)`", page):
        assert (ROOT / path).is_file()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (up|down) \|(.*)\|$", page, re.M)
    said = {int(kind): (name, way, tuple(re.findall(r"`(\w+)`", arrays))) for kind, name, way, arrays in rows}
    are = {k: (cls.__name__, cls.direction, tuple(cls.arrays())) for k, cls in messages.MESSAGES.items()}
    assert said == are
    assert f"format version {importlib.import_module('hosfl.optim.log_file').FORMAT}." in page


def exceptions():
    """Names of the exceptions that the packages define, but for one that never leaves a simulation."""
    for package in (hosfl, hosfl_kernels):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if ".gpu" in found.name or found.name.endswith(("hf", "cuda", "_cuda", "_cpp")):
                continue
            for name, what in vars(importlib.import_module(found.name)).items():
                mine = isinstance(what, type) and issubclass(what, BaseException) and what.__module__ == found.name
                if mine and not name.startswith("_") and name != "ServerDied":
                    yield name, what


def test_every_error_is_explained():
    pytest.importorskip("onnxruntime")  # which hosfl.edge imports
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", TEXTS[DOCS / "errors.md"], re.M)
    assert dict(rows) == {name: what.__base__.__name__ for name, what in exceptions()}
    assert len(rows) == len(dict(rows))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"https?:|#", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.M)
            titles = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in titles, target


def test_the_readme_is_short():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 200


def test_every_page_is_in_the_index():
    listed = re.findall(r"^([a-z][a-z-]+)$", TEXTS[DOCS / "index.md"], re.M)
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.parent == DOCS and page.stem != "index")
