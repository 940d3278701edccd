"""Peak extra bytes of each contender, by the resident set of a fresh process or by the CUDA allocator."""

import subprocess
import sys

import pytest

from benchmarks.contenders import CONTENDERS, RECORDS, Contender
from hosfl_kernels import cuda
from hosfl_kernels.tensors import DISPATCH

SMALL = 1_000_000


def bound(way: Contender, device: str, elements: int) -> int:
    """Return the bytes that our way may take in addition to its tensor: 1 MB.

    On a GPU `project` also has partial sums. Triton: a float64 per seed and tile, at most 64 MB; the smallest default
    tile has 2,048 elements. nvcc's backend has no kernel for it: noise and factors of 2^22 elements at a time, in
    float32 and float64.
    """
    if device != "cuda" or not way.group.startswith("project"):
        return SMALL
    if DISPATCH["CUDA"] is cuda:
        return SMALL + min(elements, 2**22) * (4 + 3 * 8)
    return SMALL + min(8 * RECORDS * -(-elements // 2048), 64 * 2**20)


# The kernel's high-water mark of the resident set is reset just before the call (Linux: clear_refs), so that the peak
# of importing torch does not hide the call's.
CHILD = """
import sys, torch
from pathlib import Path
from benchmarks.contenders import CONTENDERS

index, elements, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
way = CONTENDERS[index]
x = torch.randn(elements, device=device) * 0.02
way.move(torch.randn(1 << 20, device=device))  # loads code, starts threads and fills caches

def resident(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1]) * 1024

if device == "cuda":
    torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way.move(x); torch.cuda.synchronize()
    print(torch.cuda.max_memory_allocated() - before)
else:
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    way.move(x)
    print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", CONTENDERS, ids=lambda w: f"{w.group}: {w.name}")
def test_memory(benchmark, way, device, elements):
    elements = min(elements, 16 * 2**20)

    def measure():
        command = [sys.executable, "-c", CHILD, str(CONTENDERS.index(way)), str(elements), device]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    peak = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(
        device=device,
        group=f"memory {way.group}",
        name=way.name,
        peak_extra_bytes=peak,
        tensor_bytes=4 * elements,
    )
    if way.name.startswith("hosfl"):
        assert peak < bound(way, device, elements)
