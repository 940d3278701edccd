"""A client's samples as numpy arrays, and its batches: those that a client with torch would draw of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.arrays import widened
from hosfl.protocol.seeds import Purpose, drawn
from hosfl.protocol.weights import read_weights
from hosfl.tasks.reading import DataError, arrays_in, returned_by, without_padding

Arrays = NDArray[Any] | dict[str, NDArray[Any]]
LABELS, MASK = ("labels", "label"), "attention_mask"


@dataclass(frozen=True)
class Samples:
    """inputs: int64 or float32 [n, ...], or several by name, such as tokens and their mask. labels: likewise [n, ...].
    Where a half takes integers of another dtype, inputs are of that: see `as_taken`.

    Raises DataError for what does not go together.
    """

    inputs: Arrays
    labels: NDArray[Any]

    def __post_init__(self) -> None:
        if not len(self):
            raise DataError("the data have no samples")
        for name, value in self.named().items():
            if value.ndim == 0 or len(value) != len(self):
                raise DataError(f"the data have {len(self)} labels, and {name} of shape {value.shape}")
        mask = self.named().get(MASK)
        if mask is not None and (mask.ndim != 2 or not np.isin(mask, (0, 1)).all() or not mask.any(1).all()):
            raise DataError(f"{MASK} of shape {mask.shape}: [n, tokens] is needed, of 0 and 1, with a 1 in every row")

    def __len__(self) -> int:
        return len(self.labels) if self.labels.ndim else 0

    def __getitem__(self, chosen: NDArray[np.int64] | slice) -> Samples:
        """Some of the samples."""
        return Samples(self._each(lambda x: x[chosen]), self.labels[chosen])

    def as_taken(self, integers: Mapping[str, np.dtype[Any]]) -> Samples:
        """With inputs that are integers in the dtypes that a half takes, by name, where these hold the same numbers."""
        inputs = self.inputs
        if not isinstance(inputs, dict):
            return Samples(_fitted(inputs, integers.get("input")), self.labels)
        return Samples({name: _fitted(value, integers.get(name)) for name, value in inputs.items()}, self.labels)

    def named(self) -> dict[str, NDArray[Any]]:
        """The inputs by name."""
        return self.inputs if isinstance(self.inputs, dict) else {"inputs": self.inputs}

    @property
    def tokens(self) -> int | None:
        """Of a sample; None where the inputs have no attention mask."""
        return self.named()[MASK].shape[1] if MASK in self.named() else None

    def trimmed(self, per_token: bool) -> Samples:
        """Without the tokens at the end that count in no sample, where a client with torch leaves them out, too.
        per_token: labels end with the tokens."""
        if self.tokens is None:
            return self
        longest = int(self.named()[MASK].any(0).nonzero()[0][-1]) + 1
        if (shorter := without_padding(self.named(), self.tokens, longest)) is None:
            return self
        return Samples(shorter, self.labels[:, :longest] if per_token else self.labels)

    def _each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Arrays:
        if isinstance(self.inputs, dict):
            return {name: change(value) for name, value in self.inputs.items()}
        return change(self.inputs)


def samples_of(given: Any, what: str) -> Samples:
    """Samples of a pair (inputs, labels), or of arrays by name with labels among them. Raises DataError."""
    if isinstance(given, Mapping):
        name = next((name for name in LABELS if name in given), None)
        if name is None:
            raise DataError(f"{what} has {', '.join(map(str, given))}; one must be called labels")
        given = ({other: value for other, value in given.items() if other != name}, given[name])
    if not isinstance(given, tuple) or len(given) != 2:
        raise DataError(f"{what} is a {type(given).__name__}: a pair (inputs, labels) or a mapping of arrays is needed")
    inputs, labels = given
    try:
        arrays = {str(k): _numbers(v, k) for k, v in inputs.items()} if isinstance(inputs, Mapping) else None
        return Samples(_numbers(inputs, "inputs") if arrays is None else arrays, _labels(_numbers(labels, "labels")))
    except DataError as error:
        raise DataError(f"{what}: {error}") from None


def read_samples(data: str) -> Samples:
    """A client's own: of a file of arrays, .npz or .safetensors, or of FILE.py:FUNCTION.

    The function returns what `samples_of` takes. Raises DataError, ValueError, OSError.
    """
    if data.endswith((".npz", ".safetensors")):
        found = arrays_in(data, lambda path: {name: widened(array) for name, array in read_weights(path).items()})
        return samples_of((found["inputs"], found["labels"]) if set(found) == {"inputs", "labels"} else found, data)
    if ".py:" not in data:
        raise ValueError(f"a client without torch reads .npz, .safetensors or FILE.py:FUNCTION, got {data!r}")
    return samples_of(returned_by(data), data)


def _numbers(value: Any, what: str) -> NDArray[Any]:
    """An array as it is computed with. Raises DataError for one that holds no numbers."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} are {array.dtype}: numbers are needed")
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64, copy=False)


def _fitted(value: NDArray[Any], dtype: np.dtype[Any] | None) -> NDArray[Any]:
    if dtype is None or value.dtype.kind == "f":
        return value
    found = value.astype(dtype)
    return found if np.array_equal(found, value) else value  # which the half will not take


def _labels(labels: NDArray[Any]) -> NDArray[Any]:
    """As they are. Raises DataError for those that no message can carry."""
    most = np.iinfo(np.int32)
    if labels.dtype == np.float32 and not np.isfinite(labels).all():
        raise DataError("labels that are infinite or NaN")
    if labels.dtype == np.int64 and labels.size and not most.min <= labels.min() <= labels.max() <= most.max:
        raise DataError(f"labels from {labels.min()} to {labels.max()}: they travel as int32")
    return labels


@dataclass(frozen=True)
class Batches:
    """`size` samples of a round, or all if there are fewer. per_token: see `Samples.trimmed`."""

    samples: Samples
    size: int
    seed: int
    client: int
    per_token: bool

    def __call__(self, round: int) -> Samples:
        chosen = drawn(self.seed, Purpose.BATCHES, round, self.client, len(self.samples), self.size)
        return self.samples[chosen].trimmed(self.per_token)
