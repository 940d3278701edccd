"""Logs replay for ever: those in tests/logs were written before the code was put into packages."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from hosfl import Log, rebuild
from hosfl.protocol.arrays import bits
from hosfl.protocol.rebuild import rebuild as rebuild_without_torch
from hosfl.protocol.weights import Weights, as_file, read_weights

LOGS = Path(__file__).parent / "logs"
DIGESTS = json.loads((LOGS / "digests.json").read_text())


@pytest.mark.parametrize("name", DIGESTS)
def test_it_verifies_and_replays_to_its_digest(name):
    log, base = LOGS / name / "hosfl.log", LOGS / name / "base.safetensors"
    assert Log.read(log).digest == DIGESTS[name]["running"]
    tensors, replica = rebuild(log, base)
    assert replica.digest().hex() == DIGESTS[name]["half"]
    arrays, other = rebuild_without_torch(log, base)
    assert other.digest() == replica.digest()
    assert arrays.keys() == tensors.keys()
    assert all(bytes(bits(arrays[key])) == bytes(bits(tensors[key])) for key in tensors)


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["triton"] = None  # importing either raises
from pathlib import Path
import numpy as np
import hosfl.protocol, hosfl_kernels
from hosfl.protocol import aggregate, arrays, lattice, log, messages, rebuild, replica, seeds, terms, weights
from hosfl.cli import main

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
found = {}
for name in json.loads((folder / "digests.json").read_text()):
    path, base = folder / name / "hosfl.log", folder / name / "base.safetensors"
    _, made = rebuild.rebuild(path, base)
    found[name] = {"running": log.Log.read(path).digest, "half": made.digest().hex()}
    assert main(["log", "verify", str(path)]) == 0
    assert main(["rebuild", str(path), "--base", str(base), "--out", str(out / name)]) == 0
    _, again = rebuild.rebuild(path, base, 5)
    records = log.Log.read(path).rounds
    # What a device does: records come as bytes, and are applied.
    sent = messages.encode(replica.to_records(records[5:], made.run, 5))
    again.apply(messages.decode(sent))
    assert again.digest() == made.digest()
x = np.zeros(100, np.float32)
hosfl_kernels.replay_([x], [1, 2], [0.5, 0.25])
assert set(np.abs(x)) == {0.25, 0.75}
assert "torch" not in [m for m in sys.modules if sys.modules[m] is not None]
json.dump(found, sys.stderr)
"""


def test_the_core_needs_no_torch(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(LOGS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == DIGESTS
    for name in DIGESTS:
        tensors, _ = rebuild(LOGS / name / "hosfl.log", LOGS / name / "base.safetensors")
        assert (tmp_path / name).read_bytes() == save(tensors)


def test_files_without_torch_are_torch_s_files(tmp_path):
    numbers = torch.arange(-6, 6)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes.append(torch.complex64)
    tensors = {f"{d}"[6:]: numbers.reshape(3, 4).to(d) for d in [*dtypes, torch.int8, torch.uint8, torch.bool]}
    tensors |= {"one": torch.tensor(3.0), "none": torch.empty(0, 3), '\u00fcber "x"': numbers.float().t()}
    data = save({name: value.contiguous() for name, value in tensors.items()})
    assert as_file(tensors) == data
    (tmp_path / "file").write_bytes(data)
    arrays = read_weights(tmp_path / "file")
    assert as_file(arrays) == data
    assert arrays["float32"].tolist() == tensors["float32"].tolist()
    assert arrays["bfloat16"].dtype == np.uint16
    one_by_one = Weights(tmp_path / "file")
    assert as_file(one_by_one) == data
    assert (len(one_by_one), one_by_one.dtype("bfloat16")) == (len(tensors), "BF16")
    (tmp_path / "strange").write_bytes(save({"x": torch.zeros(3).to(torch.float8_e5m2)}))
    with pytest.raises(ValueError, match="'x' is F8_E5M2; numpy can hold"):
        Weights(tmp_path / "strange")["x"]
    (tmp_path / "damaged").write_bytes(data[:-1])
    with pytest.raises(SafetensorError):
        Weights(tmp_path / "damaged")
    with pytest.raises(ValueError, match="'x' is complex128, which cannot be written"):
        as_file({"x": torch.zeros(1, dtype=torch.complex128)})
    with pytest.raises(IsADirectoryError):
        read_weights(tmp_path)
