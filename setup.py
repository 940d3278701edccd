"""Builds the C++ extension, and with HOSFL_CUDA=1 the CUDA one. All else about the package is in pyproject.toml,
but for the description, which is the README with links that hold elsewhere.

The extensions take addresses and sizes: they include no torch header, link no libtorch, and one build serves every
torch release. One build also serves every x86-64 processor: csrc/kernels_*.cpp compile the same loops for three
instruction sets and bindings.cpp picks one at run time, so there is no -march here.

HOSFL_CUDA=1 needs nvcc on the PATH (CUDA 12.8 or later, which knows sm_100), and nothing else of CUDA when it runs.
HOSFL_CUDA_ARCHITECTURES=90 compiles for that generation alone, in a third of the time.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The bits depend on these: no fused multiply-add, no errno and no traps to keep a loop from being vectorised.
IEEE = ["-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"]
NVCC_IEEE = ["--fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]

# GCC would make a sum next to where it is used, and so put chains of operations that csrc/noise.h sets side by side one
# after another.
IN_ORDER = ["-fno-tree-ter"]

# Machine code for these, which newer processors of each generation run too, and PTX for generations to come.
ARCHITECTURES = os.environ.get("HOSFL_CUDA_ARCHITECTURES", "80 90 100").split()
GENCODE = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
GENCODE += [f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]

CUDA = Extension("hosfl_kernels._cuda", ["csrc/cuda.cu"])


class BuildWithNvcc(build_ext):
    """nvcc compiles and links the CUDA extension in one command: it knows where its runtime is, and links it in."""

    def build_extension(self, extension):
        if extension is not CUDA:
            return super().build_extension(extension)
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            sys.exit("HOSFL_CUDA=1 needs nvcc on the PATH: install a CUDA toolkit, or unset HOSFL_CUDA")
        target = self.get_ext_fullpath(extension.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        host = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
        includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}
        command = [nvcc, "-shared", "-std=c++17", "-O3", *NVCC_IEEE, *GENCODE, f"-Xcompiler={','.join(host)}"]
        command += [f"-I{path}" for path in sorted(includes)]
        subprocess.run([*command, *extension.sources, "-o", target], check=True)


def long_description():
    """README.md with absolute links, to this version's tag: an index of packages shows it alone."""
    project = Path("pyproject.toml").read_text(encoding="utf-8")
    source, version = (re.search(rf'^{key} = "(.*)"$', project, re.MULTILINE)[1] for key in ("Source", "version"))

    def absolute(link):
        is_picture, text, target = link.groups()
        view = "raw" if is_picture else "blob"
        page = f"README.md{target}" if target.startswith("#") else target
        return f"{is_picture}[{text}]({source}/{view}/v{version}/{page})"

    readme = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^]]*)\]\((?![a-z]+:)([^)]+)\)", absolute, readme)


ParallelCompile("HOSFL_BUILD_JOBS", default=0).install()  # as many files at once as there are processors
with_cuda = os.environ.get("HOSFL_CUDA") == "1"
cpp = Pybind11Extension(
    "hosfl_kernels._cpp",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", *IEEE, *IN_ORDER],
    libraries=["dl"] if sys.platform == "linux" else [],  # dlsym, which newer C libraries have themselves
    extra_link_args=["-pthread"],
)
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=[cpp, CUDA] if with_cuda else [cpp],
    cmdclass={"build_ext": BuildWithNvcc},
    # The same version and another file name, so that both kinds of wheel can lie in one folder; and another folder to
    # build in, or what was built for one would be found and packed for the other.
    options={"bdist_wheel": {"build_number": "1cuda"}, "build": {"build_base": "build/cuda"}} if with_cuda else {},
)
