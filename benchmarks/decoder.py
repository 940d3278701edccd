"""A small pretrained decoder and data for it, without a download: it learns to name a function from its description.

    python -m benchmarks.decoder --out runs/decoder

Texts are first paragraphs of docstrings, with the words of the function's or class's name, of numpy, scipy, torch,
scikit-learn, matplotlib, transformers, pandas, sympy and networkx: the extras `studies` and `hf` install them. No
paragraph occurs twice. Results name the packages' versions, since other versions have other texts.

The tokenizer is byte-level BPE. The decoder is a Llama of six layers, pretrained from random weights to continue a name
with the description of the function: "fft freq: Return the sample frequencies." The task is the reverse: after the
description, "Return the sample frequencies. =>", come the words of the name, " fft freq". So the layers must attend to
the name's words at positions where they never were in pretraining, and no output layer can learn that for them.

Writes model/, a folder in transformers' format; data/, with {"prompt", "completion"} for the task `lm`; and about.json.
Nothing is written before pretraining has ended, after about 12 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.sentences import first_paragraphs

PACKAGES = ("numpy", "scipy", "torch", "sklearn", "matplotlib", "transformers", "pandas", "sympy", "networkx")
PARTS = {"train": 4000, "validation": 400, "test": 400, "held out": 400}  # functions; the last measure pretraining
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
LONGEST = 256  # tokens that the decoder can read
END = "<end>"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder and of its pretraining.

    vocabulary: the number of tokens. length: tokens of a row. batch: rows of a step. rate: the largest one.
    """

    vocabulary: int = 2000
    width: int = 128
    layers: int = 6
    heads: int = 4
    length: int = 64
    batch: int = 32
    steps: int = 2000
    rate: float = 3e-3


class Function(NamedTuple):
    """A function. name: its words in lower case, with blanks between. text: its description."""

    name: str
    text: str


# --- texts --------------------------------------------------------------------------------------------------------


def functions_of(file: Path) -> Iterator[Function]:
    """Yield the functions and classes of a file whose first paragraph has 4 to 18 words, and whose name has 1 to 5."""
    for name, paragraph in first_paragraphs(file):
        text, words = " ".join(paragraph.split()), WORDS.findall(name)
        fits = 4 <= len(text.split()) <= 18 and 1 <= len(words) <= 5
        if fits and text.isascii() and not name.startswith("__"):
            yield Function(" ".join(words).lower(), text)


def functions(packages: Sequence[str] = PACKAGES) -> list[Function]:
    """Return the functions of packages, shuffled, always in the same order. No two texts have the same words."""
    by_words: dict[str, Function] = {}
    for package in packages:
        spec = find_spec(package)
        assert spec
        root = Path(spec.origin or "").parent
        for file in sorted(root.rglob("*.py")):
            if "test" not in str(file.relative_to(root)):
                for function in functions_of(file):
                    by_words.setdefault(" ".join(re.findall(r"\w+", function.text.lower())), function)
    order = list(by_words.values())
    random.Random(0).shuffle(order)
    return order


def divide(functions: Sequence[Function], sizes: dict[str, int]) -> dict[str, list[Function]]:
    """Divide functions into parts of these sizes, and "pretraining", the rest. Raises ValueError if that is empty."""
    begin, parts = 0, {}
    if len(functions) <= sum(sizes.values()):
        raise ValueError(f"{len(functions)} functions are too few for the parts {sizes}: name more packages")
    for part, size in sizes.items():
        parts[part], begin = list(functions[begin : begin + size]), begin + size
    return {**parts, "pretraining": list(functions[begin:])}


def pretraining_text(function: Function) -> str:
    """Return the text of a function for pretraining."""
    return f" {function.name}: {function.text}"


def sample(function: Function) -> dict[str, str]:
    """Return the sample of a function for the task `lm`."""
    return {"prompt": f"{function.text} =>", "completion": f" {function.name}"}


# --- model --------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer. One token both ends texts and is padding."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def pack_rows(texts: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Concatenate texts, END before each, and cut them into complete rows: int64 [rows, length + 1]."""
    ids = [token for text in tokenizer(list(texts))["input_ids"] for token in (tokenizer.eos_token_id, *text)]
    rows = len(ids) // (length + 1)
    return torch.tensor(ids[: rows * (length + 1)]).view(rows, length + 1)


def loss_of(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: Any, rows: Tensor, batch: int) -> float:
    model.eval()
    total = sum(float(loss_of(model, part)) * len(part) for part in rows.split(batch))
    return math.exp(total / len(rows))


def pretrain(rows: Tensor, tokenizer: Any, sizes: Sizes) -> Any:
    """Train a Llama to predict next tokens, by AdamW; the rate rises over a twentieth of the steps and falls to 0."""
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), sizes.rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, sizes.steps // 20, sizes.steps)
    order: list[int] = []
    begun = time.perf_counter()
    for step in range(1, sizes.steps + 1):
        if len(order) < sizes.batch:
            order = torch.randperm(len(rows)).tolist()
        chosen, order = order[: sizes.batch], order[sizes.batch :]
        optimizer.zero_grad()
        loss = loss_of(model, rows[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == sizes.steps:
            print(f"step {step} of {sizes.steps}: loss {loss:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    return model


def make(out: Path, packages: Sequence[str] = PACKAGES, parts: dict[str, int] = PARTS, sizes: Sizes = Sizes()) -> None:
    """Write model/, data/ and about.json into a folder."""
    divided = divide(functions(packages), parts)
    texts = {name: [pretraining_text(function) for function in part] for name, part in divided.items()}
    tokenizer = train_tokenizer(texts["pretraining"], sizes.vocabulary)
    rows = {name: pack_rows(texts[name], tokenizer, sizes.length) for name in ("pretraining", "held out")}
    print({name: len(part) for name, part in divided.items()}, f"{rows['pretraining'].numel()} tokens", flush=True)
    begun = time.perf_counter()
    model = pretrain(rows["pretraining"], tokenizer, sizes)
    seconds = time.perf_counter() - begun
    about = {
        "packages": {package: import_module(package).__version__ for package in (*packages, "tokenizers")},
        "texts": {name: len(part) for name, part in divided.items()},
        "pretraining tokens": rows["pretraining"].numel(),
        "weights": sum(p.numel() for p in model.parameters()),
        "sizes": asdict(sizes),
        "held-out perplexity": perplexity(model, rows["held out"], sizes.batch),
        "pretraining seconds": seconds,
    }
    (out / "data").mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation", "test"):
        lines = [json.dumps(sample(function)) + "\n" for function in divided[part]]
        (out / "data" / f"{part}.jsonl").write_text("".join(lines))
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=2))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/decoder"), help="the folder to write into")
    make(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
