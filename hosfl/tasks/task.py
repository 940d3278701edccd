"""`Task`: a model to cut, data, a loss and scores. The built-in tasks are made in the same way as a user's."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.split import SplitModel, dtype_of, split
from hosfl.settings import Rates, Settings
from hosfl.tasks.data import Dataset, Splits, digest
from hosfl.tasks.items import Items, datasets_of, global_seed, inputs_of, read, samples_of
from hosfl.tasks.reading import DataError

Scores = dict[str, float]
Model = nn.Module | tuple[nn.Module, nn.Module] | Callable[..., Any]


def adamw(half: nn.Module, decay: float) -> torch.optim.Optimizer:
    """The default optimizer of the server half."""
    return torch.optim.AdamW(half.parameters(), betas=(0.9, 0.99), weight_decay=decay)


class TaskError(TypeError):
    """An argument of a task, or what its functions return, is of the wrong type; says what is needed."""


@dataclass(frozen=True)
class Task:
    """A model and where to cut it, data, a loss and metrics. `hosfl.train(task, ...)` trains it.

        task = hosfl.Task(
            model=lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)),
            at=2,
            train=(x[:500], y[:500]),  # float32 [500, 16], int64 [500]
            test=(x[500:], y[500:]),
            loss=nn.functional.cross_entropy,
        )

    Args:
        model: a module, which is copied and cut at `at`; two halves, as `hosfl.split` returns them or as a pair, where
            shared weights become two copies; or a function without arguments that returns a new one of these each time.
            It is called under the run's seed, so that runs with other seeds start from other weights.
        train: a pair of arrays or tensors (inputs, labels), a mapping of them with "labels" among its names, a torch
            `Dataset`, or a Hugging Face data set; or a list of these, one for each client. Labels are integers within
            int32 or floating-point numbers, [samples, ...]; all samples have one shape. Data sets with numbered items
            are read batch by batch, and once for all labels where they are divided by class.
        test: likewise, one.
        loss: (outputs, labels) -> the mean loss over the batch, a tensor of one element.
        at: where to cut a whole model: see `hosfl.split`.
        validation: likewise, for choosing rates; may be left out.
        metrics: name -> (outputs, labels) of the whole set -> a number; tables show the first. None: accuracy where
            labels are classes, else the negative loss, as "score". A metric may also be an object with reset(),
            update(outputs, labels) for every batch, and compute(), such as torchmetrics'; if all are, the outputs of
            the whole set are never in memory together.
        lower_is_better: names of scores that studies minimise, such as errors. Metrics whose `higher_is_better` is
            False, as in torchmetrics, need no mention.
        optimizer: (server half, weight decay) -> its optimizer; default: AdamW with betas 0.9 and 0.99. The run sets
            its rate; of several groups the largest gets the run's, and the ratios between them stay.
        classes: all labels are below it, which the server checks; None: no check.
        ignore_index: a label that the loss ignores, as in torch's cross_entropy. Labels are then one for each token,
            [samples, length], and end with their text; the loss is the mean over those that count. None: all count.
        groups: int [training samples], by which `partition` "dirichlet" divides data; None: by labels.
        public: about a hundred unlabelled samples that are no client's and no secret, as inputs like those of `train`;
            adapters "act:..." are made from them. None: there are none, and "act" is refused.
        rates: (server rate, client rate) or (server rate, client rate, weight decay), by a method's name or by
            `Method.tuned`.
        scores: in place of metrics, (outputs, data set) -> scores by name, where a score needs more than labels.
        generated: further scores, (the halves in eval mode, data set) -> scores by name, of what a model writes.

    Raises:
        DataError: data that are none; it is a ValueError.
        TaskError: an argument of another kind than is needed; it is a TypeError.
        ValueError: arguments that do not go together.
    """

    model: Model
    train: Any
    test: Any
    loss: Callable[[Tensor, Tensor], Tensor]
    at: int | str | None = None
    validation: Any = None
    metrics: Mapping[str, Any] | None = None
    lower_is_better: Sequence[str] = ()
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw
    classes: int | None = None
    ignore_index: int | None = None
    groups: Any = None
    public: Any = None
    rates: Mapping[Any, tuple[float, ...]] = field(default_factory=dict)
    scores: Callable[[Tensor, Dataset], Scores] | None = None
    generated: Callable[[SplitModel, Any], Scores] | None = None
    _before: list[weakref.ref[nn.Module]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("train", datasets_of(self.train, "train"))
        put("test", samples_of(self.test, "test"))
        if self.validation is not None:
            put("validation", samples_of(self.validation, "validation"))
        if self.public is not None:
            put("public", inputs_of(self.public, "public"))
        if not callable(self.model) and not isinstance(self.model, tuple):
            raise TaskError(f"model is a {type(self.model).__name__}: a module, two halves or a function is needed")
        for name, of in (("loss", "outputs and labels"), ("optimizer", "a half and its weight decay")):
            if not callable(found := getattr(self, name)):
                raise TaskError(f"{name} is a {type(found).__name__}: a function of {of} is needed")
        _check_metrics(self)
        _check_lower(self)
        for key, tuned in _mapping(self.rates, "rates", "rates by a method's name").items():
            _check_rates(key, tuned)
        if self.classes is not None:
            for name, data in self.sets():
                _check_classes(name, data, self.classes, self.ignore_index)
        if self.groups is not None:
            put("groups", self._grouped())

    def with_public(self, count: int) -> Task:
        """The task with `count` evenly spread training samples, without their labels, as its public samples.

        0: the task as it is. Raises ValueError if the data are divided over clients already, or no training sample
        would be left.
        """
        if not count:
            return self
        if isinstance(self.train, list):
            raise ValueError(
                "public samples cannot be set aside of clients' own data: give the task some, Task(public=...)"
            )
        if count >= len(self.train):
            raise ValueError(f"public = {count} leaves none of {len(self.train)} training samples: set fewer aside")
        chosen = torch.arange(count) * len(self.train) // count
        rest = torch.ones(len(self.train), dtype=torch.bool).index_fill(0, chosen, False).nonzero().flatten()
        public = read(self.train[chosen]).trimmed(self.per_token).inputs
        groups = None if self.groups is None else self.groups[rest]
        return replace(self, train=self.train[rest], public=public, groups=groups)

    def sets(self) -> Iterator[tuple[str, Dataset | Items]]:
        """(name for errors, data set) of all data sets, each client's by itself. The others must be like the first."""
        sets = self.train if isinstance(self.train, list) else [self.train]
        yield from (("train" if len(sets) == 1 else f"train of client {n}", one) for n, one in enumerate(sets))
        yield "test", self.test
        if self.validation is not None:
            yield "validation", self.validation

    def _grouped(self) -> Tensor:
        if isinstance(self.train, list):
            raise ValueError("groups say how train is divided, and a list of sets is divided already: leave out groups")
        try:
            groups = torch.as_tensor(self.groups)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"groups: no array of integers ({error}): number them") from None
        if groups.shape != (len(self.train),) or groups.is_floating_point() or groups.is_complex():
            raise DataError(
                f"groups of shape {tuple(groups.shape)}, {groups.dtype}: one integer for each training sample is needed"
            )
        return groups

    @classmethod
    def of(cls, data: Splits | Dataset | Items, **more: Any) -> Task:
        """A task with checked data, see `Splits`; or with one client's own samples for every part."""
        if not isinstance(data, Splits):
            return cls(train=data, test=data, **more)
        return cls(train=data.train, validation=data.validation, test=data.test, **more)

    def data(self, part: str) -> Dataset | Items:
        """The data set "test" or "validation". Raises ValueError if there is none."""
        found: Dataset | Items | None = getattr(self, part)
        if found is None:
            raise ValueError(f"the task has no {part} data: give some, or choose another evaluate_on")
        return found

    def halves(self, seed: int, at: str = "") -> SplitModel:
        """Make the model and split it. seed: for random numbers in making it. at: where to cut; "": the task's `at`.

        Raises what `hosfl.split` raises, ValueError if it is unknown where to cut, and TaskError for what is no model.
        """
        with global_seed(seed):
            # A module is callable as well.
            given = isinstance(self.model, (nn.Module, tuple))
            made: Any = copy.deepcopy(self.model) if given else self._made()
            if isinstance(made, tuple) and len(made) == 2 and all(isinstance(half, nn.Module) for half in made):
                made = SplitModel(*made)
            if isinstance(made, nn.Module):
                _check_has_weights(made)
            if isinstance(made, SplitModel):
                if at:
                    raise ValueError(f"the task's model is cut already: leave out at = {at!r}")
                return _untie(made)
            if not isinstance(made, nn.Module):
                raise TaskError(f"the task's model is a {type(made).__name__}: a module or two halves are needed")
            place = (int(at) if at.isdecimal() else at) if at else self.at
            if place is None:
                raise ValueError("where is the model to be cut? Give the task at=, such as a layer's name or number")
            first = self.train[0] if isinstance(self.train, list) else self.train
            return split(made, place, example=read(first[:2].to("cpu", dtype_of(made))).inputs)

    def _made(self) -> Any:
        """A model from the function. Raises ValueError if it is the same one as before, which a run has changed."""
        assert callable(self.model)
        made: Any = self.model()
        first = made[0] if isinstance(made, tuple) and made else made
        if isinstance(first, nn.Module):
            if self._before and self._before[0]() is first:
                raise ValueError(
                    "the task's function gives the same module again, which a run has changed: let it make a new one,"
                    " or give the module itself, which is copied"
                )
            self._before[:] = [weakref.ref(first)]
        return made

    @property
    def per_token(self) -> bool:
        """Whether there is a label for each token."""
        return self.ignore_index is not None

    def counted(self, labels: Tensor) -> int:
        """The number of terms of which a batch's loss is the mean: samples, or labels that are not ignored."""
        return len(labels) if self.ignore_index is None else int((labels != self.ignore_index).sum())

    def running(self, labels: Tensor) -> list[Any]:
        """The metrics that take one batch after another, after a reset. labels: of any samples."""
        metrics = [metric for metric in self._metrics(labels).values() if _is_streaming_metric(metric)]
        for metric in metrics:
            metric.reset()
        return metrics

    def keeps_outputs(self, labels: Tensor) -> bool:
        """Whether any score needs the outputs for the whole data set at once. labels: of any samples."""
        return self.scores is not None or not all(map(_is_streaming_metric, self._metrics(labels).values()))

    def score(self, outputs: Tensor, data: Dataset, loss: float) -> Scores:
        """The scores of a data set, after the `running` metrics have seen all batches. loss: its mean loss."""
        if self.scores is not None:
            found = self.scores(outputs, data)
            if not isinstance(found, Mapping) or not found:
                raise TaskError(f"the task's scores are {found!r}: numbers by name are needed")
            return {name: _as_number(value, name) for name, value in found.items()}
        metrics = self._metrics(data.labels)
        if not metrics and self.generated is None:
            return {"score": -loss}
        return {
            name: _as_number(metric.compute() if _is_streaming_metric(metric) else metric(outputs, data.labels), name)
            for name, metric in metrics.items()
        }

    def _metrics(self, labels: Tensor) -> Mapping[str, Any]:
        if self.metrics is not None:
            return self.metrics
        return {} if labels.is_floating_point() or labels.dim() > 1 else {"accuracy": accuracy}

    def check_scored(self, outputs: Tensor, labels: Tensor) -> None:
        """Raises TaskError if the default accuracy does not fit these outputs."""
        default = self.metrics is None and self.scores is None and "accuracy" in self._metrics(labels)
        if default and not (outputs.dim() == 2 and outputs.shape[1] > 1):
            raise TaskError(
                f"labels that are integers are scored by the accuracy, for which {len(labels)} samples need outputs"
                f" ({len(labels)}, classes), and not {tuple(outputs.shape)}: give metrics=, or real labels"
            )

    def lower(self, scores: Iterable[str]) -> list[str]:
        """The scores among these that are better when smaller. Raises TaskError for unknown names in
        `lower_is_better`."""
        scores = list(scores)
        _check_known_scores(self.lower_is_better, scores)
        said = [
            name for name, metric in (self.metrics or {}).items() if getattr(metric, "higher_is_better", None) is False
        ]
        return [name for name in scores if name in self.lower_is_better or name in said]

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the data and of the groups by which they are divided; not of their paths.

        Of sets that are read item by item it covers their length and up to 1,024 items: see `Items.digest`.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return digest({"splits": parts, "groups": self.groups})

    def rates_of(self, key: tuple[str, ...], settings: Settings) -> Rates:
        """The rates of the settings, or else the task's. Raises ValueError if there are neither.

        key: `Method.tuned`; `rates` may have it, or its first part alone. A method without a client rate has the key
        ("frozen",).
        """
        return lookup_rates(self.rates, key, settings)


def lookup_rates(rates: Mapping[Any, tuple[float, ...]], key: tuple[str, ...], settings: Settings) -> Rates:
    """`Task.rates_of` for these rates."""
    found, frozen = rates.get(key, rates.get(key[0])), key == ("frozen",)
    if found is None:
        client_rate = 1.0 if frozen else settings.client_rate
        if not settings.server_rate or not client_rate:
            what = "server_rate" if frozen else "server_rate and client_rate"
            there = f", only for {', '.join(map(str, rates))}" if rates else ""
            raise ValueError(f"no rates are tuned for {' '.join(key)}{there}: give {what}")
        found = (settings.server_rate, client_rate, 0.0)
    tuned = Rates(*found, *(0.0,) * (3 - len(found)))
    return Rates(
        server=settings.server_rate or tuned.server,
        client=settings.client_rate or tuned.client,
        decay=tuned.decay if settings.server_decay is None else settings.server_decay,
    )


def _check_has_weights(model: nn.Module) -> None:
    """Raises TaskError for weights on the device "meta", which have no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise TaskError(
                f"the task's model has no numbers for {name}, which is on the device meta: load its weights"
            )


def _untie(halves: SplitModel) -> SplitModel:
    """Give the server half its own copy of every parameter and buffer that both halves have, as `split` does.

    `split` copies only the modules above such a weight. These halves may have any structure, so all of the server's
    modules are copied, with references among them preserved.
    """
    mine = {*halves.client.parameters(), *halves.client.buffers()}
    server = {*halves.server.parameters(), *halves.server.buffers()}
    if mine & server:
        halves.server = copy.deepcopy(halves.server, {id(kept): kept for kept in server - mine})
    return halves


def _mapping(value: Any, name: str, of: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TaskError(f"{name} is a {type(value).__name__}: a mapping is needed, {of}")
    return value


def _check_metrics(task: Task) -> None:
    for name, of in (("scores", "outputs and a data set"), ("generated", "halves and a data set")):
        found = getattr(task, name)
        if found is not None and not callable(found):
            raise TaskError(f"{name} is a {type(found).__name__}: a function of {of} is needed")
    if task.metrics is None:
        return
    if task.scores is not None:
        raise ValueError("metrics and scores: give one of them")
    if not _mapping(task.metrics, "metrics", "functions of outputs and labels by name") and task.generated is None:
        raise ValueError("metrics is empty: name one, or leave it out")
    for name, metric in task.metrics.items():
        if not isinstance(name, str) or not (callable(metric) or _is_streaming_metric(metric)):
            raise TaskError(f"the metric {name!r} is a {type(metric).__name__}: a function, by a name, is needed")


def _check_lower(task: Task) -> None:
    names = task.lower_is_better
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TaskError(f"lower_is_better is {names!r}: a tuple of names of metrics is needed")
    if task.scores is None and task.generated is None:  # of which nobody knows the names before there are some
        _check_known_scores(names, task.metrics or ())


def _check_known_scores(names: Sequence[str], scores: Iterable[str]) -> None:
    there = list(scores)
    for name in names:
        if name not in there:
            raise TaskError(
                f"lower_is_better has {name!r}, and the task's metrics are {', '.join(there) or 'left out'}"
            )


def _check_rates(key: Any, tuned: Any) -> None:
    try:
        server, client, decay = (float(rate) for rate in (*tuned, 0.0)[:3])
        right = (
            len(tuned) in (2, 3) and min(server, client) > 0 and decay >= 0 and math.isfinite(server + client + decay)
        )
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(
            f"rates of {key!r} are {tuned!r}: a server rate and a client rate are needed, positive, and a weight decay"
            " where there is one"
        )


def _check_classes(name: str, data: Dataset | Items, classes: int, ignored: int | None) -> None:
    """Check labels that are in memory; the server checks the others."""
    if isinstance(data, Items):
        return
    counted = data.labels if ignored is None else data.labels[data.labels != ignored]
    least, most = (float(counted.min()), float(counted.max())) if len(counted) else (0.0, 0.0)
    if data.labels.is_floating_point() or least < 0 or most >= classes:
        raise DataError(
            f"{name} has labels from {least:g} to {most:g}, {data.labels.dtype}: with classes = {classes} they are"
            f" integers from 0 to {classes - 1}"
        )


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """The fraction of samples whose largest output is the one of their class."""
    return float((outputs.argmax(-1) == labels).double().mean())


def _is_streaming_metric(metric: Any) -> bool:
    """Whether a metric takes one batch after another."""
    return all(callable(getattr(metric, name, None)) for name in ("reset", "update", "compute"))


def _as_number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(f"the metric {name} gives a {type(value).__name__} that is no number: {error}") from None
    return number if math.isfinite(number) else math.nan
