"""Without a CUDA device the Triton kernels run in the interpreter, which must be known before they are imported."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def threads():
    """Calls threads(n) to set torch's thread count; puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tests' models are tiny: a second thread only waits, and waits much longer on a busy machine."""
    torch.set_num_threads(1)


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
