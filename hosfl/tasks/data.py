"""Data sets, their training, validation and test parts, texts as tokens, and the division over clients."""

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
from hosfl.tasks.reading import DataError, LocatedRow, Row, class_numbers


@dataclass(frozen=True)
class Dataset:
    """Samples in memory.

    inputs: a tensor [n, ...], or several by name, such as tokens and their mask. labels: int64 [n], or [n, ...].
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor | slice) -> Dataset:
        """Return some of the samples, by index."""
        return Dataset(self._map_inputs(lambda x: x[chosen]), self.labels[chosen])

    @property
    def length(self) -> int:
        """The number of tokens of a sample, with padding; 1 if the inputs are not tokens with a mask."""
        if isinstance(self.inputs, Tensor) or "attention_mask" not in self.inputs:
            return 1
        return self.inputs["attention_mask"].shape[1]

    @property
    def lengths(self) -> Tensor:
        """The number of tokens up to the last one that is not masked, int64 [n]; 1 if the inputs are not tokens."""
        if isinstance(self.inputs, Tensor) or "attention_mask" not in self.inputs:
            return torch.ones(len(self), dtype=torch.int64)
        mask = self.inputs["attention_mask"]
        return (mask * torch.arange(1, self.length + 1, device=mask.device)).amax(1)

    def trimmed(self, per_token: bool = False) -> Dataset:
        """Return the data set without the last tokens, if they are padding in all samples.

        per_token: whether there is a label for each token, [n, length, ...]; they are trimmed alike. Unchanged if an
        input of an unknown name also has `length` as its second size: it may or may not be one value per token.
        """
        longest, inputs = int(self.lengths.max()), self.inputs
        if longest == self.length or isinstance(inputs, Tensor):
            return self
        if (shorter := without_padding(inputs, self.length, longest)) is None:
            return self
        return replace(self, inputs=shorter, labels=self.labels[:, :longest] if per_token else self.labels)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dataset:
        """Return the data set on a device, with floating-point inputs as `dtype`."""
        inputs = self._map_inputs(lambda x: x.to(device, dtype if x.is_floating_point() else None))
        return replace(self, inputs=inputs, labels=self.labels.to(device))  # keeps the class

    def digest(self) -> str:
        """Return the SHA-256 of the content, in hexadecimal, whatever the device or memory layout."""
        return digest(self)

    def _map_inputs(self, change: Callable[[Tensor], Tensor]) -> Tensor | dict[str, Tensor]:
        if isinstance(self.inputs, Tensor):
            return change(self.inputs)
        return {name: change(value) for name, value in self.inputs.items()}


MIN_CLIENT_SAMPLES = 8  # samples that a client has at least where data are divided by class
MAX_OUTPUTS = 1 << 26  # elements of a batch's outputs at most: 256 MB in float32; a loss makes a few copies


def evaluation_batch_size(length: int, outputs: int = 1) -> int:
    """Return the batch size for evaluating samples of `length` tokens with `outputs` outputs per token."""
    return max(1, min(512, 512 * 64 // length, MAX_OUTPUTS // (length * outputs)))


@dataclass(frozen=True)
class Splits:
    """Training data, validation data for choosing rates, and test data, which are used for reporting only.

    Labels are classes, int [n], or other integers from 0 on, int [n, ...]. Warns of a validation or test part with a
    single class, and of labels [n, ...] that are all the same.

    Raises:
        DataError: a part has no samples, or labels that are no integers from 0 on; the training part has one class
            only, or another part has a class that the training part lacks.
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
            unknown = sorted(set(present) - set(known))
            if unknown:
                raise DataError(f"the {name} part has class {unknown[0]}, which the training part has not: {known}")
            if len(present) == 1 and name == "training":
                raise DataError(f"the training part has one class only, {present[0]}: there is nothing to learn")
            if len(present) == 1:
                warnings.warn(f"the {name} part has one class only, {present[0]}: its scores say little", stacklevel=1)

    def digest(self) -> str:
        """Return the SHA-256 of the content of all parts, in hexadecimal."""
        return digest(self)


def digest(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of nested dataclasses, dictionaries and lists of tensors and JSON values."""
    sha256 = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha256.update(json.dumps([str(value.dtype), list(value.shape)]).encode())
            flat = value.detach().cpu().reshape(-1)
            if flat.stride() != (1,):  # a view of one number counts as contiguous whatever its stride
                flat = flat.clone(memory_format=torch.contiguous_format)
            sha256.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, list):
            for item in value:
                add(item)
        elif hasattr(value, "read"):  # `Items`
            add(value.digest())
        elif is_dataclass(value):
            add({field.name: getattr(value, field.name) for field in fields(value)})
        elif isinstance(value, dict):
            sha256.update(json.dumps(sorted(value)).encode())
            for name in sorted(value):
                add(value[name])
        else:
            sha256.update(json.dumps(value).encode())

    add(value)
    return sha256.hexdigest()


def label_published_parts(
    train: Sequence[LocatedRow], validation: Sequence[LocatedRow], test: Sequence[LocatedRow], names: Sequence[str] = ()
) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows of the training, validation and test part, with the number of their class as "label".

    names: of the classes: see `reading.class_numbers`. If the test part is empty, or its labels are not public, the
    published validation part becomes the test part, and a new validation part is held out of the training part. It has
    as many rows, but at most a tenth of the training part, in the same proportions of classes, and is the same in every
    run. Raises DataError.
    """

    classes = class_numbers(train, names)
    train_rows = set_labels(train, classes)
    validation_rows = set_labels(validation, class_numbers(validation, names, training=set(classes)))
    test_rows = set_labels(test, class_numbers(test, names, training=set(classes), may_hide=True))
    if test_rows:
        return train_rows, validation_rows, test_rows
    kept, held_out = split_held_out(np.array(classes), len(validation_rows))
    return [train_rows[i] for i in kept], [train_rows[i] for i in held_out], validation_rows


def set_labels(rows: Sequence[LocatedRow], classes: Sequence[int]) -> list[Row]:
    """Return rows with the number of their class as "label"; no rows if there are no classes."""
    return [{**row, "label": number} for (_, row), number in zip(rows, classes, strict=False)]


def split_held_out(classes: NDArray[Any], max_count: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Choose samples to hold out for validation: (indices kept, indices held out), the same in every run.

    classes: int [n]; both parts have them in the same proportions. A tenth is held out, and at most `max_count`. Raises
    DataError for too few samples.
    """
    split = require("sklearn.model_selection", "holding samples out for validation").train_test_split
    present, sizes = np.unique(classes, return_counts=True)
    count = len(classes) // 10
    if count < len(present):
        raise DataError(
            f"{len(classes)} training samples are too few to hold a tenth of them out for validation: at least"
            f" {10 * len(present)} are needed for {len(present)} classes"
        )
    if max_count is not None and max_count < len(present):
        raise DataError(
            f"{max_count} validation samples are too few for another part of that size, held out of the training part:"
            f" at least {len(present)} are needed, one for each class"
        )
    if sizes.min() < 2:
        raise DataError(
            f"the training part has one sample of class {present[sizes.argmin()]}: at least 2 are needed, one to train"
            " on and one to hold out for validation"
        )
    count = count if max_count is None else min(count, max_count)
    kept, held_out = split(np.arange(len(classes)), test_size=count, stratify=classes, random_state=0)
    return np.sort(kept), np.sort(held_out)


def tokenized_splits(
    parts: Sequence[list[Row]],
    texts: Callable[[Row], tuple[str, ...]],
    model: str,
    longest: int,
    truncation_side: str = "right",
) -> Splits:
    """Tokenize training, validation and test rows, padded to one length. Other arguments: see `tokenized_rows`."""
    rows = tokenized_rows([row for part in parts for row in part], texts, model, longest, truncation_side)
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    return Splits(*(rows[begin:end] for begin, end in pairwise(ends)))


def tokenized_rows(
    rows: Sequence[Row],
    texts: Callable[[Row], tuple[str, ...]],
    model: str,
    longest: int,
    truncation_side: str = "right",
) -> Dataset:
    """Tokenize rows, padded to one length.

    texts: from a row to the text, or the pair of texts, that the model reads. longest: the most tokens of a row.
    truncation_side: where a longer one loses tokens. See `hosfl.halves.hub.tokenized`.
    """
    labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
    return Dataset(tokenized(model, [texts(row) for row in rows], longest, truncation_side), labels)


def public_tokens(model: str) -> dict[str, Tensor]:
    """Tokenize about a hundred short English texts that the package carries, for `Task.public`; at most 64 tokens each.

    They are prose of this library's documentation and a few everyday sentences, written for this.
    """
    texts = (files("hosfl.tasks") / "public.txt").read_text("utf-8").splitlines()
    return tokenized(model, [(text,) for text in texts], min(64, text_limits(model)[1]))


def group_ids(names: Sequence[str]) -> Tensor:
    """Number names by their first appearance, int64 [n]: equal names have equal numbers. For `Task.groups`."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def iid_split(samples: int, clients: int, seed: int) -> list[Tensor]:
    """Divide samples over clients at random, in equal parts: each client's indices, int64.

    Raises DataError for fewer samples than clients.
    """
    _check_sample_count(samples, clients, 1)
    order = generator(seed, Purpose.PARTITION).permutation(samples)
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(order, clients)]


def dirichlet_split(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Divide samples over clients by class: each client's indices, int64.

    Each class is divided in shares drawn from a Dirichlet distribution, until every client has `MIN_CLIENT_SAMPLES`
    samples. labels: int64 [n], the classes, or other groups by which the clients' data are to differ, such as articles.
    alpha: if it is small, clients have few classes each; if it is large, all have the same mix. Raises DataError for
    too few samples, and if 100 draws do not suffice.
    """
    _check_sample_count(len(labels), clients, MIN_CLIENT_SAMPLES)
    random = generator(seed, Purpose.PARTITION)
    classes = [np.flatnonzero(labels.numpy() == c) for c in labels.unique().tolist()]
    for _ in range(100):
        client_parts: list[list[NDArray[Any]]] = [[] for _ in range(clients)]
        for members in classes:
            shares = random.dirichlet(np.full(clients, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, part in enumerate(np.split(random.permutation(members), cuts)):
                client_parts[client].append(part)
        parts = [np.sort(np.concatenate(parts)) for parts in client_parts]
        if min(len(part) for part in parts) >= MIN_CLIENT_SAMPLES:
            return [torch.from_numpy(part) for part in parts]
    raise DataError(
        f"{len(labels)} samples, {clients} clients, alpha {alpha}: some client always has fewer than"
        f" {MIN_CLIENT_SAMPLES}; use fewer clients or a larger alpha"
    )


def shard_count(samples: int, clients: int, smallest: int) -> int:
    """Return the number of parts in which many clients share the data: one each, or as many as have `smallest` samples.

    Raises DataError if the samples are too few for one part.
    """
    if samples < smallest:
        raise DataError(f"{samples} training samples are too few for a simulation: at least {smallest} are needed")
    return min(clients, samples // smallest)


def _check_sample_count(samples: int, clients: int, smallest: int) -> None:
    if clients < 1:
        raise ValueError(f"{samples} samples for {clients} clients: one client at least is needed")
    if samples < clients * smallest:
        raise DataError(
            f"{samples} samples for {clients} clients: at least {clients * smallest} are needed, {smallest} for each;"
            " use fewer clients or more data"
        )
