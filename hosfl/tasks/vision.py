"""Classification of pictures: CIFAR-10 and CIFAR-100, also noisy or inverted, by small residual networks."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hosfl.halves.split import SplitModel, split
from hosfl.settings import Settings
from hosfl.tasks.data import Dataset, Splits, split_held_out
from hosfl.tasks.picture_files import class_folders, hub_picture, picture_file
from hosfl.tasks.pretrained import pretrained_task
from hosfl.tasks.reading import DataError, class_numbers, hub_column, load_from_hub, read_bytes
from hosfl.tasks.task import Task

HUB = {"cifar10": ("uoft-cs/cifar10", "label"), "cifar100": ("uoft-cs/cifar100", "fine_label")}
CLASSES = {"cifar10": 10, "cifar100": 100}
SIZE = (32, 32)
MEAN, DEVIATION = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, with which the published weights were trained


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al., 2016).

    Where pictures get smaller and channels more, the shortcut takes every second pixel, and zeros for the new channels.
    """

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.new_channels = stride, out - width

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            padding = self.new_channels // 2
            x = nn.functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, padding, padding))
        return nn.functional.relu(x + y)


class CifarResNet(nn.Module):
    """The residual network of 6 n + 2 layers for small pictures: He et al., "Deep Residual Learning", 2016.

    [batch, 3, 32, 32] -> [batch, classes]. Stages of 16, 32 and 64 channels with n blocks each; n = 3: ResNet-20.
    """

    def __init__(self, classes: int, n: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(n - 1)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        output: Tensor = self.fc(self.avgpool(x).flatten(1))
        return output


def pretrained_resnet(path: Path, classes: int) -> CifarResNet:
    """Load a CifarResNet from a file: a state dictionary, or a checkpoint that has one as "state_dict".

    Names may begin with "module.", and call the last layer "linear", as in the weights published with
    github.com/akamaster/pytorch_resnet_cifar10. The depth follows from the names. A last layer for another number of
    classes is replaced by a random one. Raises OSError; DataError naming the file and what does not fit.
    """
    raw = read_bytes(path)
    try:
        saved = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        state = {
            name.removeprefix("module.").replace("linear.", "fc."): value
            for name, value in saved.get("state_dict", saved).items()
        }
        finite = {name: bool(value.isfinite().all()) for name, value in state.items()}
    except Exception as error:  # of any type, since the file may hold anything
        raise DataError(f"{path} holds no state dictionary of tensors: {error}") from None
    for name in state:
        if not finite[name]:
            raise DataError(f"{path}: {name} has values that are not finite")
    try:
        model = CifarResNet(classes, len({name.split(".")[1] for name in state if name.startswith("layer1.")}))
        if "fc.bias" in state and len(state["fc.bias"]) != classes:
            state |= model.fc.state_dict(prefix="fc.")
        model.load_state_dict(state)
    except Exception as error:
        raise DataError(f"{path} does not hold the weights of a residual network for CIFAR: {error}") from error
    return model


def load_pictures(name: str, folder: Path | None) -> Splits:
    """Load CIFAR-10 or CIFAR-100, float32 [n, 3, 32, 32], standardised with ImageNet's mean and deviation.

    folder: with picture files in train/CLASS/ and test/CLASS/; classes are numbered in the order of the training part's
    names, which is CIFAR-10's official order. None: the hub's data set, which needs the package datasets and a network.
    A tenth of the training part is held out as validation data. Raises OSError; DataError naming the file; ImportError.
    """
    if folder is None:
        return _load_from_hub(name)
    names, train = _list_pictures(name, folder / "train")
    _, test = class_folders(folder / "test", names)
    return _load_files(*(tuple(PictureFile.of(path, label) for path, label in part) for part in (train, test)))


def add_noise(splits: Splits, noise: float = 0.2, inverted: bool = False) -> Splits:
    """Add normal noise to every pixel and channel, the same in every run.

    noise: its deviation, as a share of the range. inverted: whether colours are inverted first.
    """
    random = torch.Generator().manual_seed(0)
    parts = (splits.train, splits.validation, splits.test)
    return Splits(*(_add_noise(part, random, noise, inverted) for part in parts))


def _add_noise(data: Dataset, random: torch.Generator, noise: float, inverted: bool) -> Dataset:
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    assert isinstance(data.inputs, Tensor)
    pictures = (1 - 2 * mean) / deviation - data.inputs if inverted else data.inputs
    return Dataset(pictures + noise / deviation * torch.randn(pictures.shape, generator=random), data.labels)


VARIANTS: dict[
    str, dict[str, Any]
] = {  # of a task's pictures, by the second part of its name: arguments of `add_noise`
    "noisy": {"noise": 0.2, "inverted": False},
    "inverted": {"noise": 0.1, "inverted": True},
}


def read_client_pictures(config: Settings, path: Path, longest: int) -> Dataset:
    """Read one client's samples: a folder with a folder for each class, which may be empty; or its folder train."""
    name, _, variant = config.task.partition("-")
    _, pictures = _list_pictures(name, path / "train" if (path / "train").is_dir() else path, require_all=False)
    data = _make_dataset([picture_file(file, SIZE) for file, _ in pictures], [label for _, label in pictures])
    return _add_noise(data, torch.Generator().manual_seed(0), **VARIANTS[variant]) if variant else data


def _list_pictures(name: str, folder: Path, require_all: bool = True) -> tuple[list[str], list[tuple[Path, int]]]:
    """Call `class_folders` for a part that must have as many classes as the data set."""
    names, pictures = class_folders(folder, require_all=require_all)
    if len(names) != CLASSES[name]:
        raise DataError(
            f"{folder}: {CLASSES[name]} folders, one per class, are needed, there are {len(names)}: {', '.join(names)}"
        )
    return names, pictures


class PictureFile(NamedTuple):
    """A picture file in its current version, as a key of a cache: it is unequal once the file is written again."""

    path: Path
    label: int
    size: int
    changed: tuple[int, int]

    @classmethod
    def of(cls, path: Path, label: int) -> PictureFile:
        status = path.stat()
        return cls(path, label, status.st_size, (status.st_mtime_ns, status.st_ctime_ns))


@lru_cache(maxsize=1)  # for a study, whose runs follow one another in one process
def _load_files(train: tuple[PictureFile, ...], test: tuple[PictureFile, ...]) -> Splits:
    return _hold_out_validation(
        *(
            _make_dataset([picture_file(file.path, SIZE) for file in part], [file.label for file in part])
            for part in (train, test)
        )
    )


@lru_cache(maxsize=1)
def _load_from_hub(name: str) -> Splits:
    where, label_column = HUB[name]
    names = ("train", "test")
    numbers = [str(number) for number in range(CLASSES[name])]
    parts: list[Dataset] = []
    for part, rows in zip(names, load_from_hub(where, parts=names), strict=True):
        raw_labels, pictures = (hub_column(rows, column, f"{where}, {part}") for column in (label_column, "img"))
        samples = [(f"{where}, {part}, row {number}", {"label": label}) for number, label in enumerate(raw_labels)]
        labels = class_numbers(samples, numbers, training=parts[0].labels.unique().tolist() if parts else ())
        pixels = [hub_picture(pictures, number, place, SIZE) for number, (place, _) in enumerate(samples)]
        parts.append(_make_dataset(pixels, labels))
    return _hold_out_validation(*parts)


def _hold_out_validation(train: Dataset, test: Dataset) -> Splits:
    kept, held_out = map(torch.from_numpy, split_held_out(train.labels.numpy()))
    return Splits(train[kept], train[held_out], test)


def _make_dataset(pixels: list[NDArray[Any]], labels: list[int]) -> Dataset:
    """Standardise pictures, uint8 [32, 32, 3] each, and make a data set of them."""
    mean, deviation = (np.asarray(v, dtype=np.float32) for v in (MEAN, DEVIATION))
    inputs = (np.stack(pixels).astype(np.float32) / 255 - mean) / deviation
    return Dataset(torch.from_numpy(inputs).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64))


def pictures_task(config: Settings, samples: Dataset | None = None) -> Task:
    """Make a task of CIFAR-10 or CIFAR-100 and a pretrained residual network.

    "cifar10-noisy" adds noise to the pictures; "cifar10-inverted" inverts their colours and adds half as much noise.

    config.data: see `load_pictures`. config.model: a file, see `pretrained_resnet`. By default the cut is before
    "layer2.0": the client half has the first convolution and the first stage. samples: one client's samples from
    `read_client_pictures`, instead of all parts.
    """
    if not config.model:
        raise ValueError(f"the {config.task} task needs a model: a file with its weights, such as resnet20-12fca82f.th")
    name, _, variant = config.task.partition("-")
    data: Splits | Dataset = (
        load_pictures(name, Path(config.data) if config.data else None) if samples is None else samples
    )
    if variant and isinstance(data, Splits):
        data = add_noise(data, **VARIANTS[variant])

    def model(at: int | str) -> SplitModel:
        return split(pretrained_resnet(Path(config.model), CLASSES[name]), at)

    return pretrained_task(data, CLASSES[name], model, replace(config, at=config.at or "layer2.0"))
