"""What a client's round needs: measured alone in its process, within the bound, and what the measuring itself does."""

import json
import sys

import pytest
import torch

from benchmarks.tables import RESULTS
from hosfl.cli import main
from hosfl.probing.probe import CHUNK, inner
from hosfl.runs import memory
from hosfl.runs.memory import BOUND, BOUNDED, FEW_WEIGHTS_WAYS, HALVES, measure, over_bound, peak_growth, reference_way

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_growth_is_the_peak_above_what_was_there():
    cpu = torch.device("cpu")
    held = [torch.ones(4_000_000)]
    assert peak_growth(lambda: held.append(torch.ones(8_000_000)), cpu) == pytest.approx(32e6, rel=0.1)
    # Twice the same, freed in between: the second is not hidden by the first.
    sizes = [peak_growth(lambda: float(torch.ones(8_000_000).sum()), cpu) for _ in range(2)]
    assert sizes == pytest.approx([32e6, 32e6], rel=0.1)
    assert peak_growth(lambda: None, cpu) < 1e6

    def small_blocks():  # the last one keeps the allocator from shrinking its heap by itself
        blocks = [torch.ones(5000) for _ in range(2000)]
        held.append(torch.ones(5000))
        del blocks

    sizes = [peak_growth(small_blocks, cpu) for _ in range(2)]
    assert sizes == pytest.approx([40e6, 40e6], rel=0.1)


@linux
def test_a_client_of_a_large_batch():
    """The digits half, its batch so large that pages and code do not show."""
    ways = ("inference", "ho, in place", "ho, in place, two-sided", "first-order")
    found = {way: measure("digits", way, 4096) for way in ways}
    cut, inference = found["inference"]["cut"], found["inference"]["peak_extra"]
    assert cut == 4096 * 7 * 8 * 8 * 4
    assert all(row["cut"] == cut and row["weights"] == 535 * 4 for row in found.values())
    for way in ways[1:3]:
        assert inference < found[way]["peak_extra"] <= inference + 3.1 * cut, way
    # Of the cut, only z and the multiplier are there beside the forward pass.
    assert found["ho, in place"]["peak_extra"] <= inference + 2.1 * cut
    assert found["first-order"]["peak_extra"] > 1.3 * inference


@pytest.mark.parametrize("shape", [(3, 5), (1, 3 * CHUNK), (5, CHUNK // 2 + 1), (0, 4)])
def test_inner_in_parts_is_the_whole_product(shape):
    multiplier, output, other = (torch.randn(shape) for _ in range(3))
    whole = float(((output - other).double() * multiplier.double()).sum()) / 0.5
    assert inner(multiplier, output, other, 0.5) == pytest.approx(whole, rel=1e-12, abs=1e-12)


def test_a_process_that_fails_is_no_measurement(monkeypatch, tmp_path):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(ChildProcessError, match="digits, first-order: out of memory"):
        measure("digits", "first-order", 1)


@pytest.mark.parametrize("peak", [1300, 1500])
def test_command_line(tmp_path, capsys, monkeypatch, peak):
    def measured(name, way, batch, device):
        return {"peak_extra": peak if way.startswith("ho") else 1000, "cut": 100, "weights": 10}

    monkeypatch.setattr(memory, "measure", measured)
    out = tmp_path / "new" / "memory.json"
    assert main(["memory", "--halves", "minilm", "--out", str(out)]) == (peak > 1300 * BOUND)
    result = json.loads(out.read_text())
    assert list(result["halves"]["minilm"]["ways"]) == list(HALVES["minilm"].ways)
    assert result["halves"]["minilm"]["ways"]["ho, in place"]["of_bound"] == pytest.approx(peak / 1300)
    captured = capsys.readouterr()
    assert "first-order" in captured.out
    assert ("times inference plus three cut tensors" in captured.err) == (peak > 1300 * BOUND)
    with pytest.raises(SystemExit, match="2"):
        main(["memory", "--device", "no-such"])
    assert "hosfl: cannot compute on device 'no-such'" in capsys.readouterr().err


def test_the_results_keep_the_bound():
    result = json.loads((RESULTS / "client-memory.json").read_text())
    assert result["bound"] == BOUND
    assert list(result["halves"]) == list(HALVES)
    assert all(way in result["halves"]["minilm"]["ways"] for way in BOUNDED)
    assert not list(over_bound(result))
    for name in ("minilm", "resnet18"):
        ways = result["halves"][name]["ways"]
        assert ways["first-order"]["peak_extra"] > ways["backpropagation alone"]["peak_extra"]
        assert ways["backpropagation alone"]["peak_extra"] > ways["ho, in place"]["peak_extra"]


def test_the_results_of_narrow_weights():
    """Stored in fewer bits, the weights are less, and a layer's wide ones hardly show."""
    result = json.loads((RESULTS / "client-memory.json").read_text())
    ways = result["halves"]["minilm"]["ways"]
    assert {reference_way(way) for way in FEW_WEIGHTS_WAYS} == {"inference"}
    for trains in ("norms", "lora"):
        rows = [
            ways[f"ho, in place, {trains}, the rest {frozen}"] for frozen in ("float32", "bfloat16", "int8", "int4")
        ]
        for row, share in zip(rows, (1, 1 / 2, 8.5 / 32, 4.5 / 32), strict=True):
            assert row["weights"] == pytest.approx(share * rows[0]["weights"], rel=0.1)
            assert row["peak_extra"] < 1.1 * rows[0]["peak_extra"]
