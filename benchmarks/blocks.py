"""Is the work that is counted the work that is timed? Probes of one block each, beside plain forward passes.

    python -m benchmarks.blocks [--out FILE]

MiniLM's six layers, 8 texts of 32 tokens, adapters of rank 4 in the last three; 15 directions that move all of them,
and 15 in three blocks. Both are timed in turn with plain forward passes of the half, one thread, the least of several.
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


def least_seconds(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """CPU seconds of each, taken in turn: the minimum of REPEATS runs."""
    found = dict.fromkeys(works, float("inf"))
    for _ in range(REPEATS):
        for name, once in works.items():
            begin = time.process_time()
            once()
            found[name] = min(found[name], time.process_time() - begin)
    return found


def measure() -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = pretrained_model(packaged_minilm(), "SequenceClassification")
    half = select_trainable(split(model, 6).client, "xs:4:*.layer.[345].*", 0)
    inputs = {"input_ids": torch.randint(1000, 20_000, (SAMPLES, TOKENS))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    labels = torch.zeros(SAMPLES, dtype=torch.int64)
    parameters, _ = trainable(half)
    works: dict[str, Callable[[], Any]] = {}
    counted: dict[str, float] = {}
    with evaluating(half):
        multiplier = torch.randn_like(call(half, inputs))
        works["a forward pass"] = lambda: call(half, inputs)
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
            works[name] = probe
            counts = [block.directions for block, _ in run.parts()]
            counted[name] = 1 + work(counts, [begin.share for begin in begins])
        seconds = least_seconds(works)
    one = seconds.pop("a forward pass")
    rows = {name: {"counted": counted[name], "timed": s / one, "seconds": s} for name, s in seconds.items()}
    return {"machine": {**machine(), "threads": 1}, "seconds of a pass": one, "rounds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "blocks.json")
    options = parser.parse_args()
    found = measure()
    for name, row in found["rounds"].items():
        print(f"{name}: {row['counted']:.2f} passes counted, {row['timed']:.2f} timed")
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
