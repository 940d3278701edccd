"""Data: samples and labels, texts as tokens, and the split over clients."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hosfl.extras import require
from hosfl.halves.hub import text_limits, tokenized
from hosfl.protocol.seeds import Purpose, generator
from hosfl.tasks.padding import without_padding
from hosfl.tasks.reading import DataError, Found, Row, class_numbers


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
        """Tokens of a sample; 1 where the inputs are not tokens with a mask."""
        if isinstance(self.inputs, Tensor) or "attention_mask" not in self.inputs:
            return 1
        return self.inputs["attention_mask"].shape[1]

    @property
    def lengths(self) -> Tensor:
        """Tokens up to the last one that counts, int64 [n]; ones where the inputs are not tokens."""
        if isinstance(self.inputs, Tensor) or "attention_mask" not in self.inputs:
            return torch.ones(len(self), dtype=torch.int64)
        mask = self.inputs["attention_mask"]
        return (mask * torch.arange(1, self.length + 1, device=mask.device)).amax(1)

    def trimmed(self, per_token: bool = False) -> Dataset:
        """Without the tokens at the end that count in no sample: nothing is computed or sent for them.

        per_token: labels are one for each token, [n, length, ...], and end with the tokens. Whole where an input of a
        name of its own has as many numbers in a row as there are tokens: nobody knows whether they are of tokens.
        """
        longest, inputs = int(self.lengths.max()), self.inputs
        if longest == self.length or isinstance(inputs, Tensor):
            return self
        if (shorter := without_padding(inputs, self.length, longest)) is None:
            return self
        return replace(self, inputs=shorter, labels=self.labels[:, :longest] if per_token else self.labels)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dataset:
        """On a device, inputs of floating point as `dtype`."""
        inputs = self._each(lambda x: x.to(device, dtype if x.is_floating_point() else None))
        return replace(self, inputs=inputs, labels=self.labels.to(device))  # of the same class

    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal: all that it holds, and nothing of where that lay."""
        return digest(self)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tensor | dict[str, Tensor]:
        if isinstance(self.inputs, Tensor):
            return change(self.inputs)
        return {name: change(value) for name, value in self.inputs.items()}


MIN_CLIENT_SAMPLES = 8  # samples of a client, where data are divided by class
MAX_OUTPUTS = 1 << 26  # of outputs at once: 256 MB in float32, of which a loss makes a few copies


def evaluation_batch_size(length: int, outputs: int = 1) -> int:
    """How many samples of `length` tokens are evaluated together, with so many outputs for each token."""
    return max(1, min(512, 512 * 64 // length, MAX_OUTPUTS // (length * outputs)))


@dataclass(frozen=True)
class Splits:
    """Training data, validation data for choosing rates, test data for reporting and nothing else.

    Labels are classes, int [n], or anything else that counts from 0, int [n, ...]. Where a validation or test part has
    one class only, or all labels int [n, ...] are the same, a warning says so.

    Raises:
        DataError: a part has no samples, or labels that are no integers from 0 on; the training part has one class
            only, or another part a class that the training part has not.
    """

    train: Dataset
    validation: Dataset
    test: Dataset

    def __post_init__(self) -> None:
        known = self.train.labels.unique().tolist()
        for name, data in (("training", self.train), ("validation", self.validation), ("test", self.test)):
            labels = data.labels
            inputs = [data.inputs] if isinstance(data.inputs, Tensor) else list(data.inputs.values())
            if not len(labels):
                raise DataError(f"the {name} part has no samples")
            if any(len(value) != len(labels) for value in inputs):
                raise DataError(f"the {name} part has {len(inputs[0])} inputs and {len(labels)} labels")
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise DataError(f"the {name} part's labels are {labels.dtype}; they must be integers, such as int64")
            if int(labels.min()) < 0:
                raise DataError(f"the {name} part has the label {int(labels.min())}; labels begin at 0")
            if labels.dim() > 1:
                if len(labels) > 1 and bool((labels == labels[0]).all()):
                    warnings.warn(f"all labels of the {name} part are {labels[0].tolist()}", stacklevel=1)
                continue
            present = labels.unique().tolist()
            strange = sorted(set(present) - set(known))
            if strange:
                raise DataError(f"the {name} part has class {strange[0]}, which the training part has not: {known}")
            if len(present) == 1 and name == "training":
                raise DataError(f"the training part has one class only, {present[0]}: there is nothing to learn")
            if len(present) == 1:
                warnings.warn(f"the {name} part has one class only, {present[0]}: its scores say little", stacklevel=1)

    def digest(self) -> str:
        """SHA-256 of the content of all parts, in hexadecimal; nothing of where that lay."""
        return digest(self)


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of tensors, and what JSON can hold, in data classes and dictionaries."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(json.dumps([str(value.dtype), list(value.shape)]).encode())
            flat = value.detach().cpu().reshape(-1)
            if flat.stride() != (1,):  # a view of one number, which counts as contiguous
                flat = flat.clone(memory_format=torch.contiguous_format)
            found.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, list):
            for one in value:
                add(one)
        elif hasattr(value, "read"):  # items that are read one by one
            add(value.digest())
        elif is_dataclass(value):
            add({field.name: getattr(value, field.name) for field in fields(value)})
        elif isinstance(value, dict):
            found.update(json.dumps(sorted(value)).encode())
            for name in sorted(value):
                add(value[name])
        else:
            found.update(json.dumps(value).encode())

    add(value)
    return found.hexdigest()


def with_published_parts(
    train: Sequence[Found], validation: Sequence[Found], test: Sequence[Found], names: Sequence[str] = ()
) -> tuple[list[Row], list[Row], list[Row]]:
    """The rows of published parts with their classes, int, as "label"; names: see `reading.class_numbers`.

    Where the test part's labels are not public, or it is empty, the published validation part is the test part, and the
    validation part, for choosing rates, is held out of the training part: as many rows, but no more than a tenth, with
    the training part's shares of the classes, the same in every run. Raises DataError.
    """

    own = class_numbers(train, names)
    rows = with_classes(train, own)
    for_rates = with_classes(validation, class_numbers(validation, names, training=set(own)))
    for_report = with_classes(test, class_numbers(test, names, training=set(own), may_hide=True))
    if for_report:
        return rows, for_rates, for_report
    kept, held = split_held_out(np.array(own), len(for_rates))
    return [rows[i] for i in kept], [rows[i] for i in held], for_rates


def with_classes(found: Sequence[Found], numbers: Sequence[int]) -> list[Row]:
    """Rows with their classes as "label". Fewer numbers than rows: only so many rows."""
    return [{**row, "label": number} for (_, row), number in zip(found, numbers, strict=False)]


def split_held_out(classes: NDArray[Any], most: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which samples are kept, and which held out for validation: a tenth, or `most`, the same in every run.

    classes: int [n]; both parts have the same shares of them. Raises DataError for too few samples.
    """
    split = require("sklearn.model_selection", "holding samples out for validation").train_test_split
    own, sizes = np.unique(classes, return_counts=True)
    count = len(classes) // 10
    if count < len(own):
        raise DataError(
            f"{len(classes)} training samples are too few to hold a tenth of them out for validation: at least"
            f" {10 * len(own)} are needed for {len(own)} classes"
        )
    if most is not None and most < len(own):
        raise DataError(
            f"{most} validation samples are too few for another part of that size, held out of the training part: at"
            f" least {len(own)} are needed, one for each class"
        )
    if sizes.min() < 2:
        raise DataError(
            f"the training part has one sample of class {own[sizes.argmin()]}: at least 2 are needed, one to train on"
            " and one to hold out for validation"
        )
    count = count if most is None else min(count, most)
    kept, held = split(np.arange(len(classes)), test_size=count, stratify=classes, random_state=0)
    return np.sort(kept), np.sort(held)


def tokenized_splits(
    found: Sequence[list[Row]], texts: Callable[[Row], tuple[str, ...]], model: str, longest: int, cut: str = "right"
) -> Splits:
    """Training, validation and test rows as a model's tokens, of one length; the other arguments: see `tokenized`."""
    whole = tokenized_rows([row for part in found for row in part], texts, model, longest, cut)
    ends = np.cumsum([0, *map(len, found)]).tolist()
    return Splits(*(whole[begin:end] for begin, end in pairwise(ends)))


def tokenized_rows(
    rows: Sequence[Row], texts: Callable[[Row], tuple[str, ...]], model: str, longest: int, cut: str = "right"
) -> Dataset:
    """Rows as a model's tokens, of one length; the other arguments: see `tokenized`."""
    labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
    return Dataset(tokenized(model, [texts(row) for row in rows], longest, cut), labels)


def public_tokens(model: str) -> dict[str, Tensor]:
    """About a hundred short English texts that the package carries, as a model's tokens: see `Task.public`.

    They are the prose of these pages and a few lines of everyday's, written for this; 64 tokens of each at most.
    """
    texts = (files("hosfl.tasks") / "public.txt").read_text("utf-8").splitlines()
    return tokenized(model, [(text,) for text in texts], min(64, text_limits(model)[1]))


def group_ids(names: Sequence[str]) -> Tensor:
    """Names as numbers, int64 [n]: 0 for the first and those equal to it, and so on, as `Task.groups` has them."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def iid_split(samples: int, clients: int, seed: int) -> list[Tensor]:
    """Who owns which sample, whatever its class: equal parts of a random order; indices int64 per client.

    Raises DataError where there are fewer samples than clients.
    """
    _check_enough(samples, clients, 1)
    order = generator(seed, Purpose.PARTITION).permutation(samples)
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(order, clients)]


def dirichlet_split(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Who owns which sample: for each class, shares drawn from a Dirichlet distribution; indices int64 per client.

    labels: int64 [n], the classes, or whatever else the clients' data are to differ by, such as articles. alpha: small
    means that clients see few classes, large that they see the same mix. Drawn again until every client has
    `MIN_CLIENT_SAMPLES` samples. Raises DataError where there are too few, or if that does not happen in 100 draws.
    """
    _check_enough(len(labels), clients, MIN_CLIENT_SAMPLES)
    random = generator(seed, Purpose.PARTITION)
    classes = [np.flatnonzero(labels.numpy() == c) for c in labels.unique().tolist()]
    for _ in range(100):
        owned: list[list[NDArray[Any]]] = [[] for _ in range(clients)]
        for members in classes:
            shares = random.dirichlet(np.full(clients, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, part in enumerate(np.split(random.permutation(members), cuts)):
                owned[client].append(part)
        parts = [np.sort(np.concatenate(parts)) for parts in owned]
        if min(len(part) for part in parts) >= MIN_CLIENT_SAMPLES:
            return [torch.from_numpy(part) for part in parts]
    raise DataError(
        f"{len(labels)} samples, {clients} clients, alpha {alpha}: some client always has fewer than"
        f" {MIN_CLIENT_SAMPLES}; use fewer clients or a larger alpha"
    )


def shard_count(samples: int, clients: int, smallest: int) -> int:
    """In how many parts a crowd shares the data: one per client, or as many as have `smallest` samples each.

    Raises DataError where the samples are too few for one.
    """
    if samples < smallest:
        raise DataError(f"{samples} training samples are too few for a simulation: at least {smallest} are needed")
    return min(clients, samples // smallest)


def _check_enough(samples: int, clients: int, smallest: int) -> None:
    if clients < 1:
        raise ValueError(f"{samples} samples for {clients} clients: one client at least is needed")
    if samples < clients * smallest:
        raise DataError(
            f"{samples} samples for {clients} clients: at least {clients * smallest} are needed, {smallest} for each;"
            " use fewer clients or more data"
        )
