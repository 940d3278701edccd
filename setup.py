"""Builds the C++ extension. Everything else about the package is in pyproject.toml.

The extension takes addresses and sizes: it includes no torch header, links no libtorch, and one build serves every
torch release. One build also serves every x86-64 processor: csrc/kernels_*.cpp compile the same loops for three
instruction sets and bindings.cpp picks one at run time, so there is no -march here.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# The bits depend on these: no fused multiply-add, no errno and no traps to keep a loop from being vectorised.
IEEE = ["-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Pybind11Extension(
            "hosfl_kernels._cpp",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", *IEEE],
            extra_link_args=["-pthread"],
        )
    ]
)
