"""A client's samples as numpy arrays, and its batches: those that a client with torch would draw of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.arrays import widened
from hosfl.protocol.seeds import Purpose, drawn
from hosfl.protocol.weights import read_weights
from hosfl.tasks.padding import without_padding
from hosfl.tasks.reading import DataError, call_user_function, load_arrays

Arrays = NDArray[Any] | dict[str, NDArray[Any]]
LABELS, MASK = ("labels", "label"), "attention_mask"


@dataclass(frozen=True)
class Samples:
    """A client's samples.

    inputs: an array [n, ...] in the dtype it is stored in, or several by name, such as tokens and their mask. labels:
    integers or float32, [n, ...]. Only batches are cast, by `cast_for_half`: a whole file would become several times as
    large, such as pictures from uint8 to int64.

    Raises DataError if shapes do not match, or for an attention mask of other numbers than 0 and 1.
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

    def cast_for_half(self, integers: Mapping[str, np.dtype[Any]]) -> Samples:
        """The samples as the half takes them: floats as float32, integers in the dtypes of `integers`, else int64."""
        inputs = self.inputs
        if not isinstance(inputs, dict):
            return Samples(_cast(inputs, integers.get("input")), self.labels)
        return Samples({name: _cast(value, integers.get(name)) for name, value in inputs.items()}, self.labels)

    def check_castable(self, integers: Mapping[str, np.dtype[Any]]) -> None:
        """Raises DataError if `cast_for_half` would change a number."""
        for name, value in self.named().items():
            dtype = integers.get(name if isinstance(self.inputs, dict) else "input")
            if dtype is None:
                continue
            if value.dtype.kind == "f":
                raise DataError(f"{name} has {value.dtype} numbers, and the half takes {dtype}: save them as integers")
            least, most = int(value.min(initial=0)), int(value.max(initial=0))
            ends = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
            if not ends[0] <= least <= most <= ends[1]:
                raise DataError(f"{name} has numbers from {least} to {most}, and the half takes {ends[0]} to {ends[1]}")

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
        longest = int(np.flatnonzero(self.named()[MASK].any(0))[-1]) + 1
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
        arrays = {str(k): _as_numbers(v, k) for k, v in inputs.items()} if isinstance(inputs, Mapping) else None
        return Samples(
            _as_numbers(inputs, "inputs") if arrays is None else arrays, _checked_labels(_as_numbers(labels, "labels"))
        )
    except DataError as error:
        raise DataError(f"{what}: {error}") from None


def read_samples(data: str) -> Samples:
    """A client's own: of a file of arrays, .npz or .safetensors, or of FILE.py:FUNCTION.

    The function returns what `samples_of` takes. Raises DataError, ValueError, OSError.
    """
    if data.endswith((".npz", ".safetensors")):
        found = load_arrays(data, lambda path: {name: widened(array) for name, array in read_weights(path).items()})
        return samples_of((found["inputs"], found["labels"]) if set(found) == {"inputs", "labels"} else found, data)
    if ".py:" not in data:
        raise ValueError(f"a client without torch reads .npz, .safetensors or FILE.py:FUNCTION, got {data!r}")
    return samples_of(call_user_function(data), data)


def _as_numbers(value: Any, what: str) -> NDArray[Any]:
    """An array as it is kept: nothing wider than float32. Raises DataError for one that holds no numbers."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} are {array.dtype}: numbers are needed")
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        return array
    with np.errstate(over="ignore"):  # infinite: whoever looks at it refuses it
        return array.astype(np.float32, copy=False)


def _cast(value: NDArray[Any], dtype: np.dtype[Any] | None) -> NDArray[Any]:
    if value.dtype.kind == "f":
        return value.astype(np.float32, copy=False)
    return value.astype(np.int64 if dtype is None else dtype, copy=False)


def _checked_labels(labels: NDArray[Any]) -> NDArray[Any]:
    """Integers as they are, others in float32. Raises DataError for those that no message can carry."""
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise DataError("labels that are infinite or NaN")
        return labels.astype(np.float32, copy=False)
    most, ends = np.iinfo(np.int32), (int(labels.min(initial=0)), int(labels.max(initial=0)))
    if not most.min <= ends[0] <= ends[1] <= most.max:
        raise DataError(f"labels from {ends[0]} to {ends[1]}: they travel as int32")
    return labels


@dataclass(frozen=True)
class Batches:
    """`size` samples of a round, or all if there are fewer. per_token: see `Samples.trimmed`. integers: see
    `Samples.cast_for_half`. purpose: what they are for; other samples for each."""

    samples: Samples
    size: int
    seed: int
    client: int
    per_token: bool
    integers: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    purpose: Purpose = Purpose.BATCHES

    def __call__(self, round: int) -> Samples:
        chosen = drawn(self.seed, self.purpose, round, self.client, len(self.samples), self.size)
        return self.samples[chosen].trimmed(self.per_token).cast_for_half(self.integers)
