"""What the GPU kernels compile to, without a GPU: every variant for sm_80 and sm_90, read from PTX and SASS.

How instructions are counted. The disassembly becomes a graph of instructions; functions that are called (the slow path
of the square root, for subnormal and infinite arguments) are not followed. noise_ and perturb_: the longest path from
entry to exit through 16-byte accesses, that is through the branch for whole tiles, an instruction in the loop over row
blocks counted once per iteration; divided by the elements that a thread has in a tile. replay_ and project: the longest
path through one iteration of the loop over records, divided by the elements that a thread holds. update_: the same for
its inner loop, over the directions, and for what an iteration of its outer loop, over the rounds, adds to that. All are
upper bounds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

from hosfl_kernels.gpu.launch import TRITON
from hosfl_kernels.gpu.offline import variants

CAPABILITIES = {90: [], 80: [pytest.mark.slow]}  # `make test` compiles for the newer ones alone
NAMES = sorted(variants())
ALL = [
    pytest.param((capability, name), id=f"sm_{capability}-{name}", marks=marks)
    for capability, marks in CAPABILITIES.items()
    for name in sorted(variants(capability))
]
# What choices.json names has a budget of its own: it was faster on a GPU.
DEFAULTS = [case for case in ALL if "@" not in case.id and "rows" not in case.id]
UPDATE = [case for case in DEFAULTS if "update" in case.id]
ONE_LOOP = [case for case in DEFAULTS if "update" not in case.id]
WIDE = [case for case in ALL if not re.search("replay|update|project|rows", case.id)]

# Instructions per element (replay, project: per element and record), at most: what Triton 3.6 and 3.9 make, and 3 %;
# project: what Triton 3.9 makes, and 4 %.
BUDGET = {
    "noise-rademacher-float32": 7.9,
    "noise-gaussian-float32": 50.0,
    "perturb-rademacher-float32": 8.8,
    "perturb-rademacher-bfloat16": 16.0,
    "perturb-rademacher-bfloat16-stochastic": 19.4,
    "perturb-rademacher-float16": 8.8,
    "perturb-gaussian-float32": 52.2,
    "perturb-gaussian-bfloat16": 59.0,
    "perturb-gaussian-bfloat16-stochastic": 69.4,
    "perturb-gaussian-float16": 51.6,
    "replay-rademacher-float32": 4.7,
    "replay-rademacher-bfloat16": 13.0,
    "replay-rademacher-bfloat16-stochastic": 16.1,
    "replay-rademacher-float16": 7.1,
    "replay-gaussian-float32": 50.2,
    "replay-gaussian-bfloat16": 58.6,
    "replay-gaussian-bfloat16-stochastic": 66.1,
    "replay-gaussian-float16": 52.3,
    "project-rademacher-float32": 5.0,
    "project-rademacher-bfloat16": 5.0,
    "project-rademacher-float16": 5.0,
    "project-gaussian-float32": 51.5,
    "project-gaussian-bfloat16": 51.5,
    "project-gaussian-float16": 51.5,
}

# With seed and scale read from the device.
BUDGET |= {k.replace("perturb", "perturb-on-device"): v for k, v in BUDGET.items() if k.startswith("perturb")}

# update_: per element and direction by distribution and rule, and per element and round by rule and storage, at most:
# what Triton 3.9 makes, and 5 %.
DIRECTION = {
    ("rademacher", "sgd"): 6.2,
    ("rademacher", "momentum"): 6.2,
    ("rademacher", "adamw"): 10.6,
    ("gaussian", "sgd"): 51.0,
    ("gaussian", "momentum"): 51.0,
    ("gaussian", "adamw"): 51.0,
}
ROUND = {
    "sgd": {"float32": 6.2, "float16": 8.3, "bfloat16": 14.5, "bfloat16-stochastic": 21.4},
    "momentum": {"float32": 7.8, "float16": 9.9, "bfloat16": 16.2, "bfloat16-stochastic": 23.2},
    "adamw": {"float32": 50.8, "float16": 53.1, "bfloat16": 59.3, "bfloat16-stochastic": 66.6},
}


class Differs(NamedTuple):
    """How many times BUDGET, and of ROUND what is AdamW's, are spent; bytes of an AdamW kernel's stack, at most; and
    what a square root and a quotient become."""

    noise: float = 1.0
    adamw: float = 1.0
    stack: int = 0
    root: str = "sqrt.rn.f32"
    quotient: str = "div.rn.f32"


# From this Triton on, up to the next that is named; newer ones are as the last.
VERSIONS = {
    # The square root flushes subnormal arguments, and there are none: normal numbers take that of 0 or more than 2^-24,
    # AdamW see update.py. Its division is in float64 because the other one flushes.
    (3, 4): Differs(adamw=1.22, stack=16, root="sqrt.rn.ftz.f32", quotient="div.rn.f64"),
    (3, 6): Differs(),
    # Most products of Philox's rounds are two instructions, IMAD.HI and IMAD, in place of one, IMAD.WIDE.
    (3, 7): Differs(noise=1.12),
    (3, 8): Differs(),
}
HERE = VERSIONS[max(version for version in VERSIONS if version <= TRITON)]


class Instruction(NamedTuple):
    address: int
    predicate: str | None
    opcode: str
    operands: str


class Code(NamedTuple):
    capability: int
    name: str
    ptx: str
    usage: dict[str, int]
    instructions: list[Instruction]


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A directory with every variant for a capability; made by a process of its own: this one may have the interpreter
    on."""

    @functools.cache
    def of(capability: int) -> Path:
        directory = tmp_path_factory.mktemp("compiled")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        environment["TRITON_CACHE_DIR"] = str(directory / "cache")
        command = [sys.executable, "-m", "hosfl_kernels.gpu.offline", str(directory), str(capability)]
        subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True)
        return directory / f"sm_{capability}"

    return of


@pytest.fixture
def code(compiled: Callable[[int], Path], request: pytest.FixtureRequest) -> Code:
    capability, name = request.param
    return disassemble(capability, name, compiled(capability) / f"{name}.cubin")


@functools.cache
def disassemble(capability: int, name: str, cubin: Path) -> Code:
    usage = dict(re.findall(r"(\w+):(\d+)", tool("cuobjdump", "-res-usage", str(cubin))))
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
    found = [line.search(row) for row in tool("cuobjdump", "-sass", str(cubin)).splitlines()]
    instructions = [Instruction(int(m[1], 16), m[2], m[3], m[4]) for m in found if m]
    ptx = cubin.with_name(f"{name}.ptx").read_text()
    return Code(capability, name, ptx, {k: int(v) for k, v in usage.items()}, instructions)


# --- the graph ------------------------------------------------------------------------------------------------


def successors(instructions: list[Instruction]) -> list[list[int]]:
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    body_ends = max(i for i, instruction in enumerate(instructions) if instruction.opcode == "EXIT")
    edges = []
    for i, (_, predicate, opcode, operands) in enumerate(instructions):
        following = [i + 1] if i + 1 < len(instructions) else []
        kind = opcode.partition(".")[0]
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        # The assembler also leaves loops by calls that never return. Functions come after the kernel's body.
        if kind == "BRA" or (kind == "CALL" and target and index[int(target[1], 16)] <= body_ends):
            assert target, operands
            conditional = predicate is not None or re.match(r"\s*!?U?P\d", operands)
            edges.append([index[int(target[1], 16)], *(following if conditional else [])])
        elif kind in ("EXIT", "RET"):
            edges.append(following if predicate else [])
        else:
            assert kind not in ("BRX", "JMP", "JMX", "BREAK"), f"{opcode}: teach this graph about it"
            edges.append(following)
    return edges


def depth_first(edges: list[list[int]]) -> tuple[list[int], set[tuple[int, int]]]:
    """The nodes reached from the entry, each after all it leads to; and the edges that close loops."""
    order, back, state = [], set(), {0: "open"}
    stack = [(0, iter(edges[0]))]
    while stack:
        node, targets = stack[-1]
        for target in targets:
            if state.get(target) == "open":
                back.add((node, target))
            elif target not in state:
                state[target] = "open"
                stack.append((target, iter(edges[target])))
                break
        else:
            state[node] = "done"
            order.append(node)
            stack.pop()
    return order, back


def loop_nodes(edges: list[list[int]], latch: int, header: int) -> set[int]:
    sources: dict[int, list[int]] = {}
    for node, targets in enumerate(edges):
        for target in targets:
            sources.setdefault(target, []).append(node)
    nodes, todo = {header}, [latch]
    while todo:
        if (node := todo.pop()) not in nodes:
            nodes.add(node)
            todo += sources.get(node, [])
    return nodes


def longest_path(
    order: list[int], edges: list[list[int]], back: set[tuple[int, int]], weight: dict[int, int], through: set[int]
) -> int:
    """Weight of the heaviest path from the entry to an exit through a node of `through`, loops taken once."""
    nowhere = -(10**9)
    best: dict[int, tuple[int, int]] = {}  # from a node to an exit: any path, and one through `through`
    for node in order:
        onward = [best[target] for target in edges[node] if (node, target) not in back]
        free = max((path[0] for path in onward), default=0)
        bound = max((path[1] for path in onward), default=nowhere)
        best[node] = weight.get(node, 1) + free, weight.get(node, 1) + (free if node in through else bound)
    return best[0][1]


def loops(instructions: list[Instruction]) -> tuple[list[int], list[list[int]], set[tuple[int, int]], list[set[int]]]:
    edges = successors(instructions)
    order, back = depth_first(edges)
    bodies: dict[int, set[int]] = {}
    for latch, header in back:  # a loop may be closed in two places
        bodies[header] = bodies.get(header, set()) | loop_nodes(edges, latch, header)
    return order, edges, back, list(bodies.values())


def wide(instructions: list[Instruction], opcode: str) -> set[int]:
    return {i for i, instruction in enumerate(instructions) if instruction.opcode.startswith(f"{opcode}.E.128")}


def per_element_of_whole_tiles(name: str, instructions: list[Instruction]) -> float:
    constants = variants()[name].constants
    order, edges, back, bodies = loops(instructions)
    stores = wide(instructions, "STG")
    rows = constants["BLOCKS"] * constants["INNER"]
    iterations, rest = divmod(rows, len(stores))
    assert rest == 0, "a thread has one 16-byte access per row"
    body = [nodes for nodes in bodies if stores <= nodes]
    assert len(body) == (iterations > 1), "one loop over the row blocks, unless it is unrolled"
    weight = dict.fromkeys(body[0], iterations) if body else {}
    path = longest_path(order, edges, back, weight, stores)
    return path * variants()[name].num_warps * 32 / (rows * constants["WIDTH"])


def per_element_and_record(name: str, instructions: list[Instruction]) -> float:
    constants = variants()[name].constants
    order, edges, back, bodies = loops(instructions)
    assert len(bodies) == 1, "one loop, over the records"
    weight = {node: int(node in bodies[0]) for node in order}
    path = longest_path(order, edges, back, weight, bodies[0])
    held = constants["BLOCKS"] * constants["INNER"] * constants["WIDTH"] / (variants()[name].num_warps * 32)
    return path / held


def per_element_and_direction(name: str, instructions: list[Instruction]) -> tuple[float, float]:
    """update_: per element and direction, and what a round costs an element besides."""
    constants = variants()[name].constants
    order, edges, back, bodies = loops(instructions)
    inner, outer = sorted(bodies, key=len)
    assert inner < outer, "the loop over directions, in the loop over rounds"
    held = constants["BLOCKS"] * constants["INNER"] * constants["WIDTH"] / (variants()[name].num_warps * 32)
    direction, both = (
        longest_path(order, edges, back, {node: int(node in body) for node in order}, inner) for body in (inner, outer)
    )
    return direction / held, (both - direction) / held


# --- the properties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ALL, indirect=True)
def test_nothing_spills_and_no_value_crosses_threads(code: Code) -> None:
    stack = HERE.stack if "adamw" in code.name else 0
    assert code.usage["STACK"] <= stack
    assert code.usage["LOCAL"] == 0
    opcodes = {instruction.opcode.partition(".")[0] for instruction in code.instructions}
    assert stack or not opcodes & {"LDL", "STL"}
    if not code.name.startswith("project"):  # it adds the columns of a tile
        assert code.usage["SHARED"] == 0
        assert not opcodes & {"LDS", "STS", "SHFL", "BAR"}


@pytest.mark.parametrize("code", ALL, indirect=True)
def test_every_float_operation_is_one_rounding_to_nearest(code: Code) -> None:
    arithmetic = r"\b(?:add|sub|mul|fma|mad|div|sqrt|rsqrt|rcp|ex2|lg2|sin|cos|tanh)\.\S*f(?:16|32|64)\S*"
    operations = set(re.findall(arithmetic, code.ptx))
    assert operations or code.name.startswith("noise-rademacher")
    allowed = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", HERE.root}
    if "adamw" in code.name:
        allowed |= {HERE.quotient}
    if code.name.startswith("project"):  # the factor, times a tile's sum
        allowed |= {"mul.rn.f64"}
    assert operations <= allowed
    assert not re.search(r"\.ftz|\.approx", code.ptx.replace(HERE.root, ""))


@pytest.mark.parametrize("code", WIDE, indirect=True)
def test_whole_tiles_move_16_bytes_at_a_time(code: Code) -> None:
    constants = variants(code.capability)[code.name].constants
    reads = not code.name.startswith("noise")
    loads, stores = wide(code.instructions, "LDG"), wide(code.instructions, "STG")
    assert len(stores) in (constants["INNER"], constants["INNER"] * constants["BLOCKS"])
    assert len(loads) == len(stores) * reads
    assert bool(re.search(r"ld\.global\.v4\.b32", code.ptx)) == reads
    assert re.search(r"st\.global\.v4\.b32", code.ptx)


@pytest.mark.parametrize("code", ONE_LOOP, indirect=True)
def test_instructions_per_element(code: Code) -> None:
    one_by_one = code.name.startswith(("replay", "project"))
    count = per_element_and_record if one_by_one else per_element_of_whole_tiles
    spent = count(code.name, code.instructions)
    assert spent <= BUDGET[code.name] * HERE.noise


@pytest.mark.parametrize("code", UPDATE, indirect=True)
def test_instructions_per_direction_and_round(code: Code) -> None:
    _, rule, dist, storage = code.name.split("-", 3)
    direction, per_round = per_element_and_direction(code.name, code.instructions)
    assert direction <= DIRECTION[dist, rule]
    assert per_round <= ROUND[rule][storage] * (HERE.adamw if rule == "adamw" else 1.0)


CANDIDATES = """
import sys
from pathlib import Path
from benchmarks.sweep import candidates
from hosfl_kernels.gpu.choices import kernels
from hosfl_kernels.gpu.offline import compile_variant

for name, (kernel, kind) in kernels().items():
    for shape in candidates(kernel, kind):
        made = compile_variant(kernel.variant(kind, shape), 90)
        path = Path(sys.argv[1], f"{name}@{'x'.join(map(str, shape))}.cubin")
        path.write_bytes(made.asm["cubin"])
        path.with_suffix(".ptx").write_text(made.asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_value_crosses_threads_in_any_candidate_of_the_sweep(tmp_path: Path) -> None:
    """Those that spill are compiled too: the sweep leaves them out when the driver has counted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", CANDIDATES, str(tmp_path)]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True)
    cubins = list(tmp_path.glob("*.cubin"))
    assert {cubin.stem.partition("@")[0] for cubin in cubins} == {*NAMES}
    for cubin in cubins:
        found = disassemble(90, cubin.stem, cubin)
        opcodes = {instruction.opcode.partition(".")[0] for instruction in found.instructions}
        if not found.name.startswith("project"):
            assert found.usage["SHARED"] == 0
            assert not opcodes & {"LDS", "STS", "SHFL", "BAR"}
        if found.name.startswith(("noise", "perturb")):
            assert wide(found.instructions, "STG")


LAUNCHER = """
import hashlib, json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_device_interface(self): return torch.cuda
    def map_python_to_cpp_type(self, kind): return kind
    class utils:  # what it says of a loaded kernel: registers, words of a thread in memory, threads
        load_binary = staticmethod(lambda *arguments: (1, 1, 40, 7, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 2**17})
    launcher_cls = staticmethod(lambda *arguments: None)

driver.set_active(Driver())
from hosfl_kernels.gpu.offline import variants

t, i = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
most, least = 2**64 - 5, 2**63 + 1
arguments = {  # of a launch: odd numbers and round ones, small and large, none of which may make another kernel
    "noise": (2**40 + 8, 16, 2**63 - 50, 2**32 - 1, most),
    "perturb": (t, i, t[1:], most, -5, least),
    "replay": (t[1:], i, t, 64),
    "update": (t, i[1:], t, 3, 1, 2**30, -1, 16, 0, 7),
    "project": (t, i, t[1:], 64, 2**45),
    "rows": (t[1:], 2**40 + 8, 384, 2, 2**32 - 1, -5, most),
}
found = {}
for name, variant in variants(90).items():
    if not name.endswith(sys.argv[1]):
        continue
    made = variant.compile(*arguments[name.split("-")[0]])
    made = made.result() if hasattr(made, "result") else made
    found[name] = hashlib.sha256(made.asm["cubin"]).hexdigest()
    assert variant.spills(*arguments[name.split("-")[0]]) == 7
json.dump(found, sys.stdout)
"""


@pytest.mark.parametrize("ending", ["-float32", pytest.param("", marks=pytest.mark.slow)])
def test_a_launch_makes_these_very_kernels(ending: str, compiled: Callable[[int], Path]) -> None:
    """The launcher's own path up to the launch, with a driver that only names a GPU, and says what a kernel spills."""
    folder = compiled(90)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(folder.parent / "cache")
    command = [sys.executable, "-c", LAUNCHER, ending]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    launched = json.loads(done.stdout)
    names = [name for name in variants(90) if name.endswith(ending)]
    offline = {name: hashlib.sha256((folder / f"{name}.cubin").read_bytes()).hexdigest() for name in names}
    assert {name.partition("-")[0] for name in names} == {name.partition("-")[0] for name in variants(90)}
    assert launched == offline


def test_every_variant_has_a_budget_and_signs_stay_below_20() -> None:
    updates = [f"update-{rule}-{dist}-{storage}" for dist, rule in DIRECTION for storage in ROUND[rule]]
    assert sorted([*BUDGET, *updates]) == [name for name in NAMES if not name.startswith("rows")]  # which are few
    assert all(limit <= 20 for name, limit in BUDGET.items() if "rademacher" in name)
