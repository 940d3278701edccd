"""What a release says of itself, without building one: versions that exist together, and where links lead."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import hosfl
from hosfl.cli import main

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PAIRS = re.findall(r"^\| (\d[\d.]*) \| (\d[\d.]*) \| (.*) \|$", (ROOT / "docs/versions.md").read_text(), re.M)


def of_project(pattern):
    (found,) = re.findall(pattern, PROJECT, re.M)
    return found


def numbers(release):
    return tuple(map(int, release.split(".")))


# --- versions -----------------------------------------------------------------------------------------------------


def test_the_oldest_pair_is_what_the_project_asks_for():
    torch, triton, _ = min(PAIRS, key=lambda pair: numbers(pair[0]))
    assert torch == of_project(r'^    "torch>=(.*)",') + ".0"
    assert triton == of_project(r'^    "triton>=([\d.]*);') + ".0"


def test_make_test_runs_a_pair():
    pinned = dict(re.findall(r"^(torch|triton)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert [(pinned["torch"], pinned["triton"])] == [pair[:2] for pair in PAIRS if "`make test`" in pair[2]]


def test_the_workflow_runs_the_others():
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    said = [pair[:2] for pair in PAIRS if "the workflow `ci`" in pair[2]]
    assert [(run["torch"], run["triton"]) for run in ci["jobs"]["pair"]["strategy"]["matrix"]["include"]] == said
    assert len(said) == len(PAIRS) - 1


def test_a_newer_torch_has_no_older_triton():
    assert sorted(PAIRS, key=lambda pair: numbers(pair[0])) == PAIRS
    assert sorted(PAIRS, key=lambda pair: numbers(pair[1])) == PAIRS


def test_the_version_is_one(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"hosfl {hosfl.__version__}\n"
    assert hosfl.__version__ == version("hosfl") == of_project(r'^version = "(.*)"')
    assert f"version: {hosfl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# --- what an index of packages shows ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metadata(source_tree, tmp_path_factory):
    """The METADATA that a wheel gets."""
    out = tmp_path_factory.mktemp("metadata")
    code = "import sys; from setuptools.build_meta import *; prepare_metadata_for_build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source_tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*/METADATA")
    return path.read_text(encoding="utf-8")


def test_every_link_of_the_description_leads_somewhere(metadata):
    head, _, body = metadata.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    source = of_project(r'^Source = "(.*)"')
    assert f"Project-URL: Source, {source}" in head
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]*)\)", body)
    assert len(links) == len(re.findall(r"\]\(", (ROOT / "README.md").read_text())) > 5
    own = [link for link in links if link[1].startswith(source)]
    assert len(own) > 5
    for picture, link in links:
        assert re.match(r"https?://", link)
        if link.startswith(source):
            kind = "raw" if picture else "blob"
            path, _, anchor = link.removeprefix(f"{source}/{kind}/v{hosfl.__version__}/").partition("#")
            assert (ROOT / path).is_file()
            titles = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in re.findall(r"^#+ (.*)", body, re.M)]
            assert not anchor or anchor in titles


def test_the_plain_package_needs_numpy_and_no_torch(metadata):
    """Every extra brings torch, but `torch` itself and `edge`, whose clients have none."""
    required = re.findall(r"^Requires-Dist: (.*)", metadata, re.M)
    plain = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert plain == {"numpy", "safetensors"}
    of_extra = {}
    for line in required:
        for extra in re.findall(r'extra == "(\w+)"', line):
            of_extra.setdefault(extra, []).append(line)
    assert any(line.startswith("torch>=") for line in of_extra["torch"])
    for extra, lines in of_extra.items():
        if extra == "edge":
            assert {re.match(r"[\w-]+", line)[0] for line in lines} == {"onnxruntime", "nats-py", "cryptography"}
        elif extra != "torch":
            assert any(re.match(r"hosfl\[(.*,)?(torch|studies|hf)\b", line) for line in lines), extra


def test_one_address_of_the_project():
    """pyproject.toml's is what CITATION.cff and the other addresses there begin with."""
    source = of_project(r'^Source = "(.*)"')
    assert f"repository-code: {source}\n" in (ROOT / "CITATION.cff").read_text()
    assert set(re.findall(r"https://github\.com/\w+/\w+", PROJECT)) == {source}


# --- workflows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path):
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    for use in uses:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\./\.github/workflows/ci\.yml", use)
    by_action = {}
    for action, pin in re.findall(r"uses: ([\w/-]+)@(.*)", "".join(p.read_text() for p in WORKFLOWS)):
        assert by_action.setdefault(action, pin) == pin


def test_nothing_is_published_before_the_tests():
    release, ci = (yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text()) for name in ("release", "ci"))
    assert "workflow_call" in ci[True]  # YAML 1.1 takes "on" for a truth
    assert release["jobs"]["test"] == {"uses": "./.github/workflows/ci.yml"}
    assert set(release["jobs"]["publish"]["needs"]) == set(release["jobs"]) - {"publish", "pages"}
    assert release["jobs"]["pages"]["needs"] == "publish"
    (site,) = (step["with"] for step in ci["jobs"]["docs"]["steps"] if step.get("with", {}).get("name") == "site")
    assert release["jobs"]["pages"]["steps"][0]["with"]["name"] == site["name"]
