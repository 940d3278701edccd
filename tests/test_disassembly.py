"""The machine code of the CPU's kernels: a loop that the compiler made scalar goes red, in each instruction set."""

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

from hosfl_kernels import _cpp

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux" or shutil.which("objdump") is None,
    reason="reads x86-64 with objdump",
)

WIDEST = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
# Loops of so many variants: dtypes with their roundings, times distributions, times rules. `replay_segment` is that of
# normal numbers; signs are added by one to four records at a time in float32, and by one otherwise.
LOOPS = {"replay_signs": 4 + 3, "replay_segment": 4, "update_segment": 4 * 2 * 3, "project_block": 3 * 2}

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\t(\S+)\s*(.*)$")
SCALAR = re.compile(r"v?(add|sub|mul|div|sqrt)ss|v?cvt\w+2ss")
PACKED = re.compile(r"v?(add|sub|mul|div|sqrt)ps")


def arithmetic(disassembly):
    """Of each function: how many instructions of float32 arithmetic work on one number, on xmm, on ymm and on zmm."""
    found, counts = {}, None
    for line in disassembly.splitlines():
        if header := FUNCTION.match(line):
            name = header[1].replace("(anonymous namespace)::", "").partition(" [clone")[0]
            counts = found.setdefault(name, Counter())
        elif counts is not None and (instruction := INSTRUCTION.match(line)):
            name, operands = instruction.groups()
            if SCALAR.fullmatch(name):
                counts["scalar"] += 1
            elif PACKED.fullmatch(name):
                counts[next(width for width in ("zmm", "ymm", "xmm") if width in operands)] += 1
    return found


@pytest.fixture(scope="module")
def code():
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _cpp.__file__]
    found = arithmetic(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if not any("normal_columns" in name for name in found):
        pytest.skip("the extension was stripped of its names")
    return found


@pytest.mark.parametrize("isa", WIDEST)
def test_normal_numbers_are_made_in_whole_vectors(code, isa):
    found = [counts for name, counts in code.items() if f"hosfl::{isa}::normal_columns<" in name]
    assert found
    for counts in found:
        assert set(counts) == {WIDEST[isa]}
        assert 300 < counts[WIDEST[isa]] < 420  # 4 vectors: two logarithms, sines and cosines each, unrolled once


@pytest.mark.parametrize("isa", WIDEST)
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_work_on_whole_vectors(code, isa, loop):
    found = {name: counts for name, counts in code.items() if f"hosfl::{isa}::{loop}<" in name and counts}
    assert len(found) == LOOPS[loop]
    for name, counts in found.items():
        assert counts[WIDEST[isa]] > 0, name
        # Scalars: a segment's factor, and of `replay_` what a row has beyond whole vectors. Elsewhere rows are tiles.
        if not loop.startswith("replay"):
            assert counts["scalar"] < counts[WIDEST[isa]], name
        elif loop == "replay_signs":  # a sum for each record
            assert counts[WIDEST[isa]] >= int(re.search(r", (\d)>\(", name)[1]), name
        else:  # a product and a sum
            assert counts[WIDEST[isa]] >= 2, name


def test_a_scalar_loop_is_seen():
    text = "\n".join(
        [
            "0000000000001000 <void hosfl::avx2::(anonymous namespace)::project_block<hosfl::Float16>()>:",
            "    1000:\tvcvtsi2ss %eax,%xmm0,%xmm0",
            "    1004:\tvaddss %xmm1,%xmm0,%xmm0",
            "    1008:\tvmulps %ymm1,%ymm0,%ymm0",
            "    100c:\tvmovaps %ymm0,(%rdi)",
        ]
    )
    assert arithmetic(text) == {"void hosfl::avx2::project_block<hosfl::Float16>()": {"scalar": 2, "ymm": 1}}
