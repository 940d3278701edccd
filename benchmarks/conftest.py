"""pytest options and fixtures of the suites: devices, sizes and models."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import LISTS

SIZES = (2**10, 2**15, 2**20, 2**26, 2**30)


def pytest_addoption(parser):
    parser.addoption("--elements", type=int, default=64 * 2**20, help="elements of the largest tensor (64 Mi)")
    parser.addoption("--rows", type=Path, help="a file to add every benchmark's row to, as it ends: JSON lines")


def pytest_generate_tests(metafunc):
    max_elements = metafunc.config.getoption("--elements")
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    if "size" in metafunc.fixturenames:
        metafunc.parametrize(
            "size", [size for size in SIZES if size <= max_elements] or [max_elements], ids="{:,}".format
        )
    if "model" in metafunc.fixturenames:
        small = [name for name, shapes in LISTS.items() if sum(map(math.prod, shapes())) <= 2 * max_elements]
        metafunc.parametrize("model", small or [next(iter(LISTS))])


@pytest.fixture
def elements(request):
    return request.config.getoption("--elements")


@pytest.fixture(autouse=True)
def saved(request, benchmark):
    """Append a row to --rows, also if an assertion about the measurement fails: extra_info, and the best time."""
    yield
    path = request.config.getoption("--rows")
    if path and benchmark.stats:
        row = {**benchmark.extra_info, "threads": torch.get_num_threads(), "seconds": benchmark.stats.stats.min}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
