"""Snapshots: what was saved is loaded, damage is found, a save cut short costs nothing, optimizers go on unchanged."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hosfl.methods.state import SnapshotError, pack_optimizer, unpack_optimizer
from hosfl.runs import snapshot as snapshots
from hosfl.runs.snapshot import latest, load, save

KILLS = 2
KILLS_SLOW = 15
MUTATIONS = 1000

TENSORS = {
    "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.tensor([1.0, float("nan"), -0.0]).bfloat16(),
    "small": torch.tensor([1.5, -2.0]).half(),
    "double": torch.tensor(1 / 3, dtype=torch.float64),
    "steps": torch.tensor([2**62, -1]),
    "mask": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.empty(0, 3),
}
INFO = {"epoch": 3, "rates": [0.1, 1 / 3, 5e-324], "note": "größe", "none": None, "nested": {"flag": True}}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_equal(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert bits(tensor) == bits(others[name]), name


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- save and load ------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    path = save(tmp_path / "new" / "folder", 120, TENSORS, INFO)
    assert path == tmp_path / "new" / "folder" / "snapshot-00000120.safetensors"
    for snapshot in (load(path), latest(path.parent)):
        assert snapshot.round == 120
        assert snapshot.info == INFO
        assert_equal(snapshot.tensors, TENSORS)


def test_views_parameters_and_shared_memory(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.t(),
        "row": base[1],
        "column": base[:, 1],
        "again": base,
        "p": nn.Parameter(base),
        "e": base[:0],
    }
    loaded = load(save(tmp_path, 0, tensors, {})).tensors
    assert_equal(loaded, tensors)
    assert len({t.data_ptr() for t in loaded.values() if t.numel()}) == 5
    assert not any(t.requires_grad for t in loaded.values())


def test_loaded_tensors_are_the_reader_s_own(tmp_path):
    path = save(tmp_path, 1, TENSORS, INFO)
    data = path.read_bytes()
    snapshot = load(path)
    with path.open("r+b") as file:
        file.write(bytes(len(data)))
    assert_equal(snapshot.tensors, TENSORS)
    path.write_bytes(data)
    snapshot.tensors["weight"].zero_()
    assert_equal(load(path).tensors, TENSORS)


def test_the_newest_stay(tmp_path):
    for round in (5, 10, 100_000_000, 15, 20, 25):
        (tmp_path / "snapshot-00000007.safetensors.tmp").write_bytes(b"cut short")
        save(tmp_path, round, {}, {}, keep=2)
    kept = ["snapshot-00000020.safetensors", "snapshot-00000025.safetensors", "snapshot-100000000.safetensors"]
    assert names(tmp_path) == kept
    assert latest(tmp_path).round == 100_000_000
    (tmp_path / "snapshot-7.safetensors").touch()
    (tmp_path / "best.safetensors").touch()
    save(tmp_path, 2 * 10**8, {}, {}, keep=1)
    assert names(tmp_path) == ["best.safetensors", "snapshot-200000000.safetensors", "snapshot-7.safetensors"]


def test_saved_again_a_round_is_replaced(tmp_path):
    save(tmp_path, 1, TENSORS, {"epoch": 0})
    save(tmp_path, 1, {}, {"epoch": 1})
    assert latest(tmp_path).info == {"epoch": 1}


def test_latest_of_nothing(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": 3}, "a is a int"),
        ({"a": torch.eye(2).to_sparse()}, "a is torch.float32, torch.sparse"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(2, device="meta")}, "on meta"),
        ({"__metadata__": torch.zeros(2)}, "cannot be a tensor's name"),
        ({3: torch.zeros(2)}, "cannot be a tensor's name"),
    ],
)
def test_tensors_that_cannot_be_stored(tmp_path, tensors, reason):
    with pytest.raises(SnapshotError, match=reason):
        save(tmp_path, 1, tensors, {})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "info",
    [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": float("inf")}, {"a": {1}}, {"a": torch.zeros(1)}, {"a": 1j}],
    ids=str,
)
def test_info_that_is_no_json(tmp_path, info):
    with pytest.raises(SnapshotError, match="info"):
        save(tmp_path, 1, {}, info)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("round", "keep"), [(-1, 3), (1.0, 3), (True, 3), (1, 0)])
def test_wrong_numbers(tmp_path, round, keep):
    with pytest.raises(SnapshotError, match="round must"):
        save(tmp_path, round, {}, {}, keep)


# --- damage -------------------------------------------------------------------------------------------------------


def loads_right_or_not_at_all(path, data):
    """Whether it loads."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    try:
        snapshot = load(path)
    except SnapshotError:
        return False
    assert snapshot.round == 120
    assert snapshot.info == INFO
    assert_equal(snapshot.tensors, TENSORS)
    return True


def test_every_flipped_bit(tmp_path):
    data = save(tmp_path, 120, TENSORS, INFO).read_bytes()
    path = tmp_path / "copy.safetensors"  # under its own name the round would be checked twice
    loaded = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        loaded += loads_right_or_not_at_all(path, bytes(flipped))
    assert loaded < 100  # white space of the JSON, and the like


def test_every_truncation(tmp_path):
    path = save(tmp_path, 120, TENSORS, INFO)
    data = path.read_bytes()
    assert not any(loads_right_or_not_at_all(path, data[:length]) for length in range(len(data)))
    assert not loads_right_or_not_at_all(path, data + b"\0")


def test_mutations(tmp_path):
    path = save(tmp_path, 120, TENSORS, INFO)
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(MUTATIONS):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at, length = rng.randrange(len(mutated)), rng.choice((1, 8, 100))
            match rng.randrange(4):
                case 0:
                    mutated[at : at + length] = rng.randbytes(length)
                case 1:
                    mutated[at:at] = rng.randbytes(length)
                case 2:
                    del mutated[max(1, at) : at + length]
                case 3:
                    mutated[:8] = rng.choice((2**63, 2**40, len(data), 2, 0)).to_bytes(8, "little")
        loads_right_or_not_at_all(path, bytes(mutated))


def latest_and_reasons(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return latest(folder), [str(w.message) for w in caught]


def test_damaged_snapshots_are_passed_over(tmp_path):
    paths = [save(tmp_path, round, TENSORS, INFO) for round in (1, 2, 3)]
    assert latest_and_reasons(tmp_path)[1] == []
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    snapshot, reasons = latest_and_reasons(tmp_path)
    assert snapshot.round == 2
    assert len(reasons) == 1
    assert reasons[0].startswith(f"passed over a snapshot: {paths[2]} cannot be read: ")
    data = bytearray(paths[1].read_bytes())
    data[-1] ^= 1
    paths[1].write_bytes(data)
    snapshot, reasons = latest_and_reasons(tmp_path)
    assert snapshot.round == 1
    assert reasons[1] == f"passed over a snapshot: {paths[1]} is damaged: its digest is wrong"
    paths[0].write_bytes(b"")
    snapshot, reasons = latest_and_reasons(tmp_path)
    assert snapshot is None
    assert len(reasons) == 3


def test_info_that_is_none_with_a_right_digest(tmp_path):
    save(tmp_path, 1, TENSORS, INFO)
    dense = {name: tensor.contiguous().clone() for name, tensor in TENSORS.items()}
    path = tmp_path / "snapshot-00000002.safetensors"
    for text, reason in [("", "no JSON"), ("[" * 100_000, "no JSON"), ("[]", "an object"), ("3", "an object")]:
        metadata = {"format": snapshots.FORMAT, "round": "2", "info": text}
        save_file(dense, path, metadata={**metadata, "digest": snapshots._digest(2, text, dense)})
        with pytest.raises(SnapshotError, match=reason):
            load(path)
        snapshot, reasons = latest_and_reasons(tmp_path)
        assert (snapshot.round, len(reasons)) == (1, 1)


def test_files_that_are_no_snapshots(tmp_path):
    with pytest.raises(SnapshotError, match="cannot be read"):
        load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(SnapshotError, match="is no snapshot"):
        load(tmp_path / "model.safetensors")
    path = save(tmp_path, 120, TENSORS, INFO)
    with pytest.raises(SnapshotError, match="holds round 120: it was renamed"):
        load(path.rename(tmp_path / "snapshot-00000121.safetensors"))
    assert load((tmp_path / "snapshot-00000121.safetensors").rename(tmp_path / "best.safetensors")).round == 120


# --- disks and processes ------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_others(tmp_path):
    save(tmp_path, 1, TENSORS, INFO)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(SnapshotError, match=r"snapshot-00000002\.safetensors cannot be written"):
            save(tmp_path, 2, TENSORS, INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["snapshot-00000001.safetensors"]
    assert latest(tmp_path).round == 1


def test_a_failed_sync_leaves_the_others(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    save(tmp_path, 1, TENSORS, INFO)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SnapshotError, match="Input/output error"):
        save(tmp_path, 2, TENSORS, INFO)
    assert names(tmp_path) == ["snapshot-00000001.safetensors"]


def test_synced_before_the_rename_and_after_it(tmp_path, monkeypatch):
    steps = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def recorded_fsync(descriptor):
        steps.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_replace(self, target):
        steps.append(("rename", self.name, target.name))
        return replace(self, target)

    def recorded_unlink(self, missing_ok=False):
        steps.append(("delete", self.name))
        unlink(self, missing_ok)

    save(tmp_path, 1, TENSORS, INFO)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    monkeypatch.setattr(Path, "unlink", recorded_unlink)
    save(tmp_path, 2, TENSORS, INFO, keep=1)
    name = "snapshot-00000002.safetensors"
    assert steps == [
        ("fsync", name + ".tmp"),
        ("rename", name + ".tmp", name),
        ("fsync", tmp_path.name),
        ("delete", "snapshot-00000001.safetensors"),
    ]


WRITER = """
import sys, torch
from hosfl.runs.snapshot import save
for round in range(int(sys.argv[2]), 1_000_000):
    save(sys.argv[1], round, {"a": torch.full((50_000,), float(round))}, {"round": round})
    print(round, flush=True)
"""


def kill_and_load(folder, times, seed):
    """Kill a writer at random moments: the newest snapshot is whole, and not older than the last acknowledged one."""
    rng, start = random.Random(seed), 0
    for _ in range(times):
        command = [sys.executable, "-c", WRITER, str(folder), str(start)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            first = process.stdout.readline()
            time.sleep(rng.uniform(0, 0.2))
        finally:
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()
            process.wait()
            process.stdout.close()
        acknowledged = int((first + rest).split(b"\n")[-2])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            snapshot = latest(folder)
        assert acknowledged <= snapshot.round <= acknowledged + 1
        assert snapshot.info == {"round": snapshot.round}
        assert torch.equal(snapshot.tensors["a"], torch.full((50_000,), float(snapshot.round)))
        start = snapshot.round + 1


def test_a_killed_writer_loses_nothing(tmp_path):
    kill_and_load(tmp_path, KILLS, seed=0)


@pytest.mark.slow
def test_a_writer_killed_often_loses_nothing(tmp_path):
    kill_and_load(tmp_path, KILLS_SLOW, seed=1)


# --- optimizers ---------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1 / 3, betas=(0.8, 1 - 1e-3)),
    "Adam, rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "Rprop": torch.optim.Rprop,
    "Adadelta": torch.optim.Adadelta,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def parameters(dtype):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (3,), ())]


def step(optimizer, weights, number):
    generator = torch.Generator().manual_seed(number)
    gradients = [torch.randn(w.shape, generator=generator).to(w.dtype) for w in weights]

    def closure():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient + weight.detach()
        return sum(((w.detach() ** 2).sum().float() for w in weights), torch.zeros(()))

    closure()
    optimizer.step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_with_the_same_bits(tmp_path, name, dtype):
    weights = parameters(dtype)
    optimizer = OPTIMIZERS[name](weights)
    for number in range(3):
        step(optimizer, weights, number)
    tensors, info = pack_optimizer(optimizer)
    saved = tensors | {f"weight.{i}": w for i, w in enumerate(weights)}
    snapshot = load(save(tmp_path, 3, saved, {"optimizer": info}))
    assert snapshot.info == {"optimizer": info}

    others = [nn.Parameter(snapshot.tensors[f"weight.{i}"].clone()) for i in range(len(weights))]
    other = OPTIMIZERS[name](others)
    for group in other.param_groups:
        group["lr"] = 123.0
    unpack_optimizer(other, snapshot.tensors, snapshot.info["optimizer"])
    before = {name: bits(tensor) for name, tensor in snapshot.tensors.items()}
    for number in (3, 4):
        step(optimizer, weights, number)
        step(other, others, number)
        for weight, restored in zip(weights, others, strict=True):
            assert bits(weight) == bits(restored)
    expected, state = pack_optimizer(optimizer), pack_optimizer(other)
    assert expected[1] == state[1]
    assert_equal(expected[0], state[0])
    assert before == {name: bits(tensor) for name, tensor in snapshot.tensors.items()}  # copied, not taken over


def test_names_and_groups(tmp_path):
    weights = parameters(torch.float32)
    groups = [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "betas": (0.5, 0.25)}]
    optimizer = torch.optim.Adam(groups)
    step(optimizer, weights, 0)
    tensors, info = pack_optimizer(optimizer)
    assert set(tensors) == {f"state.{i}.{key}" for i in range(3) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors["state.0.exp_avg"].data_ptr() == optimizer.state[weights[0]]["exp_avg"].data_ptr()
    other = torch.optim.Adam([{"params": weights[:1]}, {"params": weights[1:]}])
    unpack_optimizer(other, tensors, info)
    for group, restored in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in restored.items() if k != "params"}
        assert type(restored["betas"]) is tuple


def test_floats_of_every_kind(tmp_path):
    weights = parameters(torch.float32)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    kinds = [float("inf"), -float("inf"), -0.0, 5e-324, 1e308, 1 / 3, (1, (2.0, [None, True, "x"])), {3: {"a": 1}}]
    optimizer.param_groups[0]["kinds"] = [*kinds, float("nan")]
    tensors, info = pack_optimizer(optimizer)
    other = torch.optim.SGD(weights, lr=0.2)
    unpack_optimizer(other, tensors, load(save(tmp_path, 0, tensors, info)).info)
    *restored, nan = other.param_groups[0]["kinds"]
    assert repr(restored) == repr(kinds)
    assert nan != nan


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, b"x", {1.5: 2}, torch.eye(2).to_sparse(), torch.Size([1])])
def test_what_cannot_be_packed_is_named(value):
    optimizer = torch.optim.SGD(parameters(torch.float32), lr=0.1)
    optimizer.param_groups[0]["strange"] = [value]
    with pytest.raises(SnapshotError, match=r"param_groups\.0\.strange\.0 is "):
        pack_optimizer(optimizer)


def test_two_tensors_of_one_name():
    weights = parameters(torch.float32)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    optimizer.state[weights[0]] = {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}
    with pytest.raises(SnapshotError, match=r"two tensors have the name state\.0\.a\.b"):
        pack_optimizer(optimizer)


def test_a_state_that_does_not_fit():
    weights = parameters(torch.float32)
    optimizer = torch.optim.Adam(weights)
    step(optimizer, weights, 0)
    tensors, info = pack_optimizer(optimizer)
    before = repr(optimizer.state_dict())
    for other, reason in [
        (torch.optim.AdamW(weights), "the state is of Adam, the optimizer is AdamW"),
        (torch.optim.Adam(weights[:2]), "the state is for parameters"),
        (torch.optim.Adam([{"params": weights[:1]}, {"params": weights[1:]}]), "the state is for parameters"),
        (torch.optim.Adam(parameters(torch.bfloat16)), "the state is for parameters"),
    ]:
        with pytest.raises(SnapshotError, match=reason):
            unpack_optimizer(other, tensors, info)
        assert not other.state
    del tensors["state.1.exp_avg"]
    with pytest.raises(SnapshotError, match=r"the tensor 'state.1.exp_avg' is missing"):
        unpack_optimizer(optimizer, tensors, info)
    for state in (None, [], {"dict": []}, {"dict": [1]}, {"float": "1"}, {"dict": [["state", 3], ["param_groups", 3]]}):
        with pytest.raises(SnapshotError):
            unpack_optimizer(optimizer, tensors, info | {"state": state})
    assert repr(optimizer.state_dict()) == before


def test_nothing_is_pickled():
    source = (Path(__file__).parent.parent / "hosfl" / "runs" / "snapshot.py").read_text()
    assert "import pickle" not in source
    assert "torch.save" not in source
    assert "torch.load" not in source
