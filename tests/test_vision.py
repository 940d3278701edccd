"""Pictures: folders, the hub's data sets, published weights, inputs that change."""

import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from hosfl import Config, split, train
from hosfl.tasks.vision import DEVIATION, MEAN, CifarResNet, add_noise, load_pictures, pretrained_resnet

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures of each class to train on and 2 to test, each of one shade of grey: its class's, and its number's."""
    folder = tmp_path_factory.mktemp("cifar")
    for part, many in (("train", 20), ("test", 2)):
        for label, name in enumerate(NAMES):
            (folder / part / name).mkdir(parents=True)
            for number in range(many):
                grey = np.full((32, 32, 3), 20 * label + number, dtype=np.uint8)
                Image.fromarray(grey).save(folder / part / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """As published: trained on several devices, with another name for the last layer."""
    torch.manual_seed(0)
    state = CifarResNet(10, 1).state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet8.th"
    torch.save({"state_dict": {"module." + k.replace("fc.", "linear."): v for k, v in state.items()}}, path)
    return path


def shades(data):
    """The grey of every picture, as it was in its file."""
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    return ((data.inputs * deviation + mean) * 255).mean((1, 2, 3)).round().long()


def test_a_folder_of_pictures(folder):
    splits = load_pictures("cifar10", folder)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [180, 20, 20]
    for part in (splits.train, splits.validation, splits.test):
        assert torch.equal(shades(part) // 20, part.labels)
    assert splits.validation.labels.bincount().tolist() == [2] * 10  # stratified
    assert not set(shades(splits.train).tolist()) & set(shades(splits.validation).tolist())
    assert splits.test.inputs.shape[1:] == (3, 32, 32)


def test_the_hub_gives_the_same(folder, monkeypatch):
    asked = []

    def part(name):
        paths = sorted((folder / name).glob("*/*.png"), key=lambda p: (p.parent.name, p.name))
        return {"img": [Image.open(p) for p in paths], "label": [NAMES.index(p.parent.name) for p in paths]}

    def load_dataset(*name):
        asked.append(name)
        return {name: part(name) for name in ("train", "test")}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    there, here = load_pictures("cifar10", None), load_pictures("cifar10", folder)
    assert asked == [("uoft-cs/cifar10",)]
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(there, part).inputs, getattr(here, part).inputs)
        assert torch.equal(getattr(there, part).labels, getattr(here, part).labels)


def test_what_is_wrong_with_a_folder_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="100 folders, one per class, are needed, there are 10"):
        load_pictures("cifar100", folder)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    Image.new("RGB", (32, 16)).save(tmp_path / "train" / "cat" / "small.png")
    with pytest.raises(ValueError, match=r"small.png: a picture of 32 x 32 is needed, it has \(32, 16\)"):
        load_pictures("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError):
        load_pictures("cifar10", tmp_path / "nowhere")


def test_published_weights_are_read(weights):
    model = pretrained_resnet(weights, 10).eval()
    torch.manual_seed(0)
    assert torch.equal(model.fc.weight, CifarResNet(10, 1).fc.weight)
    assert len(model.layer1) == 1
    more = pretrained_resnet(weights, 100)  # other classes: a new last layer
    assert more.fc.weight.shape == (100, 64)
    assert torch.equal(more.conv1.weight, model.conv1.weight)
    saved = torch.load(weights)
    del saved["state_dict"]["module.bn1.weight"]
    torch.save(saved, weights.with_name("torn.th"))
    with pytest.raises(ValueError, match=r"bn1\.weight"):
        pretrained_resnet(weights.with_name("torn.th"), 10)
    for wrong in (b"", b"no weights", pickle.dumps(print)):
        weights.with_name("wrong.th").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"wrong\.th holds no state dictionary"):
            pretrained_resnet(weights.with_name("wrong.th"), 10)


def test_the_network_is_the_published_one_and_can_be_cut():
    """ResNet-20 has 0.27 million weights: He et al., table 6. Every cut composes to the whole, to the bit."""
    model = CifarResNet(10).eval()
    assert sum(p.numel() for p in model.parameters()) == 269_722
    x = torch.randn(2, 3, 32, 32)
    assert [model.layer1(model.conv1(x)).shape[1:], model.layer2[0].stride] == [(16, 32, 32), 2]
    with torch.no_grad():
        for at in ("bn1", "layer1.0", "layer2.1", "layer3.2"):
            assert torch.equal(split(model, at)(x), model(x))


def test_inputs_change_alike_in_every_run(folder):
    splits = load_pictures("cifar10", folder)
    once, again = add_noise(splits), add_noise(splits)
    assert torch.equal(once.test.inputs, again.test.inputs)
    difference = (once.train.inputs - splits.train.inputs) * torch.tensor(DEVIATION)[:, None, None]
    assert difference.std() == pytest.approx(0.2, rel=0.02)
    assert abs(difference.mean()) < 0.001
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    pixels, others = (s.test.inputs * deviation + mean for s in (splits, add_noise(splits, 0.0, inverted=True)))
    assert torch.allclose(others, 1 - pixels, atol=1e-5)


def test_a_run_over_pictures(folder, weights, tmp_path):
    settings = {"task": "cifar10-noisy", "data": str(folder), "model": str(weights), "at": "layer1.0"}
    config = Config(**settings, rounds=2, batch=4, clients=4, server_rate=1e-3, client_rate=1e-3)
    summary = train(config, tmp_path / "run")
    assert summary.replicas.equal
    assert summary.bytes_per_client_round["cut up"] == 4 * 16 * 32 * 32 * 4
    inverted = train(Config(**{**settings, "task": "cifar10-inverted"}, rounds=1, server_rate=1e-3, client_rate=1e-3))
    assert inverted.loss != summary.loss
    with pytest.raises(ValueError, match="needs a model: a file with its weights"):
        train(Config(**{**settings, "model": ""}, rounds=2, server_rate=1e-3, client_rate=1e-3))
