"""Data sets of a user's own, as tasks take them: arrays are kept as they are, items are read when they are needed."""

from __future__ import annotations

import random
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

LABELS = ("labels", "label")  # what a mapping calls them
DIGESTED_ITEMS = 1024  # items that a digest is of, where they are read one by one


@dataclass(frozen=True)
class Items:
    """Samples that are read one by one, when they are needed: those of `source` at `indices`.

    source: with a length, and by number a pair (inputs, labels) or a mapping with "labels" or "label" among its names;
    the rest of a mapping are the client half's arguments by name. seed: of what is random in reading, such as
    augmentation: the same samples read with the same seed are the same, and nobody else's random numbers move. what:
    how errors call it. device, dtype: of what is read, of inputs that are floating-point numbers.
    """

    source: Any
    indices: Tensor
    what: str
    seed: int = 0
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: Tensor | slice) -> Items:
        """Some of them; nothing is read."""
        return replace(self, indices=self.indices[chosen])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Items:
        return replace(self, device=device, dtype=dtype)

    @property
    def lengths(self) -> Tensor:
        """Not known before they are read: ones."""
        return torch.ones(len(self), dtype=torch.int64)

    def read(self, seed: int | None = None) -> Dataset:
        """The samples. Raises DataError where they do not fit together."""
        with global_seed(self.seed if seed is None else seed):
            items = [self._item(number) for number in self.indices.tolist()]
        inputs, labels = zip(*items, strict=True)
        first = inputs[0]
        if isinstance(first, Mapping):
            names = first.keys()
            for number, value in zip(self.indices.tolist(), inputs, strict=True):
                if not isinstance(value, Mapping) or value.keys() != names:
                    raise DataError(f"{self.what}[{number}] has other names than the first: {', '.join(names)}")
            stacked: Any = {name: self._stack([value[name] for value in inputs], name) for name in names}
        else:
            stacked = self._stack(list(inputs), "inputs")
        _check_mask(stacked, self.what)
        return Dataset(stacked, _labels(self._stack(list(labels), "labels"), self.what)).to(self.device, self.dtype)

    def digest(self) -> str:
        """SHA-256 of how many there are and of up to 1,024 of them, spread evenly, as they are read with seed 0."""
        looked_at = np.unique(np.linspace(0, len(self) - 1, min(len(self), DIGESTED_ITEMS)).astype(np.int64))
        parts = np.array_split(looked_at, max(1, len(looked_at) // 64))
        return digest([len(self), *(self[torch.from_numpy(part)].to("cpu").read(0).digest() for part in parts)])

    @cached_property
    def labels(self) -> Tensor:
        """All labels: see `labels_without_reading`; where there are none beside the items, every item is read once."""
        beside = labels_without_reading(self.source)
        if beside is not None:
            return _labels(_tensor(beside, f"{self.what}, labels"), self.what)[self.indices]
        return torch.cat([self[part].read().labels.cpu() for part in torch.arange(len(self)).split(256)])

    def _item(self, number: int) -> tuple[Any, Any]:
        try:
            item = self.source[number]
        except (LookupError, NotImplementedError) as error:
            raise DataError(
                f"{self.what}[{number}] cannot be read ({error!r}): items are needed by numbers from 0 to"
                f" {len(self.source) - 1}"
            ) from error
        if isinstance(item, Mapping):
            name = next((name for name in LABELS if name in item), None)
            if name is None:
                raise DataError(f"{self.what}[{number}] has {', '.join(map(str, item))}; one must be called labels")
            return {k: v for k, v in item.items() if k != name}, item[name]
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return item[0], item[1]
        raise DataError(
            f"{self.what}[{number}] is a {type(item).__name__}: a pair (inputs, labels) is needed, or a mapping with"
            " labels"
        )

    def _stack(self, values: list[Any], name: str) -> Tensor:
        try:
            tensors = [_dense(torch.as_tensor(value), f"{self.what}, {name}") for value in values]
        except DataError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.what}: {name} that are no numbers ({error}): make tensors of them") from None
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            two = " and ".join(map(str, sorted(shapes)[:2]))
            raise DataError(f"{self.what}: {name} of several shapes, such as {two}: pad them to one")
        return torch.stack(tensors)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """torch's, Python's and numpy's random numbers come from this seed, and go on as before afterwards."""
    before = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which also decides with what a device begins that nobody has used yet.
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


def samples_of(given: Any, what: str) -> Dataset | Items:
    """A user's data set as the library holds it. what: how errors call it. Raises DataError for what is none.

    given: a pair of arrays (inputs, labels), or a mapping of arrays with "labels" or "label" among its names, which are
    kept as tensors; or anything with a length and items by number, such as torch's `Dataset`s and Hugging Face's data
    sets, whose items are read when they are needed.
    """
    if isinstance(given, (Dataset, Items)):
        found: Dataset | Items = given
    elif isinstance(given, tuple):
        if len(given) != 2:
            raise DataError(f"{what} is a tuple of {len(given)}: a pair (inputs, labels) is needed")
        inputs = given[0]
        arrays = {k: _tensor(v, f"{what}, {k}") for k, v in inputs.items()} if isinstance(inputs, Mapping) else None
        labels = _labels(_tensor(given[1], f"{what}, labels"), what)
        found = Dataset(arrays or _tensor(inputs, f"{what}, inputs"), labels)
    elif isinstance(given, Mapping):
        name = next((name for name in LABELS if name in given), None)
        if name is None:
            raise DataError(f"{what} has {', '.join(map(str, given))}; one must be called labels")
        arrays = {k: _tensor(v, f"{what}, {k}") for k, v in given.items() if k != name}
        found = Dataset(arrays, _labels(_tensor(given[name], f"{what}, {name}"), what))
    elif _is_indexable(given):
        found = Items(given, torch.arange(len(given)), what)
    else:
        raise DataError(
            f"{what} is a {type(given).__name__}, which has no length or no items by number: a torch Dataset, a Hugging"
            " Face data set, a pair of arrays (inputs, labels) or a mapping of arrays is needed"
        )
    if not len(found):
        raise DataError(f"{what} has no samples")
    if isinstance(found, Dataset):
        inputs = found.inputs if isinstance(found.inputs, Mapping) else {"inputs": found.inputs}
        for name, value in inputs.items():
            if value.dim() == 0 or len(value) != len(found):
                raise DataError(f"{what} has {len(found)} labels, and {name} of shape {tuple(value.shape)}")
        _check_mask(found.inputs, what)
    return found


def inputs_of(given: Any, what: str) -> Tensor | dict[str, Tensor]:
    """Inputs without labels, an array or arrays by name, as tensors. Raises DataError for what is none."""
    named = {k: _tensor(v, f"{what}, {k}") for k, v in given.items()} if isinstance(given, Mapping) else None
    found = _tensor(given, what) if named is None else named
    sizes = {len(x) for x in (found.values() if isinstance(found, dict) else [found])}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(f"{what} has inputs of {sorted(sizes) or 'no'} samples: as many of each, and some, are needed")
    return found


def _check_mask(inputs: Inputs, what: str) -> None:
    """Raises DataError for an attention mask that no message carries: one of other numbers than 0 and 1, or one that
    is not [samples, tokens]."""
    mask = mask_of(inputs)
    if mask is not None and mask.dim() != 2:
        raise DataError(
            f"{what}: attention_mask of shape {tuple(mask.shape)}, and [samples, tokens] is needed: call masks of other"
            " shapes something else"
        )
    if mask is not None and len(strange := mask[(mask != 0) & (mask != 1)]):
        raise DataError(
            f"{what}: attention_mask has {strange[0].item():g}, and it is of 0 and 1, which say what counts: call"
            " weights and other numbers something else"
        )


def _labels(labels: Tensor, what: str) -> Tensor:
    """As losses take them: int64, or float32. Raises DataError for those that no message can carry."""
    if labels.is_complex():
        raise DataError(f"{what}: labels that are {labels.dtype}: integers or floating-point numbers are needed")
    if labels.is_floating_point():
        if not bool(torch.isfinite(labels.float()).all()):
            raise DataError(f"{what}: labels that are infinite or NaN")
        return labels.float()
    found, most = labels.long(), torch.iinfo(torch.int32)
    if found.numel() and not most.min <= int(found.min()) <= int(found.max()) <= most.max:
        raise DataError(f"{what}: labels from {int(found.min())} to {int(found.max())}: they travel as int32")
    return found


def labels_without_reading(source: Any) -> Any:
    """All labels of a data set where it has them beside its items, so that no item is read; None where it has not.

    As `targets`, which torchvision's data sets have; as a column of a Hugging Face data set, as stored; or in the data
    set that a torch `Subset` is of.
    """
    if isinstance(source, Subset):
        whole = labels_without_reading(source.dataset)
        return None if whole is None else torch.as_tensor(whole)[list(source.indices)]
    if hasattr(source, "column_names") and hasattr(source, "with_format"):
        name = next((name for name in LABELS if name in source.column_names), None)
        return None if name is None else list(source.with_format(None)[name])
    found = getattr(source, "targets", None)
    return found if found is not None and len(found) == len(source) else None


def _tensor(array: Any, what: str) -> Tensor:
    if hasattr(array, "__array__") and not isinstance(array, Tensor):
        array = np.asarray(array)  # such as pandas' frames and columns
        if array.dtype.kind in "OUS":
            raise DataError(f"{what}: text or objects: make numbers of them, and of classes those from 0 on")
    try:
        found = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what}: no array of numbers ({error})") from None
    if found.dim() == 0:
        raise DataError(f"{what}: one number, where there is one for each sample")
    return _dense(found, what)


def _dense(array: Tensor, what: str) -> Tensor:
    if array.layout != torch.strided:
        raise DataError(f"{what}: laid out as {array.layout}: make it dense, as to_dense() does")
    return array


def _is_indexable(given: Any) -> bool:
    if isinstance(given, (str, bytes, np.ndarray, Tensor, IterableDataset)):
        return False
    return hasattr(given, "__getitem__") and hasattr(given, "__len__")


def read(samples: Dataset | Items, seed: int = 0) -> Dataset:
    """The samples, in memory. seed: of what is random in reading them."""
    return samples.read(seed) if isinstance(samples, Items) else samples


def datasets_of(given: Any, what: str) -> Dataset | Items | list[Dataset | Items]:
    """`samples_of`; of a list, one data set for each client."""
    if not isinstance(given, list):
        return samples_of(given, what)
    if not given:
        raise DataError(f"{what} is an empty list: one data set for each client is needed")
    try:
        return [samples_of(one, f"{what} of client {number}") for number, one in enumerate(given)]
    except DataError as error:
        raise DataError(f"{error} ({what} is a list, which has one data set for each client)") from None


def check_same_kinds(sets: Iterable[tuple[str, Dataset | Items]]) -> None:
    """Raises DataError for a data set whose samples are unlike the first's: in names, kinds of numbers or shapes.

    sets: with how errors call them. What is evaluated on, "test" and "validation", may be of other sizes, such as
    longer texts or larger pictures, but not of another number of dimensions.
    """
    (first, data), *others = sets
    wanted = _kinds(data)
    for what, other in others:
        found = _kinds(other)
        if found.keys() != wanted.keys():
            raise DataError(f"{what} has {', '.join(found)}, and {first} has {', '.join(wanted)}: make them alike")
        for name, (numbers, shape) in found.items():
            as_numbers, as_shape = wanted[name]
            same = len(shape) == len(as_shape) if what in ("test", "validation") else shape == as_shape
            if numbers != as_numbers or not same:
                raise DataError(
                    f"{what}: a sample's {name} are {numbers} of shape {shape}, and those of {first} are {as_numbers}"
                    f" of shape {as_shape}: make them alike"
                )


def _kinds(data: Dataset | Items) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of one sample, by name: which numbers, and their shape."""
    sample = read(data[:1])
    parts = {"inputs": sample.inputs} if isinstance(sample.inputs, Tensor) else sample.inputs
    kinds = "integers", "floating-point numbers"
    every = {**parts, "labels": sample.labels}
    return {name: (kinds[value.is_floating_point()], tuple(value.shape[1:])) for name, value in every.items()}


@dataclass(frozen=True)
class Batches:
    """A client's batches: `size` of its samples, or all if it has fewer; the same for every method of a seed.

    per_token: labels are one for each token, and end with the batch's longest text. purpose: what they are for; other
    samples for each.
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
