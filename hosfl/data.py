"""Data: real handwritten digits, and their split over clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hosfl.client import Batch
from hosfl.families import tokenized
from hosfl.seeds import Purpose, generator


@dataclass(frozen=True)
class Dataset:
    """Inputs [n, ...], or several by name, such as tokens and their mask; labels int64 [n]."""

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor | slice) -> Dataset:
        """Some of the samples."""
        return Dataset(self._each(lambda x: x[chosen]), self.labels[chosen])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dataset:
        """On a device, inputs of floating point as `dtype`."""
        return Dataset(
            self._each(lambda x: x.to(device, dtype if x.is_floating_point() else None)), self.labels.to(device)
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tensor | dict[str, Tensor]:
        if isinstance(self.inputs, Tensor):
            return change(self.inputs)
        return {name: change(value) for name, value in self.inputs.items()}


@dataclass(frozen=True)
class Splits:
    """Training data, validation data for choosing rates, test data for reporting and nothing else."""

    train: Dataset
    validation: Dataset
    test: Dataset


DIGITS_MEAN, DIGITS_DEVIATION = 0.305, 0.376  # of the training part's pixels, black 0 and white 1


def inverted(splits: Splits, noise: float = 0.2) -> Splits:
    """Digits with black and white exchanged and normal noise on every pixel, the same in every run."""
    random = torch.Generator().manual_seed(0)

    def change(data: Dataset) -> Dataset:
        assert isinstance(data.inputs, Tensor)
        pixels = data.inputs * DIGITS_DEVIATION + DIGITS_MEAN
        pixels = 1 - pixels + noise * torch.randn(pixels.shape, generator=random)
        return Dataset((pixels - (1 - DIGITS_MEAN)) / DIGITS_DEVIATION, data.labels)

    return Splits(change(splits.train), change(splits.validation), change(splits.test))


def digits() -> Splits:
    """The 1,797 handwritten digits that scikit-learn carries, float32 [n, 1, 8, 8]: 60 / 20 / 20 percent.

    Standardised by mean and deviation of the training part. The parts are stratified and the same in every run.
    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    inputs = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8)
    inputs = (inputs / 16 - DIGITS_MEAN) / DIGITS_DEVIATION
    labels = torch.tensor(y, dtype=torch.int64)
    train, rest = train_test_split(np.arange(len(y)), train_size=0.6, stratify=y, random_state=0)
    validation, test = train_test_split(rest, train_size=0.5, stratify=y[rest], random_state=0)
    return Splits(*(Dataset(inputs[part], labels[part]) for part in (train, validation, test)))


def held_out(data: Dataset, share: float = 0.1) -> tuple[Dataset, Dataset]:
    """The rest, and a share of the samples, stratified, the same in every run: validation data where none is given."""
    from sklearn.model_selection import train_test_split

    rest, part = train_test_split(np.arange(len(data)), test_size=share, stratify=data.labels, random_state=0)
    return data[torch.from_numpy(rest)], data[torch.from_numpy(part)]


def sentences(folder: Path, model: str, longest: int = 64) -> Splits:
    """Labelled sentences of a folder: train.tsv, dev.tsv (validation) and test.tsv, as GLUE's SST-2 has them.

    The first line is "sentence<TAB>label", every other a sentence and its class, from 0 on. model: whose tokenizer to
    use. longest: tokens; what is longer is cut. Raises FileNotFoundError, ValueError naming the file and line.
    """
    parts = [_read_tsv(folder / name) for name in ("train.tsv", "dev.tsv", "test.tsv")]
    texts = [text for part in parts for text, _ in part]
    labels = torch.tensor([label for part in parts for _, label in part], dtype=torch.int64)
    whole = Dataset(tokenized(model, texts, longest), labels)
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    return Splits(*(whole[begin:end] for begin, end in pairwise(ends)))


def _read_tsv(path: Path) -> list[tuple[str, int]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text, tab, label = line.rpartition("\t")
        if number == 1:
            if (text, label) != ("sentence", "label"):
                raise ValueError(f"{path} does not begin with the line sentence<TAB>label")
        elif not tab or not text or not label.isdecimal() or int(label) > 999:
            raise ValueError(f"{path}, line {number}: expected a sentence, a tab and a class from 0 on")
        else:
            rows.append((text, int(label)))
    if not rows:
        raise ValueError(f"{path} has no sentences")
    return rows


def dirichlet_split(labels: Tensor, clients: int, alpha: float, seed: int, smallest: int = 8) -> list[Tensor]:
    """Who owns which sample: for each class, shares drawn from a Dirichlet distribution; indices int64 per client.

    alpha: small means that clients see few classes, large that they see the same mix. Drawn again until every client
    has `smallest` samples. Raises ValueError if that does not happen in 100 draws.
    """
    random = generator(seed, Purpose.PARTITION)
    classes = [np.flatnonzero(labels.numpy() == c) for c in labels.unique().tolist()]
    for _ in range(100 if clients * smallest <= len(labels) else 0):
        owned: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for members in classes:
            shares = random.dirichlet(np.full(clients, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, part in enumerate(np.split(random.permutation(members), cuts)):
                owned[client].append(part)
        parts = [np.sort(np.concatenate(parts)) for parts in owned]
        if min(len(part) for part in parts) >= smallest:
            return [torch.from_numpy(part) for part in parts]
    raise ValueError(
        f"{len(labels)} samples, {clients} clients, alpha {alpha}: some client always has fewer than {smallest};"
        " use fewer clients or a larger alpha"
    )


@dataclass(frozen=True)
class Batches:
    """A client's batches: `size` of its samples, or all if it has fewer; the same for every method of a seed."""

    data: Dataset
    size: int
    seed: int
    client: int

    def __call__(self, round: int) -> Batch:
        random = generator(self.seed, Purpose.BATCHES, round, self.client)
        chosen = torch.from_numpy(random.choice(len(self.data), min(self.size, len(self.data)), replace=False))
        batch = self.data[chosen]
        return batch.inputs, batch.labels
