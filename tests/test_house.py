"""The rules of the house that a machine can check. See CONTRIBUTING.md."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import hosfl_kernels
from benchmarks.readme import PAGES, updated

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("hosfl/**/*.py"), *ROOT.glob("hosfl_kernels/**/*.py")])


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


# From the ground up: a layer imports from those before it, and from itself. What lies beside the layers is a leaf.
LAYERS = (
    *("protocol", "halves", "probing", "methods", "tasks", "federation", "engines", "edge", "runs", "studies"),
    "commands",  # and hosfl/cli.py, which imports it when a command runs, and hosfl/__main__.py, which imports that
)
ABOVE = [ROOT / "hosfl" / name for name in ("__init__.py", "__main__.py", "cli.py")]
LEAVES = ("extras", "files", "interrupts", "references", "settings", "terminal")


def layer(module):
    """Of a module's dotted name: its layer, its leaf, "optim", or "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_layers_import_what_lies_below_them():
    """hosfl.optim stands on protocol and probing, beside the rest."""
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "hosfl") or path in ABOVE:
            continue
        here = layer(str(path.relative_to(ROOT).with_suffix("")).replace("/", "."))
        for name in imported(path):
            if not name.startswith("hosfl."):
                continue
            there = layer(name)
            if there == here or there in LEAVES:
                continue
            assert here not in LEAVES, f"{path}: a leaf imports {name}"
            if here == "optim":
                assert there in ("protocol", "halves", "probing"), f"{path}: {name}"
            else:
                assert there in LAYERS, f"{path}: {name} is of no layer"
                assert LAYERS.index(there) < LAYERS.index(here), f"{path}: {name} lies above {here}"


def test_methods_and_tasks_know_nothing_of_each_other():
    for path in (ROOT / "hosfl/methods").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("hosfl.tasks")], path
    for path in (ROOT / "hosfl/tasks").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("hosfl.methods")], path


def test_the_protocol_and_what_lies_below_it_import_no_torch():
    paths = [*(ROOT / "hosfl/protocol").glob("*.py"), *(ROOT / f"hosfl/{leaf}.py" for leaf in LEAVES)]
    exports = "export.py", "source.py", "tracing.py", "backward.py", "batch_statistics.py"
    paths += [path for path in (ROOT / "hosfl/edge").glob("*.py") if path.name not in exports]
    paths += (ROOT / "hosfl/engines").glob("*.py")
    paths += [ROOT / f"hosfl/tasks/{name}.py" for name in ("reading", "picture_files", "padding")]
    for path in paths:
        assert not [name for name in imported(path) if re.match(r"torch(\.|$)", name)], path


def test_imports_go_one_way():
    public = set(hosfl_kernels.__all__)
    for path in SOURCES:
        for name in imported(path):
            if path.is_relative_to(ROOT / "hosfl"):
                if name.startswith("hosfl_kernels"):
                    assert name.removeprefix("hosfl_kernels.") in public, f"{path}: {name}"
            else:
                assert not re.match(r"hosfl(\.|$)", name), f"{path}: {name}"
            if path.name != "hf.py":
                assert not re.match(r"transformers|hosfl\.optim\.hf", name), f"{path}: {name}"
    spec = set(imported(ROOT / "hosfl_kernels/spec.py"))
    assert all(name.split(".")[0] in ("__future__", "numpy", "typing") for name in spec), spec


def test_the_cpp_never_includes_torch():
    for path in ROOT.glob("csrc/*"):
        includes = re.findall(r'#include [<"](.*?)[>"]', path.read_text())
        assert not [i for i in includes if "torch" in i or "ATen" in i or "c10" in i], path


def test_the_cpp_s_lines_are_as_long_as_python_s():
    for path in ROOT.glob("csrc/*"):
        long = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
        assert not long, f"{path}: {long}"


def test_the_extension_is_not_linked_to_torch():
    from hosfl_kernels import _cpp

    try:
        linked = subprocess.run(["ldd", _cpp.__file__], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no ldd on this system")
    assert "libstdc++" in linked
    assert not re.search(r"lib(torch|c10|gomp)", linked)


def test_the_map_has_every_file():
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map")[2]
    patterns = ("*.py", "*.toml", "*.in", "*.md", "Makefile", "constraints.txt")
    patterns += ("csrc/*", ".ci/*", ".github/workflows/*")
    folders = ("hosfl", "hosfl_kernels", "benchmarks", "tests")
    files = [f for p in patterns for f in ROOT.glob(p)] + [f for d in folders for f in (ROOT / d).rglob("*.py")]
    files += (ROOT / "tests").glob("*.json")
    names = {str(f.relative_to(ROOT)) for f in files if f.stat().st_size} - {"CONTRIBUTING.md"}
    missing = sorted(name for name in names if f"`{name}`" not in page)
    assert not missing
    mapped = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    gone = [m for m in mapped if "/" in m and not (ROOT / m).exists()]
    assert not gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_of_the_pages_are_those_of_the_results(page):
    assert updated(page) == page.read_text()


def code(path):
    """A file without its comments and docstrings."""
    if path.suffix != ".py":
        return re.sub(r"//.*", "", path.read_text())
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = None
    return ast.unparse(tree)


@pytest.mark.parametrize(
    ("op", "module", "by_itself_on_cuda"), [("replay", "replay", True), ("project", "projection", False)]
)
def test_an_op_touches_what_the_table_says(op, module, by_itself_on_cuda):
    """`project` has no kernel of nvcc's: it is made of `noise_`."""
    rows = re.search(r"a new op `name_` touches.*?\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[0]
    table = re.findall(r"^\| `(\S+)` \|", rows, re.M)
    assert len([row for row in table if "/name." not in row]) <= 10
    table = [row.replace("gpu/name.", f"gpu/{module}.").replace("/name.", f"/{op}.") for row in table]
    files = [path for folder in ("hosfl_kernels", "csrc") for path in (ROOT / folder).rglob("*.*")]
    files = [path for path in files if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu")]
    touched = {str(p.relative_to(ROOT)) for p in files if re.search(rf"\b{op}_?\b", code(p))}
    assert touched == set(table) - ({"csrc/cuda.cu"} if not by_itself_on_cuda else set())


def test_few_knobs():
    read = [
        (path.name, name)
        for path in SOURCES
        for name in re.findall(r"environ(?:\.get|\.setdefault)?[\[(]\s*\"(\w+)\"", path.read_text())
    ]
    assert {name for _, name in read} <= {"TRITON_INTERPRET", "HOSFL_CUDA", "OMP_NUM_THREADS"}
