"""Options of the suites, and the tensors they work on."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--elements", type=int, default=64 * 2**20, help="elements of the tensor (default: 64 Mi)")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])


@pytest.fixture
def elements(request):
    return request.config.getoption("--elements")
