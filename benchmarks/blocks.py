"""Does the counted work of probes in blocks agree with the measured time?

    python -m benchmarks.blocks [--out FILE]

MiniLM's six layers, 8 texts of 32 tokens, adapters of rank 4 in the last three; 15 directions that move all of them,
and 15 in three blocks. Both are timed in turn with plain forward passes of the half, with one thread; the minimum of
several times counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hosfl.halves.blocks import BlockEntry, blocks_of, work
from hosfl.halves.hub import packaged_minilm, pretrained_model
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.split import split
from hosfl.halves.trains import select_trainable
from hosfl.methods.ho import ZerothOrderClient, make_run
from hosfl.probing.probe import trainable
from hosfl.protocol.messages import Multiplier
from hosfl.runs.config import Config
from hosfl.runs.report import machine

RESULTS = Path(__file__).parent / "results"
SAMPLES, TOKENS, DIRECTIONS, REPEATS = 8, 32, 15, 7


def least_seconds(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the CPU seconds of each function: the minimum of REPEATS calls, in turns."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(REPEATS):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            least[name] = min(least[name], time.process_time() - begin)
    return least


def measure() -> dict[str, Any]:
    """Return the rows: counted and timed work of rounds with one block and with three."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = pretrained_model(packaged_minilm(), "SequenceClassification")
    half = select_trainable(split(model, 6).client, "xs:4:*.layer.[345].*", 0)
    inputs = {"input_ids": torch.randint(1000, 20_000, (SAMPLES, TOKENS))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    labels = torch.zeros(SAMPLES, dtype=torch.int64)
    parameters, _ = trainable(half)
    functions: dict[str, Callable[[], Any]] = {}
    counted: dict[str, float] = {}
    with evaluating(half):
        multiplier = torch.randn_like(call(half, inputs))
        functions["a forward pass"] = lambda: call(half, inputs)
        for count in (1, 3):
            config = Config(directions_from="fresh", rule="adamw", directions=DIRECTIONS, blocks=count)
            begins: list[BlockEntry] = blocks_of(half, count, inputs)
            run = make_run(config, parameters, begins)
            client = ZerothOrderClient(0, half, lambda round: (inputs, labels), run=run, begins=begins)
            client.output(0)

            def probe(client: ZerothOrderClient = client) -> None:
                client.output(0)
                client.answer(Multiplier(client=0, round=0, multiplier=multiplier))

            name = f"a round of {DIRECTIONS} directions" + (f" in {count} blocks" if count > 1 else "")
            functions[name] = probe
            counts = [block.directions for block, _ in run.parts()]
            counted[name] = 1 + work(counts, [begin.share for begin in begins])
        seconds = least_seconds(functions)
    one_pass = seconds.pop("a forward pass")
    rows = {name: {"counted": counted[name], "timed": s / one_pass, "seconds": s} for name, s in seconds.items()}
    return {"machine": {**machine(), "threads": 1}, "seconds of a pass": one_pass, "rounds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "blocks.json")
    options = parser.parse_args()
    result = measure()
    for name, row in result["rounds"].items():
        print(f"{name}: {row['counted']:.2f} passes counted, {row['timed']:.2f} timed")
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
