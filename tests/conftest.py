"""Options of the tests, and what every test runs under.

Without a CUDA device the Triton kernels run in the interpreter, which must be known before they are imported.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from hosfl_kernels import _cpp

if sys.version_info < (3, 11):  # for which there is no onnxruntime that keeps to its folder
    collect_ignore = ["test_edge.py", "test_edge_half.py", "test_edge_backward.py"]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Inductor keeps what it compiled for one instruction set and loads it for another: wrong results, or a crash.
_OWN = f"torchinductor-{getattr(os, 'getuid', int)()}-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), _OWN)))
# Of the processes that tests start: see threads_and_instruction_set.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--seeds", type=int, default=1, metavar="N", help="of every test about learning (default: 1)")
    parser.addoption("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.addoption("--isa", choices=_cpp.supported(), help="of the C++ kernels (default: the best there is)")


# Of the tests marked `families`, `make test` runs those of these: one for each way to build a transformer, or a picture
# model. `make test-slow` runs the others.
FEW = ("opt", "gpt2", "llama", "gemma3_text", "bert", "modernbert", "deberta-v2", "t5", "vit", "resnet", "torchvision")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("families") and item.callspec.params["family"] not in FEW:
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("learning"):
        metafunc.parametrize("seed", range(metafunc.config.getoption("--seeds")), indirect=True, scope="module")


@pytest.fixture(scope="module")
def seed(request):
    """Of a test about learning."""
    return request.param


@pytest.fixture
def below(request, record_property):
    """Calls below(value, bound, what): asserts value < bound, and keeps both for the table that --seeds prints.

    What a test about learning measures differs by processor and seed: its bound is several standard deviations away.
    """

    def check(value, bound, what=""):
        given = (str(v) for name, v in request.node.callspec.params.items() if name != "seed")
        name = f"{request.node.originalname}[{'-'.join(given)}] {what}".strip()
        record_property("below", (name, float(value), bound))
        assert value < bound, f"{what} {value:.4g}, bound {bound}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--seeds") == 1:
        return
    found = defaultdict(list)
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    for test, value, bound in (kept for r in reports for name, kept in r.user_properties if name == "below"):
        found[test, bound].append(value)
    terminalreporter.section(f"what was learned; torch {torch.backends.cpu.get_cpu_capability()}")
    for (test, bound), values in sorted(found.items()):
        spread = stdev(values) if len(values) > 1 else 0.0
        away = f"{(bound - mean(values)) / spread:.1f} standard deviations away" if spread else "no spread"
        figures = f"mean {mean(values):.4f}, largest {max(values):.4f}, bound {bound:g}: {away}"
        terminalreporter.write_line(f"{figures}  {test}")


@pytest.fixture
def threads():
    """Calls threads(n) to set torch's thread count; puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def threads_and_instruction_set(request):
    """The tests' models are tiny: a second thread only waits, and waits much longer on a busy machine."""
    torch.set_num_threads(request.config.getoption("--threads"))
    if isa := request.config.getoption("--isa"):
        _cpp.use_isa(isa)


@pytest.fixture(autouse=True, scope="session")
def interrupts_reach_us():
    """A shell starts what runs in its background with Ctrl-C ignored; the tests of interrupts need it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory):
    """A copy of what git would commit, to build packages in: a build leaves files beside its sources."""
    root, copy = Path(__file__).parents[1], tmp_path_factory.mktemp("source")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy / name)
    return copy
