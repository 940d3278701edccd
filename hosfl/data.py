"""Data: samples and labels, real handwritten digits, texts as tokens, and the split over clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hosfl.client import Batch
from hosfl.families import tokenized
from hosfl.seeds import Purpose, generator
from hosfl.text import Row, lines_of, tsv_rows


@dataclass(frozen=True)
class Dataset:
    """Inputs [n, ...], or several by name, such as tokens and their mask; labels int64 [n], or [n, ...]."""

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor | slice) -> Dataset:
        """Some of the samples."""
        return Dataset(self._each(lambda x: x[chosen]), self.labels[chosen])

    @property
    def length(self) -> int:
        """Tokens of a sample; 1 where the inputs are not tokens."""
        return 1 if isinstance(self.inputs, Tensor) else self.inputs["input_ids"].shape[1]

    @property
    def lengths(self) -> Tensor:
        """Tokens up to the last one that counts, int64 [n]; ones where the inputs are not tokens."""
        if isinstance(self.inputs, Tensor):
            return torch.ones(len(self), dtype=torch.int64)
        return (self.inputs["attention_mask"] * torch.arange(1, self.length + 1)).amax(1)

    def trimmed(self) -> Dataset:
        """Without the tokens at the end that count in no sample: nothing is computed or sent for them."""
        longest = int(self.lengths.max())
        return self if longest == self.length else replace(self, inputs=self._each(lambda x: x[:, :longest]))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dataset:
        """On a device, inputs of floating point as `dtype`."""
        inputs = self._each(lambda x: x.to(device, dtype if x.is_floating_point() else None))
        return replace(self, inputs=inputs, labels=self.labels.to(device))  # of the same class

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


def sentences(folder: Path, model: str, longest: int = 64) -> Splits:
    """Labelled sentences of a folder: train.tsv, dev.tsv (validation) and test.tsv.

    The first line is "sentence<TAB>label", every other a sentence and its class, from 0 on. model: whose tokenizer to
    use. longest: tokens; what is longer is cut. Raises FileNotFoundError, ValueError naming the file and line.
    """
    paths = [folder / name for name in ("train.tsv", "dev.tsv", "test.tsv")]
    found = [tsv_rows(path, lines_of(path)) for path in paths]
    return as_tokens(found, lambda row: (row["sentence"],), model, longest)


def as_tokens(
    found: Sequence[list[Row]], texts: Callable[[Row], tuple[str, ...]], model: str, longest: int, cut: str = "right"
) -> Splits:
    """Training, validation and test rows as a model's tokens, of one length; the other arguments: see `tokenized`."""
    rows = [row for part in found for row in part]
    labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
    whole = Dataset(tokenized(model, [texts(row) for row in rows], longest, cut), labels)
    ends = np.cumsum([0, *map(len, found)]).tolist()
    return Splits(*(whole[begin:end] for begin, end in pairwise(ends)))


def iid_split(samples: int, clients: int, seed: int) -> list[Tensor]:
    """Who owns which sample, whatever its class: equal parts of a random order; indices int64 per client.

    Raises ValueError where there are fewer samples than clients.
    """
    if samples < clients:
        raise ValueError(f"{samples} samples for {clients} clients: use fewer clients")
    order = generator(seed, Purpose.PARTITION).permutation(samples)
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(order, clients)]


def dirichlet_split(labels: Tensor, clients: int, alpha: float, seed: int, smallest: int = 8) -> list[Tensor]:
    """Who owns which sample: for each class, shares drawn from a Dirichlet distribution; indices int64 per client.

    labels: int64 [n], the classes, or whatever else the clients' data are to differ by, such as articles. alpha: small
    means that clients see few classes, large that they see the same mix. Drawn again until every client has `smallest`
    samples. Raises ValueError if that does not happen in 100 draws.
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
        batch = self.data[chosen].trimmed()
        return batch.inputs, batch.labels
