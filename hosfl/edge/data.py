"""A client's samples and batches as numpy arrays. The batches are those that a client with torch draws."""

from __future__ import annotations

from collections.abc import Mapping
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

    inputs: an array [n, ...] in the dtype that it is stored in, or several by name, such as tokens and their mask.
    labels: integers or float32, [n, ...]. Only batches are cast, by `cast_for_half`: a whole file would become several
    times as large, such as pictures from uint8 to int64.

    Raises DataError if there are no samples, if shapes do not match, or for an attention mask that is not [n, tokens]
    of 0 and 1 with a 1 in every row.
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

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Samples:
        """Select samples, as numpy selects rows."""
        inputs = self.inputs
        selected = {name: x[rows] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
        return Samples(selected, self.labels[rows])

    def cast_for_half(self, integers: Mapping[str, np.dtype[Any]]) -> Samples:
        """Cast inputs to the half's dtypes: floats to float32, integers to those of `integers`, by name, or int64."""
        inputs = self.inputs
        if not isinstance(inputs, dict):
            return Samples(_cast(inputs, integers.get("input")), self.labels)
        return Samples({name: _cast(value, integers.get(name)) for name, value in inputs.items()}, self.labels)

    def check_castable(self, integers: Mapping[str, np.dtype[Any]]) -> None:
        """Raise DataError if `cast_for_half` would change a number."""
        for name, value in self.named().items():
            dtype = integers.get(name if isinstance(self.inputs, dict) else "input")
            if dtype is None:
                continue
            if value.dtype.kind == "f":
                raise DataError(f"{name} has {value.dtype} numbers, and the half takes {dtype}: save them as integers")
            least, largest = int(value.min(initial=0)), int(value.max(initial=0))
            limits = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
            if not limits[0] <= least <= largest <= limits[1]:
                raise DataError(
                    f"{name} has numbers from {least} to {largest}, and the half takes {limits[0]} to {limits[1]}"
                )

    def named(self) -> dict[str, NDArray[Any]]:
        """The inputs by name; a single array is called "inputs"."""
        return self.inputs if isinstance(self.inputs, dict) else {"inputs": self.inputs}

    @property
    def tokens(self) -> int | None:
        """The tokens of a sample, padding included; None where the inputs have no attention mask."""
        return self.named()[MASK].shape[1] if MASK in self.named() else None

    def trimmed(self, per_token: bool) -> Samples:
        """Return the samples without the tokens at the end that are padding in all of them.

        Nothing is removed where a client with torch removes nothing. per_token: whether there is a label per token.
        """
        if self.tokens is None:
            return self
        longest = int(np.flatnonzero(self.named()[MASK].any(0))[-1]) + 1
        if (shorter := without_padding(self.named(), self.tokens, longest)) is None:
            return self
        return Samples(shorter, self.labels[:, :longest] if per_token else self.labels)


def samples_of(data: Any, source: str) -> Samples:
    """Make samples from a pair (inputs, labels), or from a mapping of arrays with one called "labels" or "label".

    source: where the data come from, for error messages. Raises DataError.
    """
    if isinstance(data, Mapping):
        labels_name = next((name for name in LABELS if name in data), None)
        if labels_name is None:
            raise DataError(f"{source} has {', '.join(map(str, data))}; one must be called labels")
        data = ({name: value for name, value in data.items() if name != labels_name}, data[labels_name])
    if not isinstance(data, tuple) or len(data) != 2:
        raise DataError(
            f"{source} is a {type(data).__name__}: a pair (inputs, labels) or a mapping of arrays is needed"
        )
    inputs, labels = data
    try:
        arrays: Arrays
        if isinstance(inputs, Mapping):
            arrays = {str(name): _as_numbers(value, name) for name, value in inputs.items()}
        else:
            arrays = _as_numbers(inputs, "inputs")
        return Samples(arrays, _checked_labels(_as_numbers(labels, "labels")))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def read_samples(data: str) -> Samples:
    """Read a client's own samples: from a file of arrays, .npz or .safetensors, or from FILE.py:FUNCTION.

    The function returns what `samples_of` takes. Raises DataError, ValueError, OSError.
    """
    if data.endswith((".npz", ".safetensors")):
        arrays = load_arrays(data, lambda path: {name: widened(array) for name, array in read_weights(path).items()})
        return samples_of((arrays["inputs"], arrays["labels"]) if set(arrays) == {"inputs", "labels"} else arrays, data)
    if ".py:" not in data:
        raise ValueError(f"a client without torch reads .npz, .safetensors or FILE.py:FUNCTION, got {data!r}")
    return samples_of(call_user_function(data), data)


def _as_numbers(value: Any, name: str) -> NDArray[Any]:
    """Return an array whose floats are float32 or narrower. Raises DataError if it does not hold numbers."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} are {array.dtype}: numbers are needed")
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        return array
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which later checks refuse
        return array.astype(np.float32, copy=False)


def _cast(value: NDArray[Any], dtype: np.dtype[Any] | None) -> NDArray[Any]:
    """Cast floats to float32, and integers to this dtype, or int64."""
    if value.dtype.kind == "f":
        return value.astype(np.float32, copy=False)
    return value.astype(np.int64 if dtype is None else dtype, copy=False)


def _checked_labels(labels: NDArray[Any]) -> NDArray[Any]:
    """Return integer labels as they are, others in float32. Raises DataError for labels that a message cannot carry."""
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise DataError("labels that are infinite or NaN")
        return labels.astype(np.float32, copy=False)
    limits, least, largest = np.iinfo(np.int32), int(labels.min(initial=0)), int(labels.max(initial=0))
    if not limits.min <= least <= largest <= limits.max:
        raise DataError(f"labels from {least} to {largest}: they travel as int32")
    return labels


@dataclass(frozen=True)
class Batches:
    """Draws a round's batch: `size` samples, or all if there are fewer.

    per_token: see `Samples.trimmed`. integers: see `Samples.cast_for_half`. purpose: what the batches are for; each
    purpose draws other samples.
    """

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
