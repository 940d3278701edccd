"""`hosfl memory`: the peak memory of a client's round, measured in a process of its own, and that of inference.

A round is a forward pass whose output is encoded, a multiplier that is decoded, and the answer to it. The growth of the
process is measured after half and batch are loaded: on Linux by the kernel's high-water mark of the resident set, on
CUDA by the allocator's peak, elsewhere by the peak of the process so far.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.blocks import blocks_of
from hosfl.halves.hub import random_trunk
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.narrow import FROZEN, narrow_weights, recompute_wide_weights
from hosfl.halves.split import cast_floats, dtype_of, split
from hosfl.halves.trains import select_trainable
from hosfl.methods.first_order import FirstOrderClient
from hosfl.methods.ho import ZerothOrderClient, make_run
from hosfl.methods.tensors import decoded
from hosfl.probing.probe import trainable
from hosfl.protocol.messages import Message, Multiplier, encode
from hosfl.runs.config import Config, with_shared
from hosfl.runs.report import machine, peak_memory
from hosfl.tasks.data import Dataset
from hosfl.tasks.digits import digits_model

BOUND = 1.10  # upper bound of the memory of HO-SFL's client in place, as a multiple of inference plus three cut tensors
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12}
RESNET18 = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "embedding_size": 64}

# glibc keeps freed memory, and how much depends on all that was freed before. With this setting it returns blocks of
# 64 KiB and more at once, so that the resident set is the memory in use.
MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536"}


# The ways to use a half that are measured, with the client's settings. Those without a method are a forward pass, and a
# forward and a backward pass, which every answer by backpropagation needs.
INFERENCE, BACKPROPAGATION = "inference", "backpropagation alone"
WAYS: dict[str, dict[str, Any]] = {
    INFERENCE: {},
    "ho, in place": {"method": "ho"},
    "ho, in place, two-sided": {"method": "ho", "estimator": "two-sided"},
    "ho, weights read only": {"method": "ho", "dist": "gaussian"},
    "ho, forward mode": {"method": "ho", "estimator": "forward"},
    "ho, one backward pass": {"method": "ho", "estimator": "backward"},
    "ho, one backward pass, 2 samples at a time": {"method": "ho", "estimator": "backward", "microbatch": 2},
    BACKPROPAGATION: {},
    "first-order": {"method": "first-order"},
    "first-order, 2 samples at a time": {"method": "first-order", "microbatch": 2},
    f"{INFERENCE}, bfloat16": {"dtype": "bfloat16"},
    "ho, weights read only, bfloat16": {"method": "ho", "dtype": "bfloat16"},
    "ho, forward mode, bfloat16": {"method": "ho", "dtype": "bfloat16", "estimator": "forward"},
}
BLOCKS_WAY = "ho, in place, 3 blocks of adapters, the rest float32"
# The ways that must keep the bound, with the number of further cut tensors that they may need: the inputs of a block
# and of the next one.
BOUNDED = dict.fromkeys(("ho, in place", "ho, in place, two-sided", "ho, one backward pass, 2 samples at a time"), 0)
BOUNDED[BLOCKS_WAY] = 2

# Further ways for a language model: with few trainable weights, and the frozen ones stored in every width.
FEW_WEIGHTS_WAYS: dict[str, dict[str, Any]] = {
    f"{way}, {trains}, the rest {frozen}": {**WAYS[way], "trains": trains, "frozen": frozen}
    for way, trains, widths in (
        ("ho, in place", "norms", FROZEN[:4]),
        ("ho, in place", "lora", FROZEN[:4]),
        ("ho, forward mode", "norms", ("float32", "int4")),
        ("ho, one backward pass, 2 samples at a time", "norms", ("float32", "int4")),
        ("ho, one backward pass, 2 samples at a time", "lora", ("float32", "int4")),
        ("first-order", "norms", ("float32", "int4")),
    )
    for frozen in widths
}
FEW_WEIGHTS_WAYS[BLOCKS_WAY] = {"method": "ho", "trains": "xs:4", "blocks": 3, "directions": 6}
ONE_PASS = {"directions": 5, "probes_at_once": 5}
FEW_WEIGHTS_WAYS["ho, 5 probes in a pass, norms, the rest float32"] = {"method": "ho", "trains": "norms", **ONE_PASS}


@dataclass(frozen=True)
class Half:
    """A client half to measure.

    description: of the half and its inputs. batch: the measured batch size. make: a batch size -> (the half with random
    weights, inputs). ways: see `WAYS`.
    """

    description: str
    batch: int
    make: Callable[[int], tuple[nn.Module, Tensor | dict[str, Tensor]]]
    ways: dict[str, dict[str, Any]] = field(default_factory=lambda: WAYS)


def _digits(batch: int) -> tuple[nn.Module, Tensor]:
    return digits_model(0).client, torch.randn(batch, 1, 8, 8)


def _minilm(batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    model = random_trunk("bert", **MINILM, vocab_size=30522)
    tokens = torch.randint(0, 30522, (batch, 64))
    return split(model, at=3).client, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _resnet18(batch: int) -> tuple[nn.Module, Tensor]:
    return split(random_trunk("resnet", **RESNET18), at=2).client, torch.randn(batch, 3, 224, 224)


HALVES = {
    "digits": Half("the digits task's half, pictures of 8 x 8", 128, _digits),
    "minilm": Half("BERT of MiniLM's size, 3 of 6 layers, 64 tokens", 16, _minilm, {**WAYS, **FEW_WEIGHTS_WAYS}),
    "resnet18": Half("ResNet-18, 2 of 4 stages, pictures of 224 x 224", 16, _resnet18),
}


def reference_way(way: str) -> str:
    """Return the way with which another is compared: inference in the same dtype."""
    return f"{INFERENCE}, bfloat16" if {**WAYS, **FEW_WEIGHTS_WAYS}[way].get("dtype") == "bfloat16" else INFERENCE


def peak_growth(work: Callable[[], object], device: torch.device) -> int:
    """Call `work`, and return the most bytes by which this process grew meanwhile."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        before = peak_memory()["resident"]
        work()
        return peak_memory()["resident"] - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)  # freed memory that is still resident would hide new allocations
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure_here(name: str, way: str, batch: int, device: torch.device) -> dict[str, int]:
    """Measure one way in this process. Returns bytes: peak_extra, its growth; cut, the cut tensor; weights, as stored.

    A round with a batch of one comes first, to load code and start threads. A round has two directions, unless the way
    sets their number: more directions need no more memory, unless they share a pass.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = HALVES[name].ways[way]
    config = Config(**with_shared(settings, {"directions": 2, "directions_from": "fresh", "device": str(device)}))
    half, inputs = HALVES[name].make(batch)
    half = cast_floats(select_trainable(half, config.trains, config.seed).eval(), getattr(torch, config.dtype))
    half = narrow_weights(half, config.frozen).to(device)
    whole = Dataset(inputs, torch.zeros(batch, dtype=torch.int64)).to(device, dtype_of(half))
    batches = [(part.inputs, part.labels) for part in (whole[:1], whole)]  # by round
    parameters, _ = trainable(half)

    def infer(round: int) -> Tensor:
        with evaluating(half):
            cut: Tensor = call(half, batches[round][0])
        return cut

    def backpropagate(round: int) -> Sequence[Tensor]:
        with evaluating(half), torch.enable_grad(), recompute_wide_weights():
            cut = call(half, batches[round][0])
            return torch.autograd.grad(cut, parameters, torch.ones_like(cut))

    def take_part(round: int) -> Message:
        encode(client.output(round))
        multiplier = decoded((Path(folder) / str(round)).read_bytes())
        assert isinstance(multiplier, Multiplier)
        return client.answer(multiplier)

    work: Callable[[int], object] = backpropagate if way == BACKPROPAGATION else infer
    with tempfile.TemporaryDirectory() as folder:
        if "method" in settings:
            shared: Any = {"number": 0, "half": half, "batch": batches.__getitem__, "microbatch": config.microbatch}
            client: FirstOrderClient | ZerothOrderClient = FirstOrderClient(**shared)
            if config.method == "ho":
                begins = blocks_of(half, config.blocks, batches[0][0])
                shared |= {"run": make_run(config, parameters, begins), "base": lambda: parameters, "begins": begins}
                client = ZerothOrderClient(**shared, probes_at_once=config.probes_at_once)
            for round in (0, 1):
                message = Multiplier(client=0, round=round, multiplier=torch.randn_like(infer(round)))
                (Path(folder) / str(round)).write_bytes(encode(message))
            work = take_part
        cut = infer(0).nbytes * batch
        work(0)
        peak = peak_growth(lambda: work(1), device)
    weights = sum(t.nbytes for t in (*half.parameters(), *half.buffers()))
    return {"peak_extra": peak, "cut": cut, "weights": weights}


def measure(name: str, way: str, batch: int, device: str = "cpu") -> dict[str, int]:
    """Call `measure_here` in a process of its own. Raises ChildProcessError with its error output if it fails."""
    command = [sys.executable, "-m", "hosfl.runs.memory", name, way, str(batch), device]
    completed = subprocess.run(command, env={**os.environ, **MALLOC_SETTINGS}, capture_output=True, text=True)
    if completed.returncode:
        killed = f"the system killed its process (signal {-completed.returncode}), most likely for lack of memory"
        reason = killed if completed.returncode < 0 else completed.stderr.strip() or f"status {completed.returncode}"
        raise ChildProcessError(f"{name}, {way}: {reason}")
    row: dict[str, int] = json.loads(completed.stdout.splitlines()[-1])
    return row


def client_memory(
    names: Sequence[str], device: str = "cpu", progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure every way for each of these halves. Returns the content of benchmarks/results/client-memory.json.

    A row's of_bound is its peak / (the peak of inference in the same dtype + three cut tensors).
    """
    halves: dict[str, Any] = {}
    for name in names:
        half = HALVES[name]
        rows: dict[str, Any] = {}
        for way in half.ways:
            progress(f"{name}, {way}")
            row: dict[str, Any] = {**measure(name, way, half.batch, device)}
            rows[way] = row
            row["of_bound"] = row["peak_extra"] / (rows[reference_way(way)]["peak_extra"] + 3 * row["cut"])
        halves[name] = {"what": half.description, "batch": half.batch, "ways": rows}
    return {"machine": {**machine(), "threads": 1}, "device": device, "bound": BOUND, "halves": halves}


def over_bound(result: dict[str, Any]) -> Iterator[str]:
    """Yield a line for every way above the bound. The digits half is left out: for it a page of memory is a percent."""
    for name, half in result["halves"].items():
        for way, cuts in BOUNDED.items():
            row = half["ways"].get(way)
            if row is None or name == "digits":
                continue
            inference = half["ways"][reference_way(way)]["peak_extra"] + 3 * row["cut"]
            if row["peak_extra"] > result["bound"] * inference + cuts * row["cut"]:
                further = f", and {cuts} more" if cuts else ""
                yield f"{name}, {way}: {row['of_bound']:.2f} times inference plus three cut tensors{further}"


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], sys.argv[2], int(sys.argv[3]), torch.device(sys.argv[4]))))
