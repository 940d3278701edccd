"""Conversion of users' data sets: arrays become tensors; items of other data sets are read when they are needed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from hosfl.halves.inputs import Batch, Inputs, mask_of
from hosfl.protocol.seeds import Purpose, drawn, round_seed
from hosfl.tasks.data import Dataset, digest
from hosfl.tasks.reading import DataError
from hosfl_kernels import derive

LABEL_NAMES = ("labels", "label")  # names of the labels in a mapping
DIGESTED_ITEMS = 1024  # the most items that go into a digest


@dataclass(frozen=True)
class Items:
    """Samples that are read one by one, when they are needed: the items of `source` at `indices`.

    source: has a length and numbered items. An item is a pair (inputs, labels), or a mapping with "labels" or "label"
    among its names; its other names are the client half's arguments. name: of the data set, for errors. seed: of random
    reading, such as augmentation: the same samples read with the same seed are the same, and the global random numbers
    are left as they were. device: of the samples once read. dtype: of their floating-point inputs.
    """

    source: Any
    indices: Tensor
    name: str
    seed: int = 0
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: Tensor | slice) -> Items:
        """Select samples by index, without reading them."""
        return replace(self, indices=self.indices[chosen])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Items:
        """Set the device of the samples, and the dtype of their floating-point inputs."""
        return replace(self, device=device, dtype=dtype)

    @property
    def lengths(self) -> Tensor:
        """Ones, int64 [n]: the number of tokens is unknown before the samples are read."""
        return torch.ones(len(self), dtype=torch.int64)

    def read(self, seed: int | None = None) -> Dataset:
        """Read all samples into memory. Raises DataError for samples that are unlike each other."""
        with global_seed(self.seed if seed is None else seed):
            items = [self._item(number) for number in self.indices.tolist()]
        inputs, labels = zip(*items, strict=True)
        first = inputs[0]
        if isinstance(first, Mapping):
            names = first.keys()
            for number, value in zip(self.indices.tolist(), inputs, strict=True):
                if not isinstance(value, Mapping) or value.keys() != names:
                    raise DataError(f"{self.name}[{number}] has other names than the first: {', '.join(names)}")
            stacked: Any = {name: self._stack([value[name] for value in inputs], name) for name in names}
        else:
            stacked = self._stack(list(inputs), "inputs")
        _check_mask(stacked, self.name)
        return Dataset(stacked, _as_labels(self._stack(list(labels), "labels"), self.name)).to(self.device, self.dtype)

    def digest(self) -> str:
        """Return the SHA-256 of the length and of up to 1,024 items, spread evenly, read with seed 0."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), DIGESTED_ITEMS)).astype(np.int64))
        parts = np.array_split(chosen, max(1, len(chosen) // 64))
        return digest([len(self), *(self[torch.from_numpy(part)].to("cpu").read(0).digest() for part in parts)])

    @cached_property
    def labels(self) -> Tensor:
        """All labels. Every item is read once for them, unless the source stores them: see `stored_labels`."""
        stored = stored_labels(self.source)
        if stored is not None:
            return _as_labels(_as_tensor(stored, f"{self.name}, labels"), self.name)[self.indices]
        return torch.cat([self[part].read().labels.cpu() for part in torch.arange(len(self)).split(256)])

    def _item(self, number: int) -> tuple[Any, Any]:
        try:
            item = self.source[number]
        except (LookupError, NotImplementedError) as error:
            raise DataError(
                f"{self.name}[{number}] cannot be read ({error!r}): items are needed by numbers from 0 to"
                f" {len(self.source) - 1}"
            ) from error
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"while {self.name}[{number}] was read")
            raise
        if isinstance(item, Mapping):
            name = next((name for name in LABEL_NAMES if name in item), None)
            if name is None:
                raise DataError(f"{self.name}[{number}] has {', '.join(map(str, item))}; one must be called labels")
            return {k: v for k, v in item.items() if k != name}, item[name]
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return item[0], item[1]
        raise DataError(
            f"{self.name}[{number}] is a {type(item).__name__}: a pair (inputs, labels) is needed, or a mapping with"
            " labels"
        )

    def _stack(self, values: list[Any], name: str) -> Tensor:
        try:
            tensors = [_check_dense(torch.as_tensor(value), f"{self.name}, {name}") for value in values]
        except DataError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.name}: {name} that are no numbers ({error}): make tensors of them") from None
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            examples = " and ".join(map(str, sorted(shapes)[:2]))
            raise DataError(f"{self.name}: {name} of several shapes, such as {examples}: pad them to one")
        return torch.stack(tensors)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Context manager that seeds the global generators of torch, Python and numpy, and restores them on exit."""
    before = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it would also set the seed of devices that are first used later.
        torch.default_generator.manual_seed(seed % 2**63)
        if devices:
            torch.cuda.manual_seed_all(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def as_dataset(data: Any, name: str) -> Dataset | Items:
    """Convert a user's data set. name: of it, for errors. Raises DataError for what is none.

    data: a pair of arrays (inputs, labels), or a mapping of arrays with "labels" or "label" among its names: they
    become tensors; or anything with a length and numbered items, such as torch's `Dataset`s and Hugging Face's data
    sets: its items are read when they are needed.
    """
    if isinstance(data, (Dataset, Items)):
        dataset: Dataset | Items = data
    elif isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(f"{name} is a tuple of {len(data)}: a pair (inputs, labels) is needed")
        arrays = _as_inputs(data[0], name, "inputs")
        dataset = Dataset(arrays, _as_labels(_as_tensor(data[1], f"{name}, labels"), name))
    elif isinstance(data, Mapping):
        key = next((key for key in LABEL_NAMES if key in data), None)
        if key is None:
            raise DataError(f"{name} has {', '.join(map(str, data))}; one must be called labels")
        arrays = _as_inputs({k: v for k, v in data.items() if k != key}, name)
        dataset = Dataset(arrays, _as_labels(_as_tensor(data[key], f"{name}, {key}"), name))
    elif _is_indexable(data):
        dataset = Items(data, torch.arange(len(data)), name)
    else:
        raise DataError(
            f"{name} is a {type(data).__name__}, which has no length or no items by number: a torch Dataset, a Hugging"
            " Face data set, a pair of arrays (inputs, labels) or a mapping of arrays is needed"
        )
    if not len(dataset):
        raise DataError(f"{name} has no samples")
    if isinstance(dataset, Dataset):
        by_name = dataset.inputs if isinstance(dataset.inputs, Mapping) else {"inputs": dataset.inputs}
        for key, value in by_name.items():
            if value.dim() == 0 or len(value) != len(dataset):
                raise DataError(f"{name} has {len(dataset)} labels, and {key} of shape {tuple(value.shape)}")
        _check_mask(dataset.inputs, name)
    return dataset


def _as_inputs(inputs: Any, name: str, unnamed: str = "") -> Tensor | dict[str, Tensor]:
    """Convert an array or a mapping of arrays to tensors. name, unnamed: of a data set and of an array, for errors."""
    if not isinstance(inputs, Mapping):
        return _as_tensor(inputs, f"{name}, {unnamed}" if unnamed else name)
    if not inputs:
        raise DataError(f"{name} has no inputs: give the arguments of the client half by name")
    return {k: _as_tensor(v, f"{name}, {k}") for k, v in inputs.items()}


def as_inputs(data: Any, name: str) -> Tensor | dict[str, Tensor]:
    """Convert inputs without labels, an array or a mapping of arrays, to tensors. Raises DataError for what is none."""
    inputs = _as_inputs(data, name)
    sizes = {len(x) for x in (inputs.values() if isinstance(inputs, dict) else [inputs])}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(f"{name} has inputs of {sorted(sizes) or 'no'} samples: as many of each, and some, are needed")
    return inputs


def _check_mask(inputs: Inputs, name: str) -> None:
    """Raises DataError for an attention mask that no message can carry.

    It must be [samples, tokens], of 0 and 1 only.
    """
    mask = mask_of(inputs)
    if mask is not None and mask.dim() != 2:
        raise DataError(
            f"{name}: attention_mask of shape {tuple(mask.shape)}, and [samples, tokens] is needed: call masks of other"
            " shapes something else"
        )
    if mask is not None and len(invalid := mask[(mask != 0) & (mask != 1)]):
        raise DataError(
            f"{name}: attention_mask has {invalid[0].item():g}, and it is of 0 and 1, which say what counts: call"
            " weights and other numbers something else"
        )


def _as_labels(labels: Tensor, name: str) -> Tensor:
    """Convert labels to int64 or float32, which losses take. Raises DataError for those that no message can carry."""
    if labels.is_complex():
        raise DataError(f"{name}: labels that are {labels.dtype}: integers or floating-point numbers are needed")
    if labels.is_floating_point():
        if not bool(torch.isfinite(labels.float()).all()):
            raise DataError(f"{name}: labels that are infinite or NaN")
        return labels.float()
    integers, limits = labels.long(), torch.iinfo(torch.int32)
    if integers.numel() and not limits.min <= int(integers.min()) <= int(integers.max()) <= limits.max:
        raise DataError(f"{name}: labels from {int(integers.min())} to {int(integers.max())}: they travel as int32")
    return integers


def stored_labels(source: Any) -> Any:
    """Return all labels of a data set that stores them apart from its items, without reading any item; else None.

    They are `targets`, as in torchvision's data sets; or a column of a Hugging Face data set; or those of the data set
    of which a torch `Subset` is a part.
    """
    if isinstance(source, Subset):
        labels = stored_labels(source.dataset)
        return None if labels is None else torch.as_tensor(labels)[list(source.indices)]
    if hasattr(source, "column_names") and hasattr(source, "with_format"):
        name = next((name for name in LABEL_NAMES if name in source.column_names), None)
        return None if name is None else list(source.with_format(None)[name])
    targets = getattr(source, "targets", None)
    return targets if targets is not None and len(targets) == len(source) else None


def _as_tensor(array: Any, name: str) -> Tensor:
    if hasattr(array, "__array__") and not isinstance(array, Tensor):
        array = np.asarray(array)  # such as pandas' frames and columns
        if array.dtype.kind in "OUS":
            raise DataError(f"{name}: text or objects: make numbers of them, and of classes those from 0 on")
        if min(array.strides, default=0) < 0 or not array.dtype.isnative:  # of which torch makes no tensors
            array = array.astype(array.dtype.newbyteorder("="), order="C")
    try:
        with warnings.catch_warnings():
            # Frames of pandas and mapped files are often read-only, and data are never written.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: no array of numbers ({error})") from None
    if tensor.dim() == 0:
        raise DataError(f"{name}: one number, where there is one for each sample")
    return _check_dense(tensor, name)


def _check_dense(tensor: Tensor, name: str) -> Tensor:
    if tensor.layout != torch.strided:
        raise DataError(f"{name}: laid out as {tensor.layout}: make it dense, as to_dense() does")
    return tensor


def _is_indexable(data: Any) -> bool:
    if isinstance(data, (str, bytes, np.ndarray, Tensor, IterableDataset)):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def read(samples: Dataset | Items, seed: int = 0) -> Dataset:
    """Return the samples in memory. seed: of random reading, such as augmentation."""
    return samples.read(seed) if isinstance(samples, Items) else samples


def as_datasets(data: Any, name: str) -> Dataset | Items | list[Dataset | Items]:
    """Convert a user's data set, or a list with one for each client: see `as_dataset`."""
    if not isinstance(data, list):
        return as_dataset(data, name)
    if not data:
        raise DataError(f"{name} is an empty list: one data set for each client is needed")
    try:
        return [as_dataset(part, f"{name} of client {number}") for number, part in enumerate(data)]
    except DataError as error:
        raise DataError(f"{error} ({name} is a list, which has one data set for each client)") from None


def check_same_kinds(sets: Iterable[tuple[str, Dataset | Items]]) -> None:
    """Raises DataError for a data set whose samples are unlike the first's: in names, kinds of numbers or shapes.

    sets: (name for errors, data set). The sets "test" and "validation" may have other sizes, such as longer texts or
    larger pictures, but not another number of dimensions.
    """
    (first, data), *others = sets
    expected = _sample_kinds(data)
    for name, other in others:
        kinds = _sample_kinds(other)
        if kinds.keys() != expected.keys():
            raise DataError(f"{name} has {', '.join(kinds)}, and {first} has {', '.join(expected)}: make them alike")
        for part, (numbers, shape) in kinds.items():
            expected_numbers, expected_shape = expected[part]
            only_evaluated = name in ("test", "validation")
            same = len(shape) == len(expected_shape) if only_evaluated else shape == expected_shape
            if numbers != expected_numbers or not same:
                raise DataError(
                    f"{name}: a sample's {part} are {numbers} of shape {shape}, and those of {first} are"
                    f" {expected_numbers} of shape {expected_shape}: make them alike"
                )


def _sample_kinds(data: Dataset | Items) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the kind of numbers and the shape of one sample's inputs and labels, by name."""
    sample = read(data[:1])
    inputs = {"inputs": sample.inputs} if isinstance(sample.inputs, Tensor) else sample.inputs
    kinds = "integers", "floating-point numbers"
    tensors = {**inputs, "labels": sample.labels}
    return {name: (kinds[value.is_floating_point()], tuple(value.shape[1:])) for name, value in tensors.items()}


@dataclass(frozen=True)
class Batches:
    """A client's batches by round: `size` of its samples, or all if it has fewer. All methods get the same ones.

    per_token: whether there is a label for each token. purpose: of the batches; each purpose has its own samples.
    """

    data: Dataset | Items
    size: int
    seed: int
    client: int
    per_token: bool = False
    purpose: Purpose = Purpose.BATCHES

    def __call__(self, round: int) -> Batch:
        chosen = torch.from_numpy(drawn(self.seed, self.purpose, round, self.client, len(self.data), self.size))
        batch = read(self.data[chosen], derive(round_seed(self.seed, Purpose.READING, round), self.client, 0))
        batch = batch.trimmed(self.per_token)
        return batch.inputs, batch.labels
