"""What a user gets: the sdist and the wheel that is built from it. `make wheel` installs that wheel and uses it."""

import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packages(source_tree, tmp_path_factory):
    """Names in the sdist, without its first folder; names in the wheel; what the build said."""
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", dist, source_tree]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        source = {member.name.partition("/")[2] for member in archive if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        return source, set(archive.namelist()), done.stdout + done.stderr


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_the_sdist_holds_what_is_tracked(packages, source_tree):
    tracked = {name for name in files(source_tree) if not name.startswith((".git", "build/", "hosfl.egg-info/"))}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in packages[0] if not name.startswith("hosfl.egg-info/")} == tracked | made


def test_the_wheel_holds_every_package_and_nothing_else(packages, source_tree):
    wheel = {name for name in packages[1] if ".dist-info/" not in name}
    in_packages = {name for name in files(source_tree) if name.startswith(("hosfl/", "hosfl_kernels/"))}
    (extension,) = wheel - in_packages
    assert re.fullmatch(r"hosfl_kernels/_cpp\.[\w.-]*(so|pyd)", extension)
    assert in_packages <= wheel
    assert {
        "hosfl/py.typed",
        "hosfl/tasks/public.txt",
        "hosfl_kernels/py.typed",
        "hosfl_kernels/gpu/__init__.py",
    } <= wheel


def test_the_build_knows_no_torch_and_no_processor_of_its_own(packages, source_tree):
    assert "-ffp-contract=off" in packages[2]
    assert not re.search(r"-march|-mcpu", packages[2])
    (requires,) = re.findall(r"^\[build-system\]\nrequires = (.*)", (source_tree / "pyproject.toml").read_text())
    assert "torch" not in requires
